"""A gap in a score: which notes are taken out, and how new ones are put in. Everything else stays as it is."""

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

from miditok import MusicTokenizer
from symusic import Note, Track
from symusic.core import NoteTickList, ScoreTick

from .continuation import in_fine_division, instrument_of, leave_out_struck_again
from .errors import InputError
from .musical_time import bar_starts
from .normalization import settle_notes
from .voices import limit_voices

_DRUMS = -1


class Gap(NamedTuple):
    """
    Some bars of some tracks of a score.

    Args:
        start, end (`int`): ticks. A note belongs to the gap if it begins at or after `start` and before `end`.
        tracks (`list[int]`): indices into the tracks of the score.
        only (`bool`): whether other tracks stay as they are.
    """

    start: int
    end: int
    tracks: list[int]
    only: bool

    def holds(self, time: int) -> bool:
        """Whether a tick is in these bars."""
        return self.start <= time < self.end

    def programs(self, score: ScoreTick) -> list[int]:
        """The programs of the tracks, -1 for drums."""
        tracks = [score.tracks[index] for index in self.tracks]
        return sorted({_DRUMS if track.is_drum else track.program for track in tracks})


def find_gap(score: ScoreTick, bars: Sequence[int], tracks: Sequence[int] | None) -> Gap:
    """Some bars of a score.

    Args:
        score (`symusic.Score`):
            Times in ticks.
        bars (`Sequence[int]`):
            The first bar and the last, counted from 1.
        tracks (`Sequence[int]`, *optional*):
            Indices into `score.tracks`. By default all tracks.

    Raises:
        InputError: if the score does not have these bars or tracks.
    """
    if len(bars) != 2 or not all(isinstance(bar, Integral) for bar in bars) or bars[0] > bars[1]:
        raise InputError(f"bars is {tuple(bars)}: give the first bar and the last, such as (5, 8)")
    lines = bar_starts(score)
    count = int((lines < score.end()).sum())
    if bars[0] < 1 or bars[1] > count:
        raise InputError(f"bars {bars[0]} to {bars[1]} are not all there: the piece has bars 1 to {count}")
    chosen = list(range(len(score.tracks))) if tracks is None else sorted(set(tracks))
    if not chosen:
        raise InputError("tracks is empty: name at least one track, or leave it out for all")
    if wrong := [index for index in chosen if not 0 <= index < len(score.tracks)]:
        raise InputError(f"there is no track {wrong[0]}: the piece has tracks 0 to {len(score.tracks) - 1}")
    return Gap(round(lines[bars[0] - 1]), round(lines[bars[1]]), chosen, tracks is not None)


def with_gap(score: ScoreTick, gap: Gap) -> ScoreTick:
    """A copy of a score without the notes of a gap."""
    score = score.copy()
    for index in gap.tracks:
        track = score.tracks[index]
        track.notes = NoteTickList([note for note in track.notes if not gap.holds(note.time)])
    return score


def fill_gap(
    tokenizer: MusicTokenizer, score: ScoreTick, gap: Gap, new: ScoreTick, voices: int | None = None
) -> ScoreTick:
    """A copy of a score with new notes instead of those of a gap.

    Everything else stays as it is: all other notes, names, controllers, pedals, tempos, meters, lyrics and, unless the
    time division is too coarse for the new notes, all ticks. New notes stay within the gap: they end where it ends.
    Those of an instrument go to that track of the gap with this instrument which had most notes there. While another
    note of the score sounds, new notes of its pitch and instrument are left out: they would end it.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            That of the new notes.
        score (`symusic.Score`):
            Times in ticks. It is left as it is.
        gap (`Gap`):
            Of this score.
        new (`symusic.Score`):
            What MidiTok decodes. Its tick 0 is the beginning of the gap.
        voices (`int`, *optional*):
            At most this many pitched notes sound at once where a new one begins; see
            [`~midimamba.tokenization.voices.limit_voices`]. By default any number.
    """
    new = new.copy()
    settle_notes(tokenizer, new)
    result = in_fine_division(with_gap(score, gap), new.ticks_per_quarter)
    scale = result.ticks_per_quarter // score.ticks_per_quarter
    start, end = gap.start * scale, gap.end * scale
    new = new.resample(result.ticks_per_quarter, min_dur=1).shift_time(start)
    for track in new.tracks:
        track.notes = NoteTickList([_until(note, end) for note in track.notes if note.time < end])
    leave_out_struck_again(result, new)
    limit_voices(new, voices, result)
    _put_in(score, gap, result, new)
    return result


def _until(note: Note, end: int) -> Note:
    return Note(note.time, min(note.duration, end - note.time), note.pitch, note.velocity)


def _put_in(score: ScoreTick, gap: Gap, result: ScoreTick, new: ScoreTick) -> None:
    """Put the notes of `new` into the tracks of `result`, from which those of the gap in `score` were taken."""
    removed = {index: len(score.tracks[index].notes) - len(result.tracks[index].notes) for index in gap.tracks}
    for track in new.tracks:
        homes = [index for index in gap.tracks if instrument_of(score.tracks[index]) == instrument_of(track)]
        if not track.notes:
            continue
        if homes:
            home = result.tracks[max(homes, key=lambda index: (removed[index], -index))]
            # Not `sort`, which would also order the notes that stay.
            home.notes = NoteTickList(sorted([*home.notes, *track.notes], key=lambda note: note.time))
        elif not gap.only:
            result.tracks.append(Track(track.name, track.program, track.is_drum, notes=track.notes))
