"""The rules that the grammars of all tokenizations share, in torch: for GPUs, and where there is no Numba."""

from typing import NamedTuple

import torch
from torch import Tensor

from .grammar_state import At, State
from .grammar_tables import DRUMS_ROW, NOTES, PITCHES, PROGRAMS, UNSET, Tables


class Limits(NamedTuple):
    """
    The numbers that bound what is sampled.

    Args:
        eos (`int`): the id of end-of-sequence.
        min_bars (`int`): the fewest new bars.
        max_empty_bars (`int`): the most consecutive bars without a note.
        patience, first_patience (`int`): base tokens within which a note must be complete: after a note, and at first.
        max_notes, voices (`int`): the most notes that begin at one onset, and those that aren't drums.
    """

    eos: int
    min_bars: int
    max_empty_bars: int
    patience: int
    first_patience: int
    max_notes: int
    voices: int


class TorchRules:
    """
    What [`~midimamba.tokenization.grammar_numba.NumbaRules`] computes as well.

    Args:
        tables (`dict[str, Tensor]`): of [`~midimamba.tokenization.grammar_tables.grammar_tables`].
        limits ([`Limits`]): the numbers that bound what is sampled.
    """

    def __init__(self, tables: Tables, limits: Limits):
        self._tables, self._limits = tables, limits

    def judge(self, state: State, programs: Tensor) -> tuple[Tensor, ...]:
        """What each id keeps to, of shape (batch, vocab) each: the order of types and positions; at most so many empty
        bars; the time within which a note must come; and notes that can be told apart and that `programs` may play.

        Args:
            state (`State`): where the music stands.
            programs (`BoolTensor` of shape (batch, programs)): those that may play.
        """
        table, values = self._tables, state.values
        position, limit, program, silence, empty, held = (
            values[:, column, None] for column in (At.POSITION, At.LIMIT, At.PROGRAM, At.SILENCE, At.EMPTY, At.HELD)
        )
        # Under a program that may not play, a note needs one more token: another program.
        may_play = programs.gather(1, program)
        lead = torch.where(may_play, table["lead"], table["lead_named"])
        distance = torch.where(
            may_play[:, 0], table["distance"][values[:, At.LAST]], table["named"][values[:, At.LAST]]
        )
        # A prompt may be silent for longer than allowed; then only the shortest way to a note is left.
        patience = torch.where(values[:, At.NOTES, None] > 0, self._limits.patience, self._limits.first_patience)
        budget = torch.maximum(patience - silence, distance[:, None])

        structure = table["follows"][values[:, At.LAST]]
        at_line = (table["meter_after"] == UNSET) | ((position + table["meter_after"]) % limit == 0)
        structure &= at_line & (table["first_position"] > position) & (table["last_position"] < limit)
        structure &= (table["pitch_kind"] < 0) | (table["pitch_kind"] == (program == 0))
        has_ended = values[:, At.LAST] == table["end_type"]
        if self._limits.min_bars:
            is_full = (values[:, At.BARS] >= self._limits.min_bars) & (values[:, At.EMPTY] == 0)
            structure[:, self._limits.eos] &= is_full | has_ended
        # After a pedal or the like, only if there is a new note.
        has_note = values[:, At.NOTES] > values[:, At.PROMPTED]
        structure[:, self._limits.eos] &= has_note | table["completes"][values[:, At.LAST]] | has_ended

        has_room = (table["lead_bars"] == 0) | (table["lead_bars"] + empty <= self._limits.max_empty_bars + 1)
        sayable = self._sayable(state, programs)
        sayable &= may_play | ~table["inherits"]
        sayable &= (held == 0) | ((table["lead_notes"] == 0) & ~table["ends"])
        return structure, has_room, lead <= budget, sayable

    def _sayable(self, state: State, programs: Tensor) -> Tensor:
        """Which ids keep every onset to notes that MIDI can tell apart and `programs` may play, (batch, vocab)."""
        table = self._tables
        program, onset = state.values[:, At.PROGRAM, None], state.values[:, At.ONSET, None]
        used = state.used[:, :PROGRAMS]
        # A note twice: once at this onset already, or under the inherited program and the same one by name.
        index = torch.where(table["note_program"] == UNSET, program, table["note_program"]) * PITCHES
        present = state.stamps.gather(1, index + table["note_pitch"]) == onset
        twice = torch.zeros(len(used), len(table["lead"]), device=used.device)
        twice.index_add_(1, table["note_id"], present.float())
        sayable = (twice == 0) & ~table["clashes"][program[:, 0]]
        # A prompt may have more notes at its last onset; then no more are added.
        leading = table["lead_notes"]
        sayable &= (leading == 0) | (used.sum(dim=1, keepdim=True) + leading <= self._limits.max_notes)
        pitched = used[:, DRUMS_ROW + 1 :].sum(dim=1, keepdim=True)
        added = table["lead_pitched"] + torch.where(program == DRUMS_ROW, 0, table["lead_inherited"])
        sayable &= (added == 0) | (pitched + added <= self._limits.voices)
        if len(table["any_id"]):
            sayable[:, table["any_id"]] &= self._has_voice(used, pitched, programs)
        sayable &= (~programs).float() @ table["programs_of_id"] == 0
        # An id at whose end a note must follow needs a free pitch.
        room = (table["pitches"] - used) * programs
        room = torch.cat([room, room.amax(dim=1, keepdim=True), torch.full_like(onset, NOTES)], dim=1)
        return sayable & (table["tail_notes"] < room[:, table["announces"]])

    def _has_voice(self, used: Tensor, pitched: Tensor, programs: Tensor) -> Tensor:
        """Whether one more note of some program may begin after each of `any_id`, of shape (batch, ids).

        Args:
            used (`LongTensor` of shape (batch, programs)): notes at the open onset.
            pitched (`LongTensor` of shape (batch, 1)): those that aren't drums.
            programs (`BoolTensor` of shape (batch, programs)): those that may play.
        """
        table, ids = self._tables, self._tables["any_id"]
        goes_on = ~table["moves"][ids]  # else it begins an onset of its own
        has_voice = pitched * goes_on + table["tail_pitched"][ids] < self._limits.voices
        drums = used[:, DRUMS_ROW, None] * goes_on + table["tail_drums"][ids]
        return has_voice | (programs[:, DRUMS_ROW, None] & (drums < table["pitches"][DRUMS_ROW]))

    def read(self, state: State, ids: Tensor, is_prompt: bool) -> None:
        """Take in one id per row, in place, without the constraints and the end of the prompt."""
        table, values = self._tables, state.values
        inherited = values[:, At.PROGRAM, None].clone()
        left, moves, begins = table["left"][ids], table["moves"][ids, None], table["begins"][ids, None]
        values[:, At.LEFT] = torch.where(left == UNSET, values[:, At.LEFT], left)
        values[:, At.POSITION] += table["advance"][ids]
        values[:, At.COUNTS] = values[:, At.COUNTS] * table["keeps"][ids] + table["adds"][ids]
        values[:, At.ONSET, None] += moves
        values[:, At.NOTES, None] *= ~begins
        values[:, At.NOTES] += table["num_notes"][ids]
        values[:, At.HELD, None] *= ~moves

        program = table["tail_program"][ids]  # (batch, notes of the longest tail)
        program = torch.where(program == UNSET, inherited, program)
        notes = program * PITCHES + table["tail_pitch"][ids]
        state.stamps.scatter_(1, notes, values[:, At.ONSET, None].expand_as(notes))
        state.used *= ~moves
        state.used.scatter_add_(1, program, torch.ones_like(program))
        if is_prompt:
            inherits = torch.zeros_like(state.played).scatter_(1, inherited, table["inherits"][ids, None])
            state.played &= ~begins
            state.played |= inherits | table["asked"][ids] | (table["programs_of_id"].T[ids] > 0)
