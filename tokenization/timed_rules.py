"""Constraints that depend on time: a rhythm grid, how many notes sound at once, how many begin in a bar.

Every id is walked through once, beforehand: where in time it leads, when its notes end, how many voices it needs and
when. A *point* in time is ticks after the current onset or after the bar line, plus some lengths of the open bar. So
it is known for every id at once from three numbers of a row. The rules also look ahead: a note may only be as long,
and a position only as late, as leaves room for the notes that must come. Times are in the tokenizer's ticks.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .constraints import ConflictError, Constraints
from .grammar_tables import keep_tables, tokens_of_ids
from .walks import NEVER, NO_SHIFT, Point, Walk, if_pitched

# The columns of a clock: the current onset, the bar line before it, the length of the bar, its denominator as an
# index, the notes that began in it. Then come the ends of the notes that sound, the latest first.
_TIME, _BAR, _LENGTH, _METER, _COUNT, _ENDS = range(6)
_FOUR_FOUR = "4/4"


class TimedRules:
    """
    The rules of one tokenizer under constraints.

    Args:
        tokenizer (`miditok.MusicTokenizer`): one that the grammar supports.
        constraints ([`~midimamba.tokenization.constraints.Constraints`]): with a grid, polyphony or density.
        meters (`Sequence[str]`): the time signatures of the new bars, if they are given.

    Raises:
        ConflictError: if the tokenizer has no time shift that keeps to the grid.
    """

    def __init__(
        self,
        tokenizer: MusicTokenizer,
        constraints: Constraints,
        meters: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self.polyphony = constraints.polyphony or 0
        self.least, self.most = constraints.density
        self.has_bars = bool(tokenizer.token_ids_of_type("Bar"))
        self._timed = bool(tokenizer.token_ids_of_type("TimeSig"))
        found = [token.partition("_")[2] for token in tokenizer.vocab if token.startswith("TimeSig_")]
        self._denominators = sorted({int(meter.split("/")[1]) for meter in (*found, _FOUR_FOUR)})
        whole = 4 * tokenizer.time_division
        self.grid = 0 if constraints.step is None else int(constraints.step * whole)
        # After a bar line the longest bar may come, or one of those that are wanted.
        self._next = list(dict.fromkeys(meters)) or [max(found or [_FOUR_FOUR], key=self._ticks)]
        self._reach = {number: self._longest_shift(number, constraints) for number in self._denominators}
        self.fewest_places = min(map(self.places, self._next))
        asked = self.polyphony, self.least, self.most, self.grid, *self._next
        self.tables = keep_tables(tokenizer, "time", asked, lambda: self._make_tables(tokens_of_ids(tokenizer)))
        self._split = self.tables["split"].tolist()

    # ---- the meaning of ids, once ----

    def _ticks(self, meter: str) -> int:
        """The length of a bar."""
        numerator, denominator = map(int, meter.split("/"))
        return 4 * int(self._tokenizer.time_division) * numerator // denominator

    def _per_beat(self, denominator: int) -> int:
        beat: int = self._tokenizer._tpb_per_ts[denominator] if self._timed else self._tokenizer.time_division
        return beat

    def _step(self, denominator: int) -> int:
        """Ticks from one place for onsets to the next."""
        return self.grid or self._position(denominator)

    def _position(self, denominator: int) -> int:
        return self._per_beat(denominator) // int(self._tokenizer.config.max_num_pos_per_beat)

    def places(self, meter: str) -> int:
        """How many places for onsets a bar has."""
        return ceil(self._ticks(meter) / self._step(int(meter.split("/")[1])))

    def _last_place(self, meter: str) -> int:
        return (self.places(meter) - 1) * self._step(int(meter.split("/")[1]))

    def _spread(self, value: str, denominator: int) -> int:
        """A duration or time shift in ticks."""
        ticks: int = self._tokenizer._tpb_tokens_to_ticks[self._per_beat(denominator)][value]
        return ticks

    def _longest_shift(self, denominator: int, constraints: Constraints) -> int:
        """How far the next onset may be at most, in a tokenization without bars."""
        if self.has_bars:
            return 0
        shifts = [token.partition("_")[2] for token in self._tokenizer.vocab if token.startswith("TimeShift_")]
        ticks = [self._spread(shift, denominator) for shift in shifts if shift != NO_SHIFT]
        fitting = [each for each in ticks if not self.grid or each % self.grid == 0]
        if not fitting:
            raise ConflictError(
                f"grid {constraints.grid} is coarser than every time shift of the tokenizer in meters of "
                f"1/{denominator}: choose a finer one"
            )
        return max(fitting)

    def _walk(self, tokens: Sequence[str], denominator: int, pitched: bool) -> Walk:
        walk = Walk()
        for token in tokens:
            kind, _, value = token.partition("_")
            if kind == "Bar":
                walk.bar = (
                    walk.bar._replace(lengths=walk.bar.lengths + 1)
                    if walk.length is None
                    else walk.bar.after(walk.length)
                )
                walk.time = walk.bar
                walk.counts.append(0)
            elif kind == "TimeSig":
                walk.meter, denominator = value, int(value.split("/")[1])
                walk.length = self._ticks(value)
            elif kind == "Position":
                ticks = int(value) * self._position(denominator)
                walk.time = walk.bar.after(ticks)
                walk.on_grid &= not self.grid or ticks % self.grid == 0
            elif kind == "TimeShift" and value != NO_SHIFT:
                walk.time = walk.time.after(self._spread(value, denominator))
                walk.landings.append(walk.time.ticks)
            elif kind == "Program":
                pitched = value != "-1"
            elif kind in ("Pitch", "PitchDrum"):
                walk.counts[-1] += 1
                walk.needs.append((walk.time, pitched, len(walk.ends)))
            elif kind == "Duration":
                walk.ends.append((walk.time.after(self._spread(value, denominator)), pitched))
        last = tokens[-1].partition("_")[0]
        if last == "Program":
            walk.needs.append((walk.time, pitched, len(walk.ends)))
        walk.is_open = pitched and last in ("Pitch", "Velocity")
        return walk

    def _deadline(self, walk: Walk, last: str, denominator: int) -> Point:
        """The latest time at which the next note may have to begin, of the times that remain possible after an id."""
        if walk.meter is not None:
            denominator = int(walk.meter.split("/")[1])
        if last in ("Position", "Tempo", "TimeShift") or (last == "TimeSig" and not self.has_bars):
            return walk.time
        if not self.has_bars:
            return walk.time.after(self._reach[denominator])
        beyond = min(map(self._last_place, self._next))
        if last == "TimeSig":
            return walk.bar.after(self._last_place(walk.meter or _FOUR_FOUR))
        if last == "Bar":
            return walk.bar.after(beyond)
        return self._end_of_bar(walk).after(beyond)

    @staticmethod
    def _end_of_bar(walk: Walk) -> Point:
        if walk.length is None:
            return walk.bar._replace(lengths=walk.bar.lengths + 1)
        return walk.bar.after(walk.length)

    def _make_tables(self, tokens: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Tables about all ids, of shape (frames, …) where the denominator and the program in force matter.

        - `coefficients` (3, points), `ticks` (frames, points): all points, in groups of which `split` is the size;
        - `voices_needed` (frames, needs), `need_id` (needs,), `pair_need` (pairs,): the voices that a note needs, its
          own one and those of notes of the same id; pairs are needs and notes whose order depends on the state;
        - `note_id` (notes,); `on_grid`, `residue` (frames, vocab); `count_lead`, `count_tail`, `count_due` and so on.
        """
        frames = [(number, pitched) for number in self._denominators for pitched in (False, True)]
        walks = [[self._walk(each, *frame) for each in tokens] for frame in frames]
        last = [each[-1].partition("_")[0] for each in tokens]
        first = walks[0]
        needs = [(index, place) for index, walk in enumerate(first) for place in self._binding(walk)]
        notes = [(index, place) for index, walk in enumerate(first) for place in range(len(walk.ends))]
        pairs = [
            (need, index, place)
            for need, (index, entry) in enumerate(needs)
            for place in range(first[index].needs[entry][2])
            if not first[index].needs[entry][0].is_comparable(first[index].ends[place][0])
        ]
        rows = []
        for (denominator, _), frame in zip(frames, walks, strict=True):
            groups = (
                [frame[index].needs[entry][0] for index, entry in needs],
                [if_pitched(frame[index].ends[place]) for _, index, place in pairs],
                [self._deadline(walk, kind, denominator) for walk, kind in zip(frame, last, strict=True)],
                [if_pitched(frame[index].ends[place]) for index, place in notes],
                [walk.time for walk in frame],
                [walk.bar for walk in frame],
                [self._end_of_bar(walk) for walk in frame],
            )
            rows.append([point for group in groups for point in group])
        tables = {
            "split": torch.tensor([len(group) for group in groups]),
            "coefficients": torch.tensor(
                [[not point.from_bar, point.from_bar, point.lengths] for point in rows[0]], dtype=torch.float64
            ).T.contiguous(),
            "ticks": torch.tensor([[point.ticks for point in row] for row in rows], dtype=torch.float64),
            "need_id": torch.tensor([index for index, _ in needs], dtype=torch.long),
            "note_id": torch.tensor([index for index, _ in notes], dtype=torch.long),
            "pair_need": torch.tensor([need for need, _, _ in pairs], dtype=torch.long),
            "voices_needed": torch.tensor(
                [[self._voices_needed(frame[index], entry) for index, entry in needs] for frame in walks]
            ).reshape(len(frames), len(needs)),
            "residue": torch.tensor([[self._residue(walk) for walk in frame] for frame in walks]),
            "open": torch.tensor([[float(walk.is_open) for walk in frame] for frame in walks]),
        }
        return tables | self._reading_tables(walks) | self._counting_tables(walks, last)

    @staticmethod
    def _binding(walk: Walk) -> list[int]:
        """The needs of an id, but of those at one time only the last, which is the greatest."""
        points = [point for point, _, _ in walk.needs]
        return [place for place, point in enumerate(points) if point not in points[place + 1 :]]

    @staticmethod
    def _voices_needed(walk: Walk, entry: int) -> int:
        """The voices for a note and for those of the same id that surely sound then; 0 if none of them is pitched."""
        point, pitched, before = walk.needs[entry]
        if not pitched and not any(each[0] == point and each[1] for each in walk.needs[:entry]):
            return 0
        sounding = sum(
            is_pitched and end.is_comparable(point) and end.ticks > point.ticks
            for end, is_pitched in walk.ends[:before]
        )
        return int(pitched) + sounding

    def _residue(self, walk: Walk) -> int:
        """What the onset before it must leave when divided by the grid; -1 for anything, -2 for nothing."""
        if not walk.on_grid:
            return -2
        if not self.grid or not walk.landings:
            return -1
        found = {-ticks % self.grid for ticks in walk.landings}
        return found.pop() if len(found) == 1 else -2

    def _reading_tables(self, walks: list[list[Walk]]) -> dict[str, Tensor]:
        """How an id changes a clock: its time and bar line, then the ends of its notes; its meter."""
        longest = max(len(walk.ends) for walk in walks[0]) if self.polyphony else 0

        def points(walk: Walk) -> list[Point]:
            ends = [if_pitched(end) for end in walk.ends[:longest]]
            return [walk.time, walk.bar, *ends, *[Point(ticks=int(NEVER))] * (longest - len(ends))]

        found = [[points(walk) for walk in frame] for frame in walks]
        meters = [walk.meter for walk in walks[0]]
        return {
            "read_coefficients": torch.tensor(
                [[[not p.from_bar, p.from_bar, p.lengths] for p in row] for row in found[0]], dtype=torch.float64
            ),
            "read_ticks": torch.tensor([[[p.ticks for p in row] for row in frame] for frame in found]).double(),
            "length": torch.tensor([-1.0 if meter is None else self._ticks(meter) for meter in meters]).double(),
            "meter": torch.tensor(
                [-1.0 if meter is None else self._denominators.index(int(meter.split("/")[1])) for meter in meters]
            ).double(),
            "steps": torch.tensor([float(self._step(number)) for number in self._denominators]).double(),
        }

    def _counting_tables(self, walks: list[list[Walk]], last: list[str]) -> dict[str, Tensor]:
        """Notes per bar, and the places of the bar that an id leaves open."""
        due = [int(self.has_bars and kind in ("Position", "Tempo", "Program")) for kind in last]
        counts = [walk.counts for walk in walks[0]]
        fits = [
            all(self.least <= count <= (self.most or count) for count in each[1:-1])
            and (len(each) == 1 or each[-1] + more <= (self.most or each[-1] + more))
            for each, more in zip(counts, due, strict=True)
        ]
        fewest = min(self._next, key=self.places)
        places, steps = [], []
        for frame, denominator in zip(walks, (n for n in self._denominators for _ in range(2)), strict=True):
            meters = [
                fewest if kind == "Bar" and self._timed else walk.meter for walk, kind in zip(frame, last, strict=True)
            ]
            places.append([-1.0 if meter is None else self.places(meter) for meter in meters])
            steps.append(
                [float(self._step(denominator if meter is None else int(meter.split("/")[1]))) for meter in meters]
            )
        return {
            "counts_fit": torch.tensor(fits),
            "opens_bar": torch.tensor([len(each) > 1 for each in counts]),
            "count_lead": torch.tensor([float(each[0]) for each in counts]).double(),
            "count_due": torch.tensor(
                [float(each[0] + (more if len(each) == 1 else 0)) for each, more in zip(counts, due, strict=True)]
            ).double(),
            "count_tail": torch.tensor([float(each[-1]) for each in counts]).double(),
            "places": torch.tensor(places).double(),
            "id_steps": torch.tensor(steps).double(),
            # After these, a note of drums must be free at this very onset; after the others, at a later one.
            "at_onset": torch.tensor([kind in ("Position", "Tempo", "TimeShift", "TimeSig", "Bar") for kind in last]),
        }

    # ---- the clock of every row ----

    def begin(self, rows: int) -> Tensor:
        """The clocks of rows without ids, of shape (rows, columns)."""
        clock = self.tables["length"].new_full((rows, _ENDS + (self.polyphony + 1 if self.polyphony else 0)), NEVER)
        clock[:, :_ENDS] = 0
        clock[:, _LENGTH] = self._ticks(_FOUR_FOUR)
        clock[:, _METER] = self._denominators.index(4)
        return clock

    @staticmethod
    def _frame(clock: Tensor, pitched: Tensor) -> Tensor:
        """Row indices of the tables, of shape (rows,)."""
        return clock[:, _METER].long() * 2 + pitched

    def read(self, clock: Tensor, ids: Tensor, pitched: Tensor, begins: Tensor) -> None:
        """Take in one id per row, in place.

        Args:
            clock (`Tensor` of shape (rows, columns)): the clocks.
            ids (`LongTensor` of shape (rows,)): the ids.
            pitched (`BoolTensor` of shape (rows,)): whether the program in force before them is not drums.
            begins (`BoolTensor` of shape (rows, 1)): whether they begin a sequence.
        """
        table = self.tables
        points = (table["read_coefficients"][ids] @ clock[:, :_METER, None])[:, :, 0]
        points += table["read_ticks"][self._frame(clock, pitched), ids]
        length, meter = table["length"][ids], table["meter"][ids]
        if self.polyphony:
            ends = torch.cat([clock[:, _ENDS:-1], points[:, 2:]], dim=1)
            clock[:, _ENDS:-1] = ends.topk(self.polyphony, dim=1).values
        clock[:, : _BAR + 1] = points[:, :2]
        clock[:, _LENGTH] = torch.where(length < 0, clock[:, _LENGTH], length)
        clock[:, _METER] = torch.where(meter < 0, clock[:, _METER], meter)
        clock[:, _COUNT] = clock[:, _COUNT] * ~table["opens_bar"][ids] + table["count_tail"][ids]
        clock.copy_(torch.where(begins, self.begin(1), clock))

    # ---- what may follow ----

    def allowed(self, clock: Tensor, now: "Now") -> tuple[Tensor, Tensor]:
        """Which ids break no constraint, and which also leave room for what must come; both of shape (rows, vocab).

        Args:
            clock (`Tensor` of shape (rows, columns)): the clocks.
            now ([`Now`]): what else is known of the rows.
        """
        table, frame = self.tables, self._frame(clock, now.pitched)
        residue = table["residue"][frame]
        hard = residue == -1
        if self.grid:
            hard |= residue == torch.remainder(clock[:, _TIME, None], self.grid) * (not self.has_bars)
        ahead = torch.ones_like(hard)
        if self.least or self.most is not None:
            hard &= self._counts_fit(clock, now)
        if self.polyphony or self.least:
            state = clock[:, :_METER]
            needs, pairs, deadline, ends, time, bar, line = torch.addmm(
                table["ticks"][frame], state, table["coefficients"]
            ).split(self._split, dim=1)
            if self.polyphony:
                hard &= self._has_voices(clock, frame, needs, pairs)
                ahead &= self._has_voice_later(clock, deadline, ends, now)
            if self.least:
                bars = self._bars(clock, frame, time, bar)
                ahead &= self._has_room(clock, frame, bars, ends, now)
                if self.polyphony:
                    ahead &= now.is_last | self._has_room_later(clock, line, ends, now)
        return hard, ahead

    def _counts_fit(self, clock: Tensor, now: "Now") -> Tensor:
        table, count = self.tables, clock[:, _COUNT, None]
        fits = table["counts_fit"].expand(len(clock), -1)
        if self.most is not None:
            due = table["count_due"]
            fits = fits & ((due == 0) | (count + due <= self.most))
        if self.least:
            ends = table["opens_bar"] | table["ends"]
            fits = fits & (~ends | (count + table["count_lead"] >= self.least) | (now.bars[:, None] == 0))
        return fits

    def _has_voices(self, clock: Tensor, frame: Tensor, needs: Tensor, pairs: Tensor) -> Tensor:
        """Whether a voice is free for every note of an id."""
        table, ends = self.tables, clock[:, _ENDS:]
        wanted = table["voices_needed"][frame]
        if len(table["pair_need"]):
            sounding = pairs > needs[:, table["pair_need"]]
            wanted = wanted + torch.zeros_like(wanted).index_add_(1, table["pair_need"], sounding.long()) * (
                wanted > 0
            )
        taken = (wanted > self.polyphony) | (ends.gather(1, (self.polyphony - wanted).clamp(min=0)) > needs)
        return self._sum_by_id(table["need_id"], taken & (wanted > 0)) == 0

    def _has_voice_later(self, clock: Tensor, deadline: Tensor, ends: Tensor, now: "Now") -> Tensor:
        """Whether a note may begin at the deadline of an id."""
        table = self.tables
        own = self._sum_by_id(table["note_id"], ends > deadline[:, table["note_id"]]).long()
        sounding = clock[:, _ENDS:].gather(1, (self.polyphony - 1 - own).clamp(min=0))
        is_free = (own < self.polyphony) & (sounding <= deadline)
        return is_free | torch.where(table["at_onset"], now.drums_now, now.drums_later | now.is_last)

    def _sum_by_id(self, ids: Tensor, values: Tensor) -> Tensor:
        """Values of shape (rows, notes) added up by their ids, of shape (rows, vocab)."""
        total = torch.zeros(len(values), len(self.tables["length"]), dtype=torch.float64, device=values.device)
        return total.index_add_(1, ids, values.double())

    def _bars(self, clock: Tensor, frame: Tensor, time: Tensor, bar: Tensor) -> "_Bars":
        table = self.tables
        steps = table["id_steps"][frame]
        own = (clock[:, _LENGTH] / table["steps"][clock[:, _METER].long()]).ceil()
        places = torch.where(table["places"][frame] < 0, own[:, None], table["places"][frame])
        return _Bars(bar, steps, places, ((time - bar) / steps).ceil())

    def _has_room(self, clock: Tensor, frame: Tensor, bars: "_Bars", ends: Tensor, now: "Now") -> Tensor:
        """Whether the notes that a bar still needs can begin in it."""
        table = self.tables
        count = clock[:, _COUNT, None] * ~table["opens_bar"] + table["count_lead"] * ~table["opens_bar"]
        owed = self.least - torch.where(table["opens_bar"], table["count_tail"], count)
        left = bars.places - bars.place
        room = now.most_drums * left - now.begun_drums
        if self.polyphony:
            room += self._free_places(clock, bars, now) - self._taken_places(bars, ends) - table["open"][frame]
        else:
            room += now.most_pitched * left - now.begun_pitched
        is_bound = (now.bars[:, None] > 0) | table["opens_bar"]
        return ~is_bound | (owed <= 0) | (room >= owed)

    def _has_room_later(self, clock: Tensor, line: Tensor, ends: Tensor, now: "Now") -> Tensor:
        """Whether the notes that the next bar needs can begin in it."""
        fits = torch.ones_like(line, dtype=torch.bool)
        for meter in self._next:
            places = torch.full_like(line, float(self.places(meter)))
            steps = torch.full_like(line, float(self._step(int(meter.split("/")[1]))))
            bars = _Bars(line, steps, places, torch.zeros_like(line))
            room = self._free_places(clock, bars, now) - self._taken_places(bars, ends)
            fits &= room + now.most_drums * places >= self.least
        return fits

    def _free_places(self, clock: Tensor, bars: "_Bars", now: "Now") -> Tensor:
        """How many notes could begin in a bar, of shape (rows, vocab): at each place, as many as voices are free."""
        first = ((clock[:, _ENDS:-1, None] - bars.bar[:, None]) / bars.steps[:, None]).ceil()  # (rows, voices, vocab)
        free = (bars.places[:, None] - torch.maximum(first, bars.place[:, None])).clamp(min=0)
        voices = torch.arange(self.polyphony, device=clock.device)
        return (free * (voices < now.most_pitched)[:, :, None]).sum(dim=1)

    def _taken_places(self, bars: "_Bars", ends: Tensor) -> Tensor:
        """How many of them the notes of an id take."""
        ids = self.tables["note_id"]
        bar, steps, places, place = (each[:, ids] for each in bars)
        silent = torch.maximum(((ends - bar) / steps).ceil(), place)
        taken = (places - place) - (places - silent).clamp(min=0)
        total = torch.zeros_like(bars.bar)
        return total.index_add_(1, ids, taken)


class _Bars(NamedTuple):
    """The bar that every id leaves open, of shape (rows, vocab) each: its line, the ticks of its places, how many it
    has, and the place of the last onset."""

    bar: Tensor
    steps: Tensor
    places: Tensor
    place: Tensor


class Now(NamedTuple):
    """
    What the grammar knows of rows.

    Args:
        pitched (`BoolTensor` of shape (rows,)): whether the program in force is not drums.
        bars (`LongTensor` of shape (rows,)): new bars so far.
        is_last (`BoolTensor` of shape (rows, vocab)): whether the bar that an id leaves open is the last one.
        drums_now, drums_later (`BoolTensor` of shape (rows, vocab) and (rows, 1)): whether a drum may begin at the
            onset that an id leaves open, and at one after it.
        most_pitched, most_drums (`Tensor` of shape (rows, 1)): the most notes that one onset may surely have.
        begun_pitched, begun_drums (`Tensor` of shape (rows, vocab)): the notes at the onset that an id leaves open.
    """

    pitched: Tensor
    bars: Tensor
    is_last: Tensor
    drums_now: Tensor
    drums_later: Tensor
    most_pitched: Tensor
    most_drums: Tensor
    begun_pitched: Tensor
    begun_drums: Tensor
