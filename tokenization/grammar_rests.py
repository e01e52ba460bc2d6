"""The grammar of REMI with rests. A rest begins where all notes have ended, and passes bar lines without a token."""

from typing import NamedTuple

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .grammar import MidiGrammar
from .grammar_state import At, State
from .grammar_tables import tokens_of_ids
from .grammar_types import RESTS, kind_of, type_graph

# What a row remembers: ticks after the bar line at which all notes so far have ended, or -1 before the first bar; and
# ticks per position.
_END, _STEP = range(2)
_NOTHING, _BAR, _METER, _POSITION, _NOTE, _REST = range(6)


class _Place(NamedTuple):
    """Where rows stand in time, of shape (rows, ids) each: see `_END` and `_STEP`, and [`At`]."""

    end: Tensor
    step: Tensor
    position: Tensor
    limit: Tensor
    bars: Tensor  # that were opened
    empty: Tensor
    fits: Tensor
    has_room: Tensor


class RestGrammar(MidiGrammar):
    """[`MidiGrammar`] of REMI with rests.

    The bars that rests pass count like others. A meter follows a rest only if it leads to a bar line, and a position
    is not before the end of the rest.
    """

    tokenizations = (RESTS,)
    # Where notes of one meter sound on in another, a rest may end behind the last position of a bar.
    _may_take_longer = True

    def _make_tables(self, tokenizer: MusicTokenizer, pitches: Tensor) -> dict[str, Tensor]:
        tables = super()._make_tables(tokenizer, pitches) | step_tables(tokenizer)
        types = type_graph(tokenizer).types
        tables["kind_rest"] = torch.tensor(types.index("Rest"))
        tables["kind_bar"] = torch.tensor(types.index("Bar"))
        return tables

    def _own(self, tokenizer: MusicTokenizer) -> Tensor:
        return torch.tensor([-1, int(tokenizer.time_division) // int(tokenizer.config.max_num_pos_per_beat)])

    def _forbid(self, scores: Tensor) -> Tensor:
        ids = self._tables["rest_ids"]
        self._ahead = self._walk(self._state, ids.expand(len(self._state.values), -1))
        return super()._forbid(scores)

    def _opened(self, state: State) -> Tensor:
        bars = self._tables["bars"].repeat(len(state.values), 1)
        bars[:, self._tables["rest_ids"]] = self._ahead.bars
        return bars

    def _narrow(
        self, state: State, structure: Tensor, has_room: Tensor, in_time: Tensor, sayable: Tensor
    ) -> tuple[Tensor, ...]:
        table, values, place = self._tables, state.values, self._ahead
        ids = table["rest_ids"]
        rested = values[:, At.LAST, None] == table["kind_rest"]
        structure &= ~(rested & table["meter_first"] & (state.own[:, _END, None] != 0))
        # A rest that ends behind the last position needs one more bar, with a meter.
        lacks = table["ends_in_rest"][ids] & (place.position + 1 >= place.limit)
        structure[:, ids] &= place.fits
        if self.max_bars is not None:
            structure[:, ids] &= ~lacks | (values[:, At.BARS, None] + place.bars < self.max_bars)
        has_room[:, ids] = place.has_room & (place.empty + lacks <= self.max_empty_bars + 1)
        waits = torch.where(values[:, At.NOTES] > 0, self._limits.patience, self._limits.first_patience)
        in_time[:, ids] &= ~lacks | (values[:, At.SILENCE, None] + table["lead"][ids] + 2 <= waits[:, None])
        return structure, has_room, in_time, sayable

    def _read(self, state: State, ids: Tensor, step: int) -> None:
        place = self._walk(state, ids[:, None])
        before = state.values[:, At.BARS].clone()
        super()._read(state, ids, step)
        values, begins = state.values, self._tables["begins"][ids]
        opened = place.bars[:, 0]
        if step + 1 != self.prompt_length:
            values[:, At.BARS] = torch.where(begins, values[:, At.BARS], before + opened)
        for column, found in ((At.POSITION, place.position), (At.LIMIT, place.limit), (At.EMPTY, place.empty)):
            values[:, column] = torch.where(begins, values[:, column], found[:, 0])
        own = torch.cat([place.end, place.step], dim=1)
        state.own = torch.where(begins[:, None], self._tables["own"], own)

    def _walk(self, state: State, ids: Tensor) -> _Place:
        """Where ids of shape (rows, ids) lead."""
        table, values = self._tables, state.values
        position, limit, empty = (values[:, at, None] for at in (At.POSITION, At.LIMIT, At.EMPTY))
        end, step = state.own[:, _END, None], state.own[:, _STEP, None]
        fits, bars = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)
        has_room = fits.clone()
        at_line = values[:, At.LAST, None] == table["kind_bar"]
        for kind, first, second in zip(*(table[f"step_{name}"][ids].unbind(-1) for name in _COLUMNS), strict=True):
            is_bar, is_rest, is_meter = kind == _BAR, kind == _REST, kind == _METER
            length = limit * step
            fits &= ~is_meter | at_line | (end == 0)
            end = torch.where(is_bar, (end - length).clamp(min=0), end)
            reached = end.clamp(min=0) + first * step
            passed = torch.where(is_rest, reached // length, 0)
            opened = is_bar + passed + (is_rest & (end < 0))
            end = torch.where(is_rest, reached - passed * length, end)
            fits &= (kind != _POSITION) | ((first > position) & (first < limit))
            position = torch.where(kind == _POSITION, first, torch.where(is_bar, -1, position))
            sounds = (position + torch.where(kind == _NOTE, first, 0)) * step
            end = torch.where((kind == _POSITION) | (kind == _NOTE), torch.maximum(end, sounds), end)
            position = torch.where(is_rest, -(-end // step) - 1, position)
            bars, empty = bars + opened, empty + opened
            has_room &= (opened == 0) | (empty <= self.max_empty_bars + 1)
            empty = torch.where(kind == _NOTE, 0, empty)
            limit = torch.where(is_meter, first, limit)
            step = torch.where(is_meter, second, step)
            at_line = is_bar | ((kind == _NOTHING) & at_line)
        return _Place(*torch.broadcast_tensors(end, step, position, limit, bars, empty, fits, has_room))


_COLUMNS = ("kind", "first", "second")


def step_tables(tokenizer: MusicTokenizer) -> dict[str, Tensor]:
    """How the ids of REMI with rests move in time.

    Returns:
        `dict[str, Tensor]`:

        - `step_kind`, `step_first`, `step_second` (vocab, steps): bar lines, meters, positions, durations and rests in
          order, padded; a position, or how many; ticks per position of a meter;
        - `rest_ids` (ids,): those that hold a rest; `ends_in_rest`, `meter_first` (vocab,): whether an id ends in one,
          or begins with a meter.
    """
    texts = tokens_of_ids(tokenizer)
    steps = [[step for token in tokens if (step := _step(tokenizer, token))] for tokens in texts]
    width = max(map(len, steps))
    padded = torch.tensor([each + [(_NOTHING, 0, 0)] * (width - len(each)) for each in steps])
    kinds = [[kind_of(token) for token in tokens] for tokens in texts]
    return {
        **{f"step_{name}": padded[..., column] for column, name in enumerate(_COLUMNS)},
        "rest_ids": torch.tensor([index for index, each in enumerate(kinds) if "Rest" in each]),
        "ends_in_rest": torch.tensor([each[-1] == "Rest" for each in kinds]),
        "meter_first": torch.tensor([each[0] == "TimeSig" for each in kinds]),
    }


def _step(tokenizer: MusicTokenizer, token: str) -> tuple[int, int, int] | None:
    """What a base token does in [`step_tables`], if anything."""
    kind, _, value = token.partition("_")
    per_beat = int(tokenizer.config.max_num_pos_per_beat)
    if kind == "Bar":
        return _BAR, 0, 0
    if kind == "Position":
        return _POSITION, int(value), 0
    if kind == "TimeSig":
        numerator, denominator = map(int, value.split("/"))
        return _METER, numerator * per_beat, int(tokenizer._tpb_per_ts[denominator]) // per_beat
    if kind in ("Duration", "Rest"):
        beats, part, parts = map(int, value.split("."))
        return _NOTE if kind == "Duration" else _REST, beats * per_beat + part * per_beat // parts, 0
    return None
