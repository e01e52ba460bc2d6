"""Fréchet distance between sets of pieces, on the musical features as the embedding.

The embedding of a piece is the numbers of [`~midimamba.evaluation.features.NUMBERS`], standardised by the reference.
It needs no network and no download, it is the same for every model, and one knows what it hears. It hears nothing
else: two sets may be at distance 0 and differ in what no feature measures.

The distance of two small sets of the same music is not 0 but grows with dimensions by pieces: covariances are
estimated from as many pieces as there are, without shrinkage. So compare only sets of equal size, and read it beside
that of real music to itself.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from midimamba.evaluation.distances import Estimate, bootstrap
from midimamba.evaluation.features import NUMBERS

Matrix = NDArray[np.float64]

_FAR = 5.0  # standard deviations


def embed(features: Mapping[str, Matrix], reference: Mapping[str, Matrix], names: Iterable[str] = NUMBERS) -> Matrix:
    """
    Features as points in which 1 is a standard deviation of the reference.

    A number that a piece does not have is put at the reference's mean, and a column more says that it is missing, so
    that missing numbers are no way to be near. A column that does not vary in the reference keeps its own unit. Beyond
    5 standard deviations a number is put at 5: one stray piece must not outweigh all others.

    Args:
        features (`Mapping[str, array]`): what [`~midimamba.evaluation.features.measure`] returned.
        reference (`Mapping[str, array]`): the same of real music.
        names (`Iterable[str]`, *optional*): of the numbers; all of them by default.

    Returns:
        `array` of shape `(pieces, dimensions)`, in the same space for the same reference.
    """
    columns = []
    for name in names:
        real, values = reference[name][:, 0], features[name][:, 0]
        known = real[~np.isnan(real)]
        centre = known.mean() if len(known) else 0.0
        scale = known.std() if len(known) and known.std() > 1e-9 else 1.0
        missing = np.isnan(values)
        columns += [np.where(missing, 0.0, (values - centre) / scale).clip(-_FAR, _FAR), missing.astype(np.float64)]
    return np.stack(columns, axis=1)


def gaussian_frechet(mean: Matrix, covariance: Matrix, other_mean: Matrix, other_covariance: Matrix) -> float:
    """
    Squared Fréchet distance of two Gaussians (Dowson & Landau 1982): |μ₁-μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½).

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½. All in float64.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other_covariance @ root), 0)).sum()
    distance = np.sum((mean - other_mean) ** 2) + np.trace(covariance) + np.trace(other_covariance) - 2 * shared
    return float(max(distance, 0.0))


def frechet_distance(samples: Matrix, reference: Matrix, seed: int = 0, replicates: int = 200) -> Estimate:
    """
    Squared Fréchet distance of two sets of points, each taken for a Gaussian.

    Args:
        samples (`array` of shape `(n, d)`): from [`embed`].
        reference (`array` of shape `(m, d)`): likewise.
        seed (`int`, *optional*, defaults to 0): of the interval.
        replicates (`int`, *optional*, defaults to 200): resamples of both sets.

    Raises:
        ValueError: if one of them has fewer than 2 points.
    """
    if min(len(samples), len(reference)) < 2:
        raise ValueError("a Fréchet distance compares sets of at least two points")

    def distance(weights: list[Matrix]) -> float:
        return gaussian_frechet(*_moments(samples, weights[0]), *_moments(reference, weights[1]))

    return bootstrap(distance, [len(samples), len(reference)], seed, replicates, (0.0, np.inf))


def _moments(points: Matrix, weights: Matrix) -> tuple[Matrix, Matrix]:
    """Mean `(d,)` and unbiased covariance `(d, d)` of weighted points."""
    total = weights.sum()
    mean = weights @ points / total
    centred = points - mean
    return mean, (centred * weights[:, None]).T @ centred / (total - 1)
