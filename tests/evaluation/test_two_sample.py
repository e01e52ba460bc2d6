"""A fresh classifier finds a difference if and only if there is one."""

from itertools import product

import numpy as np
import pytest
import torch

from midimamba.evaluation.two_sample import binomial_p_value, feature_test, token_test

RANDOM = np.random.default_rng(0)


def markov(count: int, stay: float, seed: int) -> torch.Tensor:
    """Sequences of 64 tokens: each repeats the token before with probability `stay`, else it is any of 20."""
    chance = np.random.default_rng(seed)
    rows = chance.integers(20, size=(count, 64))
    for step in range(1, 64):
        keep = chance.random(count) < stay
        rows[keep, step] = rows[keep, step - 1]
    return torch.from_numpy(rows)


def test_p_values_agree_with_counting_all_tosses() -> None:
    throws = [sum(sides) for sides in product((0, 1), repeat=9)]
    for right in (0, 3, 7, 9):
        assert binomial_p_value(right, 9) == pytest.approx(np.mean([heads >= right for heads in throws]))
    assert binomial_p_value(400, 400) > 0


@pytest.mark.slow
def test_token_sequences_of_two_kinds_are_told_apart_and_of_one_kind_not() -> None:
    real = markov(60, 0.2, 1)
    different = token_test(real, markov(60, 0.7, 2), 20)
    assert different.accuracy.low > 0.7
    assert different.p_value < 1e-6
    alike = token_test(real, markov(60, 0.2, 3), 20)
    assert alike.accuracy.low < 0.5 < alike.accuracy.high
    assert alike.p_value > 0.05


def test_points_of_two_kinds_are_told_apart() -> None:
    real = RANDOM.normal(size=(80, 6))
    different = feature_test(real, RANDOM.normal(size=(80, 6)) + np.eye(6)[2])
    assert different.accuracy.value > 0.6
    assert different.p_value < 0.01


def test_under_the_null_hypothesis_few_p_values_are_small() -> None:
    pairs = RANDOM.normal(size=(100, 2, 40, 5))
    values = [feature_test(real, samples, seed=seed).p_value for seed, (real, samples) in enumerate(pairs)]
    assert np.mean(np.array(values) < 0.1) < 0.2


def test_the_same_seed_gives_the_same_test_and_keeps_the_global_random_state() -> None:
    real, samples = markov(10, 0.2, 1), markov(12, 0.5, 2)
    state = torch.get_rng_state()
    assert token_test(real, samples, 20, seed=3) == token_test(real, samples, 20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        token_test(markov(6, 0, 0), markov(6, 0, 0)[:, :50], 20)
    with pytest.raises(ValueError, match="too few"):
        feature_test(np.zeros((4, 2)), np.zeros((9, 2)))
