"""Constraints once more, read slowly: which notes of a sequence break one. It shares no code with the rules."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from miditok import MusicTokenizer

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
    """

    program: int
    pitch: int
    bar: int
    place: Fraction
    start: Fraction
    end: Fraction


def listen(tokenizer: MusicTokenizer, ids: Sequence[int]) -> tuple[list[Heard], int]:
    """The notes of a sequence in its order, and its number of bars."""
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
    twice = Counter((note.start, note.program, note.pitch) for note in notes)
    found += [f"twice {note}" for note in new if twice[note.start, note.program, note.pitch] > 1]
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
