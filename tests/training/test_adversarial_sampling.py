"""The trainer's samples and their values: roll-outs, sequences that end, another temperature."""

from pathlib import Path

import pytest
import torch

from midimamba.modeling.sampling import valid_tokens
from midimamba.training import credit
from trainer_support import LENGTH, make_blocks, make_trainer


def test_a_memory_budget_sets_the_number_of_completions_and_changes_no_value(tmp_path: Path) -> None:
    sequences = torch.tensor(make_blocks(4)["input_ids"])
    for kind in ("cnn", "mamba"):
        small, large = (make_trainer(tmp_path, kind, rollout_memory_mb=budget) for budget in (0.5, 100.0))
        assert 0 < small.action_values.max_rows < large.action_values.max_rows
        plain = make_trainer(tmp_path, kind, rollout_batch_size=large.action_values.max_rows)
        values = []
        for trainer in (large, plain):
            torch.manual_seed(0)
            values.append(trainer.action_values(sequences))
        assert torch.equal(*values)


def test_rollouts_value_bar_lines_first(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.action_values.bar_token_ids = [7]
    sequences = torch.tensor([[1, 1, 1, 7, 1, 7, 1, 1], [7, 7, 1, 1, 1, 1, 1, 1]])
    assert trainer.action_values._positions(sequences)[0].tolist() == [3, 5]
    trainer.args.rollout_at = "strided"
    assert trainer.action_values._positions(sequences).tolist() == [[3, 5], [3, 5]]


@pytest.mark.parametrize("options", [{}, {"ppo_clip": 0.2, "kl_coef": 0.1, "entropy_coef": 0.1}], ids=["plain", "all"])
def test_the_loss_of_sequences_that_ended_is_that_of_the_sequences_without_padding(
    tmp_path: Path, options: dict[str, object]
) -> None:
    trainer = make_trainer(tmp_path, stop_at_eos=True, mle_weight=0.0, **options)
    if trainer.reference_policy is not None:
        trainer.reference_policy.get_input_embeddings().weight.mul_(1.1)  # else there is no divergence
    eos, pad = trainer.eos_token_id, trainer.generator.config.pad_token_id
    fake = torch.tensor([[1, 3, 4, 5, eos, pad, pad, pad], [1, eos, 6, eos, pad, pad, pad, pad], [3] * LENGTH])
    valid = valid_tokens(fake, eos, 2)[:, 2:].bool()
    advantages = torch.randn(3, LENGTH - 2) * valid
    with torch.no_grad():
        whole = trainer.generator_loss(trainer.model, 0.0, fake, fake, advantages, valid=valid)
        entropy = trainer._metrics.pop("entropy")[0]
        parts = []
        for row, lived in enumerate(valid.sum(1).tolist()):
            end = 2 + lived
            parts.append(
                trainer.generator_loss(
                    trainer.model, 0.0, *[fake[row : row + 1, :end]] * 2, advantages[row : row + 1, :lived]
                )
            )
    torch.testing.assert_close(whole.loss, torch.stack([part.loss for part in parts]).mean())
    lengths = valid.sum(1).float()
    divergences = torch.stack([part.divergence for part in parts])
    torch.testing.assert_close(whole.divergence, (divergences * lengths).sum() / lengths.sum())
    entropies = torch.tensor(trainer._metrics["entropy"])
    assert entropy == pytest.approx(((entropies * lengths).sum() / lengths.sum()).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "kind"), [("monte-carlo", "cnn"), ("monte-carlo", "mamba"), ("dense", "mamba"), ("terminal", "cnn")]
)
def test_what_follows_an_end_changes_nothing(tmp_path: Path, estimator: str, kind: str) -> None:
    """Real blocks run on past their end, samples are padded: neither values, judge nor evaluation look there."""
    trainer = make_trainer(tmp_path, kind, stop_at_eos=True, estimator=estimator)
    eos = trainer.eos_token_id
    blocks = torch.tensor(make_blocks(4)["input_ids"])
    blocks[blocks == eos] = 3
    blocks[:, 4] = eos
    others = blocks.clone()
    others[:, 5:] = 9
    outputs = []
    for sequences in (blocks, others):
        trainer.discriminator.train(False)
        torch.manual_seed(0)
        values = trainer.action_values(sequences)[:, :3]
        logits = trainer.discriminator(sequences, attention_mask=trainer.discriminator_update._mask(sequences)).logits
        outputs.append((values, logits.detach(), trainer.monitor.measure(sequences, sequences)[0]))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-5)
    trainer.train()
    trainer.evaluate()


def test_a_temperature_weights_actions_by_the_ratio_of_the_policies(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, temperature=0.5, importance_clip=1.3, mle_weight=0.0)
    behaviour = torch.empty(6, LENGTH - 2)
    prompts = torch.tensor(make_blocks(6)["input_ids"])[:, :2]
    fake = trainer._sample(prompts, 0.5, behaviour)
    advantages = torch.randn(6, LENGTH - 2)
    with torch.no_grad():
        logits = trainer.model(fake).logits[:, 1:-1]
        policy, cold = (
            part.log_softmax(-1).gather(-1, fake[:, 2:, None]).squeeze(-1) for part in (logits, logits / 0.5)
        )
        torch.testing.assert_close(behaviour, cold, atol=1e-4, rtol=1e-4)
        weights = (policy - cold).exp().clamp(max=1.3)
        assert weights.min() < 1
        loss = trainer.generator_loss(trainer.model, 0.0, fake, fake, advantages, behaviour=behaviour).loss
        torch.testing.assert_close(loss, credit.reinforce_loss(policy, weights * advantages), atol=1e-4, rtol=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["importance_weight_max"] == pytest.approx(1.3)
