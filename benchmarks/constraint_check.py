"""Constraints once more, read slowly: which notes of a sequence break one. It shares no code with the rules."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from miditok import MMM, REMI, TSD, MusicTokenizer, PerTok, Structured

from midimamba import MidiProcessor
from midimamba.tokenization.constraints import Constraints
from midimamba.tokenization.tokenizer import expand_ids


class Heard(NamedTuple):
    """
    A note of a sequence.

    Args:
        program, pitch (`int`): -1 is the program of drums.
        bar (`int`): how many bars were open before it; 0 where there are none.
        place (`Fraction`): whole notes after the bar line, or after the start where there are no bars.
        start, end (`Fraction`): whole notes after the start.
        track (`int`): which of the tracks that are written apart.
    """

    program: int
    pitch: int
    bar: int
    place: Fraction
    start: Fraction
    end: Fraction
    track: int = 0


def listen(tokenizer: MusicTokenizer, ids: Sequence[int]) -> tuple[list[Heard], int]:
    """The notes of a sequence in its order, and its number of bars."""
    if type(tokenizer) not in (REMI, TSD, Structured) or tokenizer.config.use_rests:
        return _decoded(tokenizer, ids)
    notes: list[Heard] = []
    bars = program = pitch = 0
    start = line = time = Fraction(0)
    meter = (4, 4)
    has_bars = "Bar_None" in tokenizer.vocab
    for token in tokenizer._ids_to_tokens(expand_ids(tokenizer, [index for index in ids if index > 2])):
        kind, _, value = token.partition("_")
        if kind == "Bar":
            line += Fraction(*meter) if bars else 0
            start, time, bars = line, line, bars + 1
        elif kind == "TimeSig":
            numerator, denominator = value.split("/")
            meter = int(numerator), int(denominator)
        elif kind == "Position":
            time = line + Fraction(int(value), tokenizer.config.max_num_pos_per_beat * meter[1])
        elif kind == "TimeShift" and value != "0.0.1":
            time += _beats(value) / meter[1]
        elif kind == "Program":
            program = int(value)
        elif kind in ("Pitch", "PitchDrum"):
            pitch = int(value)
        elif kind == "Duration":
            place = time - start if has_bars else time
            notes.append(Heard(program, pitch, bars, place, time, time + _beats(value) / meter[1]))
    return notes, bars


def _decoded(tokenizer: MusicTokenizer, ids: Sequence[int]) -> tuple[list[Heard], int]:
    """The same of what MidiTok decodes, by onset.

    MMM has as many bars as its longest track, and PerTok writes its first one without a token. Rests pass bars without
    tokens as well; their last bar is that of the last note.
    """
    base = expand_ids(tokenizer, [index for index in ids if index > 2])
    tracks = " ".join(tokenizer._ids_to_tokens(base)).split("Track_Start")
    opened = max(track.split().count("Bar_None") for track in tracks) + isinstance(tokenizer, PerTok)
    score = MidiProcessor(tokenizer).decode(ids)
    whole = 4 * score.tpq
    meters = sorted((Fraction(each.time, whole), each.numerator, each.denominator) for each in score.time_signatures)
    last = max((Fraction(note.time, whole) for track in score.tracks for note in track.notes), default=Fraction(0))
    lines = [Fraction(0)]
    while len(lines) < opened or lines[-1] <= last:
        meter = [(4, 4), *((above, below) for time, above, below in meters if time <= lines[-1])][-1]
        lines.append(lines[-1] + Fraction(*meter))
    notes = []
    for index, track in enumerate(score.tracks):
        for note in track.notes:
            start, end = Fraction(note.time, whole), Fraction(note.end, whole)
            bar = sum(line <= start for line in lines)
            program = -1 if track.is_drum else track.program
            which = index if isinstance(tokenizer, MMM) else 0
            notes.append(Heard(program, note.pitch, bar, start - lines[bar - 1], start, end, which))
    if tokenizer.config.use_rests:
        opened = max([opened, *(note.bar for note in notes)])
    return sorted(notes, key=lambda note: note.start), opened if "Bar_None" in tokenizer.vocab else 0


def _beats(value: str) -> Fraction:
    beats, parts, resolution = map(int, value.split("."))
    return beats + Fraction(parts, resolution)


def broken(
    tokenizer: MusicTokenizer,
    ids: Sequence[int],
    constraints: Constraints,
    prompt: Sequence[int] = (),
    programs: Sequence[int] | None = None,
    finished: bool = True,
) -> list[str]:
    """What is wrong with the new notes of a sequence, one line for each note, onset or bar; empty if nothing is.

    Args:
        tokenizer (`miditok.MusicTokenizer`): that of the ids.
        ids (`Sequence[int]`): the prompt and what follows it.
        constraints ([`~midimamba.tokenization.constraints.Constraints`]): what the new notes must keep to.
        prompt (`Sequence[int]`, *optional*): the first of the ids.
        programs (`Sequence[int]`, *optional*): those that may play if the constraints name no instruments.
        finished (`bool`, *optional*, defaults to `True`): whether the last bar is complete.
    """
    notes, bars = listen(tokenizer, ids)
    before, old_bars = listen(tokenizer, prompt)
    new = notes[len(before) :]
    allowed = constraints.programs if constraints.programs is not None else programs
    found = [f"program {note.program}" for note in new if allowed is not None and note.program not in allowed]
    found += [f"pitch {note.pitch}" for note in new if note.pitch not in constraints.pitches(note.program)]
    if constraints.step is not None:
        found += [f"place {note.place}" for note in new if (note.place / constraints.step).denominator != 1]
    twice = Counter((note.start, note.program, note.pitch, note.track) for note in notes)
    found += [f"twice {note}" for note in new if twice[note.start, note.program, note.pitch, note.track] > 1]
    if constraints.polyphony is not None:
        pitched = [note for note in notes if note.program != -1]
        for start in {note.start for note in new if note.program != -1}:
            sounding = sum(note.start <= start < note.end for note in pitched)
            if sounding > constraints.polyphony:
                found.append(f"{sounding} notes at {start}")
    return found + _crowded(notes, new, range(old_bars + 1, bars + finished), constraints)


def _crowded(notes: list[Heard], new: list[Heard], bars: range, constraints: Constraints) -> list[str]:
    """New bars with too few notes, and bars with a new note and too many."""
    least, most = constraints.density
    counts = Counter(note.bar for note in notes)
    found = [f"{counts[bar]} notes in bar {bar}" for bar in bars if least and counts[bar] < least]
    if most is not None:
        found += [f"{counts[bar]} notes in bar {bar}" for bar in {note.bar for note in new} if counts[bar] > most]
    return found
