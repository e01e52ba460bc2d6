"""How many notes sound at once, and new music that keeps to what its model learned from.

A note sounds from its onset up to its end, which is the first tick at which it is silent. Drums do not count.
"""

from collections import deque
from heapq import heappop, heappush
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from symusic import Note, Score
from symusic.core import ScoreTick

Ints = NDArray[np.int64]


class _Pitched(NamedTuple):
    """All notes of a score but drums, track by track, of shape (notes,) each. Times are in ticks."""

    track: Ints
    time: Ints
    end: Ints
    pitch: Ints

    @classmethod
    def of(cls, score: ScoreTick) -> "_Pitched":
        parts = [np.zeros((4, 0), np.int64)]
        for index, track in enumerate(score.tracks):
            if not track.is_drum:
                notes = track.notes.numpy()
                time, duration = notes["time"].astype(np.int64), notes["duration"].astype(np.int64)
                parts.append(np.stack([np.full_like(time, index), time, time + duration, notes["pitch"]]))
        return cls(*np.concatenate(parts, axis=1))


def most_voices(score: ScoreTick) -> int:
    """The largest number of pitched notes that sound at once, all instruments together; 0 for a score without any."""
    notes = _Pitched.of(score)
    return _most(notes.time, notes.end)


def _most(time: Ints, end: Ints) -> int:
    """The largest number of notes that sound at once. A note that ends makes room for one that begins there."""
    begun = np.searchsorted(np.sort(time), time, side="right")
    ended = np.searchsorted(np.sort(end), time, side="right")
    return int((begun - ended).max(initial=0))


def limit_voices(new: ScoreTick, voices: int | None, prompt: ScoreTick | None = None) -> None:
    """End notes of new music early, in place, so that at most `voices` pitched notes sound at once.

    The rule is that of a synthesizer that has no voice left and takes one away. Where notes begin, and with those that
    sound there would be more than `voices`, the notes that began first end at that tick. Of notes that began together,
    the lowest ends first; of one pitch, that of the first track. Nothing else changes: every note keeps its onset, and
    notes that begin at one tick never end each other, so none gets length 0. Notes of the prompt sound beside the new
    ones, but are not ended.

    So there are still more than `voices` where the prompt alone has as many, or where more begin at one tick. The
    grammar samples no such tick, except that PerTok's microtiming may lead notes of two places there. A tokenization
    without a grammar may have any.

    Args:
        new (`symusic.Score`):
            Notes that may be ended, each at least a tick long.
        voices (`int`, *optional*):
            At least 1. `None` for no limit.
        prompt (`symusic.Score`, *optional*):
            Other notes of the same piece, with the same time division.
    """
    if voices is None:
        return
    ours, other = _Pitched.of(new), _Pitched.of(Score(new.ticks_per_quarter) if prompt is None else prompt)
    sounding = other.end > other.time
    time, end, pitch = (
        np.concatenate([mine, theirs[sounding]]) for mine, theirs in zip(ours[1:], other[1:], strict=True)
    )
    if _most(time, end) <= voices:
        return
    end = _with_stolen_voices(time, end, pitch, len(ours.time), voices)[: len(ours.time)]
    for index in np.unique(ours.track[end < ours.end]).tolist():
        track = new.tracks[index]
        columns = track.notes.numpy()
        columns["duration"] = (end - ours.time)[ours.track == index].astype(np.int32)
        track.notes = Note.from_numpy(**columns).sort()


def _with_stolen_voices(time: Ints, end: Ints, pitch: Ints, num_new: int, voices: int) -> Ints:
    """The ends of all notes, of which the first `num_new` may be ended; shapes (notes,)."""
    onsets, ends = time.tolist(), end.tolist()
    order = np.lexsort((pitch, time)).tolist()  # stable, so notes of one pitch stay in the order of their tracks
    alive = [False] * len(ends)
    num_alive = 0
    running: list[tuple[int, int]] = []  # a heap of (end, note), with notes that were ended before
    oldest: deque[int] = deque()  # new notes by onset and pitch, with notes that are silent already
    for onset, group in groupby(order, key=onsets.__getitem__):
        begins = list(group)
        while running and running[0][0] <= onset:
            silent = heappop(running)[1]
            num_alive -= alive[silent]
            alive[silent] = False
        while oldest and num_alive + len(begins) > voices:
            stolen = oldest.popleft()
            if alive[stolen]:
                ends[stolen], alive[stolen] = onset, False
                num_alive -= 1
        for note in begins:
            heappush(running, (ends[note], note))
            alive[note] = True
            if note < num_new:
                oldest.append(note)
        num_alive += len(begins)
    return np.array(ends, np.int64)
