"""Classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545): can a fresh classifier tell two sets apart?

The discriminator of an adversarial run was trained against that very generator, which has learned to please it. So a
new classifier is trained here, on some of the sequences, and judged on the others. If both sets are of one kind, no
classifier is right more often than by chance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, lgamma, log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from midimamba.evaluation.distances import Estimate, mean_estimate
from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.sampling import inference

Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]
# Takes the indices and labels to learn from and the indices to judge; returns whether each of these is called real.
Classifier = Callable[[Indices, Matrix, Indices], NDArray[np.bool_]]

FOLDS = 5
_EPOCHS, _BATCH, _LEARNING_RATE = 12, 16, 2e-3
_WIDTHS, _FILTERS = (1, 2, 3, 4, 6, 8), 32
_RIDGE = 3.0


@dataclass(frozen=True)
class TwoSampleTest:
    """
    Args:
        accuracy (`Estimate`): of a classifier on sequences it was not trained on; 0.5 if it can tell nothing.
        p_value (`float`): how likely it would be at least so often right by chance alone (exact binomial test). The
            classifiers of the folds share training sequences, so it is an approximation.
    """

    accuracy: Estimate
    p_value: float


def token_test(real: Tensor, samples: Tensor, vocab_size: int, seed: int = 0) -> TwoSampleTest:
    """
    Tell token sequences apart by small convolutions, new ones for every fold.

    Args:
        real (`LongTensor` of shape `(n, time)`): real music, one sequence a piece.
        samples (`LongTensor` of shape `(m, time)`): generated music, likewise. The larger set is cut to the smaller.
        vocab_size (`int`): number of token ids.
        seed (`int`, *optional*, defaults to 0): of folds and classifiers; the global random state is left as it was.

    Raises:
        ValueError: if the sequences differ in length, or a set has fewer than 5.
    """
    if real.shape[1] != samples.shape[1]:
        raise ValueError(f"sequences of {real.shape[1]} and {samples.shape[1]} tokens give themselves away")
    count = min(len(real), len(samples))
    sequences = torch.cat([real[:count], samples[:count]])

    def classify(learned: Indices, labels: Matrix, judged: Indices) -> NDArray[np.bool_]:
        return _convolutions(sequences[learned], torch.from_numpy(labels).float(), sequences[judged], vocab_size)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _cross_validate(classify, count, seed, "two-sample test, tokens")


def feature_test(real: Matrix, samples: Matrix, seed: int = 0) -> TwoSampleTest:
    """
    Tell points apart by logistic regression with a ridge penalty.

    Args:
        real (`array` of shape `(n, d)`): pieces as [`~midimamba.evaluation.frechet.embed`] returns them.
        samples (`array` of shape `(m, d)`): likewise. The larger set is cut to the smaller.
        seed (`int`, *optional*, defaults to 0): of the folds.

    Raises:
        ValueError: if a set has fewer than 5 points.
    """
    count = min(len(real), len(samples))
    points = np.concatenate([real[:count], samples[:count]])
    points = np.concatenate([points, np.ones((2 * count, 1))], axis=1)

    def classify(learned: Indices, labels: Matrix, judged: Indices) -> NDArray[np.bool_]:
        return points[judged] @ _logistic_regression(points[learned], labels) > 0

    return _cross_validate(classify, count, seed, "two-sample test, features")


def binomial_p_value(right: int, total: int) -> float:
    """The probability of at least `right` heads in `total` throws of a fair coin."""
    logs = [lgamma(total + 1) - lgamma(k + 1) - lgamma(total - k + 1) for k in range(right, total + 1)]
    return min(1.0, sum(exp(value - total * log(2)) for value in logs))


def _cross_validate(classify: Classifier, count: int, seed: int, description: str) -> TwoSampleTest:
    """Judge every sequence of two sets of `count`, real ones first, by a classifier that has not seen it."""
    if count < FOLDS:
        raise ValueError(f"{count} sequences a set are too few for {FOLDS} folds")
    labels = np.repeat([1.0, 0.0], count)
    # As many of both sets in every fold: otherwise what is rare in training is common in judging.
    order = np.random.default_rng(seed).permutation(count)
    folds = [np.concatenate([part, part + count]) for part in np.array_split(order, FOLDS)]
    right = np.zeros(2 * count)
    for judged in tqdm(folds, desc=description, leave=False, disable=None):
        learned = np.setdiff1d(np.arange(2 * count), judged)
        right[judged] = classify(learned, labels[learned], judged) == labels[judged].astype(bool)
    return TwoSampleTest(mean_estimate(right, seed), binomial_p_value(int(right.sum()), 2 * count))


def _convolutions(sequences: Tensor, labels: Tensor, judged: Tensor, vocab_size: int) -> NDArray[np.bool_]:
    config = MidiDiscriminatorConfig(
        kind="cnn",
        vocab_size=vocab_size,
        hidden_size=32,
        filter_sizes=list(_WIDTHS),
        num_filters=[_FILTERS] * len(_WIDTHS),
    )
    model = MidiDiscriminator(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.1)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(sequences)).split(_BATCH):
            optimizer.zero_grad()
            model(input_ids=sequences[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
    with inference(model):
        called = torch.cat([model(input_ids=rows).logits[:, 0] > 0 for rows in judged.split(_BATCH)])
    return called.numpy()


def _logistic_regression(points: Matrix, labels: Matrix) -> Matrix:
    """Weights `(d,)` by Newton's method; the last column, the constant, is not penalised."""
    penalty = np.full(points.shape[1], _RIDGE)
    penalty[-1] = 1e-6
    weights = np.zeros(points.shape[1])
    for _ in range(15):
        chances = 1 / (1 + np.exp(-np.clip(points @ weights, -30, 30)))
        gradient = points.T @ (chances - labels) + penalty * weights
        hessian = (points * (chances * (1 - chances))[:, None]).T @ points + np.diag(penalty)
        weights -= np.linalg.solve(hessian, gradient)
    return weights
