"""Figures with intervals: the bootstrap for means and for distances between sets, the jackknife for diversity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
# Takes, for every set, the number of times that each of its members occurs, of shape `(members,)`.
Statistic = Callable[[list[Vector]], float]


@dataclass(frozen=True)
class Estimate:
    """
    A figure and its uncertainty.

    Args:
        value (`float`): as measured.
        low, high (`float`): the bounds of its 95 % interval.
    """

    value: float
    low: float
    high: float


UNDEFINED = Estimate(np.nan, np.nan, np.nan)


def bootstrap(
    statistic: Statistic,
    sizes: Sequence[int],
    seed: int = 0,
    replicates: int = 500,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """
    A statistic with its 95 % percentile bootstrap interval (Efron 1979), minus the bootstrap's own bias.

    A resample has fewer distinct members than its set, so a distance between resamples is larger than the distance
    between the sets. Without the correction, the interval of a small distance would not contain it. The bootstrap of a
    mean has no bias.

    Args:
        statistic (`Callable`): takes, for every set, the number of times that each member occurs, and returns a
            `float`.
        sizes (`Sequence[int]`): the number of members of every set. Members are drawn with replacement, set by set.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same interval.
        replicates (`int`, *optional*, defaults to 500): the number of resamples. With 0 there is no interval.
        bounds (`tuple[float, float]`, *optional*, defaults to none): the range of the statistic. The interval is
            clipped to it.
    """
    random = np.random.default_rng(seed)
    value = statistic([np.ones(size) for size in sizes])
    if not np.isfinite(value):
        return UNDEFINED
    if not replicates:
        return Estimate(float(value), np.nan, np.nan)
    drawn = [
        statistic([np.bincount(random.integers(size, size=size), minlength=size).astype(np.float64) for size in sizes])
        for _ in range(replicates)
    ]
    low, high = np.clip(np.percentile(drawn, (2.5, 97.5)) - np.mean(drawn) + value, *bounds)
    return Estimate(float(value), float(low), float(high))


def mean_estimate(values: Sequence[float] | Vector, seed: int = 0) -> Estimate:
    """The mean of the values that are not NaN, with its bootstrap interval; NaN if there are none."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return UNDEFINED
    return bootstrap(lambda weights: float(weights[0] @ known / weights[0].sum()), [len(known)], seed)


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Estimate:
    """The sum of the numerators over the sum of the denominators, with its bootstrap interval over the pairs."""
    above, below = np.asarray(numerators), np.asarray(denominators)
    return bootstrap(lambda weights: float(weights[0] @ above / (weights[0] @ below)), [len(above)], seed)


def jackknife(statistic: Callable[[list[int]], float], size: int) -> Estimate:
    """
    A statistic with its normal 95 % jackknife interval (Tukey 1958).

    It suits measures of diversity, where a member that occurs twice in a bootstrap resample would count as a copy.

    Args:
        statistic (`Callable`): takes the indices of the members that are present, and returns a `float`.
        size (`int`): the number of members.
    """
    everyone = list(range(size))
    value = statistic(everyone)
    without = np.array([statistic(everyone[:index] + everyone[index + 1 :]) for index in everyone])
    error = float(np.sqrt((size - 1) / size * np.sum((without - without.mean()) ** 2)))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error)
