"""The generator's loss against its terms, added up by hand from one pass over the samples and one over the music."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from midimamba import MidiMambaForCausalLM
from midimamba.corpus.packing import BlockCollator
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.generator_loss import GeneratorLoss
from midimamba.training.policies import frozen_copy
from support import make_generator

BATCH, LENGTH, PROMPT = 3, 7, 2


def make_loss(folder: Path, model: MidiMambaForCausalLM, **options: object) -> GeneratorLoss:
    common = {"sequence_length": LENGTH, "prompt_length": PROMPT, "use_cpu": True}
    args = AdversarialConfig(output_dir=str(folder), **(common | options))
    reference = frozen_copy(make_other(model)) if args.kl_coef else None
    return GeneratorLoss(args, BlockCollator(), reference, defaultdict(list))


def make_other(model: MidiMambaForCausalLM) -> MidiMambaForCausalLM:
    """Another policy of the same shape."""
    torch.manual_seed(7)
    other = make_generator()
    other.load_state_dict(
        {name: tensor + torch.randn_like(tensor) / 10 for name, tensor in model.state_dict().items()}
    )
    return other


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    fake, real = torch.randint(1, 11, (2, BATCH, LENGTH))
    return fake, real, torch.randn(BATCH, LENGTH - PROMPT)


def test_every_term_is_a_sum_over_time_and_a_mean_over_sequences(tmp_path: Path) -> None:
    model = make_generator()
    options = {"ppo_clip": 0.2, "kl_coef": 0.3, "entropy_coef": 0.7}
    loss = make_loss(tmp_path, model, **options)
    fake, real, advantages = make_batch()
    with torch.no_grad():
        old = loss(make_other(model), 0.0, fake, real, advantages).log_probabilities
        total = loss(model, 0.5, fake, real, advantages, old).loss
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


@pytest.mark.parametrize(
    ("option", "metric"), [({"kl_coef": 1000.0}, "divergence"), ({"entropy_coef": 1000.0}, "entropy")]
)
def test_a_term_of_great_weight_goes_where_it_leads(tmp_path: Path, option: dict[str, float], metric: str) -> None:
    model = make_generator().train()
    loss = make_loss(tmp_path, model, **option)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    measured = []
    for _ in range(5):
        terms = loss(model, 0.0, *make_batch())
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        measured.append(terms.divergence.item() if metric == "divergence" else -loss._metrics["entropy"][-1])
    assert measured == sorted(measured, reverse=True)
    assert measured[-1] < measured[0] - 0.01


def test_ratios_are_measured_against_the_policy_that_sampled(tmp_path: Path) -> None:
    model = make_generator()
    loss = make_loss(tmp_path, model, ppo_clip=0.2)
    fake, real, advantages = make_batch()
    with torch.no_grad():
        first = loss(model, 0.0, fake, real, advantages)
        assert "policy_ratio_max" not in loss._metrics
        shifted = first.log_probabilities - torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5])
        loss(model, 0.0, fake, real, advantages, shifted)
    ratios = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5]).exp()
    assert loss._metrics["policy_ratio_max"] == pytest.approx([ratios.max().item()])
    assert loss._metrics["clip_fraction"] == pytest.approx([3 / 5])
    assert loss._metrics["approx_kl"] == pytest.approx([(ratios - 1 - ratios.log()).mean().item()], rel=1e-4)


def test_the_coefficient_follows_the_divergence_only_towards_a_target(tmp_path: Path) -> None:
    model = make_generator()
    fixed, adaptive = (make_loss(tmp_path, model, kl_coef=0.5, kl_target=target) for target in (None, 0.1))
    for loss in (fixed, adaptive):
        loss.adapt(1.0)
        loss.adapt(0.0)
    assert fixed.kl_coef == 0.5
    assert adaptive.kl_coef == pytest.approx(0.5 * 1.02 * 0.98)
    assert adaptive._metrics["kl_coef"] == pytest.approx([0.5, 0.51])
    assert adaptive._metrics["kl"] == [1.0, 0.0]
