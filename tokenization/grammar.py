"""Which tokens may follow: a logits processor under which whatever a model samples is valid music.

MidiTok knows which *type* of token may follow which. That alone allows a PitchDrum under a piano, a position before
the previous one or behind the bar line, one note many times at once, and empty bars without end. Here every id is read
once, beforehand, for what it requires of the music before it and what it leaves behind; an id may follow if *all* base
tokens it stands for may. The state of the music is carried from call to call, so a token costs the same however long
the piece is. Rows that do not continue what the last call saw (another prompt) are read from their start.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from miditok import MusicTokenizer
from torch import Tensor
from transformers import LogitsProcessor

from .constraints import DRUMS, ConflictError, Constraints
from .errors import InputError
from .grammar_state import At, State
from .grammar_tables import (
    DRUMS_ROW,
    NOTES,
    PITCHES,
    PROGRAMS,
    UNSET,
    grammar_tables,
    keep_tables,
    number_of,
    pitches_of,
    playable,
)
from .grammar_torch import Limits, TorchRules
from .grammar_types import EFFECTS, check_plain, check_supported, kind_of, name_of
from .timed_rules import Now, TimedRules
from .tokenizer import EOS

if TYPE_CHECKING:
    from .grammar_numba import NumbaRules

# From the start of a sequence, or from any note, the next note is complete within this many base tokens.
MAX_SILENT_TOKENS = 16
TIMED = ("REMI", "TSD", "Structured")
"""The tokenizations for which there are constraints that depend on time."""
# After the first note, if there are also pedals, bends and the like, of which many may come between two notes.
MAX_SILENT_EFFECTS = 64

# The constraints that bound how many notes a bar can have.
_CROWDING = ("scale", "pitch_range", "instruments", "polyphony", "grid")


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
        constraints ([`~midimamba.tokenization.constraints.Constraints`] or `Mapping[str, Any]`, *optional*):
            What else new music must keep to. No note breaks them; where a prompt leaves nothing that keeps to them,
            the sequence ends, or a `ConflictError` says so if it has too few bars. Their `instruments` replace
            `programs` and the instruments of a prompt.

    Raises:
        InputError: if there are no rules for the tokenization or for one of its options, or constraints cannot be
            kept together.
        ValueError: if a number makes no sense, or bars are to be counted where the tokenization has no bar tokens.
    """

    tokenizations: tuple[str, ...] = ("REMI", "TSD", "Structured")
    # After the first note, the next one comes within this many base tokens.
    _longest_silence = MAX_SILENT_TOKENS
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
        constraints: Constraints | Mapping[str, Any] | None = None,
    ) -> None:
        check_supported(tokenizer)
        if (name := name_of(tokenizer)) not in self.tokenizations:
            raise InputError(f"{type(self).__name__} is for {', '.join(self.tokenizations)}, not {name}")
        self.constraints = Constraints.of(constraints)
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
        polyphony = None if self.constraints is None else self.constraints.polyphony
        self.voices = min(number for number in (max_notes, voices, polyphony) if number is not None)
        self.prompt_length = prompt_length
        self.eos_token_id: int = tokenizer.vocab[EOS]
        self._closing_id = self._last_id(tokenizer)
        self.fills = meters is not None
        has_effects = bool(EFFECTS & {kind_of(token) for token in tokenizer.vocab})
        self._patience = max(self._longest_silence, MAX_SILENT_EFFECTS if has_effects else 0)
        pitches = playable(tokenizer, self.constraints)
        asked = type(self), pitches.numpy().tobytes(), max_notes, self.voices
        self._tables = keep_tables(tokenizer, "rules", asked, lambda: self._make_tables(tokenizer, pitches)) | {
            "programs": self._check_programs(tokenizer, pitches, programs),
            "meters": torch.tensor([number_of(meter) for meter in meters or ()]),
            "own": self._own(tokenizer),
        }
        self._rules = self._make_rules(tokenizer, meters or ())
        self._limits = self._make_limits()
        self._common = self._make_common()
        # What the last call saw: its ids, in a buffer that grows, and the state after them.
        self._ids = torch.empty(0, 0, dtype=torch.long)
        self._time = 0
        self._state = self._begin(0)

    def _make_tables(self, tokenizer: MusicTokenizer, pitches: Tensor) -> dict[str, Tensor]:
        return grammar_tables(tokenizer, pitches, self.max_notes, self.voices)

    def _last_id(self, tokenizer: MusicTokenizer) -> int:
        """The id that ends the last bar."""
        return tokenizer.vocab[EOS]

    def _own(self, tokenizer: MusicTokenizer) -> Tensor:
        """What a tokenization remembers of a sequence besides, at its start, of shape (columns,)."""
        return torch.zeros(0, dtype=torch.long)

    def _make_limits(self) -> Limits:
        return Limits(
            *(self.eos_token_id, self.min_bars, self.max_empty_bars),
            *(self._patience, MAX_SILENT_TOKENS, self.max_notes, self.voices),
        )

    def _make_common(self) -> "TorchRules | NumbaRules":
        """The rules that all tokenizations share, as one kernel where that is possible."""
        limits = self._limits
        if self._tables["lead"].device.type != "cpu" or find_spec("numba") is None:
            return TorchRules(self._tables, limits)
        from .grammar_numba import NumbaRules

        return NumbaRules(self._tables, limits)

    def _check_programs(self, tokenizer: MusicTokenizer, pitches: Tensor, programs: Collection[int] | None) -> Tensor:
        """Which programs may play without a prompt, of shape (programs,)."""
        constraints, known = self.constraints, sorted(tokenizer.config.programs)
        whose = "the instruments of the training data" if programs else "all instruments"
        whose = "the instruments of the gap" if self.fills else whose
        if constraints is not None:
            if constraints.programs is not None:
                programs, whose = constraints.programs, "the wanted instruments"
            available = {drums: pitches_of(tokenizer, drums) for drums in (True, False)}
            constraints.check_pitches(programs or known, available, whose)
        rows = torch.arange(PROGRAMS) + DRUMS
        return torch.isin(rows, torch.tensor(sorted({*(programs or known)} & {*known}))) & pitches.any(dim=1)

    def _make_rules(self, tokenizer: MusicTokenizer, meters: Sequence[str]) -> TimedRules | None:
        """The rules of the constraints that depend on time, if there are any."""
        constraints = self.constraints
        if constraints is None or not constraints.timed:
            return None
        if (name := name_of(tokenizer)) not in TIMED:
            wanted = constraints.timed[0]
            others = "REMI" if wanted == "notes_per_bar" else "REMI, TSD, Structured or BEAT"
            raise ConflictError(f"{wanted} needs {others}, not {name}: leave it out")
        check_plain(tokenizer, constraints.timed[0])
        has_bars = bool(tokenizer.token_ids_of_type("Bar"))
        constraints.check_timing(has_bars, name, tokenizer.config.max_num_pos_per_beat)
        rules = TimedRules(tokenizer, constraints, meters)
        names = ("moves", "tail_pitched", "tail_drums", "bars", "ends")
        rules.tables = rules.tables | {name: self._tables[name] for name in names}
        self._check_density(rules, self._tables["programs"][None])
        return rules

    def _check_density(self, rules: TimedRules, programs: Tensor) -> None:
        """Refuse more notes per bar than rows of programs, of shape (rows, programs), can begin in one."""
        if not rules.least:
            return
        at_once = int(torch.cat(self._most_at_once(programs), dim=1).sum(dim=1).min())
        constraints, places = self.constraints, rules.fewest_places
        assert constraints is not None
        if at_once * places < rules.least:
            limits = [f"{name} {getattr(constraints, name)}" for name in _CROWDING if getattr(constraints, name)]
            raise ConflictError(
                f"notes_per_bar {constraints.notes_per_bar} is more than fits: with "
                f"{', '.join(limits) or 'these instruments'}, {at_once} notes can begin at each of the {places} "
                f"positions of {'a wanted bar' if self.fills else 'the longest bar'}"
            )

    def _most_at_once(self, programs: Tensor) -> tuple[Tensor, Tensor]:
        """How many pitched notes and drums an onset may have, whatever sounds; of shape (rows, 1) each.

        Args:
            programs (`BoolTensor` of shape (rows, programs)): those that may play.
        """
        room = self._tables["pitches"] * programs
        pitched = room[:, DRUMS_ROW + 1 :].sum(dim=1, keepdim=True).clamp(max=self.voices)
        return pitched, torch.minimum(room[:, DRUMS_ROW, None], self.max_notes - pitched)

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
            self._common = self._make_common()
            if self._rules is not None:
                self._rules.tables = {name: table.to(input_ids.device) for name, table in self._rules.tables.items()}
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
        state, beyond = self._state, None
        if self.max_bars is not None:
            beyond = self._opened(state) + state.values[:, At.BARS, None] > self.max_bars
        allowed = self._allowed(state, beyond)
        music = scores[:, : allowed.shape[1]]
        if beyond is not None and bool((beyond := beyond & allowed).any()):
            music = self._end_instead(music, beyond)
            allowed &= ~beyond
        music = music.masked_fill(~allowed, float("-inf"))
        if music.shape == scores.shape:
            return music
        result = torch.full_like(scores, float("-inf"))
        result[:, : music.shape[1]] = music
        return result

    def _opened(self, state: State) -> Tensor:
        """How many bars each id opens, of shape (vocab,) or (batch, vocab)."""
        return self._tables["bars"]

    def _end_instead(self, scores: Tensor, beyond: Tensor) -> Tensor:
        """Add the probability of the ids `beyond` the last bar to that which ends it; shapes (batch, vocab)."""
        further = scores.masked_fill(~beyond, float("-inf")).logsumexp(dim=1)
        scores = scores.clone()
        scores[:, self._closing_id] = torch.logaddexp(scores[:, self._closing_id], further)
        return scores

    # ---- what may follow ----

    def _allowed(self, state: State, beyond: Tensor | None) -> Tensor:
        """Which ids may follow, of shape (batch, vocab). Every term below has that shape.

        Args:
            state (`State`): where the music stands.
            beyond (`BoolTensor` of shape (batch, vocab), *optional*): ids that open a bar too many.
        """
        values = state.values
        programs = self._playing(state)
        structure, has_room, in_time, sayable = self._narrow(state, *self._common.judge(state, programs))
        if self.fills:
            structure = self._in_meter(structure, values)
        allowed = structure & has_room
        timely = allowed & in_time
        if self.constraints is not None:
            return self._constrained(state, programs, (structure, timely, sayable), beyond)
        # Only a prompt can leave nothing that is sayable, such as one that breaks off before a pitch.
        return _first_choice(sayable & timely, sayable & allowed & self._may_take_longer, timely)

    def _playing(self, state: State) -> Tensor:
        """The programs that may play, of shape (batch, programs)."""
        return torch.where(state.values[:, At.PROMPTED, None] > 0, state.played, self._tables["programs"])

    def _narrow(
        self, state: State, structure: Tensor, has_room: Tensor, in_time: Tensor, sayable: Tensor
    ) -> tuple[Tensor, ...]:
        """What the common rules found, with what a tokenization asks for besides."""
        return structure, has_room, in_time, sayable

    def _constrained(
        self, state: State, programs: Tensor, found: tuple[Tensor, Tensor, Tensor], beyond: Tensor | None
    ) -> Tensor:
        """Which ids may follow under constraints, of shape (batch, vocab).

        Args:
            state (`State`): where the music stands.
            programs (`BoolTensor` of shape (batch, programs)): those that may play.
            found: which ids may follow by their types and positions; also by when a note must come; and which
                `programs` may play and MIDI can tell apart.
            beyond (`BoolTensor` of shape (batch, vocab), *optional*): ids that open a bar too many.
        """
        structure, allowed, sayable = found
        ahead = torch.ones_like(sayable)
        if self._rules is not None:
            hard, ahead = self._rules.allowed(state.clock, self._now(state, programs))
            sayable &= hard
        result = allowed & sayable & ahead
        possible = result if beyond is None else result & ~beyond
        if not bool((left := possible.any(dim=1)).all()):
            result = torch.where(left[:, None], result, self._after_prompt(state, structure & sayable, beyond))
        return result

    def _after_prompt(self, state: State, allowed: Tensor, beyond: Tensor | None) -> Tensor:
        """Where a prompt leaves nothing that keeps to all rules: what keeps to constraints, or else the end.

        Its notes may fill all voices for longer than a note may be awaited, or break off before a pitch.
        """
        allowed = allowed if beyond is None else allowed & ~beyond
        possible = allowed.any(dim=1, keepdim=True)
        bars, empty = state.values[:, At.BARS], state.values[:, At.EMPTY]
        if self.min_bars and not (possible[:, 0] | ((bars >= self.min_bars) & (empty == 0))).all():
            raise ConflictError(
                "beside the notes that the prompt leaves sounding, none keeps to the constraints: end them earlier"
            )
        return torch.where(possible, allowed, self._tables["ends"])

    def _now(self, state: State, programs: Tensor) -> Now:
        table, values = self._tables, state.values
        goes_on = ~table["moves"]
        used = state.used[:, :PROGRAMS]
        drums = used[:, DRUMS_ROW, None] * goes_on + table["tail_drums"]
        pitched = used[:, DRUMS_ROW + 1 :].sum(dim=1, keepdim=True) * goes_on + table["tail_pitched"]
        may_drum = programs[:, DRUMS_ROW, None]
        bars = values[:, At.BARS]
        is_last = torch.zeros_like(drums, dtype=torch.bool)
        if self.max_bars is not None:
            is_last = bars[:, None] + table["bars"] >= self.max_bars
        return Now(
            values[:, At.PROGRAM] > DRUMS_ROW,
            bars,
            is_last,
            may_drum & (drums < table["pitches"][DRUMS_ROW]),
            may_drum,
            *self._most_at_once(programs),
            pitched,
            drums,
        )

    def _in_meter(self, allowed: Tensor, values: Tensor) -> Tensor:
        """`allowed` of shape (batch, vocab) as far as bars have the meters that are wanted."""
        table = self._tables
        bars = values[:, At.BARS, None, None] + table["meter_bar"] - 1  # (batch, vocab, meters)
        wanted = table["meters"][bars.clamp(min=0, max=len(table["meters"]) - 1)]
        allowed &= ((table["meter_of"] == UNSET) | (table["meter_of"] == wanted)).all(dim=2)
        is_last = (values[:, At.BARS] == self.max_bars) & (values[:, At.NOTES] > 0)
        allowed[:, self.eos_token_id] |= is_last & table["is_head"][values[:, At.LAST]]
        return allowed

    # ---- where the music stands ----

    def _begin(self, rows: int) -> State:
        """The state of rows without ids: as after begin-of-sequence."""
        begin = self._tables["begin"]
        values = begin.new_zeros(rows, 11)
        values[:, At.LEFT], values[:, At.COUNTS] = begin, self._tables["begin_counts"]
        values[:, At.ONSET] = 1
        used = begin.new_zeros(rows, PROGRAMS + 1)
        played = torch.zeros(rows, PROGRAMS, dtype=torch.bool, device=begin.device)
        clock = torch.zeros(rows, 0, device=begin.device) if self._rules is None else self._rules.begin(rows)
        stamps = begin.new_zeros(rows, NOTES + PITCHES)
        return State(values, stamps, used, played, clock, self._tables["own"].repeat(rows, 1))

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
        values = state.values
        if self._rules is not None:
            begins = self._tables["begins"][ids, None]
            self._rules.read(state.clock, ids, values[:, At.PROGRAM] > DRUMS_ROW, begins)
        self._common.read(state, ids, step < self.prompt_length)
        if step + 1 == self.prompt_length:
            first = self._tables["begin_counts"][-1]
            values[:, At.BARS] = torch.where(values[:, At.NOTES] > 0, 0, first)
            values[:, At.PROMPTED] = values[:, At.NOTES]
            values[:, At.HELD] = state.used[:, :PROGRAMS].sum(dim=1) > 0
            if self.fills:  # not those that happen to play in the bars before the gap
                state.played[:] = self._tables["programs"]
            if self.constraints is not None:
                self._constrain_prompt(state)

    def _constrain_prompt(self, state: State) -> None:
        """Let the instruments of prompts play as far as constraints let them."""
        constraints, table = self.constraints, self._tables
        assert constraints is not None
        prompted = state.values[:, At.PROMPTED] > 0
        if constraints.programs is not None:
            state.played[:] = table["programs"]
        had_pitched = state.played[:, DRUMS_ROW + 1 :].any(dim=1)
        state.played &= table["pitches"] > 0
        pitched = state.played[:, DRUMS_ROW + 1 :].any(dim=1)
        if not (pitched | (~had_pitched & state.played.any(dim=1)) | ~prompted).all():
            raise ConflictError(
                "scale and pitch_range leave no instrument of the prompt a pitch: widen one of them, or name "
                "instruments that have one"
            )
        if self._rules is not None and prompted.any():
            self._check_density(self._rules, state.played[prompted])


def _first_choice(*choices: Tensor) -> Tensor:
    """For every row, the first of these masks of shape (batch, vocab) that allows anything, or else the last."""
    result, *others = choices
    for choice in others:
        if bool((found := result.any(dim=1, keepdim=True)).all()):
            break
        result = torch.where(found, result, choice)
    return result


def _key(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
