"""From action values to advantages: baseline, normalisation, clipping, over the batch of all processes.

Tensors are of shape `(batch, actions)`. The functions are pure; [`Credit`] applies them as the options say.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.metrics import Measures

MIN_EFFECTIVE_SHARE = 0.1
"""Of a round's samples: the largest weights are cut where they would rest on fewer."""
BASELINE_MEMORY = 0.9
"""Weight of the past in the running baseline: it averages about ten steps."""


class Credit:
    """
    What each action is credited with: its value minus a baseline, to unit deviation, clipped, and 0 on padding.

    Processes put their values together: baseline and deviation are those of the whole batch, however it is spread.

    Args:
        args (`AdversarialConfig`): `baseline`, `group_size`, `normalize_advantages` and `advantage_clip`.
        accelerator (`Accelerator`): gathers the values of all processes.

    Attributes:
        mean (`Tensor` of shape `(actions,)`, *optional*): the running baseline; `None` before the first batch.
        count (`int`): batches in it.
    """

    def __init__(self, args: AdversarialConfig, accelerator: Accelerator):
        self.args = args
        self.accelerator = accelerator
        self.mean: Tensor | None = None
        self.count = 0

    def __call__(self, values: Tensor, valid: Tensor) -> tuple[Tensor, Measures]:
        """
        Args:
            values (`Tensor` of shape `(batch, actions)`): Q of this process's sequences.
            valid (`BoolTensor` of shape `(batch, actions)`): `False` on padding.

        Returns:
            The advantages of this process's sequences, and measures of all.
        """
        rank = self.accelerator.process_index
        mine = slice(rank * len(values), (rank + 1) * len(values))
        values, valid = self.accelerator.gather(values), self.accelerator.gather(valid)
        advantages = self._minus_baseline(values).masked_fill(~valid, 0)
        measures = {
            "reward": values[:, -1].mean(),
            **reward_by_position(values),
            "advantage_mean": advantages[valid].mean(),
            "advantage_std": advantages[valid].std(correction=0),
        }
        if self.args.estimator == "distill":
            weights = importance_weights(values[:, -1], MIN_EFFECTIVE_SHARE)
            measures["effective_samples"] = effective_share(weights) * len(weights)
            return (weights[:, None] * valid)[mine], measures
        if self.args.normalize_advantages:
            advantages = normalize_advantages(advantages, valid)
        if self.args.advantage_clip is not None:
            limit = self.args.advantage_clip
            measures["advantage_clip_fraction"] = (advantages.abs() > limit).float().mean()
            advantages = advantages.clamp(-limit, limit)
        return advantages[mine], measures

    def _minus_baseline(self, values: Tensor) -> Tensor:
        if self.args.baseline == "leave-one-out":
            return leave_one_out_advantages(values, self.args.group_size)
        if self.args.baseline == "running":
            return values - self._running_mean(values)
        return values

    def _running_mean(self, values: Tensor) -> Tensor:
        """The mean of earlier batches, which knows nothing of this one and so leaves the gradient unbiased.

        The first batch has no earlier ones and is compared with itself, so that a constant reward moves nothing there.
        """
        value = batch_mean(values)
        before = value if self.mean is None else self.mean
        self.count += 1
        self.mean = running_mean(before, value, self.count, BASELINE_MEMORY)
        return before

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON, which keeps every bit of a float32."""
        return {"count": self.count, "mean": None if self.mean is None else self.mean.tolist()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what [`~Credit.state_dict`] returned."""
        self.count = state["count"]
        self.mean = None if state["mean"] is None else torch.tensor(state["mean"], device=device)


def effective_share(weights: Tensor) -> Tensor:
    """The effective sample size of weights `(n,)` over `n` (Kish): 1 if all are equal, 1 / n if one has it all."""
    share: Tensor = weights.sum().square() / (weights.square().sum() * len(weights))
    return share


def importance_weights(log_odds: Tensor, least: float) -> Tensor:
    """
    Weights `exp(min(log_odds, cap))` of mean 1, with the highest cap at which their effective share is `least`.

    That is truncated importance sampling (Ionides 2008): the few samples that a discriminator likes beyond measure
    count less, and all others as they should. Equal log-odds give weights of exactly 1.

    Args:
        log_odds (`Tensor` of shape `(n,)`): of samples.
        least (`float`): in [0, 1].
    """
    centred = (log_odds - log_odds.max()).double()

    def weights(cap: float) -> Tensor:
        capped = (centred.clamp(max=cap) - cap).exp()
        return capped / capped.mean()

    low, high = float(centred.min()), 0.0
    if effective_share(weights(high)) < least:
        for _ in range(60):  # the effective share falls as the cap rises
            middle = (low + high) / 2
            low, high = (low, middle) if effective_share(weights(middle)) < least else (middle, high)
        high = low
    return weights(high).to(log_odds.dtype)


def systematic_resampling(weights: Tensor, count: int) -> Tensor:
    """
    Draw some of the samples, each as often as its weight says, up to rounding that is right on average.

    A single random number decides about all (Kitagawa 1996), so that as many as there are, of equal weights, are every
    sample exactly once.

    Args:
        weights (`Tensor` of shape `(n,)`): at least 0, and not all 0.
        count (`int`): how many are drawn.

    Returns:
        `LongTensor` of shape `(count,)`: indices of samples, in order.
    """
    borders = weights.double().cumsum(0) * (count / weights.double().sum())
    places = torch.arange(count, device=weights.device) + torch.rand(1, dtype=borders.dtype).to(weights.device)
    return torch.searchsorted(borders, places, right=True).clamp(max=len(weights) - 1)


def reward_by_position(values: Tensor) -> Measures:
    """The mean action value `(batch, actions)` at a quarter, a half, three quarters and the end of the actions."""
    last = values.shape[1] - 1
    return {f"reward_at_{part}": values[:, round(last * part / 100)].mean() for part in (25, 50, 75, 100)}


def leave_one_out_advantages(action_values: Tensor, group_size: int | None = None) -> Tensor:
    """Action values minus the mean of the *other* sequences at the same time, which leaves the gradient unbiased.

    Equal values give advantages that are exactly zero, not merely small: Adam would turn rounding into full steps.

    Args:
        action_values (`Tensor` of shape `(batch, time)`): Q.
        group_size (`int`, *optional*): the others are those of a group of this many consecutive rows, as in GRPO
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
