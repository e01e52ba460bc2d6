"""Temperature: the policy that samples, rolls out and is scored is one and the same, at any temperature."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midimamba.modeling.policy import as_policy
from midimamba.modeling.sampling import Sequences
from midimamba.training.generator_update import Batch
from support import make_generator
from trainer_support import LENGTH, all_valid, make_trainer

COUNT, PROMPT = 4000, 2


def tempered(model: Any, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of what follows every token, `(rows, time - 1, vocab)`, read token by token as the sampler
    does."""
    policy = as_policy(model)
    state = policy.make_state(len(ids))
    with torch.no_grad():
        logits = [policy.next_logits(ids[:, t : t + 1], state) for t in range(ids.shape[1] - 1)]
    return (torch.stack(logits, 1) / temperature).log_softmax(-1)


def assert_frequencies(drawn: Tensor, expected: Tensor) -> None:
    """Within six standard errors."""
    frequencies = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert ((frequencies - expected).abs() <= 6 * (expected * (1 - expected) / len(drawn)).sqrt() + 1e-6).all()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_samples_and_rollouts_follow_the_tempered_policy(tmp_path: Path, temperature: float) -> None:
    trainer = make_trainer(tmp_path, temperature=temperature, rollout_memory_mb=100.0)
    torch.manual_seed(0)
    prompts = torch.tensor([[3, 1]]).expand(COUNT, -1)
    drawn = trainer.sample(prompts)
    expected = tempered(trainer.generator, torch.tensor([[3, 1, 1]]), temperature)[0].exp()
    assert_frequencies(drawn[:, 2], expected[1])
    after = drawn[drawn[:, 2] == int(expected[1].argmax())]
    assert_frequencies(after[:, 3], tempered(trainer.generator, after[:1, :4], temperature)[0, 2].exp())
    # Roll-outs complete a prefix; all of one kind here.
    trainer.rollouts.num_rollouts = COUNT
    sequences = all_valid(after[:1])
    ((_, completed),) = trainer.rollouts.draw(sequences, torch.tensor([0]), torch.tensor([[3]]))
    assert torch.equal(completed.ids[:, :4], after[:1, :4].expand(COUNT, -1))
    assert_frequencies(completed.ids[:, 4], tempered(trainer.rollout_policy, after[:1, :5], temperature)[0, 3].exp())
    if temperature != 1:  # the test can tell the two policies apart
        plain = tempered(trainer.generator, torch.tensor([[3, 1, 1]]), 1.0)[0].exp()
        with pytest.raises(AssertionError):
            assert_frequencies(drawn[:, 2], plain[1])


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("mle_weight", [0.0, 0.5])
def test_the_loss_scores_samples_as_they_were_drawn_and_music_without_temperature(
    tmp_path: Path, temperature: float, mle_weight: float
) -> None:
    options: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.7, "mle_weight": mle_weight}
    trainer = make_trainer(tmp_path, temperature=temperature, generator=make_generator(), **options)
    assert trainer.reference_policy is not None
    (embeddings,) = trainer.reference_policy.get_input_embeddings().parameters()
    embeddings.mul_(1.2)  # else there is no divergence
    torch.manual_seed(1)
    ids = trainer.sample(torch.randint(3, 11, (5, PROMPT)))
    mask = trainer.ending.mask(ids, PROMPT)
    valid = mask[:, PROMPT:]
    assert not valid.all()
    real = torch.randint(3, 11, (5, LENGTH))
    advantages = torch.randn(5, LENGTH - PROMPT) * valid
    with torch.no_grad():
        terms = trainer.generator_loss(trainer.model, Batch(Sequences(ids, mask), real, advantages))
    policy = tempered(trainer.generator, ids, temperature)[:, PROMPT - 1 :]
    reference = tempered(trainer.reference_policy, ids, temperature)[:, PROMPT - 1 :]
    chosen = policy.gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
    entropy = -(policy.exp() * policy).sum(-1) * valid
    divergence = (policy.exp() * (policy - reference)).sum(-1) * valid
    music = tempered(trainer.generator, real, 1.0).gather(-1, real[:, 1:, None]).squeeze(-1)
    expected = -(chosen * advantages).sum() - 0.7 * entropy.sum() + 0.3 * divergence.sum() - mle_weight * music.sum()
    torch.testing.assert_close(terms.loss, expected / 5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.log_probabilities * valid, chosen * valid, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.measures["entropy"], entropy.sum() / valid.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.measures["kl"], divergence.sum() / valid.sum(), rtol=1e-4, atol=1e-4)


def test_a_low_temperature_makes_samples_alike(tmp_path: Path) -> None:
    """All that draws samples uses it: training, evaluation and the samples that are written."""
    trainer = make_trainer(tmp_path, temperature=1e-3, reward="constant")
    measures = trainer.evaluate()
    assert measures["eval_distinct_1"] < make_trainer(tmp_path, reward="constant").evaluate()["eval_distinct_1"]
    prompts = torch.tensor([[3, 1]]).expand(8, -1)
    assert torch.equal(trainer.sample(prompts), trainer.sample(prompts))
