"""A piano roll as SVG: bars to the right, pitches upwards, a colour per track. It grows while music is sampled."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from miditok.constants import MIDI_INSTRUMENTS
from numpy.typing import NDArray
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.evaluation.rendering import BLACK_KEYS, pitch_name
from midimamba.note_decoding import Note as NewNote
from midimamba.text import for_html, shortened
from midimamba.tokenization.musical_time import bar_starts, meters

_COLOURS = (
    *("#2f6fdb", "#d9622b", "#2a9d64", "#b8459c", "#8a6d1f"),
    *("#0f8fa8", "#c0392b", "#6b54c7", "#5f7a1c", "#7a7f87"),
)
_WIDTH, _HEIGHT, _LEFT, _TOP = 960.0, 300.0, 38.0, 20.0
_LEAST_BAR = 34  # pixels of the screen for a bar; a longer piece is scrolled
_LEAST_PITCHES = 25
_MAX_NAME = 30
_MAX_NAMES = 12
_TICKS = 480

Span = tuple[int, int]


class Marks(NamedTuple):
    """
    What is special about some bars, counted from 1.

    Args:
        chosen (`tuple[int, int]`, *optional*): the first and the last of those that are written again.
        given (`int`, *optional*, defaults to 0): how many bars at the start are the user's own. They are drawn pale.
        least (`int`, *optional*, defaults to 1): how many bars there is room for, whatever the music has.
    """

    chosen: Span | None = None
    given: int = 0
    least: int = 1


def draw_roll(score: ScoreTick | None, marks: Marks = Marks()) -> str:  # noqa: B008
    """
    Draw a piano roll as HTML with an SVG picture.

    Args:
        score (`symusic.Score`, *optional*): times in ticks. `None` for an empty roll.
        marks ([`Marks`], *optional*): bars to mark.

    Returns:
        `str`: the HTML. Every bar is an element with the attribute `data-bar`, its number.
    """
    score = Score(_TICKS) if score is None else score
    tracks = [track for track in score.tracks if len(track.notes)]
    edges = _edges(score, marks.least)
    bars = len(edges) - 1
    low, high = _pitches(tracks)
    parts = [*_keys(low, high), *_bars(bars, marks)]
    for index, track in enumerate(tracks):
        parts += _notes(track, edges, (low, high), _COLOURS[index % len(_COLOURS)], marks.given)
    parts += [
        f'<rect data-bar="{bar}" x="{_x(bar, bars):.1f}" y="0" width="{_x(2, bars) - _x(1, bars):.1f}" '
        f'height="{_TOP + _HEIGHT}" fill="transparent"><title>bar {bar}</title></rect>'
        for bar in range(1, bars + 1)
    ]
    least = int(_LEFT + _LEAST_BAR * bars)
    return (
        f'<div class="roll">{_legend(tracks, marks)}<div class="roll-paper">'
        f'<svg role="img" aria-label="piano roll, {bars} bars" viewBox="0 0 {_WIDTH:.0f} {_TOP + _HEIGHT + 6:.0f}" '
        f'style="width:100%;min-width:{least}px">{"".join(parts)}</svg></div></div>'
    )


def bars_shown(score: ScoreTick) -> int:
    """The bars that a roll shows of a score: up to the end of its last note."""
    return max(len(bar_starts(score)) - 1, 1)


def with_notes(prompt: ScoreTick | None, notes: Iterable[NewNote]) -> ScoreTick:
    """
    A picture of what is being sampled: the user's music, and tracks with the new notes.

    Args:
        prompt (`symusic.Score`, *optional*): what is continued.
        notes (iterable of [`~midimamba.note_decoding.Note`]): what has been sampled.
    """
    score = Score(_TICKS) if prompt is None else prompt.copy()
    if prompt is None:
        score.tempos.append(Tempo(0, 120.0))
        score.time_signatures.append(TimeSignature(0, 4, 4))
    parts = {(track.is_drum, 0 if track.is_drum else track.program): track for track in reversed(score.tracks)}
    for note in notes:
        key = (note.is_drum, note.program)
        if key not in parts:
            score.tracks.append(Track(program=note.program, is_drum=note.is_drum))
            parts[key] = score.tracks[-1]
        length = max(round(note.duration * score.ticks_per_quarter), 1)
        start = round(note.onset * score.ticks_per_quarter)
        parts[key].notes.append(Note(start, length, note.pitch, note.velocity))
    return score


def _edges(score: ScoreTick, least: int) -> NDArray[np.float64]:
    """Ticks at which bars start, and the end of the last one; at least `least` bars."""
    starts = bar_starts(score)
    length = meters(score)[-1].bar_length(score.ticks_per_quarter)
    missing = max(least + 1 - len(starts), 0)
    return np.concatenate([starts, starts[-1] + length * np.arange(1, missing + 1)])


def _pitches(tracks: Sequence[Track]) -> Span:
    """The lowest and the highest pitch to show."""
    pitches = np.concatenate([track.notes.numpy()["pitch"] for track in tracks]) if tracks else np.array([60, 72])
    low, high = int(pitches.min()) - 2, int(pitches.max()) + 2
    missing = max(_LEAST_PITCHES - (high - low + 1), 0)
    return low - missing // 2, high + missing - missing // 2


def _x(bar: float, bars: int) -> float:
    """Where a bar starts; fractions lie within it."""
    return _LEFT + (bar - 1) * (_WIDTH - _LEFT) / bars


def _keys(low: int, high: int) -> list[str]:
    """The rows of black keys, and the names of the Cs."""
    row = _HEIGHT / (high - low + 1)
    parts = []
    for pitch in range(low, high + 1):
        y = _TOP + (high - pitch) * row
        if pitch % 12 in BLACK_KEYS:
            parts.append(
                f'<rect class="roll-key" x="{_LEFT}" y="{y:.1f}" width="{_WIDTH - _LEFT}" height="{row:.1f}"/>'
            )
        if pitch % 12 == 0:
            name = pitch_name(pitch)
            parts.append(f'<text x="{_LEFT - 6}" y="{y + row / 2 + 3.5:.1f}" text-anchor="end">{name}</text>')
    return parts


def _bars(bars: int, marks: Marks) -> list[str]:
    """Bar lines, numbers, and what is marked."""
    parts = []
    if marks.chosen is not None:
        left, right = _x(marks.chosen[0], bars), _x(marks.chosen[1] + 1, bars)
        parts.append(
            f'<rect class="roll-chosen" x="{left:.1f}" y="1" width="{right - left:.1f}" '
            f'height="{_TOP + _HEIGHT - 2}"/>'
        )
    every = max(1, round(bars / 32))
    for bar in range(1, bars + 2):
        x = _x(bar, bars)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _HEIGHT}"/>')
        if bar <= bars and (bar - 1) % every == 0:
            parts.append(f'<text x="{x + 4:.1f}" y="14">{bar}</text>')
    return parts


def _notes(track: Track, edges: NDArray[np.float64], pitches: Span, colour: str, given: int) -> list[str]:
    low, high = pitches
    row = _HEIGHT / (high - low + 1)
    notes = track.notes.numpy()
    places = np.arange(1, len(edges) + 1)
    left = np.interp(notes["time"], edges, places)
    right = np.interp(notes["time"] + notes["duration"], edges, places)
    bars = len(edges) - 1
    parts = [f'<g fill="{colour}">']
    for first, last, pitch, velocity in zip(left, right, notes["pitch"], notes["velocity"], strict=True):
        x = _x(float(first), bars)
        width = max(_x(float(last), bars) - x - 0.6, 1.5)
        opacity = (0.55 + 0.45 * int(velocity) / 127) * (0.4 if first < given + 1 else 1)
        y = _TOP + (high - int(pitch)) * row + 0.4
        parts.append(
            f'<rect class="roll-note" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{max(row - 0.8, 1.5):.1f}" rx="1.2" opacity="{opacity:.2f}"/>'
        )
    return [*parts, "</g>"]


def _legend(tracks: Sequence[Track], marks: Marks) -> str:
    """The names of the tracks in their colours, and what pale notes are."""
    parts = [
        f'<span><i style="background:{_COLOURS[index % len(_COLOURS)]}"></i>{for_html(track_name(track))}</span>'
        for index, track in enumerate(tracks[:_MAX_NAMES])
    ]
    if more := len(tracks[_MAX_NAMES:]):
        parts.append(f"<span>and {more} more</span>")
    if marks.given:
        parts.append("<span>pale: your music</span>")
    if marks.chosen is not None:
        parts.append('<span><i class="roll-chosen-key"></i>bars to write again</span>')
    return f'<div class="roll-legend">{"".join(parts)}</div>'


def track_name(track: Track) -> str:
    """The name of a track, or else that of its instrument."""
    instrument = "Drums" if track.is_drum else str(MIDI_INSTRUMENTS[track.program]["name"])
    return shortened(track.name, _MAX_NAME) or shortened(instrument, _MAX_NAME)


STYLE = """
.roll-paper { overflow-x: auto; border: 1px solid var(--border-color-primary); border-radius: 6px;
  background: var(--background-fill-primary); }
.roll svg { display: block; }
.roll svg text { font: 11px system-ui, sans-serif; fill: var(--body-text-color-subdued); }
.roll svg line { stroke: var(--border-color-primary); stroke-width: 1; }
.roll-key { fill: var(--body-text-color); opacity: .045; }
.roll-chosen { fill: #f5b50a; fill-opacity: .2; stroke: #d99a00; stroke-width: 2; }
.roll svg [data-bar]:hover { fill: var(--body-text-color); fill-opacity: .05; }
.roll-legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; min-height: 1.6rem; font-size: .85rem; }
.roll-legend span { display: inline-flex; align-items: center; gap: .4rem; }
.roll-legend i { width: .8rem; height: .8rem; border-radius: 2px; }
.roll-chosen-key { background: #f5b50a55; border: 1px solid #d99a00; }
"""
