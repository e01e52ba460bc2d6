"""From rewards to advantages: pure functions on tensors of shape `(batch, time)`.

Notation of SeqGAN (arXiv 1609.05473): Q is the action value of equation 4, the gradient is that of equation 6.
"""

import torch
from torch import Tensor


def discounted_returns(rewards: Tensor, discount: float) -> Tensor:
    """`R_t = sum over k >= t of discount^(k - t) r_k`: what is still to come, from rewards `(batch, time)`."""
    returns = torch.empty_like(rewards)
    total = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + discount * total
        returns[:, t] = total
    return returns


def interpolate_values(values: Tensor, positions: Tensor, length: int) -> Tensor:
    """Action values at every time from those at a few.

    Args:
        values (`Tensor` of shape `(batch, K)`): action values at `positions`.
        positions (`LongTensor` of shape `(K,)`): increasing; the last is `length - 1`, whose value is the reward.
        length (`int`): number of actions.

    Returns:
        `Tensor` of shape `(batch, length)`: linear between two valued positions, constant before the first.
    """
    times = torch.arange(length, device=values.device)
    right = torch.searchsorted(positions, times)
    left = (right - 1).clamp(min=0)
    gap = (positions[right] - positions[left]).clamp(min=1)
    weight = ((times - positions[left]) / gap).clamp(0, 1).to(values.dtype)
    return torch.lerp(values[:, left], values[:, right], weight)


def leave_one_out_advantages(action_values: Tensor) -> Tensor:
    """Action values minus the mean of the *other* sequences at the same time, which leaves the gradient unbiased.

    Equal values give advantages that are exactly zero, not merely small: Adam would turn rounding into full steps.

    Raises:
        ValueError: for a batch of one, which has no others.
    """
    batch = action_values.shape[0]
    if batch < 2:
        raise ValueError("a leave-one-out baseline needs at least two sequences a batch")
    shifted = action_values - action_values[:1]
    return (shifted - shifted.mean(0)) * (batch / (batch - 1))


def normalize_advantages(advantages: Tensor) -> Tensor:
    """Advantages of unit standard deviation over the batch; all zeros stay zeros."""
    return advantages / (advantages.std(correction=0) + 1e-8)


def reinforce_loss(log_probabilities: Tensor, advantages: Tensor) -> Tensor:
    """The negative of the objective whose gradient is SeqGAN's equation 6.

    Args:
        log_probabilities (`Tensor` of shape `(batch, time)`): of the sampled actions, with a graph.
        advantages (`Tensor` of shape `(batch, time)`): constants.

    Returns:
        The sum over time, averaged over the batch, as a scalar.
    """
    return -(log_probabilities * advantages.detach()).sum(1).mean()
