"""The grammar of MIDILike, whose notes begin and end by tokens of their own."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .constraints import DRUMS
from .grammar import MidiGrammar
from .grammar_state import State
from .grammar_tables import DRUMS_ROW, NOTES, PITCHES, PROGRAMS, UNSET
from .grammar_types import kind_of
from .tokenizer import expand_ids

_STARTS, _OFFS, _TIMES = {"Pitch", "PitchDrum"}, {"NoteOff", "DrumOff"}, {"TimeShift", "Rest"}


class MidiLikeGrammar(MidiGrammar):
    """[`MidiGrammar`] of MIDILike.

    A note ends only if it sounds and began earlier, and a pitch begins only if it does not sound in that instrument.
    End-of-sequence comes after the last note has ended. Where ids are cut off before, decoding ends the notes that
    still sound. Within 16 base tokens a note begins or one ends.

    A state holds for each note, program by program, the onset at which it began, and 0 once it has ended.
    """

    tokenizations = ("MIDILike",)
    # Where no pitch is free, a note must end first.
    _may_take_longer = True

    def _make_tables(self, tokenizer: MusicTokenizer, pitches: Tensor) -> dict[str, Tensor]:
        return super()._make_tables(tokenizer, pitches) | sounding_tables(tokenizer)

    def _sounds(self, state: State) -> Tensor:
        """Which notes sound, of shape (batch, programs, pitches)."""
        stamps = state.stamps[:, :NOTES].view(-1, PROGRAMS, PITCHES)
        return (stamps > 0) & self._tables["sustains"][:, None]

    def _narrow(
        self, state: State, structure: Tensor, has_room: Tensor, in_time: Tensor, sayable: Tensor
    ) -> tuple[Tensor, ...]:
        table, inherited = self._tables, state.program
        sayable = sayable & ~table["wrong_under"][inherited[:, 0]]
        sounds = self._sounds(state)
        began_before = sounds & (state.stamps[:, :NOTES].view_as(sounds) < state.onset[:, None])

        # What the first token about each note in an id asks for.
        program = torch.where(table["touch_program"] == UNSET, inherited, table["touch_program"])
        place = program * PITCHES + table["touch_pitch"]
        sounding, earlier = sounds.flatten(1).gather(1, place), began_before.flatten(1).gather(1, place)
        ends = torch.where(table["touch_moved"], sounding, earlier)
        wrong = torch.where(table["touch_ends"], ~ends, sounding)
        # Under the program that an id names later, its first token about a note was another one.
        wrong &= ~(table["touch_again"] & (program == inherited))
        found = torch.zeros(len(wrong), len(table["lead"]), device=wrong.device)
        sayable &= found.index_add_(1, table["touch_id"], wrong.float()) == 0

        sayable &= self._has_use(state, sounds.sum(dim=2), began_before.sum(dim=2))
        sayable[:, self.eos_token_id] &= ~sounds.flatten(1).any(dim=1)
        return structure, has_room, in_time, sayable

    def _has_use(self, state: State, sounds: Tensor, may_end: Tensor) -> Tensor:
        """Whether a note of the program that an id names last may begin or end, of shape (batch, vocab).

        Args:
            sounds (`LongTensor` of shape (batch, programs)): notes that sound.
            may_end (`LongTensor` of shape (batch, programs)): those that may end.
        """
        table = self._tables
        last, moves = table["last_program"], table["moves"]
        at = last.clamp(min=0)
        ends = torch.where(moves, sounds[:, at], may_end[:, at]) > table["num_offs"]
        # Notes that begin at the onset where the id ends.
        used = state.used[:, :PROGRAMS]
        size = used.sum(dim=1, keepdim=True) * ~moves + table["tail_size"]
        pitched = used[:, DRUMS_ROW + 1 :].sum(dim=1, keepdim=True) * ~moves + table["tail_pitched"]
        taken = torch.maximum(sounds[:, at], used[:, at] * ~moves) + table["begun"]
        begins = (taken < table["pitches"][at]) & (size < self.max_notes)
        begins &= (pitched < self.voices) | (at == DRUMS_ROW)
        return (last == UNSET) | ends | begins

    def _read(self, state: State, ids: Tensor, step: int) -> None:
        table, inherited = self._tables, state.program.clone()
        state.stamps *= ~table["begins"][ids, None]
        # First what belongs to the program before: what the id names comes later.
        for of_before in (True, False):
            program = table["final_program"][ids]
            is_theirs = (program == UNSET) if of_before else (program != UNSET)
            program = torch.where(program == UNSET, inherited, program)
            program = torch.where(is_theirs, program, PROGRAMS)
            place = program * PITCHES + table["final_pitch"][ids]
            state.stamps.scatter_(1, place, table["final_sounds"][ids] * state.onset)
        super()._read(state, ids, step)


class _Touch(NamedTuple):
    """A token about a note: whether it ends the note, and how often time moved in the id before."""

    program: int
    pitch: int
    ends: bool
    moves: int


def _touches(tokens: Sequence[str]) -> list[_Touch]:
    """The tokens about notes in an id."""
    program, moves = UNSET, 0
    found: list[_Touch] = []
    for token in tokens:
        kind, value = kind_of(token), token.split("_")[1]
        if kind == "Program":
            program = int(value) - DRUMS
        elif kind in _TIMES:
            moves += 1
        elif kind in _STARTS | _OFFS:
            found.append(_Touch(program, int(value), kind in _OFFS, moves))
    return found


def _is_consistent(touches: Iterable[_Touch], inherited: int, sustains: list[bool]) -> bool:
    """Whether tokens may follow each other under the program before them, whatever sounds there."""
    began: dict[tuple[int, int], int | None] = {}  # the moves before it began; `None` once it has ended
    for program, pitch, ends, moves in touches:
        program = inherited if program == UNSET else program
        if ends:
            start = began.get((program, pitch), -1)
            if not sustains[program] or start is None or start == moves:
                return False
            began[program, pitch] = None
        elif began.get((program, pitch)) is not None and (sustains[program] or began[program, pitch] == moves):
            return False
        else:
            began[program, pitch] = moves
    return True


def sounding_tables(tokenizer: MusicTokenizer) -> dict[str, Tensor]:
    """What the ids of MIDILike ask of the notes that sound, and what they leave.

    Returns:
        `dict[str, Tensor]`:

        - `sustains` (programs,): whether the notes of a program sound until they are ended;
        - `touch_id`, `touch_program`, `touch_pitch`, `touch_ends`, `touch_moved`, `touch_again` (touches,): the first
          token about each note in each id, whether it ends the note, whether time moved before, and whether there is
          one about this pitch of the program before the id;
        - `wrong_under` (programs, vocab): ids that contradict themselves under a program;
        - `final_program`, `final_pitch`, `final_sounds` (vocab, notes): notes that ended in an id, or began and are
          held when time moves, padded;
        - `num_offs`, `begun` (vocab,): ends and starts of notes; `tail_size` (vocab,): starts after time last moves;
        - `last_program` (vocab,): the program with which an id ends, of which a note must begin or end next.
    """
    durations = tokenizer.config.use_note_duration_programs
    sustains = [row + DRUMS in durations for row in range(PROGRAMS)]
    texts = [tokenizer._ids_to_tokens(expand_ids(tokenizer, [index])) for index in range(tokenizer.vocab_size)]
    ids = [_touches(tokens) for tokens in texts]
    firsts = [(index, *first) for index, touches in enumerate(ids) for first in _firsts(touches)]
    touched = torch.tensor(firsts, dtype=torch.long).reshape(-1, 6).T
    lasts = [{(touch.program, touch.pitch): touch for touch in touches}.values() for touches in ids]
    width = max(1, *map(len, lasts))
    finals = [[(touch.program, touch.pitch, not touch.ends) for touch in last] for last in lasts]
    padded = torch.tensor([final + [(PROGRAMS, 0, False)] * (width - len(final)) for final in finals])
    moved = [sum(kind_of(token) in _TIMES for token in tokens) for tokens in texts]
    last_begun = [
        sum(touch.moves == moves and not touch.ends for touch in touches)
        for touches, moves in zip(ids, moved, strict=True)
    ]
    return {
        "sustains": torch.tensor(sustains),
        "wrong_under": _wrong_under(ids, sustains),
        "final_program": padded[..., 0],
        "final_pitch": padded[..., 1],
        "final_sounds": padded[..., 2],
        "num_offs": torch.tensor([sum(touch.ends for touch in touches) for touches in ids]),
        "begun": torch.tensor([sum(not touch.ends for touch in touches) for touches in ids]),
        "tail_size": torch.tensor(last_begun),
        "last_program": torch.tensor(
            [int(t[-1].split("_")[1]) - DRUMS if kind_of(t[-1]) == "Program" else UNSET for t in texts]
        ),
        **{f"touch_{name}": touched[i] for i, name in enumerate(("id", "program", "pitch"))},
        **{f"touch_{name}": touched[3 + i].bool() for i, name in enumerate(("ends", "moved", "again"))},
    }


def _firsts(touches: Iterable[_Touch]) -> list[tuple[int, int, bool, bool, bool]]:
    """The rows of the `touch_` tables for one id."""
    seen: set[tuple[int, int]] = set()
    found = []
    for program, pitch, ends, moves in touches:
        if (program, pitch) not in seen:
            found.append((program, pitch, ends, moves > 0, (UNSET, pitch) in seen))
        seen.add((program, pitch))
    return found


def _wrong_under(ids: Sequence[list[_Touch]], sustains: list[bool]) -> Tensor:
    """The table `wrong_under`. A program that an id doesn't name stands for all like it."""
    wrong = torch.zeros(PROGRAMS, len(ids), dtype=torch.bool)
    rows = torch.tensor(sustains)
    for index, touches in enumerate(ids):
        named = {touch.program for touch in touches} - {UNSET}
        for is_sustained in set(sustains):
            others = (row for row in range(PROGRAMS) if sustains[row] == is_sustained and row not in named)
            wrong[rows == is_sustained, index] = not _is_consistent(touches, next(others, 0), sustains)
        for row in named:
            wrong[row, index] = not _is_consistent(touches, row, sustains)
    return wrong
