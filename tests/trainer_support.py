"""A trainer of tiny networks, for the tests of adversarial training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from midimamba.modeling.sampling import Sequences
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.rewards import Reward
from support import make_discriminator, make_generator

LENGTH = 8

# Algorithm 1 with a baseline, and no guard that would want evaluations.
PLAIN: dict[str, Any] = {
    "advantage_clip": None,
    "ppo_epochs": 1,
    "ppo_clip": None,
    "kl_coef": 0.0,
    "kl_target": None,
    "entropy_coef": 0.0,
    "ema_decay": 0.0,
    "rollout_momentum": 0.0,
    "d_steps": 1,
    "d_epochs": 1,
    "d_max_accuracy": None,
    "label_smoothing": 0.0,
    "r1_weight": 0.0,
    "replay_fraction": 0.0,
    "max_nll_drift": None,
    "max_self_bleu_increase": None,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "save_total_limit": None,
}

ALL_STABILISERS: dict[str, Any] = {
    "baseline": "running",
    "advantage_clip": 1.5,
    "ppo_epochs": 2,
    "ppo_clip": 0.2,
    "kl_coef": 0.1,
    "kl_target": 0.01,
    "entropy_coef": 0.01,
    "ema_decay": 0.5,
    "rollout_momentum": 0.5,
    "d_epochs": 2,
    "d_max_accuracy": 0.9,
    "label_smoothing": 0.1,
    "r1_weight": 0.1,
    "replay_fraction": 0.5,
}


def make_blocks(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    return Dataset.from_dict({"input_ids": torch.randint(1, 11, (count, LENGTH), generator=generator).tolist()})


def make_trainer(
    folder: Path,
    kind: str = "cnn",
    peft_config: LoraConfig | None = None,
    generator: PreTrainedModel | None = None,
    **overrides: Any,
) -> AdversarialTrainer:
    """A trainer of tiny networks. Without a generator of your own, its sequences have no end: all have one length."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "sequence_length": LENGTH,
        "prompt_length": 2,
        "num_rollouts": 2,
        "rollout_positions": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "micro_batch_size": 3,
        "d_warmup_steps": 2,
        "num_eval_samples": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    args = AdversarialConfig(**PLAIN | options | overrides)
    networks = make_generator(eos_token_id=None) if generator is None else generator, make_discriminator(kind)
    return AdversarialTrainer(*networks, args, make_blocks(), make_blocks(8), peft_config=peft_config)


def known_reward(function: Callable[[Tensor], Tensor]) -> Reward:
    """A reward by a function of whole sequences `(n, time)`, instead of a discriminator."""
    with torch.random.fork_rng():  # making a network sets the seed
        reward = Reward("constant", make_discriminator())
    reward.control = function
    return reward


def all_valid(ids: Tensor) -> Sequences:
    """Sequences none of which has ended."""
    return Sequences(ids, torch.ones_like(ids))


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max((after[name] - before[name]).abs().max().item() for name in before)


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of all parameters, each of which must have one."""
    gradients = [parameter.grad for parameter in model.parameters()]
    found = [gradient.clone() for gradient in gradients if gradient is not None]
    assert len(found) == len(gradients)
    return found
