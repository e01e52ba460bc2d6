"""How far apart two sets of pieces are, by pairwise distances (Yang & Lerch 2020), and how sure a figure is.

Yang & Lerch, "On the evaluation of generative models in music", Neural Computing and Applications 32, compare the
distances *within* the reference to those *between* samples and reference: where the samples are like any other piece
of the reference, the two have the same density.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
# Takes for every set how often each of its members is there, of shape `(members,)`.
Statistic = Callable[[list[Vector]], float]

_GRID = 512
_TINY = 1e-12


@dataclass(frozen=True)
class Estimate:
    """
    A figure and how sure it is.

    Args:
        value (`float`): as measured.
        low, high (`float`): its interval of 95 %.
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
    A statistic with its percentile bootstrap interval of 95 % (Efron 1979), less the bootstrap's own bias.

    A resample has fewer different members, so that whatever compares sets finds resamples further apart than the sets
    are: without the correction, the interval of a small distance would not contain it. That of a mean has no bias.

    Args:
        statistic (`Callable`): takes, for every set, how often each of its members is there, and returns a `float`.
        sizes (`Sequence[int]`): members of every set. Members are drawn with replacement, set by set.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same interval.
        replicates (`int`, *optional*, defaults to 500): resamples; with none there is no interval.
        bounds (`tuple[float, float]`, *optional*, defaults to none): what the statistic can be; cuts the interval.
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


def ratio_estimate(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Estimate:
    """The sum of `above` by the sum of `below`, with its bootstrap interval over the pairs."""
    numerator, denominator = np.asarray(above), np.asarray(below)
    return bootstrap(lambda weights: float(weights[0] @ numerator / (weights[0] @ denominator)), [len(above)], seed)


def jackknife(statistic: Callable[[list[int]], float], size: int) -> Estimate:
    """
    A statistic with its normal jackknife interval of 95 % (Tukey 1958), for figures in which a member that is there
    twice, as in a bootstrap, would count as a copy.

    Args:
        statistic (`Callable`): takes the indices of the members that are there, and returns a `float`.
        size (`int`): members.
    """
    everyone = list(range(size))
    value = statistic(everyone)
    without = np.array([statistic(everyone[:index] + everyone[index + 1 :]) for index in everyone])
    error = float(np.sqrt((size - 1) / size * np.sum((without - without.mean()) ** 2)))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error)


def pairwise_distances(first: Vector, second: Vector) -> Vector:
    """Euclidean distances of rows `(n, d)` to rows `(m, d)`; shape `(n, m)`."""
    total = np.zeros((len(first), len(second)))
    for a, b in zip(first.T, second.T, strict=True):
        total += (a[:, None] - b) ** 2
    return np.sqrt(total)


class DistanceDensities:
    """
    Kernel densities of two sets of distances, on one grid, for any weights of the distances.

    The kernel is Gaussian. Its width is Scott's for the wider set, and the same for both: where nearly all pieces
    agree, as in their meter, a single stray piece would otherwise make strangers of two sets that are alike. Distances
    are put on a grid of 512 first, which makes a density a convolution.

    Args:
        first, second (`array` of shape `(n,)` and `(m,)`): the distances.
    """

    def __init__(self, first: Vector, second: Vector):
        low, high = min(first.min(), second.min()), max(first.max(), second.max())
        # Scott's rule in one dimension: n^(-1/5) standard deviations.
        width = max(values.std() * len(values) ** (-1 / 5) for values in (first, second))
        step = (high - low + 8 * width) / (_GRID - 1) or 1.0
        self._bins = [np.rint((values - low + 4 * width) / step).astype(np.int64) for values in (first, second)]
        cells = max(width / step, 1.0)  # where all distances are the same there is no width: one cell
        reach = int(np.ceil(4 * cells))
        self._kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / cells) ** 2)

    def density(self, index: int, weights: Vector) -> Vector:
        """The density of the first (0) or second (1) set as shares of the grid's cells, which sum to 1."""
        histogram = np.bincount(self._bins[index], weights, minlength=_GRID)
        reach = len(self._kernel) // 2
        smooth = np.convolve(histogram, self._kernel)[reach : reach + _GRID]
        return smooth / smooth.sum()


def overlapping_area(first: Vector, second: Vector) -> float:
    """The area under both of two densities: 1 if they are the same, 0 if nothing is possible under both."""
    return float(np.minimum(first, second).sum())


def kl_divergence(first: Vector, second: Vector) -> float:
    """Kullback-Leibler divergence of `second` from `first`, in nats."""
    return float(np.sum(first * np.log((first + _TINY) / (second + _TINY))))


def compare_sets(
    samples: Vector, reference: Vector, seed: int = 0, replicates: int = 200
) -> tuple[Estimate, Estimate]:
    """
    Overlapping area and KL divergence of the distances within the reference and between samples and reference.

    Args:
        samples (`array` of shape `(n, d)`): a feature of every sample. Rows with NaN are left out.
        reference (`array` of shape `(m, d)`): the same of real music.
        seed (`int`, *optional*, defaults to 0): of the intervals.
        replicates (`int`, *optional*, defaults to 200): resamples of both sets, piece by piece.

    Returns:
        `tuple[Estimate, Estimate]`: overlapping area, KL divergence; NaN if fewer than 3 pieces have the feature.
    """
    samples = samples[~np.isnan(samples).any(axis=1)]
    reference = reference[~np.isnan(reference).any(axis=1)]
    if min(len(samples), len(reference)) < 3:
        return UNDEFINED, UNDEFINED
    others = ~np.eye(len(reference), dtype=bool)  # a piece is not compared with itself, nor with its own copies
    densities = DistanceDensities(
        pairwise_distances(reference, reference)[others], pairwise_distances(samples, reference).ravel()
    )

    def densities_of(weights: list[Vector]) -> tuple[Vector, Vector]:
        within = np.outer(weights[1], weights[1])[others]
        return densities.density(0, within), densities.density(1, np.outer(weights[0], weights[1]).ravel())

    sizes = [len(samples), len(reference)]

    def estimate(measure: Callable[[Vector, Vector], float], highest: float) -> Estimate:
        return bootstrap(lambda weights: measure(*densities_of(weights)), sizes, seed, replicates, (0.0, highest))

    return estimate(overlapping_area, 1.0), estimate(kl_divergence, np.inf)
