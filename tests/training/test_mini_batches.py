"""Several optimizer steps in a round: against loops written by hand, and what is held out stays unseen."""

import copy
import gc
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from midimamba.modeling.sampling import NEVER, Ending, Sequences
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.credit import importance_weights
from midimamba.training.discriminator_update import DiscriminatorUpdate
from midimamba.training.generator_update import Batch, GeneratorLoss, GeneratorUpdate, LossTerms
from support import make_discriminator, make_generator
from trainer_support import LENGTH, PLAIN, all_valid, make_blocks, make_trainer, moved, parameters

COUNT, PROMPT = 6, 2


def make_batch(ending: Ending = NEVER) -> Batch:
    torch.manual_seed(4)
    fake = torch.randint(1, 11, (COUNT, LENGTH))
    real = torch.tensor(make_blocks(COUNT)["input_ids"])
    mask = ending.mask(fake, PROMPT)
    return Batch(Sequences(fake, mask), real, torch.randn(COUNT, LENGTH - PROMPT) * mask[:, PROMPT:])


def prepared(folder: Path, **options: Any) -> AdversarialTrainer:
    """A trainer with an optimizer, whose steps are plain gradient steps."""
    trainer = make_trainer(folder, max_grad_norm=0.0, **options)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.05)
    return trainer


def watch_losses(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The micro-batches whose gradient is computed, as they come."""
    seen: list[Batch] = []
    loss = GeneratorLoss.__call__

    def watched(self: GeneratorLoss, model: torch.nn.Module, batch: Batch) -> LossTerms:
        if torch.is_grad_enabled():
            seen.append(batch)
        return loss(self, model, batch)

    monkeypatch.setattr(GeneratorLoss, "__call__", watched)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"ppo_clip": 0.2, "ppo_epochs": 2},
        {"ppo_clip": 0.2, "entropy_coef": 0.1, "mle_weight": 0.0},
        {"estimator": "distill", "reward": "log-odds", "ppo_epochs": 2},
    ],
    ids=["ppo", "one pass", "distill"],
)
def test_a_pass_in_parts_is_a_loop_of_optimizer_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    by_hand, in_parts = (prepared(tmp_path, mini_batch_size=4, micro_batch_size=3, **options) for _ in range(2))
    batch = make_batch()
    if by_hand.args.estimator == "distill":
        weights = batch.advantages[:, :1].exp()
        batch = batch._replace(advantages=weights * batch.valid)
    with torch.no_grad():
        old = by_hand.generator_loss(by_hand.model, batch).log_probabilities
    torch.manual_seed(9)
    group, taken = by_hand.optimizer.param_groups[0], 0
    rate = group["lr"]
    for _ in range(by_hand.args.ppo_epochs):
        drawn = batch.resampled() if by_hand.args.estimator == "distill" else batch._replace(old=old)
        for rows in torch.randperm(COUNT).split(4):
            part = drawn.rows(rows)
            group["lr"] = rate * (1 - taken / (by_hand.args.ppo_epochs * math.ceil(COUNT / 4)))
            taken += 1
            by_hand.optimizer.zero_grad()
            by_hand.generator_loss(by_hand.model, part).loss.backward()
            by_hand.optimizer.step()
    torch.manual_seed(9)
    in_parts.generator_update(in_parts.model, in_parts.optimizer, batch)
    in_parts.optimizer.step()  # the last one is the caller's
    before = parameters(prepared(tmp_path).model)
    expected, found = parameters(by_hand.model), parameters(in_parts.model)
    assert moved(before, expected) > 1e-3
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_nothing_stays_in_memory_after_a_mini_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """A small tensor that stays lies between the large ones of two steps, and keeps their memory apart."""
    trainer = make_trainer(
        tmp_path, estimator="terminal", ppo_clip=0.2, mini_batch_size=1, per_device_train_batch_size=COUNT, max_steps=1
    )
    update: Any = {"generator": GeneratorUpdate, "discriminator": DiscriminatorUpdate}[which]
    tensors: list[int] = []
    accumulate = update._accumulate

    def count(self: Any, *arguments: Any) -> Any:
        gc.collect()
        tensors.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
        return accumulate(self, *arguments)

    monkeypatch.setattr(update, "_accumulate", count)
    trainer.train()
    assert tensors[4] == tensors[2]  # of the first pass; after two steps, the optimizer has its moments


@pytest.mark.parametrize("size", [COUNT, COUNT + 1])
def test_a_mini_batch_as_large_as_the_batch_changes_nothing(tmp_path: Path, size: int) -> None:
    runs = []
    for mini in (None, size):
        trainer = make_trainer(
            tmp_path, mini_batch_size=mini, per_device_train_batch_size=COUNT, ppo_clip=0.2, ppo_epochs=2
        )
        trainer.train()
        runs.append(parameters(trainer.model) | parameters(trainer.discriminator))
    assert moved(*runs) == 0.0


def test_every_pass_has_all_sequences_in_another_order_and_ratios_begin_at_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = prepared(tmp_path, mini_batch_size=2, ppo_clip=0.2, ppo_epochs=3)
    seen = watch_losses(monkeypatch)
    batch = make_batch()
    measured = trainer.generator_update(trainer.model, trainer.optimizer, batch)[1]
    assert [len(part.real) for part in seen] == [2] * 9
    passes = [torch.cat([part.fake.ids for part in seen[start : start + 3]]) for start in (0, 3, 6)]
    for ids in passes:
        assert sorted(ids.tolist()) == sorted(batch.fake.ids.tolist())
    assert len({str(ids.tolist()) for ids in passes}) == 3
    # What belongs together stays together.
    rows = {tuple(ids): index for index, ids in enumerate(batch.fake.ids.tolist())}
    for part in seen:
        places = [rows[tuple(ids)] for ids in part.fake.ids.tolist()]
        assert torch.equal(part.real, batch.real[places])
        assert torch.equal(part.advantages, batch.advantages[places])
    # Nothing has moved before the first step: every ratio is 1 there, and later they are not.
    fresh = prepared(tmp_path, mini_batch_size=2, ppo_clip=0.2)
    with torch.no_grad():
        first = fresh.generator_loss(fresh.model, seen[0]).measures
    assert float(first["policy_ratio_max"]) == pytest.approx(1, abs=1e-5)
    assert float(first["clip_fraction"]) == 0
    assert float(measured["policy_ratio_max"]) > 1.001


def test_parts_lose_only_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a part is the same with and without the columns that are cut off."""
    ending = Ending(2, 0)
    trainer = prepared(tmp_path, mini_batch_size=2, ppo_clip=0.2, mle_weight=0.0, generator=make_generator())
    seen = watch_losses(monkeypatch)
    batch = make_batch()
    ids = batch.fake.ids.clone()
    ids[ids == 2] = 3
    for row, end in enumerate((2, 3, 3, 4, 2, 5)):
        ids[row, end] = 2
    mask = ending.mask(ids, PROMPT)
    fake = Sequences(ids.masked_fill(mask == 0, 0), mask)
    batch = Batch(fake, batch.real, batch.advantages * mask[:, PROMPT:])
    trainer.generator_update(trainer.model, trainer.optimizer, batch)
    assert [part.fake.ids.shape[1] for part in seen] == [int(part.fake.mask.sum(1).max()) for part in seen]
    assert all(part.real.shape[1] == LENGTH for part in seen)  # music keeps its length
    assert all(part.advantages.shape[1] == part.fake.ids.shape[1] - PROMPT for part in seen)
    policy = make_generator()
    wide = batch.rows(slice(0, 2))
    losses = [trainer.generator_loss(policy, part).loss for part in (wide, wide.trimmed())]
    gradients = [torch.autograd.grad(loss, list(policy.parameters())) for loss in losses]
    assert wide.trimmed().fake.ids.shape[1] == 4
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, cut, atol=1e-6, rtol=1e-4)


def test_music_of_a_part_keeps_its_length_beside_short_samples(tmp_path: Path) -> None:
    """Its likelihood is that of the whole blocks, and the samples are learned from as without the music."""
    policy = make_generator()
    batch = make_batch()
    mask = torch.zeros_like(batch.fake.mask)
    mask[:, :4] = 1
    fake = Sequences(batch.fake.ids.masked_fill(mask == 0, 0), mask)
    batch = Batch(fake, batch.real, batch.advantages * mask[:, PROMPT:])
    trimmed = batch.trimmed()
    assert trimmed.fake.ids.shape[1] == 4
    both, alone = (prepared(tmp_path, ppo_clip=0.2, mle_weight=weight).generator_loss for weight in (0.5, 0.0))
    terms = both(policy, trimmed)
    labels = both.collator.separate(batch.real)["labels"]
    count = int((labels[:, 1:] != -100).sum())
    # `GeneratorLoss` sums over time and averages over blocks; `labels` average over tokens.
    separated = both.collator.separate(batch.real)
    likelihood = policy(**separated).loss * count / COUNT
    assert int(terms.counts["mle_loss"]) == count
    torch.testing.assert_close(terms.loss, alone(policy, trimmed).loss + 0.5 * likelihood, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.log_probabilities, alone(policy, trimmed).log_probabilities)
    torch.testing.assert_close(terms.loss, both(policy, batch).loss, atol=1e-5, rtol=1e-5)
    # Shorter music as well.
    short = trimmed._replace(real=batch.real[:, :3])
    expected = alone(policy, trimmed).loss + 0.5 * policy(**both.collator.separate(short.real)).loss * (
        int((both.collator.separate(short.real)["labels"][:, 1:] != -100).sum()) / COUNT
    )
    torch.testing.assert_close(both(policy, short).loss, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_that_has_all_the_bars_teaches_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    """Its row, its part, or all of its batch may have no action that counts."""
    ending = Ending(None, 0, 1, (7,))
    trainer = prepared(tmp_path, mini_batch_size=1, micro_batch_size=1, ppo_clip=0.2, mle_weight=0.0, kl_coef=0.1)
    batch = make_batch()
    ids = batch.fake.ids.clone()
    ids[ids == 7] = 3
    ids[:3, :PROMPT] = 7
    mask = ending.mask(ids, PROMPT)
    batch = Batch(Sequences(ids, mask), batch.real, batch.advantages * mask[:, PROMPT:])
    assert not batch.valid[:3].any()
    assert batch.valid[3:].all()
    before = parameters(trainer.model)
    _, measured = trainer.generator_update(trainer.model, trainer.optimizer, batch.rows(slice(0, 3)))
    trainer.optimizer.step()
    assert moved(before, parameters(trainer.model)) == 0.0
    loss, mixed = trainer.generator_update(trainer.model, trainer.optimizer, batch)
    assert all(torch.as_tensor(value).isfinite() for value in (loss, *measured.values(), *mixed.values()))


# ---- the discriminator ----


def make_update(folder: Path, held_out: Tensor, **options: Any) -> DiscriminatorUpdate:
    common: dict[str, Any] = {
        **{"sequence_length": LENGTH, "per_device_train_batch_size": 16, "d_learning_rate": 1e-2},
        **{"prompt_length": 1, "mini_batch_size": 4, "ppo_clip": 0.2, "weight_decay": 0.0, "d_max_grad_norm": 0.0},
    }
    args = AdversarialConfig(**PLAIN | common | {"output_dir": str(folder), "use_cpu": True} | options)
    discriminator = make_discriminator(dropout=0.0)
    return DiscriminatorUpdate(discriminator, args, Accelerator(cpu=True), NEVER, held_out)


def music(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(1, 7, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def samples(count: int = 16, seed: int = 1) -> Tensor:
    return torch.randint(5, 11, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def entropy(discriminator: torch.nn.Module, real: Tensor, fake: Tensor) -> float:
    with torch.no_grad():
        of_real, of_fake = (discriminator.eval()(ids).logits[:, 0] for ids in (real, fake))
    return float((F.softplus(-of_real).mean() + F.softplus(of_fake).mean()) / 2)


def state(update: DiscriminatorUpdate) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in update.discriminator.state_dict().items()}


def watch_learning(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The sequences of every step with their labels."""
    seen: list[tuple[Tensor, Tensor]] = []
    accumulate = DiscriminatorUpdate._accumulate

    def watched(self: DiscriminatorUpdate, sequences: Sequences, labels: Tensor, num_real: int) -> Any:
        seen.append((sequences.ids, labels))
        return accumulate(self, sequences, labels, num_real)

    monkeypatch.setattr(DiscriminatorUpdate, "_accumulate", watched)
    return seen


def test_the_discriminator_learns_in_parts_as_in_a_loop(tmp_path: Path) -> None:
    real, fake, held_out = music(), samples(), music(8, 5)
    update = make_update(tmp_path, held_out, d_epochs=2)
    twin = make_discriminator(dropout=0.0)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    before = entropy(twin, held_out, fake[:2])
    torch.manual_seed(3)
    measures = update(real, fake)
    torch.manual_seed(3)
    learned, losses = fake[2:], []
    twin.train()
    for _ in range(2):
        orders = [torch.randperm(14).split(4) for _ in range(2)]
        for some_real, some_fake in zip(*orders, strict=True):
            labels = torch.cat([torch.ones(len(some_real)), torch.zeros(len(some_fake))])
            loss = twin(torch.cat([real[:14][some_real], learned[some_fake]]), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    after = entropy(twin, held_out, fake[:2])
    assert after < before
    assert float(measures["d_loss_held_out"]) == pytest.approx(after, abs=1e-4)
    assert float(measures["d_loss"]) == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    for name, tensor in update.discriminator.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_held_out_samples_and_music_are_not_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake, held_out = music(), samples(), music(8, 5)
    update = make_update(tmp_path, held_out, d_epochs=3)
    seen = watch_learning(monkeypatch)
    update(real, fake)
    learned = [(tuple(ids), label) for rows, labels in seen for ids, label in zip(rows.tolist(), labels, strict=True)]
    of_real = {ids for ids, label in learned if label == 1}
    of_fake = {ids for ids, label in learned if label == 0}
    assert of_fake == {tuple(ids) for ids in fake[2:].tolist()}
    assert of_real <= {tuple(ids) for ids in real.tolist()}
    assert not {tuple(ids) for ids in held_out.tolist()} & (of_real | of_fake)
    assert all(int(labels.sum()) * 2 == len(labels) for _, labels in seen)
    orders = [torch.cat([rows for rows, _ in seen[start : start + 4]]).tolist() for start in (0, 4, 8)]
    assert orders[0] != orders[1] != orders[2]


def test_a_pass_that_makes_it_worse_is_undone_and_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out music that looks like samples: whatever is learned makes it worse there."""
    update = make_update(tmp_path, samples(8, 7), d_epochs=9, d_learning_rate=0.1)
    seen = watch_learning(monkeypatch)
    before = state(update)
    loss = entropy(update.discriminator, samples(8, 7), samples()[:2])
    measures = update(music(), samples())
    assert len(seen) == 4  # a single pass
    assert float(measures["d_loss_held_out"]) == pytest.approx(loss, abs=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(update).items())
    assert not update.optimizer.state_dict()["state"]  # as before the first step


def test_what_is_undone_leaves_no_trace_in_the_optimizer(tmp_path: Path) -> None:
    """It goes on as one that was stopped before the pass that made it worse."""
    held_out, real, fake = music(8, 5), music(), samples()
    undone, stopped = (make_update(tmp_path, held_out, d_epochs=epochs) for epochs in (2, 1))
    for update in (undone, stopped):  # a pass that helps
        torch.manual_seed(2)
        update(real, fake)
        if update is undone:
            assert {int(moments["step"]) for moments in update.optimizer.state_dict()["state"].values()} == {8}
    moments = copy.deepcopy(undone.optimizer.state_dict()["state"])
    weights = state(undone)
    undone.held_out = samples(8, 7)  # from now on, whatever is learned makes it worse
    undone.optimizer.param_groups[0]["lr"] = 0.1
    undone(real, fake)
    assert all(torch.equal(weights[name], tensor) for name, tensor in state(undone).items())
    after = undone.optimizer.state_dict()["state"]
    assert after.keys() == moments.keys()
    for key, expected in moments.items():
        assert expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(after[key][name], tensor) for name, tensor in expected.items())
    # And it can learn on.
    undone.held_out = held_out
    undone.optimizer.param_groups[0]["lr"] = 1e-3
    undone(real, fake)
    assert int(undone.optimizer.state_dict()["state"][0]["step"]) > int(moments[0]["step"])


def test_the_best_weights_are_those_before_the_first_pass_that_is_worse(tmp_path: Path) -> None:
    """Few sequences to learn by heart: the held-out loss falls and rises again."""
    held_out = torch.cat([music(30, 5), samples(10, 8)])
    real, fake = music(), samples()
    shorter: list[float] = []
    for epochs in range(1, 40):
        update = make_update(tmp_path, held_out, d_epochs=epochs)
        torch.manual_seed(2)
        shorter.append(float(update(real, fake)["d_loss_held_out"]))
        if epochs > 1 and shorter[-1] == shorter[-2]:
            break
    assert 2 < len(shorter) < 39
    assert all(one > other for one, other in pairwise(shorter[:-1]))
    assert entropy(update.discriminator, held_out, fake[:2]) == pytest.approx(shorter[-1], abs=1e-5)


def test_old_negatives_are_learned_from_in_parts_and_judged_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = make_update(tmp_path, music(8, 5), replay_fraction=0.25, d_max_accuracy=1.0)
    old = torch.full((16, LENGTH), 9)
    assert "d_replay_accuracy" not in update(music(), old)
    seen = watch_learning(monkeypatch)
    fresh = torch.full((12, LENGTH), 10)
    scores = [float((update._score(ids) <= 0).float().mean()) for ids in (fresh, old)]
    right = float((update._score(music()) > 0).float().mean())
    measures = update(music(), fresh)
    assert float(measures["d_replay_accuracy"]) == pytest.approx(scores[1])
    assert float(measures["d_accuracy"]) == pytest.approx((right + scores[0]) / 2)
    assert float(measures["d_skipped"]) == 0.0
    negatives = torch.cat([rows[labels == 0] for rows, labels in seen])
    assert (negatives == 9).all(1).sum() == 4
    assert len(negatives) == 14


def test_a_discriminator_that_is_too_strong_waits_in_parts_as_well(tmp_path: Path) -> None:
    update = make_update(tmp_path, music(8, 5), d_max_accuracy=0.9, d_epochs=3)
    skipped = [float(update(music(16, seed), samples(16, seed))["d_skipped"]) for seed in range(40)]
    assert skipped[0] == 0.0
    assert 0 < sum(skipped) < 40
    before = state(update)
    measures = update(torch.full((16, LENGTH), 2), torch.full((16, LENGTH), 10))
    assert float(measures["d_skipped"]) == 1.0
    assert all(torch.equal(before[name], tensor) for name, tensor in state(update).items())


def test_a_round_in_parts_counts_its_steps_and_moves_both_networks(tmp_path: Path) -> None:
    options: dict[str, Any] = {"estimator": "distill", "reward": "log-odds", "mini_batch_size": 3, "ppo_epochs": 2}
    trainer = make_trainer(tmp_path, max_steps=2, per_device_train_batch_size=8, **options)
    generator, discriminator = parameters(trainer.model), parameters(trainer.discriminator)
    trainer.train()
    assert {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()} == {2 * 2 * 3}
    assert moved(generator, parameters(trainer.model)) > 1e-3
    assert moved(discriminator, parameters(trainer.discriminator)) > 1e-4
    logged = trainer.state.log_history[0]
    assert {"d_loss_held_out", "d_auc", "d_calibration_error", "effective_samples"} <= set(logged)
    assert 1 <= logged["effective_samples"] <= 8


def test_distillation_in_one_step_is_the_weighted_likelihood_by_hand(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, estimator="distill", reward="log-odds", mle_weight=0.0)
    log_odds = torch.tensor([0.0, 1.0, -2.0, 0.5])
    ids = make_batch().fake.ids[:4]
    advantages, _ = trainer.credit(log_odds[:, None].expand(-1, LENGTH - PROMPT), torch.ones(4, 6, dtype=torch.bool))
    batch = Batch(all_valid(ids), ids, advantages)
    with torch.no_grad():
        loss = trainer.generator_loss(trainer.model, batch).loss
        log_probabilities = trainer.model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    weights = importance_weights(log_odds, 0.1)
    torch.testing.assert_close(loss, -(weights * log_probabilities[:, PROMPT - 1 :].sum(1)).mean())


def test_what_is_resampled_has_the_mean_weight_on_every_token() -> None:
    """Processes have different mean weights, and their gradients are averaged."""
    batch = make_batch()
    valid = batch.valid
    weights = torch.zeros(len(valid))
    weights[1], weights[3] = 1.0, 3.0
    drawn = batch._replace(advantages=weights[:, None] * valid).resampled()
    rows = [int((batch.fake.ids == row).all(1).nonzero()[0]) for row in drawn.fake.ids]
    assert set(rows) == {1, 3}
    assert abs(rows.count(3) - 0.75 * len(rows)) < 1
    torch.testing.assert_close(drawn.advantages, weights.mean() * valid[rows].float())
    assert torch.equal(drawn.real, batch.real)
    fewer = batch._replace(advantages=weights[:, None] * valid, real=batch.real[:3]).resampled()
    assert len(fewer.fake.ids) == len(fewer.advantages) == 3


def test_a_round_of_many_steps_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"estimator": "distill", "reward": "log-odds", "mini_batch_size": 3}
    options["per_device_train_batch_size"] = 12
    for disable in (False, True):
        trainer = make_trainer(tmp_path / str(disable), max_steps=1, disable_tqdm=disable, **options)
        trainer.train()
        shown = capsys.readouterr().err
        assert ("generator:" in shown, "discriminator:" in shown) == (not disable, not disable)
