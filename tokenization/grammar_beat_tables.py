"""What the ids of BEAT mean: beats, programs, pitches and patterns, for the rules of grammar_beat.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .constraints import DRUMS
from .grammar_tables import DRUMS_ROW, PROGRAMS, UNSET, Tables, tokens_of_ids
from .grammar_types import kind_of, pattern_digits
from .tokenizer import BOS

STEPS = 4
"""Of a beat."""
BEFORE, NUMBER, BELOW = range(3)
"""How a pitch is told: it is the one before the id; a number; from above, by how much it is below the first of the id
that needs the one before it."""
_BEATS = 4  # of a bar of 4/4
_Steps = tuple[int, ...]


class _Pitch(NamedTuple):
    mode: int
    value: int


class _Pattern(NamedTuple):
    """A pattern: how many beats began before it in the id, its program, `UNSET` for that before the id, its pitch, its
    digits, and the beat of the bar, if the id says so."""

    beats: int
    program: int
    pitch: _Pitch
    digits: _Steps
    beat: int
    meter: int

    @property
    def begins(self) -> _Steps:
        return tuple(int(digit == 1) for digit in self.digits)

    @property
    def sounds(self) -> _Steps:
        return tuple(int(digit > 0) for digit in self.digits)

    @property
    def key(self) -> tuple[int, _Pitch]:
        return self.program, self.pitch


@dataclass
class _Blocks:
    """What an id means on its own."""

    fits: bool = True
    beats: int = 0
    bar_beats: list[int] = field(default_factory=lambda: [0])  # of each bar, the one open before it first
    limits: list[int] = field(default_factory=lambda: [UNSET])  # beats that these bars have, if it says so
    meter: int = UNSET  # the denominator in force, as an index
    first_order: int = UNSET  # the place among programs of its first program in the beat open before it
    order: int = UNSET  # that of its last program; -1 if none follows its last beat
    program: int = UNSET
    pitch: _Pitch | None = None  # the last one of the open program
    is_reset: bool = False  # whether the next pitch is told as a number
    first_interval: int = UNSET  # its first pitch, if that may be told from the one before the id
    first_drum: int = UNSET
    drop: int = 0  # how far its pitches go down from that one
    told: list[_Pitch] = field(default_factory=list)  # pitches of the program before it
    named: list[tuple[int, int, int]] = field(default_factory=list)  # others: beats before, program, pitch
    patterns: list[_Pattern] = field(default_factory=list)
    is_open: bool = False  # whether it ends with a pitch


def denominators(tokenizer: MusicTokenizer) -> list[int]:
    """Those of all meters, in order."""
    return sorted({4, *(denominator for _, denominator in tokenizer.time_signatures)})


def grid_table(tokenizer: MusicTokenizer, step: Fraction) -> Tensor:
    """At which steps of a bar notes may begin, of shape (denominators, beats, steps)."""
    beats = max(_BEATS, *(numerator for numerator, _ in tokenizer.time_signatures))
    return torch.tensor(
        [
            [
                [(Fraction(STEPS * beat + place, STEPS * number) / step).denominator == 1 for place in range(STEPS)]
                for beat in range(beats)
            ]
            for number in denominators(tokenizer)
        ]
    )


def _order(program: int) -> int:
    """The place of a program, as a row, among those of a beat: drums come last."""
    return PROGRAMS if program == DRUMS_ROW else program


def _blocks(tokens: Sequence[str], meters: list[int], pitches: Tensor) -> _Blocks:
    found = _Blocks()
    if tokens[0].startswith(("PAD_", "BOS_", "EOS_")):
        return found
    for token in tokens:
        kind, value = kind_of(token), token.partition("_")[2]
        found.is_open = kind in ("Pitch", "PitchDrum")
        if kind in ("Bar", "Beat", "Program"):
            found.pitch, found.is_reset = None, True
        if kind == "Bar":
            found.bar_beats.append(0)
            found.limits.append(UNSET)
            found.order = -1
        elif kind == "TimeSig":
            numerator, denominator = map(int, value.split("/"))
            found.limits[-1], found.meter = numerator, meters.index(denominator)
        elif kind == "Beat":
            found.beats, found.order = found.beats + 1, -1
            found.bar_beats[-1] += 1
        elif kind == "Program":
            _read_program(found, int(value) - DRUMS)
        elif found.is_open:
            _read_pitch(found, kind, int(value), pitches)
        elif kind in ("Pattern", "Hold"):
            _read_pattern(found, pattern_digits(token))
    return found


def _read_program(found: _Blocks, program: int) -> None:
    order = _order(program)
    if found.order == UNSET:
        found.first_order = order
    found.fits &= order >= found.order
    found.order, found.program = order, program


def _read_pitch(found: _Blocks, kind: str, value: int, pitches: Tensor) -> None:
    before, is_drum = found.pitch, kind == "PitchDrum"
    if found.is_reset:  # of a program that it names
        number = value if is_drum or before is None else before.value - value
        found.fits &= 0 <= number < pitches.shape[1] and (before is None or number < before.value)
        found.fits &= found.program != UNSET and bool(pitches[found.program, min(max(number, 0), 127)])
        found.pitch = _Pitch(NUMBER, number)
        found.fits &= (found.beats, found.program, number) not in found.named
        found.named.append((found.beats, found.program, number))
        return
    if is_drum:
        found.fits &= before is None or value < before.value
        found.first_drum = value if found.first_drum == UNSET else found.first_drum
        found.pitch = _Pitch(NUMBER, value)
    elif found.first_interval == UNSET:
        found.first_interval, found.pitch = value, _Pitch(BELOW, 0)
    else:
        found.fits &= value > 0
        found.drop += value
        found.pitch = _Pitch(BELOW, found.drop)
    found.told.append(found.pitch)


def _read_pattern(found: _Blocks, digits: _Steps) -> None:
    found.fits &= any(digits) and all(not (after == 2 and before == 0) for before, after in pairwise(digits))
    pitch = found.pitch or _Pitch(BEFORE, 0)
    beat = found.bar_beats[-1] - 1
    meter = UNSET if len(found.limits) == 1 else found.meter
    place = found.bar_beats[-1] if len(found.bar_beats) == 1 else -1 - beat
    found.patterns.append(_Pattern(found.beats, found.program, pitch, digits, place, meter))


def beat_tables(tokenizer: MusicTokenizer, pitches: Tensor, max_notes: int, voices: int, polyphony: int) -> Tables:
    """All tables.

    Args:
        tokenizer (`miditok.MusicTokenizer`): of BEAT.
        pitches (`BoolTensor` of shape (programs, pitches)): those that each program may play.
        max_notes, voices, polyphony (`int`): the most notes that begin at a step; those that aren't drums; the most of
            these that sound.

    Returns:
        `dict[str, Tensor]`: of shape (vocab,) if nothing else is said,

        - `beats_fit`: whether an id fits in itself; `beats`, `lead_beats`, `inner_beats`, `tail_beats`: its beats:
          all, in the bar open before it, in each bar between, after its last bar line; `has_bar`;
        - `left_position`, `left_limit`, `advance`, `left_meter`, `left_order`, `first_order`: as in `_Blocks`;
        - `first_interval`, `first_drum`, `drop`; `left_mode`, `left_value`, `is_reset`: the last pitch;
        - `now_…` (vocab, steps): notes in the beat open before it, of programs that it names, and of that
          before it; `then_…`: those in the beat that it leaves open; `renews`: whether that is another beat;
        - `pitch_…`, `named_…`, `again_…`, `hold_…`, `pair_…`, `mask_…`, `open_…`: one entry for every pitch of the
          program before an id; every one of another program in the beat open before it; every two of these that may be
          one; every note that must sound before; every note of the id that may be that one; every beat with onsets;
          every id that ends with a pitch;
        - `earlier_…`, `last_…` (vocab, notes): notes in the last beat but one, and in the last; `…_ends`: 1 if a note
          sounds at the end of it;
        - `num_notes`, `lead_notes`, `moves`: as in [`~midimamba.tokenization.grammar_tables.grammar_tables`].
    """
    meters = denominators(tokenizer)
    texts = tokens_of_ids(tokenizer)
    blocks = [_blocks(tokens, meters, pitches) for tokens in texts]
    holds, pairs = _holds(blocks)
    named = [(i, *note) for i, each in enumerate(blocks) for beats, *note in each.named if beats == 0]
    again = [(i, *note, *told) for i, *note in named for told in {*blocks[i].told, *_pitches_before(blocks[i])}]
    for each in blocks:
        _check_steps(each, max_notes, voices, polyphony)
    begins = torch.tensor([tokens == [BOS] for tokens in texts])
    return (
        _bar_tables(blocks, begins)
        | _step_tables(blocks)
        | _sounding_tables(blocks)
        | {
            "beats_fit": torch.tensor([each.fits for each in blocks]),
            **{
                name: torch.tensor([getattr(each, name) for each in blocks])
                for name in ("beats", "first_order", "first_interval", "first_drum", "drop")
            },
            "is_reset": torch.tensor([each.is_reset and each.pitch is None for each in blocks]),
            "left_order": torch.tensor([each.order for each in blocks]),
            "left_meter": torch.tensor([each.meter for each in blocks]),
            "left_mode": torch.tensor(
                [each.pitch.mode if each.pitch else NUMBER if each.is_reset else UNSET for each in blocks]
            ),
            "left_value": torch.tensor([each.pitch.value if each.pitch else -1 for each in blocks]),
            "num_notes": torch.tensor([sum(sum(p.begins) for p in each.patterns) for each in blocks]),
            "lead_notes": torch.tensor([len(each.told) + sum(p.beats == 0 for p in each.patterns) for each in blocks]),
            "moves": begins | torch.tensor([each.beats > 0 for each in blocks]),
            **_entries(
                "pitch", ("id", "mode", "value"), [(i, *p) for i, each in enumerate(blocks) for p in each.told]
            ),
            **_entries("named", ("id", "program", "number"), named),
            **_entries("again", ("id", "program", "number", "mode", "value"), again),
            **_entries("hold", ("id", "later", "program", "mode", "value"), holds),
            **_entries("pair", ("hold", "mode", "value"), pairs),
            **_entries("open", ("id", "program"), [(i, e.program) for i, e in enumerate(blocks) if e.is_open]),
            **_mask_entries(blocks),
        }
    )


def _pitches_before(each: _Blocks) -> set[_Pitch]:
    """The pitches of its patterns that belong to the program before it."""
    return {pattern.pitch for pattern in each.patterns if pattern.program == UNSET}


def _entries(prefix: str, names: Sequence[str], rows: Sequence[tuple[int, ...]]) -> Tables:
    columns = torch.tensor(rows, dtype=torch.long).reshape(-1, len(names)).T
    return {f"{prefix}_{name}": column.contiguous() for name, column in zip(names, columns, strict=True)}


def _bar_tables(blocks: Sequence[_Blocks], begins: Tensor) -> Tables:
    """Where the ids are in bars."""
    rows = []
    for each in blocks:
        (lead, *others), (own, *limits) = each.bar_beats, each.limits
        inner = list(zip(others[:-1], limits[:-1], strict=True))
        each.fits &= all(limit in (UNSET, beats) for beats, limit in inner)
        unknown = {beats for beats, limit in inner if limit == UNSET}
        each.fits &= len(unknown) <= 1
        known = [limit for limit in limits if limit != UNSET]
        tail = others[-1] if others else 0
        each.fits &= not known or tail <= known[-1]
        left = (tail - 1, (known or [own])[-1], 0) if others else (UNSET, own, lead)
        rows.append((own, lead, next(iter(unknown), UNSET), tail, bool(others), *left))
    names = (
        "own_limit",
        "lead_beats",
        "inner_beats",
        "tail_beats",
        "has_bar",
        "left_position",
        "left_limit",
        "advance",
    )
    tables = {name: torch.tensor(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    # Before the first bar line, a bar is complete.
    tables["left_position"][begins], tables["left_limit"][begins] = _BEATS - 1, _BEATS
    return tables


def _sum(patterns: Sequence[_Steps]) -> _Steps:
    return tuple(map(sum, zip((0,) * STEPS, *patterns, strict=True)))


def _check_steps(each: _Blocks, max_notes: int, voices: int, polyphony: int) -> None:
    """Whether the beats that an id begins have no more notes than they may."""
    for beat in range(1, each.beats + 1):
        inside = [pattern for pattern in each.patterns if pattern.beats == beat]
        pitched = [pattern for pattern in inside if pattern.program != DRUMS_ROW]
        each.fits &= max(_sum([pattern.begins for pattern in inside])) <= max_notes
        each.fits &= max(_sum([pattern.begins for pattern in pitched])) <= voices
        each.fits &= max(_sum([pattern.sounds for pattern in pitched])) <= polyphony


def _step_tables(blocks: Sequence[_Blocks]) -> Tables:
    """Notes at the steps of the beat open before an id, and of the one after it."""

    def table(prefix: str, at: Sequence[int]) -> Tables:
        inside = [[p for p in each.patterns if p.beats == beat] for each, beat in zip(blocks, at, strict=True)]
        chosen = {
            "begins": [[p.begins for p in each if p.program == UNSET] for each in inside],
            "lead_sounds": [[p.sounds for p in each if p.program == UNSET] for each in inside],
            "pitched": [[p.begins for p in each if p.program > DRUMS_ROW] for each in inside],
            "drums": [[p.begins for p in each if p.program == DRUMS_ROW] for each in inside],
            "sounds": [[p.sounds for p in each if p.program > DRUMS_ROW] for each in inside],
        }
        return {f"{prefix}_{name}": torch.tensor([_sum(each) for each in rows]) for name, rows in chosen.items()}

    return (
        table("now", [0] * len(blocks))
        | table("then", [each.beats for each in blocks])
        | {"renews": torch.tensor([each.order == -1 or each.beats > 0 for each in blocks])}
    )


def _holds(blocks: Sequence[_Blocks]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The entries `hold_` and `pair_`. Ids whose notes cannot sound before do not fit."""
    holds: list[tuple[int, ...]] = []
    pairs: list[tuple[int, ...]] = []
    for index, each in enumerate(blocks):
        for pattern in each.patterns:
            if pattern.digits[0] != 2:
                continue
            before = [p for p in each.patterns if p.beats == pattern.beats - 1 and p.digits[-1] > 0]
            if pattern.beats and any(p.key == pattern.key for p in before):
                continue
            each.fits &= pattern.beats < 2
            holds.append((index, pattern.beats > 0, pattern.program, *pattern.pitch))
            pairs += [(len(holds) - 1, *p.pitch) for p in before if p.program == UNSET]
    return holds, pairs


def _mask_entries(blocks: Sequence[_Blocks]) -> Tables:
    """The entries `mask_`: beats with onsets, from the beat before the id or by number, and the steps of these."""
    rows: dict[tuple[int, int, int], list[_Steps]] = {}
    for index, each in enumerate(blocks):
        for pattern in each.patterns:
            rows.setdefault((index, pattern.beat, pattern.meter), []).append(pattern.begins)
    keys = [(index, beat if beat >= 0 else -1 - beat, beat >= 0, meter) for index, beat, meter in rows]
    steps = torch.tensor([_sum(each) for each in rows.values()]).reshape(-1, STEPS) > 0
    return _entries("mask", ("id", "beat", "from_state", "meter"), keys) | {"mask_steps": steps}


def _sounding_tables(blocks: Sequence[_Blocks]) -> Tables:
    """The tables `earlier_` and `last_`."""
    tables: Tables = {}
    for name, back in (("earlier", 1), ("last", 0)):
        rows = [[p for p in each.patterns if p.beats == each.beats - back] for each in blocks]
        width = max(1, *map(len, rows))
        padded = torch.tensor(
            [
                [(p.program, *p.pitch, True, p.digits[-1] > 0) for p in row]
                + [(UNSET, NUMBER, 0, False, False)] * (width - len(row))
                for row in rows
            ]
        )
        for column, part in enumerate(("program", "mode", "value", "is_there", "ends")):
            tables[f"{name}_{part}"] = padded[..., column]
    return tables
