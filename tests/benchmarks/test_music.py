"""The benchmark of adversarial training on music: its statistics by hand, and the whole of it on a tiny corpus."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import save_file

from midimamba import MidiDiscriminator
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.evaluation.judges import fit_musical
from support import make_discriminator, make_generator, make_score


@pytest.fixture(scope="module")
def music() -> ModuleType:
    return importlib.import_module("music")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("music")
    (folder / "midi").mkdir()
    for seed in range(48):
        make_score(seed, bars=4).dump_midi(folder / "midi" / f"{seed}.mid")
    tokenize_corpus(
        str(folder / "midi"),
        folder / "data",
        CorpusOptions(vocab_size=None, valid_fraction=0.3, test_fraction=0.3, num_workers=1),
    )
    return folder / "data"


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    processor = load_corpus(corpus)[1]
    special = {name: getattr(processor, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    make_generator(vocab_size=processor.vocab_size, num_hidden_layers=1, **special).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_difference_is_paired_and_has_an_interval_by_students_t(music: ModuleType) -> None:
    found = music.difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])  # 2, 3, 1: mean 2, deviation 1
    half = 4.303 / math.sqrt(3)
    assert found["mean"] == 2.0
    assert found["interval"] == pytest.approx([2 - half, 2 + half], abs=1e-3)
    assert music.difference([1.0], [0.5]) == {"mean": 0.5, "interval": None}


def test_options_of_a_trial_are_values(music: ModuleType) -> None:
    texts = {"2e-4": 2e-4, "3": 3, "0.5": 0.5, "terminal": "terminal", "true": True, "null": None, "none": "none"}
    assert {text: music.option(text) for text in texts} == texts
    assert type(music.option("3")) is int


def test_signs_are_permuted_exactly(music: ModuleType) -> None:
    assert music.permutation_p_value([1.0, 1.0, 1.0]) == pytest.approx(2 / 8)  # all signs alike, either way
    assert music.permutation_p_value([1.0, -1.0]) == 1.0
    assert music.permutation_p_value([3.0, 1.0, -1.0]) == pytest.approx(6 / 8)


def test_holm_multiplies_the_smallest_by_the_number_of_tests(music: ModuleType) -> None:
    assert music.holm([0.01, 0.04]) == pytest.approx([0.02, 0.04])
    assert music.holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])  # never below a smaller one's
    assert music.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_arms_are_compared_seed_by_seed(music: ModuleType) -> None:
    def figures(*values: float) -> dict[int, dict[str, float]]:
        return {seed: {"classifier": value, "token_classifier": 0.5} for seed, value in enumerate(values)}

    arms = {"mle": figures(0.8, 0.9), "best of 8": figures(0.7, 0.8), "best of 8, random 0": figures(0.8, 0.8)}
    found = music.summary(arms)
    assert found["mle"]["classifier"] == pytest.approx([0.85, 0.0707], abs=1e-4)
    assert found["best of 8"]["minus_mle"]["classifier"]["mean"] == -0.1
    assert found["best of 8"]["minus_mle"]["classifier"]["p_value"] == 1.0  # 2 / 4, for two judges
    against = music.against_controls(arms, "best of 8", ["best of 8, random 0", "not there"])
    assert against["best of 8, random 0"]["mean"] == -0.05
    assert set(against) == {"best of 8, random 0"}


def test_halves_share_no_piece_and_leave_the_held_out_splits_alone(corpus: Path, tmp_path: Path) -> None:
    judging = importlib.import_module("music_judging")
    folder, second = judging.halve(str(corpus), 0, tmp_path / "half")
    whole, half = load_corpus(corpus)[0], load_corpus(folder)[0]
    first = half["train"]["input_ids"]
    assert sorted([*first, *second]) == sorted(whole["train"]["input_ids"])
    assert abs(len(first) - len(second)) <= 1
    for split in ("validation", "test"):
        assert half[split]["input_ids"] == whole[split]["input_ids"]
    assert judging.halve(str(corpus), 0, tmp_path / "half")[1] == second


@pytest.mark.slow
def test_all_arms_are_measured_and_a_second_start_continues(
    music: ModuleType,
    corpus: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a generator that is there already: the scripts that train have tests of their own."""
    runs, judging = (importlib.import_module(name) for name in ("music_runs", "music_judging"))
    monkeypatch.setattr(judging, "EPOCHS", 1)
    made = []

    def make(self: Any, script: str, options: dict[str, Any], output: Path) -> float:
        made.append((script, options))
        shutil.copytree(model, output)
        processor = load_corpus(corpus)[1]
        real, fake = ([make_score(seed, bars=4) for seed in range(start, start + 12)] for start in (0, 100))
        tokens, musical = make_discriminator("mamba", vocab_size=processor.vocab_size), fit_musical(real, fake)
        (output / "checkpoint-1").mkdir()
        save_file(tokens.state_dict(), output / "checkpoint-1" / "discriminator.safetensors")
        musical.save_pretrained(output / "checkpoint-1" / "musical_discriminator")
        tokens.calibration.set(2.0, 0.0)  # as if fitted to what the generator became
        tokens.save_pretrained(f"{output}-discriminator")
        musical.save_pretrained(f"{output}-musical-discriminator")
        return 2.0

    monkeypatch.setattr(runs.Seed, "_run", make)
    shared = ["--data", corpus, "--num", 6, "--bars", 2, "--temperatures", 0.9, "--seeds", 1, "--workers", 1]
    shared += ["--rows", tmp_path / "rows.jsonl"]

    def main(*options: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["music.py", *map(str, [*shared, *options])])
        music.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    found = main("--runs", "distilled", "--plot", tmp_path / "arms.png")
    assert (tmp_path / "arms.png").read_bytes().startswith(b"\x89PNG")
    assert {"mle", "best of 8", "best of 8, likelihood", "best of 8, random 4", "distilled"} < set(found["arms"])
    assert set(found["against_controls"]["best of 8"]) == {
        *("best of 8, shuffled", "best of 8, likelihood"),
        *(f"best of 8, random {k}" for k in range(5)),
    }
    assert [script for script, _ in made] == ["pretrain", "adversarial"]  # whose discriminators choose as well
    assert made[1][1]["data"] != str(corpus)  # half of the music
    before = len(made)
    both = main("--runs", "distilled", "distilled, best of 8", "distilled, best of 8, not refitted")
    assert len(made) == before  # generator and discriminators are there
    for arm in ("distilled, best of 8", "distilled, best of 8, not refitted"):
        assert set(both["against_controls"][arm]) == {"best of 8", "distilled"}
    (kept,) = (tmp_path / "rows").glob("seed-0/*-round-discriminator")
    fitted = kept.with_name(kept.name.replace("-round", ""))
    scales = [MidiDiscriminator.from_pretrained(folder).calibration.scale.item() for folder in (kept, fitted)]
    assert scales == [1.0, 2.0]  # as the round had it, and fitted to the distilled generator
    recipe = {"draws_per_sample": 4, "ppo_epochs": 2}  # of the former one, each draw is learned from once
    more = main("--runs", "distilled, more draws, best of 8", "distilled, more draws")
    assert made[before:] == [("adversarial", {**made[1][1], **recipe})]
    assert set(more["against_controls"]["distilled, more draws, best of 8"]) == {"best of 8", "distilled, more draws"}
    trial = main("--trial", "nothing changes", "--set", "ppo_epochs=3", "--trials", tmp_path / "trials.jsonl")
    assert made[before + 1 :] == [("adversarial", {**made[1][1], **recipe, "ppo_epochs": 3})]
    assert 'trial {"ppo_epochs": 3}' in trial["arms"]
    (kept,) = map(json.loads, (tmp_path / "trials.jsonl").read_text().splitlines())
    assert (kept["hypothesis"], kept["change"], kept["split"]) == ("nothing changes", {"ppo_epochs": 3}, "validation")
