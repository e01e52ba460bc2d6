"""Importance resampling against its definition."""

import logging

import pytest
import torch

from midimamba.modeling import resampling
from midimamba.modeling.resampling import choose, effective_sample_size
from midimamba.tokenization.sampling_limits import PICKS


def test_draws_are_chosen_in_proportion_to_their_odds() -> None:
    odds = torch.tensor([1.0, 3.0, 6.0, 0.0])
    chosen = choose(odds.log().expand(20_000, 4), seed=1)
    shares = torch.bincount(chosen, minlength=4) / 20_000
    torch.testing.assert_close(shares, odds / 10, atol=0.01, rtol=0)


def test_resampled_draws_are_distributed_as_real_music() -> None:
    """Draws of p, log-odds log q/p: what is chosen of many comes close to q."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    torch.manual_seed(0)
    draws = torch.multinomial(p, 4000 * 64, replacement=True).view(4000, 64)
    chosen = choose((q / p).log()[draws], seed=0)
    shares = torch.bincount(draws.gather(1, chosen[:, None])[:, 0], minlength=3) / 4000
    torch.testing.assert_close(shares, q, atol=0.03, rtol=0)


def test_the_same_seed_chooses_the_same_and_leaves_torchs_state_alone() -> None:
    odds = torch.zeros(50, 8)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = choose(odds, seed=5)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, choose(odds, seed=5))
    assert not torch.equal(first, choose(odds, seed=6))
    torch.manual_seed(3)
    unseeded = choose(odds)
    torch.manual_seed(3)
    assert torch.equal(unseeded, choose(odds))


def test_the_best_is_chosen_with_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    resampling._say_once.cache_clear()
    odds = torch.tensor([[0.0, 2, 1], [5, -1, 3]])
    with caplog.at_level(logging.WARNING):
        assert choose(odds, "best").tolist() == choose(odds, "best").tolist() == [1, 0]
    (record,) = caplog.records
    assert "tends to please the discriminator rather than the ear" in record.message


def test_the_ways_to_pick_are_those_that_options_name() -> None:
    for pick in PICKS:
        choose(torch.zeros(1, 2), pick)
    with pytest.raises(ValueError, match="pick is 'worst'"):
        choose(torch.zeros(1, 2), "worst")
    with pytest.raises(ValueError, match="log-odds of a draw are not finite"):
        choose(torch.tensor([[0.0, torch.nan]]))


def test_effective_sample_size_counts_draws_of_equal_weight() -> None:
    torch.testing.assert_close(
        effective_sample_size(torch.tensor([[3.0] * 5, [40.0, 0, 0, 0, 0], [7.0, 7, -40, -40, -40]])),
        torch.tensor([5.0, 1, 2]).double(),
    )
    log_odds = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    weights = log_odds.exp()
    assert effective_sample_size(log_odds).item() == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()))
    assert effective_sample_size(log_odds + 500).item() == pytest.approx(effective_sample_size(log_odds).item())
