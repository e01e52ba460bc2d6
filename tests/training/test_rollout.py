"""Sampling and roll-outs against enumeration and against re-encoded prefixes."""

import gc
import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import draw, sample
from midimamba.training import credit
from midimamba.training.rollout import monte_carlo_values, rollout_positions
from support import make_generator

VOCAB, TIME, PROMPT = 3, 4, 1


@pytest.fixture(params=["mamba", "transformer-moe"])
def policy(request: pytest.FixtureRequest) -> MidiMambaForCausalLM:
    """Vocabulary 3, T=4: all 27 continuations of a prompt can be enumerated."""
    return make_generator(vocab_size=VOCAB, layout=request.param)


def reward(sequences: Tensor) -> Tensor:
    """A number in [0, 1) that depends on every token and on their order."""
    weights = torch.tensor([0.31, 0.17, 0.05, 0.23])
    return ((sequences * weights).sum(1) + (sequences[:, 1] == sequences[:, 3]) * 0.4) % 1.0


def enumerate_sequences(first: int) -> Tensor:
    tails = itertools.product(range(VOCAB), repeat=TIME - PROMPT)
    return torch.tensor([[first, *tail] for tail in tails])


def log_probabilities(policy: MidiMambaForCausalLM, sequences: Tensor) -> Tensor:
    """Of every action, `(n, actions)`."""
    logits = policy(sequences, use_cache=False).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, sequences[:, 1:, None]).squeeze(-1)


def exact_values(policy: MidiMambaForCausalLM, sequence: Tensor) -> Tensor:
    """Q of every action of one sequence: the expectation of the reward over all completions of each prefix."""
    everything = enumerate_sequences(int(sequence[0]))
    with torch.no_grad():
        steps = log_probabilities(policy, everything)
    values = []
    for t in range(PROMPT, TIME):
        matches = (everything[:, : t + 1] == sequence[: t + 1]).all(1)
        completion = steps[matches, t:].sum(1).exp()  # probability of what follows the prefix
        values.append((completion * reward(everything[matches])).sum())
    return torch.stack(values)


def test_monte_carlo_values_agree_with_the_exact_expectation(policy: MidiMambaForCausalLM) -> None:
    torch.manual_seed(0)
    sequences = torch.tensor([[0, 2, 1, 0], [2, 0, 0, 1], [1, 1, 2, 2]])
    rollouts = 20_000
    positions = rollout_positions(TIME, PROMPT, None)
    values = monte_carlo_values(policy, reward, sequences, positions, rollouts, max_rows=rollouts)
    exact = torch.stack([exact_values(policy, sequence) for sequence in sequences])
    # Rewards lie in [0, 1): the standard error of a mean is at most 1 / (2 sqrt(N)); six of them are allowed.
    torch.testing.assert_close(values, exact, atol=6 / (2 * math.sqrt(rollouts)), rtol=0)


def test_the_value_of_the_last_action_is_the_reward_of_the_whole_sequence(policy: MidiMambaForCausalLM) -> None:
    sequences = enumerate_sequences(1)
    values = monte_carlo_values(policy, reward, sequences, [PROMPT], num_rollouts=2, max_rows=16)
    assert torch.equal(values[:, -1], reward(sequences))


def test_the_reinforce_gradient_is_the_exact_policy_gradient(policy: MidiMambaForCausalLM) -> None:
    """The gradient of the expected reward by enumeration, against the estimator on enumerated and on drawn samples."""
    everything = enumerate_sequences(0)
    parameters = list(policy.parameters())
    steps = log_probabilities(policy, everything)
    probabilities = steps.sum(1).exp()
    exact = torch.autograd.grad((probabilities * reward(everything)).sum(), parameters, retain_graph=True)

    # Every sequence weighted by its probability, exact action values: no Monte-Carlo error is left.
    values = torch.stack([exact_values(policy, sequence) for sequence in everything])
    weights = probabilities.detach()[:, None] * len(everything)
    weighted = torch.autograd.grad(-credit.reinforce_loss(steps, values * weights), parameters, retain_graph=True)
    for estimate, truth in zip(weighted, exact, strict=True):
        torch.testing.assert_close(estimate, truth, atol=1e-5, rtol=1e-3)

    # Drawn sequences with the leave-one-out baseline: unbiased, so the error falls with the number of samples.
    torch.manual_seed(0)
    drawn = sample(policy, torch.zeros(60_000, 1, dtype=torch.long), TIME)
    index = (drawn[:, 1:] * torch.tensor([9, 3, 1])).sum(1)
    advantages = credit.leave_one_out_advantages(values[index])
    estimated = torch.autograd.grad(-credit.reinforce_loss(steps[index], advantages), parameters)
    flat_estimate, flat_exact = (torch.cat([g.flatten() for g in gs]) for gs in (estimated, exact))
    assert torch.cosine_similarity(flat_estimate, flat_exact, dim=0) > 0.99
    assert (flat_estimate - flat_exact).norm() < 0.1 * flat_exact.norm()


def test_forked_rollouts_equal_reencoded_prefixes(
    policy: MidiMambaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits seen by every draw of the forked roll-out, against full passes over the completed sequences."""
    torch.manual_seed(0)
    model = make_generator()
    sequences = torch.randint(0, 11, (2, 9))
    positions, rollouts = [2, 3, 6], 3
    seen: list[Tensor] = []
    completed: list[Tensor] = []

    def watch(logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return draw(logits)

    def keep(rows: Tensor) -> Tensor:
        completed.append(rows.clone())
        return rows.float().mean(1)

    monkeypatch.setattr("midimamba.training.rollout.draw", watch)
    monte_carlo_values(model, keep, sequences, positions, rollouts, max_rows=1000)
    with torch.no_grad():
        reencoded = model(completed[0]).logits
    compared = 0
    for t, logits in enumerate(seen, start=positions[0]):
        torch.testing.assert_close(logits, reencoded[: len(logits), t], atol=1e-4, rtol=0)
        compared += len(logits)
    per_position = len(sequences) * rollouts
    assert compared == sum(per_position * (9 - 1 - position) for position in positions)


def test_completions_keep_their_prefix(policy: MidiMambaForCausalLM) -> None:
    sequences = torch.randint(0, VOCAB, (3, 8))
    kept: list[Tensor] = []
    monte_carlo_values(policy, lambda rows: kept.append(rows) or rows.float().mean(1), sequences, [2, 5], 4, 1000)
    completions = kept[0].view(2, 3, 4, 8)
    for index, position in enumerate([2, 5]):
        prefix = sequences[:, None, : position + 1].expand(-1, 4, -1)
        assert torch.equal(completions[index, :, :, : position + 1], prefix)


@pytest.mark.parametrize("max_rows", [1, 5, 12, 1000])
def test_values_are_unbiased_however_rows_are_grouped(policy: MidiMambaForCausalLM, max_rows: int) -> None:
    torch.manual_seed(0)
    sequences = torch.tensor([[0, 2, 1, 0], [2, 0, 0, 1]])
    runs = [monte_carlo_values(policy, reward, sequences, [1, 2], 4, max_rows) for _ in range(400)]
    exact = torch.stack([exact_values(policy, sequence) for sequence in sequences])
    torch.testing.assert_close(torch.stack(runs).mean(0), exact, atol=6 / (2 * math.sqrt(1600)), rtol=0)


def test_samples_follow_the_distribution(policy: MidiMambaForCausalLM) -> None:
    torch.manual_seed(0)
    count = 30_000
    drawn = sample(policy, torch.zeros(count, 1, dtype=torch.long), TIME)
    everything = enumerate_sequences(0)
    with torch.no_grad():
        probabilities = log_probabilities(policy, everything).sum(1).exp()
    frequencies = Counter(tuple(row) for row in drawn.tolist())
    for sequence, probability in zip(everything.tolist(), probabilities.tolist(), strict=True):
        error = math.sqrt(probability * (1 - probability) / count)
        assert abs(frequencies[tuple(sequence)] / count - probability) < 6 * error


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((5000, 4), -math.inf)
    logits[:, 1] = 0.0
    logits[:, 3] = 1.0
    assert set(draw(logits).tolist()) == {1, 3}


def test_positions_are_spread_evenly_and_never_hold_the_last_action() -> None:
    assert rollout_positions(10, 2, None) == [2, 3, 4, 5, 6, 7, 8]
    assert rollout_positions(10, 2, 99) == [2, 3, 4, 5, 6, 7, 8]
    assert rollout_positions(102, 1, 4) == [13, 38, 63, 88]
    assert rollout_positions(10, 9, 3) == []


def test_sampling_and_rollouts_leave_no_graph_and_no_memory_behind(policy: MidiMambaForCausalLM) -> None:
    """What lives after a call is its result: counted over all tensors that Python can reach, twice in a row."""

    def living() -> tuple[int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
        return sum(tensor.nbytes for tensor in tensors), sum(tensor.grad_fn is not None for tensor in tensors)

    policy.train()
    prompts = torch.zeros(8, 1, dtype=torch.long)
    sequences = sample(policy, prompts, 40)  # a first call makes whatever torch keeps for good
    before = living()
    values = monte_carlo_values(policy, lambda rows: rows.float().mean(1), sequences, [3, 20], 4, 64)
    resampled = sample(policy, prompts, 40)
    after = living()
    assert after[0] - before[0] == values.nbytes + resampled.nbytes
    assert after[1] == before[1] == 0
    assert not values.requires_grad
    assert policy.training
