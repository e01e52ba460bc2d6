"""What the grammar knows of every id beforehand: what it requires of the music before it, and what it leaves."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import finalize

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .constraints import DRUMS, Constraints
from .controls import DRUMS as DRUMS_CONTROL
from .controls import INSTRUMENTS, control_token, is_control
from .grammar_types import PROGRAM_TIMING, TypeGraph, kind_of, kinds_of, type_graph
from .tokenizations import FILL, GAP
from .tokenizer import BOS, EOS, PAD, expand_ids
from .walks import NO_SHIFT

DRUMS_ROW = 0  # of the program `DRUMS`; program 0 is row 1
PROGRAMS, PITCHES = 129, 128
NOTES = PROGRAMS * PITCHES
UNSET = -9
ANY, _NONE = PROGRAMS, PROGRAMS + 1  # what an id announces besides a program
_NEVER = torch.iinfo(torch.long).max


@dataclass
class _Meaning:
    """What an id means on its own, whatever came before: its base tokens in order."""

    # What it leaves behind; `UNSET` where it says nothing. Types are indices into the follower graph.
    last: int = UNSET  # the type of its last token
    position: int = UNSET  # the last position in the open bar; -1 in a new one
    limit: int = UNSET  # positions per bar
    program: int = UNSET  # the program in force, as a row: 0 for drums

    # What it requires of what came before.
    first: int = 0  # the type of its first token
    fits: bool = True  # whether its tokens may follow each other
    first_position: int = _NEVER  # its first position in the bar already open
    last_position: int = -1  # its last position in a bar whose length it doesn't say
    meter_after: int = UNSET  # positions that time shifts move before its first time signature
    pitch_kind: int = -1  # 1 if its first pitch needs the drum program before it, 0 if another

    # What it adds.
    advance: int = 0  # positions that time shifts move, if it leaves no position
    lead: int = 0  # base tokens up to its first complete note, which may end in the ids to come
    lead_named: int = 0  # the same where a program must come before the next pitch
    lead_bars: int = 0  # bars opened before its first complete note
    tail: int = 0  # base tokens after its last complete note; all if there is none
    tail_bars: int = 0  # bars opened after its last complete note; all if there is none
    bars: int = 0  # bars opened
    has_note: bool = False  # whether it completes a note
    begins: bool = False  # whether it is begin-of-sequence
    rested: bool = False  # whether it holds a rest of REMI

    # Its notes as (program, pitch), onset by onset: the first onset is the one before it, until time moves.
    onsets: list[list[tuple[int, int]]] = field(default_factory=lambda: [[]])
    programs: set[int] = field(default_factory=set)  # those it names
    announces: int = _NONE  # the program of the note that must follow at its last onset
    inherits: bool = False  # whether something of its own belongs to the program before it
    asked: int = UNSET  # the program that a control asks for
    meters: list[tuple[int, str]] = field(default_factory=list)  # the bars it opened up to each meter, and the meter

    @property
    def pitched(self) -> list[int]:
        """Notes that aren't drums, onset by onset; those that must follow are left out.

        Where drums have no pitches of their own, notes of an unknown program may be drums: then they do not count.
        """
        drums = {DRUMS_ROW} if self.pitch_kind == 0 else {DRUMS_ROW, UNSET}
        return [sum(program not in drums for program, _ in onset) for onset in self.onsets]

    @property
    def inherited(self) -> list[int]:
        """Notes that are drums if the program before them is, and only then, onset by onset."""
        unknown = {UNSET} if self.pitch_kind < 0 else set()
        return [sum(program in unknown for program, _ in onset) for onset in self.onsets]

    @property
    def pitched_due(self) -> int:
        """Notes that must follow at its last onset and aren't drums: 1 or 0; 0 if the next token decides it."""
        return int(DRUMS_ROW < self.announces < ANY)

    @property
    def moves(self) -> bool:
        """Whether time moves."""
        return len(self.onsets) > 1

    @property
    def due(self) -> int:
        """Notes that must follow at its last onset: 1 or 0."""
        return int(self.announces != _NONE)


Tables = dict[str, Tensor]
_LAST_MADE: dict[int, dict[str, tuple[object, tuple[object, ...], Tables]]] = {}


def keep_tables(tokenizer: MusicTokenizer, kind: str, asked: tuple[object, ...], make: Callable[[], Tables]) -> Tables:
    """Keep the last tables of each kind and tokenizer: they take up to 0.3 s, which a first note cannot wait for.

    Args:
        tokenizer (`miditok.MusicTokenizer`): theirs.
        kind (`str`): what they are about.
        asked (`tuple`): what else they depend on.
        make (`Callable[[], dict[str, Tensor]]`): makes them. Nobody may change them afterwards.
    """
    key, model = id(tokenizer), tokenizer._model  # a tokenizer has no hash; training gives it another model
    if key not in _LAST_MADE:
        finalize(tokenizer, _LAST_MADE.pop, key, None)
    kept = _LAST_MADE.setdefault(key, {})
    made = kept.get(kind)
    if made is None or made[0] is not model or made[1] != asked:
        made = kept[kind] = model, asked, make()
    return made[2]


def tokens_of_ids(tokenizer: MusicTokenizer) -> list[list[str]]:
    """The base tokens of every id."""
    return [tokenizer._ids_to_tokens(expand_ids(tokenizer, [index])) for index in range(tokenizer.vocab_size)]


def playable(tokenizer: MusicTokenizer, constraints: Constraints | None) -> Tensor:
    """The pitches that every program may play, as booleans of shape (programs, pitches)."""
    known = torch.zeros(PROGRAMS, PITCHES, dtype=torch.bool)
    for rows, drums in ((slice(0, 1), True), (slice(1, None), False)):
        known[rows, pitches_of(tokenizer, drums)] = True
    if constraints is None:
        return known
    for row in range(PROGRAMS):
        allowed = torch.zeros(PITCHES, dtype=torch.bool)
        allowed[sorted(constraints.pitches(row + DRUMS))] = True
        known[row] &= allowed
    return known


def pitches_of(tokenizer: MusicTokenizer, drums: bool) -> list[int]:
    """The pitches that a tokenizer writes: of drums, which may be those of all instruments, or of others."""
    found: dict[str, list[int]] = {"Pitch": [], "PitchDrum": []}
    for token in tokenizer.vocab:
        if (kind := kind_of(token)) in found:
            found[kind].append(int(token.partition("_")[2]))
    config = tokenizer.config
    low, high = config.drums_pitch_range if drums and found["PitchDrum"] else config.pitch_range
    # BEAT has tokens for all pitches, because they also tell distances.
    return [pitch for pitch in (found["PitchDrum"] if drums else []) or found["Pitch"] if low <= pitch <= high]


def grammar_tables(tokenizer: MusicTokenizer, pitches: Tensor, max_notes: int, voices: int) -> Tables:
    """All tables of a tokenizer.

    Args:
        tokenizer (`miditok.MusicTokenizer`): one that `check_supported` accepts.
        pitches (`BoolTensor` of shape (programs, pitches)): those that each program may play.
        max_notes (`int`): the most notes that may begin at one onset.
        voices (`int`): the most notes that may begin at one onset and aren't drums.

    Returns:
        `dict[str, Tensor]`: the numbers of `_Meaning`, of shape (vocab,) each, and

        - `follows` (types, vocab): which ids may follow a type; `is_head` (types,): whether positions may;
        - `distance`, `named` (types,): fewest base tokens to a complete note; the same if a program must come first;
        - `completes` (types,): whether a note begins or ends with this type, so that the piece may end;
        - `left` (vocab, 4), `keeps`, `adds` (vocab, 3), `begin` (4,), `begin_counts` (3,): how an id changes a state,
          and the first state;
        - `tail_program`, `tail_pitch` (vocab, longest tail): the notes at the last onset, padded;
        - `note_id`, `note_program`, `note_pitch` (notes,): every note at the onset that an id continues;
        - `any_id` (ids,): those after which a note of any program must follow at the same onset;
        - `lead_inherited` (vocab,): notes at the onset that an id continues, of the program before it, drums or not;
        - `clashes` (programs, vocab): ids that, under a program, repeat a note, have too many, or have a pitch that it
          may not play;
        - `programs_of_id` (programs, vocab), `asked` (vocab, programs): the programs that an id names, or asks for;
        - `pitches` (programs,): how many pitches a program has;
        - `meter_of`, `meter_bar` (vocab, meters): the time signatures that an id writes, as [`number_of`], padded, and
          how many bars it has opened by then.
    """
    graph = type_graph(tokenizer)
    types, followers = graph.types, graph.followers
    per_beat = tokenizer.config.max_num_pos_per_beat
    meanings = [_meaning(tokens, graph, per_beat) for tokens in tokens_of_ids(tokenizer)]
    num_pitches = pitches.sum(dim=1)
    for meaning in meanings:
        meaning.fits &= _onsets_fit(meaning, max_notes, voices, num_pitches.tolist())
        meaning.fits &= all(
            bool(pitches[program, pitch]) for onset in meaning.onsets for program, pitch in onset if program != UNSET
        )
    tables = {
        name: torch.tensor([getattr(meaning, name) for meaning in meanings])
        for name in _Meaning.__annotations__.keys() - {"onsets", "programs", "meters"}
    }
    follows = torch.tensor([[after in followers[kind] for after in types] for kind in types])
    left = torch.stack([tables[name] for name in ("last", "position", "limit", "program")], dim=1)
    restarts = torch.stack([tables["has_note"] | tables["begins"]] * 2 + [tables["begins"]], dim=1)
    return (
        tables
        | _note_tables(meanings, pitches, voices)
        | _meter_tables(meanings)
        | {
            "follows": follows[:, tables["first"]] & tables["fits"],
            "distance": torch.tensor([graph.near[kind] for kind in types]),
            "named": torch.tensor([graph.named[kind] for kind in types]),
            "completes": torch.tensor([kind in graph.ends for kind in types]),
            "left": left,
            "begin": left[tokenizer.vocab[BOS]],
            "begin_counts": torch.zeros(3, dtype=torch.long),
            "keeps": ~restarts,
            "adds": torch.stack([tables[name] for name in ("tail", "tail_bars", "bars")], dim=1),
            "ends": torch.arange(len(meanings)) == tokenizer.vocab[EOS],
            "end_type": torch.tensor(types.index("EOS")),
            "is_head": torch.tensor([kind == ("TimeSig" if "TimeSig" in types else "Bar") for kind in types]),
            "pitches": num_pitches,
        }
    )


def number_of(meter: str) -> int:
    """A time signature such as `"3/4"` as one number."""
    numerator, denominator = meter.split("/")
    return 1000 * int(numerator) + int(denominator)


def _meter_tables(meanings: list[_Meaning]) -> dict[str, Tensor]:
    """The time signatures that each id writes, and the bars that it has opened by then."""
    width = max(1, *(len(meaning.meters) for meaning in meanings))
    rows = [meaning.meters + [(0, "")] * (width - len(meaning.meters)) for meaning in meanings]
    return {
        "meter_bar": torch.tensor([[bar for bar, _ in row] for row in rows]),
        "meter_of": torch.tensor([[number_of(meter) if meter else UNSET for _, meter in row] for row in rows]),
    }


def _note_tables(meanings: list[_Meaning], pitches: Tensor, voices: int) -> dict[str, Tensor]:
    """The tables about notes and programs."""
    size, indices = len(meanings), range(len(meanings))
    longest = max([1, *(len(meaning.onsets[-1]) for meaning in meanings)])
    tails = torch.tensor(
        [[*meaning.onsets[-1], *[(PROGRAMS, 0)] * (longest - len(meaning.onsets[-1]))] for meaning in meanings]
    )
    leads = torch.tensor(
        [(index, *note) for index, meaning in enumerate(meanings) for note in meaning.onsets[0]], dtype=torch.long
    ).reshape(-1, 3)
    clashes = torch.zeros(PROGRAMS, size, dtype=torch.bool)
    programs = torch.zeros(PROGRAMS, size)
    asked = torch.zeros(size, PROGRAMS, dtype=torch.bool)
    for index, meaning in enumerate(meanings):
        clashes[list(_clashes(meaning)), index] = True
        if any(sum(both) > voices for both in zip(meaning.pitched, meaning.inherited, strict=True)):
            clashes[DRUMS_ROW + 1 :, index] = True
        if inherited := [pitch for onset in meaning.onsets for program, pitch in onset if program == UNSET]:
            clashes[:, index] |= ~pitches[:, inherited].all(dim=1)
        programs[list(meaning.programs), index] = 1
        if meaning.asked != UNSET:
            asked[index, meaning.asked] = True
    return {
        "moves": torch.tensor([meaning.moves or meaning.begins for meaning in meanings]),
        "num_notes": torch.tensor([sum(map(len, meaning.onsets)) for meaning in meanings]),
        # Notes at the onset that is open before the id, one that must follow included.
        "lead_notes": torch.tensor(
            [len(meaning.onsets[0]) + (0 if meaning.moves else meaning.due) for meaning in meanings]
        ),
        # The same without drums.
        "lead_pitched": torch.tensor(
            [meaning.pitched[0] + (0 if meaning.moves else meaning.pitched_due) for meaning in meanings]
        ),
        # Further ones that belong to the program before them, whatever it is.
        "lead_inherited": torch.tensor([meaning.inherited[0] for meaning in meanings]),
        "tail_pitched": torch.tensor([meaning.pitched[-1] + meaning.inherited[-1] for meaning in meanings]),
        "any_id": torch.tensor([i for i in indices if meanings[i].announces == ANY], dtype=torch.long),
        "tail_drums": torch.tensor([len(meaning.onsets[-1]) - meaning.pitched[-1] for meaning in meanings]),
        "tail_notes": torch.tensor([0 if meanings[i].moves else len(meanings[i].onsets[-1]) for i in indices]),
        "announces": torch.tensor([_NONE if meanings[i].moves else meanings[i].announces for i in indices]),
        "tail_program": tails[:, :, 0],
        "tail_pitch": tails[:, :, 1],
        "note_id": leads[:, 0],
        "note_program": leads[:, 1],
        "note_pitch": leads[:, 2],
        "clashes": clashes,
        "programs_of_id": programs,
        "asked": asked,
    }


def _clashes(meaning: _Meaning) -> set[int]:
    """The programs under which it repeats a note: it inherits them for one and names them for the other."""
    found = set()
    for onset in meaning.onsets:
        inherited = {pitch for program, pitch in onset if program == UNSET}
        found |= {program for program, pitch in onset if program != UNSET and pitch in inherited}
    return found


def _onsets_fit(meaning: _Meaning, max_notes: int, voices: int, pitches: list[int]) -> bool:
    """Whether each of its own onsets has at most `max_notes` notes, of which at most `voices` aren't drums.

    Also, none may be there twice, and a pitch must be left for one due.
    """
    sizes, pitched = [len(onset) for onset in meaning.onsets], meaning.pitched
    sizes[-1] += meaning.due
    pitched[-1] += meaning.pitched_due
    is_room = not meaning.moves or not meaning.due
    if not is_room and meaning.announces == ANY:
        is_room = sizes[-1] <= min((number for number in pitches if number), default=0)
    elif not is_room:
        own = sum(program in (meaning.announces, UNSET) for program, _ in meaning.onsets[-1])
        is_room = own < pitches[meaning.announces]
    fits = max(sizes) <= max_notes and max(pitched) <= voices
    return fits and is_room and all(max(Counter(o).values(), default=1) == 1 for o in meaning.onsets)


def _meaning(tokens: list[str], graph: TypeGraph, positions_per_beat: int) -> _Meaning:
    types = {kind: index for index, kind in enumerate(graph.types)}
    kinds = kinds_of(tokens)
    if tokens in ([PAD], [GAP]) or is_control(tokens[0]):  # none of them changes what may follow
        return _Meaning(first=types["PAD"], asked=_PROGRAM_OF_CONTROL.get(tokens[0], UNSET))
    if tokens in ([BOS], [FILL]):  # MidiTok decodes 4/4 and the piano until a token says otherwise
        position = -1 if "Position" in types else 0
        return _Meaning(types["BOS"], position, 4 * positions_per_beat, -DRUMS, first=types["BOS"], begins=True)
    if tokens == [EOS]:
        return _Meaning(types["EOS"], first=types["EOS"])
    meaning = _Meaning(types[kinds[-1]], first=types[kinds[0]])
    meaning.fits = all(b in graph.followers[a] for a, b in pairwise(kinds))
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == "TimeSig" and "Bar" not in types:
            _read_bar_line(meaning)
        if kind == "Rest" and "Position" in types:
            _read_rest(meaning)
        else:
            _read(meaning, kind, token.split("_")[1], positions_per_beat)
        _read_note(meaning, kind, "PitchDrum" in types)
        if kind in graph.onsets:
            meaning.onsets[-1].append((meaning.program, int(token.split("_")[1])))
    if kinds[-1] in ("Program", PROGRAM_TIMING) and graph.ends == graph.note_ends:  # elsewhere one may also end
        meaning.announces = meaning.program
    elif tokens[-1] == f"TimeShift_{NO_SHIFT}":
        meaning.announces = ANY
    _count(meaning, kinds, graph)
    return meaning


# The rows of the programs that the controls `instruments` ask for.
_PROGRAM_OF_CONTROL = {
    control_token("instruments", name): row for row, name in enumerate((DRUMS_CONTROL, *INSTRUMENTS))
}


def _read(meaning: _Meaning, kind: str, value: str, positions_per_beat: int) -> None:
    """Take in one base token: what it changes, and what it requires of those before it."""
    if kind in ("Bar", "Position", "Rest", "TrackStart") or (kind == "TimeShift" and value != NO_SHIFT):
        meaning.onsets.append([])
    if kind == "Bar":
        meaning.position = -1
        meaning.bars += 1
    elif kind in ("TimeShift", "Rest"):
        beats, part, parts = map(int, value.split("."))
        steps = beats * positions_per_beat + part * positions_per_beat // parts
        if meaning.position == UNSET:
            meaning.advance += steps
        else:
            meaning.position += steps
    elif kind == "TimeSig":
        meaning.meters.append((meaning.bars, value))
        meaning.limit = int(value.split("/")[0]) * positions_per_beat
    elif kind == "Program":
        meaning.program = int(value) - DRUMS
        meaning.programs.add(meaning.program)
    elif kind in ("Pedal", "PedalOff"):
        meaning.programs.add(int(value) - DRUMS)
    elif kind == "Position":
        position = int(value)
        if meaning.position == UNSET and not meaning.rested:
            meaning.first_position = position
        if meaning.limit == UNSET:
            meaning.last_position = position
        meaning.fits &= position > meaning.position and (meaning.limit == UNSET or position < meaning.limit)
        meaning.position = position


def _read_rest(meaning: _Meaning) -> None:
    """Take in a rest of REMI. Where it leads depends on the notes before it; grammar_rests.py follows them."""
    meaning.onsets.append([])
    meaning.position, meaning.rested = UNSET, True


def _read_bar_line(meaning: _Meaning) -> None:
    """Take in the bar line before a time signature: it stands where the meter in force so far has one."""
    if meaning.position == UNSET:
        meaning.meter_after, meaning.advance = meaning.advance, 0
    else:
        meaning.fits &= meaning.position % meaning.limit == 0
    meaning.position = 0


def _read_note(meaning: _Meaning, kind: str, drums_are_apart: bool) -> None:
    """Take in one base token of an instrument."""
    if kind in ("Pitch", "PitchDrum", "NoteOff", "DrumOff", "PitchBend", "ControlChange"):
        meaning.inherits |= meaning.program == UNSET
    if drums_are_apart and kind in ("Pitch", "PitchDrum", "NoteOff", "DrumOff"):
        drums = int(kind in ("PitchDrum", "DrumOff"))
        if meaning.program == UNSET and meaning.pitch_kind < 0:
            meaning.pitch_kind = drums
        meaning.fits &= drums == (
            meaning.pitch_kind if meaning.program == UNSET else int(meaning.program == DRUMS_ROW)
        )


def _count(meaning: _Meaning, kinds: list[str], graph: TypeGraph) -> None:
    """Count base tokens and bars before, between and after the complete notes."""
    notes = [index for index, kind in enumerate(kinds) if kind in graph.ends]
    near, named = graph.near, graph.named
    if notes:
        first, last = notes[0] + 1, notes[-1] + 1
        meaning.has_note = True
        meaning.lead = meaning.lead_named = first
    else:
        first, last = len(kinds), 0
        meaning.lead = len(kinds) + near[kinds[-1]]
        meaning.lead_named = len(kinds) + (near if meaning.program != UNSET else named)[kinds[-1]]
    meaning.lead_bars = kinds[:first].count("Bar")
    meaning.tail = len(kinds) - last
    meaning.tail_bars = kinds[last:].count("Bar")
