"""Options: what is impossible is refused with one line, and the help says what the documentation says."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from midimamba.training.adversarial_config import AdversarialConfig
from trainer_support import PLAIN

LENGTH = 8


def make_config(folder: Path, **overrides: Any) -> AdversarialConfig:
    options: dict[str, Any] = {
        "sequence_length": LENGTH,
        "prompt_length": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
    }
    return AdversarialConfig(**PLAIN | options | {"output_dir": str(folder)} | overrides)


def own_options() -> list[dataclasses.Field[Any]]:
    """Those that `TrainingArguments` does not have."""
    inherited = {option.name for option in dataclasses.fields(TrainingArguments)}
    return [option for option in dataclasses.fields(AdversarialConfig) if option.name not in inherited]


def test_every_option_is_documented_with_its_default_and_has_a_help_text() -> None:
    documentation = AdversarialConfig.__doc__ or ""
    for option in own_options():
        assert option.metadata["help"], option.name
        entry = documentation.split(f"    {option.name} (", 1)[1].split("):", 1)[0]
        stated = entry.partition("defaults to ")[2].strip("`") or "None"
        assert ast.literal_eval(stated) == option.default, option.name


def test_there_are_few_options() -> None:
    """A new option has to replace another, or to be worth raising this number."""
    assert len(own_options()) <= 36


def test_the_defaults_are_possible_together(tmp_path: Path) -> None:
    config = AdversarialConfig(output_dir=str(tmp_path), use_cpu=True)
    assert config.bounds_evaluation
    assert config.eval_on_start


@pytest.mark.parametrize(
    "overrides",
    [
        {"estimator": "distill", "reward": "log-odds", "ppo_epochs": 3, "mini_batch_size": 2},
        {"estimator": "distill", "reward": "constant"},
        {"estimator": "terminal", "reward": "shuffled", "mini_batch_size": 2, "ppo_clip": 0.2},
        {"mini_batch_size": 4},
        {"max_steps": 0, "estimator": "distill", "reward": "log-odds"},
        {"draws_per_sample": 3, "estimator": "distill", "reward": "log-odds", "mini_batch_size": 2},
    ],
)
def test_what_is_possible_is_allowed(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = make_config(tmp_path, **overrides)
    assert config.calibrates == (config.reward in ("log-odds", "shuffled"))


def test_a_target_without_a_weight_is_left_out(tmp_path: Path) -> None:
    assert make_config(tmp_path, kl_target=0.1).kl_coef == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_rollouts": 0}, "num_rollouts is 0, but must be at least 1"),
        ({"prompt_length": LENGTH}, "leaves nothing to sample of 8 tokens"),
        ({"rollout_positions": 0}, "rollout_positions is 0, but must be at least 1; leave it unset"),
        ({"rollout_momentum": 1.0}, r"rollout_momentum is 1.0, but must be in \[0, 1\)"),
        ({"per_device_train_batch_size": 1}, "needs per_device_train_batch_size of at least 2"),
        ({"gradient_accumulation_steps": 2}, "use micro_batch_size instead"),
        ({"estimator": "best"}, "estimator is 'best', but must be one of monte-carlo, dense, terminal"),
        ({"baseline": "mean"}, "baseline is 'mean', but must be one of leave-one-out, running, none"),
        ({"group_size": 1}, "group_size is 1, but must be at least 2"),
        ({"group_size": 3}, "is 4, but must be a multiple of group_size 3"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0, but must be at least 1"),
        ({"num_eval_samples": 0}, "num_eval_samples is 0, but must be at least 1"),
        ({"d_warmup_steps": -1}, "d_warmup_steps is -1, but must be at least 0"),
        ({"ppo_epochs": 0}, "ppo_epochs is 0, but must be at least 1"),
        ({"ppo_epochs": 2}, "ppo_epochs is 2, but more than 1 needs ppo_clip"),
        ({"ppo_clip": 0.0}, r"ppo_clip is 0.0, but must be in \(0, 1\)"),
        ({"advantage_clip": 0.0}, "advantage_clip is 0.0, but must be greater than 0"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1, but must be at least 0"),
        ({"kl_coef": float("nan")}, "kl_coef is nan, but must be at least 0"),
        ({"kl_target": 0.0, "kl_coef": 0.1}, "kl_target is 0.0, but must be greater than 0"),
        ({"entropy_coef": -1.0}, "entropy_coef is -1.0"),
        ({"mle_weight": -1.0}, "mle_weight is -1.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5, but must be in \[0, 0.5\)"),
        ({"d_max_accuracy": 0.4}, r"d_max_accuracy is 0.4, but must be in \[0.5, 1\]"),
        ({"d_max_grad_norm": -1.0}, "d_max_grad_norm is -1.0"),
        ({"replay_fraction": 1.0}, r"replay_fraction is 1.0, but must be in \[0, 1\)"),
        ({"replay_fraction": 0.2}, "which of 4 negatives is less than one"),
        ({"reward": "best"}, "reward is 'best', but must be one of discriminator, log-odds, constant, random"),
        ({"estimator": "distill"}, "'distill' weighs samples by log-odds: set reward to log-odds, or to a control"),
        ({"reward": "shuffled"}, "set estimator to terminal or distill"),
        ({"reward": "shuffled", "estimator": "dense"}, "set estimator to terminal or distill"),
        ({"draws_per_sample": 0}, "draws_per_sample is 0, but must be at least 1"),
        (
            {"draws_per_sample": 2, "mini_batch_size": 2, "ppo_clip": 0.2},
            "draws_per_sample is 2, but only estimator 'disti",
        ),
        (
            {"draws_per_sample": 2, "mini_batch_size": 4, "estimator": "distill", "reward": "log-odds"},
            "with a mini_batch_size below per_device_train_batch_size draws from more samples than it learns from: "
            "set it to 1",
        ),
        ({"max_steps": -2}, "max_steps is -2, but must be -1, for any, or at least 0"),
        ({"max_steps": 0}, "max_steps 0 fits discriminators that can choose among samples: set reward to log-odds"),
        ({"mini_batch_size": 0}, "mini_batch_size is 0, but must be at least 1"),
        ({"mini_batch_size": 2}, "mini_batch_size 2 is below per_device_train_batch_size 4, which needs ppo_clip"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be greater than 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"bars": 0}, "bars is 0, but must be at least 1"),
        ({"rollout_memory_mb": 0.0}, "rollout_memory_mb is 0.0, but must be greater than 0"),
        ({"max_nll_drift": -0.1}, "max_nll_drift is -0.1, but must be at least 0"),
        ({"max_nll_drift": 0.1, "save_strategy": "no"}, "go back to checkpoints that were evaluated"),
        ({"max_nll_drift": 0.1, "save_strategy": "epoch"}, "set eval_strategy to save_strategy"),
        (
            {"max_self_bleu_increase": 0.1, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3},
            "save_steps to a multiple of eval_steps",
        ),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **overrides)
