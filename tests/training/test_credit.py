"""Credit assignment by hand and by conservation laws."""

import pytest
import torch

from midimamba.training import credit


def test_returns_add_up_what_is_still_to_come() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    expected = torch.tensor([[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0], [2.0, 4.0, 8.0]])
    torch.testing.assert_close(credit.discounted_returns(rewards, 0.5), expected)


def test_interpolation_passes_through_the_valued_positions_and_is_linear_between() -> None:
    values = torch.tensor([[1.0, 3.0, 9.0]])
    interpolated = credit.interpolate_values(values, torch.tensor([1, 3, 6]), 7)
    torch.testing.assert_close(interpolated, torch.tensor([[1.0, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0]]))


def test_interpolation_between_all_positions_changes_nothing() -> None:
    values = torch.rand(2, 5)
    assert torch.equal(credit.interpolate_values(values, torch.arange(5), 5), values)


def test_the_baseline_is_the_mean_of_the_others() -> None:
    values = torch.rand(4, 3, dtype=torch.float64)
    advantages = credit.leave_one_out_advantages(values)
    for i in range(4):
        others = torch.cat([values[:i], values[i + 1 :]])
        torch.testing.assert_close(advantages[i], values[i] - others.mean(0))
    torch.testing.assert_close(advantages.sum(0), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 0.7, 1e6 / 7])
def test_a_constant_reward_gives_advantages_of_exactly_zero(constant: float) -> None:
    advantages = credit.leave_one_out_advantages(torch.full((7, 5), constant))
    assert not advantages.any()
    assert not credit.normalize_advantages(advantages).any()


def test_a_baseline_of_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two sequences"):
        credit.leave_one_out_advantages(torch.rand(1, 3))


def test_normalised_advantages_have_unit_deviation_and_keep_their_signs() -> None:
    advantages = torch.randn(8, 5)
    normalised = credit.normalize_advantages(advantages)
    torch.testing.assert_close(normalised.std(correction=0), torch.tensor(1.0))
    assert torch.equal(normalised.sign(), advantages.sign())


def test_the_loss_sums_over_time_and_averages_over_sequences() -> None:
    log_probabilities = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 0.5], [-1.0, 2.0]])
    loss = credit.reinforce_loss(log_probabilities, advantages)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor((1 + 1 - 3 + 8) / 2))
    torch.testing.assert_close(log_probabilities.grad, -advantages / 2)
