"""`midimamba infill`, from a folder of music to a filled file; and what it refuses, in one line each."""

import runpy
import sys
from pathlib import Path

import pytest
from symusic import Score, Tempo
from symusic.core import ScoreTick

from midimamba import MidiProcessor, launching, load
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from midimamba.tokenization.musical_time import bar_starts
from midimamba.tokenization.tokenizer import build_tokenizer
from support import command, make_generator, make_score


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with the tokenizer of a corpus that was made for infilling."""
    folder = tmp_path_factory.mktemp("infill")
    (folder / "music").mkdir()
    for seed in range(4):
        make_score(seed).dump_midi(folder / "music" / f"{seed}.mid")
    options = CorpusOptions(
        vocab_size=800, infill=True, valid_fraction=0, test_fraction=0, controls=("key",), num_workers=1
    )
    tokenize_corpus(str(folder / "music"), folder / "data", options)
    processor = load_corpus(folder / "data")[1]
    make_generator(vocab_size=processor.vocab_size).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def song(tmp_path: Path) -> Path:
    score = make_score(9, bars=8)
    score.tempos.append(Tempo(777, 77.0))
    score.tempos.sort()
    for track, name in zip(score.tracks, ("Melody", "Fiddle", "Flute", "Kit"), strict=True):
        track.name = name
    score.dump_midi(tmp_path / "song.mid")
    return tmp_path / "song.mid"


def outside(score: ScoreTick, start: float, end: float) -> list[object]:
    """Everything but the notes of the second and third track that begin between two ticks."""
    tracks = [
        (
            track.name,
            track.program,
            sorted(
                (note.time, note.pitch, note.duration, note.velocity)
                for note in track.notes
                if index not in (1, 2) or not start <= note.time < end
            ),
        )
        for index, track in enumerate(score.tracks)
    ]
    return [score.ticks_per_quarter, tracks, list(score.tempos), list(score.time_signatures)]


@pytest.mark.slow
def test_a_file_comes_back_with_new_bars_and_nothing_else(
    model: Path, song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--bars", "3-4", "--tracks", "2,3", "--num", 2, "--control", "key=G-minor", "--top-p", 1)
    assert command(monkeypatch, "infill", model, song, "--out", tmp_path / "out", *options) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["song-00.mid", "song-01.mid"]
    before = Score(song)
    lines = bar_starts(before)
    found = [Score(file) for file in files]
    for score in found:
        assert outside(score, lines[2], lines[4]) == outside(before, lines[2], lines[4])
    assert len({tuple(map(str, score.tracks[1].notes)) for score in [*found, before]}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bars", "5-99"), "bars 5 to 99 are not all there: the piece has bars 1 to "),
        (("--bars", "five"), "bars is 'five': write the first bar and the last, such as 5-8"),
        (("--bars", "6-5"), "give the first bar and the last"),
        (
            ("--bars", "5", "--tracks", "7"),
            "there is no track 7: tracks can name 1 'Melody', 2 'Fiddle', 3 'Flute', 4 'Kit'",
        ),
        (("--bars", "5", "--tracks", "0"), "there is no track 0"),
        (("--bars", "5", "--tracks", "all"), "tracks is 'all': write numbers such as 1,2"),
        (("--bars", "5", "--num", "0"), "num is 0: give at least 1"),
        (("--bars", "5", "--control", "key=H"), "has no value 'H'"),
        (("--bars", "5", "--format", "mp3"), "add --render"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_and_nothing_is_written(
    model: Path,
    song: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert command(monkeypatch, "infill", model, song, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_music_and_models_that_never_learned_it_are_refused(
    song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = MidiProcessor(build_tokenizer())
    make_generator(vocab_size=processor.vocab_size).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "text.mid").write_text("no music")
    rest = ("--bars", "1-2", "--out", tmp_path / "out")
    for file, message in (
        (song, "has not learned to fill gaps: train one with"),
        (tmp_path / "text.mid", "text.mid cannot be used: not a well-formed MIDI file"),
    ):
        assert command(monkeypatch, "infill", tmp_path / "model", file, *rest) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_infilling_stays_as_it_was_and_others_than_remi_cannot_have_it(tmp_path: Path) -> None:
    (tmp_path / "music").mkdir()
    make_score(0).dump_midi(tmp_path / "music" / "0.mid")
    for name, infill in (("plain", False), ("infill", True)):
        options = CorpusOptions(vocab_size=None, valid_fraction=0, test_fraction=0, infill=infill, num_workers=1)
        report = tokenize_corpus(str(tmp_path / "music"), tmp_path / name, options)
        assert report["arguments"].get("infill") is (True if infill else None)
    plain, infilling = (load_corpus(tmp_path / name)[0]["train"][0]["input_ids"] for name in ("plain", "infill"))
    assert plain[0] == infilling[0] == 1
    assert plain[1:-1] == [index - 2 for index in infilling[1:-1]]
    for tokenization in ("TSD", "MMM", "Octuple"):
        with pytest.raises(InputError, match="infilling needs REMI"):
            tokenize_corpus(
                str(tmp_path / "music"), tmp_path / "no", CorpusOptions(tokenization=tokenization, infill=True)
            )
    options = CorpusOptions(tokenizer=str(tmp_path / "plain" / "tokenizer"), infill=True)
    with pytest.raises(InputError, match="has no tokens for infilling: leave out --infill"):
        tokenize_corpus(str(tmp_path / "music"), tmp_path / "no", options)


@pytest.mark.slow
def test_train_makes_a_model_that_fills_gaps(
    song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "music").mkdir()
    for seed in range(12):
        make_score(seed).dump_midi(tmp_path / "music" / f"{seed}.mid")
    given: list[str] = []

    def run(script: str, arguments: list[str], started: float) -> int:
        given.extend(arguments)
        return 0

    monkeypatch.setattr(launching, "run_script", run)
    assert (
        command(monkeypatch, "train", tmp_path / "music", "--out", tmp_path / "model", "--infill", "--steps", 4) == 0
    )
    assert given[given.index("--infill_share") + 1] == "0.3"
    data = given[given.index("--data") + 1]
    shape = "--hidden_size 16 --num_hidden_layers 1 --sequence_length 400 --lookback_bars 1 2 --max_steps 4"
    rest = f"--data {data} --output_dir {tmp_path / 'model'} --infill_share 0.5 --use_cpu --eval_strategy no"
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *shape.split(), *rest.split(), "--save_strategy", "no"])
    runpy.run_path(str(Path(__file__).parents[1] / "training" / "pretrain.py"), run_name="__main__")
    processor = MidiProcessor.from_pretrained(tmp_path / "model")
    # Look-back does not reach from the bars before a gap to those after it, which come first; a filling looks ahead.
    config = load(str(tmp_path / "model")).config
    assert (config.gap_token_id, config.fill_token_id) == (processor.arranger.gap_id, processor.arranger.fill_id)
    assert config.lookahead_bars == [1, 2]
    options = ("--bars", "2", "--num", 1, "--out", tmp_path / "out")
    assert command(monkeypatch, "infill", tmp_path / "model", song, *options) == 0
    # A corpus without the tokens is refused before anything is trained.
    plain = CorpusOptions(vocab_size=None, valid_fraction=0, test_fraction=0, num_workers=1)
    tokenize_corpus(str(tmp_path / "music"), tmp_path / "plain", plain)
    arguments = f"--plan true --data {tmp_path / 'plain'} --output_dir {tmp_path / 'no'} --infill_share 0.3 --use_cpu"
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments.split()])
    capfd.readouterr()
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(__file__).parents[1] / "training" / "pretrain.py"), run_name="__main__")
    assert "has no tokens for infilling: make it with `midimamba tokenize SOURCE --infill`" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_new_notes_of_a_gap_keep_to_constraints(
    model: Path, song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("infill", model, song, "--out", tmp_path / "out", "--bars", "3-4", "--tracks", "2", "--num", 1)
    options = ("--scale", "C,E,G", "--pitch-range", "violin=60-72", "--notes-per-bar", "2-4")
    assert command(monkeypatch, *line, *options) == 0
    before, after = Score(song), Score(tmp_path / "out" / "song-00.mid")
    lines = bar_starts(before)
    new = [note for note in after.tracks[1].notes if lines[2] <= note.time < lines[4]]
    assert {note.pitch for note in new} <= {60, 64, 67, 72}
    assert all(2 <= sum(lines[bar] <= note.time < lines[bar + 1] for note in new) <= 4 for bar in (2, 3))
