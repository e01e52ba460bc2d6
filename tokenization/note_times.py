"""Onsets and durations that a tokenizer can write, and the notes that its ids stand for.

Two rules keep what MidiTok's durations and MIDI's channels cannot say. Both apply when music is encoded and when ids
are decoded, so that a written file reads back as the decoded score.

- **Overlaps.** In one instrument, a note that starts while its pitch sounds ends the earlier note there, and lasts
  until the later of their two ends. Of two notes of one pitch and onset, one remains, with the longer duration and
  the higher velocity.
- **Ties.** A note longer than the longest duration is written as a note of exactly that duration, followed at its end
  by another one of its pitch and velocity, and so on. Decoding joins them. A note that is really struck again after
  the longest duration is kept apart: the first of the two is written one duration shorter.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from miditok import BEAT, MusicTokenizer, PerTok
from numpy.typing import NDArray

from .musical_time import Meter

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Notes(NamedTuple):
    """Notes of one instrument, ordered by pitch and onset. Times are in ticks of a grid."""

    time: Ints
    end: Floats
    pitch: Ints
    velocity: Ints

    def following(self) -> Floats:
        """The next onset of every note's pitch; infinite for the last."""
        result = np.full(len(self.time), np.inf)
        same = self.pitch[1:] == self.pitch[:-1]
        result[:-1][same] = self.time[1:][same]
        return result

    def ordered(self) -> "Notes":
        """By pitch and onset."""
        return self.at(np.lexsort((self.time, self.pitch)))

    def at(self, indices: Ints) -> "Notes":
        """Some of the notes, in this order."""
        return Notes(self.time[indices], self.end[indices], self.pitch[indices], self.velocity[indices])


@dataclass(frozen=True)
class Grid:
    """The times that a tokenizer can write in a piece.

    Args:
        ticks_per_quarter (`int`):
            The time division of all ticks below.
        starts (`array` of shape (sections,)):
            Ticks from which the next two apply. Positions are counted from there.
        steps (`array` of shape (sections,)):
            Ticks per position.
        durations (`list` of `sections` arrays, *optional*):
            The durations in ticks that a note can have, in order. `None` if its end may be at any position.
    """

    ticks_per_quarter: int
    starts: Ints
    steps: Ints
    durations: list[Ints] | None

    def section(self, times: Floats | Ints) -> Ints:
        """The section of every time."""
        return np.maximum(np.searchsorted(self.starts, times, side="right") - 1, 0)

    def round(self, times: Floats | Ints) -> Ints:
        """The nearest position of every time."""
        section = self.section(times)
        start, step = self.starts[section], self.steps[section]
        return np.asarray(np.floor((times - start) / step + 0.5) * step + start, dtype=np.int64)

    def write(self, notes: Notes, alike: Ints) -> tuple[Notes, int]:
        """Give every note an end that can be written, and cut long notes into tied ones.

        Args:
            notes ([`Notes`]):
                Without overlaps, their onsets on the grid.
            alike (`array` of shape (notes,)):
                The velocities as they are written: only notes that are alike could be taken for tied ones.

        Returns:
            `tuple[Notes, int]`: the notes, and how many were shortened because they would be taken for tied ones.
        """
        if not len(notes.time):
            return notes, 0
        if self.durations is None:
            steps = self.steps[self.section(notes.time)]
            end = np.maximum(self.round(notes.end), notes.time + steps)
            return notes._replace(end=np.minimum(end, notes.following())), 0
        notes, alike, tied = self._cut(notes, alike)
        section = self.section(notes.time)
        lengths = (notes.end - notes.time).astype(np.float64)
        following = notes.following()
        gap = following - notes.time
        longest, shorter = np.zeros(len(section)), np.zeros(len(section))
        for index in np.unique(section):
            durations = self.durations[index]
            here = section == index
            middles = (durations[1:] + durations[:-1]) / 2
            found = np.searchsorted(middles, lengths[here], side="right")
            # Decoding ends a note where its pitch is struck again. That must not be beyond the end of the next note.
            late = durations[found] - gap[here] >= self._least(following[here])
            floor = np.maximum(np.searchsorted(durations, gap[here], side="right") - 1, 0)
            lengths[here] = durations[np.where(late, np.minimum(found, floor), found)]
            longest[here], shorter[here] = durations[-1], durations[-2]
        again = self._is_tied(notes, alike, lengths == longest) & ~tied
        lengths[again] = shorter[again]
        return notes._replace(end=notes.time + lengths), int(again.sum())

    def _least(self, times: Floats) -> Floats:
        """The shortest duration at every time; infinite times have none."""
        known = np.isfinite(times)
        steps = np.full(len(times), np.inf)
        steps[known] = self.steps[self.section(times[known])]
        return steps

    def pieces(self, notes: Notes) -> int:
        """At most this many notes are written for `notes`."""
        if self.durations is None:
            return len(notes.time)
        shortest = min(durations[-1] for durations in self.durations)
        return int(np.ceil((notes.end - notes.time) / shortest).sum())

    def _cut(self, notes: Notes, alike: Ints) -> tuple[Notes, Ints, NDArray[np.bool_]]:
        """Cut long notes into tied ones. The last result says which notes another one is tied to."""
        assert self.durations is not None
        section = self.section(notes.time)
        limits = np.array([durations[-1] for durations in self.durations])[section] + self.steps[section] / 2
        long = np.flatnonzero(notes.end - notes.time > limits)
        tied = np.zeros(len(notes.time), bool)
        if not len(long):
            return notes, alike, tied
        onsets, ends, sources = [], [], []
        for index in long:
            start, stop = int(notes.time[index]), float(notes.end[index])
            while True:
                where = int(self.section(np.array([start]))[0])
                longest = int(self.durations[where][-1])
                if stop - start <= longest + self.steps[where] / 2:
                    break
                onsets.append(start)
                ends.append(float(start + longest))
                sources.append(index)
                start = int(self.round(np.array([start + longest]))[0])
            onsets.append(start)
            ends.append(stop)
            sources.append(index)
        kept = np.setdiff1d(np.arange(len(notes.time)), long)
        source = np.concatenate([kept, np.array(sources)])
        time = np.concatenate([notes.time[kept], np.array(onsets, np.int64)])
        end = np.concatenate([notes.end[kept], np.array(ends)])
        last = np.append(np.diff(np.array(sources)) != 0, True)
        tied = np.concatenate([np.zeros(len(kept), bool), ~last])
        pitch = notes.pitch[source]
        order = np.lexsort((time, pitch))
        cut = Notes(time, end, pitch, notes.velocity[source])
        return cut.at(order), alike[source][order], tied[order]

    def _is_tied(self, notes: Notes, alike: Ints, longest: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which notes of the longest duration decoding would join to the next: it starts at their end."""
        section = self.section(notes.time)
        assert self.durations is not None
        ends = notes.time + np.array([durations[-1] for durations in self.durations])[section]
        result = np.zeros(len(notes.time), bool)
        result[:-1] = (notes.pitch[1:] == notes.pitch[:-1]) & (alike[1:] == alike[:-1])
        result[:-1] &= notes.time[1:] == self.round(ends)[:-1]
        return result & longest

    def join(self, notes: Notes) -> Notes:
        """Join tied notes, which are ordered by pitch and onset."""
        if self.durations is None or not len(notes.time):
            return notes
        section = self.section(notes.time)
        longest = np.array([durations[-1] for durations in self.durations])[section]
        tied = self._is_tied(notes, notes.velocity, notes.end - notes.time == longest)
        if not tied.any():
            return notes
        first = np.append(True, ~tied[:-1])
        last = np.flatnonzero(~tied)
        return Notes(notes.time[first], notes.end[last], notes.pitch[first], notes.velocity[first])


def without_overlaps(notes: Notes, tolerance: float = 0.0) -> tuple[Notes, int, int]:
    """Apply the rule of overlaps.

    Args:
        notes ([`Notes`]):
            Those of one instrument, in any order.
        tolerance (`float`, *optional*, defaults to 0):
            Overlaps up to this many ticks are not counted: they come from rounding.

    Returns:
        `tuple[Notes, int, int]`: the notes in order, how many ended because their pitch was struck again, and how many
        were removed because another one has their pitch and onset.
    """
    if not len(notes.time):
        return notes, 0, 0
    notes = notes.ordered()
    first = np.append(True, (np.diff(notes.time) != 0) | (np.diff(notes.pitch) != 0))
    removed = int(len(first) - first.sum())
    if removed:
        starts = np.flatnonzero(first)
        end = np.maximum.reduceat(notes.end, starts)
        velocity = np.maximum.reduceat(notes.velocity, starts)
        notes = Notes(notes.time[first], end, notes.pitch[first], velocity)
    # The latest end so far among notes of the same pitch: pitches are set apart by more than any time.
    apart = notes.pitch * (float(notes.end.max()) + 1)
    latest = np.maximum.accumulate(notes.end + apart) - apart
    following = notes.following()
    cut = int((latest > following + tolerance).sum())
    return notes._replace(end=np.minimum(latest, following)), cut, removed


def make_grid(tokenizer: MusicTokenizer, meters: list[Meter], ticks_per_quarter: int) -> Grid:
    """The grid of a piece.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            From [`~midimamba.tokenization.tokenizer.build_tokenizer`].
        meters (`list[Meter]`):
            Those that are written, the first at tick 0; 4/4 if the tokenizer writes none.
        ticks_per_quarter (`int`):
            The unit of their times.
    """
    if isinstance(tokenizer, PerTok):
        return _microtiming_grid(tokenizer)
    sections: list[tuple[int, int]] = []  # tick and ticks per beat
    for meter in meters:
        beat = 4 * ticks_per_quarter // meter.denominator
        if not sections or sections[-1][1] != beat:
            sections.append((meter.time, beat))
    starts, beats = np.array(sections, np.int64).T
    durations = None
    if tokenizer.config.using_note_duration_tokens and not ends_notes_freely(tokenizer):
        durations = [tokenizer._tpb_to_time_array[beat].astype(np.int64) for beat in beats.tolist()]
    return Grid(ticks_per_quarter, starts, beats // tokenizer.config.max_num_pos_per_beat, durations)


def _microtiming_grid(tokenizer: PerTok) -> Grid:
    """PerTok's time shifts are of `beat_res`, and microtiming shifts each note by a few ticks."""
    quarter: int = tokenizer.tpq
    step = quarter // tokenizer.config.max_num_pos_per_beat
    if tokenizer.use_microtiming:
        step = max(int(np.diff(tokenizer.microtiming_tick_values).max(initial=1)), 1)
    durations = np.array([beats * quarter + ticks for beats, ticks, _ in tokenizer.durations], np.int64)
    return Grid(quarter, np.zeros(1, np.int64), np.array([step]), [np.unique(durations)])


def ends_notes_freely(tokenizer: MusicTokenizer) -> bool:
    """Whether a note may end at any position, however long it is: by an event of its own, or as BEAT's patterns."""
    return tokenizer._note_on_off or isinstance(tokenizer, BEAT)
