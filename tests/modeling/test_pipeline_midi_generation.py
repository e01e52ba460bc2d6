"""`pipeline("midi-generation")`: what transformers' users try first."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from symusic import Score
from symusic.core import ScoreTick
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LogitsProcessor, Pipeline, pipeline

from midimamba import (
    MidiGenerationPipeline,
    MidiMambaForCausalLM,
    MidiProcessor,
    MusicalDiscriminator,
    MusicalDiscriminatorConfig,
)
from midimamba.errors import InputError
from midimamba.tokenization.ingest import MidiRefusedError
from midimamba.tokenization.musical_time import bar_starts, count_bars
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_discriminator, make_generator, make_score


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


def notes(score: ScoreTick) -> set[tuple[int, Fraction, int]]:
    """Program, onset in quarter notes, pitch."""
    division = score.ticks_per_quarter
    return {
        (track.program, Fraction(note.time, division), note.pitch) for track in score.tracks for note in track.notes
    }


@pytest.mark.slow
def test_a_gap_is_filled_and_the_rest_stays(tmp_path: Path) -> None:
    processor = MidiProcessor(build_tokenizer(infill=True))
    make_generator(vocab_size=processor.vocab_size).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    compose: Any = pipeline("midi-generation", model=str(tmp_path), device="cpu")  # type: ignore[call-overload]
    songs = [make_score(3), make_score(4)]
    for song, found in zip(songs, compose(songs, infill={"bars": (2, 3), "tracks": [1]}, num=2, seed=0), strict=True):
        assert len(found) == 2
        start, end = bar_starts(song)[[1, 3]].astype(int).tolist()
        for score in found:
            assert [score.tracks[i] for i in (0, 2, 3)] == [song.tracks[i] for i in (0, 2, 3)]
            mine, its = (
                sorted(
                    (n.time, n.pitch, n.velocity, n.duration)
                    for n in each.tracks[1].notes
                    if not start <= n.time < end
                )
                for each in (score, song)
            )
            assert mine == its
    with pytest.raises(ValueError, match="leave out one of the two"):
        compose(songs[0], infill={"bars": (2, 3)}, discriminator=make_discriminator(vocab_size=processor.vocab_size))
    with pytest.raises(ValueError, match="no piece with a gap"):
        compose(infill={"bars": (2, 3)})


def test_it_takes_the_fast_class_and_continues_a_file(compose: MidiGenerationPipeline, tmp_path: Path) -> None:
    assert isinstance(compose.model, MidiMambaForCausalLM)
    prompt = make_score(3, bars=4)
    prompt.dump_midi(tmp_path / "prompt.mid")
    torch.manual_seed(0)
    scores = compose(str(tmp_path / "prompt.mid"), num_return_sequences=3, max_new_tokens=40)
    assert len(scores) == 3
    assert all(notes(prompt) < notes(score) for score in scores)


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
    assert notes(score) > notes(make_score(1, bars=2))


KINDS = {
    "scores": lambda prompts, folder: prompts,
    "bytes": lambda prompts, folder: [prompt.dumps_midi() for prompt in prompts],
    "files": lambda prompts, folder: [str(write(prompt, folder)) for prompt in prompts],
    "tuple": lambda prompts, folder: tuple(prompts),
    "generator": lambda prompts, folder: (prompt for prompt in prompts),
    "data set": lambda prompts, folder: Prompts(prompts),
}


class Prompts(Dataset[ScoreTick]):
    def __init__(self, prompts: list[ScoreTick]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> ScoreTick:
        return self.prompts[index]


def write(score: ScoreTick, folder: Path) -> Path:
    file = folder / f"{len(list(folder.iterdir()))}.mid"
    score.dump_midi(file)
    return file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num", "batch_size"), [(2, 3), (2, 2), (1, 3)])
def test_batches_give_what_single_prompts_give(
    compose: MidiGenerationPipeline, kind: str, num: int, batch_size: int, tmp_path: Path
) -> None:
    # Of three lengths, so that two are padded. Beams draw nothing.
    music = [make_score(seed, bars=bars) for seed, bars in ((1, 2), (2, 1), (3, 3))]
    prompts = [Score.from_midi(score.dumps_midi()) for score in music]
    options: dict[str, Any] = {"num_beams": 2, "do_sample": False, "num_return_sequences": num, "max_new_tokens": 16}
    alone = [[score.dumps_midi() for score in compose(prompt, **options)] for prompt in prompts]
    results = compose(KINDS[kind](prompts, tmp_path), batch_size=batch_size, **options)
    assert [[score.dumps_midi() for score in scores] for scores in results] == alone
    assert [len(scores) for scores in alone] == [num] * 3


def test_batches_of_new_pieces_and_no_inputs(compose: MidiGenerationPipeline) -> None:
    results = compose([None, None, None], batch_size=2, num=2, max_new_tokens=30)
    assert [len(scores) for scores in results] == [2, 2, 2]
    assert all(score.note_num() for scores in results for score in scores)
    assert compose([]) == []


def test_bars_and_seed_are_those_of_the_command(
    compose: MidiGenerationPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [make_score(1, bars=2), make_score(2, bars=4)]
    runs = [compose(prompts, batch_size=2, num=2, bars=2, seed=5, max_new_tokens=400) for _ in range(2)]
    assert [[score.dumps_midi() for score in pair] for pair in runs[0]] == [
        [score.dumps_midi() for score in pair] for pair in runs[1]
    ]
    for scores, bars in zip(runs[0], (2, 4), strict=True):
        for score in scores:
            last = max(int(track.notes.numpy()["time"].max()) for track in score.tracks if track.notes)
            assert count_bars(score, last + 1) == bars + 2
    assert not caplog.records
    compose(prompts, bars=8, seed=5, max_new_tokens=20)
    assert [record.message for record in caplog.records] == [
        "1 of 1 pieces stop before 8 new bars are full: raise max_new_tokens"
    ] * 2


@pytest.mark.parametrize(
    "options", [{"top_p": 2}, {"temperature": float("nan")}, {"bars": 0}, {"seed": -1}, {"num": 0}]
)
def test_options_that_make_no_sense_are_refused(compose: MidiGenerationPipeline, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))} is "):
        compose(None, **options)


def test_weights_that_hold_nan_are_named(processor: MidiProcessor) -> None:
    model = make_generator(vocab_size=processor.vocab_size)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="weights hold NaN"):
        MidiGenerationPipeline(model, processor=processor)(None)


def test_what_cannot_be_used_is_named(compose: MidiGenerationPipeline) -> None:
    with pytest.raises(MidiRefusedError):
        compose(b"no music")
    with pytest.raises(InputError, match="control"):
        compose(None, controls={"key": "H-moll"})


class PrefersShort:
    """A judge that remembers what it is asked."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def log_odds(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        self.seen += [list(sequence) for sequence in sequences]
        return torch.tensor([-1000.0 * len(sequence) for sequence in sequences])


def test_a_judge_chooses_for_every_prompt_of_a_batch(
    compose: MidiGenerationPipeline, processor: MidiProcessor
) -> None:
    prompts, judge = [make_score(1, bars=1), make_score(2, bars=3)], PrefersShort()
    results = compose(
        prompts, batch_size=2, num=2, best_of=3, bars=2, seed=1, max_new_tokens=60, discriminator=judge, pick="best"
    )
    assert [len(scores) for scores in results] == [2, 2]
    assert len(judge.seen) == 2 * 2 * 3
    for index, score in enumerate(score for scores in results for score in scores):
        prompt, group = prompts[index // 2], judge.seen[3 * index : 3 * index + 3]
        opening = processor.encode(prompt)
        assert all(ids[: len(opening)] == opening for ids in group)  # without the padding of shorter prompts
        expected = processor.continue_score(prompt, min(group, key=len))
        assert score.dumps_midi() == expected.dumps_midi()


def test_a_discriminator_of_tokens_chooses_by_the_seed(
    compose: MidiGenerationPipeline, processor: MidiProcessor
) -> None:
    options: dict[str, Any] = {"discriminator": make_discriminator(vocab_size=processor.vocab_size), "bars": 1}
    runs = [compose(None, seed=seed, max_new_tokens=40, **options)[0].dumps_midi() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_choice_that_nothing_can_make_is_refused(compose: MidiGenerationPipeline) -> None:
    with pytest.raises(ValueError, match="give discriminator=… as well"):
        compose(None, best_of=4)
    with pytest.raises(ValueError, match="reads 11 different tokens, but the generator's tokenizer has"):
        compose(None, discriminator=make_discriminator())
    with pytest.raises(ValueError, match="a MusicalDiscriminator does not read tokens: give a MidiDiscriminator, or"):
        compose(
            None,
            discriminator=[MusicalDiscriminator(MusicalDiscriminatorConfig(feature_names=["a"], feature_widths=[1]))],
        )
    with pytest.raises(InputError, match="best_of is 1: give at least 2"):
        compose(None, discriminator=PrefersShort(), best_of=1)
    with pytest.raises(ValueError, match="pick is 'worst'"):
        compose(None, discriminator=PrefersShort(), pick="worst")


def test_new_notes_keep_to_constraints(compose: MidiGenerationPipeline) -> None:
    wanted = {"scale": "C,E,G", "instruments": ["flute"], "polyphony": 2}
    (score,) = compose(constraints=wanted, bars=2, max_new_tokens=80, seed=0)
    assert {(program, pitch % 12) for program, _, pitch in notes(score)} <= {(73, 0), (73, 4), (73, 7)}
    with pytest.raises(InputError, match="no constraint 'skale'"):
        compose(constraints={"skale": "C-major"}, bars=2)
