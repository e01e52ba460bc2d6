"""What the grammar knows of every id beforehand: what it requires of the music before it, and what it leaves."""

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .constraints import Constraints
from .controls import DRUMS as DRUMS_CONTROL
from .controls import INSTRUMENTS, control_token, is_control
from .errors import InputError
from .tokenizations import FILL, GAP
from .tokenizer import BOS, EOS, PAD, expand_ids
from .walks import NO_SHIFT

# The rules rely on a note being Pitch, Velocity, Duration under the program before it. MIDILike ends notes long after
# they start, PerTok does not say types, MMM and BEAT have tracks and beats that must fit each other.
SUPPORTED = ("REMI", "TSD", "Structured")
# Under these options other tokens come in between, or a note is not complete with its duration.
_MUST_BE_OFF = (
    "use_chords",
    "use_rests",
    "use_key_signatures",
    "use_sustain_pedals",
    "use_pitch_bends",
    "use_control_changes",
    "use_pitch_intervals",
)
_MUST_BE_ON = ("use_pitchdrum_tokens",)
_MUST_BE_ALL = ("use_note_duration_programs", "programs")

# The type of the token that completes a note.
NOTE_END = "Duration"

DRUMS = -1  # MidiTok's program of drums, which is row 0 below; program 0 is row 1
DRUMS_ROW = 0
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
    pitch_kind: int = -1  # 1 if its first pitch needs the drum program before it, 0 if another

    # What it adds.
    lead: int = 0  # base tokens up to its first complete note, which may end in the ids to come
    lead_named: int = 0  # the same where a program must come before the next pitch
    lead_bars: int = 0  # bars opened before its first complete note
    tail: int = 0  # base tokens after its last complete note; all if there is none
    tail_bars: int = 0  # bars opened after its last complete note; all if there is none
    bars: int = 0  # bars opened
    has_note: bool = False  # whether it completes a note
    begins: bool = False  # whether it is begin-of-sequence

    # Its notes as (program, pitch), onset by onset: the first onset is the one before it, until time moves.
    onsets: list[list[tuple[int, int]]] = field(default_factory=lambda: [[]])
    programs: set[int] = field(default_factory=set)  # those it names
    announces: int = _NONE  # the program of the note that must follow at its last onset
    asked: int = UNSET  # the program that a control asks for
    meters: list[tuple[int, str]] = field(default_factory=list)  # the bars it opened up to each meter, and the meter

    @property
    def pitched(self) -> list[int]:
        """Notes that aren't drums, onset by onset; those that must follow are left out."""
        drums = {DRUMS_ROW, UNSET} if self.pitch_kind == 1 else {DRUMS_ROW}
        return [sum(program not in drums for program, _ in onset) for onset in self.onsets]

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


def check_supported(tokenizer: MusicTokenizer) -> None:
    """Raise an [`InputError`] if there are no rules for a tokenizer."""
    name = type(tokenizer).__name__
    if name not in SUPPORTED:
        raise InputError(f"the grammar supports {', '.join(SUPPORTED)}, not {name}")
    config = tokenizer.config
    wrong = [option for option in _MUST_BE_OFF if getattr(config, option)]
    wrong += [option for option in _MUST_BE_ON if not getattr(config, option)]
    wrong += [option for option in _MUST_BE_ALL if getattr(config, option) != set(range(-1, 128))]
    if wrong:
        raise InputError(f"the grammar does not support this value of the tokenizer option {wrong[0]!r}")


def tokens_of_ids(tokenizer: MusicTokenizer) -> list[list[str]]:
    """The base tokens of every id."""
    return [tokenizer._ids_to_tokens(expand_ids(tokenizer, [index])) for index in range(tokenizer.vocab_size)]


def playable(tokenizer: MusicTokenizer, constraints: Constraints | None) -> Tensor:
    """The pitches that every program may play, as booleans of shape (programs, pitches)."""
    known = torch.zeros(PROGRAMS, PITCHES, dtype=torch.bool)
    for rows, kind in ((slice(0, 1), "PitchDrum"), (slice(1, None), "Pitch")):
        known[rows, pitches_of(tokenizer, kind)] = True
    if constraints is None:
        return known
    for row in range(PROGRAMS):
        allowed = torch.zeros(PITCHES, dtype=torch.bool)
        allowed[sorted(constraints.pitches(row + DRUMS))] = True
        known[row] &= allowed
    return known


def pitches_of(tokenizer: MusicTokenizer, kind: str) -> list[int]:
    """The pitches for which a tokenizer has tokens, of the kind `Pitch` or `PitchDrum`."""
    return [int(token.partition("_")[2]) for token in tokenizer.vocab if token.startswith(f"{kind}_")]


def grammar_tables(
    tokenizer: MusicTokenizer, tokens: list[list[str]], pitches: Tensor, max_notes: int, voices: int
) -> dict[str, Tensor]:
    """All tables of a tokenizer.

    Args:
        tokenizer (`miditok.MusicTokenizer`): one that [`check_supported`] accepts.
        tokens (`list[list[str]]`): the base tokens of every id.
        pitches (`BoolTensor` of shape (programs, pitches)): those that each program may play.
        max_notes (`int`): the most notes that may begin at one onset.
        voices (`int`): the most notes that may begin at one onset and aren't drums.

    Returns:
        `dict[str, Tensor]`: the numbers of `_Meaning`, of shape (vocab,) each, and

        - `follows` (types, vocab): which ids may follow a type; `is_head` (types,): whether positions may;
        - `distance`, `named` (types,): fewest base tokens to a complete note; the same if a program must come first;
        - `left` (vocab, 4), `keeps`, `adds` (vocab, 3), `begin` (4,): how an id changes a state, and the first state;
        - `tail_program`, `tail_pitch` (vocab, longest tail): the notes at the last onset, padded;
        - `note_id`, `note_program`, `note_pitch` (notes,): every note at the onset that an id continues;
        - `any_id` (ids,): those after which a note of any program must follow at the same onset;
        - `clashes` (programs, vocab): ids that, under a program, repeat a note or have a pitch that it may not play;
        - `programs_of_id` (programs, vocab), `asked` (vocab, programs): the programs that an id names, or asks for;
        - `pitches` (programs,): how many pitches a program has;
        - `meter_of`, `meter_bar` (vocab, meters): the time signatures that an id writes, as [`number_of`], padded, and
          how many bars it has opened by then.
    """
    followers = _followers(tokenizer)
    types = list(followers)
    near, named = _distances(followers), _distances(_through_programs(followers))
    per_beat = tokenizer.config.max_num_pos_per_beat
    meanings = [_meaning(each, followers, (near, named), per_beat) for each in tokens]
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
    graph = torch.tensor([[after in followers[kind] for after in types] for kind in types])
    left = torch.stack([tables[name] for name in ("last", "position", "limit", "program")], dim=1)
    restarts = torch.stack([tables["has_note"] | tables["begins"]] * 2 + [tables["begins"]], dim=1)
    return (
        tables
        | _note_tables(meanings, pitches)
        | _meter_tables(meanings)
        | {
            "follows": graph[:, tables["first"]] & tables["fits"],
            "distance": torch.tensor([near[kind] for kind in types]),
            "named": torch.tensor([named[kind] for kind in types]),
            "left": left,
            "begin": left[tokenizer.vocab[BOS]],
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


def _note_tables(meanings: list[_Meaning], pitches: Tensor) -> dict[str, Tensor]:
    """The tables about notes and programs."""
    size, indices = len(meanings), range(len(meanings))
    longest = max([1, *(len(meaning.onsets[-1]) for meaning in meanings)])
    tails = torch.tensor(
        [[*meaning.onsets[-1], *[(PROGRAMS, 0)] * (longest - len(meaning.onsets[-1]))] for meaning in meanings]
    )
    leads = torch.tensor(
        [(index, *note) for index, meaning in enumerate(meanings) for note in meaning.onsets[0]]
    ).reshape(-1, 3)
    clashes = torch.zeros(PROGRAMS, size, dtype=torch.bool)
    programs = torch.zeros(PROGRAMS, size)
    asked = torch.zeros(size, PROGRAMS, dtype=torch.bool)
    for index, meaning in enumerate(meanings):
        clashes[list(_clashes(meaning)), index] = True
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
        "tail_pitched": torch.tensor([meaning.pitched[-1] for meaning in meanings]),
        "any_id": torch.tensor([i for i in indices if meanings[i].announces == ANY], dtype=torch.long),
        "tail_drums": torch.tensor([len(meaning.onsets[-1]) - meaning.pitched[-1] for meaning in meanings]),
        "tail_notes": torch.tensor([0 if meanings[i].moves else len(meanings[i].onsets[-1]) for i in indices]),
        "announces": torch.tensor([_NONE if meanings[i].moves else meanings[i].announces for i in indices]),
        "inherits": torch.tensor([UNSET in _programs(meaning) for meaning in meanings]),
        "tail_program": tails[:, :, 0],
        "tail_pitch": tails[:, :, 1],
        "note_id": leads[:, 0],
        "note_program": leads[:, 1],
        "note_pitch": leads[:, 2],
        "clashes": clashes,
        "programs_of_id": programs,
        "asked": asked,
    }


def _programs(meaning: _Meaning) -> set[int]:
    """The programs of its notes; `UNSET` for the one in force before it."""
    return {program for onset in meaning.onsets for program, _ in onset}


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


def _followers(tokenizer: MusicTokenizer) -> dict[str, set[str]]:
    """MidiTok's graph of types, narrowed to what its encoder writes. No PAD, BOS or control may follow anything."""
    special = {*tokenizer.special_tokens, *(token.split("_")[0] for token in tokenizer.special_tokens)}
    graph = {kind: set(after) - special for kind, after in tokenizer.tokens_types_graph.items() if kind not in special}
    time = "Bar" if "Bar" in graph else "TimeShift"
    # A program announces a note. MidiTok's graph also leads back to time and tempo, and round in circles.
    graph["Program"] &= {"Pitch", "PitchDrum"}
    # A meter belongs to the bar line: elsewhere it would alter the length of the open bar.
    for kind in graph.keys() - {time}:
        graph[kind].discard("TimeSig")
    if time == "Bar":
        graph.get("TimeSig", set()).intersection_update({"Bar", "Position"})
    graph["BOS"] = {time}
    if time in graph[time]:  # TSD shifts only where time passes, Structured before every note
        graph["BOS"] |= graph[time]
    graph[NOTE_END].add("EOS")
    # Rows of a batch that are finished still need a token to choose; `generate` replaces it by padding.
    graph["EOS"] = {"EOS"}
    graph["PAD"] = set()
    return graph


def _through_programs(followers: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph in which every pitch comes after a program."""
    return {kind: after - {"Pitch", "PitchDrum"} if kind != "Program" else after for kind, after in followers.items()}


def _distances(followers: dict[str, set[str]]) -> dict[str, int]:
    """Fewest base tokens from each type until a note is complete; 0 where none can come."""
    distances = {kind: 1 for kind, after in followers.items() if NOTE_END in after}
    queue = deque(distances)
    while queue:
        nearer = queue.popleft()
        for kind, after in followers.items():
            if nearer in after and kind not in distances:
                distances[kind] = distances[nearer] + 1
                queue.append(kind)
    return {kind: distances.get(kind, 0) for kind in followers}


def _meaning(
    tokens: list[str],
    followers: dict[str, set[str]],
    distances: tuple[dict[str, int], dict[str, int]],
    positions_per_beat: int,
) -> _Meaning:
    types = {kind: index for index, kind in enumerate(followers)}
    kinds = [token.split("_")[0] for token in tokens]
    if tokens in ([PAD], [GAP]) or is_control(tokens[0]):  # none of them changes what may follow
        return _Meaning(first=types["PAD"], asked=_PROGRAM_OF_CONTROL.get(tokens[0], UNSET))
    if tokens in ([BOS], [FILL]):  # MidiTok decodes 4/4 and the piano until a token says otherwise
        return _Meaning(types["BOS"], -1, 4 * positions_per_beat, -DRUMS, first=types["BOS"], begins=True)
    if tokens == [EOS]:
        return _Meaning(types["EOS"], first=types["EOS"])
    meaning = _Meaning(types[kinds[-1]], first=types[kinds[0]])
    meaning.fits = all(b in followers[a] for a, b in pairwise(kinds))
    for token, kind in zip(tokens, kinds, strict=True):
        _read(meaning, kind, token.split("_")[1], positions_per_beat)
    if kinds[-1] == "Program":
        meaning.announces = meaning.program
    elif tokens[-1] == f"TimeShift_{NO_SHIFT}":
        meaning.announces = ANY
    _count(meaning, kinds, distances)
    return meaning


# The rows of the programs that the controls `instruments` ask for.
_PROGRAM_OF_CONTROL = {
    control_token("instruments", name): row for row, name in enumerate((DRUMS_CONTROL, *INSTRUMENTS))
}


def _read(meaning: _Meaning, kind: str, value: str, positions_per_beat: int) -> None:
    """Take in one base token: what it changes, and what it requires of those before it."""
    if kind in ("Bar", "Position") or (kind == "TimeShift" and value != NO_SHIFT):
        meaning.onsets.append([])
    if kind == "Bar":
        meaning.position = -1
        meaning.bars += 1
    elif kind == "TimeSig":
        meaning.meters.append((meaning.bars, value))
        meaning.limit = int(value.split("/")[0]) * positions_per_beat
    elif kind == "Program":
        meaning.program = int(value) - DRUMS
        meaning.programs.add(meaning.program)
    elif kind in ("Pitch", "PitchDrum"):
        drums = int(kind == "PitchDrum")
        if meaning.program == UNSET and meaning.pitch_kind < 0:
            meaning.pitch_kind = drums
        meaning.fits &= drums == (meaning.pitch_kind if meaning.program == UNSET else int(meaning.program == 0))
        meaning.onsets[-1].append((meaning.program, int(value)))
    elif kind == "Position":
        position = int(value)
        if meaning.position == UNSET:
            meaning.first_position = position
        if meaning.limit == UNSET:
            meaning.last_position = position
        meaning.fits &= position > meaning.position and (meaning.limit == UNSET or position < meaning.limit)
        meaning.position = position


def _count(meaning: _Meaning, kinds: list[str], distances: tuple[dict[str, int], dict[str, int]]) -> None:
    """Count base tokens and bars before, between and after the complete notes."""
    notes = [index for index, kind in enumerate(kinds) if kind == NOTE_END]
    near, named = distances
    if notes:
        first, last = notes[0] + 1, notes[-1] + 1
        meaning.has_note = True
        meaning.lead = meaning.lead_named = first
    else:
        first, last = len(kinds), 0
        meaning.lead = len(kinds) + near[kinds[-1]]
        meaning.lead_named = len(kinds) + (near if meaning.programs else named)[kinds[-1]]
    meaning.lead_bars = kinds[:first].count("Bar")
    meaning.tail = len(kinds) - last
    meaning.tail_bars = kinds[last:].count("Bar")
