"""Logistic regression with a ridge penalty, and the rank statistic that says how well it separates."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
_STEPS = 25
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
        steps (`int`, *optional*, defaults to 25): of Newton's method. It usually arrives in fewer.

    Returns:
        `array` of shape `(d,)`.
    """
    penalty = np.full(points.shape[1], ridge)
    penalty[-1] = _FLAT
    counts = np.ones(len(points)) if weights is None else weights
    found = np.zeros(points.shape[1])
    for _ in range(steps):
        chances = 1 / (1 + np.exp(-np.clip(points @ found, -_STEEPEST, _STEEPEST)))
        gradient = points.T @ (counts * (chances - labels)) + penalty * found
        hessian = (points * (counts * chances * (1 - chances))[:, None]).T @ points + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        found -= step
        if np.abs(step).max() < 1e-10:
            break
    return found


def balanced(labels: Matrix) -> Matrix:
    """Weights `(n,)` under which both labels count alike, however many there are of each, and which sum to n."""
    share = labels.mean()
    return np.where(labels > 0.5, 0.5 / share, 0.5 / (1 - share))


def auc(real: Matrix, fake: Matrix) -> float:
    """
    The area under the ROC curve: the chance that a real piece has the higher value of two; ties count half.

    Args:
        real (`array` of shape `(n,)`), fake (`array` of shape `(m,)`): values of a judge, such as log-odds.

    Raises:
        ValueError: if one of them is empty.
    """
    if not (len(real) and len(fake)):
        raise ValueError("an AUC compares two sets, and one of them is empty")
    ordered = np.sort(fake)
    below, up_to = (np.searchsorted(ordered, real, side=side) for side in ("left", "right"))  # type: ignore[call-overload]
    return float((below + up_to).sum() / (2 * len(real) * len(fake)))
