"""`pipeline("midi-generation")`: what transformers' users try first."""

from pathlib import Path

import pytest
import torch
from symusic.core import ScoreTick
from torch import Tensor
from transformers import LogitsProcessor, Pipeline, pipeline

from midimamba import MidiGenerationPipeline, MidiMambaForCausalLM, MidiProcessor
from midimamba.errors import InputError
from midimamba.tokenization.ingest import MidiRefusedError
from support import make_generator, make_score


@pytest.fixture(scope="module")
def folder(processor: MidiProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_generator(vocab_size=processor.vocab_size).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compose(folder: Path) -> MidiGenerationPipeline:
    # Transformers declares its own tasks only.
    loaded: Pipeline = pipeline("midi-generation", model=str(folder), device="cpu")  # type: ignore[call-overload]
    assert isinstance(loaded, MidiGenerationPipeline)
    return loaded


def notes(score: ScoreTick) -> set[tuple[int, int, int]]:
    return {(track.program, note.time, note.pitch) for track in score.tracks for note in track.notes}


def test_it_takes_the_fast_class_and_continues_a_file(
    compose: MidiGenerationPipeline, processor: MidiProcessor, tmp_path: Path
) -> None:
    assert isinstance(compose.model, MidiMambaForCausalLM)
    prompt = make_score(3, bars=4)
    prompt.dump_midi(tmp_path / "prompt.mid")
    opening = notes(processor.decode(processor.encode(prompt)))
    torch.manual_seed(0)
    scores = compose(str(tmp_path / "prompt.mid"), num_return_sequences=3, max_new_tokens=40)
    assert len(scores) == 3
    assert all(opening < notes(score) for score in scores)


def test_several_prompts_and_none(compose: MidiGenerationPipeline) -> None:
    results = compose([make_score(1, bars=2), make_score(2, bars=2).dumps_midi()], max_new_tokens=20)
    assert [len(scores) for scores in results] == [1, 1]
    (score,) = compose(max_new_tokens=40)
    assert score.note_num() > 0


def test_options_are_those_of_generate(compose: MidiGenerationPipeline) -> None:
    greedy = [compose(make_score(1, bars=2), do_sample=False, max_new_tokens=20)[0].dumps_midi() for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_the_grammar_has_the_last_word(compose: MidiGenerationPipeline, processor: MidiProcessor) -> None:
    class PreferPadding(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores = scores.clone()
            scores[:, processor.pad_token_id] += 1e4
            return scores

    (score,) = compose(make_score(1, bars=2), max_new_tokens=20, logits_processor=[PreferPadding()])
    assert notes(score) > notes(processor.decode(processor.encode(make_score(1, bars=2))))


def test_what_cannot_be_used_is_named(compose: MidiGenerationPipeline) -> None:
    with pytest.raises(MidiRefusedError):
        compose(b"no music")
    with pytest.raises(InputError, match="control"):
        compose(None, controls={"key": "H-moll"})
