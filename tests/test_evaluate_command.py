"""`midimamba evaluate`: a model or a folder of MIDI beside a corpus, as a report that is whole or not there."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.image import imread
from symusic import Note, Score, Track

import support
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.evaluation import comparison_page
from midimamba.evaluation.two_sample import FOLDS
from midimamba.hub_cards.evaluation import read_evaluation
from midimamba.result_options import FEWEST_SAMPLES
from support import make_generator, make_score

# Its figures are tested in tests/evaluation.
pytestmark = pytest.mark.usefixtures("quick_comparison")


# Ends as if it were killed when the page is in its place and the report is not.
KILLED = """
import json, os, sys
from pathlib import Path
from midimamba.cli import main

def replace(file, target, before=Path.replace):
    before(file, target)
    if target.suffix == ".md":
        os._exit(9)

Path.replace, sys.argv = replace, json.loads(sys.argv[1])
main()
"""


def write_song(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    score, track = Score(480), Track(program=0)
    for step in range(64):
        track.notes.append(Note(step * 240, 240, 60 + chance.choice((0, 2, 4, 5, 7, 9, 11)), 64))
    score.tracks.append(track)
    score.dump_midi(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    midi = tmp_path_factory.mktemp("songs")
    for seed in range(40):
        write_song(midi / f"{seed}.mid", seed)
    tokenize_corpus(str(midi), midi / "data", CorpusOptions(vocab_size=None, test_fraction=0.5, num_workers=1))
    return midi / "data"


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    for seed in range(100, 108):
        write_song(folder / f"{seed}.mid", seed)
    (folder / "broken.mid").write_bytes(b"MThd")
    return folder


@pytest.fixture(scope="module")
def generator(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    processor = load_corpus(corpus)[1]
    make_generator(vocab_size=processor.vocab_size, pad_token_id=processor.pad_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(songs: Path, generator: Path, corpus: Path) -> dict[str, Path]:
    return {"songs": songs, "generator": generator, "corpus": corpus}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return support.command(monkeypatch, "evaluate", *arguments)


def test_a_folder_of_midi_gets_its_report(
    songs: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "report.json"
    assert command(monkeypatch, songs, "--reference", corpus, "--out", out, "--length", 32, "--bars", 6) == 0
    report = json.loads(out.read_text())
    assert report["figures"]["usable_samples"]["estimate"]["value"] == pytest.approx(8 / 9)
    assert "held_out_nll_per_note" not in report["figures"]
    assert report["settings"]["bars_per_piece"] == 6
    assert report["settings"]["split"] == "test"
    page = out.with_suffix(".md").read_text()
    for name in ("features", "sample-0", "sample-1", "real-0", "real-1"):
        assert f"(report-{name}.png)" in page
        imread(out.with_name(f"report-{name}.png"))
    assert imread(out.with_name("report-features.png")).shape[:2] == (1200, 1600)
    assert len(list(out.parent.iterdir())) == 7
    distance = report["figures"]["frechet_distance"]
    line = next(line for line in page.splitlines() if "Fréchet" in line)
    for value in (*distance["estimate"].values(), distance["floor"]):
        assert f"{value:.3g}" in line
    assert line in capsys.readouterr().out
    assert all(table in page for table in read_evaluation(out).table.split("\n\n"))  # the same in a card


@pytest.mark.slow
def test_a_model_is_sampled_and_asked_for_its_likelihood(
    generator: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--num", 18, "--bars", 2, "--max-new-tokens", 40, "--length", 16, "--temperature", 0.9)
    for name in ("one", "two"):
        assert (
            command(monkeypatch, generator, "--reference", corpus, "--out", tmp_path / f"{name}.json", *options) == 0
        )
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert first == second
    assert first["figures"]["held_out_nll_per_note"]["estimate"]["value"] > 0
    assert first["figures"]["usable_samples"]["estimate"]["value"] == 1  # the grammar sees to that
    assert first["figures"]["grammar_errors"]["estimate"]["value"] > 0.1  # and what it prevents is reported
    assert (first["settings"]["samples"], first["settings"]["temperature"]) == (18, 0.9)


@pytest.fixture
def evaluate(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `evaluate` on `music` in a folder with too little in it. Returns the exit code and the last line."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("empty", 0), ("two", 2)):
        (tmp_path / name).mkdir()
        for seed in range(count):
            make_score(seed).dump_midi(tmp_path / name / f"{seed}.mid")

    def run(music: str, *options: str) -> tuple[int, str]:
        folder = folders.get(music, tmp_path / music)
        usual = ("--reference", folders["corpus"], "--out", "out/report.json", "--length", 32, "--bars", 6)
        code = command(monkeypatch, folder, *usual, *options)
        return code, capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("music", "options", "reason"),
    [
        ("empty", (), "neither a generator"),
        ("songs", ("--reference", "nowhere"), "not a tokenized corpus"),
        ("songs", ("--split", "validation"), "the validation split holds"),
        ("songs", ("--out", "report.txt"), "ends in .json"),
        ("generator", ("--num", "4"), "num is 4: give at least 5"),
        ("songs", ("--top-p", "0.5"), "top_p is for sampling from a generator, and"),
        ("generator", ("--temperature", "0"), "temperature is 0.0: give a number from 0.001 to 1000"),
        ("songs", ("--bars", "0"), "bars is 0: give at least 1"),
        ("songs", ("--length", "3"), "length is 3: give at least 4"),
        ("two", (), "2 of 2 samples can be used"),
    ],
)
def test_bad_input_is_refused_in_a_line_and_nothing_is_written(
    music: str, options: tuple[str, ...], reason: str, evaluate: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, line = evaluate(music, *options)
    assert code == 2
    assert reason in line
    assert {file.name for file in tmp_path.iterdir()} == {"empty", "two"}


def test_a_report_that_is_there_is_not_replaced(
    songs: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.md").write_text("mine")
    assert command(monkeypatch, songs, "--reference", corpus, "--out", tmp_path / "report.json") == 2
    assert "already exists" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_a_run_that_was_killed_while_it_wrote_can_be_made_again(
    songs: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (songs, "--reference", corpus, "--out", tmp_path / "report.json", "--length", 32, "--bars", 6)
    words = ["midimamba", "evaluate", *map(str, line)]
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(words)], capture_output=True, timeout=300)
    assert killed.returncode == 9, killed.stderr
    assert (tmp_path / "report.md").exists()
    assert not (tmp_path / "report.json").exists()
    (tmp_path / "report.md").write_text("half")
    assert command(monkeypatch, *line) == 0
    assert (tmp_path / "report.json").exists()
    assert (tmp_path / "report.md").read_text() != "half"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_failure_while_writing_leaves_nothing(
    songs: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(comparison_page, "_page", fail)
    with pytest.raises(OSError, match="disk full"):
        command(
            monkeypatch, songs, "--reference", corpus, "--out", tmp_path / "report.json", "--length", 32, "--bars", 6
        )
    assert not list(tmp_path.iterdir())


def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--help") == 0
    assert "example: midimamba evaluate" in capsys.readouterr().out


def test_every_fold_of_a_classifier_gets_a_sample() -> None:
    assert FEWEST_SAMPLES == FOLDS
