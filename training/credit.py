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


def interpolate_rows(values: Tensor, positions: Tensor, length: int) -> Tensor:
    """Action values at every time from those at a few, which are others in each row.

    Args:
        values (`Tensor` of shape `(batch, K)`): action values at `positions`.
        positions (`LongTensor` of shape `(batch, K)`): increasing in each row; the last is `length - 1`, whose value
            is the reward.
        length (`int`): number of actions.

    Returns:
        `Tensor` of shape `(batch, length)`: linear between two valued positions, constant before the first.
    """
    times = torch.arange(length, device=values.device).expand(len(values), -1).contiguous()
    right = torch.searchsorted(positions.contiguous(), times)
    left = (right - 1).clamp(min=0)
    before, after = positions.gather(1, left), positions.gather(1, right)
    weight = ((times - before) / (after - before).clamp(min=1)).clamp(0, 1).to(values.dtype)
    return torch.lerp(values.gather(1, left), values.gather(1, right), weight)


def leave_one_out_advantages(action_values: Tensor, group_size: int | None = None) -> Tensor:
    """Action values minus the mean of the *other* sequences at the same time, which leaves the gradient unbiased.

    Equal values give advantages that are exactly zero, not merely small: Adam would turn rounding into full steps.

    Args:
        action_values (`Tensor` of shape `(batch, time)`): Q.
        group_size (`int`, *optional*): the others are those of a group of so many consecutive rows, as in GRPO
            (arXiv 2402.03300); by default all rows are one group.

    Raises:
        ValueError: for a group of one, which has no others.
    """
    size = group_size or action_values.shape[0]
    if size < 2:
        raise ValueError("a leave-one-out baseline needs at least two sequences a batch")
    groups = action_values.unflatten(0, (-1, size))
    shifted = groups - groups[:, :1]
    return ((shifted - shifted.mean(1, keepdim=True)) * (size / (size - 1))).flatten(0, 1)


def batch_mean(values: Tensor) -> Tensor:
    """The mean over the batch, `(time,)`. Of equal values it is that value exactly, without rounding."""
    return values[0] + (values - values[:1]).mean(0)


def running_mean(mean: Tensor, value: Tensor, count: int, decay: float) -> Tensor:
    """The exponential moving average of `count` values, the newest being `value`, without a bias to its start.

    With `m <- decay m + (1 - decay) value` from zero, this is Adam's corrected `m / (1 - decay^count)`
    (arXiv 1412.6980, section 3), written as a step from the former mean: the first mean is the first value, and the
    mean of equal values is that value exactly.

    Args:
        mean (`Tensor`): the average of the `count - 1` values before; is not read for a count of 1.
        value (`Tensor`): the newest value.
        count (`int`): at least 1.
        decay (`float`): in `[0, 1)`; the weight of the past.
    """
    if count == 1:
        return value
    return mean + (value - mean) * ((1 - decay) / (1 - decay**count))


def normalize_advantages(advantages: Tensor, valid: Tensor | None = None) -> Tensor:
    """Advantages of unit standard deviation over the batch, or its `valid` actions; all zeros stay zeros."""
    counted = advantages if valid is None else advantages[valid]
    return advantages / (counted.std(correction=0) + 1e-8)


def importance_weights(log_probabilities: Tensor, behaviour: Tensor, clip: float) -> Tensor:
    """How much likelier actions are under the policy than under the behaviour policy that drew them, at most `clip`.

    One weight a token, as in ColdGANs (arXiv 2006.04643): the product over a sequence would be exact, and useless, for
    its variance grows exponentially with the length. The clip bounds the variance at the price of a bias.

    Args:
        log_probabilities (`Tensor` of shape `(batch, time)`): of the actions under the policy.
        behaviour (`Tensor` of shape `(batch, time)`): the same under the behaviour policy.
        clip (`float`): the largest weight.
    """
    return (log_probabilities - behaviour).exp().clamp(max=clip)


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
