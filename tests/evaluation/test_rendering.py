"""Pictures have ink where the notes are; sound is there when the notes are."""

import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from symusic import Note, Score, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.evaluation.rendering import draw_piano_roll, plucked_string, render_wave


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


def read_wave(path: Path) -> tuple[int, np.ndarray]:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


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


def test_a_score_without_notes_is_drawn_and_silent(tmp_path: Path) -> None:
    draw_piano_roll(Score(480), tmp_path / "roll.png")
    render_wave(Score(480), tmp_path / "sound.wav")
    assert imread(tmp_path / "roll.png").shape[:2] == (400, 1200)
    assert not read_wave(tmp_path / "sound.wav")[1].any()


def test_sound_lasts_as_long_as_the_score_and_is_neither_silent_nor_clipped(tmp_path: Path) -> None:
    score = make_score(*((quarter * 480, 480, 60 + quarter % 12, 100) for quarter in range(8)))
    render_wave(score, tmp_path / "sound.wav", sample_rate=8000)
    rate, samples = read_wave(tmp_path / "sound.wav")
    assert rate == 8000
    assert len(samples) / rate == pytest.approx(8 * 0.5 + 1, abs=0.05)
    assert np.abs(samples).max() == pytest.approx(0.9 * 32767, abs=2)
    assert np.abs(samples[: int(3.9 * rate)]).reshape(-1, rate // 10).max(1).min() > 500
    assert not samples[-rate // 2 :].any()


def test_sound_has_the_pitch_of_the_note(tmp_path: Path) -> None:
    render_wave(make_score((0, 3840, 69, 100)), tmp_path / "sound.wav")
    rate, samples = read_wave(tmp_path / "sound.wav")
    loudest = np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples)
    assert loudest == pytest.approx(440, abs=1)


def test_percussion_alone_is_silent_and_not_an_error(tmp_path: Path) -> None:
    score = make_score((0, 480, 38, 100))
    score.tracks[0].is_drum = True
    render_wave(score, tmp_path / "sound.wav")
    assert not read_wave(tmp_path / "sound.wav")[1].any()


def test_a_tone_starts_without_a_click() -> None:
    tone = plucked_string(2 * np.pi * 440 * np.arange(2205) / 22050)
    assert abs(tone[0]) == 0
    assert np.abs(np.diff(tone[:5])).max() < 0.5 * np.abs(np.diff(tone)).max()


def test_a_tone_is_the_sum_of_its_harmonics() -> None:
    phase = 2 * np.pi * 440 * np.arange(22050) / 22050
    expected = np.zeros(len(phase))
    for k in range(1, 7):
        expected += np.sin(k * phase) * np.exp(-0.0004 * k * phase) / k**1.4
    expected *= 1 - np.exp(-phase / (4 * np.pi))
    np.testing.assert_allclose(plucked_string(phase), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("render", "package"), [(draw_piano_roll, "matplotlib"), (render_wave, "pretty_midi")])
def test_a_missing_package_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, render: object, package: str
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed.*midimamba\[demo\]"):
        render(make_score((0, 480, 60, 100)), tmp_path / "out")  # type: ignore[operator]
    assert not list(tmp_path.iterdir())
