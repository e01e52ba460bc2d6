"""How much of a piece is copied from the training set, whatever the key and the tempo.

A piece is its melodies: the pitched notes of each program, by onset and then pitch. From a note to the next there is a
step: the pitch interval in semitones and the time between the onsets. Transposed music has the same steps, and so has
music with other dynamics, note lengths or tempo. Real music repeats its kind as well, so read every figure beside that
of held-out music against the same training set.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from symusic.core import ScoreTick

from midimamba.evaluation.features import Notes

Codes = NDArray[np.uint64]

TICKS = 24  # a quarter note: what onsets are rounded to, fine enough for triplets of sixty-fourths

# An odd multiplier of 64 bits (Knuth's, from MMIX): sequences of steps are hashed as polynomials modulo 2⁶⁴.
_MULTIPLIER = 6364136223846793005
_SEMITONES = np.uint64(256)


class Melodies:
    """
    The steps of all melodies of some scores, one after the other, ready to be searched for runs of any length.

    Args:
        scores (iterable of `symusic.Score`): times in ticks. Each is read once.
    """

    def __init__(self, scores: Iterable[ScoreTick]):
        melodies = [steps for score in scores for steps in _melodies(score)]
        # A melody is followed by what is no step, so that a run that reaches into the next can be left out.
        parts = [part for steps in melodies for part in (steps, np.zeros(1, np.uint64))]
        self._codes = np.concatenate([np.zeros(0, np.uint64), *parts])
        self._ends = np.concatenate([[0], np.cumsum(self._codes == 0)])
        self._mixed = _mix(self._codes)
        self.longest = 1 + max((len(steps) for steps in melodies), default=-1)

    def runs(self, notes: int) -> Codes:
        """
        Hashes of all runs of so many successive notes, each as often as it is there.

        Two different runs have the same hash with a probability of about 2⁻⁶⁴ a pair.
        """
        length = notes - 1
        count = len(self._codes) - length + 1
        if length < 1 or count < 1:
            return np.zeros(0, np.uint64)
        # By doubling: hashes of 1, 2, 4, … steps, of which those in the binary form of `length` are put together.
        hashes, offset, power, size = np.zeros(count, np.uint64), 0, self._mixed, 1
        while True:
            factor = np.uint64(pow(_MULTIPLIER, size, 2**64))
            if length & size:
                hashes = hashes * factor + power[offset : offset + count]
                offset += size
            if 2 * size > length:
                break
            power = power[:-size] * factor + power[size:]
            size *= 2
        return hashes[self._ends[length:] == self._ends[:count]]


def copied_share(sample: Melodies, training_runs: Codes, notes: int) -> float:
    """
    Share of a sample's runs of so many notes that the training set holds; NaN if the sample has none so long.

    Args:
        sample (`Melodies`): of one piece.
        training_runs (`array`): the sorted hashes of the training set, `np.unique(training.runs(notes))`.
        notes (`int`): notes a run.
    """
    runs = sample.runs(notes)
    return float(_is_held(training_runs, runs).mean()) if len(runs) else np.nan


def longest_copies(samples: Sequence[Melodies], training: Melodies) -> list[int]:
    """
    The longest run of notes of every sample that the training set holds; 1 if it shares no step, 0 without notes.

    All samples are searched at once, each halving where its own longest run may end: whoever holds a run of n notes
    holds one of n - 1. So the training set is hashed for the lengths in question only.
    """
    low = [min(sample.longest, training.longest, 1) for sample in samples]
    high = [min(sample.longest, training.longest) for sample in samples]
    while True:
        middles = [(a + b + 1) // 2 if a < b else 0 for a, b in zip(low, high, strict=True)]
        if not any(middles):
            return low
        for notes in sorted(set(middles) - {0}):
            members = [index for index, middle in enumerate(middles) if middle == notes]
            runs = {index: samples[index].runs(notes) for index in members}
            # Looking the training set up in the few runs of the samples needs no sorting of the training set.
            wanted = np.unique(np.concatenate(list(runs.values())))
            held = _held(wanted, training.runs(notes))
            for index in members:
                if np.isin(runs[index], held).any():
                    low[index] = notes
                else:
                    high[index] = notes - 1


def _held(wanted: Codes, runs: Codes) -> Codes:
    """Those of the sorted `wanted` that are among `runs`."""
    return np.unique(runs[_is_held(wanted, runs)])


def _is_held(sorted_codes: Codes, codes: Codes) -> NDArray[np.bool_]:
    """Which codes are among sorted ones, which need not be sorted again for every piece."""
    if not len(sorted_codes):
        return np.zeros(len(codes), np.bool_)
    places = np.minimum(np.searchsorted(sorted_codes, codes), len(sorted_codes) - 1)
    return sorted_codes[places] == codes


def _melodies(score: ScoreTick) -> list[Codes]:
    """The steps of every program's pitched notes, as one number each that is never 0."""
    notes = Notes.of(score, pitched=True)
    onsets = np.rint(notes.onsets * TICKS).astype(np.int64)
    melodies = []
    for program in np.unique(notes.programs):
        own = notes.programs == program
        intervals, times = np.diff(notes.pitches[own]) + 128, np.diff(onsets[own])
        melodies.append(times.astype(np.uint64) * _SEMITONES + intervals.astype(np.uint64))
    return melodies


def _mix(codes: Codes) -> Codes:
    """Spread small numbers over 64 bits (the finalizer of SplitMix64, Steele et al. 2014): polynomials of small
    numbers collide far more often than those of random ones."""
    codes = codes + np.uint64(0x9E3779B97F4A7C15)
    codes = (codes ^ (codes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    codes = (codes ^ (codes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return codes ^ (codes >> np.uint64(31))
