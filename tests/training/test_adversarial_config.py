"""Options: what is impossible is refused with one line, and the help says what the documentation says."""

import ast
import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from midimamba.training.adversarial_config import AdversarialConfig

LENGTH = 8


def make_config(folder: Path, **overrides: object) -> AdversarialConfig:
    options = {"sequence_length": LENGTH, "prompt_length": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    return AdversarialConfig(output_dir=str(folder), **(options | overrides))


def test_every_option_is_documented_with_its_default_and_has_a_help_text() -> None:
    inherited = {option.name for option in dataclasses.fields(TrainingArguments)}
    documentation = AdversarialConfig.__doc__ or ""
    for option in dataclasses.fields(AdversarialConfig):
        if option.name in inherited:
            continue
        assert option.metadata["help"], option.name
        entry = documentation.split(f"    {option.name} (", 1)[1].split("):", 1)[0]
        stated = entry.partition("defaults to ")[2].strip("`") or "None"
        assert ast.literal_eval(stated) == option.default, option.name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_rollouts": 0}, "num_rollouts is 0, but must be at least 1"),
        ({"prompt_length": LENGTH}, "leaves nothing to sample of 8 tokens"),
        ({"rollout_positions": LENGTH}, "rollout_positions is 8, but must lie in 1 … 6"),
        ({"rollout_momentum": 1.0}, r"rollout_momentum is 1.0, but must be in \[0, 1\)"),
        ({"per_device_train_batch_size": 1}, "needs per_device_train_batch_size of at least 2"),
        ({"gradient_accumulation_steps": 2}, "use micro_batch_size instead"),
        ({"estimator": "best"}, "estimator is 'best', but must be one of monte-carlo, dense, terminal"),
        ({"baseline": "mean"}, "baseline is 'mean', but must be one of leave-one-out, group, running, none"),
        ({"baseline": "group", "group_size": 1}, "group_size is 1, but must be at least 2"),
        ({"baseline": "group", "group_size": 3}, "is 4, but must be a multiple of group_size 3"),
        ({"baseline_decay": 1.0}, r"baseline_decay is 1.0, but must be in \[0, 1\)"),
        ({"discount": 1.5}, r"discount is 1.5, but must be in \[0, 1\]"),
        ({"ppo_epochs": 0}, "ppo_epochs is 0, but must be at least 1"),
        ({"ppo_epochs": 2}, "ppo_epochs is 2, but more than 1 needs ppo_clip"),
        ({"ppo_clip": 0.0}, r"ppo_clip is 0.0, but must be in \(0, 1\)"),
        ({"advantage_clip": 0.0}, "advantage_clip is 0.0, but must be greater than 0"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1, but must be at least 0"),
        ({"kl_coef": float("nan")}, "kl_coef is nan, but must be at least 0"),
        ({"kl_target": 0.1}, "kl_target is 0.1, but needs a kl_coef"),
        ({"kl_target": 0.0, "kl_coef": 0.1}, "kl_target is 0.0, but must be greater than 0"),
        ({"entropy_coef": -1.0}, "entropy_coef is -1.0"),
        ({"mle_weight_final": -1.0}, "mle_weight_final is -1.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5, but must be in \[0, 0.5\)"),
        ({"d_max_accuracy": 0.4}, r"d_max_accuracy is 0.4, but must be in \[0.5, 1\]"),
        ({"d_max_grad_norm": -1.0}, "d_max_grad_norm is -1.0"),
        ({"replay_fraction": 1.0}, r"replay_fraction is 1.0, but must be in \[0, 1\)"),
        ({"replay_fraction": 0.5}, "replay_fraction is 0.5, but replay_size 0 remembers no negatives"),
        ({"replay_fraction": 0.2, "replay_size": 9}, "which of 4 negatives is less than one"),
        ({"rollout_at": "beats"}, "rollout_at is 'beats', but must be one of bars, strided"),
        ({"rollout_memory_mb": 0.0}, "rollout_memory_mb is 0.0, but must be greater than 0"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be greater than 0"),
        ({"importance_clip": 0.5}, "importance_clip is 0.5, but must be at least 1"),
        ({"max_rollbacks": -1}, "max_rollbacks is -1, but must be at least 0"),
        ({"max_nll_drift": 0.1, "save_strategy": "no"}, "go back to checkpoints that were evaluated"),
        ({"max_nll_drift": 0.1, "save_strategy": "epoch"}, "set eval_strategy to save_strategy"),
        (
            {"max_self_bleu_increase": 0.1, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3},
            "save_steps to a multiple of eval_steps",
        ),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **overrides)
