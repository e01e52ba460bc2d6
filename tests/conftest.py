"""Settings of all tests: no network, and tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, as long as it is told before anything imports it.
    os.environ["TRITON_INTERPRET"] = "1"

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.tokenization.corpus import tokenize_corpus
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from support import make_generator, make_score

# Tiny tensors gain nothing from a second thread, and lose much when another process keeps its core busy.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> MidiMambaForCausalLM:
    return make_generator()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic scores, tokenized: the folder that scripts take as `--data`."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "midi").mkdir()
    for seed in range(12):
        make_score(seed).dump_midi(folder / "midi" / f"{seed}.mid")
    tokenize_corpus(str(folder / "midi"), folder / "data", vocab_size=720, num_workers=1)
    return folder / "data"


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained generator for `corpus`, with its processor: the folder that scripts take as `--model`."""
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
