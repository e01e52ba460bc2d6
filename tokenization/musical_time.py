"""Meters, bars, tempos and keys of a score. Times are in ticks; where MIDI says nothing, it is 4/4 at 120 quarters.

A change of meter starts a bar. Of several events at the same tick the last one counts.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from symusic.core import ScoreTick

_DEFAULT_MSPQ = 500_000  # MIDI's tempo until the first tempo event, in microseconds per quarter note

# How well the 12 pitch classes fit the keys of C: Krumhansl & Kessler (1982), "Tracing the dynamic changes in
# perceived tonal organization in a spatial representation of musical keys", Psychological Review 89.
_KEY_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
_TONICS = {
    "major": ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"),
    "minor": ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"),
}
KEYS = tuple(f"{tonic}-{mode}" for mode, tonics in _TONICS.items() for tonic in tonics)
_PROFILES = np.array([np.roll(profile, tonic) for profile in _KEY_PROFILES.values() for tonic in range(12)])
_PROFILES -= _PROFILES.mean(axis=1, keepdims=True)
_PROFILES /= np.linalg.norm(_PROFILES, axis=1, keepdims=True)


class Meter(NamedTuple):
    """A meter, and the tick from which it is in force."""

    time: int
    numerator: int
    denominator: int

    def bar_length(self, ticks_per_quarter: int) -> float:
        """Ticks per bar."""
        return 4 * ticks_per_quarter * self.numerator / self.denominator

    def __str__(self) -> str:
        return f"{self.numerator}/{self.denominator}"


def meters(score: ScoreTick) -> list[Meter]:
    """Every meter of a score in order, the first from tick 0."""
    found = [Meter(event.time, event.numerator, event.denominator) for event in _in_order(score.time_signatures)]
    return found if found and found[0].time == 0 else [Meter(0, 4, 4), *found]


def meter_spans(score: ScoreTick, end: int) -> list[tuple[Meter, int]]:
    """Every meter with the number of ticks for which it is in force before tick `end`."""
    found = meters(score)
    return list(zip(found, _spans([meter.time for meter in found], end), strict=True))


def bar_starts(score: ScoreTick) -> NDArray[np.float64]:
    """Ticks at which bars start, the last of them at or after the end of the last note."""
    end, found = max(score.end(), 1), meters(score)
    inside = [meter for meter in found if meter.time < end]
    ends = [*(meter.time for meter in inside[1:]), end]
    starts: list[float] = []
    for meter, stop in zip(inside, ends, strict=True):
        length = meter.bar_length(score.ticks_per_quarter)
        starts.extend(np.arange(meter.time, stop, length))
    # A meter after the last note ends the last bar as well.
    return np.array([*starts, min([starts[-1] + length, *(meter.time for meter in found[len(inside) :])])])


def count_bars(score: ScoreTick, end: int) -> int:
    """Number of bars that start before tick `end`."""
    bars = 0
    for meter, span in meter_spans(score, end):
        bars -= -span * meter.denominator // (4 * score.ticks_per_quarter * meter.numerator)  # rounds up
    return bars


def mean_tempo(score: ScoreTick, end: int) -> float:
    """All quarter notes before tick `end`, divided by all minutes."""
    tempos = _in_order(score.tempos)
    spans = _spans([0, *(tempo.time for tempo in tempos)], end)
    lengths = [_DEFAULT_MSPQ, *(tempo.mspq for tempo in tempos)]
    microseconds = sum(ticks * length for ticks, length in zip(spans, lengths, strict=True))
    return 60_000_000 * end / microseconds


def best_keys(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """
    The keys whose profiles of Krumhansl and Kessler correlate best with weights of pitch classes.

    Args:
        weights (`array` of shape `(n, 12)`): total durations of the pitch classes, C first.

    Returns:
        `array` of shape `(m,)`: indices into `KEYS`. A row whose weights are all alike has no key and is left out.
    """
    weights = weights[np.ptp(weights, axis=1) > 1e-9]
    centred = weights - weights.mean(axis=1, keepdims=True)
    # The norm of a row of weights is the same for every key, and does not change which fits best.
    return np.argmax(centred @ _PROFILES.T, axis=1)


def _in_order(events: Iterable[Any]) -> list[Any]:
    return sorted(events, key=lambda event: event.time)


def _spans(starts: list[int], end: int) -> list[int]:
    """Ticks from each start to the next, the last to `end`, none beyond it."""
    return [later - earlier for earlier, later in pairwise([*(min(start, end) for start in starts), end])]
