"""The generator's loss against its terms, added up by hand from one pass over the samples and one over the music."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midimamba import MidiMambaForCausalLM
from midimamba.corpus.packing import BlockCollator
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.generator_update import Batch, GeneratorLoss
from midimamba.training.policies import frozen_copy
from support import make_generator
from trainer_support import PLAIN, all_valid

BATCH, LENGTH, PROMPT = 3, 7, 2


def make_loss(folder: Path, model: MidiMambaForCausalLM, **options: Any) -> GeneratorLoss:
    common: dict[str, Any] = {"sequence_length": LENGTH, "prompt_length": PROMPT, "mle_weight": 0.0, "use_cpu": True}
    args = AdversarialConfig(**PLAIN | common | {"output_dir": str(folder)} | options)
    reference = frozen_copy(make_other(model)) if args.kl_coef else None
    return GeneratorLoss(args, BlockCollator(), reference)


def make_other(model: MidiMambaForCausalLM) -> MidiMambaForCausalLM:
    """Another policy of the same shape."""
    torch.manual_seed(7)
    other = make_generator()
    other.load_state_dict(
        {name: tensor + torch.randn_like(tensor) / 10 for name, tensor in model.state_dict().items()}
    )
    return other


def make_batch(old: Tensor | None = None) -> Batch:
    torch.manual_seed(3)
    fake, real = torch.randint(1, 11, (2, BATCH, LENGTH))
    return Batch(all_valid(fake), real, torch.randn(BATCH, LENGTH - PROMPT), old)


def test_every_term_is_a_sum_over_time_and_a_mean_over_sequences(tmp_path: Path) -> None:
    model = make_generator()
    options: dict[str, Any] = {"ppo_clip": 0.2, "kl_coef": 0.3, "entropy_coef": 0.7, "mle_weight": 0.5}
    loss = make_loss(tmp_path, model, **options)
    batch = make_batch()
    fake, real, advantages = batch.fake.ids, batch.real, batch.advantages
    with torch.no_grad():
        old = loss(make_other(model), batch).log_probabilities
        total = loss(model, batch._replace(old=old)).loss
        expected = 0.0
        for row in range(BATCH):
            policy = torch.distributions.Categorical(logits=model(fake[row : row + 1]).logits[0, PROMPT - 1 : -1])
            other = make_other(model)(fake[row : row + 1]).logits[0, PROMPT - 1 : -1]
            reference = torch.distributions.Categorical(logits=other)
            actions = fake[row, PROMPT:]
            ratio = (policy.log_prob(actions) - reference.log_prob(actions)).exp()
            gain = torch.minimum(ratio * advantages[row], ratio.clamp(0.8, 1.2) * advantages[row]).sum()
            divergence = torch.distributions.kl_divergence(policy, reference).sum()
            music = torch.distributions.Categorical(logits=model(real[row : row + 1]).logits[0, :-1])
            likelihood = music.log_prob(real[row, 1:]).sum()
            expected += -gain + 0.3 * divergence - 0.7 * policy.entropy().sum() - 0.5 * likelihood
    torch.testing.assert_close(total, expected / BATCH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("option", "metric"), [({"kl_coef": 1000.0}, "kl"), ({"entropy_coef": 1000.0}, "entropy")])
def test_a_large_weight_moves_its_term(tmp_path: Path, option: dict[str, float], metric: str) -> None:
    model = make_generator().train()
    loss = make_loss(tmp_path, model, **option)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    measured = []
    for _ in range(5):
        terms = loss(model, make_batch())
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        measured.append(float(terms.measures[metric]) * (1 if metric == "kl" else -1))
    assert measured == sorted(measured, reverse=True)
    assert measured[-1] < measured[0] - 0.01


def test_ratios_are_measured_against_the_policy_that_sampled(tmp_path: Path) -> None:
    model = make_generator()
    loss = make_loss(tmp_path, model, ppo_clip=0.2)
    with torch.no_grad():
        first = loss(model, make_batch())
        assert "policy_ratio_max" not in first.measures
        shifted = first.log_probabilities - torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5])
        measures = loss(model, make_batch(shifted)).measures
    ratios = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5]).exp()
    assert float(measures["policy_ratio_max"]) == pytest.approx(ratios.max().item())
    assert float(measures["clip_fraction"]) == pytest.approx(3 / 5)
    assert float(measures["approx_kl"]) == pytest.approx((ratios - 1 - ratios.log()).mean().item(), rel=1e-4)


def test_the_coefficient_follows_the_divergence_only_towards_a_target(tmp_path: Path) -> None:
    model = make_generator()
    fixed, adaptive = (make_loss(tmp_path, model, kl_coef=0.5, kl_target=target) for target in (None, 0.1))
    for loss in (fixed, adaptive):
        loss.adapt(1.0)
        loss.adapt(0.0)
    assert fixed.kl_coef == 0.5
    assert adaptive.kl_coef == pytest.approx(0.5 * 1.02 * 0.98)
