"""Fréchet distance between sets of pieces, on the musical features as the embedding.

The embedding of a piece consists of the numbers of [`~midimamba.evaluation.features.NUMBERS`], standardised by the
reference. It needs no network and no download, it is the same for every model, and its meaning is known. It
measures nothing else: two sets may be at distance 0 and still differ in what no feature measures.

The distance between two small sets of the same music is not 0. It grows with the number of dimensions over the number
of pieces, because covariances are estimated without shrinkage. So compare only sets of equal size, and read the
distance beside that of real music to itself.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from midimamba.evaluation.estimates import Estimate, bootstrap
from midimamba.evaluation.features import NUMBERS

Matrix = NDArray[np.float64]

_FAR = 5.0  # standard deviations


def embed(features: Mapping[str, Matrix], reference: Mapping[str, Matrix], names: Iterable[str] = NUMBERS) -> Matrix:
    """
    Features as points whose unit is a standard deviation of the reference.

    A number that a piece does not have is set to the mean of the reference, and an extra column says that it is
    missing, so that missing numbers do not bring sets closer. A column that does not vary in the reference keeps its
    own unit. Numbers are clipped at 5 standard deviations: one stray piece must not outweigh all others.

    Args:
        features (`Mapping[str, array]`): as [`~midimamba.evaluation.features.measure`] returns them.
        reference (`Mapping[str, array]`): the same features of real music.
        names (`Iterable[str]`, *optional*): the numbers to use; all of them by default.

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

    The trace of the root is the sum of the square roots of the eigenvalues of the symmetric matrix Σ₁^½ Σ₂ Σ₁^½.
    Everything is computed in float64.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other_covariance @ root), 0)).sum()
    distance = np.sum((mean - other_mean) ** 2) + np.trace(covariance) + np.trace(other_covariance) - 2 * shared
    return float(max(distance, 0.0))


def frechet_distance(samples: Matrix, reference: Matrix, seed: int = 0, replicates: int = 200) -> Estimate:
    """
    Squared Fréchet distance between two sets of points, each treated as a Gaussian.

    Args:
        samples (`array` of shape `(n, d)`): as [`embed`] returns them.
        reference (`array` of shape `(m, d)`): the same for real music.
        seed (`int`, *optional*, defaults to 0): for the interval.
        replicates (`int`, *optional*, defaults to 200): the number of resamples of both sets.

    Raises:
        ValueError: if one of the sets has fewer than 2 points.
    """
    if min(len(samples), len(reference)) < 2:
        raise ValueError("a Fréchet distance needs sets of at least two points")

    def distance(weights: list[Matrix]) -> float:
        return gaussian_frechet(*_moments(samples, weights[0]), *_moments(reference, weights[1]))

    return bootstrap(distance, [len(samples), len(reference)], seed, replicates, (0.0, np.inf))


def _moments(points: Matrix, weights: Matrix) -> tuple[Matrix, Matrix]:
    """Mean `(d,)` and unbiased covariance `(d, d)` of weighted points."""
    total = weights.sum()
    mean = weights @ points / total
    centred = points - mean
    return mean, (centred * weights[:, None]).T @ centred / (total - 1)
