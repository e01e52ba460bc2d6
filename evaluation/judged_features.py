"""What a judge hears beyond the features that reports show: how exactly bars repeat, lines, chords and rhythm.

They are here and not in [`~midimamba.evaluation.features`], so that the figures of reports stay what they are. A judge
hears nothing that depends on the key of a piece: it would learn in which keys its training music stands.
"""

from functools import partial
from itertools import pairwise

import numpy as np

from midimamba.evaluation.features import HISTOGRAMS, NUMBERS, Feature, Indices, Piece, Vector, shares

LAGS = (1, 2, 4, 8)  # bars
_SIXTEENTHS = 16  # of a bar; later positions of a longer bar count as the last
_LEAP = 12  # semitones; larger steps of the upper line count as this one

_EQUAL = 1 - 1e-9  # of a cosine
_LEGATO = 1e-3  # quarter notes
_INTERVAL_CLASSES = np.array([[min((p - q) % 12, (q - p) % 12) for q in range(12)] for p in range(12)])


def onset_position_histogram(piece: Piece) -> Vector:
    """The share of each sixteenth of the bar among all onsets; shape `(16,)`."""
    return shares(np.bincount(np.minimum(piece.grid.positions, _SIXTEENTHS - 1), minlength=_SIXTEENTHS))


def melodic_interval_histogram(piece: Piece) -> Vector:
    """The share of each step, in semitones from -12 to 12, between successive notes of the upper line; `(25,)`."""
    steps = np.diff(_upper_line(piece)).clip(-_LEAP, _LEAP) + _LEAP
    return shares(np.bincount(steps, minlength=2 * _LEAP + 1))


def harmonic_interval_histogram(piece: Piece) -> Vector:
    """The share of each interval class, unison to tritone, between a new note and those that sound with it; `(7,)`.

    Notes that begin together are pairs as well.
    """
    notes = piece.pitched
    times, onsets = np.unique(notes.onsets, return_inverse=True)
    # A tiny overlap, of notes played legato, is no harmony.
    ends = np.maximum(np.searchsorted(times, notes.ends - _LEGATO), onsets + 1)
    classes, size = notes.pitches % 12, 12 * (len(times) + 1)
    new = np.bincount(onsets * 12 + classes, minlength=size).reshape(-1, 12)
    starting, ending = (np.bincount(rows * 12 + classes, minlength=size) for rows in (onsets + 1, ends))
    old = np.cumsum((starting - ending).reshape(-1, 12), axis=0)
    among_new = new.T @ new - np.diag(new.sum(0))  # every pair twice
    return shares(np.bincount(_INTERVAL_CLASSES.ravel(), (2 * new.T @ old + among_new).ravel(), minlength=7) / 2)


def degree_histogram(piece: Piece) -> Vector:
    """How long each degree of the chromatic scale sounds, by its share, from the tonic of the piece's key; `(12,)`."""
    if not len(piece.key):
        return np.full(12, np.nan)
    weights = np.roll(piece.chroma.sum(0), -int(piece.key[0] % 12))
    return np.asarray(weights / weights.sum())


def bar_repetition(piece: Piece, lag: int) -> float:
    """
    The share of bars whose positions and pitch classes are exactly those of the bar `lag` bars before.

    A model that loses its place writes bars that resemble earlier ones, and similarity alone likes them. Silent bars
    are left out. NaN for pieces of at most `lag` bars.
    """
    if piece.pitched_grid.span <= lag:
        return np.nan
    similarities = piece.similarities(lag)
    return float(np.mean(similarities > _EQUAL)) if len(similarities) else np.nan


def distinct_bars(piece: Piece) -> float:
    """Different bars, as [`bar_repetition`] compares them, divided by all bars; NaN without pitched notes."""
    span = piece.pitched_grid.span
    if not span:
        return np.nan
    found = piece.pitch_cells
    borders = np.searchsorted(found.cells, np.arange(span + 1) * found.width)
    content = np.stack([found.cells % found.width, found.counts], axis=1)
    return len({content[start:stop].tobytes() for start, stop in pairwise(borders)}) / span


JUDGED: dict[str, Feature] = {
    **NUMBERS,
    "distinct_bars": distinct_bars,
    **{f"bar_repetition_{lag}": partial(bar_repetition, lag=lag) for lag in LAGS},
    **{name: feature for name, feature in HISTOGRAMS.items() if name != "pitch_class_histogram"},
    "degree_histogram": degree_histogram,
    "onset_position_histogram": onset_position_histogram,
    "melodic_interval_histogram": melodic_interval_histogram,
    "harmonic_interval_histogram": harmonic_interval_histogram,
}
"""What [`~midimamba.evaluation.judges.MusicalJudge`] can hear. None depends on the key."""


def _upper_line(piece: Piece) -> Indices:
    """The highest pitch that begins at each onset."""
    notes = piece.pitched
    return notes.pitches[np.append(notes.onsets[1:] != notes.onsets[:-1], True)] if len(notes) else notes.pitches
