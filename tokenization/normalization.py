"""Music in the form in which it is tokenized, and what that changes.

A tokenizer has a grid, a longest duration, some meters and some tempos. What MidiTok would shift, cut or drop without
a word is written here in another way that keeps it, or the change is listed in plain English.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from miditok import BEAT, MuMIDI, MusicTokenizer, Octuple, PerTok
from symusic import Note, Tempo, TimeSignature, Track
from symusic.core import NoteTickList, ScoreTick, TempoTickList, TimeSignatureTickList, TrackTickList

from .bar_plan import PER_QUARTER, plan_bars
from .ingest import MAX_NOTES, MidiRefusedError
from .musical_time import Meter, bar_starts, meters
from .note_times import Floats, Grid, Ints, Notes, make_grid, without_overlaps

_DRUMS = -1
SUSTAIN = 64  # the number of the control change
PRESSED = 64  # its lowest value that presses the pedal
_FOUR_FOUR = [Meter(0, 4, 4)]


class Normalized(NamedTuple):
    """A score that can be tokenized, and in plain English what differs from the music."""

    score: ScoreTick
    changes: list[str]


def normalize_score(tokenizer: MusicTokenizer, score: ScoreTick) -> ScoreTick:
    """The score of [`normalize`]."""
    return normalize(tokenizer, score).score


def normalize(tokenizer: MusicTokenizer, score: ScoreTick) -> Normalized:
    """The score in the form in which it is tokenized, and what that changes.

    - **Bar lines** are where the music has them. A meter that the tokenizer lacks becomes one of equal length (3/2 is
      written as 6/4), or several in a row (15/16 as 7/8 + 1/16); a bar that a change of meter cuts short becomes a
      shorter bar.
    - **Long notes** become tied notes, and **overlaps** of one pitch in one instrument end; see
      [`~midimamba.tokenization.note_times`].
    - **The sustain pedal** lengthens the notes that end under it until it is lifted or their pitch is struck again,
      unless the tokenizer writes pedals. The pedal of a track without notes applies to all tracks of its program.
    - **Tracks** of one program become one, unless the tokenizer keeps them apart (MMM and BEAT).
    - Changes of tempo or meter after the last onset apply to no note and are removed.

    For every score, `base_ids(tokenizer, score)` is
    `tokenizer.encode(normalize_score(tokenizer, score), encode_ids=False).ids`, except that the rows of MuMIDI
    are padded.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            From [`~midimamba.tokenization.tokenizer.build_tokenizer`].
        score (`symusic.Score`):
            Times in ticks, as [`~midimamba.tokenization.ingest.read_score`] returns it. It is left as it is.

    Raises:
        MidiRefusedError: if too many tied notes would be needed.
    """
    changes: list[str] = []
    plan = _plan(tokenizer, score, changes)
    quarter = _ticks_per_quarter(tokenizer, plan)
    written = [Meter(meter.time * quarter // PER_QUARTER, *meter[1:]) for meter in plan]
    grid = make_grid(tokenizer, written, quarter)
    base = score.resample(quarter, min_dur=1)
    base.tracks = TrackTickList(_Instruments(tokenizer, score, grid).write(base.tracks, changes))
    last = _last_onset(base)
    base.time_signatures = TimeSignatureTickList([TimeSignature(*meter) for meter in written if meter.time <= last])
    base.tempos = _tempos(tokenizer, base, grid, last, changes)
    return Normalized(base, changes)


def _last_onset(score: ScoreTick) -> int:
    return max((int(track.notes.numpy()["time"].max()) for track in score.tracks if track.notes), default=0)


def _plan(tokenizer: MusicTokenizer, score: ScoreTick, changes: list[str]) -> list[Meter]:
    """The meters to write, with times in 1/32 of a quarter note."""
    found = meters(score)
    if not tokenizer.config.use_time_signatures:
        if any(meter[1:] != (4, 4) for meter in found):
            changes.append(f"meters are not written: {type(tokenizer).__name__} has bars of 4/4 only")
        return _FOUR_FOUR
    # Tied notes may start until the last note ends.
    plan = plan_bars(found, score.ticks_per_quarter, score.end(), tokenizer.time_signatures)
    changes.extend(plan.changes)
    return plan.meters


def _ticks_per_quarter(tokenizer: MusicTokenizer, plan: Sequence[Meter]) -> int:
    """The time division that MidiTok chooses."""
    if isinstance(tokenizer, PerTok):
        return int(tokenizer.tpq)
    finest = max(meter.denominator for meter in plan)
    return int(tokenizer.config.max_num_pos_per_beat * finest / 4)


def _tempos(tokenizer: MusicTokenizer, score: ScoreTick, grid: Grid, last: int, changes: list[str]) -> TempoTickList:
    """The tempos up to the last onset."""
    if not score.tempos:
        return score.tempos
    columns = score.tempos.numpy()
    columns["time"] = _tempo_times(tokenizer, score, grid, changes).astype(np.int32)
    kept = columns["time"] <= last
    columns = {name: column[kept] for name, column in columns.items()}
    given = 60_000_000 / columns["mspq"]
    if not tokenizer.config.use_tempos:
        if np.any(np.abs(given - tokenizer.default_tempo) > 0.01):
            changes.append(f"tempos are not written: {type(tokenizer).__name__} is read at {tokenizer.default_tempo}")
        return Tempo.from_numpy(**columns)
    lowest, highest = tokenizer.tempos.min(), tokenizer.tempos.max()
    for tempo in np.unique(given[(given < lowest * 0.97) | (given > highest * 1.03)]):
        changes.append(f"tempo {tempo:.4g} is written as {lowest if tempo < lowest else highest:.4g}")
    return Tempo.from_numpy(**columns)


def _tempo_times(tokenizer: MusicTokenizer, score: ScoreTick, grid: Grid, changes: list[str]) -> Ints:
    """The ticks of changes of tempo. Some tokenizations write them only with certain others."""
    exact = grid.round(score.tempos.numpy()["time"])
    if isinstance(tokenizer, BEAT):  # with the next bar line
        lines = bar_starts(score).astype(np.int64)
        exact, times = lines[np.minimum(np.searchsorted(lines, exact), len(lines) - 1)], exact
        moved = exact != times
    elif isinstance(tokenizer, PerTok):  # with the note before it, or a bar line
        moved = exact % (4 * grid.ticks_per_quarter) != 0
    elif isinstance(tokenizer, Octuple | MuMIDI):  # with a note
        onsets = [track.notes.numpy()["time"] for track in score.tracks]
        moved = ~np.isin(exact, np.concatenate([[0], *onsets]))
    else:
        return exact
    if tokenizer.config.use_tempos and moved.any():
        changes.append(f"{_count(int(moved.sum()), 'change')} of tempo written with the note or bar line beside it")
    return exact


class _Instruments:
    """The notes of every instrument on the grid of a tokenizer."""

    def __init__(self, tokenizer: MusicTokenizer, score: ScoreTick, grid: Grid) -> None:
        self.tokenizer = tokenizer
        self.score = score
        self.grid = grid
        self.scale = grid.ticks_per_quarter / score.ticks_per_quarter
        self.sustained = self.cut = self.removed = self.shortened = self.written = 0

    def write(self, resampled: Sequence[Track], changes: list[str]) -> list[Track]:
        """One track per instrument.

        Args:
            resampled (`Sequence[symusic.Track]`):
                The tracks of the score in the grid's time division, for everything but notes.
            changes (`list[str]`):
                Gets what differs from the music.
        """
        result: list[Track] = []
        pedals = {} if writes_pedals(self.tokenizer) else self._pedals_without_notes()
        for indices in self._groups():
            sources = [self.score.tracks[index] for index in indices]
            tracks = [resampled[index] for index in indices]
            result.append(self._merged(sources, tracks, pedals))
        changes.extend(self._changes())
        return result

    def _groups(self) -> list[list[int]]:
        """Which tracks become one."""
        groups: dict[int, list[int]] = {}
        apart = not (self.tokenizer._merge_same_program_tracks and self.tokenizer.config.one_token_stream_for_programs)
        for index, track in enumerate(self.score.tracks):
            groups.setdefault(index if apart else _program(track), []).append(index)
        return list(groups.values())

    def _pedals_without_notes(self) -> dict[int, list[Ints]]:
        found: dict[int, list[Ints]] = {}
        for track in self.score.tracks:
            if not track.notes and not track.is_drum:
                found.setdefault(track.program, []).append(_pedals(track, self.score.end()))
        return found

    def _merged(self, sources: list[Track], tracks: list[Track], pedals: dict[int, list[Ints]]) -> Track:
        merged = tracks[0]
        for track in tracks[1:]:
            merged.controls.extend(track.controls)
            merged.pitch_bends.extend(track.pitch_bends)
            merged.pedals.extend(track.pedals)
        if len(tracks) > 1:
            merged.sort()
        notes = self._notes(sources, pedals)
        self.written += len(notes.time)
        if self.written > MAX_NOTES:
            raise MidiRefusedError(f"its long notes become more than {MAX_NOTES:,} tied ones")
        merged.notes = _note_list(notes)
        return merged

    def _notes(self, sources: list[Track], pedals: dict[int, list[Ints]]) -> Notes:
        columns = [track.notes.numpy() for track in sources]
        time = np.concatenate([column["time"] for column in columns]) * self.scale
        end = time + np.concatenate([column["duration"] for column in columns]) * self.scale
        pitch = np.concatenate([column["pitch"] for column in columns]).astype(np.int64)
        velocity = np.concatenate([column["velocity"] for column in columns]).astype(np.int64)
        onset = self.grid.round(time)
        if not len(onset):
            return Notes(onset, end, pitch, velocity)
        if not writes_pedals(self.tokenizer) and not sources[0].is_drum:
            end = self._sustain(sources, pedals, Notes(onset, end, pitch, velocity))
        step = self.grid.steps[self.grid.section(onset)]
        end = np.maximum(onset + (end - time), onset + step)
        notes, cut, removed = without_overlaps(Notes(onset, end, pitch, velocity), float(step.max()))
        self.cut += cut
        self.removed += removed
        if _program(sources[0]) not in self.tokenizer.config.use_note_duration_programs:
            return notes
        if self.grid.pieces(notes) > len(notes.time) + MAX_NOTES:
            raise MidiRefusedError(f"its long notes become more than {MAX_NOTES:,} tied ones")
        notes, shortened = self.grid.write(notes, self._as_written(notes.velocity))
        self.shortened += shortened
        return notes

    def _as_written(self, velocity: Ints) -> Ints:
        """The index of the velocity that MidiTok writes."""
        if not self.tokenizer.config.use_velocities:
            return np.zeros_like(velocity)
        bins = self.tokenizer.velocities
        return np.abs(velocity[:, None] - bins[None]).argmin(axis=1)

    def _sustain(self, sources: list[Track], pedals: dict[int, list[Ints]], notes: Notes) -> Floats:
        """The ends of notes as the sustain pedal has them."""
        lifted: list[Floats] = []
        start = 0
        for track in sources:
            end = notes.end[start : start + len(track.notes)]
            start += len(track.notes)
            for intervals in (_pedals(track, self.score.end()), *pedals.get(track.program, [])):
                if len(intervals):
                    end = _lift(end, (intervals * self.scale).astype(np.float64))
            lifted.append(end)
        end = np.concatenate(lifted)
        if not np.any(end > notes.end):
            return notes.end
        order = np.lexsort((notes.time, notes.pitch))
        following = np.empty(len(end))
        following[order] = notes.at(order).following()
        end = np.where(following > notes.end, np.minimum(end, following), notes.end)
        self.sustained += int((end > notes.end).sum())
        return end

    def _changes(self) -> list[str]:
        """What differs from the music in plain English."""
        found = []
        if self.sustained:
            found.append(f"{_count(self.sustained)} lengthened until the sustain pedal is lifted")
        if self.cut:
            found.append(f"{_count(self.cut)} ended where the same instrument strikes the same pitch again")
        if self.removed:
            found.append(
                f"{_count(self.removed)} left out: the same instrument has another one of its pitch and onset"
            )
        if self.shortened:
            found.append(f"{_count(self.shortened)} shortened, so that the next one is not taken for its continuation")
        found.extend(self._left_out())
        kits = sorted(
            {track.program for track in self.score.tracks if track.is_drum and track.program and track.notes}
        )
        found.extend(f"drum kit {kit} is written as the standard kit" for kit in kits)
        return found

    def _left_out(self) -> list[str]:
        """Notes that the tokenizer has no tokens for."""
        config, pitches, programs = self.tokenizer.config, 0, 0
        if config.pitch_range == (0, 127) and config.drums_pitch_range == (0, 127) and len(config.programs) == 129:
            return []
        for track in self.score.tracks:
            drums = track.is_drum and config.use_pitchdrum_tokens
            low, high = config.drums_pitch_range if drums else config.pitch_range
            if _program(track) not in config.programs:
                programs += len(track.notes)
                continue
            pitch = track.notes.numpy()["pitch"]
            pitches += int(((pitch < low) | (pitch > high)).sum())
        found = [f"{_count(pitches)} left out: the tokenizer lacks such a pitch"] if pitches else []
        return found + ([f"{_count(programs)} left out: the tokenizer lacks such a program"] if programs else [])


def writes_pedals(tokenizer: MusicTokenizer) -> bool:
    """Whether the tokenizer has tokens for the sustain pedal."""
    config = tokenizer.config
    return config.use_sustain_pedals or (config.use_control_changes and SUSTAIN in config.control_change_numbers)


def _program(track: Track) -> int:
    return _DRUMS if track.is_drum else int(track.program)


def _count(number: int, name: str = "note") -> str:
    return f"{number:,} {name}s" if number > 1 else f"1 {name}"


def _pedals(track: Track, end: int) -> Ints:
    """Ticks at which the sustain pedal is pressed and lifted, shape (presses, 2); if it never is, tick `end`."""
    controls = track.controls.numpy()
    ours = controls["number"] == SUSTAIN
    if not ours.any():
        pedals = track.pedals.numpy()
        return np.stack([pedals["time"], pedals["time"] + pedals["duration"]], axis=1).astype(np.int64)
    times = controls["time"][ours].astype(np.int64)
    # symusic holds values above 63 as they are, or as negative ones.
    pressed = (controls["value"][ours].astype(np.int64) & 127) >= PRESSED
    before = np.append(False, pressed[:-1])
    presses, lifts = times[pressed & ~before], times[~pressed & before]
    if len(lifts) < len(presses):
        lifts = np.append(lifts, max(end, int(presses[-1])))
    return np.stack([presses, lifts], axis=1)


def _lift(end: Floats, intervals: Floats) -> Floats:
    """The ends of notes, those under a pedal moved to where it is lifted."""
    before = np.searchsorted(intervals[:, 0], end, side="left") - 1  # a pedal pressed at a note's end is too late
    lifted = intervals[np.maximum(before, 0), 1]
    return np.where(before >= 0, np.maximum(end, lifted), end)


def settle_notes(tokenizer: MusicTokenizer, score: ScoreTick) -> None:
    """Apply the rules of ties and overlaps to a score that MidiTok has decoded, in place, and put it in order.

    Then a file that is written of it reads back as it is.
    """
    quarter = score.ticks_per_quarter
    found = meters(score) if tokenizer.config.use_time_signatures else _FOUR_FOUR
    grid = make_grid(tokenizer, found, quarter)
    for track in score.tracks:
        columns = track.notes.numpy()
        time, duration, pitch, velocity = (
            columns[name].astype(np.int64) for name in ("time", "duration", "pitch", "velocity")
        )
        notes = Notes(time, (time + np.maximum(duration, 1)).astype(np.float64), pitch, velocity).ordered()
        if _program(track) in tokenizer.config.use_note_duration_programs:
            notes = grid.join(notes)
        notes, _, _ = without_overlaps(notes)
        track.notes = _note_list(notes)
    score.tracks = TrackTickList(sorted(score.tracks, key=lambda track: (track.is_drum, track.program)))
    score.sort()


def _note_list(notes: Notes) -> NoteTickList:
    written = Note.from_numpy(
        notes.time.astype(np.int32),
        np.maximum(notes.end - notes.time, 1).astype(np.int32),
        notes.pitch.astype(np.int8),
        notes.velocity.astype(np.int8),
    )
    return written.sort()
