"""Constraints while sampling: what they mean, that no note breaks them, and that no row is ever stuck."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from grammar_support import BOS, EOS, PAD, prefer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miditok import MusicTokenizer
from torch import Tensor

from midimamba.errors import InputError
from midimamba.tokenization.constraints import Constraints
from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from midimamba.tokenization.voices import most_voices
from support import make_score

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from constraint_check import broken, listen

# Few ids, so that one sequence costs little: three meters, a hundred tokens.
SMALL: dict[str, Any] = {"num_velocities": 1, "num_tempos": 2, "time_signature_range": {4: [1, 3, 4], 8: [6], 16: [1]}}
KINDS = [
    "none",
    "Bar",
    "Position",
    "TimeShift",
    "TimeSig",
    "Tempo",
    "Program",
    "Pitch",
    "PitchDrum",
    "Duration",
    "EOS",
]


@cache
def tokenizer_of(name: str, model: str) -> MusicTokenizer:
    options = {} if name == "Structured" else SMALL
    tokenizer = build_tokenizer(name, **options)
    if model != "untrained":
        train_tokenizer(tokenizer, [make_score(seed) for seed in range(12)], len(tokenizer.vocab) + 150, model)
    return tokenizer


def sample(
    grammar: MidiGrammar,
    preference: Tensor,
    rows: int,
    steps: int,
    seed: int,
    prefix: list[int],
    *,
    stuck: bool = False,
) -> list[list[int]]:
    """Rows of ids from random logits; with `stuck` false, no row may fall back on what is left after a prompt."""
    if not stuck:
        grammar._after_prompt = None  # type: ignore[assignment, method-assign]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prefix]).repeat(rows, 1)
    for _ in range(steps):
        scores = grammar(ids, torch.randn(rows, len(preference), generator=generator) * 2 + preference)
        assert (scores > -torch.inf).any(dim=1).all()
        chosen = torch.multinomial(scores.softmax(dim=1), 1, generator=generator)
        ids = torch.cat([ids, chosen.masked_fill((ids == EOS).any(dim=1, keepdim=True), PAD)], dim=1)
        if (ids == EOS).any(dim=1).all():
            break
    return [[index for index in row if index != PAD] for row in ids.tolist()]


LONG = st.sampled_from([0.0, 30.0])
CONSTRAINTS = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.sampled_from(["D-dorian", "C", "F#,A", "Bb-blues"]),
        "pitch_range": st.sampled_from(["60-72", "48-50", ["violin=55-56", "60-60"], ["drums=36-37", "30-90"]]),
        "instruments": st.sampled_from([["violin"], ["drums"], ["violin", "drums"], ["piano", "flute"]]),
        "polyphony": st.sampled_from([1, 2, 4]),
        "grid": st.sampled_from(["1/4", "1/8", "1/12", "1/16", "3/16", "1/1"]),
        "notes_per_bar": st.sampled_from(["1-1", "2-3", "4-", "0-2", "8-8", "12-"]),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["REMI", "TSD", "Structured"]),
    model=st.sampled_from(["untrained", "BPE", "Unigram"]),
    wanted=CONSTRAINTS,
    kind=st.sampled_from(KINDS),
    long=LONG,
    bars=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 1000),
)
def test_no_note_breaks_constraints_and_no_row_is_stuck(
    name: str, model: str, wanted: dict[str, Any], kind: str, long: float, bars: int | None, seed: int
) -> None:
    if name != "REMI":
        wanted, bars = {key: value for key, value in wanted.items() if key != "notes_per_bar"}, None
    tokenizer, constraints = tokenizer_of(name, model), Constraints(**wanted)
    limits = {} if bars is None else {"max_bars": bars, "min_bars": bars}
    try:
        grammar = MidiGrammar(tokenizer, programs=[-1, 0, 40], constraints=wanted, **limits)
    except InputError:
        return  # refused beforehand
    preference = prefer(tokenizer, kind)
    for token, index in tokenizer.vocab.items():  # notes that sound for long
        preference[index] += long * (token.startswith("Duration_") and int(token.split("_")[1].split(".")[0]) >= 4)
    for row in sample(grammar, preference, rows=4, steps=70, seed=seed, prefix=[BOS]):
        notes, num_bars = listen(tokenizer, row)
        assert broken(tokenizer, row, constraints, programs=[-1, 0, 40], finished=EOS in row) == []
        assert notes
        assert bars is None or EOS not in row or num_bars == bars
        if constraints.polyphony is not None:
            assert most_voices(MidiProcessor(tokenizer).decode(row)) <= constraints.polyphony
