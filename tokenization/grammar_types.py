"""Which type of base token may follow which, for every tokenization and option that the grammar knows.

MidiTok has such a graph, too. It allows what its encoder never writes, and lacks some of what it writes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from miditok import BEAT, MMM, MIDILike, MusicTokenizer, PerTok

from .errors import InputError

SUPPORTED = ("REMI", "TSD", "Structured", "MIDILike", "PerTok", "MMM", "BEAT")
RESTS = "REMI with rests"
# What else happens at an onset, without a note.
EFFECTS = frozenset({"Pedal", "PedalOff", "PitchBend", "ControlChange", "Chord"})
# MidiTok's names for the start of a note in MIDILike, and the names of the same in the others.
_SAME_KIND = {"NoteOn": "Pitch", "DrumOn": "PitchDrum"}
# Tokens of another type than their names say: those of MMM, and the silence of BEAT, which MidiTok calls a rest.
_KINDS = {"Track_Start": "TrackStart", "Track_End": "TrackEnd", "Rest_None": "Silence"}
_CORE = frozenset(
    {"Bar", "TimeSig", "Position", "TimeShift", "Tempo", "Program", "Pitch", "PitchDrum", "Velocity", "Duration"}
)
_OFF = frozenset({"NoteOff", "DrumOff"})
# The type of PerTok's microtiming that belongs to a program, not to a note.
PROGRAM_TIMING = "ProgramTiming"
# Options under which PerTok writes a microtiming after other tokens as well.
_NOT_IN_PERTOK = (
    *("use_chords", "use_rests", "use_key_signatures", "use_sustain_pedals", "use_pitch_bends", "use_control_changes"),
)


def check_supported(tokenizer: MusicTokenizer) -> None:
    """Raise an [`InputError`] if there are no rules for a tokenizer."""
    name, config = type(tokenizer).__name__, tokenizer.config
    if name not in SUPPORTED:
        raise InputError(f"the grammar supports {', '.join(SUPPORTED)}, not {name}")
    reasons = {
        "use_pitch_intervals": config.use_pitch_intervals,
        # A rest begins where notes end. MidiTok reads another end than it wrote if none is told.
        "use_rests": name_of(tokenizer) == RESTS and not config.using_note_duration_tokens,
        # Its durations cannot be told from those of notes.
        "sustain_pedal_duration": config.use_sustain_pedals and config.sustain_pedal_duration,
        # Whether a note is complete without a duration would depend on its program.
        "use_note_duration_programs": uses_some_durations(tokenizer) and name != "MIDILike",
    }
    # Its rests and positions would not meet.
    per_beat = config.max_num_pos_per_beat
    reasons["beat_res"] = name_of(tokenizer) == RESTS and any(per_beat % each for each in config.beat_res.values())
    # Its time shift before every note promises a note of any instrument, of which the rules do not know the kind.
    reasons["use_pitchdrum_tokens"] = name == "Structured" and not config.use_pitchdrum_tokens
    if name == "MMM":
        reasons |= {
            "base_tokenizer": config.additional_params["base_tokenizer"] != "REMI",
            "use_rests": config.use_rests,
            # What else happens at an onset is written in another order than in REMI.
            **{option: getattr(config, option) for option in ("use_chords", "use_pitch_bends", "use_sustain_pedals")},
        }
    if name == "PerTok":
        reasons |= {option: getattr(config, option) for option in _NOT_IN_PERTOK}
        reasons["use_position_toks"] = config.additional_params.get("use_position_toks", False)
    if wrong := [option for option, is_wrong in reasons.items() if is_wrong]:
        raise InputError(f"the grammar does not support this value of the tokenizer option {wrong[0]!r} for {name}")


def name_of(tokenizer: MusicTokenizer) -> str:
    """What the grammars are told apart by: the tokenization, and whether REMI has rests."""
    name = type(tokenizer).__name__
    return RESTS if name == "REMI" and tokenizer.config.use_rests else name


def check_plain(tokenizer: MusicTokenizer, use: str) -> None:
    """Raise an [`InputError`] if pieces may hold anything but notes, tempos and meters, or notes are not all alike.

    Args:
        tokenizer (`miditok.MusicTokenizer`): any.
        use (`str`): what needs such pieces.
    """
    check_supported(tokenizer)
    config = tokenizer.config
    kinds = {kind_of(token) for token in tokenizer.vocab}
    extra = kinds & (EFFECTS | {"KeySig", "Rest"})
    everything = set(range(-1, 128))
    if (
        extra
        or not config.use_pitchdrum_tokens
        or not config.use_note_duration_programs == config.programs == everything
    ):
        what = f"tokens of type {min(extra)}" if extra else "fewer programs, durations or drum pitches"
        raise InputError(f"{use} needs a tokenizer without {what}")


def uses_some_durations(tokenizer: MusicTokenizer) -> bool:
    """Whether the notes of some programs have durations, and those of others do not."""
    config = tokenizer.config
    return bool(config.using_note_duration_tokens and set(config.programs) - set(config.use_note_duration_programs))


def kind_of(token: str) -> str:
    """The type of a base token. The start of a note is a pitch in every tokenization."""
    kind = token.split("_")[0]
    if kind == "Pattern":
        return "Pattern" if 1 in pattern_digits(token) else "Hold"
    return _KINDS.get(token) or _SAME_KIND.get(kind, kind)


def pattern_digits(token: str) -> tuple[int, ...]:
    """The digits of a pattern of BEAT, for each quarter of a beat: 0 is silence, 1 a note that begins, 2 goes on."""
    value = int(token.partition("_")[2])
    return tuple(value // part % 3 for part in (27, 9, 3, 1))


def kinds_of(tokens: Sequence[str]) -> list[str]:
    """The types of base tokens in a row. A microtiming is that of a program where the tokens beside it say so."""
    kinds = [kind_of(token) for token in tokens]
    for index, kind in enumerate(kinds):
        before, after = kinds[index - 1 : index], kinds[index + 1 : index + 2]
        leads = not before and after and after[0] in ("Pitch", "PitchDrum", "TimeShift")
        if kind == "MicroTiming" and (before == ["Program"] or leads):
            kinds[index] = PROGRAM_TIMING
    return kinds


@dataclass(frozen=True)
class TypeGraph:
    """Which type may follow which.

    Args:
        followers (`dict[str, set[str]]`): the types that may follow each type.
        note_ends (`frozenset[str]`): the types that complete a note that begins.
        ends (`frozenset[str]`): these, and those that end a note long after it began.
        idle (`frozenset[str]`): the types after which the onset may have all the notes that it may have.
        onsets (`frozenset[str]`): the types that begin a note at the onset.
    """

    followers: dict[str, set[str]]
    note_ends: frozenset[str]
    ends: frozenset[str]
    idle: frozenset[str]
    onsets: frozenset[str] = frozenset({"Pitch", "PitchDrum"})

    @property
    def types(self) -> list[str]:
        return list(self.followers)

    @cached_property
    def near(self) -> dict[str, int]:
        """Fewest base tokens from each type until a note is complete; 0 where none can come.

        From an idle type, time may have to move, and in the last position of a bar it needs a bar line to move.
        """
        return self._distances(self.followers)

    @cached_property
    def named(self) -> dict[str, int]:
        """The same where a program must come before the next pitch."""
        pitches = {"Pitch", "PitchDrum"}
        return self._distances(
            {
                kind: after - pitches if kind not in ("Program", PROGRAM_TIMING) else after
                for kind, after in self.followers.items()
            }
        )

    def _distances(self, followers: dict[str, set[str]]) -> dict[str, int]:
        time = {"Bar" if "Bar" in followers else "TimeShift"}
        followers = {kind: after & time if kind in self.idle else after for kind, after in followers.items()}
        distances = {kind: 1 for kind, after in followers.items() if self.note_ends & after}
        queue = deque(distances)
        while queue:
            nearer = queue.popleft()
            for kind, after in followers.items():
                if nearer in after and kind not in distances:
                    distances[kind] = distances[nearer] + 1
                    queue.append(kind)
        return {kind: distances.get(kind, 0) for kind in followers}


def type_graph(tokenizer: MusicTokenizer) -> TypeGraph:
    """The graph of a tokenizer that [`check_supported`] accepts."""
    kinds = {kind_of(token) for token in tokenizer.vocab}
    if isinstance(tokenizer, BEAT):
        return _beats(kinds)
    note = [{"Pitch", "PitchDrum"} & kinds, *({kind} & kinds for kind in ("MicroTiming", "Velocity", "Duration"))]
    steps = [step for step in note if step]
    note_ends = steps[-1]
    if isinstance(tokenizer, PerTok):
        graph = _microtimed(tokenizer, kinds, steps)
    else:
        graph = _events(tokenizer, kinds, steps) if isinstance(tokenizer, MIDILike) else _narrowed(tokenizer)
        _add_effects(tokenizer, kinds, graph, note_ends)
    idle = EFFECTS & kinds
    if isinstance(tokenizer, PerTok):
        graph["BOS"] = set(graph["Bar"])  # its first bar has no token
        idle |= {"Tempo"} & kinds
    else:
        time = "Bar" if "Bar" in graph else "TimeShift"
        graph["BOS"] = {time}
        if "Rest" in graph and not {"TimeSig", "Tempo"} & kinds:  # a piece begins with either at its first bar line
            graph["BOS"].add("Rest")
        if time in graph[time]:  # TSD shifts only where time passes, Structured before every note
            graph["BOS"] |= graph[time] | ({"Rest"} & kinds)
    for kind in note_ends | idle | (_OFF | {"KeySig"}) & kinds:
        graph[kind].add("EOS")
    if isinstance(tokenizer, MMM):
        _put_in_tracks(graph)
    # Rows of a batch that are finished still need a token to choose; `generate` replaces it by padding.
    graph["EOS"] = {"EOS"}
    graph["PAD"] = set()
    return TypeGraph(graph, frozenset(note_ends), frozenset(note_ends | (_OFF & kinds)), frozenset(idle))


def _beats(kinds: set[str]) -> TypeGraph:
    """BEAT: bars of beats, in which every program has pitches, each with its pattern."""
    pitches = {"Pitch", "PitchDrum"} & kinds
    after_block = {"Beat", "Bar", "Program", "EOS"}
    after_note = after_block | pitches
    graph = {kind: {"Pattern", "Hold"} for kind in pitches}
    graph |= {kind: {"Velocity"} if "Velocity" in kinds else after_note for kind in ("Pattern", "Hold")}
    graph |= {"Beat": {"Silence", "Program"}, "Program": {"Silence", *pitches}, "Silence": after_block}
    at_bar = [kind for kind in ("Bar", "TimeSig", "Tempo", "KeySig") if kind in kinds]
    graph |= {kind: {"Beat", *at_bar[place + 1 :]} for place, kind in enumerate(at_bar)}
    graph |= {"BOS": {"Bar"}, "EOS": {"EOS"}, "PAD": set()}
    if "Velocity" in kinds:
        graph["Velocity"] = after_note
    # Whether a note begins is decided by the pattern, and where by the rules of grammar_beat.py.
    return TypeGraph(graph, frozenset({"Pattern"}), frozenset({"Pattern"}), frozenset(), frozenset())


def _narrowed(tokenizer: MusicTokenizer) -> dict[str, set[str]]:
    """MidiTok's graph, narrowed to what its encoder writes. No PAD, BOS or control may follow anything."""
    graph = {kind: set(after) & _CORE for kind, after in tokenizer.tokens_types_graph.items() if kind in _CORE}
    # A program announces a note. MidiTok's graph also leads back to time and tempo, and round in circles.
    graph["Program"] &= {"Pitch", "PitchDrum"}
    # A meter belongs to the bar line: elsewhere it would alter the length of the open bar.
    time = "Bar" if "Bar" in graph else "TimeShift"
    for kind in graph.keys() - {time}:
        graph[kind].discard("TimeSig")
    if time == "Bar":
        graph.get("TimeSig", set()).intersection_update({"Bar", "Position"})
    elif tokenizer.config.use_rests:  # MidiTok's graph says that no shift follows another
        graph["TimeShift"].add("TimeShift")
    return graph


def _starts(tokenizer: MusicTokenizer, kinds: set[str], of_notes: set[str]) -> set[str]:
    """What may come where something of an instrument may: all of `of_notes`, or a program if each needs one."""
    found = of_notes if tokenizer.config.program_changes else set()
    return ({"Program"} | found) & kinds


def _put_in_tracks(graph: dict[str, set[str]]) -> None:
    """MMM: tracks of one program each. Changes of tempo and meter come after their last notes, too."""
    for kind, after in graph.items():
        after.discard("Program")
        if "EOS" in after or kind in ("Tempo", "TimeSig"):
            after.discard("EOS")
            after.add("TrackEnd")
    graph["Program"] = graph["BOS"]
    graph |= {"BOS": {"TrackStart"}, "TrackStart": {"Program"}, "TrackEnd": {"TrackStart", "EOS"}}


def _notes(steps: list[set[str]]) -> dict[str, set[str]]:
    """What follows what in a note, given the types of its tokens."""
    return {kind: set(after) for step, after in pairwise(steps) for kind in step}


def _events(tokenizer: MusicTokenizer, kinds: set[str], steps: list[set[str]]) -> dict[str, set[str]]:
    """MIDILike: notes begin and end at any time."""
    of_notes = {"Pitch", "PitchDrum", *_OFF} & kinds
    starts = _starts(tokenizer, kinds, of_notes)
    graph = _notes(steps) | {kind: starts | {"TimeShift"} for kind in steps[-1] | (_OFF & kinds)}
    graph["Program"] = set(of_notes)
    graph["TimeShift"] = starts | ({"TimeShift", "Tempo", "TimeSig"} & kinds)
    if "TimeSig" in kinds:
        graph["TimeSig"] = starts | ({"TimeShift", "Tempo"} & kinds)
    if "Tempo" in kinds:
        graph["Tempo"] = starts | {"TimeShift"}
    return graph


def _microtimed(tokenizer: MusicTokenizer, kinds: set[str], steps: list[set[str]]) -> dict[str, set[str]]:
    """PerTok: a shift before a note or its program, and a second one in between where it is far."""
    starts = _starts(tokenizer, kinds, steps[0])
    between = steps[0] | {"TimeShift"}
    anywhere = starts | ({"Bar", "TimeShift", "Tempo"} & kinds)
    graph = _notes(steps) | {kind: set(anywhere) for kind in steps[-1] | ({"Bar", "Tempo"} & kinds)}
    graph["TimeShift"] = {"Program", *steps[0]}
    graph["Program"] = {PROGRAM_TIMING} if "MicroTiming" in kinds else between
    if "MicroTiming" in kinds:
        graph[PROGRAM_TIMING] = set(between)
    return graph


def _add_effects(tokenizer: MusicTokenizer, kinds: set[str], graph: dict[str, set[str]], note_ends: set[str]) -> None:
    """Rests, keys, and what an instrument does beside its notes.

    At one time, MidiTok writes what concerns all instruments first, then one instrument after the other: pedals,
    bends, control changes, chords, notes.
    """
    effects, ends = EFFECTS & kinds, note_ends | (_OFF & kinds)
    named = {"Pedal", "PedalOff"} & effects  # these name their program themselves
    starts = named | (_starts(tokenizer, kinds, set(effects)) & effects)
    at_onset = {"Position", "Tempo"} if "Position" in graph else {"TimeShift", "TimeSig", "Tempo"}
    after_note = graph[min(note_ends)] | starts
    for kind in (at_onset | ends) & graph.keys():
        graph[kind] |= starts
    graph["Program"] |= effects - named
    graph |= {kind: set(after_note) for kind in effects | ({"KeySig"} & kinds)}
    if "KeySig" in kinds:
        # Where programs hold until they change, MidiTok writes one before a key, too: that of the piano.
        announces_key = {"Program"} if tokenizer.config.program_changes else set()
        for kind in (at_onset | announces_key) & graph.keys():
            graph[kind].add("KeySig")
    if "Rest" in kinds:
        _add_rests(graph, ends | effects | ({"Tempo", "KeySig", "TimeSig"} & kinds))


def _add_rests(graph: dict[str, set[str]], complete: set[str]) -> None:
    """Rests after what is complete, and where time may be shifted."""
    if "Position" in graph:  # in REMI, they only tell that nothing sounds, and a position follows nevertheless
        for kind in complete:
            graph[kind].add("Rest")
        graph["Rest"] = {"Rest", "Bar", "Position"} | ({"TimeSig"} & graph.keys())
        return
    for kind, after in graph.items():
        if "TimeShift" in after and kind != "TimeShift":
            after.add("Rest")
    graph["Rest"] = graph["TimeShift"] | {"Rest"}
