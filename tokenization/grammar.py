"""Which tokens may follow: a logits processor under which whatever a model samples is valid music.

MidiTok knows which *type* of token may follow which. That alone allows a PitchDrum under a piano, a position before
the previous one or behind the bar line, one note many times at once, and empty bars without end. Here every id is read
once, beforehand, for what it requires of the music before it and what it leaves behind; an id may follow if *all* base
tokens it stands for may. The state of the music is carried from call to call, so a token costs the same however long
the piece is. Rows that do not continue what the last call saw (another prompt) are read from their start.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from miditok import MusicTokenizer
from torch import Tensor
from transformers import LogitsProcessor

from .errors import InputError
from .grammar_tables import (
    DRUMS,
    DRUMS_ROW,
    NOTES,
    PITCHES,
    PROGRAMS,
    UNSET,
    grammar_tables,
    number_of,
)
from .grammar_types import EFFECTS, check_supported, kind_of
from .tokenizer import EOS

# From the start of a sequence, or from any note, the next note is complete within this many base tokens.
MAX_SILENT_TOKENS = 16
# After the first note, if there are also pedals, bends and the like, of which many may come between two notes.
MAX_SILENT_EFFECTS = 64

# The columns of a state. The first four are what an id leaves behind, the next three are counts.
_LAST, _POSITION, _LIMIT, _PROGRAM, _SILENCE, _EMPTY, _BARS, _ONSET, _NOTES, _HELD, _PROMPTED = range(11)
_LEFT, _COUNTS = slice(_LAST, _PROGRAM + 1), slice(_SILENCE, _BARS + 1)


@dataclass
class State:
    """Where the music of every row stands.

    Args:
        values (`LongTensor` of shape (batch, 11)):
            The columns above: type of the last token; position, positions per bar; program in force; base tokens and
            bars since the last complete note, bars; number of the onset, notes; whether the onset is the prompt's
            last, notes of the prompt.
        stamps (`LongTensor` of shape (batch, notes)): the onset at which each note, program by program, last began.
        used (`LongTensor` of shape (batch, programs + 1)): notes that begin at this onset; the last column is unused.
        played (`BoolTensor` of shape (batch, programs)): programs of the prompt, and of the controls before it.
    """

    values: Tensor
    stamps: Tensor
    used: Tensor
    played: Tensor

    @property
    def last(self) -> Tensor:
        """The type of the last token, of shape (batch,)."""
        return self.values[:, _LAST]

    @property
    def program(self) -> Tensor:
        """The row of the program in force, of shape (batch, 1)."""
        return self.values[:, _PROGRAM, None]

    @property
    def onset(self) -> Tensor:
        """The number of the onset, of shape (batch, 1)."""
        return self.values[:, _ONSET, None]

    def rows(self, indices: Tensor) -> "State":
        return State(self.values[indices], self.stamps[indices], self.used[indices], self.played[indices])

    def joined(self, other: "State") -> "State":
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("values", "stamps", "used", "played")]
        return State(*(torch.cat(pair) for pair in pairs))


class MidiGrammar(LogitsProcessor):
    """Forbids every id after which a sequence would not be valid music.

    Padding, begin-of-sequence and control tokens are never sampled, end-of-sequence only right after a complete note;
    positions grow within a bar and stay inside its meter; drum pitches belong to the drum program. Every sample holds
    a note: at most 16 base tokens after BOS and the controls, whatever the model prefers. At one onset, an instrument
    begins a pitch once. Only instruments that are known play: those of the prompt, or without one `programs`. A
    continuation adds nothing to the last onset of its prompt. In every row at least one id is allowed: where a prompt
    breaks off inside a note, these last rules give way.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            From [`~midimamba.tokenization.tokenizer.build_tokenizer`], trained or not.
        max_empty_bars (`int`, *optional*, defaults to 2):
            At most this many consecutive bars may have no note.
        max_bars (`int`, *optional*):
            At most this many new bars per sequence. Where the model would open one more, the sequence ends: the
            probability of a further bar goes to end-of-sequence.
        min_bars (`int`, *optional*, defaults to 0):
            A sequence does not end before it has this many new bars; the last of them has a note.
        max_notes (`int`, *optional*, defaults to 32):
            At most this many notes begin at one onset. Ten fingers and a band stay below it.
        programs (`Collection[int]`, *optional*):
            The General MIDI programs, and -1 for drums, of music without a prompt; by default all.
        prompt_length (`int`, *optional*, defaults to 0):
            The first columns of `input_ids`, padding included, that are given: `inputs["input_ids"].shape[1]`. They
            decide the instruments, and their bars do not count.
        voices (`int`, *optional*):
            At most this many of the notes that begin at one onset are not drums. By default any number.
        meters (`Sequence[str]`, *optional*):
            The time signatures of the new bars, such as `["4/4", "3/4"]`. Exactly these bars are sampled, and the last
            of them may end without a note. For filling a gap; `max_bars` and `min_bars` then have no effect.

    Raises:
        InputError: if there are no rules for the tokenization, or for one of its options.
        ValueError: if a number makes no sense, or bars are to be counted where the tokenization has no bar tokens.
    """

    tokenizations: tuple[str, ...] = ("REMI", "TSD", "Structured")
    # Whether the next note may come later than in time where nothing else can be sampled.
    _may_take_longer = False

    def __init__(
        self,
        tokenizer: MusicTokenizer,
        max_empty_bars: int = 2,
        max_bars: int | None = None,
        min_bars: int = 0,
        max_notes: int = 32,
        programs: Collection[int] | None = None,
        prompt_length: int = 0,
        voices: int | None = None,
        meters: Sequence[str] | None = None,
    ) -> None:
        check_supported(tokenizer)
        if (name := type(tokenizer).__name__) not in self.tokenizations:
            raise InputError(f"{type(self).__name__} is for {', '.join(self.tokenizations)}, not {name}")
        if meters is not None:
            max_bars = min_bars = len(meters)
        if max_bars is not None and max_bars < max(min_bars, 1):
            raise ValueError("max_bars must be at least 1, and not less than min_bars")
        if (max_bars is not None or min_bars) and not tokenizer.token_ids_of_type("Bar"):
            raise ValueError("max_bars and min_bars need a tokenization with bars such as REMI")
        if max_notes < 1 or (voices is not None and voices < 1):
            raise ValueError("max_notes and voices must be at least 1")
        self.max_empty_bars = max_empty_bars
        self.max_bars = max_bars
        self.min_bars = min_bars
        self.max_notes = max_notes
        self.voices = max_notes if voices is None else min(max_notes, voices)
        self.prompt_length = prompt_length
        self.eos_token_id: int = tokenizer.vocab[EOS]
        known = torch.arange(PROGRAMS) + DRUMS
        allowed = torch.ones(PROGRAMS, dtype=torch.bool)
        if programs:
            allowed = torch.isin(known, torch.tensor(sorted(programs)))
        allowed &= torch.isin(known, torch.tensor(sorted(tokenizer.config.programs)))
        self.fills = meters is not None
        has_effects = bool(EFFECTS & {kind_of(token) for token in tokenizer.vocab})
        self._patience = MAX_SILENT_EFFECTS if has_effects else MAX_SILENT_TOKENS
        self._tables = self._make_tables(tokenizer) | {
            "programs": allowed,
            "meters": torch.tensor([number_of(meter) for meter in meters or ()]),
        }
        # What the last call saw: its ids, in a buffer that grows, and the state after them.
        self._ids = torch.empty(0, 0, dtype=torch.long)
        self._time = 0
        self._state = self._begin(0)

    def _make_tables(self, tokenizer: MusicTokenizer) -> dict[str, Tensor]:
        return grammar_tables(tokenizer, self.max_notes, self.voices)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of ids that may not follow to -inf.

        Args:
            input_ids (`torch.LongTensor` of shape (batch, time)):
                The sequences so far: padded on the left or not, with or without begin-of-sequence. Time may be 0.
            scores (`torch.FloatTensor` of shape (batch, vocab)):
                Logits. Columns beyond the tokenizer's vocabulary are also forbidden.

        Returns:
            `torch.FloatTensor` of shape (batch, vocab).
        """
        if self._ids.device != input_ids.device:
            self._tables = {name: table.to(input_ids.device) for name, table in self._tables.items()}
            self._ids, self._time = input_ids[:0], 0
        self._state = self._follow(input_ids)
        return self._forbid(scores)

    def step(self, ids: Tensor, scores: Tensor) -> Tensor:
        """As a call for the sequences of the last call with one more id each, none of which is kept.

        So a sequence that never ends takes no memory, and an id costs the same however many came before.

        Args:
            ids (`torch.LongTensor` of shape (batch,)):
                What was sampled after the last call.
            scores (`torch.FloatTensor` of shape (batch, vocab)):
                As for a call.
        """
        self._read(self._state, ids, self._time)
        self._time += 1
        self._ids = self._ids[:, :0]  # a call with whole sequences reads them from their start
        return self._forbid(scores)

    def _forbid(self, scores: Tensor) -> Tensor:
        """The scores with -inf for ids that may not follow now."""
        state = self._state
        allowed = self._allowed(state)
        music = scores[:, : allowed.shape[1]]
        if self.max_bars is not None:
            beyond = allowed & (self._tables["bars"] + state.values[:, _BARS, None] > self.max_bars)
            music = self._end_instead(music, beyond)
            allowed &= ~beyond
        result = torch.full_like(scores, float("-inf"))
        result[:, : allowed.shape[1]] = music.masked_fill(~allowed, float("-inf"))
        return result

    def _end_instead(self, scores: Tensor, beyond: Tensor) -> Tensor:
        """Add the probability of the ids `beyond` the last bar to end-of-sequence; shapes (batch, vocab)."""
        further = scores.masked_fill(~beyond, float("-inf")).logsumexp(dim=1)
        scores = scores.clone()
        scores[:, self.eos_token_id] = torch.logaddexp(scores[:, self.eos_token_id], further)
        return scores

    # ---- what may follow ----

    def _allowed(self, state: State) -> Tensor:
        """Which ids may follow, of shape (batch, vocab). Every term below has that shape."""
        table, values = self._tables, state.values
        position, limit, program, silence, empty, held = (
            values[:, column, None] for column in (_POSITION, _LIMIT, _PROGRAM, _SILENCE, _EMPTY, _HELD)
        )
        programs = torch.where(values[:, _PROMPTED, None] > 0, state.played, table["programs"])
        # Under a program that may not play, a note needs one more token: another program.
        may_play = programs.gather(1, program)
        lead = torch.where(may_play, table["lead"], table["lead_named"])
        distance = torch.where(may_play[:, 0], table["distance"][values[:, _LAST]], table["named"][values[:, _LAST]])
        # A prompt may be silent for longer than allowed; then only the shortest way to a note is left.
        patience = torch.where(values[:, _NOTES, None] > 0, self._patience, MAX_SILENT_TOKENS)
        budget = torch.maximum(patience - silence, distance[:, None])

        allowed = table["follows"][values[:, _LAST]]
        allowed &= self._in_bar(position, limit)
        allowed &= (table["pitch_kind"] < 0) | (table["pitch_kind"] == (program == 0))
        allowed &= (table["lead_bars"] == 0) | (table["lead_bars"] + empty <= self.max_empty_bars + 1)
        has_ended = values[:, _LAST] == table["end_type"]
        if self.min_bars:
            is_full = (values[:, _BARS] >= self.min_bars) & (values[:, _EMPTY] == 0)
            allowed[:, self.eos_token_id] &= is_full | has_ended
        # After a pedal or the like, only if there is a new note.
        has_note = values[:, _NOTES] > values[:, _PROMPTED]
        allowed[:, self.eos_token_id] &= has_note | table["completes"][values[:, _LAST]] | has_ended
        if self.fills:
            allowed = self._in_meter(allowed, values)
        in_time = lead <= budget

        sayable = self._sayable(state, programs)
        sayable &= may_play | ~table["inherits"]
        sayable &= (held == 0) | ((table["lead_notes"] == 0) & ~table["ends"])
        sayable &= allowed
        # Only a prompt can leave nothing that is sayable, such as one that breaks off before a pitch.
        return _first_choice(sayable & in_time, sayable & self._may_take_longer, allowed & in_time)

    def _in_bar(self, position: Tensor, limit: Tensor) -> Tensor:
        """Which ids stay inside the open bar and go forward in it, of shape (batch, vocab); arguments (batch, 1)."""
        table = self._tables
        at_line = (table["meter_after"] == UNSET) | ((position + table["meter_after"]) % limit == 0)
        return at_line & (table["first_position"] > position) & (table["last_position"] < limit)

    def _in_meter(self, allowed: Tensor, values: Tensor) -> Tensor:
        """`allowed` of shape (batch, vocab) as far as bars have the meters that are wanted."""
        table = self._tables
        bars = values[:, _BARS, None, None] + table["meter_bar"] - 1  # (batch, vocab, meters)
        wanted = table["meters"][bars.clamp(min=0, max=len(table["meters"]) - 1)]
        allowed &= ((table["meter_of"] == UNSET) | (table["meter_of"] == wanted)).all(dim=2)
        is_last = (values[:, _BARS] == self.max_bars) & (values[:, _NOTES] > 0)
        allowed[:, self.eos_token_id] |= is_last & table["is_head"][values[:, _LAST]]
        return allowed

    def _sayable(self, state: State, programs: Tensor) -> Tensor:
        """Which ids keep every onset to notes that MIDI can tell apart and `programs` may play, (batch, vocab)."""
        table = self._tables
        program, onset = state.values[:, _PROGRAM, None], state.values[:, _ONSET, None]
        used = state.used[:, :PROGRAMS]
        # A note twice: once at this onset already, or under the inherited program and the same one by name.
        index = torch.where(table["note_program"] == UNSET, program, table["note_program"]) * PITCHES
        present = state.stamps.gather(1, index + table["note_pitch"]) == onset
        twice = torch.zeros(len(used), len(table["lead"]), device=used.device)
        twice.index_add_(1, table["note_id"], present.float())
        sayable = (twice == 0) & ~table["clashes"][program[:, 0]]
        sayable &= used.sum(dim=1, keepdim=True) + table["lead_notes"] <= self.max_notes
        pitched = used[:, DRUMS_ROW + 1 :].sum(dim=1, keepdim=True)
        inherited = torch.where(program == DRUMS_ROW, 0, table["lead_inherited"])
        sayable &= pitched + table["lead_pitched"] + inherited <= self.voices
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
        has_voice = pitched * goes_on + table["tail_pitched"][ids] < self.voices
        drums = used[:, DRUMS_ROW, None] * goes_on + table["tail_drums"][ids]
        return has_voice | (programs[:, DRUMS_ROW, None] & (drums < table["pitches"][DRUMS_ROW]))

    # ---- where the music stands ----

    def _begin(self, rows: int) -> State:
        """The state of rows without ids: as after begin-of-sequence."""
        begin = self._tables["begin"]
        values = begin.new_zeros(rows, 11)
        values[:, _LEFT], values[:, _COUNTS] = begin, self._tables["begin_counts"]
        values[:, _ONSET] = 1
        used = begin.new_zeros(rows, PROGRAMS + 1)
        played = torch.zeros(rows, PROGRAMS, dtype=torch.bool, device=begin.device)
        return State(values, begin.new_zeros(rows, NOTES + PITCHES), used, played)

    def _follow(self, input_ids: Tensor) -> State:
        """The state after `input_ids` of shape (batch, time). Remembers both."""
        rows, time = input_ids.shape
        seen = self._time if time >= self._time else 0
        before, continues = input_ids[:, :seen], len(self._ids) == rows
        if seen == 0:
            state, continues = self._begin(rows), False
        elif continues and torch.equal(before, self._ids[:, :seen]):
            state = self._state
        else:
            state, continues = self._reordered(before), False
        for step in range(seen, time):
            self._read(state, input_ids[:, step], step)
        if continues and time <= self._ids.shape[1]:
            self._ids[:, seen:time] = input_ids[:, seen:]
        else:
            self._ids = torch.cat([input_ids, torch.zeros_like(input_ids)], dim=1)  # room for as many again
        self._time = time
        return state

    def _reordered(self, before: Tensor) -> State:
        """The state after `before` of shape (batch, time), where the last call saw other rows of that length.

        Beams are reordered and batches cut: each row that was seen brings its state along. Others are read.
        """
        places = {_key(row): place for place, row in enumerate(self._ids[:, : before.shape[1]])}
        found = [places.get(_key(row)) for row in before]
        new = [row for row, place in enumerate(found) if place is None]
        state = self._state
        if new:
            other = self._begin(len(new))
            for step, ids in enumerate(before[new].T):
                self._read(other, ids, step)
            state = state.joined(other)
        first_new = iter(range(len(self._state.values), len(state.values)))
        order = [next(first_new) if place is None else place for place in found]
        return state.rows(torch.tensor(order, dtype=torch.long, device=before.device))

    def _read(self, state: State, ids: Tensor, step: int) -> None:
        """Take in one id per row, in place. Padding and controls change nothing but what was asked for."""
        table, values = self._tables, state.values
        inherited = values[:, _PROGRAM, None].clone()
        left, moves, begins = table["left"][ids], table["moves"][ids, None], table["begins"][ids, None]
        values[:, _LEFT] = torch.where(left == UNSET, values[:, _LEFT], left)
        values[:, _POSITION] += table["advance"][ids]
        values[:, _COUNTS] = values[:, _COUNTS] * table["keeps"][ids] + table["adds"][ids]
        values[:, _ONSET, None] += moves
        values[:, _NOTES, None] *= ~begins
        values[:, _NOTES] += table["num_notes"][ids]
        values[:, _HELD, None] *= ~moves

        program = table["tail_program"][ids]  # (batch, notes of the longest tail)
        program = torch.where(program == UNSET, inherited, program)
        notes = program * PITCHES + table["tail_pitch"][ids]
        state.stamps.scatter_(1, notes, values[:, _ONSET, None].expand_as(notes))
        state.used *= ~moves
        state.used.scatter_add_(1, program, torch.ones_like(program))
        if step < self.prompt_length:
            inherits = torch.zeros_like(state.played).scatter_(1, inherited, table["inherits"][ids, None])
            state.played &= ~begins
            state.played |= inherits | table["asked"][ids] | (table["programs_of_id"].T[ids] > 0)
        if step + 1 == self.prompt_length:
            first = self._tables["begin_counts"][-1]
            values[:, _BARS] = torch.where(values[:, _NOTES] > 0, 0, first)
            values[:, _PROMPTED] = values[:, _NOTES]
            values[:, _HELD] = state.used[:, :PROGRAMS].sum(dim=1) > 0


def _first_choice(*choices: Tensor) -> Tensor:
    """For every row, the first of these masks of shape (batch, vocab) that allows anything, or else the last."""
    *others, result = choices
    for choice in reversed(others):
        result = torch.where(choice.any(dim=1, keepdim=True), choice, result)
    return result


def _key(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
