"""The grammar of every tokenization that has one, with options, trained vocabularies and controls."""

from collections import Counter
from typing import Any

import pytest
import torch
from grammar_support import BOS, CONTROL_TOKENS, EOS, PAD, assert_allowed, expand, prefer, read, sample, starts_of
from symusic.core import ScoreTick
from transformers import LogitsProcessorList, MambaConfig, MambaForCausalLM

from midimamba.errors import InputError
from midimamba.tokenization.grammar import MAX_SILENT_TOKENS, MidiGrammar
from midimamba.tokenization.grammar_types import SUPPORTED
from midimamba.tokenization.grammars import make_grammar
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from midimamba.tokenization.voices import most_voices


def test_real_music_of_structured_is_always_allowed(scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer("Structured")
    train_tokenizer(tokenizer, scores[:20], len(tokenizer.vocab) + 400)
    for score in scores[:4]:
        assert_allowed(tokenizer, score)


@pytest.mark.parametrize("kind", ["Pitch", "PitchDrum", "Duration", "TimeShift_0.0.1", "none"])
@pytest.mark.parametrize("model", ["untrained", "BPE"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_no_onset_has_a_note_twice_or_too_many_or_a_foreign_program(
    name: str, model: str, kind: str, scores: list[ScoreTick]
) -> None:
    tokenizer = build_tokenizer(name, drums_pitch_range=(60, 61))
    if model != "untrained":
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 200, model)
    processor = MidiProcessor(tokenizer, programs=[-1, 40])
    preference = prefer(tokenizer, kind)
    if "_" in kind and kind in tokenizer.vocab:
        preference[tokenizer.vocab[kind]] = 60.0
    for row in sample(tokenizer, processor.grammar(max_notes=4, voices=2), preference, rows=20, steps=60):
        score = processor.decode(row)
        # In MMM this holds within each track: two of them may have one program.
        for tracks in [[track] for track in score.tracks] if name == "MMM" else [score.tracks]:
            found = [(track.is_drum, track.program, n.time, n.pitch) for track in tracks for n in track.notes]
            assert len(set(found)) == len(found) > 0
            assert {-1 if is_drum else program for is_drum, program, _, _ in found} <= {-1, 40}
            onsets = [(time, is_drum) for is_drum, _, time, _ in found]
            if name == "PerTok":  # its microtiming may move notes of two places to the same tick
                onsets = places([token for index in row for token in expand(tokenizer, index)])
            assert max(Counter(time for time, _ in onsets).values()) <= 4
            assert max(Counter(time for time, is_drum in onsets if not is_drum).values(), default=0) <= 2


def places(tokens: list[str]) -> list[tuple[int, bool]]:
    """Where PerTok's notes begin but for microtiming, in ticks, and whether they are drums."""
    bar, place = 0, 0
    found: list[tuple[int, bool]] = []
    for kind, value in (token.split("_") for token in tokens):
        if kind == "Bar":
            bar, place = bar + 1920, 0
        elif kind == "TimeShift":
            beats, ticks, quarter = map(int, value.split("."))
            place += beats * quarter + ticks
        elif kind in ("Pitch", "PitchDrum"):
            found.append((bar + place, kind == "PitchDrum"))
    return found


def test_new_music_of_pertok_keeps_to_its_voices_but_where_more_begin_at_one_tick() -> None:
    tokenizer = build_tokenizer("PerTok")
    processor = MidiProcessor(tokenizer, programs=[0, 40], voices=2)
    limited = 0
    for row in sample(tokenizer, processor.grammar(), prefer(tokenizer, "TimeShift"), rows=10, steps=80):
        before, score = processor.decode(row), processor.continue_score(None, row)
        at_once = Counter(note.time for track in score.tracks for note in track.notes)
        assert most_voices(score) <= max(2, *at_once.values())
        assert starts_of(score) == starts_of(before)
        limited += most_voices(before) > 2
    assert limited


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("trained", [False, True])
def test_controls_are_never_sampled_and_change_nothing(name: str, trained: bool, scores: list[ScoreTick]) -> None:
    shift = len(CONTROL_TOKENS)
    tokenizers = [build_tokenizer(name, controls=tokens) for tokens in ([], CONTROL_TOKENS)]
    if trained:
        for tokenizer in tokenizers:  # byte-pair encoding learns the same ids but for the shift
            train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 200)
    size = tokenizers[0].vocab_size
    options: dict[str, Any] = {"max_bars": 3} if name == "REMI" else {}
    plain, controlled = (make_grammar(tokenizer, **options) for tokenizer in tokenizers)
    for row in sample(tokenizers[0], plain, torch.zeros(size), rows=6, steps=20):
        for length in range(0, len(row) + 1, 2):
            logits = torch.randn(1, size)
            expected = plain(torch.tensor([[BOS, *row[:length]]]), logits)
            music = [index + shift for index in row[:length]]
            shifted = torch.cat([logits[:, :3], torch.full((1, shift), 50.0), logits[:, 3:]], dim=1)
            middle = length // 2
            within = [BOS, *music[:middle], 4, *music[middle:]]
            before = [[*prefix, *music] for prefix in ([BOS], [BOS, 3, 5], [PAD, BOS, 3, 4, 5], [3])]
            for ids in (*before, within):
                judged = controlled(torch.tensor([ids]), shifted)
                assert torch.isinf(judged[:, 3 : 3 + shift]).all()
                assert torch.equal(torch.cat([judged[:, :3], judged[:, 3 + shift :]], dim=1), expected)


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("model", ["untrained", "BPE", "Unigram"])
def test_uniform_samples_after_controls_are_valid_music(name: str, model: str, scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer(name, controls=CONTROL_TOKENS)
    if model != "untrained":
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 200, model)
    processor = MidiProcessor(tokenizer)
    prefix = processor.encode(None, controls={"key": "C-major", "bars": "1-8"})
    assert prefix == [BOS, 3, 5]
    preference = torch.zeros(tokenizer.vocab_size)
    preference[3:6] = 50.0  # a model that would only write controls
    for row in sample(tokenizer, processor.grammar(), preference, rows=40, steps=MAX_SILENT_TOKENS, prefix=prefix):
        assert row[:2] == [3, 5]
        assert not {3, 4, 5} & set(row[2:])
        if name == "REMI":
            assert read(tokenizer, row[2:]).notes > 0
        assert processor.decode(row).note_num() > 0


def test_generate_with_a_padded_batch_and_with_beams(scores: list[ScoreTick]) -> None:
    processor = MidiProcessor(build_tokenizer())
    torch.manual_seed(0)
    size = processor.midi_tokenizer.vocab_size
    config = MambaConfig(vocab_size=size, hidden_size=8, num_hidden_layers=1, state_size=4, pad_token_id=PAD)
    model = MambaForCausalLM(config).eval()
    inputs = processor([scores[0], scores[1]], return_tensors="pt")
    prompt = {key: value[:, :30] for key, value in inputs.items()}
    strategies: list[dict[str, Any]] = [{"do_sample": True}, {"num_beams": 3}]
    for options in strategies:
        ids = model.generate(
            **prompt,
            **options,
            max_new_tokens=25,
            eos_token_id=EOS,
            logits_processor=LogitsProcessorList([processor.grammar()]),
        )
        assert isinstance(ids, torch.Tensor)
        for row in ids.tolist():
            read(processor.midi_tokenizer, [index for index in row if index > EOS])


@pytest.mark.parametrize("name", ["CPWord", "Octuple", "MuMIDI"])
def test_other_tokenizations_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"supports {', '.join(SUPPORTED)}, not {name}"):
        MidiProcessor(build_tokenizer(name)).grammar()


# What a tokenization does not let one choose.
MISSING = {"Structured": {"use_tempos"}, "MMM": {"program_changes"}, "BEAT": {"beat_res", "use_time_signatures"}}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["BPE", "Unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {"beat_res": {(0, 16): 6}, "use_velocities": False},
        {"program_changes": False},
        {"num_velocities": 4, "use_tempos": False, "use_time_signatures": False},
        {"pitch_range": (40, 80), "drums_pitch_range": (50, 60), "log_tempos": False, "encode_ids_split": "no"},
    ],
)
def test_options_that_keep_its_rules_are_honoured(
    model: str, options: dict[str, Any], scores: list[ScoreTick]
) -> None:
    for name in SUPPORTED:
        if MISSING.get(name, set()) & options.keys():
            continue
        tokenizer = build_tokenizer(name, **options)
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 100, model)
        processor = MidiProcessor(tokenizer)
        for kind in ("Bar", "TimeShift", "Program", "EOS"):
            rows = sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=10, steps=MAX_SILENT_TOKENS)
            assert all(processor.decode(row).note_num() > 0 for row in rows)
        assert_allowed(tokenizer, scores[0])


@pytest.mark.parametrize("model", ["untrained", "BPE", "Unigram"])
@pytest.mark.parametrize("kind", ["TimeShift", "Program", "Pitch", "PitchDrum", "Velocity", "Duration", "EOS"])
def test_structured_samples_repeat_the_five_tokens_of_a_note(kind: str, model: str, scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer("Structured")
    if model != "untrained":
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 200, model)
    processor = MidiProcessor(tokenizer)
    for row in sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=20, steps=MAX_SILENT_TOKENS):
        tokens = [token.split("_") for index in row for token in expand(tokenizer, index)]
        for first in range(0, len(tokens) - 4, 5):
            shift, (program, number), (pitch, _), velocity, duration = tokens[first : first + 5]
            assert (shift[0], program, velocity[0], duration[0]) == ("TimeShift", "Program", "Velocity", "Duration")
            assert pitch == ("PitchDrum" if number == "-1" else "Pitch")
        assert len(tokens) >= 5
        assert processor.decode(row).note_num() == len(tokens) // 5
    assert_allowed(tokenizer, scores[0])


def test_max_bars_needs_bars() -> None:
    with pytest.raises(ValueError, match="bars"):
        MidiGrammar(build_tokenizer("TSD"), max_bars=4)
    with pytest.raises(ValueError, match="at least 1"):
        MidiGrammar(build_tokenizer(), max_bars=0)


def test_the_grammar_of_one_tokenization_refuses_others() -> None:
    with pytest.raises(InputError, match="MidiGrammar is for REMI, TSD, Structured, not MIDILike"):
        MidiGrammar(build_tokenizer("MIDILike"))
