"""Pictures have ink where the notes are."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from symusic import Note, Score, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.evaluation.rendering import draw_piano_roll


def make_score(*notes: tuple[int, int, int, int]) -> ScoreTick:
    """One track of (start, duration, pitch, velocity) at 480 ticks per quarter and 120 quarters per minute."""
    score = Score(480)
    track = Track(name="Piano")
    for note in notes:
        track.notes.append(Note(*note))
    score.tracks.append(track)
    return score


def coloured_box(path: Path) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of everything that is not grey, in pixels."""
    pixels = imread(path)[..., :3]
    rows, columns = np.nonzero(np.ptp(pixels, axis=-1) > 0.2)
    return columns.min(), columns.max(), rows.min(), rows.max()


def test_a_note_is_drawn_where_it_sounds(tmp_path: Path) -> None:
    early_low, late_high = (0, 480, 40, 100), (5 * 480, 480, 80, 100)
    boxes = {}
    for name, shown in {"both": (1, 1), "low": (1, 0), "high": (0, 1)}.items():
        # A velocity of 0 is nearly transparent, so the axes stay the same and only one note has colour.
        notes = [(*note[:3], 127 if there else 0) for note, there in zip((early_low, late_high), shown, strict=True)]
        draw_piano_roll(make_score(*notes), tmp_path / f"{name}.png")
        pixels = imread(tmp_path / f"{name}.png")[..., :3]
        rows, columns = np.nonzero(np.ptp(pixels, axis=-1) > 0.5)
        boxes[name] = (columns.mean(), rows.mean())
    assert imread(tmp_path / "both.png").shape[:2] == (400, 1200)
    assert boxes["low"][0] < 300 < 900 > boxes["high"][0] > 600
    assert boxes["low"][1] > 250 > 150 > boxes["high"][1]


def test_loud_notes_are_darker(tmp_path: Path) -> None:
    ink = []
    for velocity in (20, 120):
        draw_piano_roll(make_score((0, 1920, 60, velocity)), tmp_path / "roll.png")
        ink.append((1 - imread(tmp_path / "roll.png")[..., :3]).sum())
    assert ink[1] > 1.2 * ink[0]


def test_every_track_has_its_own_colour(tmp_path: Path) -> None:
    score = make_score((0, 1920, 60, 127))
    second = Track(program=40, name="$\\x$")  # not a formula
    second.notes.append(Note(0, 1920, 72, 127))
    score.tracks.append(second)
    draw_piano_roll(score, tmp_path / "roll.png", title="$\\two$")
    pixels = (imread(tmp_path / "roll.png")[..., :3] * 255).astype(int).reshape(-1, 3)
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        assert (np.abs(pixels - colour).max(-1) < 8).sum() > 1000


def test_bars_follow_the_time_signature(tmp_path: Path) -> None:
    """The same four quarters fill one bar of 4/4, but one and a third of 3/4, so less of the picture."""
    widths = {}
    for numerator in (4, 3):
        score = make_score((0, 1920, 60, 127))
        score.time_signatures.append(TimeSignature(0, numerator, 4))
        draw_piano_roll(score, tmp_path / "roll.png")
        left, right, _, _ = coloured_box(tmp_path / "roll.png")
        widths[numerator] = right - left
    assert widths[3] / widths[4] == pytest.approx(4 / 6, abs=0.02)


def test_a_score_without_notes_is_drawn(tmp_path: Path) -> None:
    draw_piano_roll(Score(480), tmp_path / "roll.png")
    assert imread(tmp_path / "roll.png").shape[:2] == (400, 1200)


def test_a_missing_package_is_named_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib is not installed.*midimamba\[demo\]"):
        draw_piano_roll(make_score((0, 480, 60, 100)), tmp_path / "out")
    assert not list(tmp_path.iterdir())
