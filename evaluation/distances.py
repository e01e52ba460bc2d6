"""How far apart two sets of pieces are, by the distances between their pieces (Yang & Lerch 2020).

Yang & Lerch, "On the evaluation of generative models in music", Neural Computing and Applications 32, compare the
distances *within* the reference with the distances *between* samples and reference. If a sample is like any other
piece of the reference, the two have the same density.
"""

from collections.abc import Callable

import numpy as np

from midimamba.evaluation.estimates import UNDEFINED, Estimate, Vector, bootstrap

_GRID = 512
_TINY = 1e-12


def pairwise_distances(first: Vector, second: Vector) -> Vector:
    """Euclidean distances of rows `(n, d)` to rows `(m, d)`; shape `(n, m)`."""
    total = np.zeros((len(first), len(second)))
    for a, b in zip(first.T, second.T, strict=True):
        total += (a[:, None] - b) ** 2
    return np.sqrt(total)


class DistanceDensities:
    """
    Kernel densities of two sets of distances, on one grid, for any weights of the distances.

    The kernel is Gaussian. Its width is Scott's for the wider set, and is used for both sets: where nearly all pieces
    agree, as in their meter, a single stray piece would otherwise separate two sets that are alike. Distances are put
    on a grid of 512 cells first, so that a density is a convolution.

    Args:
        first, second (`array` of shape `(n,)` and `(m,)`): the distances.
    """

    def __init__(self, first: Vector, second: Vector):
        low, high = min(first.min(), second.min()), max(first.max(), second.max())
        # Scott's rule in one dimension: n^(-1/5) standard deviations.
        width = max(values.std() * len(values) ** (-1 / 5) for values in (first, second))
        step = (high - low + 8 * width) / (_GRID - 1) or 1.0
        self._bins = [np.rint((values - low + 4 * width) / step).astype(np.int64) for values in (first, second)]
        cells = max(width / step, 1.0)  # if all distances are the same, the width is 0: use one cell
        reach = int(np.ceil(4 * cells))
        self._kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / cells) ** 2)

    def density(self, index: int, weights: Vector) -> Vector:
        """The density of the first (0) or second (1) set as shares of the grid's cells, which sum to 1."""
        histogram = np.bincount(self._bins[index], weights, minlength=_GRID)
        reach = len(self._kernel) // 2
        smooth = np.convolve(histogram, self._kernel)[reach : reach + _GRID]
        return smooth / smooth.sum()


def overlapping_area(first: Vector, second: Vector) -> float:
    """The area under both of two densities: 1 if they are the same, 0 if they have no value in common."""
    return float(np.minimum(first, second).sum())


def kl_divergence(first: Vector, second: Vector) -> float:
    """Kullback-Leibler divergence of `second` from `first`, in nats."""
    return float(np.sum(first * np.log((first + _TINY) / (second + _TINY))))


def energy_distance(samples: Vector, reference: Vector) -> float:
    """
    How far the distribution of samples is from that of a reference: about 0 if they are the same, at most 1.

    It is the energy coefficient of inhomogeneity (Székely & Rizzo, "Energy statistics", 2013), by U-statistics, so
    that few pieces give no larger figure than many. It sees a small shift of all samples, which hardly changes the
    overlapping area.

    Args:
        samples (`array` of shape `(n, d)`): a feature of every sample. Rows with NaN are left out.
        reference (`array` of shape `(m, d)`): the same feature of real music.

    Returns:
        `float`: NaN if fewer than 2 pieces of a set have the feature.
    """
    samples, reference = (rows[~np.isnan(rows).any(axis=1)] for rows in (samples, reference))
    if min(len(samples), len(reference)) < 2:
        return float("nan")
    between = 2 * float(pairwise_distances(samples, reference).mean())
    within = sum(
        float(pairwise_distances(rows, rows).sum() / (len(rows) * (len(rows) - 1))) for rows in (samples, reference)
    )
    return (between - within) / between if between else 0.0


def compare_sets(
    samples: Vector, reference: Vector, seed: int = 0, replicates: int = 200
) -> tuple[Estimate, Estimate]:
    """
    Overlapping area and KL divergence of the distances within the reference and between samples and reference.

    Args:
        samples (`array` of shape `(n, d)`): a feature of every sample. Rows with NaN are left out.
        reference (`array` of shape `(m, d)`): the same feature of real music.
        seed (`int`, *optional*, defaults to 0): for the intervals.
        replicates (`int`, *optional*, defaults to 200): resamples of both sets, piece by piece.

    Returns:
        `tuple[Estimate, Estimate]`: overlapping area and KL divergence; NaN if fewer than 3 pieces have the feature.
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
