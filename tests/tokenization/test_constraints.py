"""Constraints while sampling: what they mean, that no note breaks them, and that no row is ever stuck."""

import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from grammar_support import BOS, EOS, PAD, prefer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miditok import MusicTokenizer
from symusic import Note, Score, Track
from torch import Tensor

from midimamba.errors import InputError
from midimamba.tokenization.choices import ONE_STREAM
from midimamba.tokenization.constraints import ConflictError, Constraints
from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.grammars import make_grammar
from midimamba.tokenization.musical_time import count_bars
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
    "Rest",
    "Beat",
    "Pattern",
    "Track",
    "EOS",
]


@cache
def tokenizer_of(name: str, model: str) -> MusicTokenizer:
    options: dict[str, Any] = {} if name in ("Structured", "PerTok") else SMALL
    options = options | {"use_rests": name.endswith("with rests")}
    tokenizer = build_tokenizer(name.split()[0], **options)
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


TIMED = ("polyphony", "grid", "notes_per_bar")
# What a tokenization cannot keep, and refuses.
NOT_KEPT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("MIDILike", "PerTok", "MMM", "REMI with rests", "TSD with rests"), TIMED),
    **dict.fromkeys(("TSD", "Structured", "BEAT"), ("notes_per_bar",)),
}
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE_STREAM, "REMI with rests", "TSD with rests"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
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
    wanted = {key: value for key, value in wanted.items() if key not in NOT_KEPT.get(name, ())}
    if "Bar_None" not in tokenizer_of(name, model).vocab or name == "PerTok":
        bars = None
    tokenizer, constraints = tokenizer_of(name, model), Constraints(**wanted)
    limits: dict[str, Any] = {} if bars is None else {"max_bars": bars, "min_bars": bars}
    try:
        grammar = make_grammar(tokenizer, programs=[-1, 0, 40], constraints=wanted, **limits)
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


@pytest.mark.parametrize(
    ("scale", "classes"),
    [
        ("C-major", {0, 2, 4, 5, 7, 9, 11}),
        ("D-dorian", {2, 4, 5, 7, 9, 11, 0}),
        ("F#-minor", {6, 8, 9, 11, 1, 2, 4}),
        ("Bb-Major-Pentatonic", {10, 0, 2, 5, 7}),
        ("C,E,G", {0, 4, 7}),
        ("Cb", {11}),
    ],
)
def test_a_scale_is_its_pitch_classes_and_does_not_bind_drums(scale: str, classes: set[int]) -> None:
    constraints = Constraints(scale=scale)
    assert {pitch % 12 for pitch in constraints.pitches(40)} == classes
    assert constraints.pitches(-1) == frozenset(range(128))


def test_the_range_of_an_instrument_takes_the_place_of_that_of_all() -> None:
    constraints = Constraints(pitch_range=["48-72", "violin=55-100"])
    assert constraints.pitches(0) == frozenset(range(48, 73))
    assert constraints.pitches(40) == frozenset(range(55, 101))
    assert len(constraints.pitches(-1)) == 128
    assert Constraints(instruments=["piano", "drums", "Church Organ"]).programs == [-1, 0, 19]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"scale": "H-major"}, "scale is 'H-major'"),
    ({"scale": "C-majr"}, "scale is 'C-majr'"),
    ({"scale": "C,X"}, "'X' is not a pitch class"),
    ({"pitch_range": "72-48"}, "pitch_range is '72-48'"),
    ({"pitch_range": "0-200"}, "pitch_range is '0-200'"),
    ({"pitch_range": ["1-2", "3-4"]}, "twice"),
    ({"instruments": ["fiddel"]}, "no instrument 'fiddel'.*nearest are"),
    ({"polyphony": 0}, "polyphony is 0"),
    ({"grid": "8"}, "grid is '8'"),
    ({"notes_per_bar": "8-4"}, "notes_per_bar is '8-4'"),
    ({"tempo": 3}, "no constraint 'tempo'"),
    ({"scale": 3}, "scale is 3: give text"),
    ({"pitch_range": 5}, "pitch_range is 5: give text, or a list"),
    ({"instruments": ["violin", 1]}, "instruments is 1: give text"),
    ({"instruments": [None]}, "instruments is None: give text"),
    ({"pitch_range": [None]}, "pitch_range is None: give text"),
    ({"grid": "1/64"}, "grid 1/64 .*12 positions per quarter"),
    ({"scale": "C", "pitch_range": "61-62"}, "scale C and pitch_range 61-62 leave all instruments no pitch"),
    ({"scale": "C", "pitch_range": ["violin=61-62"]}, "scale C and pitch_range violin=61-62 leave violin no pitch"),
    ({"instruments": ["violin", "flute"], "pitch_range": ["flute=20-20"], "scale": "C"}, "leave flute no pitch"),
    ({"notes_per_bar": "200-", "polyphony": 1, "grid": "1/8", "instruments": ["violin"]}, "polyphony 1, grid 1/8"),
]


@pytest.mark.parametrize(("wanted", "message"), WRONG)
def test_what_cannot_be_kept_is_refused_by_name(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        MidiGrammar(tokenizer_of("REMI", "untrained"), constraints=wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "constraint"),
    [(name, each) for name, kept in NOT_KEPT.items() for each in kept if len(kept) == len(TIMED)],
)
def test_what_a_tokenization_cannot_keep_is_refused_by_name(name: str, constraint: str) -> None:
    wanted = {"polyphony": 2, "grid": "1/4", "notes_per_bar": "1-"}[constraint]
    with pytest.raises(InputError, match=f"{constraint} needs .*not {name}|{constraint} needs a tokenizer without"):
        make_grammar(tokenizer_of(name, "untrained"), constraints={constraint: wanted})
    with pytest.raises(InputError, match="notes_per_bar needs REMI, not BEAT"):
        make_grammar(tokenizer_of("BEAT", "untrained"), constraints={"notes_per_bar": "1-"})


def test_a_grid_that_is_too_coarse_for_beat_is_refused_by_name() -> None:
    with pytest.raises(ConflictError, match=r"grid 1/1 is too coarse for BEAT: choose 1/2 or finer"):
        make_grammar(tokenizer_of("BEAT", "untrained"), constraints={"grid": "1/1"})
    make_grammar(tokenizer_of("BEAT", "untrained"), constraints={"grid": "1/2"})


@pytest.mark.parametrize("name", ["TSD", "Structured"])
def test_notes_per_bar_need_bars(name: str) -> None:
    with pytest.raises(InputError, match=f"notes_per_bar needs bars, which {name} does not have"):
        MidiGrammar(tokenizer_of(name, "untrained"), constraints={"notes_per_bar": "1-"})


@pytest.mark.parametrize("name", ["REMI", "TSD", "Structured"])
@pytest.mark.parametrize("model", ["untrained", "BPE"])
def test_a_continuation_keeps_to_constraints_that_its_prompt_breaks(name: str, model: str) -> None:
    tokenizer = tokenizer_of(name, model)
    processor = MidiProcessor(tokenizer)
    score = make_score(2, bars=3)
    prompt = processor.encode(score)
    wanted: dict[str, Any] = {"scale": "C,E,G", "polyphony": 2, "grid": "1/8", "instruments": ["flute", "drums"]}
    limits: dict[str, Any] = {"max_bars": 2, "min_bars": 2} if name == "REMI" else {}
    if name == "REMI":
        wanted["notes_per_bar"] = "2-12"
    grammar = processor.grammar(prompt_length=len(prompt), constraints=wanted, **limits)
    assert broken(tokenizer, prompt, Constraints(**wanted))
    for row in sample(grammar, torch.zeros(tokenizer.vocab_size), 4, 60, 0, prompt, stuck=True):
        assert broken(tokenizer, row, Constraints(**wanted), prompt, finished=EOS in row) == []
        assert len(listen(tokenizer, row)[0]) > len(listen(tokenizer, prompt)[0])


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("bars", [1, 4])
def test_a_prompt_may_end_with_more_notes_than_may_sound(
    numba: bool, bars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midimamba.tokenization.grammar.find_spec", lambda name: numba or None)
    tokenizer = build_tokenizer(use_time_signatures=False)  # else one long bar would do
    processor = MidiProcessor(tokenizer)
    score = Score(480)
    score.tracks.append(Track(notes=[Note(1440, 480, 60, 64), Note(1440, 7 * 480, 64, 64)]))
    prompt = processor(score, return_tensors="pt")["input_ids"]
    draw, ids = torch.Generator().manual_seed(1), prompt
    options: dict[str, Any] = {"prompt_length": prompt.shape[1], "max_bars": bars, "min_bars": bars}
    grammar = MidiGrammar(tokenizer, constraints={"polyphony": 1}, **options)
    with pytest.raises(ConflictError, match="beside the notes that the prompt") if bars == 1 else nullcontext():
        while int(ids[0, -1]) != EOS:
            scores = grammar(ids, torch.randn(1, len(tokenizer.vocab), generator=draw))
            ids = torch.cat([ids, scores.argmax(dim=1, keepdim=True)], dim=1)
    if bars == 4:
        result = processor.continue_score(score, ids[0], polyphony=1)
        onsets = [note.time for note in result.tracks[0].notes if note.time > 1440]
        assert min(onsets) >= 1440 + 7 * 480  # where the prompt is silent
        assert count_bars(result, max(onsets) + 1) == 1 + 4


def test_a_prompt_whose_instruments_have_no_pitch_is_refused_before_anything_is_sampled() -> None:
    processor = MidiProcessor(tokenizer_of("REMI", "untrained"))
    prompt = processor.encode(make_score(2, bars=2, programs=(40,), drums=False))
    grammar = processor.grammar(prompt_length=len(prompt), constraints={"pitch_range": ["violin=0-11"], "scale": "C"})
    grammar(torch.tensor([prompt]), torch.zeros(1, processor.midi_tokenizer.vocab_size))
    grammar = processor.grammar(
        prompt_length=len(prompt), constraints={"pitch_range": ["piano=0-11", "1-2"], "scale": "C"}
    )
    with pytest.raises(InputError, match="leave no instrument of the prompt a pitch"):
        grammar(torch.tensor([prompt]), torch.zeros(1, processor.midi_tokenizer.vocab_size))


def test_only_wanted_instruments_play_whatever_the_prompt_and_the_training_data_have() -> None:
    tokenizer = tokenizer_of("REMI", "BPE")
    processor = MidiProcessor(tokenizer, programs=[0])
    plain = processor.grammar()
    asked = processor.grammar(constraints={"instruments": ["flute"]})
    for grammar, program in ((plain, 0), (asked, 73)):
        rows = sample(grammar, prefer(tokenizer, "Program"), 4, 40, 1, [BOS])
        assert {note.program for row in rows for note in listen(tokenizer, row)[0]} == {program}
