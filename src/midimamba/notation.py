"""A score as it is written down: staves, bars, voices, and symbols with note values.

MIDI has notes that begin and end anywhere. Notation has values: here quarter notes are divided by 24, so that 32nd
notes and their triplets can be written. Notes that sound together and end together are a chord. Others of one track
that overlap are in different voices. What goes over a bar line, or has no single value, is tied.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from symusic.core import ScoreTick

from midimamba.tokenization.musical_time import bar_starts, meters

GRID = 24  # units in a quarter note
# Note values by their units: the name in MusicXML, dots, and whether it is one of a triplet.
VALUES: dict[int, tuple[str, int, bool]] = {
    96: ("whole", 0, False),
    72: ("half", 1, False),
    48: ("half", 0, False),
    36: ("quarter", 1, False),
    24: ("quarter", 0, False),
    18: ("eighth", 1, False),
    12: ("eighth", 0, False),
    9: ("16th", 1, False),
    6: ("16th", 0, False),
    3: ("32nd", 0, False),
    64: ("whole", 0, True),
    32: ("half", 0, True),
    16: ("quarter", 0, True),
    8: ("eighth", 0, True),
    4: ("16th", 0, True),
    2: ("32nd", 0, True),
    1: ("64th", 0, True),
}


class Key(NamedTuple):
    """A key: sharps, or flats as a negative number, and whether it is minor."""

    fifths: int
    is_minor: bool


class Symbol(NamedTuple):
    """
    A chord or a rest with one note value.

    Args:
        pitches (`tuple[int, ...]`): from low to high; none for a rest.
        units (`int`): its length, one of `VALUES`.
        velocities (`tuple[int, ...]`): of the pitches.
        tied_from, tied_to (`bool`): whether it goes on from the symbol before it, and into the one after it.
    """

    pitches: tuple[int, ...]
    units: int
    velocities: tuple[int, ...] = ()
    tied_from: bool = False
    tied_to: bool = False


@dataclass(frozen=True)
class Bar:
    """
    What all staves share in a bar.

    Args:
        start, units (`int`): in units of the grid.
        meter (`tuple[int, int]`, *optional*): numerator and denominator, if it is another than before.
        key (`Key`, *optional*): if it is another than before.
        tempos (`list[tuple[int, float]]`): units from the start of the bar, and quarter notes a minute.
    """

    start: int
    units: int
    meter: tuple[int, int] | None = None
    key: Key | None = None
    tempos: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Staff:
    """
    A track.

    Args:
        name (`str`): of the track.
        program (`int`): of General MIDI, counted from 0.
        is_drum (`bool`): whether its pitches are percussion instruments.
        voices (`list[list[list[Symbol]]]`): of each voice its bars, and of each bar its symbols, which fill it.
    """

    name: str
    program: int
    is_drum: bool
    voices: list[list[list[Symbol]]]


@dataclass(frozen=True)
class Page:
    """
    A score as it is written down.

    Args:
        bars (`list[Bar]`): without gaps.
        staves (`list[Staff]`): of every track with notes.
        changes (`list[str]`): in plain English what could not be written as it is.
    """

    bars: list[Bar]
    staves: list[Staff]
    changes: list[str]


class _Chord(NamedTuple):
    start: int
    end: int
    pitches: tuple[int, ...]
    velocities: tuple[int, ...]


def write_down(score: ScoreTick) -> Page:
    """Put a score into notation.

    Args:
        score (`symusic.Score`): times in ticks. It has at least one note.
    """
    scale = GRID / score.ticks_per_quarter
    bars = _bars(score, scale)
    moved = [
        note
        for track in score.tracks
        for note in track.notes
        if not ((note.time * scale).is_integer() and (note.duration * scale).is_integer())
    ]
    staves, written = [], 0
    for track in score.tracks:
        if len(track.notes):
            chords = _chords(track.notes, scale, bars[-1].start + bars[-1].units)
            written += sum(len(chord.pitches) for chord in chords)
            lines = _lines(chords)
            voices = [list(_in_bars(line, bars)) for line in lines]
            staves.append(Staff(track.name.strip(), track.program, track.is_drum, voices))
    changes = [f"{len(moved):,} notes were moved to the nearest 24th of a quarter note"] * bool(moved)
    if left_out := score.note_num() - written:
        changes.append(f"{left_out:,} notes are left out that another of their track and pitch covers exactly")
    if any(len(track.controls) or len(track.pitch_bends) or len(track.pedals) for track in score.tracks):
        changes.append("pedals, controllers and pitch bends are left out")
    if len(score.markers) or any(len(track.lyrics) for track in score.tracks):
        changes.append("lyrics and markers are left out")
    return Page(bars, staves, changes)


def _bars(score: ScoreTick, scale: float) -> list[Bar]:
    lines = [round(float(tick) * scale) for tick in bar_starts(score)]
    lines = [line for index, line in enumerate(lines) if index == 0 or line > lines[index - 1]]
    changes = {round(meter.time * scale): (meter.numerator, meter.denominator) for meter in meters(score)}
    keys: dict[int, Key] = {0: Key(0, False)}
    for event in sorted(score.key_signatures, key=lambda event: event.time):
        keys[max(bisect_right(lines[:-1], round(event.time * scale)) - 1, 0)] = Key(event.key, event.tonality == 1)
    tempos: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for tempo in sorted(score.tempos, key=lambda tempo: tempo.time):
        place = round(tempo.time * scale)
        if place < lines[-1]:
            bar = bisect_right(lines, place) - 1
            tempos[bar].append((place - lines[bar], round(float(tempo.qpm), 2)))
    bars: list[Bar] = []
    meter, key = None, None
    for index, (start, end) in enumerate(pairwise(lines)):
        new_meter, new_key = changes.get(start, meter), keys.get(index, key)
        bars.append(
            Bar(
                start,
                end - start,
                new_meter if new_meter != meter else None,
                new_key if new_key != key else None,
                tempos[index],
            )
        )
        meter, key = new_meter, new_key
    return bars


def _chords(notes: Iterable[Any], scale: float, end: int) -> list[_Chord]:
    """Notes of a track by onset and length. The same pitch twice in one chord is one note."""
    together: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for note in notes:
        start = min(round(note.time * scale), end - 1)
        stop = min(max(round((note.time + note.duration) * scale), start + 1), end)
        chord = together[start, stop]
        chord[note.pitch] = max(chord.get(note.pitch, 0), note.velocity)
    chords = []
    for (start, stop), chord in together.items():
        pitches = tuple(sorted(chord))
        chords.append(_Chord(start, stop, pitches, tuple(chord[pitch] for pitch in pitches)))
    return sorted(chords)


def _lines(chords: list[_Chord]) -> list[list[_Chord]]:
    """Chords in voices: each goes to the first voice that is free, the longest one first."""
    lines: list[list[_Chord]] = []
    for chord in sorted(chords, key=lambda chord: (chord.start, -chord.end, chord.pitches)):
        line = next((line for line in lines if line[-1].end <= chord.start), None)
        if line is None:
            lines.append([chord])
        else:
            line.append(chord)
    return lines


def _in_bars(line: list[_Chord], bars: list[Bar]) -> Iterator[list[Symbol]]:
    """The symbols of a voice, bar by bar."""
    waiting = list(reversed(line))
    for bar in bars:
        now, end, symbols = bar.start, bar.start + bar.units, list[Symbol]()
        while now < end:
            chord = waiting[-1] if waiting else None
            if chord is None or chord.start > now:
                stop = end if chord is None else min(chord.start, end)
                symbols += [Symbol((), units) for units in note_values(now - bar.start, stop - now)]
            else:
                stop = min(chord.end, end)
                values = list(note_values(now - bar.start, stop - now))
                for index, units in enumerate(values):
                    is_first = index == 0 and now == chord.start
                    is_last = index == len(values) - 1 and stop == chord.end
                    symbols.append(Symbol(chord.pitches, units, chord.velocities, not is_first, not is_last))
                if stop == chord.end:
                    waiting.pop()
            now = stop
        yield symbols


def note_values(place: int, units: int) -> Iterator[int]:
    """A length as note values. What begins between two beats goes to the next beat first.

    Args:
        place (`int`): where in the bar it begins, in units.
        units (`int`): how long it is.
    """
    while units:
        rest = GRID - place % GRID
        if units not in VALUES and rest < min(GRID, units):
            yield from _largest(rest)
            place, units = place + rest, units - rest
        else:
            yield from _largest(units)
            return


def _largest(units: int) -> Iterator[int]:
    """As few values as possible: the largest of those that divide like the length, in triplets or not, first."""
    while units:
        kinds = [size for size, (_, _, triplet) in VALUES.items() if size <= units and triplet == (units % 3 != 0)]
        value = max(kinds, default=1)
        yield value
        units -= value
