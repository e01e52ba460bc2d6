"""Logistic regression with a ridge penalty."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
_STEPS = 25
_HALVINGS = 10
_FLAT = 1e-6  # of the constant, which is not penalised; this keeps the equations solvable
_STEEPEST = 30.0  # log-odds beyond which a chance is 0 or 1


def logistic_regression(
    points: Matrix, labels: Matrix, ridge: float, weights: Matrix | None = None, steps: int = _STEPS
) -> Matrix:
    """
    Weights by Newton's method.

    Args:
        points (`array` of shape `(n, d)`): the last column is the constant.
        labels (`array` of shape `(n,)`): 1 or 0, or chances between.
        ridge (`float`): half of it times the squared weights, without that of the constant, is added to the loss.
        weights (`array` of shape `(n,)`, *optional*): how much every point counts; 1 by default.
        steps (`int`, *optional*, defaults to 25): of Newton's method, at most.

    Returns:
        `array` of shape `(d,)`.
    """
    penalty = np.full(points.shape[1], ridge)
    penalty[-1] = _FLAT
    counts = np.ones(len(points)) if weights is None else weights

    def loss(candidate: Matrix) -> float:
        log_odds = points @ candidate
        entropies = np.logaddexp(0, log_odds) - labels * log_odds
        return float(counts @ entropies + 0.5 * penalty @ candidate**2)

    found = np.zeros(points.shape[1])
    lowest = loss(found)
    for _ in range(steps):
        chances = 1 / (1 + np.exp(-np.clip(points @ found, -_STEEPEST, _STEEPEST)))
        gradient = points.T @ (counts * (chances - labels)) + penalty * found
        hessian = (points * (counts * chances * (1 - chances))[:, None]).T @ points + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        # Where almost all points are far from the border, a whole step of Newton's method goes too far.
        reached = ((found - step / 2**halved) for halved in range(_HALVINGS))
        better = next(((point, loss(point)) for point in reached if loss(point) < lowest), None)
        if better is None:
            break
        found, lowest = better
    return found


def with_constant(columns: Matrix) -> Matrix:
    """Columns `(n, d)` with a last one of ones, as [`logistic_regression`] takes them."""
    return np.concatenate([columns, np.ones((len(columns), 1))], axis=1)


def balanced(labels: Matrix) -> Matrix:
    """Weights `(n,)` under which both labels count alike, however many there are of each, and which sum to n."""
    share = labels.mean()
    return np.where(labels > 0.5, 0.5 / share, 0.5 / (1 - share))
