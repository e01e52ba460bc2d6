"""Credit assignment and the terms of the loss, by hand and by conservation laws."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from midimamba.training import action_values, credit, generator_update
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.credit import Credit
from trainer_support import PLAIN


def test_returns_add_up_what_is_still_to_come() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    expected = torch.tensor([[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0], [2.0, 4.0, 8.0]])
    torch.testing.assert_close(action_values.discounted_returns(rewards, 0.5), expected)


def test_interpolation_passes_through_the_valued_positions_and_is_linear_between() -> None:
    values = torch.tensor([[1.0, 3.0, 9.0], [1.0, 2.0, 4.0]])
    interpolated = action_values.interpolate_rows(values, torch.tensor([[1, 3, 6], [0, 5, 6]]), 7)
    expected = [[1.0, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0], [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 4.0]]
    torch.testing.assert_close(interpolated, torch.tensor(expected))


def test_interpolation_between_all_positions_changes_nothing() -> None:
    values = torch.rand(2, 5)
    assert torch.equal(action_values.interpolate_rows(values, torch.arange(5).expand(2, -1), 5), values)


def test_interpolation_of_the_reward_alone_is_constant() -> None:
    values = torch.rand(3, 1)
    assert torch.equal(action_values.interpolate_rows(values, torch.full((3, 1), 4), 5), values.expand(-1, 5))


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


def make_credit(folder: Path, baseline: str, **options: Any) -> Credit:
    common: dict[str, Any] = {"per_device_train_batch_size": 4, "normalize_advantages": False, "use_cpu": True}
    args = AdversarialConfig(**PLAIN | common | {"output_dir": str(folder), "baseline": baseline} | options)
    return Credit(args, Accelerator(cpu=True))


def advantages(part: Credit, values: torch.Tensor) -> torch.Tensor:
    """Of sequences without padding."""
    return part(values, torch.ones_like(values, dtype=torch.bool))[0]


def test_the_running_baseline_is_what_was_known_before_the_batch(tmp_path: Path) -> None:
    first, second, third = (torch.rand(4, 3) + shift for shift in (0, 10, 20))
    part = make_credit(tmp_path, "running")
    torch.testing.assert_close(advantages(part, first), first - first.mean(0))
    torch.testing.assert_close(advantages(part, second), second - first.mean(0))
    expected = (credit.BASELINE_MEMORY * first.mean(0) + second.mean(0)) / (credit.BASELINE_MEMORY + 1)
    torch.testing.assert_close(advantages(part, third), third - expected)


def test_a_running_baseline_goes_on_from_its_saved_state(tmp_path: Path) -> None:
    part, resumed = (make_credit(tmp_path, "running") for _ in range(2))
    batches = torch.rand(4, 4, 3)
    for values in batches[:3]:
        advantages(part, values)
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())), torch.device("cpu"))
    assert torch.equal(advantages(part, batches[3]), advantages(resumed, batches[3]))


@pytest.mark.parametrize(
    ("baseline", "group_size"), [("leave-one-out", None), ("leave-one-out", 2), ("running", None)]
)
@pytest.mark.parametrize("constant", [0.1, 1 / 3, 0.7, 1e6 / 7])
def test_every_baseline_takes_a_constant_reward_away_exactly(
    tmp_path: Path, baseline: str, group_size: int | None, constant: float
) -> None:
    part = make_credit(tmp_path, baseline, group_size=group_size, normalize_advantages=True)
    for _ in range(5):
        assert not advantages(part, torch.full((22, 5), constant)).any()


def test_a_group_is_compared_with_itself(tmp_path: Path) -> None:
    values = torch.rand(4, 3)
    expected = credit.leave_one_out_advantages(values, 2)
    assert torch.equal(advantages(make_credit(tmp_path, "leave-one-out", group_size=2), values), expected)
    whole = advantages(make_credit(tmp_path, "leave-one-out"), values)
    assert torch.equal(whole, credit.leave_one_out_advantages(values))
    assert not torch.allclose(whole, expected)


def test_no_baseline_is_the_paper(tmp_path: Path) -> None:
    values = torch.rand(4, 3)
    assert torch.equal(advantages(make_credit(tmp_path, "none"), values), values)


def test_padding_is_credited_with_nothing_and_counts_for_nothing(tmp_path: Path) -> None:
    values, valid = torch.rand(4, 6), torch.arange(6) < torch.tensor([[6], [2], [3], [5]])
    part = make_credit(tmp_path, "leave-one-out", normalize_advantages=True)
    credited, measures = part(values, valid)
    raw = credit.leave_one_out_advantages(values)[valid]
    assert not credited[~valid].any()
    torch.testing.assert_close(credited[valid], raw / raw.std(correction=0))
    torch.testing.assert_close(measures["advantage_mean"], raw.mean())
    torch.testing.assert_close(measures["advantage_std"], raw.std(correction=0))
    torch.testing.assert_close(measures["reward"], values[:, -1].mean())


def test_rewards_by_position_are_those_of_the_quarters() -> None:
    values = torch.arange(5.0).expand(3, -1)
    measures = credit.reward_by_position(values)
    assert {name: float(value) for name, value in measures.items()} == {
        f"reward_at_{25 * part}": float(part) for part in (1, 2, 3, 4)
    }


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
    loss = generator_update.reinforce_loss(log_probabilities, advantages)
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
    loss = generator_update.clipped_policy_loss(log_probabilities, old, advantages, 0.2)
    assert loss.item() == pytest.approx(-gains / 4)
    assert torch.autograd.gradcheck(
        lambda new: generator_update.clipped_policy_loss(new, old, advantages, 0.2), log_probabilities.requires_grad_()
    )


def test_the_first_gradient_of_the_clipped_loss_is_exactly_that_of_reinforce() -> None:
    log_probabilities = torch.randn(3, 5, requires_grad=True)
    advantages = torch.randn(3, 5)
    clipped = generator_update.clipped_policy_loss(log_probabilities, log_probabilities.detach(), advantages, 0.2)
    plain = generator_update.reinforce_loss(log_probabilities, advantages)
    gradients = [torch.autograd.grad(loss, log_probabilities)[0] for loss in (clipped, plain)]
    assert torch.equal(*gradients)


def test_a_ratio_beyond_the_clip_earns_nothing_more() -> None:
    log_probabilities = torch.tensor([[1.0, -1.0, 1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    generator_update.clipped_policy_loss(log_probabilities, torch.zeros(1, 4), advantages, 0.2).backward()
    assert log_probabilities.grad is not None
    assert log_probabilities.grad.ne(0).tolist() == [[False, False, True, True]]


def test_divergence_and_entropy_are_those_of_the_distributions() -> None:
    logits, reference = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    p, q = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=reference)
    divergence = generator_update.kl_divergence(logits.log_softmax(-1), reference.log_softmax(-1))
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(generator_update.entropy_of(logits.log_softmax(-1)), p.entropy())
    assert not generator_update.kl_divergence(logits.log_softmax(-1), logits.log_softmax(-1)).any()
    for function in (
        lambda x: generator_update.kl_divergence(x.log_softmax(-1), reference),
        lambda x: generator_update.entropy_of(x),
    ):
        assert torch.autograd.gradcheck(function, logits.clone().requires_grad_())


@pytest.mark.parametrize(
    ("divergence", "factor"), [(0.0, 0.98), (0.9, 0.99), (1.0, 1.0), (1.1, 1.01), (1.2, 1.02), (50.0, 1.02)]
)
def test_the_controller_moves_the_coefficient_towards_the_target(divergence: float, factor: float) -> None:
    assert generator_update.adapted_kl_coef(3.0, 2 * divergence, target=2.0) == pytest.approx(3.0 * factor)
