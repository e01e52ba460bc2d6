"""Names of pitches and keys as musicians write them."""

from typing import NamedTuple

from midimamba.notation import Key

LETTERS = "FCGDAEB"  # in the order in which keys sharpen them
_KEYS = ("Cb", "Gb", "Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "C#", "G#", "D#", "A#")


class Spelled(NamedTuple):
    """A letter, its accidental (1 sharp, 0 natural, -1 flat), and its octave, of which middle C begins the fourth."""

    letter: str
    alter: int
    octave: int


def spell(pitch: int, key: Key) -> Spelled:
    """The usual name of a MIDI pitch in a key: one of twelve neighbours on the line of fifths."""
    first = min(max(key.fifths - 3, -8), 1)
    place = next(place for place in range(first, first + 12) if place * 7 % 12 == pitch % 12)
    alter = (place + 1) // 7
    return Spelled(LETTERS[(place + 1) % 7], alter, (pitch - alter) // 12 - 1)


def signature(key: Key) -> dict[str, int]:
    """The accidental of every letter in a key."""
    sharps, flats = max(key.fifths, 0), max(-key.fifths, 0)
    return {letter: int(place < sharps) - int(place >= 7 - flats) for place, letter in enumerate(LETTERS)}


def tonic(key: Key) -> str:
    """The letter that a key is named after, such as `F#`."""
    return _KEYS[key.fifths + 7 + 3 * key.is_minor]
