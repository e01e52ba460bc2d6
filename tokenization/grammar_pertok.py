"""The grammar of PerTok, whose time shifts stay inside bars of 4/4, and whose notes come a little earlier or later."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .grammar import MidiGrammar
from .grammar_state import At, State
from .grammar_tables import UNSET
from .grammar_types import PROGRAM_TIMING, kinds_of, type_graph
from .tokenizer import BOS, expand_ids

_BEATS = 4
# Positions are ticks. Those after the first bar line are larger by this, so that a note may come before its bar.
_LATER = 1 << 40
_NONE = 1 << 50


class PerTokGrammar(MidiGrammar):
    """[`MidiGrammar`] of PerTok.

    Time shifts end before the next bar line, and no note begins before the piece. A first bar has no bar token, and
    counts nonetheless. At one place, an instrument begins a pitch once, and at most `voices` notes that aren't drums
    begin, whatever the microtiming. It may move notes of two places to the same tick, where more than `voices` begin.
    """

    tokenizations = ("PerTok",)

    def _make_tables(self, tokenizer: MusicTokenizer, pitches: Tensor) -> dict[str, Tensor]:
        tables = super()._make_tables(tokenizer, pitches) | shift_tables(tokenizer)
        types = type_graph(tokenizer).types
        left, bos = tables["left"], tokenizer.vocab[BOS]
        left[:, 1], left[:, 2] = tables["left_position"], tables["left_limit"]
        tables["begin"] = left[bos]
        tables["adds"][bos] = tables["begin_counts"] = torch.tensor([0, 1, 1])
        if PROGRAM_TIMING in types:
            tables["follows"][types.index("Program")] |= tables["is_timing"]
            tables["timings"] = torch.tensor([types.index("Program"), types.index(PROGRAM_TIMING)])
        return tables

    def _narrow(
        self, state: State, structure: Tensor, has_room: Tensor, in_time: Tensor, sayable: Tensor
    ) -> tuple[Tensor, ...]:
        table = self._tables
        position, limit = state.values[:, At.POSITION, None], state.values[:, At.LIMIT, None]
        fits = (table["farthest"] < 0) | (position + table["farthest"] < limit)
        fits &= table["in_bars"] & (position + table["earliest"] >= 0)
        return structure & fits, has_room, in_time, sayable

    def _read(self, state: State, ids: Tensor, step: int) -> None:
        before = state.last.clone()
        super()._read(state, ids, step)
        if "timings" in self._tables:
            program, program_timing = self._tables["timings"]
            state.last[self._tables["is_timing"][ids] & (before == program)] = program_timing


def shift_tables(tokenizer: MusicTokenizer) -> dict[str, Tensor]:
    """Where the ids of PerTok move in the bar.

    Returns:
        `dict[str, Tensor]`: of shape (vocab,) each,

        - `farthest`: ticks that time shifts move in the bar already open, or -1; `in_bars`: whether those in later
          bars stay inside them;
        - `earliest`: ticks from the position before to the earliest note in that bar; `is_timing`: whether an id is
          one microtiming, of a program or a note;
        - `left_position`, `left_limit`: the position that it leaves and the end of the bar, or `UNSET`; `advance`: how
          much it moves the position otherwise.
    """
    quarter = int(cast(Any, tokenizer).tpq)
    bar = _BEATS * quarter
    texts = [tokenizer._ids_to_tokens(expand_ids(tokenizer, [index])) for index in range(tokenizer.vocab_size)]
    names = ("farthest", "in_bars", "earliest", "left_position", "left_limit", "advance")
    columns = list(zip(*(_shifts(tokens, quarter, bar) for tokens in texts), strict=True))
    tables = {name: torch.tensor(column) for name, column in zip(names, columns, strict=True)}
    tables["is_timing"] = torch.tensor([len(tokens) == 1 and tokens[0].startswith("MicroTiming_") for tokens in texts])
    return tables


def _shifts(tokens: Sequence[str], quarter: int, bar: int) -> tuple[int, bool, int, int, int, int]:
    """The row of [`shift_tables`] for one id."""
    if tokens[0] == BOS:
        return -1, True, _NONE, 0, bar, 0
    farthest, earliest, in_bars, bars, moved = -1, _NONE, True, 0, 0
    for kind, token in zip(kinds_of(tokens), tokens, strict=True):
        value = token.split("_")[1]
        if kind == "Bar":
            bars, moved = bars + 1, 0
        elif kind == "TimeShift":
            beats, ticks, _ = map(int, value.split("."))
            moved += beats * quarter + ticks
            if bars:
                in_bars &= moved < bar
            else:
                farthest = moved
        elif not bars and kind in ("Pitch", "PitchDrum", "MicroTiming"):
            earliest = min(earliest, moved + (int(value) if kind == "MicroTiming" else 0))
    if bars:
        return farthest, in_bars, earliest, _LATER + moved, _LATER + bar, 0
    return farthest, in_bars, earliest, UNSET, UNSET, moved
