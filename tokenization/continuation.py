"""A prompt's own music with what a model adds to it.

Ids hold a prompt only to a tokenizer's resolution, without its names, controllers and lyrics. So a continuation is not
decoded as a whole: the prompt stays as it is, and only what the ids say after it is added.
"""

import warnings
from collections import Counter, defaultdict
from math import lcm

from miditok import MusicTokenizer
from symusic import ControlChange, Note, Score, TimeSignature, Track
from symusic.core import NoteTickList, ScoreTick, TempoTickList, TimeSignatureTickList

from .musical_time import bar_starts, meters
from .normalization import PRESSED, SUSTAIN, settle_notes
from .voices import limit_voices

# The largest time division that MIDI can write.
_MAX_DIVISION = 2**15 - 1
# With this many ticks to the finest position of the tokenizer, new notes are at most a quarter of one off.
_FINE_ENOUGH = 2

_MELODIC_CHANNELS = 15  # symusic gives them to the tracks in turn

Instrument = tuple[bool, int]


def add_continuation(
    tokenizer: MusicTokenizer,
    prompt: ScoreTick,
    encoded: ScoreTick,
    continued: ScoreTick,
    voices: int | None = None,
) -> ScoreTick:
    """Add to a prompt what was sampled after it.

    Nothing of the prompt changes, ticks included, except that its tracks go on, that a sustain pedal it leaves pressed
    is lifted where it ends, that a time division too coarse for new notes is multiplied, and that changes of meter and
    tempo after its last bar with an onset, of which no id tells a model, do not bend what follows. New notes of an
    instrument go to the prompt's first track of its program; a new instrument gets a track of its own. While a note of
    the prompt sounds, new notes of its pitch and program are left out: they would end it. New notes end early where
    more than `voices` would sound; see [`~midimamba.tokenization.voices.limit_voices`].

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            That of the ids.
        prompt (`symusic.Score`):
            Times in ticks. It is left as it is.
        encoded (`symusic.Score`):
            What MidiTok decodes of the prompt's ids.
        continued (`symusic.Score`):
            What MidiTok decodes of these ids and those after them.
        voices (`int`, *optional*):
            At most this many pitched notes sound at once where a new one begins. By default any number.
    """
    new = _difference(continued, encoded)
    settle_notes(tokenizer, new)
    score = in_fine_division(prompt, continued.ticks_per_quarter)
    division = score.ticks_per_quarter
    end = score.end()
    _lift_pedals(score, end)
    if new.tracks:
        end_with_last_bar(score)
    new = new.resample(division, min_dur=1)
    leave_out_struck_again(score, new)
    limit_voices(new, voices, score)
    _add_notes(score, new)
    encoded, continued = encoded.resample(division), continued.resample(division)
    _add_tempos(score, encoded, continued)
    if tokenizer.config.use_time_signatures:
        _add_meters(score, encoded, continued)
    return score


def in_fine_division(score: ScoreTick, needed: int) -> ScoreTick:
    """A copy of a score to which notes of another time division can be added.

    The times stay as they are if a quarter note has at least twice as many ticks as `needed`. Otherwise they are
    multiplied by a whole number, so that both fit, as far as MIDI can write such a division.
    """
    division = score.ticks_per_quarter
    if division < _FINE_ENOUGH * needed and (common := lcm(division, needed)) <= _MAX_DIVISION:
        division = common
    return score.resample(division)


def instrument_of(track: Track) -> Instrument:
    """Which tracks are of one instrument."""
    return track.is_drum, 0 if track.is_drum else track.program


def _difference(continued: ScoreTick, encoded: ScoreTick) -> ScoreTick:
    """The notes that only `continued` has, with its meters."""
    known = Counter((instrument_of(track), *_identity(note)) for track in encoded.tracks for note in track.notes)
    new = Score(continued.ticks_per_quarter)
    new.time_signatures = continued.time_signatures
    for track in continued.tracks:
        notes = []
        for note in track.notes:
            identity = (instrument_of(track), *_identity(note))
            known[identity] -= 1
            if known[identity] < 0:
                notes.append(note)
        if notes:
            new.tracks.append(Track(track.name, track.program, track.is_drum, notes=notes))
    return new


def _identity(note: Note) -> tuple[int, int, int]:
    """Without the end: BEAT may let a note of the prompt go on."""
    return note.time, note.pitch, note.velocity


def end_with_last_bar(score: ScoreTick) -> None:
    """Leave out, in place, the changes of meter and tempo after the last bar in which a note begins."""
    onsets = [int(track.notes.numpy()["time"].max()) for track in score.tracks if track.notes]
    last = max(onsets, default=0)
    known = [meter for meter in meters(score) if meter.time <= last]
    length = known[-1].bar_length(score.ticks_per_quarter)
    line = last + length - (last - known[-1].time) % length
    score.time_signatures = TimeSignatureTickList([each for each in score.time_signatures if each.time <= last])
    score.tempos = TempoTickList([each for each in score.tempos if each.time < line])


def _lift_pedals(score: ScoreTick, end: int) -> None:
    """A pedal that the prompt leaves pressed would hold every note after it."""
    for track in score.tracks:
        pedal = [control for control in track.controls if control.number == SUSTAIN]
        if pedal and max(pedal, key=lambda control: control.time).value >= PRESSED:
            track.controls.append(ControlChange(max(end, pedal[-1].time), SUSTAIN, 0))


def leave_out_struck_again(score: ScoreTick, new: ScoreTick) -> None:
    """Leave out new notes that begin while their pitch and program sound in the prompt."""
    sounding: dict[tuple[Instrument, int], list[tuple[int, int]]] = defaultdict(list)
    for track in score.tracks:
        for note in track.notes:
            sounding[instrument_of(track), note.pitch].append((note.time, note.end))
    for track in new.tracks:
        track.notes = NoteTickList(
            [note for note in track.notes if _fits(note, sounding[instrument_of(track), note.pitch])]
        )


def _add_notes(score: ScoreTick, new: ScoreTick) -> None:
    homes: dict[Instrument, int] = {}
    for index, track in enumerate(score.tracks):
        if track.notes:
            homes.setdefault(instrument_of(track), index)
    for track in new.tracks:
        if not track.notes:
            continue
        if instrument_of(track) in homes:
            home = score.tracks[homes[instrument_of(track)]]
            home.notes.extend(track.notes)
            home.notes.sort()
        else:
            homes[instrument_of(track)] = len(score.tracks)
            score.tracks.append(track)


def _fits(note: Note, sounding: list[tuple[int, int]]) -> bool:
    """Whether a note starts where its pitch is silent. It ends where a note of the prompt starts at the latest."""
    for start, end in sounding:
        if start <= note.time < end:
            return False
        if note.time < start < note.end:
            note.duration = start - note.time
    return True


def _add_tempos(score: ScoreTick, encoded: ScoreTick, continued: ScoreTick) -> None:
    """The changes of tempo that only `continued` has."""
    known = {(tempo.time, tempo.mspq) for tempo in encoded.tempos}
    last = encoded.tempos[-1].mspq if encoded.tempos else None
    for tempo in continued.tempos:
        if (tempo.time, tempo.mspq) not in known and tempo.mspq != last:
            score.tempos.append(tempo)
            last = tempo.mspq
    score.tempos.sort()


def _add_meters(score: ScoreTick, encoded: ScoreTick, continued: ScoreTick) -> None:
    """The changes of meter that only `continued` has, and its meter where it is not the prompt's own."""
    known = {(meter.time, meter.numerator, meter.denominator) for meter in encoded.time_signatures}
    found = [
        meter for meter in continued.time_signatures if (meter.time, meter.numerator, meter.denominator) not in known
    ]
    onsets = [int(track.notes.numpy()["time"].max()) for track in encoded.tracks if track.notes]
    last = max(onsets, default=0)
    line = next((int(line) for line in bar_starts(continued) if line > last), None)
    if line is not None and line < continued.end():
        ours = [meter for meter in meters(score) if meter.time <= line][-1]
        theirs = [meter for meter in meters(continued) if meter.time <= line][-1]
        length = theirs.bar_length(1)
        if theirs.time <= last and (length != ours.bar_length(1) or (line - ours.time) % ours.bar_length(score.tpq)):
            found.insert(0, TimeSignature(line, *theirs[1:]))
    score.time_signatures.extend(TimeSignatureTickList(found))
    score.time_signatures.sort()


def warn_of_shared_channels(score: ScoreTick) -> None:
    """Warn if a file of this score would play tracks with each other's sounds: MIDI has channels for 15."""
    channels: dict[int, int] = {}
    for index, track in enumerate(score.tracks):
        program = channels.setdefault(index % _MELODIC_CHANNELS, track.program) if not track.is_drum else track.program
        if program != track.program:
            warnings.warn(
                f"a piece has more tracks than a MIDI file has channels ({_MELODIC_CHANNELS} and one for drums): "
                "some would sound like others; remove or merge tracks before writing it",
                stacklevel=3,
            )
            return
