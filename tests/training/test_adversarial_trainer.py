"""The trainer on tiny networks: what must move, what must not, and that a resumed run is the same run."""

import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from midimamba.errors import InputError
from midimamba.modeling.policy import as_policy
from midimamba.modeling.sampling import Sequences
from midimamba.training import adversarial_trainer, credit, generator_update
from midimamba.training.action_values import DISCOUNT, ActionValues
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.discriminator_update import DiscriminatorUpdate
from midimamba.training.generator_update import Batch
from midimamba.training.metrics import Measures
from support import make_discriminator, make_generator
from trainer_support import (
    ALL_STABILISERS,
    LENGTH,
    all_valid,
    gradients_of,
    known_reward,
    make_blocks,
    make_trainer,
    moved,
    parameters,
)

# What differs from run to run in a log.
TIMES = dict.fromkeys(
    ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "tokens_per_second", "memory_mb_max"), 0.0
)


def likelihoods_alone(model: PreTrainedModel, blocks: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods of all tokens that follow another of their piece, every piece in a pass of its own."""
    likelihoods = []
    for block in blocks:
        begins = (block == model.config.bos_token_id).nonzero().flatten()
        for piece in block.tensor_split(begins):
            if len(piece) > 1:
                chosen = model(piece[None]).logits[0, :-1].log_softmax(-1).gather(-1, piece[1:, None])
                likelihoods.append(chosen.flatten())
    return torch.cat(likelihoods)


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
@pytest.mark.parametrize(
    ("baseline", "group_size"), [("leave-one-out", None), ("leave-one-out", 2), ("running", None)]
)
def test_a_constant_reward_moves_nothing_when_a_baseline_is_on(
    tmp_path: Path, estimator: str, baseline: str, group_size: int | None
) -> None:
    options: dict[str, Any] = {"estimator": estimator, "baseline": baseline, "group_size": group_size, "ppo_epochs": 2}
    trainer = make_trainer(tmp_path, "mamba", reward="constant", mle_weight=0.0, ppo_clip=0.2, **options)
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
    gradients: list[list[torch.Tensor]] = []
    for size in (1, 3, 4):
        trainer = make_trainer(tmp_path, estimator="terminal", micro_batch_size=size)
        trainer.model.zero_grad()
        torch.manual_seed(0)
        trainer._train_generator(trainer.model, torch.tensor(make_blocks(4)["input_ids"]))
        gradients.append(gradients_of(trainer.model))
    for others in gradients[1:]:
        for gradient, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mle_weight", [0.0, 0.5])
def test_samples_are_valued_as_they_were_drawn_and_music_piece_by_piece(tmp_path: Path, mle_weight: float) -> None:
    trainer = make_trainer(tmp_path, mle_weight=mle_weight)
    blocks = torch.tensor(make_blocks(10)["input_ids"])
    blocks[:, 1] = blocks[5:, 4] = trainer.generator.config.bos_token_id
    fake, real = blocks.split(5)
    advantages = torch.linspace(-1, 1, 5 * (LENGTH - 2)).view(5, LENGTH - 2)
    policy = as_policy(trainer.generator)
    state = policy.make_state(len(fake))
    with torch.no_grad():
        terms = trainer.generator_loss(trainer.model, Batch(all_valid(fake), real, advantages))
        chosen = []
        for t in range(LENGTH - 1):
            drawn_from = policy.next_logits(fake[:, t : t + 1], state).log_softmax(-1)
            chosen.append(drawn_from.gather(-1, fake[:, t + 1 : t + 2]))
        policy_loss = generator_update.reinforce_loss(torch.cat(chosen, 1)[:, 1:], advantages)
        likelihoods = likelihoods_alone(trainer.generator, real)
    torch.testing.assert_close(terms.loss, policy_loss - mle_weight * likelihoods.sum() / len(real))
    if mle_weight:
        assert float(terms.measures["mle_loss"]) == pytest.approx(-likelihoods.mean().item())


@pytest.mark.parametrize("reward", ["discriminator", "log-odds"])
@pytest.mark.parametrize("prompt", [1, 3])
def test_the_reward_is_the_discriminators_probability_or_its_log_odds(
    tmp_path: Path, reward: str, prompt: int
) -> None:
    trainer = make_trainer(tmp_path, "mamba", estimator="dense", reward=reward, prompt_length=prompt)
    torch.manual_seed(0)
    sequences = torch.randint(0, 8, (3, trainer.args.sequence_length))
    with torch.no_grad():
        logits = trainer.discriminator.eval()(sequences).position_logits
    assert logits.std() > 0
    values = trainer.action_values(all_valid(sequences))
    expected = torch.zeros(3)
    for time in reversed(range(prompt, sequences.shape[1])):
        gain = logits[:, time] - logits[:, time - 1]
        expected = (gain if reward == "log-odds" else 2 * logits[:, time].sigmoid() - 1) + DISCOUNT * expected
        torch.testing.assert_close(values[:, time - prompt], expected)
    trainer.action_values.estimator = "terminal"
    whole = logits[:, -1] if reward == "log-odds" else logits[:, -1].sigmoid()
    torch.testing.assert_close(trainer.action_values(all_valid(sequences)), whole[:, None].expand_as(values))


def test_rewards_reinforce_what_they_prefer(tmp_path: Path) -> None:
    """With a known reward, its expectation must rise: here the share of token 7 in a sequence."""
    trainer = make_trainer(
        tmp_path,
        max_steps=25,
        mle_weight=0.0,
        per_device_train_batch_size=16,
        d_warmup_steps=0,
        rollout_positions=None,
    )
    trainer.action_values.reward = known_reward(lambda rows: (rows == 7).float().mean(1))
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
    trainer = make_trainer(tmp_path, rollout_momentum=momentum)
    after = [parameters(trainer.model)]

    class Watch(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            after.append(parameters(trainer.model))

    trainer.add_callback(Watch())
    trainer.train()
    # It was updated when each round began, the last time from the generator of two steps.
    expected = after[0]
    for generator in after[:-1]:
        expected = {name: momentum * expected[name] + (1 - momentum) * generator[name] for name in expected}
    assert moved(after[0], after[2]) > 1e-3
    for name, beta in trainer.rollout_policy.named_parameters():
        torch.testing.assert_close(beta, expected[name])


def test_the_discriminator_is_pretrained_and_learns_first_in_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of Algorithm 1."""
    calls: list[str] = []
    trainer = make_trainer(tmp_path, d_warmup_steps=3, d_steps=2, max_steps=2)

    def watch(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def called(*arguments: object) -> object:
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, called)

    watch(trainer, "train_discriminator")
    watch(trainer, "_train_generator")
    watch(adversarial_trainer, "follow")
    trainer.train()
    a_round = ["follow", "train_discriminator", "train_discriminator", "_train_generator"]
    assert calls == ["train_discriminator"] * 3 + a_round * 2


@pytest.mark.parametrize(
    "options", [{}, ALL_STABILISERS, ALL_STABILISERS | {"reward": "random"}], ids=["plain", "all", "random reward"]
)
def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    # Five steps and two evaluations; resumed between them.
    common: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps"}
    straight = make_trainer(tmp_path / "straight", eval_steps=2, **common, **options)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = make_trainer(tmp_path / "resumed", eval_steps=2, **common, **options)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1.0)  # nothing may be left of the model that the trainer was made with
        for policy in resumed.adversarial_state.policies.values():
            for parameter in policy.get_input_embeddings().parameters():
                parameter.add_(1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
    for name in ("model", "discriminator", "generator_for_saving"):
        assert moved(parameters(getattr(straight, name)), parameters(getattr(resumed, name))) == 0.0
    ours, theirs = (run.adversarial_state.policies for run in (straight, resumed))
    assert ours.keys() == theirs.keys()
    assert all(moved(parameters(ours[name]), parameters(theirs[name])) == 0.0 for name in ours)
    ours, theirs = (run.discriminator_update.optimizer.state_dict() for run in (straight, resumed))
    assert str(ours) == str(theirs)
    logs = [run.state.log_history[:-1] for run in (straight, resumed)]  # the last entry is of the time it took
    assert [log | TIMES for log in logs[0]] == [log | TIMES for log in logs[1]]
    assert sum("loss" in log for log in logs[0]) == 5
    if options:
        for remembered in ("discriminator_update.replay.sequences", "credit.mean"):
            ours, theirs = map(attrgetter(remembered), (straight, resumed))
            assert torch.equal(ours, theirs)
        assert straight.generator_loss.kl_coef == resumed.generator_loss.kl_coef != 0.1


def test_a_checkpoint_without_the_state_of_an_option_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert not list(tmp_path.rglob("*unfinished*"))
    resumed = make_trainer(tmp_path, **ALL_STABILISERS)
    with pytest.raises(InputError, match=r"lacks reference_policy.*, averaged_policy.*, replay_0"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


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
    likelihoods = likelihoods_alone(trainer.generator, torch.tensor(make_blocks(8)["input_ids"]))
    assert metrics["eval_loss"] == pytest.approx(-likelihoods.mean().item(), abs=1e-5)
    assert metrics["eval_d_accuracy"] == pytest.approx(
        (metrics["eval_d_accuracy_real"] + metrics["eval_d_accuracy_fake"]) / 2
    )
    assert 0 < metrics["eval_distinct_1"] <= metrics["eval_distinct_4"] <= 1


def test_a_single_held_out_sequence_can_be_evaluated(tmp_path: Path) -> None:
    """Diversity compares two samples: two are drawn after its prompt."""
    metrics = make_trainer(tmp_path, num_eval_samples=1).evaluate()
    assert 0 <= metrics["eval_self_bleu_4"] <= 1
    assert metrics["eval_d_accuracy_real"] in (0, 1)


def test_every_stabiliser_has_its_metric_in_the_log(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **ALL_STABILISERS)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    metrics = {
        *("advantage_mean", "advantage_clip_fraction", "policy_ratio_max", "clip_fraction", "approx_kl"),
        *("kl", "kl_coef", "entropy", "mle_loss", "ema_distance", "grad_norm"),
        *("d_grad_norm", "d_real_probability", "d_r1", "d_replay_accuracy", "d_skipped"),
    }
    for log in logged[1:]:
        assert metrics - {"d_r1", "d_replay_accuracy"} <= log.keys() or log["d_skipped"]
    assert metrics <= set().union(*logged)
    assert logged[0]["kl"] < 1e-6  # the policy is still the reference
    coefficients = [log["kl_coef"] for log in logged]
    assert coefficients[0] == ALL_STABILISERS["kl_coef"]
    for log, following in zip(logged, coefficients[1:], strict=False):
        assert following == pytest.approx(generator_update.adapted_kl_coef(log["kl_coef"], log["kl"], 0.01))


def test_ppo_steps_once_an_epoch_and_the_schedule_once_a_batch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, ppo_epochs=3, ppo_clip=0.2, lr_scheduler_type="linear")
    trainer.train()
    states = trainer.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {6}
    assert trainer.lr_scheduler.last_epoch == 2
    assert trainer.state.log_history[0]["policy_ratio_max"] > 1


def test_the_first_ppo_epoch_is_reinforce(tmp_path: Path) -> None:
    plain, clipped = make_trainer(tmp_path), make_trainer(tmp_path, ppo_clip=0.2)
    for trainer in (plain, clipped):
        trainer.train()
    assert moved(parameters(plain.model), parameters(clipped.model)) < 1e-6


@pytest.mark.parametrize("learning_rate", [0.0, 1e-2])
def test_every_ppo_epoch_has_a_gradient_of_its_own_clipped_to_the_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning_rate: float
) -> None:
    # Where nothing moves, all passes have the same gradient: none may be left of the pass before.
    limit = 0.01 if learning_rate else 0.0
    options: dict[str, Any] = {
        "ppo_epochs": 3,
        "ppo_clip": 0.2,
        "max_grad_norm": limit,
        "learning_rate": learning_rate,
    }
    trainer = make_trainer(tmp_path, max_steps=1, **options)
    norms = []
    trainer.create_optimizer()
    step = trainer.optimizer.step

    def watched(*arguments: Any) -> None:
        gradients = [gradient.norm() for gradient in gradients_of(trainer.model)]
        norms.append(torch.linalg.vector_norm(torch.stack(gradients)).item())
        step(*arguments)

    monkeypatch.setattr(trainer.optimizer, "step", watched)
    trainer.train()
    assert norms == pytest.approx([limit or norms[0]] * 3, rel=1e-3)


def test_advantages_are_clipped_after_the_normalisation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, advantage_clip=1.5)
    values = torch.randn(8, LENGTH - 2)
    expected = credit.normalize_advantages(credit.leave_one_out_advantages(values))
    advantages, measures = trainer.credit(values, torch.ones_like(values, dtype=torch.bool))
    torch.testing.assert_close(advantages, expected.clamp(-1.5, 1.5))
    share = float(measures["advantage_clip_fraction"])
    assert share == pytest.approx((expected.abs() > 1.5).float().mean().item())
    assert share > 0


def test_a_group_shares_its_prompt_and_the_likelihood_keeps_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = []
    values = ActionValues.__call__

    def watched(self: ActionValues, sequences: Sequences) -> torch.Tensor:
        sampled.append(sequences.ids)
        return values(self, sequences)

    monkeypatch.setattr(ActionValues, "__call__", watched)
    trainer = make_trainer(tmp_path, group_size=2, per_device_train_batch_size=6, micro_batch_size=6)
    trainer.model.zero_grad()
    blocks = torch.tensor(make_blocks(6)["input_ids"])
    trainer._train_generator(trainer.model, blocks)
    assert torch.equal(sampled[0][:, :2], blocks[[0, 0, 2, 2, 4, 4], :2])
    assert len(sampled[0].unique(dim=0)) > 3
    expected = -likelihoods_alone(trainer.generator, blocks).mean().item()
    assert trainer.metrics.averages()["mle_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_reference_is_the_pretrained_policy_and_holds_the_generator_back(tmp_path: Path) -> None:
    divergences = []
    for coefficient in (1e-9, 10.0):
        trainer = make_trainer(tmp_path, reward="random", mle_weight=0.0, max_steps=6, kl_coef=coefficient)
        start = parameters(trainer.model)
        trainer.train()
        assert trainer.reference_policy is not None
        assert moved(start, parameters(trainer.reference_policy)) == 0.0
        divergences.append(trainer.state.log_history[-2]["kl"])
    assert divergences[1] < divergences[0] / 2


def test_the_average_is_evaluated_and_saved_and_does_not_touch_the_run(tmp_path: Path) -> None:
    steps: list[dict[str, torch.Tensor]] = []
    plain, averaged = (
        make_trainer(tmp_path),
        make_trainer(tmp_path, ema_decay=0.5, eval_strategy="steps", eval_steps=1),
    )
    expected = parameters(plain.model)

    class Watch(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            steps.append(parameters(plain.model))

    plain.add_callback(Watch())
    for trainer in (plain, averaged):
        trainer.train()
    assert moved(parameters(plain.model), parameters(averaged.model)) == 0.0
    for step in steps:
        expected = {name: (expected[name] + step[name]) / 2 for name in expected}
    assert moved(expected, parameters(averaged.generator_for_saving)) < 1e-6
    assert plain.generator_for_saving is plain.generator
    assert averaged.averaged_policy is not None
    plain.model.load_state_dict(averaged.averaged_policy.state_dict())
    plain.discriminator.load_state_dict(averaged.discriminator.state_dict())
    ours, theirs = plain.evaluate(), averaged.evaluate()
    assert ours | TIMES == theirs | TIMES


def test_the_best_average_is_loaded_at_the_end(tmp_path: Path) -> None:
    # The greatest loss counts as the best here: it is that of the first step, and not what the run ends with.
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    steps: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, ema_decay=0.5, **best, **steps)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[0] == max(losses) > losses[-1] + 0.01
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-6)


def test_the_warm_up_skips_steps_at_the_accuracy_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, d_warmup_steps=60, d_max_accuracy=0.5, d_learning_rate=1e-2)
    trainer.pretrain_discriminator()
    skipped = trainer.metrics.averages()["d_skipped"]
    assert 0 < skipped < 1
    states = trainer.discriminator_update.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {round(60 * (1 - skipped))}


def test_only_as_many_negatives_are_sampled_as_are_not_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    step = DiscriminatorUpdate.__call__

    def watched(update: DiscriminatorUpdate, real: torch.Tensor, fake: torch.Tensor) -> Measures:
        assert torch.equal(real[: len(fake), :2], fake[:, :2])
        counts.append(len(fake))
        return step(update, real, fake)

    monkeypatch.setattr(DiscriminatorUpdate, "__call__", watched)
    trainer = make_trainer(tmp_path, replay_fraction=0.5)
    for _ in range(3):
        trainer.train_discriminator()
    assert counts == [4, 2, 2]


@pytest.mark.parametrize("option", [{"estimator": "dense"}, {"r1_weight": 1.0}], ids=str)
def test_what_a_discriminator_cannot_do_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    kind = "cnn" if "estimator" in option else "mamba"
    with pytest.raises(ValueError, match="needs a discriminator of kind"):
        make_trainer(tmp_path, kind, **option)


def test_a_last_batch_of_one_sequence_does_not_end_the_run(tmp_path: Path) -> None:
    args = make_trainer(tmp_path, max_steps=4).args
    trainer = AdversarialTrainer(make_generator(), make_discriminator(), args, make_blocks(9), make_blocks(8))
    trainer.train()
    assert trainer.state.global_step == 4


def test_networks_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    args = AdversarialConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="knows 5 tokens, the generator 11"):
        AdversarialTrainer(make_generator(), make_discriminator(vocab_size=5), args, make_blocks(), make_blocks())


def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path) -> None:
    args = make_trainer(tmp_path).args
    others = make_discriminator(), args, make_blocks(), make_blocks(8)
    with pytest.raises(ValueError, match=r"eos_token_id is \[2, 3\]; set it to a single token"):
        AdversarialTrainer(make_generator(eos_token_id=[2, 3]), *others)
    with pytest.raises(ValueError, match=r"rollout_memory_mb is 0\.001, but one completion"):
        make_trainer(tmp_path, rollout_memory_mb=0.001)
