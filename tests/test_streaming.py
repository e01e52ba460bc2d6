"""Streaming: the notes of the whole piece, one by one while it is sampled; or music without end, in flat memory."""

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import Note as ScoreNote
from symusic import Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick
from transformers import LogitsProcessorList

import midimamba
from midimamba import MidiMambaForCausalLM, MidiProcessor, Note, NoteStreamer, streaming
from midimamba.command_options import SamplingOptions
from midimamba.errors import InputError
from midimamba.generation import generate_scores
from midimamba.note_decoding import STREAMED, NoteDecoder
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.tokenizer import build_tokenizer, time_ids, train_tokenizer
from support import make_generator, make_score

Plain = tuple[float, float, int, int, int, bool]  # onset, duration, pitch, velocity, program, whether it is a drum


@pytest.fixture(scope="module")
def tokenizers() -> dict[tuple[str, bool], Any]:
    """Every tokenization with a grammar, untrained and with byte-pair encoding."""
    found = {}
    for name in STREAMED:
        for trained in (False, True):
            tokenizer = build_tokenizer(name, controls=[control_token("key", "C-major")])
            if trained:
                train_tokenizer(tokenizer, [make_score(seed) for seed in range(6)], len(tokenizer.vocab) + 150)
            found[name, trained] = tokenizer
    return found


@pytest.fixture(scope="module")
def untrained(processor: MidiProcessor) -> MidiMambaForCausalLM:
    return make_generator(vocab_size=processor.vocab_size)


def new_notes(score: ScoreTick, prompt: ScoreTick | None = None) -> Counter[Plain]:
    """The notes of a score that its prompt, in the same division, does not have."""
    division = score.ticks_per_quarter
    found = Counter(
        (
            note.time / division,
            note.duration / division,
            note.pitch,
            note.velocity,
            0 if track.is_drum else track.program,
            track.is_drum,
        )
        for track in score.tracks
        for note in track.notes
    )
    return found if prompt is None else found - new_notes(prompt.resample(division))


def plain(notes: Sequence[Note]) -> Counter[Plain]:
    return Counter((note.onset, note.duration, *note[4:]) for note in notes)


def in_order(notes: Sequence[Note]) -> bool:
    return all(before.onset <= after.onset for before, after in pairwise(notes))


def seconds_of(score: ScoreTick) -> dict[tuple[float, int, int, bool], tuple[float, float]]:
    """Onset and duration in seconds of every note, as symusic computes them."""
    division, found = score.ticks_per_quarter, {}
    timed: Any = score.to("second")
    for ticks, seconds in zip(score.tracks, timed.tracks, strict=True):
        program = 0 if ticks.is_drum else ticks.program
        for one, other in zip(ticks.notes, seconds.notes, strict=True):
            found[one.time / division, one.pitch, program, ticks.is_drum] = other.time, other.duration
    return found


def sampled(processor: MidiProcessor, prompt: ScoreTick | None, length: int, seed: int) -> tuple[list[int], int]:
    """Ids of random music under the grammar, in which some ids are likelier than others, and how many are given."""
    ids = processor(prompt, return_tensors="pt")["input_ids"]
    given = ids.shape[1]
    grammar, randomness = processor.grammar(prompt_length=given), torch.Generator().manual_seed(seed)
    vocab = len(processor.midi_tokenizer)
    likely = 2 * torch.randn(vocab, generator=randomness)
    likely[processor.eos_token_id] = -99
    for _ in range(length):
        scores = grammar(ids, torch.randn(1, vocab, generator=randomness) + likely)
        ids = torch.cat([ids, torch.multinomial(scores.softmax(1), 1, generator=randomness)], dim=1)
    return ids[0].tolist(), given


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(STREAMED),
    trained=st.booleans(),
    voices=st.sampled_from((None, 1, 2, 4)),
    division=st.sampled_from((None, 480, 96, 1000, 111, 97)),
    few=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_notes_one_by_one_are_those_of_the_whole(
    tokenizers: dict[tuple[str, bool], Any],
    name: str,
    trained: bool,
    voices: int | None,
    division: int | None,
    few: bool,
    seed: int,
) -> None:
    """Also where notes are tied, end where they are struck again or where a voice is missing, in any division."""
    processor = MidiProcessor(tokenizers[name, trained], programs=[0, -1] if few else None, voices=voices)
    prompt = None if division is None else make_score(seed, bars=3).resample(division, min_dur=1)
    if prompt is not None:  # changes that no id tells of
        later = prompt.end() + seed % (4 * prompt.ticks_per_quarter)
        prompt.tempos.append(Tempo(later, 60))
        prompt.time_signatures.append(TimeSignature(later, 3, 4))
    ids, given = sampled(processor, prompt, 100, seed)
    decoder = NoteDecoder(processor, prompt)
    notes = [note for index in ids[given:] for note in decoder.read([index])]
    notes += decoder.finish()
    whole = processor.continue_score(prompt, ids)
    assert plain(notes) == new_notes(whole, prompt)
    assert in_order(notes)
    expected = seconds_of(whole)
    for note in notes:
        start, duration = expected[note.onset, note.pitch, note.program, note.is_drum]
        assert (note.seconds, note.duration_seconds) == pytest.approx((start, duration), rel=1e-4, abs=2e-3)


@pytest.mark.parametrize("layout", ["mamba", "look-back", "hybrid"])
@pytest.mark.parametrize("prompt", [None, make_score(3, bars=3)])
def test_a_stream_is_what_generate_gives(processor: MidiProcessor, layout: str, prompt: ScoreTick | None) -> None:
    limited = MidiProcessor(processor.midi_tokenizer, voices=3)
    model = looking_back(limited, layout)
    model.generation_config.repetition_penalty = 1.1  # whatever the model's own config asks for
    options = SamplingOptions(num=1, bars=4, seed=5, temperature=0.9)
    state = torch.get_rng_state()
    notes = []
    for note in midimamba.stream(model, limited, prompt, options):
        notes.append(note)
        torch.rand(3)  # what is drawn in between changes nothing
    whole = generate_scores(model, limited, options, prompt=prompt)[0]
    assert plain(notes) == new_notes(whole, prompt)
    assert len(notes) > 10
    torch.set_rng_state(state)
    next(midimamba.stream(model, limited, prompt, options))
    assert torch.equal(torch.get_rng_state(), state)


def looking_back(processor: MidiProcessor, layout: str = "look-back") -> MidiMambaForCausalLM:
    if layout != "look-back":
        options: dict[str, Any] = {} if layout == "mamba" else {"layout": layout, "hidden_size": 64}
        return make_generator(vocab_size=processor.vocab_size, **options)
    bars, positions = time_ids(processor.midi_tokenizer)
    return make_generator(
        vocab_size=processor.vocab_size, lookback_bars=[1, 3], bar_token_ids=bars, position_token_ids=positions
    )


def test_notes_come_while_the_model_samples_and_nothing_is_sampled_after_the_end(
    processor: MidiProcessor, untrained: MidiMambaForCausalLM
) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = untrained.register_forward_hook(count)
    notes = midimamba.stream(untrained, processor, options=SamplingOptions(bars=64, max_new_tokens=2000))
    assert calls == 0
    next(notes)
    first = calls
    assert len(list(islice(notes, 20))) == 20
    assert 0 < first < calls < 1000
    before = calls
    notes.close()  # type: ignore[attr-defined]  # it is a generator
    assert next(notes, None) is None
    assert calls == before
    hook.remove()


def test_controls_are_asked_for(tokenizers: dict[tuple[str, bool], Any]) -> None:
    processor = MidiProcessor(tokenizers["REMI", True])
    model = make_generator(vocab_size=processor.vocab_size)
    options = SamplingOptions(num=1, bars=2, seed=1)
    controls = {"key": "C-major"}
    notes = list(midimamba.stream(model, processor, options=options, controls=controls))
    assert plain(notes) == new_notes(generate_scores(model, processor, options, controls=controls)[0])
    assert plain(notes) != plain(list(midimamba.stream(model, processor, options=options)))


def test_music_without_end_begins_like_music_with_an_end(
    processor: MidiProcessor, untrained: MidiMambaForCausalLM
) -> None:
    finite = list(midimamba.stream(untrained, processor, options=SamplingOptions(bars=4)))
    endless = islice(midimamba.stream(untrained, processor, endless=True), len(finite))
    known = [note for note in finite if note.onset < 8]  # what follows the last bars could shorten their notes
    assert list(endless)[: len(known)] == known


@pytest.mark.parametrize("layout", ["mamba", "look-back", "hybrid"])
def test_music_without_end_takes_no_more_memory(
    processor: MidiProcessor, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_WINDOW", 64)
    model = looking_back(processor, layout)
    sizes, reads = [], []

    def watch(_: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        sizes.append(output.past_key_values.nbytes)
        reads.append(inputs["input_ids"].shape[1])

    model.register_forward_hook(watch, with_kwargs=True)
    notes = midimamba.stream(model, processor, endless=True)
    while len(reads) < (1500 if layout == "look-back" else 600):
        next(notes)
    # All ids and their places, or all keys and values, would be more.
    assert max(sizes) < (sizes[0] + 8 * len(reads) if layout == "look-back" else 2.1 * max(sizes[:200]))
    assert max(reads) <= 2 * 64


def test_look_back_forgets_only_what_no_lag_reaches(processor: MidiProcessor) -> None:
    model = looking_back(processor)
    tokens = torch.tensor([processor.encode(make_score(2, bars=40))])
    kept, forgetful = model.make_state(1), model.make_state(1)
    sizes = []
    with torch.no_grad():
        for at in range(0, tokens.shape[1], 7):
            part = tokens[:, at : at + 7]
            assert torch.equal(model.next_logits(part, kept), model.next_logits(part, forgetful))
            model.forget(forgetful)
            sizes.append(forgetful.seen_tokens)
    assert max(sizes) < kept.seen_tokens / 2


def test_music_without_end_is_not_ended_by_the_model(processor: MidiProcessor) -> None:
    model = make_generator(vocab_size=processor.vocab_size)
    wants_to_end = 50.0 * (torch.arange(model.config.vocab_size) == processor.eos_token_id)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + wants_to_end)
    options = SamplingOptions(bars=8, at_most=True)
    assert len(list(midimamba.stream(model, processor, options=options))) < 5
    assert len(list(islice(midimamba.stream(model, processor, endless=True), 100))) == 100


def test_a_tied_note_is_struck_again_where_it_would_have_to_be_waited_for(processor: MidiProcessor) -> None:
    score = Score(48)
    score.tempos.append(Tempo(0, 120.0))
    score.tracks.append(Track(program=0))
    score.tracks[0].notes.append(ScoreNote(0, 48 * 100, 60, 100))
    score.tracks[0].notes.append(ScoreNote(48 * 110, 48, 64, 100))
    ids = processor.encode(score)
    for longest, expected in ((None, [100.0]), (36.0, [36.0, 36.0, 28.0])):
        decoder = NoteDecoder(processor, longest=longest)
        notes = [*decoder.read(ids), *decoder.finish()]
        assert [note.duration for note in notes if note.pitch == 60] == expected


def test_a_streamer_gives_the_notes_of_generate(processor: MidiProcessor, untrained: MidiMambaForCausalLM) -> None:
    prompt = make_score(4, bars=2)
    inputs = processor(prompt, return_tensors="pt")
    grammar = processor.grammar(prompt_length=inputs["input_ids"].shape[1])
    streamer = NoteStreamer(processor, prompt, timeout=60)
    result: list[Any] = []

    def generate() -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "max_new_tokens": 60,
            "do_sample": True,
            "logits_processor": LogitsProcessorList([grammar]),
        }
        result.append(untrained.generate(**inputs, **options, streamer=streamer))

    thread = threading.Thread(target=generate)
    thread.start()
    notes = list(streamer)
    thread.join()
    assert plain(notes) == new_notes(processor.continue_score(prompt, result[0]), prompt)


def test_a_streamer_refuses_what_it_cannot_decode(processor: MidiProcessor) -> None:
    with pytest.raises(ValueError, match="one sequence, not 2"):
        NoteStreamer(processor).put(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="give NoteStreamer the prompt"):
        NoteStreamer(processor).put(processor(make_score(1), return_tensors="pt")["input_ids"])
    backwards = [processor.midi_tokenizer.vocab[name] for name in ("Position_9", "Position_3")]
    with pytest.raises(ValueError, match="go back in time"):
        NoteDecoder(processor).read(backwards)


def test_what_cannot_be_streamed_is_told_at_once(untrained: MidiMambaForCausalLM, processor: MidiProcessor) -> None:
    with pytest.raises(InputError, match="streaming needs REMI, TSD, Structured, not MIDILike"):
        midimamba.stream(untrained, MidiProcessor(build_tokenizer("MIDILike")))
    with pytest.raises(InputError, match="whole pieces are chosen"):
        midimamba.stream(untrained, processor, options=SamplingOptions(best_of=2))
    with pytest.raises(InputError, match="no control"):
        midimamba.stream(untrained, processor, controls={"key": "C-major"})
