"""The benchmark of adversarial training on music: its statistics by hand, and the whole of it on a tiny corpus."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import load_corpus
from midimamba.corpus.options import CorpusOptions
from support import make_generator, make_score

TINY = {
    **{"rollout_positions": 2, "num_rollouts": 2, "d_warmup_steps": 1, "num_eval_samples": 4},
    **{"per_device_train_batch_size": 4, "d_steps": 1, "d_epochs": 1, "eval_on_start": False, "eval_strategy": "no"},
    **{"max_nll_drift": None, "max_self_bleu_increase": None},
}


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


def row(arm: str, seed: int, **figures: float | None) -> dict[str, Any]:
    return {
        **{"arm": arm, "seed": seed, "temperature": 0.9, "cpu_seconds": 10.0},
        **{"test": figures, "test_floor": {"classifier": 0.5, "copied_runs_12": 0.1}},
    }


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


def test_targets_are_measured_against_maximum_likelihood(music: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("classifier", "mean_overlapping_area", "held_out_nll_per_token", "copied_runs_12", "self_bleu_4")
    monkeypatch.setattr(music, "MEASURES", names)

    def arms(*ours: float | None) -> dict[str, Any]:
        theirs = [row("mle", seed, **dict(zip(names, (0.9, 0.5, 1.0, 0.05, 0.3), strict=True))) for seed in (0, 1)]
        origins = {each["seed"]: each for each in theirs}
        rows = [row("stable", seed, **dict(zip(names, ours, strict=True))) for seed in (0, 1)]
        return {arm: music.summary(each, origins, "test") for arm, each in (("mle", theirs), ("stable", rows))}

    found = arms(0.84, 0.53, 1.02, 0.09, None)
    assert found["stable"]["classifier"] == {
        "value": [0.84, 0.0],
        "floor": 0.5,
        "minus_mle": {"mean": -0.06, "interval": [-0.06, -0.06]},
    }
    assert "self_bleu_4" not in found["stable"]  # a missing figure is not 0
    assert all(music.targets(found["stable"], found["mle"]).values())
    worse = arms(0.86, 0.51, 1.04, 0.11, 0.3)
    assert not any(music.targets(worse["stable"], worse["mle"]).values())
    # A classifier that is wrong more often than chance can tell the two apart as well.
    assert not music.targets(arms(0.1, 0.53, 1.0, 0.0, 0.3)["stable"], found["mle"])[
        "classifier at least 5 points closer to chance"
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_comparison")
def test_all_arms_are_trained_and_measured_and_a_second_start_continues(
    music: ModuleType,
    corpus: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = importlib.import_module("music_runs")
    monkeypatch.setattr(runs, "CONTROLS", {"stable": TINY})
    shared = ["--model", model, "--data", corpus, "--steps", 1, "--length", 32, "--num", 5, "--bars", 2]
    shared += ["--temperatures", 0.8, 1.0, "--seeds", 1, "--workers", 1, "--rows", tmp_path / "rows.jsonl"]

    def main(*options: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["music.py", *map(str, [*shared, *options])])
        music.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    found = main("--arms", "more", "stable", "--listen", tmp_path / "test")
    assert set(found["arms"]) == {"mle", "more", "stable"}
    assert set(found["targets"].values()) <= {True, False}
    rows = {each["arm"]: each for each in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    # It takes as long as adversarial training took, plus at most one step.
    assert rows["more"]["cpu_seconds"] == pytest.approx(rows["stable"]["cpu_seconds"], rel=0.5)
    assert rows["stable"]["test"]["held_out_nll_per_token"] != rows["mle"]["test"]["held_out_nll_per_token"]
    best = min(rows["mle"]["tried"], key=lambda tried: runs.distance(rows["mle"]["tried"][tried]))
    assert rows["mle"]["temperature"] == float(best)
    key = json.loads((tmp_path / "test" / "key.json").read_text())
    assert {piece["arm"] for piece in key["pieces"].values()} == {"mle", "more", "stable", "real"}
    left = [file.name for file in (tmp_path / "rows").glob("*/*")]
    assert sorted(left) == ["mle-0", "more-0", "stable-0"]

    # A trial finds `mle` done, and uses the validation split only.
    monkeypatch.setattr(runs, "adversarial", lambda arm, settings, seed, output: _copied(model, output))
    options = ["--trial", "nothing changes", "--set", "ppo_epochs=3", "--trials", tmp_path / "trials.jsonl"]
    assert main(*options)["split"] == "validation"
    (trial,) = map(json.loads, (tmp_path / "trials.jsonl").read_text().splitlines())
    assert (trial["hypothesis"], trial["change"], trial["split"]) == (
        "nothing changes",
        {"ppo_epochs": 3},
        "validation",
    )
    assert trial["trial"]["classifier"]["value"] == trial["mle"]["classifier"]["value"]
    assert "test" not in json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1])


def _copied(model: Path, output: Path) -> float:
    output.mkdir()
    for file in model.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    return 1.0
