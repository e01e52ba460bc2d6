"""The rules that the grammars of all tokenizations share, as one pass over the ids, compiled by Numba.

They are those of [`~midimamba.tokenization.grammar_torch.TorchRules`], whose eighty operations for every token take
most of their time to be called. Numba compiles a kernel at its first call, and keeps the result beside this file or in
the user's cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .grammar_state import At, State
from .grammar_tables import ANY, DRUMS_ROW, NOTES, PITCHES, PROGRAMS, UNSET, Tables
from .grammar_torch import Limits

try:  # transformers reads the imports of published code, and requires all that are not within a `try`
    from numba import njit
except ImportError as error:
    raise ImportError("the fast grammar needs Numba: pip install numba") from error


def _kernel(function: Callable[..., None]) -> Callable[..., None]:
    compiled: Callable[..., None] = njit(nogil=True, cache=True)(function)
    return compiled


# What is known of every id, as the columns of two tables. The last column of the first is made here.
_SOUND = ("lead_notes", "lead_pitched", "lead_inherited", "tail_notes", "tail_pitched", "tail_drums", "announces")
_PLACE = ("lead", "lead_named", "lead_bars", "pitch_kind", "meter_after", "first_position", "last_position")
_JUDGED = (*_SOUND, *_PLACE, "moves", "inherits")
_LEAD_NOTES, _LEAD_PITCHED, _LEAD_INHERITED, _TAIL_NOTES, _TAIL_PITCHED, _TAIL_DRUMS, _ANNOUNCES = range(7)
_LEAD, _LEAD_NAMED, _LEAD_BARS, _PITCH_KIND, _METER_AFTER, _FIRST_POSITION, _LAST_POSITION = range(7, 14)
_MOVES, _INHERITS, _NEEDS_ANY = range(14, 17)
_READ = ("advance", "num_notes", "moves", "begins", "inherits")
_ADVANCE, _NUM_NOTES, _READ_MOVES, _BEGINS, _READ_INHERITS = range(5)
_LEFT, _KEEPS, _ADDS = 5, 9, 12  # four columns, three, and three

# Columns of a state, as numbers: a kernel cannot read a class.
_LAST, _POSITION, _LIMIT, _PROGRAM, _SILENCE, _EMPTY, _BARS = range(At.LAST, At.ONSET)
_ONSET, _NOTES, _HELD, _PROMPTED = At.ONSET, At.NOTES, At.HELD, At.PROMPTED


class NumbaRules:
    """
    What [`~midimamba.tokenization.grammar_torch.TorchRules`] computes, for tables and states on the processor.

    Args:
        tables (`dict[str, Tensor]`): of [`~midimamba.tokenization.grammar_tables.grammar_tables`].
        limits ([`~midimamba.tokenization.grammar_torch.Limits`]): the numbers that bound what is sampled.
    """

    def __init__(self, tables: Tables, limits: Limits):
        size = len(tables["lead"])
        needs_any = torch.zeros(size, dtype=torch.bool)
        needs_any[tables["any_id"]] = True
        judged = torch.stack([*(tables[name].long() for name in _JUDGED), needs_any], dim=1)
        read = [*(tables[name].long()[:, None] for name in _READ), tables["left"], tables["keeps"], tables["adds"]]
        named_id, named = tables["programs_of_id"].T.nonzero(as_tuple=True)
        programs = _starts(named_id, size), named
        kinds = torch.stack([tables["distance"], tables["named"], tables["completes"]])
        self._limits = *limits, int(tables["end_type"])
        self._judged = _arrays(
            *(judged, tables["follows"], kinds, tables["clashes"], tables["pitches"]),
            *(_starts(tables["note_id"], size), tables["note_program"], tables["note_pitch"], *programs),
        )
        self._read = _arrays(
            *(torch.cat(read, dim=1), tables["tail_program"], tables["tail_pitch"], tables["asked"], *programs),
        )
        self._size = size

    def judge(self, state: State, programs: Tensor) -> tuple[Tensor, ...]:
        """As that of `TorchRules`. Of an id that breaks the order of types, the other answers have no meaning."""
        found = torch.empty(4, len(programs), self._size, dtype=torch.bool)
        _judge(*self._judged, self._limits, *_arrays(state.values, state.stamps, state.used, programs, found))
        return found.unbind()

    def read(self, state: State, ids: Tensor, is_prompt: bool) -> None:
        """As that of `TorchRules`."""
        _read(*self._read, is_prompt, *_arrays(ids, state.values, state.stamps, state.used, state.played))


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.numpy() for tensor in tensors]


def _starts(ids: Tensor, size: int) -> Tensor:
    """Where the entries of each id begin in a list that is ordered by ids, and where the last ones end."""
    return torch.searchsorted(ids.contiguous(), torch.arange(size + 1))


@_kernel
def _judge(
    ids: Any,
    follows: Any,
    kinds: Any,
    clashes: Any,
    pitches: Any,
    note_start: Any,
    note_program: Any,
    note_pitch: Any,
    named_start: Any,
    named: Any,
    limits: tuple[int, ...],
    values: Any,
    stamps: Any,
    used: Any,
    programs: Any,
    found: Any,
) -> None:
    eos, min_bars, max_empty_bars, patience, first_patience, max_notes, voices, end_type = limits
    for row in range(len(values)):
        state, playing, notes = values[row], programs[row], used[row]
        last, position, program = state[_LAST], state[_POSITION], state[_PROGRAM]
        may_play = playing[program]
        waits = patience if state[_NOTES] > 0 else first_patience
        budget = max(waits - state[_SILENCE], kinds[0 if may_play else 1, last])
        has_ended = last == end_type
        may_end = has_ended or kinds[2, last] or state[_NOTES] > state[_PROMPTED]
        if min_bars and not has_ended:
            may_end = may_end and state[_BARS] >= min_bars and state[_EMPTY] == 0
        pitched, largest = 0, 0
        for other in range(PROGRAMS):
            pitched += notes[other] * (other != DRUMS_ROW)
            largest = max(largest, (pitches[other] - notes[other]) * playing[other])
        drums_play = playing[DRUMS_ROW]
        for index in range(len(ids)):
            what = ids[index]
            fits = follows[last, index] and what[_FIRST_POSITION] > position and what[_LAST_POSITION] < state[_LIMIT]
            fits = fits and (what[_PITCH_KIND] < 0 or what[_PITCH_KIND] == (program == DRUMS_ROW))
            if fits and what[_METER_AFTER] != UNSET:
                fits = (position + what[_METER_AFTER]) % state[_LIMIT] == 0
            if index == eos:
                fits = fits and may_end
            found[0, row, index] = fits
            if not fits and index != eos:
                found[1:, row, index] = False
                continue
            bars = what[_LEAD_BARS]
            found[1, row, index] = bars == 0 or bars + state[_EMPTY] <= max_empty_bars + 1
            found[2, row, index] = what[_LEAD if may_play else _LEAD_NAMED] <= budget
            # A note twice: once at this onset already, or under the inherited program and the same one by name.
            says = not clashes[program, index] and (may_play or not what[_INHERITS])
            # A prompt may have more notes at its last onset; then no more are added.
            leading = what[_LEAD_NOTES]
            says = says and (leading == 0 or pitched + notes[DRUMS_ROW] + leading <= max_notes)
            added = what[_LEAD_PITCHED] + (0 if program == DRUMS_ROW else what[_LEAD_INHERITED])
            says = says and (added == 0 or pitched + added <= voices)
            says = says and (state[_HELD] == 0 or (what[_LEAD_NOTES] == 0 and index != eos))
            for entry in range(note_start[index], note_start[index + 1]):
                whose = program if note_program[entry] == UNSET else note_program[entry]
                says = says and stamps[row, whose * PITCHES + note_pitch[entry]] != state[_ONSET]
            for entry in range(named_start[index], named_start[index + 1]):
                says = says and playing[named[entry]]
            if says and what[_NEEDS_ANY]:
                goes_on = 1 - what[_MOVES]
                drums = notes[DRUMS_ROW] * goes_on + what[_TAIL_DRUMS]
                says = pitched * goes_on + what[_TAIL_PITCHED] < voices or (drums_play and drums < pitches[DRUMS_ROW])
            # An id at whose end a note must follow needs a free pitch.
            due = what[_ANNOUNCES]
            room = largest if due == ANY else NOTES
            if due < ANY:
                room = (pitches[due] - notes[due]) * playing[due]
            found[3, row, index] = says and what[_TAIL_NOTES] < room


@_kernel
def _read(
    table: Any,
    tail_program: Any,
    tail_pitch: Any,
    asked: Any,
    named_start: Any,
    named: Any,
    is_prompt: bool,
    ids: Any,
    values: Any,
    stamps: Any,
    used: Any,
    played: Any,
) -> None:
    for row in range(len(ids)):
        index = ids[row]
        what, state = table[index], values[row]
        inherited = state[_PROGRAM]
        for column in range(4):
            if what[_LEFT + column] != UNSET:
                state[column] = what[_LEFT + column]
        state[_POSITION] += what[_ADVANCE]
        for column in range(3):
            state[_SILENCE + column] = state[_SILENCE + column] * what[_KEEPS + column] + what[_ADDS + column]
        if what[_READ_MOVES]:
            state[_ONSET] += 1
            state[_HELD] = 0
            used[row] = 0
        if what[_BEGINS]:
            state[_NOTES] = 0
        state[_NOTES] += what[_NUM_NOTES]
        for place in range(tail_program.shape[1]):
            program = tail_program[index, place]
            program = inherited if program == UNSET else program
            stamps[row, program * PITCHES + tail_pitch[index, place]] = state[_ONSET]
            used[row, program] += 1
        if is_prompt:
            if what[_BEGINS]:
                played[row] = False
            if what[_READ_INHERITS]:
                played[row, inherited] = True
            played[row] |= asked[index]
            for entry in range(named_start[index], named_start[index + 1]):
                played[row, named[entry]] = True
