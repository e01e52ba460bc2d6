"""Where an id leads in time, and what its notes need on the way: what the rules that depend on time are made of."""

from dataclasses import dataclass, field
from typing import NamedTuple

NEVER = -1e15
"""Ticks: long before everything."""
NO_SHIFT = "0.0.1"
"""A time shift that Structured writes between notes of one onset."""


class Point(NamedTuple):
    """A time: that of the current onset, or of the bar line, plus some lengths of the open bar, plus ticks."""

    from_bar: int = 0
    lengths: int = 0
    ticks: int = 0

    def after(self, ticks: float) -> "Point":
        return self._replace(ticks=self.ticks + int(ticks))

    def is_comparable(self, other: "Point") -> bool:
        return self[:2] == other[:2]


@dataclass
class Walk:
    """Where an id leads, under one denominator and with or without drums in force before it."""

    meter: str | None = None  # the last time signature that it writes
    time: Point = field(default_factory=Point)
    bar: Point = field(default_factory=lambda: Point(from_bar=1))
    length: int | None = None  # of the bar it leaves open, if it says so
    landings: list[int] = field(default_factory=list)  # where it places onsets, by shifts
    on_grid: bool = True
    counts: list[int] = field(default_factory=lambda: [0])  # notes in every bar
    needs: list[tuple[Point, int, int]] = field(default_factory=list)  # where a note begins, whether pitched, ends
    ends: list[tuple[Point, bool]] = field(default_factory=list)  # complete notes, and whether they are pitched
    is_open: bool = False  # whether it leaves a note incomplete


def if_pitched(note: tuple[Point, bool]) -> Point:
    """When a note ends; long before everything if it is of drums."""
    end, pitched = note
    return end if pitched else end._replace(ticks=int(NEVER))
