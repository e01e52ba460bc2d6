"""Bach's chorales from music21: the four voices of each, as one instrument in one track."""

import io
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

VOICES = ("Soprano", "Alto", "Tenor", "Bass")
# Not chorales for four voices: a prelude for keyboard, and two settings for five voices.
OTHERS = frozenset({"bwv846", "bwv227.3", "bwv27.6"})
# General MIDI's church organ, counted from 0: all four voices are in its range, and it holds long notes. In the sound
# font TimGM6mb it is at 84 % of its peak after two seconds (strings and choir: 68 %, piano: 7 %), and speaks sooner.
PROGRAM = 19
TEMPO = 90.0  # quarter notes a minute
VELOCITY = 80
_QUARTER = 480  # ticks
_WHOLE_NOTE = 4 * _QUARTER
# Places in a quarter note, as the tokenizer has. It would round the time and the length of a thirty-second note
# separately, and let it overlap the next note.
_GRID = 12

Meter = tuple[int, int]
Notes = NDArray[np.int64]


class Bar(NamedTuple):
    """
    A bar, by its bar line.

    Args:
        start (`int`): in ticks from the start of the music, negative if the music starts with an upbeat.
        length (`int`): in ticks.
        meter (`tuple[int, int]`): numerator and denominator.
    """

    start: int
    length: int
    meter: Meter


def read_chorale(path: Path) -> bytes:
    """
    A chorale of music21 as a MIDI file.

    The instruments of music21's files name the voices, or what plays along in the cantata, and differ from file to
    file. Here all four voices are one church organ in one track, at one tempo and one velocity. Parts other than
    soprano, alto, tenor and bass are left out: they double the voices, are a figured bass, or play interludes. So are
    whole bars in which no voice sings. Repeats are written out, tied notes are one note, and where voices meet on one
    pitch, it is one note until a voice strikes it again. An upbeat stands at the end of a bar that begins with a rest.

    Args:
        path (`Path`): a MusicXML file whose parts are named after their voices.

    Raises:
        ValueError: if one of the voices is missing.
    """
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from music21 import converter

        score: Any = converter.parse(path)  # typed as if it could be one of many kinds
        parts = score.parts
        voices = [_with_meters(_voice(parts, name)).expandRepeats() for name in VOICES]
        bars = list(bars_of(_measures(voices[0])))
        notes = [note for voice in voices for note in _notes(voice)]
    return score_of(np.array(notes, dtype=np.int64).reshape(-1, 3), bars).dumps_midi()


def bars_of(measures: list[tuple[int, int, Meter]]) -> Iterator[Bar]:
    """
    The bars of written measures. Incomplete ones that follow each other are one bar: the end of a repeated section,
    and the upbeat that begins it.

    Args:
        measures (`list[tuple[int, int, tuple[int, int]]]`): start and length in ticks, and meter, of each.

    Returns:
        Iterator of `Bar`: without gaps. The first one may begin before the first measure. One that no other completes,
        or that is too long for the meter, has a meter of its own.
    """
    first, length, meter = measures[0]
    start = first + min(0, length - _whole(meter))  # an upbeat is the end of its bar
    for number, (begin, length, meter) in enumerate(measures):
        end, whole = begin + length, _whole(meter)
        following = measures[number + 1] if number + 1 < len(measures) else None
        if following and end - start < whole and following[1] < whole and following[2] == meter:
            continue
        while end - start >= whole:
            yield Bar(start, whole, meter)
            start += whole
        if end > start and following is None:
            yield Bar(start, whole, meter)  # the last one, which the music doesn't fill
        elif end > start:
            rest = end - start
            yield Bar(
                start, rest, (4 * rest // _WHOLE_NOTE, 4) if rest % _QUARTER == 0 else (16 * rest // _WHOLE_NOTE, 16)
            )
        start = end


def score_of(notes: Notes, bars: list[Bar]) -> ScoreTick:
    """
    Notes in one track, without the bars in which nothing sounds.

    Args:
        notes (`array` of shape `(notes, 3)`): onset and end in ticks, and pitch, in any order.
        bars (`list[Bar]`): without gaps.
    """
    starts = np.array([bar.start for bar in bars])
    ends = starts + [bar.length for bar in bars]
    notes = _united(notes)
    kept = np.array(
        [np.any((notes[:, 0] < end) & (notes[:, 1] > start)) for start, end in zip(starts, ends, strict=True)]
    )
    shift = starts - np.concatenate([[0], np.cumsum(np.where(kept, ends - starts, 0))[:-1]])
    score, track = Score(_QUARTER), Track(program=PROGRAM)
    score.tempos.append(Tempo(0, TEMPO))
    for index in np.flatnonzero(kept):
        meter = bars[index].meter
        if not score.time_signatures or meter != _meter(score.time_signatures[-1]):
            score.time_signatures.append(TimeSignature(int(starts[index] - shift[index]), *meter))
    for onset, end, pitch in notes.tolist():
        moved = onset - int(shift[np.searchsorted(starts, onset, side="right") - 1])
        track.notes.append(Note(moved, end - onset, pitch, VELOCITY))
    score.tracks.append(track)
    return score


def _voice(parts: Any, name: str) -> Any:
    """The part of a voice. Its name may go on with the instruments that double it."""
    for part in parts:
        if (part.partName or "").startswith(name):
            return part
    raise ValueError(f"there is no part {name}")


def _with_meters(voice: Any) -> Any:
    """The same part, in which each measure has its time signature, so that repeats keep theirs."""
    measures = list(voice.getElementsByClass("Measure"))
    for before, measure in pairwise(measures):
        if measure.timeSignature is None:
            measure.timeSignature = deepcopy(before.timeSignature)
    return voice


def _measures(voice: Any) -> list[tuple[int, int, Meter]]:
    return [
        (_ticks(measure.offset), _ticks(measure.duration.quarterLength), _meter(measure.timeSignature))
        for measure in voice.getElementsByClass("Measure")
    ]


def _whole(meter: Meter) -> int:
    """A bar of this meter in ticks."""
    return _WHOLE_NOTE * meter[0] // meter[1]


def _meter(signature: Any) -> Meter:
    return signature.numerator, signature.denominator


def _notes(voice: Any) -> Iterator[tuple[int, int, int]]:
    for note in voice.stripTies().flatten().notes:
        times = (note.offset, note.offset + note.quarterLength)
        onset, end = (round(float(time) * _GRID) * _QUARTER // _GRID for time in times)
        if end > onset:  # grace notes take no time
            yield onset, end, note.pitch.midi


def _ticks(quarters: Any) -> int:
    return round(float(quarters) * _QUARTER)


def _united(notes: Notes) -> Notes:
    """Notes that don't overlap on one pitch: each lasts until the next one of its pitch, or as long as any voice holds
    the pitch."""
    beyond = notes[:, 1].max() + 1
    onsets, pitches = np.unique(notes[:, [0, 2]], axis=0).T
    order = np.lexsort((notes[:, 0], notes[:, 2]))
    # On one time line for all pitches, one pitch after another.
    lines, held = (notes[order, 2] * beyond + notes[order, column] for column in (0, 1))
    held = np.maximum.accumulate(held)
    united = np.sort(pitches * beyond + onsets)
    last = np.searchsorted(lines, united, side="right") - 1
    ends = np.minimum(held[last], np.append(united[1:], held[-1:]))
    united = np.stack([united % beyond, ends - united + united % beyond, united // beyond], axis=1)
    return united[np.lexsort((united[:, 2], united[:, 0]))]
