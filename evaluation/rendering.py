"""Pictures of a score, as a model card shows them, and what all pictures share."""

import io
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.files import write_whole
from midimamba.text import printable, shortened
from midimamba.tokenization.musical_time import bar_starts

PITCH_CLASSES = ("C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B")
BLACK_KEYS = frozenset({1, 3, 6, 8, 10})
INK, FAINT = "#2b2f36", "#dde1e6"
_MAX_NAME = 40  # signs of a title or name; a longer one leaves no room for the music


def draw_piano_roll(score: ScoreTick, path: Path, title: str = "") -> None:
    """
    Draw a score as a PNG of 1200 × 400 pixels: bars to the right, pitches upwards, a colour for each track,
    loud notes dark.

    Args:
        score (`symusic.Score`): times in ticks. If it has no notes, the picture says so.
        path (`Path`): the PNG file, replaced atomically.
        title (`str`, *optional*, defaults to none): written above the picture.

    Raises:
        InputError: if matplotlib is not installed.
    """
    axes = new_figure(width=1200, height=400).add_subplot()
    starts = bar_starts(score)
    tracks = [track for track in score.tracks if len(track.notes)]
    for index, track in enumerate(tracks):
        _draw_track(axes, track, starts, f"C{index % 10}")
    _style(axes, tracks, last_bar=len(starts))
    timed: Any = score.to("second")
    axes.set_title(_literal(title), loc="left", color=INK, fontsize=12, fontweight="bold", pad=9)
    axes.set_title(_summary(tracks, timed.end()), loc="right", color=INK, fontsize=10, alpha=0.7, pad=9)
    if len(tracks) > 1:
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=9, handlelength=1.2, labelcolor=INK
        )
    save_figure(axes.figure, path)


def new_figure(width: int, height: int) -> Any:
    """An empty matplotlib `Figure` of this size in pixels, without pyplot and its global state."""
    figure = import_demo("matplotlib.figure").Figure
    return figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())


def import_demo(name: str, extra: str = "demo") -> Any:
    """
    Import a module of optional dependencies.

    Args:
        name (`str`): of the module.
        extra (`str`, *optional*, defaults to `"demo"`): with which it is installed.

    Raises:
        InputError: if it is not installed, or lacks a library of the system.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise not_installed(name.partition(".")[0], extra) from error
    except OSError as error:
        raise InputError(
            f"{name} lacks a library of the system, which pip does not install: {' '.join(str(error).split())}"
        ) from error


def not_installed(package: str, extra: str = "demo") -> InputError:
    """The error that an optional dependency is missing."""
    return InputError(f'{package} is not installed; run: pip install "midimamba[{extra}]"')


def pitch_name(pitch: int) -> str:
    """`60` -> `"C4"`."""
    return f"{PITCH_CLASSES[pitch % 12]}{pitch // 12 - 1}"


def _draw_track(axes: Any, track: Any, starts: NDArray[np.float64], colour: str) -> None:
    notes = track.notes.numpy()
    bars = np.arange(1, len(starts) + 1)
    left = np.interp(notes["time"], starts, bars)
    right = np.interp(notes["time"] + notes["duration"], starts, bars)
    axes.barh(
        notes["pitch"],
        np.maximum(right - left - 0.01, 0.02),  # a hair's breadth of space keeps repeated notes apart
        left=left,
        height=0.82,
        color=[(colour, alpha) for alpha in 0.3 + 0.7 * notes["velocity"] / 127],
    )
    axes.plot([], [], color=colour, linewidth=6, label=_track_name(track))  # gives the legend the full colour


def _style(axes: Any, tracks: list[Any], last_bar: int) -> None:
    pitches = np.concatenate([track.notes.numpy()["pitch"] for track in tracks]) if tracks else np.array([60])
    low, high = int(pitches.min()) - 2, int(pitches.max()) + 2
    axes.set(xlim=(1, max(last_bar, 2)), ylim=(low - 0.5, high + 0.5))
    axes.set_xlabel("bar", color=INK)
    axes.xaxis.set_major_locator(import_demo("matplotlib.ticker").MaxNLocator(integer=True, nbins=17, min_n_ticks=1))
    named = (0, 4, 7) if high - low < 40 else (0,)
    labelled = [pitch for pitch in range(low, high + 1) if pitch % 12 in named]
    axes.set_yticks(labelled, [pitch_name(pitch) for pitch in labelled])
    for pitch in range(low, high + 1):
        if pitch % 12 in BLACK_KEYS:
            axes.axhspan(pitch - 0.5, pitch + 0.5, color="#f4f5f7", zorder=0)
    axes.grid(axis="x", color=FAINT)
    quiet(axes)


def quiet(axes: Any) -> None:
    """Strip the frame of a plot to what is read: no box, no tick marks, and the grid behind the data."""
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)


def _track_name(track: Any) -> str:
    return _literal(track.name.strip()) or ("Drums" if track.is_drum else f"Program {track.program}")


def _literal(text: str) -> str:
    """One short line that Matplotlib shows as it is.

    It reads text between two dollar signs as a formula, and raises if it is not one. It leaves what begins with an
    underscore out of legends, so that a space comes first.
    """
    text = shortened(printable(text), _MAX_NAME).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _summary(tracks: list[Any], seconds: float) -> str:
    notes = sum(len(track.notes) for track in tracks)
    return f"{notes} notes · {seconds:.0f} s" if notes else "no notes"
