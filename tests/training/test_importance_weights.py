"""Weights of distillation: closed forms, bounds, and what credit makes of them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.credit import (
    MIN_EFFECTIVE_SHARE,
    Credit,
    effective_share,
    importance_weights,
    systematic_resampling,
)
from trainer_support import PLAIN

log_odds_of_samples = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=30).map(torch.tensor)
shares = st.floats(0.0, 0.9)


def test_the_effective_share_is_that_of_equal_weights() -> None:
    for n in (1, 2, 7):
        assert float(effective_share(torch.ones(n))) == pytest.approx(1)
        assert float(effective_share(torch.eye(n)[0])) == pytest.approx(1 / n)
    # k of n samples with all the weight, whatever its unit.
    assert float(effective_share(torch.tensor([5.0, 5.0, 5.0, 0.0]))) == pytest.approx(3 / 4)
    assert float(effective_share(torch.tensor([1.0, 3.0]))) == pytest.approx(16 / 20)


def test_weights_are_the_odds_where_they_rest_on_enough_samples() -> None:
    log_odds = torch.tensor([0.0, math.log(2), math.log(3), math.log(6)])
    torch.testing.assert_close(importance_weights(log_odds, 0.1), torch.tensor([1.0, 2.0, 3.0, 6.0]) / 3)
    torch.testing.assert_close(
        importance_weights(log_odds.double() + 700, 0.1), importance_weights(log_odds.double(), 0.1)
    )


@given(log_odds_of_samples, shares)
def test_weights_keep_their_mean_their_order_and_their_least_share(log_odds: torch.Tensor, least: float) -> None:
    weights = importance_weights(log_odds, least)
    assert weights.dtype == log_odds.dtype
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
    ordered = weights[log_odds.argsort(stable=True)]
    assert (ordered.diff() >= 0).all()
    share = float(effective_share(weights))
    assert share >= least - 1e-5
    # Held back no more than that takes: the weights are the odds, or rest on just as few samples as they may.
    odds = (log_odds - log_odds.max()).double().exp()
    if float(effective_share(odds)) < least:
        assert share == pytest.approx(least, abs=1e-4)
    else:
        torch.testing.assert_close(weights, (odds / odds.mean()).float())


@given(log_odds_of_samples, st.tuples(shares, shares))
def test_a_larger_least_share_evens_weights_out(log_odds: torch.Tensor, least: tuple[float, float]) -> None:
    low, high = (importance_weights(log_odds, share) for share in sorted(least))
    assert float(effective_share(high)) >= float(effective_share(low)) - 1e-5
    assert high.max() <= low.max() + 1e-5


@given(st.floats(-1e4, 1e4, width=32), st.integers(1, 40))
def test_equal_log_odds_give_weights_of_exactly_one(value: float, count: int) -> None:
    assert torch.equal(importance_weights(torch.full((count,), value), 0.5), torch.ones(count))


def make_credit(folder: Path, **options: Any) -> Credit:
    common: dict[str, Any] = {"estimator": "distill", "reward": "log-odds", "output_dir": str(folder), "use_cpu": True}
    return Credit(AdversarialConfig(**PLAIN | common | options), Accelerator(cpu=True))


@pytest.mark.parametrize("baseline", ["none", "leave-one-out", "running"])
def test_credit_is_the_weight_of_a_sequence_on_each_of_its_tokens(tmp_path: Path, baseline: str) -> None:
    """No baseline, normalisation or clipping touches it: they would make it negative, or another target."""
    part = make_credit(tmp_path, baseline=baseline, advantage_clip=0.1)
    log_odds = torch.tensor([0.0, 1.0, -1.0, 2.0])
    valid = torch.arange(5) < torch.tensor([[5], [2], [1], [4]])
    for _ in range(2):
        credited, measures = part(log_odds[:, None].expand(-1, 5), valid)
        weights = importance_weights(log_odds, MIN_EFFECTIVE_SHARE)
        torch.testing.assert_close(credited, weights[:, None] * valid)
        odds = log_odds.exp()
        assert float(measures["effective_samples"]) == pytest.approx(float(odds.sum() ** 2 / odds.square().sum()))
        assert float(measures["reward"]) == pytest.approx(0.5)


def test_one_sample_does_not_take_all_the_weight(tmp_path: Path) -> None:
    log_odds = torch.zeros(40)
    log_odds[3] = 25
    _, measures = make_credit(tmp_path)(log_odds[:, None], torch.ones(40, 1, dtype=torch.bool))
    assert float(measures["effective_samples"]) == pytest.approx(40 * MIN_EFFECTIVE_SHARE, rel=1e-3)


@given(log_odds_of_samples, st.integers(1, 100), st.integers(0, 2**31))
def test_resampling_draws_each_sample_as_often_as_its_weight_says(
    log_odds: torch.Tensor, count: int, seed: int
) -> None:
    weights = importance_weights(log_odds, 0.1).double()
    torch.manual_seed(seed)
    counts = systematic_resampling(weights, count).bincount(minlength=len(weights))
    assert counts.sum() == count
    assert ((counts - weights * (count / len(weights))).abs() < 1 + 1e-4).all()  # the weights have mean 1


def test_resampling_is_right_on_average_and_draws_equal_samples_once() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([0.2, 0.0, 3.1, 0.7])
    drawn = torch.stack([systematic_resampling(weights, 4).bincount(minlength=4) for _ in range(4000)])
    drawn = drawn.double().mean(0)
    torch.testing.assert_close(drawn, weights.double(), atol=0.03, rtol=0)
    assert drawn[1] == 0
    assert systematic_resampling(torch.ones(5000), 5000).tolist() == list(range(5000))
