"""Credit assignment by hand and by conservation laws."""

import math

import pytest
import torch

from midimamba.training import credit
from midimamba.training.baseline import Baseline


def test_returns_add_up_what_is_still_to_come() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    expected = torch.tensor([[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0], [2.0, 4.0, 8.0]])
    torch.testing.assert_close(credit.discounted_returns(rewards, 0.5), expected)


def test_interpolation_passes_through_the_valued_positions_and_is_linear_between() -> None:
    values = torch.tensor([[1.0, 3.0, 9.0], [1.0, 2.0, 4.0]])
    interpolated = credit.interpolate_rows(values, torch.tensor([[1, 3, 6], [0, 5, 6]]), 7)
    expected = [[1.0, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0], [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 4.0]]
    torch.testing.assert_close(interpolated, torch.tensor(expected))


def test_interpolation_between_all_positions_changes_nothing() -> None:
    values = torch.rand(2, 5)
    assert torch.equal(credit.interpolate_rows(values, torch.arange(5).expand(2, -1), 5), values)


def test_interpolation_of_the_reward_alone_is_constant() -> None:
    values = torch.rand(3, 1)
    assert torch.equal(credit.interpolate_rows(values, torch.full((3, 1), 4), 5), values.expand(-1, 5))


def test_importance_weights_make_means_under_the_behaviour_those_under_the_policy() -> None:
    logits, worth = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    policy, behaviour = logits.log_softmax(-1), (logits / 0.5).log_softmax(-1)
    weights = credit.importance_weights(policy, behaviour, clip=torch.inf)
    torch.testing.assert_close((behaviour.exp() * weights * worth).sum(), (policy.exp() * worth).sum())
    assert credit.importance_weights(policy, behaviour, clip=1.0).max() == 1.0


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


def test_the_baseline_of_a_group_knows_only_the_group() -> None:
    values = torch.rand(6, 3, dtype=torch.float64)
    advantages = credit.leave_one_out_advantages(values, group_size=2)
    for i in range(6):
        torch.testing.assert_close(advantages[i], values[i] - values[i + 1 if i % 2 == 0 else i - 1])
    # Groups of unequal prompts, equal within: nothing to learn, exactly.
    assert not credit.leave_one_out_advantages(torch.rand(2, 3).repeat_interleave(3, 0), group_size=3).any()


def test_the_running_mean_is_the_bias_corrected_moving_average() -> None:
    values = torch.rand(6, 3, dtype=torch.float64)
    mean, moment = torch.full((3,), torch.nan), torch.zeros(3, dtype=torch.float64)
    for count, value in enumerate(values, start=1):
        mean = credit.running_mean(mean, value, count, 0.7)
        moment = 0.7 * moment + 0.3 * value
        torch.testing.assert_close(mean, moment / (1 - 0.7**count))


def make_baseline(kind: str) -> Baseline:
    return Baseline(kind, group_size=2, decay=0.7)


def test_the_running_baseline_is_what_was_known_before_the_batch() -> None:
    first, second, third = (torch.rand(4, 3) + shift for shift in (0, 10, 20))
    baseline = make_baseline("running")
    torch.testing.assert_close(baseline.advantages(first), first - first.mean(0))
    torch.testing.assert_close(baseline.advantages(second), second - first.mean(0))
    expected = (0.7 * first.mean(0) + second.mean(0)) / 1.7
    torch.testing.assert_close(baseline.advantages(third), third - expected)


@pytest.mark.parametrize("kind", ["leave-one-out", "group", "running"])
@pytest.mark.parametrize("constant", [0.1, 1 / 3, 0.7, 1e6 / 7])
def test_every_baseline_takes_a_constant_reward_away_exactly(kind: str, constant: float) -> None:
    baseline = make_baseline(kind)
    for _ in range(5):
        assert not baseline.advantages(torch.full((22, 5), constant)).any()


def test_no_baseline_is_the_paper() -> None:
    values = torch.rand(4, 3)
    assert torch.equal(make_baseline("none").advantages(values), values)


def test_a_baseline_of_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two sequences"):
        credit.leave_one_out_advantages(torch.rand(1, 3))


def test_normalised_advantages_have_unit_deviation_and_keep_their_signs() -> None:
    advantages = torch.randn(8, 5)
    normalised = credit.normalize_advantages(advantages)
    torch.testing.assert_close(normalised.std(correction=0), torch.tensor(1.0))
    assert torch.equal(normalised.sign(), advantages.sign())
    valid = torch.rand(8, 5) > 0.3
    normalised = credit.normalize_advantages(advantages * valid, valid)
    torch.testing.assert_close(normalised[valid].std(correction=0), torch.tensor(1.0))
    assert not normalised[~valid].any()


def test_the_loss_sums_over_time_and_averages_over_sequences() -> None:
    log_probabilities = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 0.5], [-1.0, 2.0]])
    loss = credit.reinforce_loss(log_probabilities, advantages)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor((1 + 1 - 3 + 8) / 2))
    torch.testing.assert_close(log_probabilities.grad, -advantages / 2)


def test_the_clipped_loss_is_the_smaller_gain_of_every_action() -> None:
    log_probabilities, old = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    advantages = torch.randn(4, 6, dtype=torch.float64)
    gains = 0.0
    for new, before, advantage in zip(log_probabilities.flatten(), old.flatten(), advantages.flatten(), strict=True):
        ratio = math.exp(new - before)
        gains += min(ratio * advantage.item(), min(max(ratio, 0.8), 1.2) * advantage.item())
    loss = credit.clipped_policy_loss(log_probabilities, old, advantages, 0.2)
    assert loss.item() == pytest.approx(-gains / 4)
    assert torch.autograd.gradcheck(
        lambda new: credit.clipped_policy_loss(new, old, advantages, 0.2), log_probabilities.requires_grad_()
    )


def test_the_first_gradient_of_the_clipped_loss_is_exactly_that_of_reinforce() -> None:
    log_probabilities = torch.randn(3, 5, requires_grad=True)
    advantages = torch.randn(3, 5)
    clipped = credit.clipped_policy_loss(log_probabilities, log_probabilities.detach(), advantages, 0.2)
    plain = credit.reinforce_loss(log_probabilities, advantages)
    gradients = [torch.autograd.grad(loss, log_probabilities)[0] for loss in (clipped, plain)]
    assert torch.equal(*gradients)


def test_a_ratio_beyond_the_clip_earns_nothing_more() -> None:
    log_probabilities = torch.tensor([[1.0, -1.0, 1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    credit.clipped_policy_loss(log_probabilities, torch.zeros(1, 4), advantages, 0.2).backward()
    assert (log_probabilities.grad != 0).tolist() == [[False, False, True, True]]


def test_divergence_and_entropy_are_those_of_the_distributions() -> None:
    logits, reference = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    p, q = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=reference)
    divergence = credit.kl_divergence(logits.log_softmax(-1), reference.log_softmax(-1))
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(credit.entropy(logits.log_softmax(-1)), p.entropy())
    assert not credit.kl_divergence(logits.log_softmax(-1), logits.log_softmax(-1)).any()
    for function in (lambda x: credit.kl_divergence(x.log_softmax(-1), reference), lambda x: credit.entropy(x)):
        assert torch.autograd.gradcheck(function, logits.clone().requires_grad_())


@pytest.mark.parametrize(
    ("divergence", "factor"), [(0.0, 0.98), (0.9, 0.99), (1.0, 1.0), (1.1, 1.01), (1.2, 1.02), (50.0, 1.02)]
)
def test_the_controller_moves_the_coefficient_towards_the_target(divergence: float, factor: float) -> None:
    assert credit.adapted_kl_coef(3.0, 2 * divergence, target=2.0) == pytest.approx(3.0 * factor)
