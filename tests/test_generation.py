"""`midimamba generate`: samples always hold notes, whatever the model, and continue their prompts."""

from pathlib import Path

import pytest
import torch
from symusic import Score
from symusic.core import ScoreTick

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.errors import InputError
from midimamba.generation import generate_scores, load_pair
from support import make_generator, make_score


@pytest.fixture(scope="module")
def untrained(processor: MidiProcessor) -> MidiMambaForCausalLM:
    return make_generator(vocab_size=processor.vocab_size)


def onsets(score: ScoreTick) -> set[tuple[int, int, int]]:
    return {(track.program, note.time, note.pitch) for track in score.tracks for note in track.notes}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_samples_of_an_untrained_model_hold_notes(
    untrained: MidiMambaForCausalLM, processor: MidiProcessor, temperature: float, tmp_path: Path
) -> None:
    scores = generate_scores(
        untrained, processor, num=16, bars=3, max_new_tokens=60, temperature=temperature, top_p=1.0, seed=1
    )
    assert len(scores) == 16
    for score in scores:
        score.dump_midi(tmp_path / "x.mid")
        assert Score(tmp_path / "x.mid").note_num() > 0


def test_the_shortest_sample_holds_a_note(untrained: MidiMambaForCausalLM, processor: MidiProcessor) -> None:
    for score in generate_scores(untrained, processor, num=32, bars=1, max_new_tokens=16, top_p=1.0):
        assert score.note_num() > 0


def test_a_continuation_opens_with_its_prompt_and_goes_on(
    untrained: MidiMambaForCausalLM, processor: MidiProcessor
) -> None:
    prompt = make_score(3, bars=4)
    opening = processor.decode(processor.encode(prompt))
    for score in generate_scores(untrained, processor, prompt=prompt, num=3, bars=2, max_new_tokens=80, top_p=1.0):
        assert onsets(opening) < onsets(score)
        bars = processor.tokenizer.decode(processor.encode(score)).split().count("Bar_None")
        assert bars <= 4 + 2


def test_the_same_seed_is_the_same_music(untrained: MidiMambaForCausalLM, processor: MidiProcessor) -> None:
    pieces = [
        generate_scores(untrained, processor, num=2, bars=2, max_new_tokens=40, seed=seed)[0].dumps_midi()
        for seed in (1, 1, 2)
    ]
    assert pieces[0] == pieces[1] != pieces[2]


def test_a_tokenizer_of_another_model_is_refused(processor: MidiProcessor, tmp_path: Path) -> None:
    make_generator(vocab_size=50).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="knows 50 tokens, its tokenizer 760"):
        load_pair(str(tmp_path))


def test_the_readme_interface_generates(processor: MidiProcessor, untrained: MidiMambaForCausalLM) -> None:
    inputs = processor([make_score(1), make_score(2, bars=2)], return_tensors="pt")
    torch.manual_seed(0)
    ids = untrained.generate(**inputs, max_new_tokens=20, do_sample=True, logits_processor=[processor.grammar()])
    assert all(score.note_num() > 0 for score in processor.batch_decode(ids))
