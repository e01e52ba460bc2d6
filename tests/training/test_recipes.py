"""The two named recipes: the paper has no stabiliser on, the stable one has them all, and both train."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import HfArgumentParser, TrainingArguments

from midimamba.corpus.augmentation import Augmentation
from midimamba.errors import InputError
from midimamba.training.adversarial import AdversarialArguments
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.lora import LoraArguments
from midimamba.training.pretrain import PretrainArguments
from midimamba.training.scripts import RecipeParser
from support import make_discriminator, make_generator
from trainer_support import moved, parameters

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
# Every stabiliser, and its value when it is off.
OFF: dict[str, object] = {
    "advantage_clip": None,
    "ppo_clip": None,
    "kl_coef": 0.0,
    "kl_target": None,
    "entropy_coef": 0.0,
    "mle_weight": 0.0,
    "ema_decay": 0.0,
    "rollout_momentum": 0.0,
    "d_max_accuracy": None,
    "d_max_grad_norm": 0.0,
    "label_smoothing": 0.0,
    "r1_weight": 0.0,
    "replay_fraction": 0.0,
    "max_nll_drift": None,
    "max_self_bleu_increase": None,
}


def read(name: str, folder: Path, **overrides: Any) -> AdversarialConfig:
    values = yaml.safe_load((RECIPES / f"{name}-adversarial.yaml").read_text())
    values |= {"output_dir": str(folder), "use_cpu": True} | overrides
    kinds: list[Any] = [AdversarialConfig, AdversarialArguments, Augmentation]
    config = HfArgumentParser(kinds).parse_dict(values)[0]
    assert isinstance(config, AdversarialConfig)
    return config


def test_the_paper_has_no_stabiliser(tmp_path: Path) -> None:
    paper = read("paper", tmp_path)
    assert {name: getattr(paper, name) for name in OFF} == OFF
    assert (paper.baseline, paper.normalize_advantages, paper.ppo_epochs) == ("none", False, 1)
    assert (paper.estimator, paper.num_rollouts, paper.rollout_positions) == ("monte-carlo", 16, None)
    assert (paper.d_steps, paper.d_epochs, paper.d_learning_rate) == (5, 3, 1e-4)
    assert (paper.reward, paper.group_size, paper.prompt_length) == ("discriminator", None, 1)
    assert (paper.bars, paper.temperature, paper.mini_batch_size) == (None, 1.0, None)


def test_the_stable_recipe_has_them_all(tmp_path: Path) -> None:
    stable = read("stable", tmp_path)
    assert [name for name, off in OFF.items() if getattr(stable, name) == off] == []
    assert stable.baseline != "none"
    assert stable.ppo_epochs > 1


def test_the_stable_recipe_is_the_defaults(tmp_path: Path) -> None:
    stable, defaults = read("stable", tmp_path), AdversarialConfig(output_dir=str(tmp_path), use_cpu=True)
    for option in dataclasses.fields(AdversarialConfig):
        if option.name not in ("seed", "logging_dir"):  # the latter has the time in it
            assert getattr(stable, option.name) == getattr(defaults, option.name), option.name


def parse(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All options of a recipe, as its script reads it."""
    of_script = AdversarialArguments if file.stem.endswith("-adversarial") else PretrainArguments
    trainer = AdversarialConfig if of_script is AdversarialArguments else TrainingArguments
    monkeypatch.setattr(sys, "argv", ["script.py", "--config", str(file), "--use_cpu", "true"])
    parts = RecipeParser((of_script, LoraArguments, Augmentation, trainer)).parse_recipe()
    return {name: value for part in parts for name, value in vars(part).items()}


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_sets_its_options_to_its_values_and_may_hold_no_other(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse(file, monkeypatch)
    recipe = yaml.safe_load(file.read_text())
    assert {name: options[name] for name in recipe} == recipe
    (tmp_path / file.name).write_text(file.read_text() + "\nlearning_rat: 1.0\n")
    with pytest.raises(InputError, match="learning_rat"):
        parse(tmp_path / file.name, monkeypatch)


@pytest.mark.parametrize("times", [1, 2])
def test_what_a_recipe_sets_can_be_unset(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list and a number; also by a second parser: making one must not change what the next one reads."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\ndata: d\noutput_dir: o\nreport_to: none\nd_lookback_bars: [1, 2]\nd_max_accuracy: 0.9\n"
        "discriminator: mamba\n"
    )
    line = ["--config", str(recipe), "--use_cpu", "true"]
    monkeypatch.setattr(
        sys, "argv", ["adversarial.py", *line, "--d_lookback_bars", "none", "--d_max_accuracy", "none"]
    )
    for _ in range(times):
        arguments, config = RecipeParser((AdversarialArguments, AdversarialConfig)).parse_args_and_config(
            fail_with_unknown_args=False, return_remaining_strings=True
        )[:2]
    assert arguments.d_lookback_bars is None
    assert config.d_max_accuracy is None
    assert config.report_to == []  # "none" is a value of its own there


def test_an_option_is_a_stabiliser_or_not(tmp_path: Path) -> None:
    """A new option has to say here which of the two it is, so that no recipe forgets it."""
    others = {
        *("sequence_length", "prompt_length", "micro_batch_size", "num_eval_samples", "logging_nan_inf_filter"),
        *("bars", "temperature", "mini_batch_size", "draws_per_sample"),
        *("estimator", "num_rollouts", "rollout_positions", "rollout_memory_mb", "reward"),
        *("baseline", "group_size", "normalize_advantages", "ppo_epochs"),
        *("d_steps", "d_epochs", "d_warmup_steps", "d_learning_rate"),
    }
    inherited = {option.name for option in dataclasses.fields(TrainingArguments)}
    options = {option.name for option in dataclasses.fields(AdversarialConfig)}
    assert options - inherited == (others | OFF.keys()) - inherited


@pytest.mark.parametrize("name", ["paper", "stable"])
def test_recipes_train(tmp_path: Path, name: str) -> None:
    length = 20
    small = {"sequence_length": length, "max_steps": 2, "num_rollouts": 2, "d_warmup_steps": 3, "logging_steps": 1}
    config = read(name, tmp_path, per_device_train_batch_size=4, num_eval_samples=4, disable_tqdm=True, **small)
    generator = torch.Generator().manual_seed(5)
    blocks = Dataset.from_dict({"input_ids": torch.randint(1, 11, (12, length), generator=generator).tolist()})
    trainer = AdversarialTrainer(make_generator(), make_discriminator(), config, blocks, blocks)
    before = parameters(trainer.generator.get_input_embeddings())
    trainer.train()
    assert moved(before, parameters(trainer.generator_for_saving.get_input_embeddings())) > 0
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)


def test_one_value_may_stand_where_several_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: d\noutput_dir: o\nlookback_bars: 4\ntemperatures: 0.7\nsize: null\n")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(tmp_path / "recipe.yaml")])
    found, *_ = RecipeParser((PretrainArguments, TrainingArguments)).parse_recipe()
    assert (found.lookback_bars, found.temperatures, found.size) == ([4], [0.7], None)
