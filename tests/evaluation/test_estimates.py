"""Intervals contain what they should."""

import math

import numpy as np
import pytest

from midimamba.evaluation.estimates import bootstrap, jackknife, mean_estimate, ratio_estimate

NORMAL = np.random.default_rng(0).normal


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = NORMAL(2, 3, size=400)
    found = mean_estimate([*values, math.nan])
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert found == mean_estimate(values)
    assert found.low != mean_estimate(values, seed=1).low
    assert math.isnan(mean_estimate([math.nan]).value)


def test_a_ratio_is_one_of_sums() -> None:
    found = ratio_estimate([2.0, 6.0], [1, 3])
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    assert ratio_estimate([1.0, 3.0], [1, 1]).value == 2


def test_bounds_clip_the_interval() -> None:
    found = bootstrap(lambda weights: float(weights[0] @ np.array([0, 1, 1, 1]) / 4), [4], bounds=(0.5, 0.8))
    assert (found.low, found.high) == (0.5, 0.8)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = NORMAL(size=50)
    found = jackknife(lambda present: float(values[present].mean()), 50)
    assert found.high - found.value == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(50))
