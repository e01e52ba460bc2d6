"""`midimamba app` behind the page: the roll, composing, training, and what the command refuses."""

import importlib.util
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from serving_support import make_pair, sample_without_end
from starlette.exceptions import HTTPException

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[app]'")

import gradio as gr
from app_support import save_model

from midimamba.app import growing
from midimamba.app.application import application
from midimamba.app.compose_tab import _constraints
from midimamba.app.curve import draw_curve
from midimamba.app.growing import Picture, Wish
from midimamba.app.options import AppOptions
from midimamba.app.roll import Marks, bars_shown, draw_roll
from midimamba.app.studio import Studio
from midimamba.app.train_tab import TrainTab
from midimamba.app.training_run import Point, TrainingRun, check_name, collect
from midimamba.app.workshop import Workshop
from midimamba.cli import COMMANDS, build_parser
from midimamba.command_options import SamplingOptions, TrainOptions
from midimamba.errors import InputError
from midimamba.evaluation.judges import Ensemble, load_judges
from midimamba.generation import choose_scores, generate_scores, infill_scores
from midimamba.options import read_options, split_flags
from midimamba.tokenization.constraints import Constraints
from support import command, make_discriminator, make_score


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    studio = Studio(str(save_model(tmp_path_factory.mktemp("app") / "tiny")))
    yield studio
    studio.close()


@pytest.fixture
def song(tmp_path: Path) -> Path:
    make_score(3, bars=4).dump_midi(tmp_path / "song.mid")
    return tmp_path / "song.mid"


def pictures(studio: Studio, **wish: Any) -> list[Picture]:
    return list(studio.compose(Wish(**{"bars": 2, "temperature": 1.0, "seed": 5} | wish), "me"))


@pytest.mark.slow
def test_a_piece_grows_and_is_what_the_command_writes(studio: Studio, song: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(growing, "_PICTURE_SECONDS", 0.01)
    *early, last = pictures(studio, file=song)
    counts = [picture.new_notes for picture in early]
    assert counts == sorted(counts)
    assert last.is_whole
    model, processor = make_pair()
    options = SamplingOptions(num=1, bars=2, temperature=1.0, seed=5, max_new_tokens=240)
    (expected,) = generate_scores(model, processor, options, prompt=song)
    assert last.score == expected
    assert last.new_notes == expected.note_num() - make_score(3, bars=4).note_num() > 0
    assert last.marks.given == 4  # although a note sounds into the fifth


@pytest.mark.slow
def test_discriminators_that_lie_beside_a_generator_choose(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tuned")
    _, processor = make_pair()
    discriminator = make_discriminator(vocab_size=processor.vocab_size)
    discriminator.save_pretrained(tmp_path / "tuned-discriminator")
    with closing(Studio(str(folder))) as studio:
        assert studio.information.discriminators == [str(tmp_path / "tuned-discriminator")]
        *early, last = pictures(studio, choose=True)
        alone = pictures(studio)[-1]
    assert all(picture.new_notes == 0 for picture in early)
    options = SamplingOptions(num=1, bars=2, temperature=1.0, seed=5, max_new_tokens=240)
    judge = Ensemble(load_judges([tmp_path / "tuned-discriminator"], processor))
    assert last.score == choose_scores(*make_pair(), judge, options).scores[0] != alone.score


@pytest.mark.slow
def test_bars_are_filled_as_the_command_fills_them(studio: Studio, song: Path) -> None:
    *_, last = pictures(studio, file=song, span=(2, 3), tracks=[1])
    model, processor = make_pair()
    options = SamplingOptions(num=1, temperature=1.0, seed=5, max_new_tokens=240)
    (expected,) = infill_scores(model, processor, song, (2, 3), [0], options)
    assert last.score == expected
    assert last.marks.chosen == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wish", "line"),
    [
        ({"controls": {"mood": "sad"}}, "mood"),
        ({"constraints": {"scale": "H-major"}}, "scale is 'H-major'"),
        ({"span": (1, 2)}, "drop a MIDI file first"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_makes_no_sense_is_one_line(studio: Studio, wish: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        pictures(studio, **wish)


@pytest.mark.slow
def test_a_bar_that_is_not_there_and_a_damaged_file_are_one_line(studio: Studio, song: Path) -> None:
    with pytest.raises(HTTPException, match="bars 9 to 9 are not all there"):
        pictures(studio, file=song, span=(9, 9))
    song.write_bytes(b"MThd")
    with pytest.raises(HTTPException, match="the file cannot be used"):
        pictures(studio, file=song)


@pytest.mark.slow
def test_a_cancelled_piece_ends_and_the_next_one_is_composed(studio: Studio, monkeypatch: Any) -> None:
    at_work = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(growing, "generate_scores", lambda *arguments, **options: sample_without_end(at_work))
        composing = studio.compose(Wish(bars=2), "me")
        next(composing)
        assert at_work.wait(10)
        assert studio.cancel("me")
        with pytest.raises(HTTPException, match="cancelled"):
            list(composing)
    assert pictures(studio)[-1].is_whole


def test_the_roll_shows_every_note_and_numbers_every_bar() -> None:
    score = make_score(1, bars=5)
    roll = draw_roll(score, Marks(chosen=(2, 3), given=1))
    assert roll.count('class="roll-note"') == score.note_num()
    assert re.findall(r'data-bar="(\d+)"', roll) == [str(bar) for bar in range(1, bars_shown(score) + 1)]
    assert roll.count("roll-chosen") == 2  # the bars, and the legend
    assert all(name in roll for name in ("Acoustic Grand Piano", "Violin", "Flute", "Drums"))


def test_names_of_tracks_are_no_html_in_the_roll() -> None:
    score = make_score(1, bars=2)
    score.tracks[0].name = "<img src=x onerror=alert(1)>"
    assert "<img" not in draw_roll(score)


def test_an_empty_roll_has_room_for_the_bars() -> None:
    assert draw_roll(None, Marks(least=8)).count("data-bar") == 8


def test_the_curve_has_a_point_for_every_loss_and_survives_nan() -> None:
    curve = draw_curve([Point(0.1, 5.0), Point(0.2, float("nan"))], [Point(0.2, 5.5)], minutes=1)
    assert curve.count("<circle") == 2
    assert "nan" not in curve


def test_the_page_asks_for_constraints_in_the_words_of_the_command() -> None:
    given = {"scale": "D-dorian", "low": 48, "high": None, "polyphony": 4, "grid": "1/8", "instruments": ["piano"]}
    expected = Constraints("D-dorian", ("48-127",), ("piano",), 4, "1/8")
    assert Constraints.of(_constraints(given, fills=False)) == expected
    assert "instruments" not in _constraints(given, fills=True)
    assert Constraints.of(_constraints(dict.fromkeys(given), fills=False)) is None


@pytest.mark.slow
def test_a_piece_is_written_in_three_formats(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    try:
        written = workshop.write(make_score(2, bars=2), "piece")
        assert sorted(written.files) == [".abc", ".mid", ".wav"]
        assert all(path.stat().st_size for path in written.files.values())
    finally:
        workshop.close()


DIES = """
import os, signal, sys
from midimamba.app.workshop import Workshop
if __name__ == "__main__":
    print(Workshop(__import__("pathlib").Path()).run(os.getpid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_writes_files_ends_with_the_page_however_that_ends(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    done = subprocess.run([sys.executable, tmp_path / "dies.py"], stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 10
    while psutil.pid_exists(int(done.stdout)):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "x" * 41, "old-data", "-x"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a generator"):
        check_name(name, tmp_path)


def test_a_generator_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").touch()
    with pytest.raises(InputError, match="already a generator 'mine'"):
        check_name("mine", tmp_path)


def test_files_of_the_same_name_are_all_collected(tmp_path: Path) -> None:
    files = [tmp_path / folder / "song.mid" for folder in "ab"]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_bytes(bytes([number]))
    music = collect(files, tmp_path / "mine")
    assert sorted(file.read_bytes() for file in music.iterdir()) == [b"\0", b"\1"]
    with pytest.raises(InputError, match="no music to train on"):
        collect([], tmp_path / "mine")


SAYS = r"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have told its children to ignore
print("reading", flush=True)
sys.stdout.write("\r 50%|x| 1/2 [00:01<00:01, 1.0it/s]\r")
sys.stdout.write("\r100%|x| 1/1 [00:01<00:00, 1.0it/s]\r")
print("\x1b[Astep 30  loss 3.5  grad_norm 1  epoch 1")
print("step 30  eval_loss 4.5  eval_runtime 1", flush=True)
print("saving", flush=True)
if "--wait" in sys.argv: time.sleep(60)
"""


def run_of(script: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> TrainingRun:
    """A run of a script in place of the command."""
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "midimamba.cli", "train"]
        return real([sys.executable, "-c", *script.split("\0")], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return TrainingRun(folder, folder / "mine", ["--infill"])


def wait_for(run: TrainingRun, line: str) -> None:
    end = time.monotonic() + 20
    while run.state().line != line:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_losses_and_lines_of_a_run_are_read_while_it_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = run_of(SAYS, monkeypatch, tmp_path)
    wait_for(run, "saving")
    run._reader.join(20)
    state = run.state()
    assert [point.loss for point in state.training] == [3.5]
    assert [point.loss for point in state.held_out] == [4.5]
    assert (state.progress, state.code, state.was_stopped) == ("1/2", 0, False)


@pytest.mark.parametrize(
    ("bar", "said"),
    [
        ("Reading:  17%|█▋        | 68/407 [00:29<05:43,  1.01s/file]", "Reading 68 of 407"),
        ("Encoding:   8%|▊         | 33/403 [00:00<00:01, 329.83piece/s]", "Encoding 33 of 403"),
        ("Listing: 12file [00:04, 4.86s/file]", "Listing 12"),
        ("splits: 59 by hash", "splits: 59 by hash"),
    ],
)
def test_a_run_says_how_far_it_has_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bar: str, said: str) -> None:
    wait_for(run_of(f"print({bar!r}, flush=True)", monkeypatch, tmp_path), said)


def test_a_first_generator_learns_from_some_chorales(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def start(command: list[str], **options: Any) -> Any:
        asked.append(command[3:])
        return real(["true"], **options)

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    with gr.Blocks():
        tab = TrainTab(tmp_path / "out")
    tab.begin_first()
    own, passed = split_flags(asked[0], *COMMANDS["train"].options)
    options = read_options(TrainOptions, build_parser().parse_args(own), passed=passed)
    assert (options.data, options.out, options.limit) == ("chorales", tmp_path / "out" / "bach", 60)
    assert (options.steps, options.time) == (200, None)


def test_a_run_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = run_of(f"{SAYS}\0--wait", monkeypatch, tmp_path)
    wait_for(run, "saving")
    assert run.state().code is None
    run.stop()
    run._reader.join(20)
    assert run.state().was_stopped
    assert run.state().code


@pytest.mark.parametrize("origin", ["http://elsewhere.example", "null"])
def test_pages_of_other_sites_are_refused(tmp_path: Path, origin: str) -> None:
    with application(AppOptions(out=tmp_path / "out"), tmp_path) as app:
        client = TestClient(app, base_url="http://127.0.0.1:7860")
        assert client.get("/").status_code == 200
        assert client.get("/", headers={"Origin": origin}).status_code == 403
        assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 421


def test_a_missing_gradio_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert command(monkeypatch, "app") == 2
    assert capsys.readouterr().err == 'error: gradio is not installed; run: pip install "midimamba[app]"\n'


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="port is 65536"):
        AppOptions(port=65536)


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(monkeypatch, "app", tmp_path / "none", "--port", "0", "--no-browser") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert logging.getLogger("midimamba.tokenization.composing").level == logging.NOTSET  # for who goes on
