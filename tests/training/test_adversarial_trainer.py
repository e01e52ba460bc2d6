"""The trainer on tiny networks: what must move, what must not, and that a resumed run is the same run."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from midimamba import RecurrentCache
from midimamba.modeling.sampling import next_logits
from midimamba.training import credit
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from support import make_discriminator, make_generator

LENGTH = 8


def make_blocks(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    return Dataset.from_dict({"input_ids": torch.randint(1, 11, (count, LENGTH), generator=generator).tolist()})


def make_trainer(folder: Path, kind: str = "cnn", **overrides: object) -> AdversarialTrainer:
    options: dict[str, object] = {
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
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    args = AdversarialConfig(**options | overrides)
    return AdversarialTrainer(make_generator(), make_discriminator(kind), args, make_blocks(), make_blocks(8))


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def likelihoods_alone(model: torch.nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods of all tokens that follow another of their piece, every piece in a pass of its own."""
    likelihoods = []
    for block in blocks:
        begins = (block == model.config.bos_token_id).nonzero().flatten()
        for piece in block.tensor_split(begins):
            if len(piece) > 1:
                chosen = model(piece[None]).logits[0, :-1].log_softmax(-1).gather(-1, piece[1:, None])
                likelihoods.append(chosen.flatten())
    return torch.cat(likelihoods)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max((after[name] - before[name]).abs().max().item() for name in before)


@pytest.mark.parametrize(
    ("estimator", "kind"),
    [("monte-carlo", "cnn"), ("monte-carlo", "mamba"), ("dense", "mamba"), ("terminal", "cnn"), ("terminal", "mamba")],
)
def test_every_estimator_trains_both_networks(tmp_path: Path, estimator: str, kind: str) -> None:
    trainer = make_trainer(tmp_path, kind, estimator=estimator)
    generator, discriminator = parameters(trainer.model), parameters(trainer.discriminator)
    trainer.train()
    assert moved(generator, parameters(trainer.model)) > 1e-3
    assert moved(discriminator, parameters(trainer.discriminator)) > 1e-4
    logged = trainer.state.log_history[0]
    assert {"loss", "d_loss", "d_accuracy", "reward", "advantage_std", "entropy", "mle_loss", "policy_loss"} <= set(
        logged
    )


@pytest.mark.parametrize("estimator", ["monte-carlo", "dense", "terminal"])
def test_a_constant_reward_moves_nothing_when_the_baseline_is_on(tmp_path: Path, estimator: str) -> None:
    trainer = make_trainer(tmp_path, "mamba", estimator=estimator, reward="constant", mle_weight=0.0)
    before = parameters(trainer.model)
    trainer.train()
    assert moved(before, parameters(trainer.model)) == 0.0


def test_a_constant_reward_moves_the_generator_without_the_baseline(tmp_path: Path) -> None:
    """The trap that the baseline removes: the policy sharpens although nothing is preferred."""
    trainer = make_trainer(tmp_path, reward="constant", mle_weight=0.0, baseline="none", normalize_advantages=False)
    before = parameters(trainer.model)
    trainer.train()
    assert moved(before, parameters(trainer.model)) > 1e-3


def test_a_random_reward_is_a_reward_like_any_other(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, reward="random", mle_weight=0.0)
    before = parameters(trainer.model)
    trainer.train()
    assert moved(before, parameters(trainer.model)) > 1e-3


def test_micro_batches_do_not_change_the_gradient(tmp_path: Path) -> None:
    gradients = []
    for size in (1, 3, 4):
        trainer = make_trainer(tmp_path, estimator="terminal", micro_batch_size=size)
        trainer.model.zero_grad()
        torch.manual_seed(0)
        trainer._generator_step(trainer.model, torch.tensor(make_blocks(4)["input_ids"]))
        gradients.append([parameter.grad.clone() for parameter in trainer.model.parameters()])
    for others in gradients[1:]:
        for gradient, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mle_weight", [0.0, 0.5])
def test_samples_are_valued_as_they_were_drawn_and_music_piece_by_piece(tmp_path: Path, mle_weight: float) -> None:
    trainer = make_trainer(tmp_path, mle_weight=mle_weight)
    blocks = torch.tensor(make_blocks(10)["input_ids"])
    blocks[:, 1] = blocks[5:, 4] = trainer.model.config.bos_token_id
    fake, real = blocks.split(5)
    advantages = torch.linspace(-1, 1, 5 * (LENGTH - 2)).view(5, LENGTH - 2)
    cache = RecurrentCache.for_model(trainer.model, len(fake))
    with torch.no_grad():
        loss = trainer._generator_loss(trainer.model, fake, real, advantages)
        chosen = []
        for t in range(LENGTH - 1):
            drawn_from = next_logits(trainer.model, fake[:, t : t + 1], cache).log_softmax(-1)
            chosen.append(drawn_from.gather(-1, fake[:, t + 1 : t + 2]))
        policy_loss = credit.reinforce_loss(torch.cat(chosen, 1)[:, 1:], advantages)
        likelihoods = likelihoods_alone(trainer.model, real)
    torch.testing.assert_close(loss, policy_loss - mle_weight * likelihoods.sum() / len(real))
    if mle_weight:
        assert trainer._metrics["mle_loss"] == pytest.approx([-likelihoods.mean().item()])


def test_rewards_reinforce_what_they_prefer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a known reward, its expectation must rise: here the share of token 7 in a sequence."""
    monkeypatch.setattr(AdversarialTrainer, "_rewards", lambda self, rows, **_: (rows == 7).float().mean(1))
    trainer = make_trainer(
        tmp_path,
        max_steps=25,
        mle_weight=0.0,
        per_device_train_batch_size=16,
        d_warmup_steps=0,
        rollout_positions=None,
    )
    trainer.train()
    rewards = [logged["reward"] for logged in trainer.state.log_history if "reward" in logged]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_interleaved_likelihood_alone_lowers_the_held_out_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=20, reward="constant", mle_weight=1.0)
    before = trainer.evaluate(make_blocks())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(make_blocks())["eval_loss"] < before - 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_the_rollout_policy_follows_the_generator_after_a_round(tmp_path: Path, momentum: float) -> None:
    trainer = make_trainer(tmp_path, rollout_momentum=momentum, g_steps=2, max_steps=4)
    start = parameters(trainer.model)
    trainer.train()
    # Four steps are two rounds; the policy was updated when the second began, from the generator after two steps.
    two_steps = make_trainer(tmp_path, rollout_momentum=momentum, g_steps=2, max_steps=2)
    two_steps.train()
    for name, beta in trainer.rollout_policy.named_parameters():
        expected = momentum * start[name] + (1 - momentum) * two_steps.model.get_parameter(name).detach()
        torch.testing.assert_close(beta, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path, momentum: float) -> None:
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "g_steps": 2, "rollout_momentum": momentum}
    straight = make_trainer(tmp_path / "straight", eval_strategy="steps", eval_steps=2, **options)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = make_trainer(tmp_path / "resumed", eval_strategy="steps", eval_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    for name in ("model", "discriminator", "rollout_policy"):
        assert moved(parameters(getattr(straight, name)), parameters(getattr(resumed, name))) == 0.0
    ours, theirs = straight.d_optimizer.state_dict(), resumed.d_optimizer.state_dict()
    assert str(ours) == str(theirs)
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (straight, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path: Path) -> None:
    runs = []
    for seed in (3, 3, 4):
        trainer = make_trainer(tmp_path, seed=seed)
        trainer.train()
        runs.append(parameters(trainer.model))
    assert moved(runs[0], runs[1]) == 0.0
    assert moved(runs[0], runs[2]) > 0.0


def test_an_evaluation_does_not_change_the_run(tmp_path: Path) -> None:
    runs = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(tmp_path, eval_strategy=strategy, eval_steps=1)
        trainer.train()
        runs.append(parameters(trainer.model))
    assert moved(*runs) == 0.0


def test_evaluation_measures_likelihood_accuracy_and_diversity(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate()
    likelihoods = likelihoods_alone(trainer.model, torch.tensor(make_blocks(8)["input_ids"]))
    assert metrics["eval_loss"] == pytest.approx(-likelihoods.mean().item(), abs=1e-5)
    assert metrics["eval_d_accuracy"] == pytest.approx(
        (metrics["eval_d_accuracy_real"] + metrics["eval_d_accuracy_fake"]) / 2
    )
    assert 0 < metrics["eval_distinct_1"] <= metrics["eval_distinct_4"] <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_rollouts": 0}, "num_rollouts is 0, but must be at least 1"),
        ({"prompt_length": LENGTH}, "leaves nothing to sample"),
        ({"rollout_positions": LENGTH}, "rollout_positions is 8, but must lie in 1 … 6"),
        ({"rollout_momentum": 1.0}, "rollout_momentum is 1.0"),
        ({"per_device_train_batch_size": 1}, "needs per_device_train_batch_size of at least 2"),
        ({"gradient_accumulation_steps": 2}, "use micro_batch_size instead"),
        ({"estimator": "dense"}, "needs a discriminator of kind 'mamba'"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **overrides)


def test_a_last_batch_of_one_sequence_does_not_end_the_run(tmp_path: Path) -> None:
    args = make_trainer(tmp_path, max_steps=4).args
    trainer = AdversarialTrainer(make_generator(), make_discriminator(), args, make_blocks(9), make_blocks(8))
    trainer.train()
    assert trainer.state.global_step == 4


def test_experts_drop_no_token_of_a_sample(tmp_path: Path) -> None:
    """Sampling drops none: the pass that scores its samples must not either, or it scores another policy."""
    generator = make_generator(layout="moe-mamba", num_experts=4, capacity_factor=0.1)
    blocks = make_blocks()
    ids = torch.tensor(blocks["input_ids"])
    assert generator.train()(ids).dropped_tokens > 0
    args = make_trainer(tmp_path).args
    trainer = AdversarialTrainer(generator, make_discriminator(), args, blocks, blocks)
    scored = trainer.model.train()(ids)
    assert scored.dropped_tokens == 0
    torch.testing.assert_close(scored.logits, trainer.model.eval()(ids).logits)
    trainer.train()
    assert trainer.model.config.capacity_factor == 0.1


def test_networks_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    args = AdversarialConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="knows 5 tokens, the generator 11"):
        AdversarialTrainer(make_generator(), make_discriminator(vocab_size=5), args, make_blocks(), make_blocks())
