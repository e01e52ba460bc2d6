"""Does sampling under constraints keep to them? Every note of random models is read again, by other code.

A random generator for each tokenization, with byte-pair encoding and without, samples without constraints, under each
one that its tokenization can keep, and under random combinations of them. Combinations that cannot be kept together
are refused before anything is sampled, and others are drawn instead. The last line is JSON: `broken` counts notes,
onsets and bars that break a constraint or are there twice, `unfinished` pieces that end with fewer bars than asked for
(a piece that runs out of tokens apart), and `silent` pieces without a note. All must be 0.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from constraint_check import broken, listen
from symusic import Note, Score, Track

from measure import finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.errors import InputError
from midimamba.tokenization.choices import ONE_STREAM
from midimamba.tokenization.constraints import ConflictError, Constraints
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from midimamba.tokenization.voices import most_voices

SINGLE: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"scale": "D-dorian"},
    "pitch classes": {"scale": "C,E,G"},
    "pitch range": {"pitch_range": ["48-72"]},
    "pitch range of one": {"pitch_range": ["violin=55-100"]},
    "instruments": {"instruments": ["piano", "violin", "drums"]},
    "polyphony 1": {"polyphony": 1},
    "polyphony 4": {"polyphony": 4},
    "eighths": {"grid": "1/8"},
    "triplets": {"grid": "1/12"},
    "density": {"notes_per_bar": "4-16"},
}
PARTS: dict[str, list[Any]] = {
    "scale": ["D-dorian", "C-major", "F#-harmonic-minor", "C,E,G", "Bb-blues", "A"],
    "pitch_range": [["48-72"], ["60-67"], ["violin=55-100"], ["drums=35-50", "36-84"]],
    "instruments": [["piano"], ["violin", "drums"], ["piano", "violin", "flute"], ["drums"]],
    "polyphony": [1, 2, 3, 4, 8],
    "grid": ["1/4", "1/8", "1/16", "1/12", "1/6", "3/16"],
    "notes_per_bar": ["2-4", "4-", "0-6", "8-16", "1-1"],
}
PROGRAMS = [-1, 0, 40, 73]
RESTS = "REMI with rests"
NAMES = [(name, merged) for name in (*ONE_STREAM, RESTS) for merged in (False, True)]


def make_music(seed: int, bars: int = 8) -> Score:
    """A random score to learn merges from."""
    rng = random.Random(seed)
    score = Score(480)
    for program in (0, 40):
        track = Track(program=program)
        for step in range(8 * bars):
            track.notes.append(Note(240 * step, rng.choice((240, 480, 960)), rng.randint(48, 84), 80))
        score.tracks.append(track)
    drums = Track(is_drum=True)
    drums.notes.extend([Note(240 * step, 120, rng.choice((36, 38, 42)), 80) for step in range(8 * bars)])
    score.tracks.append(drums)
    return score


def make_pair(name: str, merged: bool) -> tuple[MidiMambaForCausalLM, MidiProcessor]:
    """A random generator and its processor."""
    options: dict[str, Any] = {} if name in ("Structured", "PerTok") else {"num_velocities": 4, "num_tempos": 4}
    options = options | {"use_rests": name == RESTS}
    tokenizer = build_tokenizer(name.split()[0], **options)
    if merged:
        train_tokenizer(tokenizer, [make_music(seed) for seed in range(8)], len(tokenizer.vocab) + 200)
    torch.manual_seed(0)
    config = MidiMambaConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MidiMambaForCausalLM(config).eval()
    with torch.no_grad():  # sharper than a new model, so that rows differ in what they prefer
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, MidiProcessor(tokenizer, programs=PROGRAMS)


def keeps(processor: MidiProcessor, wanted: dict[str, Any]) -> bool:
    """Whether a tokenization can keep constraints."""
    try:
        processor.grammar(constraints=wanted)
    except ConflictError:
        return False
    return True


def combinations(rng: random.Random, processor: MidiProcessor) -> Iterator[dict[str, Any]]:
    """Two to five constraints at a time, of those that can be kept, without end."""
    easy = {"polyphony": 4, "grid": "1/4", "notes_per_bar": "1-"}
    names = [name for name in PARTS if name not in easy or keeps(processor, {name: easy[name]})]
    while True:
        chosen = rng.sample(names, rng.randint(2, min(5, len(names))))
        yield {name: rng.choice(PARTS[name]) for name in chosen}


def count(
    pair: tuple[MidiMambaForCausalLM, MidiProcessor], wanted: dict[str, Any], num: int, args: argparse.Namespace
) -> Counter[str]:
    """What was sampled under constraints, and how much of it breaks one. Raises InputError if they are refused."""
    model, processor = pair
    constraints = Constraints(**wanted)
    bars_are_told = "Bar_None" in processor.midi_tokenizer.vocab
    found: Counter[str] = Counter()
    for start in range(0, num, args.batch):
        rows = min(args.batch, num - start)
        composed = processor.compose(
            model,
            processor(None, return_tensors="pt"),
            num=rows,
            bars=args.bars,
            constraints=constraints,
            max_new_tokens=args.length,
            top_p=1.0,
            seed=start,
        )
        for row in composed.ids.tolist():
            ended = processor.eos_token_id in row
            notes, bars = listen(processor.midi_tokenizer, row)
            wrong = broken(processor.midi_tokenizer, row, constraints, programs=PROGRAMS, finished=ended)
            sounding = most_voices(processor.decode(row)) if constraints.polyphony is not None else 0
            found["samples"] += 1
            found["notes"] += len(notes)
            found["bars"] += bars
            found["broken"] += len(wrong) + (sounding > (constraints.polyphony or sounding))
            found["silent"] += not notes
            found["ended"] += ended
            found["unfinished"] += ended and bars_are_told and bars != args.bars
    return found


def main() -> None:
    parser = make_parser(__doc__, "constraints.py --num 20 --combinations 5 --each 20")
    parser.add_argument("--num", type=int, default=1000, help="samples of each constraint (default: %(default)s)")
    parser.add_argument("--combinations", type=int, default=50, help="random combinations (default: %(default)s)")
    parser.add_argument("--each", type=int, default=20, help="samples of each combination (default: %(default)s)")
    parser.add_argument("--bars", type=int, default=2, help="bars of a sample of REMI (default: %(default)s)")
    parser.add_argument("--length", type=int, default=48, help="tokens of a sample, at most (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=170, help="samples at once (default: %(default)s)")
    args = parser.parse_args()

    total: Counter[str] = Counter()
    rows: dict[str, dict[str, int]] = {}
    refused: list[str] = []
    rng = random.Random(0)
    pairs = {f"{name}{' with BPE' if merged else ''}": make_pair(name, merged) for name, merged in NAMES}
    for title, wanted in SINGLE.items():
        rows[title] = {}
        able = [pair for pair in pairs.values() if keeps(pair[1], wanted)]
        for pair in able:
            found = count(pair, wanted, -(-args.num // len(able)), args)
            rows[title] = dict(Counter(rows[title]) + found)
            total += found
        print(title, rows[title], flush=True)
    drawn: Counter[str] = Counter()
    while drawn["combinations"] < args.combinations:
        name = list(pairs)[drawn["combinations"] % len(pairs)]
        wanted = next(combinations(rng, pairs[name][1]))
        try:
            found = count(pairs[name], wanted, args.each, args)
        except InputError as error:
            refused.append(str(error))
            continue
        drawn += found + Counter(combinations=1)
        print(name, wanted, dict(found), flush=True)
    total += drawn
    del total["combinations"]
    finish(
        {
            "benchmark": "constraints",
            "compared": "notes that random models sample under constraints with the constraints, read by other code",
            **{name: total[name] for name in ("broken", "silent", "unfinished", "samples", "notes", "bars", "ended")},
            "constraints": rows,
            "combinations": dict(drawn),
            "refused": refused,
            "options": {name: getattr(args, name) for name in ("num", "combinations", "each", "bars", "length")},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
