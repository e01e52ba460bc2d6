"""How much of some music is copied from the training set.

There is one detector, [`RunIndex`]: it finds runs of successive integers, of any length, that two collections of
sequences share. Melodies are compared with it in any key and at any tempo ([`Melodies`]), and token sequences as they
are ([`CopyRate`]). Real music shares runs with other real music as well, so read every figure beside that of held-out
music against the same training set.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from symusic.core import ScoreTick
from tqdm.auto import tqdm

from midimamba.evaluation.features import Notes

Hashes = NDArray[np.uint64]

TICKS = 24  # per quarter note: onsets are rounded to these, fine enough for triplets of sixty-fourths

COPIED_TOKENS = 8
"""An n-gram of this many tokens counts as copied if the training music contains it. In REMI it is two to four notes:
shorter n-grams are idiom, and much longer ones are rare in any sample."""

MAX_NGRAMS = 2**22
"""At most this many n-grams of the training music are kept (32 MB of hashes). If there are more, [`CopyRate`] reads
blocks that are spread evenly over the data set."""

# An odd multiplier of 64 bits (Knuth's, from MMIX): runs are hashed as polynomials modulo 2⁶⁴.
_MULTIPLIER = 6364136223846793005
_SEMITONES = np.uint64(256)


class RunIndex:
    """
    Runs of successive integers in some sequences, hashed for any length on request.

    Args:
        sequences (iterable of integer sequences): integers of at least 0. Each sequence is read once.
    """

    def __init__(self, sequences: Iterable[ArrayLike]):
        # 0 follows every sequence, so that a run that reaches into the next one can be left out.
        parts = [
            np.append(np.asarray(sequence, dtype=np.uint64) + np.uint64(1), np.uint64(0)) for sequence in sequences
        ]
        self._codes = np.concatenate([np.zeros(0, np.uint64), *parts])
        self._ends = np.concatenate([[0], np.cumsum(self._codes == 0)])
        self._mixed = _mix(self._codes)
        self.longest = max((len(part) - 1 for part in parts), default=-1)
        """The length of the longest sequence; -1 if there are no sequences."""

    def runs(self, length: int) -> Hashes:
        """
        Hashes of all runs of `length` integers. A run that occurs twice is returned twice.

        Two different runs have the same hash with a probability of about 2⁻⁶⁴.
        """
        count = len(self._codes) - length + 1
        if length < 1 or count < 1:
            return np.zeros(0, np.uint64)
        # By doubling: hashes of 1, 2, 4, … integers, of which those in the binary form of `length` are combined.
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


class Melodies:
    """
    All melodies of some scores, ready to be searched for runs of notes of any length.

    A melody is the pitched notes of one program, by onset and then pitch. It is compared by its steps: the pitch
    interval in semitones and the time between the onsets of successive notes. Transposed music has the same steps, and
    so has music with other dynamics, note lengths or tempo.

    Args:
        scores (iterable of `symusic.Score`): times in ticks. Each is read once.
    """

    def __init__(self, scores: Iterable[ScoreTick]):
        self._steps = RunIndex(steps for score in scores for steps in _melodies(score))
        self.longest = self._steps.longest + 1
        """The notes of the longest melody."""

    def runs(self, length: int) -> Hashes:
        """Hashes of all runs of `length` successive notes. A run that occurs twice is returned twice."""
        return self._steps.runs(length - 1)


class CopyRate:
    """
    The share of the n-grams of some token sequences that the training music contains.

    Args:
        dataset (`Sequence[Mapping[str, Sequence[int]]]`): training blocks, with the tokens as `input_ids`.
        n (`int`, *optional*, defaults to 8): tokens per n-gram.
    """

    def __init__(self, dataset: Sequence[Mapping[str, Sequence[int]]], n: int = COPIED_TOKENS):
        self.n = n
        per_block = max(1, len(dataset[0]["input_ids"]) - n + 1)
        count = min(len(dataset), max(1, MAX_NGRAMS // per_block))
        blocks = (dataset[index * len(dataset) // count]["input_ids"] for index in range(count))
        progress = tqdm(blocks, total=count, desc="n-grams of the training music", leave=False, disable=None)
        self.known = np.unique(RunIndex(progress).runs(n))

    def __call__(self, sequences: Sequence[Sequence[int]]) -> float:
        """The share over the n-grams of all sequences together; 0 if they are too short to have any."""
        runs = RunIndex(sequences).runs(self.n)
        return copied_share(runs, self.known) if len(runs) else 0.0


class Searchable(Protocol):
    """What [`longest_copies`] searches: [`RunIndex`] or [`Melodies`]."""

    longest: int

    def runs(self, length: int) -> Hashes: ...


def copied_share(runs: Hashes, known: Hashes) -> float:
    """
    The share of runs that the training set contains; NaN if there are no runs.

    Args:
        runs (`array`): hashes of the runs of a sample.
        known (`array`): the sorted hashes of the training set, `np.unique(training.runs(length))`.
    """
    return float(_is_held(known, runs).mean()) if len(runs) else np.nan


def longest_copies(samples: Sequence[Searchable], training: Searchable) -> list[int]:
    """
    The length of the longest run of every sample that the training set contains. A sample of notes shares at least 1.

    All samples are searched at once, by bisection: a set that contains a run of length n contains one of length n - 1.
    So the training set is hashed only for the lengths in question.
    """
    low = [min(sample.longest, training.longest, 1) for sample in samples]
    high = [min(sample.longest, training.longest) for sample in samples]
    while True:
        middles = [(a + b + 1) // 2 if a < b else 0 for a, b in zip(low, high, strict=True)]
        if not any(middles):
            return low
        for length in sorted(set(middles) - {0}):
            members = [index for index, middle in enumerate(middles) if middle == length]
            runs = {index: samples[index].runs(length) for index in members}
            # Looking the training set up in the few runs of the samples needs no sorting of the training set.
            wanted = np.unique(np.concatenate(list(runs.values())))
            held = _held(wanted, training.runs(length))
            for index in members:
                if np.isin(runs[index], held).any():
                    low[index] = length
                else:
                    high[index] = length - 1


def _held(wanted: Hashes, runs: Hashes) -> Hashes:
    """Those of the sorted `wanted` that are among `runs`."""
    return np.unique(runs[_is_held(wanted, runs)])


def _is_held(sorted_hashes: Hashes, hashes: Hashes) -> NDArray[np.bool_]:
    """Which hashes are among sorted ones, which need not be sorted again for every piece."""
    if not len(sorted_hashes):
        return np.zeros(len(hashes), np.bool_)
    places = np.minimum(np.searchsorted(sorted_hashes, hashes), len(sorted_hashes) - 1)
    return sorted_hashes[places] == hashes


def _melodies(score: ScoreTick) -> list[Hashes]:
    """The steps of the pitched notes of every program, each step as one number."""
    notes = Notes.of(score, pitched=True)
    onsets = np.rint(notes.onsets * TICKS).astype(np.int64)
    melodies = []
    for program in np.unique(notes.programs):
        own = notes.programs == program
        intervals, times = np.diff(notes.pitches[own]) + 128, np.diff(onsets[own])
        melodies.append(times.astype(np.uint64) * _SEMITONES + intervals.astype(np.uint64))
    return melodies


def _mix(codes: Hashes) -> Hashes:
    """Spread small numbers over 64 bits (the finalizer of SplitMix64, Steele et al. 2014): polynomials of small
    numbers collide far more often than polynomials of random ones."""
    codes = codes + np.uint64(0x9E3779B97F4A7C15)
    codes = (codes ^ (codes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    codes = (codes ^ (codes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return codes ^ (codes >> np.uint64(31))
