"""The grammar of BEAT, which writes the piano roll beat by beat: programs, pitches from above, a pattern for each.

A pattern holds four digits, one for each quarter of a beat: 0 is silence, 1 the start of a note, 2 a note that goes
on. So how many notes begin and sound at each quarter is known without looking ahead.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .constraints import ConflictError
from .grammar import MAX_SILENT_TOKENS, MidiGrammar
from .grammar_beat_tables import BEFORE, BELOW, STEPS, beat_tables, denominators, grid_table
from .grammar_state import At, State
from .grammar_tables import DRUMS_ROW, PITCHES, PROGRAMS, UNSET
from .grammar_torch import Limits
from .tokenizer import BOS

# What a row remembers: the last pitch of the open program, or -1; the place of that program among those of the beat,
# or -1; the denominator, as an index. Then for each step of the beat: pitched notes and drums that begin, pitched ones
# that sound.
_PREVIOUS, _ORDER, _METER = range(3)
_PITCHED, _DRUMS, _SOUNDS = (slice(3 + STEPS * part, 3 + STEPS * (part + 1)) for part in range(3))
_COLUMNS = 3 + 3 * STEPS
_NO_LIMIT = 1 << 20
_COARSEST = Fraction(1, 2)  # grid


class BeatGrammar(MidiGrammar):
    """[`MidiGrammar`] of BEAT.

    Every bar but the last has all its beats. In a beat, programs ascend, drums last, and pitches descend. A note goes
    on only where it sounds, of any track of its program. `polyphony` and `grid` are kept step by step. A bar counts as
    empty if no note begins in it, and within 512 base tokens one does.

    The stamp of a note is twice the number of the beat in which it was last written, and 1 more if it sounds at the
    end of it.
    """

    tokenizations = ("BEAT",)
    _may_take_longer = True
    _longest_silence = 512

    def _make_tables(self, tokenizer: MusicTokenizer, pitches: Tensor) -> dict[str, Tensor]:
        tables = super()._make_tables(tokenizer, pitches)
        limits = self.max_notes, self.voices, self._polyphony
        tables |= beat_tables(tokenizer, pitches, *limits)
        tables["fits"] &= tables["beats_fit"]
        tables["follows"] &= tables["beats_fit"]
        tables["left"][:, 1], tables["left"][:, 2] = tables["left_position"], tables["left_limit"]
        tables["begin"] = tables["left"][tokenizer.vocab[BOS]]
        tables["may_play"] = pitches
        return tables

    @property
    def _polyphony(self) -> int:
        return (self.constraints.polyphony if self.constraints is not None else None) or _NO_LIMIT

    def _own(self, tokenizer: MusicTokenizer) -> Tensor:
        own = torch.zeros(_COLUMNS, dtype=torch.long)
        own[_PREVIOUS], own[_ORDER] = -1, -1
        own[_METER] = denominators(tokenizer).index(4)
        return own

    def _make_limits(self) -> Limits:
        # The types of BEAT count a note where its pattern is. A velocity follows.
        return super()._make_limits()._replace(first_patience=MAX_SILENT_TOKENS - 1)

    def _make_rules(self, tokenizer: MusicTokenizer, meters: Sequence[str]) -> None:
        """There are none besides: what depends on time is kept here."""
        constraints = self.constraints
        if constraints is None:
            return
        if constraints.notes_per_bar is not None:
            raise ConflictError("notes_per_bar needs REMI, not BEAT: leave it out")
        constraints.check_timing(True, "BEAT", STEPS)
        if constraints.step is not None:
            if constraints.step > _COARSEST:  # the beats in between use up what may pass before the first note
                raise ConflictError(f"grid {constraints.grid} is too coarse for BEAT: choose {_COARSEST} or finer")
            grid = grid_table(tokenizer, constraints.step)
            last = [[max(b for b in range(beat + 1) if row[b].any()) for beat in range(len(row))] for row in grid]
            self._tables = self._tables | {"grid": grid, "last_beat": torch.tensor(last)}

    # ---- what may follow ----

    def _narrow(
        self, state: State, structure: Tensor, has_room: Tensor, in_time: Tensor, sayable: Tensor
    ) -> tuple[Tensor, ...]:
        structure = structure & self._in_order(state)
        sayable = sayable & self._has_steps(state) & self._in_range(state) & self._goes_on(state)
        if "grid" in self._tables:
            sayable &= self._on_grid(state)
        free = self._free_steps(state)
        sayable &= self._may_be_written(state, free)
        if self.max_bars is not None and self.min_bars and self.constraints is not None:
            sayable &= self._can_fill(state, free)
        return structure, has_room, in_time, sayable

    def _in_order(self, state: State) -> Tensor:
        """Whether bars have all their beats, programs ascend, and pitches descend."""
        table, values, own = self._tables, state.values, state.own
        reached = values[:, At.POSITION, None] + table["lead_beats"]
        limit = torch.where(table["own_limit"] == UNSET, values[:, At.LIMIT, None], table["own_limit"])
        fits = torch.where(table["has_bar"], reached == limit - 1, reached < limit)
        fits &= (table["inner_beats"] == UNSET) | (table["inner_beats"] == limit)
        fits &= (table["left_limit"] != UNSET) | (table["tail_beats"] <= limit)
        fits &= (table["first_order"] == UNSET) | (table["first_order"] >= own[:, _ORDER, None])
        before = own[:, _PREVIOUS, None]
        is_first = before < 0
        lowest = torch.where(is_first, table["first_interval"], before - table["first_interval"]) - table["drop"]
        fits &= (table["first_interval"] == UNSET) | ((is_first | (table["first_interval"] > 0)) & (lowest >= 0))
        return fits & ((table["first_drum"] == UNSET) | is_first | (table["first_drum"] < before))

    def _top(self, state: State, ids: Tensor) -> Tensor:
        """The first pitch of ids that need the one before it, of shape (rows, ids)."""
        before, interval = state.own[:, _PREVIOUS, None], self._tables["first_interval"][ids]
        return torch.where(before < 0, interval, before - interval)

    def _pitch(self, state: State, ids: Tensor, mode: Tensor, value: Tensor) -> Tensor:
        """Pitches as the tables tell them; those that cannot be are 0. Of shape (rows, …)."""
        top = self._top(state, ids) - value
        before = state.own[:, _PREVIOUS].view(-1, *[1] * (top.dim() - 1))
        found = torch.where(mode == BELOW, top, torch.where(mode == BEFORE, before, value))
        return found.clamp(0, PITCHES - 1)

    def _by_id(self, ids: Tensor, wrong: Tensor) -> Tensor:
        """Which ids have none of these entries that is wrong, of shape (rows, vocab)."""
        found = torch.zeros(len(wrong), len(self._tables["lead"]), device=wrong.device)
        return found.index_add_(1, ids, wrong.float()) == 0

    def _in_range(self, state: State) -> Tensor:
        """Whether programs may play the pitches, each once in a beat."""
        table, program = self._tables, state.program
        ids, named = table["pitch_id"], table["named_program"] * PITCHES + table["named_number"]
        pitch = self._pitch(state, ids, table["pitch_mode"], table["pitch_value"])
        wrong = ~table["may_play"][program, pitch]
        wrong |= state.stamps.gather(1, program * PITCHES + pitch) // 2 == state.onset
        twice = state.stamps[:, named] // 2 == state.onset
        fits = self._by_id(ids, wrong) & self._by_id(table["named_id"], twice)
        if not len(again := table["again_id"]):
            return fits
        other = self._pitch(state, again, table["again_mode"], table["again_value"])
        return fits & self._by_id(again, (other == table["again_number"]) & (program == table["again_program"]))

    def _has_steps(self, state: State) -> Tensor:
        """Whether no more notes begin and sound at a step than may."""
        table, own = self._tables, state.own[:, None]
        pitched = (state.program > DRUMS_ROW).long()[..., None]
        begin = table["now_pitched"] + table["now_begins"] * pitched
        drums = table["now_drums"] + table["now_begins"] * (1 - pitched)
        sound = table["now_sounds"] + table["now_lead_sounds"] * pitched
        fits = (begin == 0) | (own[..., _PITCHED] + begin <= self.voices)
        both = begin + drums
        fits &= (both == 0) | (own[..., _PITCHED] + own[..., _DRUMS] + both <= self.max_notes)
        fits &= (sound == 0) | (own[..., _SOUNDS] + sound <= self._polyphony)
        return fits.all(dim=2)

    def _goes_on(self, state: State) -> Tensor:
        """Whether notes that go on sound at the end of the beat before."""
        table = self._tables
        ids, later = table["hold_id"], table["hold_later"]
        program = torch.where(table["hold_program"] == UNSET, state.program, table["hold_program"])
        pitch = self._pitch(state, ids, table["hold_mode"], table["hold_value"])
        sounded = state.stamps.gather(1, program * PITCHES + pitch)
        sounds = sounded == 2 * (state.onset - 1 + later) + 1
        if len(table["pair_hold"]):  # or begins in the same id, under the program before it
            hold = table["pair_hold"]
            other = self._pitch(state, ids[hold], table["pair_mode"], table["pair_value"])
            is_same = (other == pitch[:, hold]) & (program[:, hold] == state.program)
            own = torch.zeros_like(sounds, dtype=torch.long).index_add_(1, hold, is_same.long())
            sounds |= own > 0
        return self._by_id(ids, ~sounds)

    def _on_grid(self, state: State) -> Tensor:
        """Whether notes begin at steps of the grid."""
        table = self._tables
        ids = table["mask_id"]
        beat = table["mask_beat"] + torch.where(table["mask_from_state"] > 0, state.values[:, At.POSITION, None], 0)
        meter = torch.where(table["mask_meter"] == UNSET, state.own[:, _METER, None], table["mask_meter"])
        is_on = table["grid"][meter, beat.clamp(0, table["grid"].shape[1] - 1)]
        return self._by_id(ids, (table["mask_steps"] & ~is_on).any(dim=2))

    def _free_steps(self, state: State) -> tuple[Tensor, Tensor]:
        """After every id, at which steps a pitched note may begin, and a drum; of shape (rows, vocab, steps) each."""
        table = self._tables
        own = self._counted(state.own[:, None], state.program[..., None], slice(None))
        total = own[..., _PITCHED] + own[..., _DRUMS]
        drums = total < self.max_notes
        if "grid" in table:
            meter = torch.where(table["left_meter"] == UNSET, state.own[:, _METER, None], table["left_meter"])
            drums = drums & table["grid"][meter, self._position(state).clamp(0, table["grid"].shape[1] - 1)]
        pitched = drums & (own[..., _PITCHED] < self.voices) & (own[..., _SOUNDS] < self._polyphony)
        return pitched, drums

    def _position(self, state: State) -> Tensor:
        """The beat that every id leaves open."""
        table = self._tables
        kept = state.values[:, At.POSITION, None] + table["advance"]
        return torch.where(table["left_position"] == UNSET, kept, table["left_position"])

    def _counted(self, own: Tensor, program: Tensor, ids: Tensor | slice) -> Tensor:
        """The counts of a row after ids: as `own`, of which only these columns have a meaning.

        Args:
            own (`LongTensor` of shape (rows, 1 or …, columns)): before them.
            program (`LongTensor` that broadcasts with it): the program in force.
            ids: which ids.
        """
        table = self._tables
        pitched = (program > DRUMS_ROW).long()
        lead, sounds = table["then_begins"][ids], table["then_lead_sounds"][ids]
        added = torch.cat(
            torch.broadcast_tensors(
                table["then_pitched"][ids] + lead * pitched,
                table["then_drums"][ids] + lead * (1 - pitched),
                table["then_sounds"][ids] + sounds * pitched,
            ),
            dim=-1,
        )
        kept = own[..., _PITCHED.start :] * ~table["renews"][ids][..., None]
        counts = kept + added
        return torch.cat([own[..., : _PITCHED.start].expand(*counts.shape[:-1], -1), counts], dim=-1)

    def _may_be_written(self, state: State, free: tuple[Tensor, Tensor]) -> Tensor:
        """Whether a pitch with which an id ends may begin or go on."""
        table = self._tables
        ids = table["open_id"]
        program = torch.where(table["open_program"] == UNSET, state.program, table["open_program"])
        pitch = self._pitch(state, ids, table["left_mode"][ids], table["left_value"][ids])
        is_drum = program == DRUMS_ROW
        begins = torch.where(is_drum, free[1].any(dim=2)[:, ids], free[0].any(dim=2)[:, ids])
        sounded = state.stamps.gather(1, program * PITCHES + pitch)
        own = self._counted(state.own[:, None], state.program[..., None], ids)
        has_voice = is_drum | (own[..., _SOUNDS.start] < self._polyphony)
        goes_on = (sounded == 2 * (state.onset - 1) + 1) & has_voice & ~table["renews"][ids]
        return self._by_id(ids, ~(begins | goes_on))

    def _can_fill(self, state: State, free: tuple[Tensor, Tensor]) -> Tensor:
        """Whether a note can begin in the last bar, if none has."""
        table, values = self._tables, state.values
        programs = self._playing(state)
        now = (free[0].any(dim=2) & programs[:, DRUMS_ROW + 1 :].any(dim=1, keepdim=True)) | (
            free[1].any(dim=2) & programs[:, DRUMS_ROW, None]
        )
        limit = torch.where(table["left_limit"] == UNSET, values[:, At.LIMIT, None], table["left_limit"])
        last = limit - 1
        if "grid" in table:
            meter = torch.where(table["left_meter"] == UNSET, state.own[:, _METER, None], table["left_meter"])
            last = table["last_beat"][meter, last.clamp(max=table["last_beat"].shape[1] - 1)]
        is_last = values[:, At.BARS, None] + table["bars"] == self.max_bars
        is_empty = table["keeps"][:, 1] * values[:, At.EMPTY, None] + table["adds"][:, 1] > 0
        return ~(is_last & is_empty) | (self._position(state) < last) | now | table["ends"]

    # ---- where the music stands ----

    def _read(self, state: State, ids: Tensor, step: int) -> None:
        table, own, inherited = self._tables, state.own, state.program.clone()
        pitch = self._pitch(state, ids[:, None], table["left_mode"][ids, None], table["left_value"][ids, None])[:, 0]
        places = []
        for name in ("earlier", "last"):
            program = table[f"{name}_program"][ids]
            program = torch.where(program == UNSET, inherited, program)
            mode, value = table[f"{name}_mode"][ids], table[f"{name}_value"][ids]
            told = self._pitch(state, ids[:, None], mode, value)
            is_there = table[f"{name}_is_there"][ids] > 0
            place = torch.where(is_there, program * PITCHES + told, PROGRAMS * PITCHES)
            places.append((place, table[f"{name}_ends"][ids]))
        counted = self._counted(own[:, None], inherited[..., None], ids[:, None])[:, 0]
        super()._read(state, ids, step)
        beats = table["beats"][ids]
        state.values[:, At.ONSET] += (beats - 1).clamp(min=0)
        for (place, ends), before in zip(places, (1, 0), strict=True):
            state.stamps.scatter_(1, place, 2 * (state.onset - before) + ends)
        is_told = table["left_mode"][ids] >= 0
        counted[:, _PREVIOUS] = torch.where(is_told, torch.where(table["is_reset"][ids], -1, pitch), own[:, _PREVIOUS])
        for column, name in ((_ORDER, "left_order"), (_METER, "left_meter")):
            left = table[name][ids]
            counted[:, column] = torch.where(left == UNSET, own[:, column], left)
        state.own = torch.where(table["begins"][ids, None], table["own"], counted)
        if step + 1 == self.prompt_length:  # nothing is added to the prompt's last beat
            state.values[:, At.HELD] = state.values[:, At.NOTES] > 0
