"""Classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545): can a fresh classifier tell two sets apart?

The discriminator of an adversarial run was trained against that very generator, which has learned to please it. So a
new classifier is trained here on some of the sequences and tested on the others. If both sets are of the same kind, no
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

from midimamba.evaluation.estimates import Estimate, mean_estimate
from midimamba.evaluation.logistic import Matrix, logistic_regression, with_constant
from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.scoring import score

Indices = NDArray[np.int64]
# Takes the indices and labels to train on and the indices to test on; returns which of the latter are judged real.
Classifier = Callable[[Indices, Matrix, Indices], NDArray[np.bool_]]

FOLDS = 5
_EPOCHS, _BATCH, _LEARNING_RATE = 12, 16, 2e-3
_WIDTHS, _FILTERS = (1, 2, 3, 4, 6, 8), 32
_RIDGE = 3.0


@dataclass(frozen=True)
class TwoSampleTest:
    """
    Args:
        accuracy (`Estimate`): of a classifier on sequences that it was not trained on; 0.5 if it finds no difference.
        p_value (`float`): the probability of being right at least as often by chance alone (exact binomial test). The
            classifiers of the folds share training sequences, so it is an approximation.
    """

    accuracy: Estimate
    p_value: float


def token_test(real: Tensor, samples: Tensor, vocab_size: int, seed: int = 0) -> TwoSampleTest:
    """
    Tell token sequences apart with a small convolutional network, a new one for every fold.

    Args:
        real (`LongTensor` of shape `(n, time)`): real music, one sequence per piece.
        samples (`LongTensor` of shape `(m, time)`): generated music, one sequence per piece. The larger
            set is cut to the size of the smaller.
        vocab_size (`int`): number of token ids.
        seed (`int`, *optional*, defaults to 0): for folds and classifiers; the global random state is left as it was.

    Raises:
        ValueError: if the sequences differ in length, or a set has fewer than 5.
    """
    if real.shape[1] != samples.shape[1]:
        raise ValueError(
            f"sequences of {real.shape[1]} and {samples.shape[1]} tokens differ in length, which would tell them apart"
        )
    count = min(len(real), len(samples))
    sequences = torch.cat([real[:count], samples[:count]])

    def classify(train: Indices, labels: Matrix, test: Indices) -> NDArray[np.bool_]:
        return _convolutions(sequences[train], torch.from_numpy(labels).float(), sequences[test], vocab_size)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _cross_validate(classify, count, seed, "two-sample test, tokens")


def feature_test(real: Matrix, samples: Matrix, seed: int = 0) -> TwoSampleTest:
    """
    Tell points apart with logistic regression and a ridge penalty.

    Args:
        real (`array` of shape `(n, d)`): pieces as [`~midimamba.evaluation.frechet.embed`] returns them.
        samples (`array` of shape `(m, d)`): the same of samples. The larger set is cut to the size of the smaller.
        seed (`int`, *optional*, defaults to 0): for the folds.

    Raises:
        ValueError: if a set has fewer than 5 points.
    """
    count = min(len(real), len(samples))
    points = with_constant(np.concatenate([real[:count], samples[:count]]))

    def classify(train: Indices, labels: Matrix, test: Indices) -> NDArray[np.bool_]:
        return points[test] @ logistic_regression(points[train], labels, _RIDGE, steps=15) > 0

    return _cross_validate(classify, count, seed, "two-sample test, features")


def binomial_p_value(right: int, total: int) -> float:
    """The probability of at least `right` heads in `total` tosses of a fair coin."""
    logs = [lgamma(total + 1) - lgamma(k + 1) - lgamma(total - k + 1) for k in range(right, total + 1)]
    return min(1.0, sum(exp(value - total * log(2)) for value in logs))


def _cross_validate(classify: Classifier, count: int, seed: int, description: str) -> TwoSampleTest:
    """Classify every sequence of two sets of `count`, real ones first, by a classifier that was not trained on it."""
    if count < FOLDS:
        raise ValueError(f"{count} sequences per set are too few for {FOLDS} folds")
    labels = np.repeat([1.0, 0.0], count)
    # Every fold has the same number from both sets: otherwise the kind that is rare in training is common in testing.
    order = np.random.default_rng(seed).permutation(count)
    folds = [np.concatenate([part, part + count]) for part in np.array_split(order, FOLDS)]
    right = np.zeros(2 * count)
    for test in tqdm(folds, desc=description, leave=False, disable=None):
        train = np.setdiff1d(np.arange(2 * count), test)
        right[test] = classify(train, labels[train], test) == labels[test].astype(bool)
    return TwoSampleTest(mean_estimate(right, seed), binomial_p_value(int(right.sum()), 2 * count))


def _convolutions(sequences: Tensor, labels: Tensor, test: Tensor, vocab_size: int) -> NDArray[np.bool_]:
    """Train a network on labelled sequences; which of the test sequences it judges real."""
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
    return (score(model, test, batch_size=_BATCH) > 0).numpy()
