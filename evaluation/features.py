"""Musical features of one piece: pure functions that return a number or a distribution.

A [`Piece`] holds a score together with what several features need of it. Times are in quarter notes, whatever the
meter, and a position is a sixteenth note. Percussion counts for rhythm (`notes_per_…`, groove, empty beats) but not
for anything about pitch. A feature that has no value for a piece is NaN, such as the polyphony of a piece without
notes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from symusic.core import ScoreTick

from midimamba.tokenization.musical_time import bar_starts, best_keys, meter_spans

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]

POSITIONS = 4  # per quarter note
WINDOW = 4  # bars for which a key is found
MAJOR = (0, 2, 4, 5, 7, 9, 11)
_SCALES = np.zeros((12, 12))  # which pitch classes each major scale has
_SCALES[np.arange(12)[:, None], (np.arange(12)[:, None] + MAJOR) % 12] = 1
# Lengths in quarter notes, from a triplet of sixty-fourths to two bars. A length counts as the closest one by ratio.
LENGTHS = np.array([1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 1.5, 2, 3, 4, 8])
_AT_ONCE = 64  # pieces, so that memory does not grow with their number
_BORDERS = np.sqrt(LENGTHS[:-1] * LENGTHS[1:])


@dataclass(frozen=True)
class Notes:
    """
    All notes of a score, of shape `(notes,)` each, by onset and then pitch.

    Args:
        onsets (`array`): in quarter notes.
        durations (`array`): in quarter notes.
        pitches (`array`): MIDI note numbers; for drums, the number of the drum.
        programs (`array`): MIDI programs; -1 for drums.
    """

    onsets: Vector
    durations: Vector
    pitches: Indices
    programs: Indices

    @classmethod
    def of(cls, score: ScoreTick, pitched: bool = False) -> "Notes":
        """The notes of a score; `pitched` leaves out the drums."""
        notes = Piece(score).notes
        return notes.pitched() if pitched else notes

    def pitched(self) -> "Notes":
        """Those that are not drums."""
        if len(self.programs) and self.programs.min() >= 0:
            return self
        rows = self.programs >= 0
        return Notes(self.onsets[rows], self.durations[rows], self.pitches[rows], self.programs[rows])

    def __len__(self) -> int:
        return len(self.onsets)

    @property
    def ends(self) -> Vector:
        return self.onsets + self.durations


class Grid(NamedTuple):
    """
    The bars of notes, and the cells of those bars.

    Args:
        bars (`array`): the bar of every note, in order.
        positions (`array`): its nearest position in sixteenths, which may be in the next bar.
    """

    bars: Indices
    positions: Indices

    @property
    def span(self) -> int:
        """Bars from the first to the last of them, both included; 0 without notes."""
        return int(self.bars[-1] - self.bars[0] + 1) if len(self.bars) else 0


class BarCells(NamedTuple):
    """
    Bars as vectors, most of whose cells are empty.

    Args:
        width (`int`): cells per bar.
        cells (`array`): the cells that are not empty, in order, numbered through all bars from the first with a note.
        counts (`array`): what is in each of them.
        norms (`array` of shape `(bars,)`): the length of every bar's vector.
    """

    width: int
    cells: Indices
    counts: Indices
    norms: Vector

    @classmethod
    def of(cls, grid: Grid, values: Indices, kinds: int) -> "BarCells":
        """Notes counted by bar, position and one of `kinds` values."""
        width = (int(grid.positions.max()) + 1) * kinds
        cells, counts = _count(np.sort((grid.bars - grid.bars[0]) * width + grid.positions * kinds + values))
        return cls(width, cells, counts, np.sqrt(np.bincount(cells // width, counts**2, minlength=grid.span)))

    def similarities(self, lag: int) -> Vector:
        """The cosine of every bar that is not silent and the one `lag` bars later; 0 if just one is silent."""
        wanted = self.cells + lag * self.width
        later = np.minimum(np.searchsorted(self.cells, wanted), len(self.cells) - 1)
        products = self.counts * self.counts[later] * (self.cells[later] == wanted)
        size = len(self.norms)
        summed = np.bincount(self.cells // self.width, products, minlength=size)[: size - lag]
        before, after = self.norms[:-lag], self.norms[lag:]
        scale = before * after
        return (summed / np.where(scale > 0, scale, 1))[before + after > 0]


class Piece:
    """A score, and what its features have in common. Each part is computed when a feature first needs it.

    Args:
        score (`symusic.Score`): times in ticks. It must not change afterwards.
    """

    def __init__(self, score: ScoreTick):
        self.score = score
        self._similarities: dict[int, Vector] = {}

    @cached_property
    def notes(self) -> Notes:
        """All notes."""
        columns: list[list[NDArray[Any]]] = [[np.zeros(0)], [np.zeros(0)], [np.zeros(0, int)], [np.zeros(0, int)]]
        for track in self.score.tracks:
            notes = track.notes.numpy()
            program = np.full(len(notes["time"]), -1 if track.is_drum else track.program)
            for column, part in zip(columns, (notes["time"], notes["duration"], notes["pitch"], program), strict=True):
                column.append(part)
        onsets, durations, pitches, programs = (np.concatenate(column) for column in columns)
        order = np.lexsort((pitches, onsets))
        quarter = self.score.ticks_per_quarter
        return Notes(
            onsets[order] / quarter,
            durations[order] / quarter,
            pitches[order].astype(np.int64),
            programs[order].astype(np.int64),
        )

    @cached_property
    def pitched(self) -> Notes:
        """The notes that are not drums."""
        return self.notes.pitched()

    @cached_property
    def starts(self) -> Vector:
        """Where bars start, in quarter notes, the last of them at or after the end of the last note."""
        return bar_starts(self.score) / self.score.ticks_per_quarter

    @cached_property
    def onset_times(self) -> Vector:
        """The times at which at least one note starts, in order."""
        onsets = self.notes.onsets
        return onsets[np.append(True, onsets[1:] != onsets[:-1])] if len(onsets) else onsets

    @cached_property
    def grid(self) -> Grid:
        """Bars and positions of all notes."""
        return self._place(self.notes)

    @cached_property
    def pitched_grid(self) -> Grid:
        """Bars and positions of the notes that are not drums."""
        return self.grid if self.pitched is self.notes else self._place(self.pitched)

    @cached_property
    def pitch_cells(self) -> BarCells:
        """Bars by positions and pitch classes. There must be pitched notes."""
        return BarCells.of(self.pitched_grid, self.pitched.pitches % 12, 12)

    def similarities(self, lag: int) -> Vector:
        """The cosines of bars that are `lag` bars apart, by [`~Piece.pitch_cells`]."""
        if lag not in self._similarities:
            self._similarities[lag] = self.pitch_cells.similarities(lag)
        return self._similarities[lag]

    @cached_property
    def pitch_classes(self) -> Vector:
        """The share of each pitch class; NaN without pitched notes."""
        return shares(np.bincount(self.pitched.pitches % 12, minlength=12))

    @cached_property
    def chroma(self) -> Vector:
        """How long each pitch class sounds by bar, from the first to the last bar with an onset; `(bars, 12)`."""
        notes, grid = self.pitched, self.pitched_grid
        cells = (grid.bars - grid.bars[:1]) * 12 + notes.pitches % 12
        return np.asarray(np.bincount(cells, notes.durations, minlength=12 * grid.span).reshape(-1, 12))

    @cached_property
    def key(self) -> Indices:
        """The key of the whole piece as an index into [`~midimamba.tokenization.musical_time.KEYS`]; none: empty."""
        return best_keys(self.chroma.sum(0)[None])

    def _place(self, notes: Notes) -> Grid:
        onsets = notes.onsets + 0.5 / POSITIONS
        bars = np.searchsorted(self.starts, onsets, side="right") - 1
        return Grid(bars, np.floor((onsets - self.starts[bars]) * POSITIONS + 1e-9).astype(np.int64))


def opening(score: ScoreTick, bars: int) -> ScoreTick:
    """The notes that start in the first bars of a score, at their full length."""
    starts = bar_starts(score)
    if len(starts) <= bars:
        return score
    return score.clip(0, int(np.ceil(starts[bars])), clip_end=False)


def pitch_class_histogram(piece: Piece) -> Vector:
    """The share of each pitch class among the pitched notes, C first; shape `(12,)`."""
    return piece.pitch_classes


def pitch_class_entropy(piece: Piece) -> float:
    """Entropy of the pitch classes in bits: 0 for a single one, log₂ 12 = 3.58 if all are equally frequent."""
    shares = piece.pitch_classes
    return float(-np.sum(shares * np.log2(np.where(shares > 0, shares, 1))))


def scale_consistency(piece: Piece) -> float:
    """The largest share of the notes that fits one of the 12 major scales, and so one of the natural minor scales."""
    return float((_SCALES @ piece.pitch_classes).max())


def polyphony(piece: Piece) -> float:
    """Mean number of pitched notes that sound at once, over the time in which any note sounds."""
    notes = piece.pitched
    if not notes.durations.sum():
        return np.nan
    reached = np.maximum.accumulate(np.concatenate([[0.0], notes.ends]))[:-1]
    sounding = np.maximum(notes.ends - np.maximum(notes.onsets, reached), 0).sum()
    return float(notes.durations.sum() / sounding)


def notes_per_second(piece: Piece) -> float:
    """Notes, drums included, per second from the first onset to the end of the last note."""
    seconds: Vector = np.zeros((0, 2))
    timed: Any = piece.score.to("second")
    for track in timed.tracks:
        notes = track.notes.numpy()
        seconds = np.concatenate([seconds, np.stack([notes["time"], notes["time"] + notes["duration"]], axis=1)])
    length = np.ptp(seconds) if len(seconds) else 0.0
    return float(len(seconds) / length) if length > 0 else np.nan


def notes_per_bar(piece: Piece) -> float:
    """Notes, drums included, per bar from the first onset to the end of the last note; bars may be fractions."""
    notes = piece.notes
    if not len(notes):
        return np.nan
    starts = piece.starts
    first, last = np.interp([notes.onsets[0], notes.ends.max()], starts, np.arange(len(starts)))
    return float(len(notes) / (last - first)) if last > first else np.nan


def duration_histogram(piece: Piece) -> Vector:
    """The share of each length of `LENGTHS` among the pitched notes; shape `(13,)`."""
    return _length_histogram(piece.pitched.durations)


def onset_interval_histogram(piece: Piece) -> Vector:
    """The share of each length of `LENGTHS` among the times between successive onsets, drums included; `(13,)`."""
    return _length_histogram(np.diff(piece.onset_times))


def groove_consistency(piece: Piece) -> float:
    """
    How similar the rhythms of adjacent bars are: 1 - their mean Hamming distance (Wu & Yang 2020, arXiv 2008.01307).

    A bar is the set of the positions at which a note starts: 16 sixteenths in 4/4, 12 in 3/4. An onset belongs to the
    nearest position. The distance is divided by the positions of the longer bar. NaN for fewer than two bars.
    """
    if piece.grid.span < 2:
        return np.nan
    bars, positions = piece.grid
    width = int(positions.max()) + 1
    cells, _ = _count((bars - bars[0]) * width + positions)
    counts = np.bincount(cells // width, minlength=piece.grid.span)
    shared = np.bincount(cells[_is_in(cells + width, cells)] // width, minlength=piece.grid.span)[:-1]
    starts = piece.starts * POSITIONS
    # after rounding, an onset may lie on the last bar line
    lengths = np.append(np.diff(starts), starts[-1] - starts[-2])[bars[0] : bars[-1] + 1]
    distances = counts[:-1] + counts[1:] - 2 * shared
    return float(1 - np.mean(distances / np.maximum(lengths[:-1], lengths[1:])))


def empty_beat_rate(piece: Piece) -> float:
    """The share of the quarter notes in which nothing sounds, from the first onset to the last end.

    After MuseGAN's rate of empty bars (arXiv 1709.06298), per beat as in MusPy (arXiv 2008.01951).
    """
    notes = piece.notes
    if not len(notes):
        return np.nan
    first = np.floor(notes.onsets).astype(np.int64)
    last = np.maximum(np.ceil(notes.ends).astype(np.int64), first + 1)
    change = np.bincount(first, minlength=last.max() + 1) - np.bincount(last, minlength=last.max() + 1)
    return float(np.mean(np.cumsum(change)[first[0] : last.max()] == 0))


def bar_self_similarity(piece: Piece, lag: int) -> float:
    """
    Mean cosine similarity of bars that are `lag` bars apart, each described by the positions and pitch classes of its
    notes.

    It is a cheap relative of the structureness indicator of Wu & Yang (arXiv 2008.01307), which takes the best
    repetition in a fitness scape plot of audio. This one measures repetition at one distance only, and needs no audio.
    Pairs of silent bars are left out; a silent bar and any other bar have similarity 0. NaN for pieces of at most
    `lag` bars.
    """
    if piece.pitched_grid.span <= lag:
        return np.nan
    similarities = piece.similarities(lag)
    return float(np.mean(similarities)) if len(similarities) else np.nan


def key_stability(piece: Piece) -> float:
    """
    The share of the windows of 4 bars that have the key of the whole piece.

    The key is the one whose Krumhansl-Kessler profile correlates best with the durations of the pitch classes. A
    window starts at every bar; windows without a key (silent, or with all pitch classes equal) are left out. NaN for
    pieces of fewer than 4 bars, or without a key.
    """
    if piece.pitched_grid.span < WINDOW:
        return np.nan
    summed = np.cumsum(piece.chroma, axis=0)
    windows = summed[WINDOW - 1 :].copy()
    windows[1:] -= summed[:-WINDOW]
    keys = best_keys(windows)
    return float(np.mean(keys == piece.key)) if len(piece.key) and len(keys) else np.nan


def meter_stability(piece: Piece) -> float:
    """The share of the time, in quarter notes up to the end of the last note, in the most frequent meter."""
    score = piece.score
    end = score.end() if score.note_num() else 0
    if not end:
        return np.nan
    totals: dict[str, int] = {}
    for meter, ticks in meter_spans(score, end):
        totals[str(meter)] = totals.get(str(meter), 0) + ticks
    return max(totals.values()) / end


Feature = Callable[[Piece], Vector | float]

NUMBERS: dict[str, Callable[[Piece], float]] = {
    "pitch_class_entropy": pitch_class_entropy,
    "scale_consistency": scale_consistency,
    "polyphony": polyphony,
    "notes_per_second": notes_per_second,
    "notes_per_bar": notes_per_bar,
    "groove_consistency": groove_consistency,
    "empty_beat_rate": empty_beat_rate,
    "bar_self_similarity_4": lambda piece: bar_self_similarity(piece, 4),
    "bar_self_similarity_8": lambda piece: bar_self_similarity(piece, 8),
    "bar_self_similarity_16": lambda piece: bar_self_similarity(piece, 16),
    "key_stability": key_stability,
    "meter_stability": meter_stability,
}
HISTOGRAMS: dict[str, Callable[[Piece], Vector]] = {
    "pitch_class_histogram": pitch_class_histogram,
    "duration_histogram": duration_histogram,
    "onset_interval_histogram": onset_interval_histogram,
}


def measure(scores: Sequence[ScoreTick]) -> dict[str, Vector]:
    """Every feature of every score: of shape `(scores, 1)` for numbers, `(scores, bins)` for histograms."""
    return measure_with({**NUMBERS, **HISTOGRAMS}, scores)


def measure_with(functions: Mapping[str, Feature], scores: Sequence[ScoreTick]) -> dict[str, Vector]:
    """The same of chosen features."""
    rows: dict[str, list[Vector]] = {name: [] for name in functions}
    # One feature of many pieces is faster than many features of one piece: its code stays in the processor's cache.
    for start in range(0, len(scores), _AT_ONCE):
        pieces = [Piece(score) for score in scores[start : start + _AT_ONCE]]
        for name, function in functions.items():
            rows[name] += [np.atleast_1d(np.asarray(function(piece), dtype=np.float64)) for piece in pieces]
    return {name: np.stack(values) for name, values in rows.items()}


def shares(counts: Indices | Vector) -> Vector:
    """Counts divided by their sum; NaN if that is 0."""
    total = counts.sum()
    return np.asarray(counts / total) if total else np.full(len(counts), np.nan)


def _count(numbers: Indices) -> tuple[Indices, Indices]:
    """The different ones of sorted numbers, and how often each occurs, as `np.unique` but without sorting again."""
    first = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    return numbers[first], np.diff(np.append(first, len(numbers)))


def _is_in(wanted: Indices, numbers: Indices) -> NDArray[np.bool_]:
    """Which of `wanted` are among sorted numbers."""
    return numbers[np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)] == wanted


def _length_histogram(lengths: Vector) -> Vector:
    return shares(np.bincount(np.searchsorted(_BORDERS, lengths), minlength=len(LENGTHS)))
