"""The trainer's samples and their values: roll-outs, and sequences that end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from midimamba.modeling.sampling import Sequences
from midimamba.training import action_values
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.generator_update import Batch, LossTerms
from midimamba.training.rewards import Reward
from midimamba.training.rollout import Rollouts, rows_for_budget
from support import make_discriminator, make_generator
from trainer_support import LENGTH, all_valid, make_blocks, make_trainer


def test_a_memory_budget_sets_the_number_of_completions_and_changes_no_value(tmp_path: Path) -> None:
    sequences = all_valid(torch.tensor(make_blocks(4)["input_ids"]))
    for kind in ("cnn", "mamba"):
        small, large = (make_trainer(tmp_path, kind, rollout_memory_mb=budget) for budget in (0.5, 100.0))
        assert 0 < small.rollouts.max_rows < large.rollouts.max_rows
        assert large.rollouts.max_rows == rows_for_budget(large.generator, LENGTH, 100.0, large.monitor.discriminator)
        small.rollouts.max_rows = large.rollouts.max_rows
        values = []
        for trainer in (large, small):
            torch.manual_seed(0)
            values.append(trainer.action_values(sequences))
        assert torch.equal(*values)


def test_a_controls_budget_pays_for_no_discriminator(tmp_path: Path) -> None:
    control = make_trainer(tmp_path, reward="random", rollout_memory_mb=100.0)
    assert control.rollouts.max_rows == rows_for_budget(control.generator, LENGTH, 100.0)


def test_rollouts_value_bar_lines_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    valued: list[list[list[int]]] = []
    estimate = action_values.monte_carlo_values

    def watched(rollouts: Rollouts, reward: Reward, sequences: Sequences, positions: torch.Tensor) -> torch.Tensor:
        valued.append(positions.tolist())
        return estimate(rollouts, reward, sequences, positions)

    monkeypatch.setattr(action_values, "monte_carlo_values", watched)
    trainer = make_trainer(tmp_path)
    sequences = all_valid(torch.tensor([[1, 1, 7, 1, 1, 1, 7, 1], [7, 7, 1, 1, 1, 1, 1, 1]]))
    for bars in ([7], []):
        trainer.action_values.bar_token_ids = bars
        assert trainer.action_values(sequences).shape == (2, LENGTH - 2)
    assert valued == [[[2, 6], [3, 5]], [[3, 5], [3, 5]]]


def test_samples_end_where_the_generator_says(tmp_path: Path) -> None:
    prompts = torch.tensor(make_blocks(24)["input_ids"])[:, :2]
    ending, endless = make_trainer(tmp_path, generator=make_generator()), make_trainer(tmp_path)
    eos, pad = ending.generator.config.eos_token_id, ending.generator.config.pad_token_id
    samples = ending.sample(prompts)
    over = ending.ending.mask(samples, 2) == 0
    assert over.any()
    assert (samples[over] == pad).all()
    assert (samples[:, 2:] == eos).any()
    assert endless.ending.eos_token_id is None
    assert endless.ending.mask(samples, 2).all()


@pytest.mark.parametrize("options", [{}, {"ppo_clip": 0.2, "kl_coef": 0.1, "entropy_coef": 0.1}], ids=["plain", "all"])
def test_the_loss_of_sequences_that_ended_is_that_of_the_sequences_without_padding(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer = make_trainer(tmp_path, generator=make_generator(), mle_weight=0.0, **options)
    if trainer.reference_policy is not None:
        (embeddings,) = trainer.reference_policy.get_input_embeddings().parameters()
        embeddings.mul_(1.1)  # else there is no divergence
    eos, pad = trainer.ending.eos_token_id, trainer.ending.pad_token_id
    fake = torch.tensor([[1, 3, 4, 5, eos, pad, pad, pad], [1, eos, 6, eos, pad, pad, pad, pad], [3] * LENGTH])
    mask = trainer.ending.mask(fake, 2)
    lengths = mask.sum(1)
    assert lengths.tolist() == [5, 4, LENGTH]
    advantages = torch.randn(3, LENGTH - 2) * mask[:, 2:]

    def loss(sequences: Sequences, advantages: torch.Tensor) -> LossTerms:
        return trainer.generator_loss(trainer.model, Batch(sequences, sequences.ids, advantages))

    with torch.no_grad():
        whole = loss(Sequences(fake, mask), advantages)
        parts = [
            loss(all_valid(fake[row : row + 1, :end]), advantages[row : row + 1, : end - 2])
            for row, end in enumerate(lengths.tolist())
        ]
    torch.testing.assert_close(whole.loss, torch.stack([part.loss for part in parts]).mean())
    actions = lengths - 2
    for name in {"kl", "entropy"} & whole.measures.keys():
        measured = torch.stack([part.measures[name] for part in parts])
        torch.testing.assert_close(whole.measures[name], (measured * actions).sum() / actions.sum())
    assert ("kl" in whole.measures) == (trainer.reference_policy is not None)


@pytest.mark.parametrize(
    ("estimator", "kind"), [("monte-carlo", "cnn"), ("monte-carlo", "mamba"), ("dense", "mamba"), ("terminal", "cnn")]
)
def test_what_follows_an_end_changes_nothing(tmp_path: Path, estimator: str, kind: str) -> None:
    """Real blocks run on past their end, samples are padded: neither values, judge nor evaluation look there."""
    trainer = make_trainer(tmp_path, kind, generator=make_generator(), estimator=estimator)
    eos = trainer.ending.eos_token_id
    assert eos is not None
    blocks = torch.tensor(make_blocks(4)["input_ids"])
    blocks[blocks == eos] = 3
    blocks[:, 4] = eos
    others = blocks.clone()
    others[:, 5:] = 9
    outputs = []
    for sequences in (blocks, others):
        trainer.discriminator.train(False)
        torch.manual_seed(0)
        mask = trainer.ending.mask(sequences, 2)
        values = trainer.action_values(Sequences(sequences, mask))[:, :3]
        logits = trainer.discriminator(sequences, attention_mask=mask).logits
        outputs.append((values, logits.detach(), trainer.monitor.measure(sequences, sequences)[0]))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-5)
    trainer.train()
    trainer.evaluate()


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
    assert trainer.generator.config.capacity_factor == 0.1
