"""Terms of the generator's loss: pure functions of log-probabilities.

Notation of SeqGAN (arXiv 1609.05473): the policy gradient is that of equation 6.
"""

import torch
from torch import Tensor


def reinforce_loss(log_probabilities: Tensor, advantages: Tensor) -> Tensor:
    """The negative of the objective whose gradient is SeqGAN's equation 6.

    Args:
        log_probabilities (`Tensor` of shape `(batch, time)`): of the sampled actions, with a graph.
        advantages (`Tensor` of shape `(batch, time)`): constants.

    Returns:
        The sum over time, averaged over the batch, as a scalar.
    """
    return -(log_probabilities * advantages.detach()).sum(1).mean()


def clipped_policy_loss(log_probabilities: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), negative.

    Where the policy is still the one that sampled, the ratio is 1 and the gradient is that of [`reinforce_loss`].

    Args:
        log_probabilities (`Tensor` of shape `(batch, time)`): of the sampled actions, with a graph.
        old (`Tensor` of shape `(batch, time)`): the same under the policy that sampled them, a constant.
        advantages (`Tensor` of shape `(batch, time)`): constants.
        clip (`float`): a ratio beyond `1 ± clip` earns nothing more.

    Returns:
        The sum over time, averaged over the batch, as a scalar.
    """
    ratio = (log_probabilities - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -surrogate.sum(1).mean()


def kl_divergence(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """`KL(p || q)` over the whole vocabulary, `(…,)`, from normalised log-probabilities `(…, vocab)` of p and q."""
    return (log_probabilities.exp() * (log_probabilities - reference)).sum(-1)


def entropy(log_probabilities: Tensor) -> Tensor:
    """The entropy in nats, `(…,)`, of distributions with normalised log-probabilities `(…, vocab)`."""
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def adapted_kl_coef(coefficient: float, divergence: float, target: float) -> float:
    """The controller of Ziegler et al. (arXiv 1909.08593, section 2.2): 10 % of the relative error, cut at ±20 %."""
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return coefficient * (1 + 0.1 * error)
