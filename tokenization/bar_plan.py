"""Bar lines in meters that a tokenizer has: where the music has them, whatever its meters are.

Left alone, MidiTok delays a change of meter to the next bar line and drops meters that it does not know, which shifts
every bar line after them. Here each bar is written as a meter of the same length, or as several meters in a row, and a
bar that a change of meter cuts short as a shorter bar. Times are in 1/32 of a quarter note, the shortest length that
MIDI can give a bar.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

from .musical_time import Meter

PER_QUARTER = 32
# Half a position of a quarter note. Files whose times were rounded have meters a tick beside the bar line.
_NOTICED = 1 / 24

_Signature = tuple[int, int]


class BarPlan(NamedTuple):
    """Meters to write, their times in 1/32 of a quarter note, and in plain English what differs from the music."""

    meters: list[Meter]
    changes: list[str]


def plan_bars(meters: Sequence[Meter], ticks_per_quarter: int, end: int, supported: Iterable[_Signature]) -> BarPlan:
    """Write bar lines with the meters that a tokenizer supports.

    A bar line that cannot be kept becomes the nearest one that can; those after it stay where the music has them.

    Args:
        meters (`Sequence[Meter]`):
            The meters of the music in order, the first from tick 0; each starts a bar.
        ticks_per_quarter (`int`):
            The unit of their times.
        end (`int`):
            Tick of the last onset. Meters are planned up to it.
        supported (`Iterable[tuple[int, int]]`):
            Numerators and denominators that can be written.
    """
    writer = _Writer(_speller(tuple(supported)), ticks_per_quarter)
    found = [meter for meter in meters if meter.time <= end]
    for index, meter in enumerate(found):
        stop = found[index + 1].time if index + 1 < len(found) else None
        if stop is None or stop > meter.time:
            writer.write_section(meter, stop, end)
    last = end * PER_QUARTER / ticks_per_quarter
    return BarPlan([meter for meter in writer.meters if meter.time <= max(last, 0)], writer.changes())


class _Speller:
    """Lengths as meters."""

    def __init__(self, supported: tuple[_Signature, ...]) -> None:
        self.meters: dict[int, list[_Signature]] = {}
        for numerator, denominator in supported:
            self.meters.setdefault(_length(numerator, denominator), []).append((numerator, denominator))
        self.longest = max(self.meters)
        self._series: list[tuple[int, ...] | None] = [()]
        for total in range(1, 2 * self.longest + 1):
            self._series.append(self._shortest_series(total))

    def _shortest_series(self, total: int) -> tuple[int, ...] | None:
        """The fewest lengths that add up to `total`, the longest first."""
        options = []
        for length in self.meters:
            before = self._series[total - length] if length <= total else None
            if before is not None:
                options.append(tuple(sorted((*before, length), reverse=True)))
        return min(options, key=lambda lengths: (len(lengths), [-length for length in lengths]), default=None)

    def spell(self, total: int, denominator: int) -> tuple[_Signature, ...] | None:
        """Meters of `total` length, with denominators near the given one, or `None` if there are none."""
        repeated = max(total - self.longest, 0) // self.longest
        series = self._series[total - repeated * self.longest]
        if series is None:
            return None
        return tuple(self._signature(length, denominator) for length in (*[self.longest] * repeated, *series))

    def _signature(self, length: int, denominator: int) -> _Signature:
        def distance(signature: _Signature) -> int:
            return abs(signature[1].bit_length() - denominator.bit_length())

        return min(self.meters[length], key=distance)

    def nearest(self, length: int, scale: int) -> int:
        """The length nearest to `length / scale` that can be written; 0 is always one."""
        below = length // scale
        for distance in range(below + 2):
            options = [total for total in (below - distance, below + 1 + distance) if total >= 0]
            options = [total for total in options if self.spell(total, 4) is not None]
            if options:
                return min(options, key=lambda total: abs(total * scale - length))
        return 0


@cache
def _speller(supported: tuple[_Signature, ...]) -> _Speller:
    return _Speller(supported)


def _length(numerator: int, denominator: int) -> int:
    return numerator * 4 * PER_QUARTER // denominator


class _Writer:
    """Writes bars one after another. True times are `scale` times as fine, so that all are whole numbers."""

    def __init__(self, speller: _Speller, ticks_per_quarter: int) -> None:
        self.speller = speller
        self.scale = ticks_per_quarter
        self.meters: list[Meter] = []
        self._now = 0  # where the next bar is written
        self._respelled: Counter[tuple[str, tuple[_Signature, ...]]] = Counter()
        self._cut = 0
        self._moved: list[float] = []  # quarter notes

    def write_section(self, meter: Meter, stop: int | None, end: int) -> None:
        """Write the bars of one meter, up to tick `stop` where the next begins, or past tick `end` in the last."""
        length = _length(meter.numerator, meter.denominator)
        spelled = self.speller.spell(length, meter.denominator)
        if (meter.numerator, meter.denominator) in self.speller.meters.get(length, []):
            spelled = ((meter.numerator, meter.denominator),)
        if spelled is None:
            self._write_nearest(meter, length, stop, end)
            return
        self._note_move(meter.time * PER_QUARTER)
        limit = (end if stop is None else stop) * PER_QUARTER
        whole, rest = divmod(max(limit - self._now * self.scale, 0), length * self.scale)
        fill = self.speller.nearest(rest, self.scale) if stop is not None else length
        if fill >= length:
            whole, fill = whole + 1, 0
        self._put_bars(meter, spelled, whole)
        if fill:
            self._cut += 1
            self._put(self.speller.spell(fill, meter.denominator) or ())

    def _write_nearest(self, meter: Meter, length: int, stop: int | None, end: int) -> None:
        """Bars of a length that no meters add up to: every bar line goes to the nearest place that can be written."""
        limit = (end + 1 if stop is None else stop) * PER_QUARTER
        for line in range(meter.time * PER_QUARTER, limit, length * self.scale):
            self._note_move(line)
            following = line + length * self.scale
            following = following if stop is None else min(following, limit)
            fill = self.speller.nearest(max(following - self._now * self.scale, 0), self.scale)
            self._put(self.speller.spell(fill, meter.denominator) or ())

    def _put_bars(self, meter: Meter, spelled: tuple[_Signature, ...], count: int) -> None:
        if count and spelled != ((meter.numerator, meter.denominator),):
            self._respelled[str(meter), spelled] += count
        if len(spelled) == 1:
            self._put(spelled if count else ())
            self._now += _length(*spelled[0]) * max(count - 1, 0)
        else:
            for _ in range(count):
                self._put(spelled)

    def _put(self, spelled: Iterable[_Signature]) -> None:
        for numerator, denominator in spelled:
            last = self.meters[-1][1:] if self.meters else None
            if (numerator, denominator) != last:
                self.meters.append(Meter(self._now, numerator, denominator))
            self._now += _length(numerator, denominator)

    def _note_move(self, line: int) -> None:
        distance = abs(line / self.scale - self._now) / PER_QUARTER
        if distance > _NOTICED:
            self._moved.append(distance)

    def changes(self) -> list[str]:
        """What differs from the music."""
        found = []
        for (meter, spelled), count in self._respelled.items():
            found.append(f"{_count(count, 'bar')} of {meter} written as {_in_words(spelled)}")
        if self._cut:
            found.append(f"{_count(self._cut, 'bar')} cut short by a change of meter and written as a shorter bar")
        if self._moved:
            moved = f"{_count(len(self._moved), 'bar line')} moved to the nearest place that can be written"
            found.append(f"{moved}, by up to {max(self._moved):.2g} quarter notes")
        return found


def _in_words(spelled: tuple[_Signature, ...]) -> str:
    """Such as `7/8 + 1/16` or `3 x 12/4 + 1/4`."""
    counted = [
        (len(list(group)), f"{numerator}/{denominator}") for (numerator, denominator), group in groupby(spelled)
    ]
    return " + ".join(name if count == 1 else f"{count} x {name}" for count, name in counted)


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}s" if number > 1 else f"1 {name}"
