"""What is subtracted from action values."""

from typing import Any

import torch
from torch import Tensor

from midimamba.training import credit


class Baseline:
    """
    One of the baselines of [`AdversarialConfig`]; only `running` has a state.

    Args:
        kind (`str`): `leave-one-out`, `group`, `running` or `none`.
        group_size (`int`): rows that share a prompt, for `group`.
        decay (`float`): weight of the past, for `running`.
    """

    def __init__(self, kind: str, group_size: int, decay: float):
        self.kind = kind
        self.group_size = group_size
        self.decay = decay
        self.mean: Tensor | None = None
        """`(time,)`: the running mean of action values, or `None` before the first batch."""
        self.count = 0

    def advantages(self, action_values: Tensor) -> Tensor:
        """Action values `(batch, time)` minus the baseline."""
        if self.kind == "leave-one-out":
            return credit.leave_one_out_advantages(action_values)
        if self.kind == "group":
            return credit.leave_one_out_advantages(action_values, self.group_size)
        if self.kind == "running":
            return action_values - self._follow(action_values)
        return action_values

    def _follow(self, action_values: Tensor) -> Tensor:
        """The mean of earlier batches, which knows nothing of this one and so leaves the gradient unbiased.

        The first batch has no earlier ones and is compared with itself: a constant reward moves nothing then, either.
        """
        value = credit.batch_mean(action_values)
        before = value if self.mean is None else self.mean
        self.count += 1
        self.mean = credit.running_mean(before, value, self.count, self.decay)
        return before

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON, which keeps every bit of a float32."""
        return {"count": self.count, "mean": None if self.mean is None else self.mean.tolist()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what [`~Baseline.state_dict`] returned."""
        self.count = state["count"]
        self.mean = None if state["mean"] is None else torch.tensor(state["mean"], device=device)
