"""Importance resampling: of several draws keep some, so that what is kept is closer to real music than the draws are.

A judge's log-odds L say how much likelier a draw is as real music than as a sample. Draws that are weighted by exp(L)
are distributed as real music, as far as the judge is right (Azadi et al., arXiv 1810.06758, and Grover et al.,
arXiv 1906.09531).
"""

import logging
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def check_pick(pick: str) -> None:
    """Raise a `ValueError` if there is no such way to choose."""
    if pick not in ("resample", "best"):
        raise ValueError(f"pick is {pick!r}; use 'resample' or 'best'")


def choose(log_odds: Tensor, pick: str = "resample", seed: int | None = None) -> Tensor:
    """
    Choose one of every group of draws.

    Args:
        log_odds (`Tensor` of shape `(groups, draws)`): of a judge.
        pick (`str`, *optional*, defaults to `"resample"`): with probability proportional to exp(log-odds); `"best"`:
            the draw with the highest.
        seed (`int`, *optional*): decides what is drawn; by default torch's random state does.

    Returns:
        `LongTensor` of shape `(groups,)`: indices into the draws of each group.

    Raises:
        ValueError: if log-odds are NaN or infinite, or `pick` is neither. An impossible draw may have minus infinity.
    """
    check_pick(pick)
    log_odds = log_odds.detach().double().cpu()
    if not log_odds.softmax(dim=1).isfinite().all():
        raise ValueError(
            "the log-odds of a draw are not finite: the discriminator's weights are damaged or have diverged"
        )
    if pick == "best":
        _say_once(
            "the best of each group of draws tends to please the discriminator rather than the ear: pick 'resample' "
            "chooses in proportion to the odds"
        )
        return log_odds.argmax(dim=1)
    random = None if seed is None else torch.Generator().manual_seed(_other(seed))
    return torch.multinomial(log_odds.softmax(dim=1), 1, generator=random)[:, 0]


def effective_sample_size(log_odds: Tensor) -> Tensor:
    """
    Kish's effective sample size of weights exp(L), (Σw)² / Σw²: how many equally weighted draws are worth as much.

    Args:
        log_odds (`Tensor` of shape `(..., draws)`): of a judge.

    Returns:
        `Tensor` of shape `(...)`: between 1, if one draw has all the weight, and the number of draws.
    """
    weights = log_odds.double().softmax(dim=-1)
    return 1 / weights.square().sum(dim=-1)


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _other(seed: int) -> int:
    """Another seed, so that what is chosen does not depend on the numbers that drew it."""
    return (seed * 6364136223846793005 + 1442695040888963407) % 2**63


__all__ = ["check_pick", "choose", "effective_sample_size"]
