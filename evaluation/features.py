"""Musical features of one score: pure functions that return a number or a distribution.

Times are in quarter notes, whatever the meter, and a position is a sixteenth note. Percussion counts for rhythm
(`notes_per_…`, groove, empty beats) but not for anything about pitch. A feature that has no value for a score is NaN,
such as the polyphony of a score without notes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from symusic.core import ScoreTick

from midimamba.tokenization.musical_time import bar_starts, best_keys, meter_spans

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]

POSITIONS = 4  # per quarter note
WINDOW = 4  # bars for which a key is found
MAJOR = (0, 2, 4, 5, 7, 9, 11)
# Lengths in quarter notes, from a triplet of sixty-fourths to two bars. A length counts as the closest one by ratio.
LENGTHS = np.array([1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 1.5, 2, 3, 4, 8])


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
        columns: list[list[NDArray[Any]]] = [[np.zeros(0)], [np.zeros(0)], [np.zeros(0, int)], [np.zeros(0, int)]]
        for track in score.tracks:
            if not (pitched and track.is_drum):
                notes = track.notes.numpy()
                program = np.full(len(notes["time"]), -1 if track.is_drum else track.program)
                for column, part in zip(
                    columns, (notes["time"], notes["duration"], notes["pitch"], program), strict=True
                ):
                    column.append(part)
        onsets, durations, pitches, programs = (np.concatenate(column) for column in columns)
        order = np.lexsort((pitches, onsets))
        quarter = score.ticks_per_quarter
        return cls(
            onsets[order] / quarter,
            durations[order] / quarter,
            pitches[order].astype(np.int64),
            programs[order].astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.onsets)

    @property
    def ends(self) -> Vector:
        return self.onsets + self.durations


def opening(score: ScoreTick, bars: int) -> ScoreTick:
    """The notes that start in the first bars of a score, at their full length."""
    starts = bar_starts(score)
    if len(starts) <= bars:
        return score
    return score.clip(0, int(np.ceil(starts[bars])), clip_end=False)


def pitch_class_histogram(score: ScoreTick) -> Vector:
    """The share of each pitch class among the pitched notes, C first; shape `(12,)`."""
    return _shares(np.bincount(Notes.of(score, pitched=True).pitches % 12, minlength=12))


def pitch_class_entropy(score: ScoreTick) -> float:
    """Entropy of the pitch classes in bits: 0 for a single one, log₂ 12 = 3.58 if all are equally frequent."""
    shares = pitch_class_histogram(score)
    return float(-np.sum(shares * np.log2(np.where(shares > 0, shares, 1))))


def scale_consistency(score: ScoreTick) -> float:
    """The largest share of the notes that fits one of the 12 major scales, and so one of the natural minor scales."""
    shares = pitch_class_histogram(score)
    return float(max(np.roll(shares, -tonic)[list(MAJOR)].sum() for tonic in range(12)))


def polyphony(score: ScoreTick) -> float:
    """Mean number of pitched notes that sound at once, over the time in which any note sounds."""
    notes = Notes.of(score, pitched=True)
    if not notes.durations.sum():
        return np.nan
    reached = np.maximum.accumulate(np.concatenate([[0.0], notes.ends]))[:-1]
    sounding = np.maximum(notes.ends - np.maximum(notes.onsets, reached), 0).sum()
    return float(notes.durations.sum() / sounding)


def notes_per_second(score: ScoreTick) -> float:
    """Notes, drums included, per second from the first onset to the end of the last note."""
    seconds: Vector = np.zeros((0, 2))
    timed: Any = score.to("second")
    for track in timed.tracks:
        notes = track.notes.numpy()
        seconds = np.concatenate([seconds, np.stack([notes["time"], notes["time"] + notes["duration"]], axis=1)])
    length = np.ptp(seconds) if len(seconds) else 0.0
    return float(len(seconds) / length) if length > 0 else np.nan


def notes_per_bar(score: ScoreTick) -> float:
    """Notes, drums included, per bar from the first onset to the end of the last note; bars may be fractions."""
    notes = Notes.of(score)
    if not len(notes):
        return np.nan
    starts = bar_starts(score) / score.ticks_per_quarter
    first, last = np.interp([notes.onsets[0], notes.ends.max()], starts, np.arange(len(starts)))
    return float(len(notes) / (last - first)) if last > first else np.nan


def duration_histogram(score: ScoreTick) -> Vector:
    """The share of each length of `LENGTHS` among the pitched notes; shape `(13,)`."""
    return _length_histogram(Notes.of(score, pitched=True).durations)


def onset_interval_histogram(score: ScoreTick) -> Vector:
    """The share of each length of `LENGTHS` among the times between successive onsets, drums included; `(13,)`."""
    return _length_histogram(np.diff(np.unique(Notes.of(score).onsets)))


def groove_consistency(score: ScoreTick) -> float:
    """
    How similar the rhythms of adjacent bars are: 1 - their mean Hamming distance (Wu & Yang 2020, arXiv 2008.01307).

    A bar is the set of the positions at which a note starts: 16 sixteenths in 4/4, 12 in 3/4. An onset belongs to the
    nearest position. The distance is divided by the positions of the longer bar. NaN for fewer than two bars.
    """
    bars, positions = _bars_and_positions(score, Notes.of(score))
    if not len(bars) or bars[-1] == bars[0]:
        return np.nan
    width = positions.max() + 1
    cells = np.unique(bars * width + positions)
    counts = np.bincount(cells // width, minlength=bars[-1] + 1)
    shared = np.bincount(cells[np.isin(cells + width, cells)] // width, minlength=bars[-1] + 1)
    starts = bar_starts(score) * POSITIONS / score.ticks_per_quarter
    lengths = np.diff(
        starts, append=2 * starts[-1] - starts[-2]
    )  # after rounding, an onset may lie on the last bar line
    pairs = np.arange(bars[0], bars[-1])
    distances = counts[pairs] + counts[pairs + 1] - 2 * shared[pairs]
    return float(1 - np.mean(distances / np.maximum(lengths[pairs], lengths[pairs + 1])))


def empty_beat_rate(score: ScoreTick) -> float:
    """The share of the quarter notes in which nothing sounds, from the first onset to the last end.

    After MuseGAN's rate of empty bars (arXiv 1709.06298), per beat as in MusPy (arXiv 2008.01951).
    """
    notes = Notes.of(score)
    if not len(notes):
        return np.nan
    first = np.floor(notes.onsets).astype(np.int64)
    last = np.maximum(np.ceil(notes.ends).astype(np.int64), first + 1)
    change = np.bincount(first, minlength=last.max() + 1) - np.bincount(last, minlength=last.max() + 1)
    return float(np.mean(np.cumsum(change)[first[0] : last.max()] == 0))


def bar_self_similarity(score: ScoreTick, lag: int) -> float:
    """
    Mean cosine similarity of bars that are `lag` bars apart, each described by the positions and pitch classes of its
    notes.

    It is a cheap relative of the structureness indicator of Wu & Yang (arXiv 2008.01307), which takes the best
    repetition in a fitness scape plot of audio. This one measures repetition at one distance only, and needs no audio.
    Pairs of silent bars are left out; a silent bar and any other bar have similarity 0. NaN for pieces of at most
    `lag` bars.
    """
    notes = Notes.of(score, pitched=True)
    bars, positions = _bars_and_positions(score, notes)
    if not len(bars) or bars[-1] - bars[0] < lag:
        return np.nan
    width = (positions.max() + 1) * 12
    cells, counts = np.unique((bars - bars[0]) * width + positions * 12 + notes.pitches % 12, return_counts=True)
    size = int(bars[-1] - bars[0] + 1)
    norms = np.sqrt(np.bincount(cells // width, counts**2, minlength=size))
    later = np.minimum(np.searchsorted(cells, cells + lag * width), len(cells) - 1)
    products = np.where(cells[later] == cells + lag * width, counts * counts[later], 0)
    products = np.bincount(cells // width, products, minlength=size)[: size - lag]
    before, after = norms[:-lag], norms[lag:]
    audible = before + after > 0
    if not audible.any():
        return np.nan
    scale = np.where(before * after > 0, before * after, 1)
    return float(np.mean((products / scale)[audible]))


def key_stability(score: ScoreTick) -> float:
    """
    The share of the windows of 4 bars that have the key of the whole piece.

    The key is the one whose Krumhansl-Kessler profile correlates best with the durations of the pitch classes. A
    window starts at every bar; windows without a key (silent, or with all pitch classes equal) are left out. NaN for
    pieces of fewer than 4 bars, or without a key.
    """
    notes = Notes.of(score, pitched=True)
    bars, _ = _bars_and_positions(score, notes)
    if not len(bars) or bars[-1] - bars[0] + 1 < WINDOW:
        return np.nan
    chroma = np.zeros((bars[-1] - bars[0] + 1, 12))
    np.add.at(chroma, (bars - bars[0], notes.pitches % 12), notes.durations)
    windows = np.lib.stride_tricks.sliding_window_view(chroma, WINDOW, axis=0).sum(-1)
    whole, keys = best_keys(chroma.sum(0)[None]), best_keys(windows)
    return float(np.mean(keys == whole)) if len(whole) and len(keys) else np.nan


def meter_stability(score: ScoreTick) -> float:
    """The share of the time, in quarter notes up to the end of the last note, in the most frequent meter."""
    end = score.end() if score.note_num() else 0
    if not end:
        return np.nan
    totals: dict[str, int] = {}
    for meter, ticks in meter_spans(score, end):
        totals[str(meter)] = totals.get(str(meter), 0) + ticks
    return max(totals.values()) / end


NUMBERS: dict[str, Callable[[ScoreTick], float]] = {
    "pitch_class_entropy": pitch_class_entropy,
    "scale_consistency": scale_consistency,
    "polyphony": polyphony,
    "notes_per_second": notes_per_second,
    "notes_per_bar": notes_per_bar,
    "groove_consistency": groove_consistency,
    "empty_beat_rate": empty_beat_rate,
    "bar_self_similarity_4": lambda score: bar_self_similarity(score, 4),
    "bar_self_similarity_8": lambda score: bar_self_similarity(score, 8),
    "bar_self_similarity_16": lambda score: bar_self_similarity(score, 16),
    "key_stability": key_stability,
    "meter_stability": meter_stability,
}
HISTOGRAMS: dict[str, Callable[[ScoreTick], Vector]] = {
    "pitch_class_histogram": pitch_class_histogram,
    "duration_histogram": duration_histogram,
    "onset_interval_histogram": onset_interval_histogram,
}


def measure(scores: Sequence[ScoreTick]) -> dict[str, Vector]:
    """Every feature of every score: of shape `(scores, 1)` for numbers, `(scores, bins)` for histograms."""
    functions: dict[str, Callable[[ScoreTick], Vector | float]] = {**NUMBERS, **HISTOGRAMS}
    return {
        name: np.stack([np.atleast_1d(np.asarray(function(score), dtype=np.float64)) for score in scores])
        for name, function in functions.items()
    }


def _bars_and_positions(score: ScoreTick, notes: Notes) -> tuple[Indices, Indices]:
    """The bar of every note, in order, and its nearest position in sixteenths, which may be in the next bar."""
    starts = bar_starts(score) / score.ticks_per_quarter
    onsets = notes.onsets + 0.5 / POSITIONS
    bars = np.searchsorted(starts, onsets, side="right") - 1
    return bars, np.floor((onsets - starts[bars]) * POSITIONS + 1e-9).astype(np.int64)


def _shares(counts: Indices) -> Vector:
    total = counts.sum()
    return counts / total if total else np.full(len(counts), np.nan)


def _length_histogram(lengths: Vector) -> Vector:
    borders = np.sqrt(LENGTHS[:-1] * LENGTHS[1:])
    return _shares(np.bincount(np.searchsorted(borders, lengths), minlength=len(LENGTHS)))
