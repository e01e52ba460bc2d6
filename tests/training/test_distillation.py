"""Distillation by rounds, on sequences so short that all of them can be enumerated."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from support import make_discriminator, make_generator
from trainer_support import PLAIN

VOCABULARY, TIME, START = 5, 4, 1
ALL = torch.tensor([[START, *actions] for actions in product(range(VOCABULARY), repeat=TIME - 1)])


def make_trainer(folder: Path, **overrides: Any) -> AdversarialTrainer:
    """Its sequences begin with one token and have no end; its discriminator is one of them that exist."""
    options: dict[str, Any] = {
        **{"sequence_length": TIME, "prompt_length": 1, "mle_weight": 0.0, "d_warmup_steps": 0, "num_eval_samples": 4},
        **{"estimator": "distill", "per_device_train_batch_size": 256, "mini_batch_size": 64, "micro_batch_size": 64},
        **{"max_steps": 12, "learning_rate": 5e-3, "weight_decay": 0.0, "logging_steps": 1, "disable_tqdm": True},
        **{"use_cpu": True, "seed": 3, "output_dir": str(folder)},
    }
    blocks = Dataset.from_dict({"input_ids": [[START] * TIME] * 256})
    networks = make_generator(vocab_size=VOCABULARY, eos_token_id=None), make_discriminator(vocab_size=VOCABULARY)
    return AdversarialTrainer(*networks, AdversarialConfig(**PLAIN | options | overrides), blocks, blocks)


def log_policy(trainer: AdversarialTrainer, ids: Tensor = ALL) -> Tensor:
    """Exact log-probabilities `(n,)` of sequences under the policy that samples."""
    with torch.no_grad():
        logits = trainer.generator.eval()(ids).logits[:, :-1].double() / trainer.args.temperature
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p ‖ q) in nats a sequence."""
    return float((log_p.exp() * (log_p - log_q)).sum())


def known_log_odds(ids: Tensor) -> Tensor:
    """What music likes: token 3 anywhere, and the first two actions alike."""
    return 1.2 * (ids == 3).sum(1).double() + 1.5 * (ids[:, 1] == ids[:, 2]) - 1.0


def tilted(log_p: Tensor) -> Tensor:
    """`log(p exp(L) / Z)` of all sequences."""
    return (log_p + known_log_odds(ALL)).log_softmax(0)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rounds_bring_the_generator_to_itself_times_the_odds(tmp_path: Path, temperature: float) -> None:
    """With an exact discriminator, whose log-odds are those of music against what the generator is by now."""
    trainer = make_trainer(tmp_path, reward="constant", temperature=temperature, ppo_epochs=2, learning_rate=3e-3)
    before = log_policy(trainer)
    assert float(before.exp().sum()) == pytest.approx(1)
    target = tilted(before)
    numbers = {tuple(ids): index for index, ids in enumerate(ALL.tolist())}

    def exact(ids: Tensor) -> Tensor:
        places = [numbers[tuple(row)] for row in ids.tolist()]
        return (target[places] - log_policy(trainer, ids)).float()

    trainer.action_values.reward.control = exact
    trainer.train()
    start, end = divergence(target, before), divergence(target, log_policy(trainer))
    assert start > 0.5
    assert end < 0.1 * start
    assert divergence(log_policy(trainer), target) < 0.1 * divergence(before, target)
    # The reward is the negative divergence from music, so it rises to 0.
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards[0] < -0.3
    assert rewards[-1] == pytest.approx(0, abs=0.1)
    used = [log["effective_samples"] for log in trainer.state.log_history if "reward" in log]
    assert used[0] < 160
    assert sorted(used)[-3] > 215  # of 256


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 4])
def test_one_round_with_fixed_log_odds_goes_there_too(tmp_path: Path, draws: int) -> None:
    """In as many steps, whether all draws are learned from in every pass or a part that is drawn from them."""
    options: dict[str, Any] = {"per_device_train_batch_size": 1536 // draws, "ppo_epochs": 5 * draws}
    trainer = make_trainer(tmp_path, reward="constant", max_steps=1, draws_per_sample=draws, **options)
    before, read = log_policy(trainer), 0

    def reward(ids: Tensor) -> Tensor:
        nonlocal read
        read += len(ids)
        return known_log_odds(ids).float()

    trainer.action_values.reward.control = reward
    trainer.train()
    assert read == 1536
    target = tilted(before)
    assert divergence(target, log_policy(trainer)) < 0.2 * divergence(target, before)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_constant_reward_leaves_the_policy_where_it_is(tmp_path: Path, temperature: float) -> None:
    """Whatever the temperature: its own samples teach it nothing but noise."""
    common: dict[str, Any] = {"reward": "constant", "temperature": temperature, "learning_rate": 5e-4}
    trainer = make_trainer(tmp_path, **common)
    before = log_policy(trainer)
    trainer.train()
    drift = divergence(before, log_policy(trainer))
    assert drift < 0.03
    if temperature != 1:
        # A loss without temperature would fit the logits themselves to tempered samples, and sharpen in every round.
        wrong = make_trainer(tmp_path, **common)
        wrong.generator_loss.args = make_trainer(tmp_path, reward="constant").args
        wrong.train()
        assert divergence(before, log_policy(wrong)) > 5 * drift


@pytest.mark.slow
def test_shuffled_log_odds_teach_nothing_but_noise(tmp_path: Path) -> None:
    """The control with the very weights of the real reward, dealt out at random."""
    fitted = []
    for is_shuffled in (False, True):
        options: dict[str, Any] = {"max_steps": 3, "learning_rate": 2e-3, "per_device_train_batch_size": 512}
        trainer = make_trainer(tmp_path, reward="constant", **options)
        before = log_policy(trainer)

        def reward(ids: Tensor, is_shuffled: bool = is_shuffled) -> Tensor:
            log_odds = known_log_odds(ids).float()
            return log_odds[torch.randperm(len(ids))] if is_shuffled else log_odds

        trainer.action_values.reward.control = reward
        trainer.train()
        after = log_policy(trainer)
        fitted.append(float((after.exp() * known_log_odds(ALL)).sum() - (before.exp() * known_log_odds(ALL)).sum()))
    assert fitted[0] > 0.5
    assert abs(fitted[1]) < 0.2 * fitted[0]
