"""`midimamba generate --discriminator D --best-of 8`: discriminators choose among draws."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from symusic import Score
from torch import Tensor

import support
from midimamba import MidiMambaForCausalLM, MidiProcessor, generation
from midimamba.command_options import SamplingOptions
from midimamba.errors import InputError
from midimamba.evaluation.judges import fit_musical
from midimamba.generation import choose_scores, generate_scores
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from support import make_discriminator, make_generator, make_score


@pytest.fixture(scope="module")
def processor() -> MidiProcessor:
    tokenizer = build_tokenizer(controls=[control_token("key", "C-major")])
    train_tokenizer(tokenizer, [make_score(seed) for seed in range(6)], 800)
    return MidiProcessor(tokenizer)


@pytest.fixture(scope="module")
def model(processor: MidiProcessor) -> MidiMambaForCausalLM:
    return make_generator(vocab_size=processor.vocab_size)


@pytest.fixture(scope="module")
def folder(processor: MidiProcessor, model: MidiMambaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator, and beside it discriminators of tokens, of musical features, and of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    processor.save_pretrained(folder / "generator")
    model.save_pretrained(folder / "generator")
    make_discriminator(vocab_size=processor.vocab_size).save_pretrained(folder / "tokens")
    make_discriminator(vocab_size=50).save_pretrained(folder / "other")
    fit_musical(
        [make_score(seed, drums=False) for seed in range(8)], [make_score(seed, bars=2) for seed in range(8)]
    ).save_pretrained(folder / "musical")
    return folder


class Remembering:
    """Prefers long sequences, by far, and remembers what it is asked."""

    def __init__(self, weight: float = 1000.0):
        self.weight = weight
        self.seen: list[list[int]] = []

    def log_odds(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        self.seen += [list(sequence) for sequence in sequences]
        return torch.tensor([self.weight * len(sequence) for sequence in sequences], dtype=torch.float64)


def short(num: int = 2, **more: object) -> SamplingOptions:
    options = {"bars": 2, "max_new_tokens": 60, "top_p": 1.0, "num": num}
    return SamplingOptions(**{**options, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [3, 100])
def test_one_of_each_group_of_draws_is_chosen(
    model: MidiMambaForCausalLM, processor: MidiProcessor, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_SAMPLED_AT_ONCE", at_once)
    judge = Remembering()
    chosen = choose_scores(model, processor, judge, short(2, best_of=4), keep_unused=True)
    assert (len(chosen.scores), [len(group) for group in chosen.unused]) == (2, [3, 3])
    draws = [processor.continue_score(None, ids).dumps_midi() for ids in judge.seen]
    for index, score in enumerate(chosen.scores):
        group = judge.seen[4 * index : 4 * index + 4]
        longest = {draws[4 * index + i] for i, ids in enumerate(group) if len(ids) == max(map(len, group))}
        assert score.dumps_midi() in longest
        rest = {other.dumps_midi() for other in chosen.unused[index]}
        assert rest | {score.dumps_midi()} == set(draws[4 * index : 4 * index + 4])
    assert 1 <= chosen.effective_sample_size <= 4


def test_draws_are_those_of_the_same_seed_without_a_judge(
    model: MidiMambaForCausalLM, processor: MidiProcessor
) -> None:
    chosen = choose_scores(model, processor, Remembering(0.0), short(2, best_of=3, seed=4), keep_unused=True)
    plain = generate_scores(model, processor, short(6, seed=4))
    drawn = [[score, *group] for score, group in zip(chosen.scores, chosen.unused, strict=True)]
    assert {score.dumps_midi() for group in drawn for score in group} == {score.dumps_midi() for score in plain}
    assert chosen.effective_sample_size == pytest.approx(3)
    again = generate_scores(model, processor, short(2, best_of=3, seed=4), judge=Remembering(0.0))
    assert [score.dumps_midi() for score in again] == [score.dumps_midi() for score in chosen.scores]


def test_only_draws_that_are_chosen_or_kept_are_decoded(
    model: MidiMambaForCausalLM, processor: MidiProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    decode = MidiProcessor.continue_score

    def watched(self: MidiProcessor, prompt: Any, ids: Any, *more: Any) -> object:
        decoded.append(ids)
        return decode(self, prompt, ids, *more)

    monkeypatch.setattr(MidiProcessor, "continue_score", watched)
    options = short(2, best_of=4, seed=3)
    alone = choose_scores(model, processor, Remembering(0.01), options)
    assert (len(decoded), alone.unused) == (2, [])
    kept = choose_scores(model, processor, Remembering(0.01), options, keep_unused=True)
    assert len(decoded) == 2 + 8
    assert [score.dumps_midi() for score in alone.scores] == [score.dumps_midi() for score in kept.scores]
    assert alone.effective_sample_size == kept.effective_sample_size


def test_by_default_one_of_eight_is_chosen(model: MidiMambaForCausalLM, processor: MidiProcessor) -> None:
    judge = Remembering()
    assert len(generate_scores(model, processor, short(1), judge=judge)) == 1
    assert len(judge.seen) == 8


def test_a_prompt_and_controls_are_judged_together_with_what_follows(
    model: MidiMambaForCausalLM, processor: MidiProcessor
) -> None:
    prompt, judge = make_score(3, bars=2), Remembering()
    options, controls = short(1, best_of=2), {"key": "C-major"}
    chosen = choose_scores(model, processor, judge, options, prompt=prompt, controls=controls, keep_unused=True)
    opening = processor.encode(prompt, controls=controls)
    assert all(ids[: len(opening)] == opening and len(ids) > len(opening) for ids in judge.seen)
    assert processor.eos_token_id not in {ids[-1] for ids in judge.seen}
    expected = {processor.continue_score(prompt, ids).dumps_midi() for ids in judge.seen}
    assert {score.dumps_midi() for score in (*chosen.scores, *chosen.unused[0])} == expected


def test_python_refuses_what_cannot_be(model: MidiMambaForCausalLM, processor: MidiProcessor) -> None:
    with pytest.raises(InputError, match="best_of is 4, but nothing chooses"):
        generate_scores(model, processor, short(best_of=4))
    with pytest.raises(InputError, match="pick is 'worst'"):
        short(pick="worst")
    with pytest.raises(InputError, match="log-odds of a draw are not finite"):
        generate_scores(model, processor, short(), judge=Remembering(torch.nan))


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> int:
    sizes = ("--num", 2, "--bars", 1, "--max-new-tokens", 30)
    return support.command(monkeypatch, "generate", folder / "generator", *sizes, *arguments)


@pytest.mark.parametrize("names", [["tokens"], ["musical"], ["tokens", "musical"]])
def test_the_command_chooses_and_says_how_well_it_could(
    names: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_score(5, bars=2).dump_midi(tmp_path / "prompt.mid")
    discriminators = ("--discriminator", *(folder / name for name in names))
    more = ("--prompt", tmp_path / "prompt.mid", "--control", "key=C-major", "--keep-unused", tmp_path / "unused")
    assert command(monkeypatch, folder, *discriminators, "--best-of", 3, *more, "--out", tmp_path / "out") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.search(r"2 pieces in .*, each one of 3 draws; effective sample size (\d\.\d) of 3$", line)
    assert found
    assert 1 <= float(found[1]) <= 3
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["sample-00.mid", "sample-01.mid"]
    unused = sorted((tmp_path / "unused").iterdir())
    assert [file.name for file in unused] == [f"sample-0{i}-0{j}.mid" for i in range(2) for j in range(2)]
    assert all(Score(file).note_num() for file in unused)


def test_the_best_is_taken_with_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from midimamba.modeling import resampling

    resampling._say_once.cache_clear()
    choosing = ("--discriminator", folder / "musical", "--best-of", 3, "--pick", "best")
    assert command(monkeypatch, folder, *choosing, "--out", tmp_path / "out") == 0
    assert [record.message.split(":")[0] for record in caplog.records if "draws" in record.message] == [
        "the best of each group of draws tends to please the discriminator rather than the ear"
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--best-of", "8"], "--best-of and --pick choose by a discriminator: name one with --discriminator"),
        (["--pick", "best"], "--best-of and --pick choose by a discriminator: name one with --discriminator"),
        (["--keep-unused", "unused"], "--keep-unused keeps what a discriminator did not choose: add --discriminator"),
        (["--discriminator", "tokens", "--best-of", "1"], "best_of is 1: give at least 2"),
        (["--discriminator", "tokens", "--best-of", "0"], "best_of is 0: give at least 2"),
        (["--discriminator", "other"], "reads 50 different tokens, but the generator's tokenizer has"),
        (["--discriminator", "generator"], "is a model of type 'mamba', not a discriminator"),
        (["--discriminator", "nowhere"], "no discriminator can be loaded from 'nowhere'"),
        (["--discriminator", "tokens", "--keep-unused", "out/unused"], "unused draws would pass for pieces"),
        (["--discriminator", "tokens", "--keep-unused", "out"], "unused draws would pass for pieces"),
        (["--discriminator", "tokens", "--keep-unused", "tokens"], "tokens already exists: choose another"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str],
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert command(monkeypatch, folder, *arguments, "--out", "out") == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert sorted(folder.iterdir()) == before
