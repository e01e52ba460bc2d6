"""Write a page of notation in ABC (https://abcnotation.com/wiki/abc:standard:v2.1).

symusic can write ABC as well, by midi2abc, which loses changes of meter and minor keys, and rounds lengths.
"""

from collections.abc import Iterator
from fractions import Fraction
from itertools import groupby

from midimamba.notation import GRID, VALUES, Bar, Key, Page, Staff, Symbol
from midimamba.spelling import signature, spell, tonic
from midimamba.text import printable

_MAX_VOICES = 15  # and drums
_ACCIDENTALS = {-1: "_", 0: "=", 1: "^"}


def write_abc(page: Page, title: str) -> tuple[str, list[str]]:
    """
    A page as a tune in ABC notation.

    Args:
        page ([`~midimamba.notation.Page`]): what is written.
        title (`str`): of the tune.

    Returns:
        `tuple[str, list[str]]`: the text, and in plain English what ABC cannot say.
    """
    first = page.bars[0]
    key = first.key or Key(0, False)
    tempo = first.tempos[0][1] if first.tempos and first.tempos[0][0] == 0 else 120
    meter = first.meter or (4, 4)
    lines = [
        "X:1",
        f"T:{printable(title)}",
        f"M:{meter[0]}/{meter[1]}",
        "L:1/4",
        f"Q:1/4={tempo:.0f}",
        f"K:{_name(key)}",
    ]
    number = 0
    for staff in page.staves:
        for voice in staff.voices:
            number += 1
            lines += [f'V:{number} name="{_quoted(staff.name)}"' if staff.name else f"V:{number}"]
            lines += ["%%MIDI channel 10"] if staff.is_drum else []
            lines += [f"%%MIDI program {staff.program}"]
            lines += _music(staff, voice, page.bars, number == 1)
    return "\n".join(lines) + "\n", _lost(page, number)


def _lost(page: Page, voices: int) -> list[str]:
    lost = ["ABC has no velocities: they are left out"]
    if voices > len(page.staves):
        lost.append(f"{len(page.staves):,} tracks are written as {voices:,} voices, since notes overlap in them")
    if voices > _MAX_VOICES:
        lost.append(f"abc2midi plays {_MAX_VOICES} voices, and leaves out the other {voices - _MAX_VOICES}")
    tempos = [tempo for bar in page.bars for tempo in bar.tempos]
    if any(not tempo.is_integer() for _, tempo in tempos):
        lost.append("tempos are rounded to whole quarter notes a minute")
    return lost


def _music(staff: Staff, voice: list[list[Symbol]], bars: list[Bar], is_first: bool) -> Iterator[str]:
    """A line for every bar."""
    key = bars[0].key or Key(0, False)
    for index, (bar, symbols) in enumerate(zip(bars, voice, strict=True)):
        text = ""
        if index and (bar.meter or bar.key):
            text = f"[I:MIDI program {staff.program}]"  # or abc2midi moves the change before the rests before it
            text += f"[M:{bar.meter[0]}/{bar.meter[1]}]" if bar.meter else ""
            key = bar.key or key
            text += f"[K:{_name(key)}]" if bar.key else ""
        # The tempo at the start is in the head.
        tempos = [tempo for tempo in bar.tempos if index or tempo[0]] if is_first else []
        yield text + " ".join(_symbols(symbols, key, tempos)) + " |"


def _symbols(symbols: list[Symbol], key: Key, tempos: list[tuple[int, float]]) -> Iterator[str]:
    altered: set[str] = set()
    waiting, place = list(tempos), 0
    for is_triplet, run in groupby(symbols, key=lambda symbol: VALUES[symbol.units][2]):
        group = list(run)
        opening = f"(3:2:{len(group)}" if is_triplet else ""
        for symbol in group:
            before = ""
            while waiting and waiting[0][0] <= place:
                before += f"[Q:1/4={waiting.pop(0)[1]:.0f}]"
            yield before + opening + _symbol(symbol, key, altered)
            opening = ""
            place += symbol.units
    yield from (f"[Q:1/4={tempo:.0f}]" for _, tempo in waiting)


def _symbol(symbol: Symbol, key: Key, altered: set[str]) -> str:
    length = Fraction(symbol.units * (3 if VALUES[symbol.units][2] else 2), 2 * GRID)
    value = "" if length == 1 else str(length)
    if not symbol.pitches:
        return f"z{value}"
    tie = "-" if symbol.tied_to else ""
    notes = [_pitch(pitch, key, altered) for pitch in symbol.pitches]
    return f"[{''.join(notes)}]{value}{tie}" if len(notes) > 1 else f"{notes[0]}{value}{tie}"


def _pitch(pitch: int, key: Key, altered: set[str]) -> str:
    """A note. Programs disagree how far an accidental reaches, so once it is altered, a letter always has one."""
    letter, alter, octave = spell(pitch, key)
    accidental = ""
    if alter != signature(key)[letter] or letter in altered:
        accidental = _ACCIDENTALS[alter]
        altered.add(letter)
    if octave >= 5:
        return accidental + letter.lower() + "'" * (octave - 5)
    return accidental + letter + "," * (4 - octave)


def _name(key: Key) -> str:
    return tonic(key) + ("m" if key.is_minor else "")


def _quoted(name: str) -> str:
    return printable(name).replace('"', "'")
