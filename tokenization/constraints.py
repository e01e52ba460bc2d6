"""What a user may demand of new music: a scale, ranges, instruments, polyphony, a rhythm grid, notes per bar.

Constraints are hard: the grammar lets no id through that would break one. What cannot be kept together is refused
before anything is sampled. Light to import.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fractions import Fraction
from functools import cached_property
from typing import Any

from .errors import InputError
from .sampling_limits import check_whole

MODES: dict[str, tuple[int, ...]] = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "harmonic-minor": (0, 2, 3, 5, 7, 8, 11),
    "melodic-minor": (0, 2, 3, 5, 7, 9, 11),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "phrygian": (0, 1, 3, 5, 7, 8, 10),
    "lydian": (0, 2, 4, 6, 7, 9, 11),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
    "locrian": (0, 1, 3, 5, 6, 8, 10),
    "major-pentatonic": (0, 2, 4, 7, 9),
    "minor-pentatonic": (0, 3, 5, 7, 10),
    "blues": (0, 3, 5, 6, 7, 10),
    "whole-tone": (0, 2, 4, 6, 8, 10),
}
"""Semitones above the tonic."""

_NATURALS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_TONE = re.compile(r"([A-G])([#b]?)")
_RANGE = re.compile(r"(\d+)-(\d+)")
_DENSITY = re.compile(r"(\d+)-(\d*)")
_GRID = re.compile(r"([1-9]\d*)/([1-9]\d*)")

DRUMS = -1
"""MidiTok's program of drums."""
_PITCHES = 128
MAX_POLYPHONY = 128
MAX_NOTES_PER_BAR = 100_000


class ConflictError(InputError):
    """Constraints cannot be kept together, or not by this model or after this prompt."""


@dataclass(frozen=True)
class Constraints:
    """
    What new music must keep to. The notes of a prompt, and of what stays around a gap, are not bound.

    Args:
        scale (`str`, *optional*): tonic and mode, such as `"D-dorian"`, with a mode of [`MODES`]; or pitch classes,
            such as `"C,E,G"`. It does not bind drums.
        pitch_range (`Sequence[str]`, *optional*): the lowest and highest MIDI pitch. `"48-72"` binds all instruments
            but drums; `"violin=55-100"` binds one, in place of the range for all.
        instruments (`Sequence[str]`, *optional*): only these play, whether or not the prompt or the training data has
            them. Names are those of the control `instruments`; a single word such as `"piano"` is the first
            instrument of General MIDI with it. By default those of the prompt, or else of the training data.
        polyphony (`int`, *optional*): at most this many notes sound at once, drums aside. Ids are sampled so that no
            note has to be cut. A note that takes the last voice ends before the last position of the next bar.
        grid (`str`, *optional*): notes begin only at multiples of this part of a whole note: `"1/8"` for eighths,
            `"1/12"` for their triplets. Counted from the bar line; in TSD and Structured, which have no bars, from
            the start of the piece.
        notes_per_bar (`str`, *optional*): how many notes begin in each new bar, all instruments together:
            `"4-16"`, `"4-"` for at least 4, `"0-16"` for at most 16. Needs REMI, which has bars.

    Raises:
        InputError: if a value makes no sense.
    """

    scale: str | None = None
    pitch_range: Sequence[str] | None = None
    instruments: Sequence[str] | None = None
    polyphony: int | None = None
    grid: str | None = None
    notes_per_bar: str | None = None

    def __post_init__(self) -> None:
        for name in ("pitch_range", "instruments"):
            value = getattr(self, name)
            if isinstance(value, str):  # a single one
                object.__setattr__(self, name, (value,))
            elif value is not None and not isinstance(value, Sequence):
                raise InputError(f"{name} is {value!r}: give text, or a list of texts")
            _check_text(name, *(value or ()))
        for name in ("scale", "grid", "notes_per_bar"):
            if (value := getattr(self, name)) is not None:
                _check_text(name, value)
        if self.polyphony is not None:
            check_whole("polyphony", self.polyphony, 1, MAX_POLYPHONY)
        _ = self.pitch_classes, self.step, self.density
        for text in self.pitch_range or ():
            _read_range(text)

    @classmethod
    def of(cls, given: "Constraints | Mapping[str, Any] | None") -> "Constraints | None":
        """Constraints from themselves or a mapping of their names; `None` if nothing is demanded.

        Raises:
            InputError: if there is no such constraint, or a value makes no sense.
        """
        if isinstance(given, Mapping):
            known = [field.name for field in fields(cls)]
            if unknown := [name for name in given if name not in known]:
                raise InputError(f"there is no constraint {unknown[0]!r}: choose from {', '.join(known)}")
            given = cls(**given)
        return None if given is None or given == cls() else given

    @cached_property
    def pitch_classes(self) -> frozenset[int] | None:
        """From 0 for C to 11 for B; `None` for all."""
        if self.scale is None:
            return None
        tonic, _, mode = self.scale.partition("-")
        if mode:
            if mode.lower() not in MODES or not _TONE.fullmatch(tonic):
                raise InputError(
                    f"scale is {self.scale!r}: write tonic and mode, such as D-dorian, with one of "
                    f"{', '.join(MODES)}; or pitch classes such as C,E,G"
                )
            return frozenset((_pitch_class(tonic) + step) % 12 for step in MODES[mode.lower()])
        tones = self.scale.split(",")
        if wrong := [tone for tone in tones if not _TONE.fullmatch(tone)]:
            raise InputError(
                f"scale is {self.scale!r}, but {wrong[0]!r} is not a pitch class: write C, F# or Bb, or a scale such "
                "as D-dorian"
            )
        return frozenset(map(_pitch_class, tones))

    @cached_property
    def step(self) -> Fraction | None:
        """The grid as a part of a whole note."""
        if self.grid is None:
            return None
        if not (found := _GRID.fullmatch(self.grid)):
            raise InputError(f"grid is {self.grid!r}: write a part of a whole note such as 1/8, or 1/12 for triplets")
        return Fraction(int(found[1]), int(found[2]))

    @cached_property
    def density(self) -> tuple[int, int | None]:
        """The least and the most notes of a bar; 0 and `None` if there is no such bound."""
        if self.notes_per_bar is None:
            return 0, None
        found = _DENSITY.fullmatch(self.notes_per_bar)
        least, most = (int(found[1]), int(found[2]) if found[2] else None) if found else (-1, None)
        if least < 0 or most == 0 or (most is not None and most < least) or least > MAX_NOTES_PER_BAR:
            raise InputError(
                f"notes_per_bar is {self.notes_per_bar!r}: write 4-16, or 4- for at least 4, or 0-16 for at most 16"
            )
        return least, most

    @property
    def timed(self) -> list[str]:
        """The names of the constraints that depend on time."""
        return [name for name in ("polyphony", "grid", "notes_per_bar") if getattr(self, name) is not None]

    @cached_property
    def programs(self) -> list[int] | None:
        """The General MIDI programs of `instruments`, -1 for drums; `None` if they are not given."""
        return None if self.instruments is None else sorted({_program(name) for name in self.instruments})

    @cached_property
    def _ranges(self) -> dict[int | None, range]:
        """The range of each program, and that of all under `None`."""
        found: dict[int | None, range] = {}
        for text in self.pitch_range or ():
            name, pitches = _read_range(text)
            program = None if name is None else _program(name)
            if program in found:
                raise InputError(f"pitch_range {text!r} bounds the same notes twice: give one range for them")
            found[program] = pitches
        return found

    def pitches(self, program: int) -> frozenset[int]:
        """The pitches that a program may play; -1 is drums."""
        own = self._ranges.get(program, range(_PITCHES) if program == DRUMS else self._ranges.get(None))
        found = frozenset(range(_PITCHES) if own is None else own)
        if self.pitch_classes is None or program == DRUMS:
            return found
        return frozenset(pitch for pitch in found if pitch % 12 in self.pitch_classes)

    def check_pitches(self, programs: Iterable[int], available: Mapping[bool, Collection[int]], whose: str) -> None:
        """Refuse an instrument that was asked for and has no pitch, and instruments of which none but drums has one.

        Args:
            programs (`Iterable[int]`): those that may play.
            available (`Mapping[bool, Collection[int]]`): the pitches of the tokenizer: of drums, under `True`; of
                others.
            whose (`str`): what `programs` are those of, for the message.

        Raises:
            ConflictError: if there is one, with the options in conflict.
        """
        options = [name for name in ("scale", "pitch_range") if getattr(self, name) is not None]
        if not options:
            return
        both = " and ".join(f"{name} {_shown(getattr(self, name))}" for name in options)
        leave = "leaves" if len(options) == 1 else "leave"
        wanted = set(programs)
        playing = {program for program in wanted if self.pitches(program) & set(available[program == DRUMS])}
        for program in {*(self.programs or ()), *self._ranges} - {None}:
            if not self.pitches(int(program or 0)) & set(available[program == DRUMS]):
                raise ConflictError(f"{both} {leave} {_name(int(program or 0))} no pitch: widen the one or the other")
        if (not playing - {DRUMS} and wanted != {DRUMS}) or not playing:
            raise ConflictError(f"{both} {leave} {whose} no pitch: widen the one or the other")

    def check_timing(self, has_bars: bool, name: str, positions: int) -> None:
        """Refuse what a tokenization cannot keep.

        Args:
            has_bars (`bool`): whether it has bar tokens.
            name (`str`): its name.
            positions (`int`): its positions per quarter note.

        Raises:
            ConflictError: if there are no bars, or the grid is not one of its positions.
        """
        if self.notes_per_bar is not None and not has_bars:
            raise ConflictError(f"notes_per_bar needs bars, which {name} does not have: leave it out, or use REMI")
        if self.step is not None and (self.step * 4 * positions).denominator != 1:
            raise ConflictError(
                f"grid {self.grid} is finer than the tokenizer's {positions} positions per quarter note, or between "
                f"them: choose a multiple of 1/{4 * positions}"
            )


def _check_text(name: str, *values: Any) -> None:
    """Raise an [`InputError`] for what is no text, as JSON may hold."""
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise InputError(f"{name} is {wrong[0]!r}: give text")


def _pitch_class(tone: str) -> int:
    return (_NATURALS[tone[0]] + {"": 0, "#": 1, "b": -1}[tone[1:]]) % 12


def _read_range(text: str) -> tuple[str | None, range]:
    """The name of an instrument, or `None` for all, and its pitches."""
    name, equals, pitches = text.rpartition("=")
    found = _RANGE.fullmatch(pitches)
    if not found or (equals and not name) or not int(found[1]) <= int(found[2]) < _PITCHES:
        raise InputError(
            f"pitch_range is {text!r}: write the lowest and the highest MIDI pitch, such as 48-72, or with an "
            "instrument, such as violin=55-100"
        )
    return name or None, range(int(found[1]), int(found[2]) + 1)


def _program(name: str) -> int:
    """The General MIDI program of an instrument, -1 for drums."""
    from .controls import DRUMS as DRUMS_NAME
    from .controls import INSTRUMENTS

    slug = re.sub(r"[\s_]+", "-", name.strip().lower())
    if slug == DRUMS_NAME:
        return DRUMS
    if slug in INSTRUMENTS:
        return INSTRUMENTS.index(slug)
    words = [program for program, known in enumerate(INSTRUMENTS) if slug in known.split("-")]
    if not words:
        nearest = ", ".join(get_close_matches(slug, (DRUMS_NAME, *INSTRUMENTS), n=5, cutoff=0))
        raise InputError(f"there is no instrument {name!r}: the nearest are {nearest}")
    return words[0]


def _name(program: int) -> str:
    from .controls import DRUMS as DRUMS_NAME
    from .controls import INSTRUMENTS

    return DRUMS_NAME if program == DRUMS else INSTRUMENTS[program]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(map(str, value))
