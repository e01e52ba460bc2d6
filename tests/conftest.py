"""Settings of all tests: no network, one thread, folders of one's own; and what many tests begin with."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when transformers and trackio are imported. Each worker has its own, so that none sees another's files.
_SCRATCH = tempfile.TemporaryDirectory(prefix="midimamba-tests-", ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = f"{_SCRATCH.name}/modules"
os.environ["TRACKIO_DIR"] = f"{_SCRATCH.name}/trackio"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from symusic.core import ScoreTick

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter if this is set before anything imports it.
    os.environ["TRITON_INTERPRET"] = "1"

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.evaluation import comparison_halves, two_sample
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from support import Notes, make_generator, make_score

# Tiny tensors gain nothing from a second thread, and lose much when another process keeps that core busy.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> MidiMambaForCausalLM:
    return make_generator()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic scores, tokenized: a folder that scripts accept as `--data`."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "midi").mkdir()
    for seed in range(12):
        make_score(seed).dump_midi(folder / "midi" / f"{seed}.mid")
    tokenize_corpus(str(folder / "midi"), folder / "data", CorpusOptions(vocab_size=720, num_workers=1))
    return folder / "data"


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained generator for `corpus`, with its processor: a folder that scripts accept as `--model`."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    processor = MidiProcessor.from_pretrained(corpus / "tokenizer")
    make_generator(vocab_size=processor.vocab_size).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor() -> MidiProcessor:
    """REMI with 760 ids, byte-pair encoding learned on six synthetic scores."""
    tokenizer = build_tokenizer("REMI")
    train_tokenizer(tokenizer, [make_score(seed) for seed in range(6)], 760)
    return MidiProcessor(tokenizer)


@pytest.fixture(scope="session")
def scores() -> list[ScoreTick]:
    return [make_score(seed) for seed in range(40)]


@pytest.fixture
def quick_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    For tests of what is done with a comparison, not of its figures: one halving of the reference and one epoch of the
    classifier take a tenth of the time.
    """
    monkeypatch.setattr(comparison_halves, "HALVINGS", 1)
    monkeypatch.setattr(two_sample, "_EPOCHS", 1)


@pytest.fixture
def midi_folder(tmp_path: Path) -> Callable[[int], Path]:
    """A function that writes `count` MIDI files, every other one in a subfolder, and returns their folder."""

    def write(count: int) -> Path:
        folder = tmp_path / "music"
        (folder / "more").mkdir(parents=True, exist_ok=True)
        for seed in range(count):
            name = f"more/{seed:03}.MID" if seed % 2 else f"{seed:03}.mid"
            make_score(seed, bars=3).dump_midi(str(folder / name))
        return folder

    return write


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker begins a long file when the others are almost done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def notes_of(score: ScoreTick) -> list[tuple[int, bool, int, int, int]]:
    """Sorted (program, drums, pitch, onset, duration), times in twelfths of a quarter note."""
    scale = score.ticks_per_quarter / 12
    return sorted(
        (
            0 if track.is_drum else track.program,
            track.is_drum,
            note.pitch,
            round(note.time / scale),
            round(note.duration / scale),
        )
        for track in score.tracks
        for note in track.notes
    )


@pytest.fixture(scope="session")
def notes() -> Notes:
    return notes_of


@pytest.fixture(scope="session")
def random_score() -> Callable[..., ScoreTick]:
    return make_score
