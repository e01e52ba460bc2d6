"""Sampling and roll-outs against enumeration and against re-encoded prefixes."""

import gc
import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from midimamba import MidiDiscriminator, MidiMambaForCausalLM, MidiProcessor
from midimamba.modeling.sampling import NEVER, Ending, Sequences, draw, pick, sample
from midimamba.training.action_values import bar_positions, monte_carlo_values, tokens_that_begin_bars
from midimamba.training.credit import leave_one_out_advantages
from midimamba.training.generator_update import reinforce_loss
from midimamba.training.rewards import Reward
from midimamba.training.rollout import Rollouts, rows_for_budget
from support import make_discriminator, make_generator
from trainer_support import known_reward

VOCAB, TIME, PROMPT = 3, 4, 1
ENDING = Ending(2, 0)


@pytest.fixture(params=["mamba", "transformer-moe"])
def policy(request: pytest.FixtureRequest) -> MidiMambaForCausalLM:
    """Vocabulary 3, T=4: all 27 continuations of a prompt can be enumerated."""
    return make_generator(vocab_size=VOCAB, layout=request.param)


def reward(sequences: Tensor) -> Tensor:
    """A number in [0, 1) that depends on every token and on their order."""
    weights = torch.tensor([0.31, 0.17, 0.05, 0.23])
    return ((sequences * weights).sum(1) + (sequences[:, 1] == sequences[:, 3]) * 0.4) % 1.0


def values_of(
    policy: MidiMambaForCausalLM,
    reward: Reward | Callable[[Tensor], Tensor],
    sequences: Tensor,
    positions: list[int] | Tensor,
    num_rollouts: int,
    max_rows: int,
    ending: Ending = NEVER,
) -> Tensor:
    """`monte_carlo_values` of sequences `(batch, time)` at the same positions in all of them, or at some in each."""
    rollouts = Rollouts(policy, num_rollouts, max_rows, ending, PROMPT)
    rows = Sequences(sequences, ending.mask(sequences, PROMPT))
    times = torch.as_tensor(positions).expand(len(sequences), -1)
    return monte_carlo_values(rollouts, reward if isinstance(reward, Reward) else known_reward(reward), rows, times)


def every_position(length: int, prompt: int = PROMPT, count: int | None = None) -> list[int]:
    """The positions in a sequence without bar lines."""
    (row,) = bar_positions(torch.zeros(1, length, dtype=torch.long), [], prompt, count).tolist()
    return list(row)


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
    values = values_of(policy, reward, sequences, every_position(TIME), rollouts, max_rows=rollouts)
    exact = torch.stack([exact_values(policy, sequence) for sequence in sequences])
    # Rewards lie in [0, 1): the standard error of a mean is at most 1 / (2 sqrt(N)); six of them are allowed.
    torch.testing.assert_close(values, exact, atol=6 / (2 * math.sqrt(rollouts)), rtol=0)


def test_the_value_of_the_last_action_is_the_reward_of_the_whole_sequence(policy: MidiMambaForCausalLM) -> None:
    sequences = enumerate_sequences(1)
    values = values_of(policy, reward, sequences, [PROMPT], num_rollouts=2, max_rows=16)
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
    weighted = torch.autograd.grad(-reinforce_loss(steps, values * weights), parameters, retain_graph=True)
    for estimate, truth in zip(weighted, exact, strict=True):
        torch.testing.assert_close(estimate, truth, atol=1e-5, rtol=1e-3)

    # Drawn sequences with the leave-one-out baseline: unbiased, so the error falls with the number of samples.
    torch.manual_seed(0)
    drawn = sample(policy, torch.zeros(60_000, 1, dtype=torch.long), TIME)
    index = (drawn[:, 1:] * torch.tensor([9, 3, 1])).sum(1)
    advantages = leave_one_out_advantages(values[index])
    estimated = torch.autograd.grad(-reinforce_loss(steps[index], advantages), parameters)
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

    def watch(logits: Tensor, temperature: float) -> Tensor:
        seen.append(logits.clone())
        return draw(logits, temperature)

    def keep(rows: Tensor) -> Tensor:
        completed.append(rows.clone())
        return rows.float().mean(1)

    monkeypatch.setattr("midimamba.training.rollout.draw", watch)
    values_of(model, keep, sequences, positions, rollouts, max_rows=1000)
    with torch.no_grad():
        reencoded = model(completed[0]).logits
    compared = 0
    for t, logits in enumerate(seen, start=positions[0]):
        torch.testing.assert_close(logits, reencoded[: len(logits), t], atol=1e-4, rtol=0)
        compared += len(logits)
    per_position = len(sequences) * rollouts
    assert compared == sum(per_position * (9 - 1 - position) for position in positions)


def numbered_draw(numbers: Tensor, first: int) -> Callable[[Tensor, float], Tensor]:
    """`draw` with given random numbers `(time, n)` for tokens `first` and following."""
    steps = iter(range(first, len(numbers)))
    return lambda logits, temperature: pick(logits / temperature, numbers[next(steps), : len(logits), None])


def test_positions_of_rows_value_as_each_row_alone(
    policy: MidiMambaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same random numbers for a completion, whether its sequence is rolled out with others or alone."""
    torch.manual_seed(0)
    length, rollouts = 9, 3
    sequences = torch.randint(0, VOCAB, (3, length))
    positions = torch.tensor([[1, 4, 6], [2, 3, 7], [1, 2, 4]])
    order = positions.flatten().argsort(stable=True)
    numbers = torch.rand(length, positions.numel() * rollouts, dtype=torch.float64)
    weights = torch.rand(length)

    def score(rows: Tensor) -> Tensor:
        return (rows * weights).sum(1)

    policy.double()  # so that rounding flips no token
    monkeypatch.setattr("midimamba.training.rollout.draw", numbered_draw(numbers, 2))
    together = values_of(policy, score, sequences, positions, rollouts, max_rows=1000)
    for row in range(len(sequences)):
        mine = (order // positions.shape[1] == row).repeat_interleave(rollouts)
        first = int(positions[row, 0]) + 1
        monkeypatch.setattr("midimamba.training.rollout.draw", numbered_draw(numbers[:, mine], first))
        alone = values_of(policy, score, sequences[row : row + 1], positions[row], rollouts, 1000)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_positions_of_rows_are_unbiased(policy: MidiMambaForCausalLM) -> None:
    torch.manual_seed(0)
    sequences = torch.tensor([[0, 2, 1, 0], [2, 0, 0, 1]])
    rollouts = 5_000
    values = values_of(policy, reward, sequences, torch.tensor([[2], [1]]), rollouts, max_rows=999)
    exact = torch.stack([exact_values(policy, sequence) for sequence in sequences])
    expected = torch.stack([exact[0, [1, 2]], exact[1, [0, 2]]])
    torch.testing.assert_close(values, expected, atol=6 / (2 * math.sqrt(rollouts)), rtol=0)


def test_no_more_rows_are_in_memory_than_asked_for(policy: MidiMambaForCausalLM) -> None:
    """However many roll-outs there are: every pass of the policy reads at most `max_rows` tokens."""
    passes: list[int] = []
    policy.register_forward_pre_hook(
        lambda _, args, inputs: passes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    rewarded: list[int] = []

    def keep(rows: Tensor) -> Tensor:
        rewarded.append(len(rows))
        return rows.float().mean(1)

    sequences = torch.randint(0, VOCAB, (3, 12))
    for rollouts in (1, 16):
        values_of(policy, keep, sequences, [1, 5, 8], rollouts, max_rows=6)
        assert max(passes) == 6
        assert max(rewarded) == 6
        assert sum(rewarded) == 3 * 3 * rollouts + 3
        passes.clear()
        rewarded.clear()


def moved_discriminator(kind: str) -> MidiDiscriminator:
    """With parameters far enough from their initial values for logits to differ."""
    discriminator = make_discriminator(kind, vocab_size=VOCAB)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return discriminator


@pytest.mark.parametrize("ending", [NEVER, ENDING], ids=["endless", "ending"])
@pytest.mark.parametrize("max_rows", [3, 1000])
@pytest.mark.parametrize("kind", ["cnn", "mamba"])
@pytest.mark.parametrize("rewarded", ["discriminator", "log-odds"])
def test_a_discriminator_values_completions_as_whole_sequences(
    policy: MidiMambaForCausalLM, rewarded: str, kind: str, max_rows: int, ending: Ending
) -> None:
    """Forked states of the discriminator against its pass over every whole completion."""
    discriminator = moved_discriminator(kind)
    torch.manual_seed(2)
    sequences = sample(policy, torch.zeros(3, 1, dtype=torch.long), 12, ending)
    positions = torch.tensor([[1, 4, 9], [1, 2, 10], [5, 6, 7]])
    judged: list[Tensor] = []

    def judge(rows: Tensor) -> Tensor:
        with torch.no_grad():
            logits = discriminator(rows, attention_mask=ending.mask(rows, PROMPT)).logits[:, 0]
        judged.append(logits if rewarded == "log-odds" else logits.sigmoid())
        return judged[-1]

    values = []
    for valuer in (known_reward(judge), Reward(rewarded, discriminator)):
        torch.manual_seed(3)
        values.append(values_of(policy, valuer, sequences, positions, 4, max_rows, ending))
    assert torch.cat(judged).std() > 0.01
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=0)


def test_a_causal_discriminator_reads_every_token_once(policy: MidiMambaForCausalLM) -> None:
    """Each prefix once, and of each completion only what is new."""
    discriminator = moved_discriminator("mamba")
    read: list[int] = []
    discriminator.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    length, rollouts = 12, 4
    sequences = torch.randint(0, VOCAB, (3, length))
    for max_rows in (3, 7, 1000):
        read.clear()
        values_of(policy, Reward("discriminator", discriminator), sequences, [2, 5, 9], rollouts, max_rows)
        assert sum(read) == 3 * length + 3 * rollouts * sum(length - 1 - time for time in (2, 5, 9))


def test_nothing_follows_an_end(policy: MidiMambaForCausalLM) -> None:
    end, padding = ENDING.eos_token_id, ENDING.pad_token_id
    assert end is not None
    torch.manual_seed(0)
    sequences = sample(policy, torch.full((4, 1), end), 20, ENDING)
    kept: list[Tensor] = []

    def keep(rows: Tensor) -> Tensor:
        kept.append(rows)
        return rows.float().mean(1)

    values = values_of(policy, keep, sequences, [3, 8, 18], 5, max_rows=8, ending=ENDING)
    for row in [*torch.cat(kept).tolist(), *sequences.tolist()]:
        if end in row[1:]:
            assert set(row[row.index(end, 1) + 1 :]) <= {padding}
    over = ENDING.mask(sequences, PROMPT)[:, 19] == 0
    assert over.any()
    # What can no longer change has the value of the sequence.
    torch.testing.assert_close(values[over, 2], values[over, 3])


def test_ended_values_agree_with_the_exact_expectation(policy: MidiMambaForCausalLM) -> None:
    """Enumerated with an end: every sequence of 3 actions, cut and padded after its first end."""
    rollouts = 20_000
    everything = enumerate_sequences(0)
    mask = ENDING.mask(everything, PROMPT)
    with torch.no_grad():
        steps = log_probabilities(policy, everything) * mask[:, 1:]
    canonical, first = torch.unique(everything * mask, dim=0, return_inverse=True)
    steps = torch.stack([steps[first == index][0] for index in range(len(canonical))])
    torch.manual_seed(0)
    for sequence in canonical[:: len(canonical) // 4]:
        exact = []
        for t in range(PROMPT, TIME):
            matches = (canonical[:, : t + 1] == sequence[: t + 1]).all(1)
            exact.append((steps[matches, t:].sum(1).exp() * reward(canonical[matches])).sum())
        values = values_of(policy, reward, sequence[None], [1, 2], rollouts, rollouts, ENDING)
        torch.testing.assert_close(values[0], torch.stack(exact), atol=6 / (2 * math.sqrt(rollouts)), rtol=0)


def test_completions_keep_their_prefix(policy: MidiMambaForCausalLM) -> None:
    sequences = torch.randint(0, VOCAB, (3, 8))
    kept: list[Tensor] = []

    def keep(rows: Tensor) -> Tensor:
        kept.append(rows)
        return rows.float().mean(1)

    values_of(policy, keep, sequences, [2, 5], 4, 1000)
    completions = kept[0].view(2, 3, 4, 8)
    for index, position in enumerate([2, 5]):
        prefix = sequences[:, None, : position + 1].expand(-1, 4, -1)
        assert torch.equal(completions[index, :, :, : position + 1], prefix)


@pytest.mark.parametrize(
    ("max_rows", "rollouts", "runs"),
    [pytest.param(1, 4, 100, marks=pytest.mark.slow), (500, 400, 4), (1200, 400, 4), (100_000, 400, 4)],
)
def test_values_are_unbiased_however_rows_are_grouped(
    policy: MidiMambaForCausalLM, max_rows: int, rollouts: int, runs: int
) -> None:
    """Of each action of two sequences: one roll-out at a time, some of one action with some of the next, or all."""
    torch.manual_seed(0)
    sequences = torch.tensor([[0, 2, 1, 0], [2, 0, 0, 1]])
    known = known_reward(reward)
    values = torch.stack([values_of(policy, known, sequences, [1, 2], rollouts, max_rows) for _ in range(runs)])
    exact = torch.stack([exact_values(policy, sequence) for sequence in sequences])
    torch.testing.assert_close(values.mean(0), exact, atol=6 / (2 * math.sqrt(rollouts * runs)), rtol=0)


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


def test_positions_are_spread_evenly_and_never_include_the_last_action() -> None:
    assert every_position(10, 2) == [2, 3, 4, 5, 6, 7, 8]
    assert every_position(10, 2, 99) == [2, 3, 4, 5, 6, 7, 8]
    assert every_position(102, 1, 4) == [13, 38, 63, 88]
    assert every_position(10, 9, 3) == []


def test_bar_lines_are_valued_first() -> None:
    bar, length = 9, 12
    sequences = torch.zeros(4, length, dtype=torch.long)
    sequences[0, [0, 3, 6, 11]] = bar  # the prompt and the last action are not valued by roll-outs
    sequences[1, 1:11] = bar
    sequences[2, [2, 4, 6, 8]] = bar
    positions = bar_positions(sequences, [bar], 1, 4).tolist()
    for row in positions:
        assert row == sorted(set(row))
        assert 1 <= row[0] <= row[-1] <= length - 2
    assert {3, 6} < set(positions[0])
    assert positions[1] == every_position(length, 1, 4)
    assert positions[2] == [2, 4, 6, 8]
    assert positions[3] == every_position(length, 1, 4)
    assert bar_positions(sequences, [bar], 1, None).tolist() == [every_position(length)] * 4
    assert bar_positions(sequences, [bar], length - 1, 3).shape == (4, 0)


def test_the_tokens_that_begin_bars_are_those_whose_music_does(processor: MidiProcessor) -> None:
    tokenizer = processor.midi_tokenizer
    ids = tokens_that_begin_bars(tokenizer)
    assert tokenizer.vocab["Bar_None"] in ids
    merged = [index for index in ids if index >= len(tokenizer.vocab)]
    assert merged  # byte-pair encoding has learned some
    for index in ids:
        assert processor.tokenizer.decode([index]).split()[0] == "Bar_None"
    others = set(range(tokenizer.vocab_size)) - set(ids)
    assert not any(processor.tokenizer.decode([index]).startswith("Bar_None") for index in others)


def test_a_budget_too_small_for_one_completion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout_memory_mb is 0.001, but one completion of 64 tokens needs about"):
        rows_for_budget(make_generator(), 64, 0.001)


@pytest.mark.parametrize("kind", [None, "cnn", "mamba"])
def test_a_budget_buys_rows_in_proportion(kind: str | None) -> None:
    discriminator = None if kind is None else make_discriminator(kind)
    rows, more = (rows_for_budget(make_generator(), 64, budget, discriminator) for budget in (10, 100))
    assert rows > 1
    assert more == pytest.approx(10 * rows, rel=0.1)


MEASURE = """
import gc, os, sys, torch
from pathlib import Path
from midimamba import MidiDiscriminator, MidiDiscriminatorConfig, MidiMambaConfig, MidiMambaForCausalLM
from midimamba.modeling.sampling import NEVER, Sequences
from midimamba.training.action_values import monte_carlo_values
from midimamba.training.rewards import Reward
from midimamba.training.rollout import Rollouts, rows_for_budget
def resident(name):  # not getrusage's peak, which a process inherits from the one that started it
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024
def measure(kind, budget, length=128):
    policy = MidiMambaForCausalLM(MidiMambaConfig(vocab_size=500, hidden_size=192, num_hidden_layers=4))
    discriminator = MidiDiscriminator(MidiDiscriminatorConfig(vocab_size=500, kind=kind))
    reward = Reward("discriminator", discriminator)
    def value(sequences, positions, rollouts, rows):
        sequences = Sequences(sequences, NEVER.mask(sequences, 1))
        drawing = Rollouts(policy, rollouts, rows, NEVER, 1)
        monte_carlo_values(drawing, reward, sequences, torch.tensor([positions] * 4))
    sequences = torch.randint(3, 500, (4, length))
    value(sequences[:, :16], [3], 2, 4)
    gc.collect()
    before = resident("VmRSS")
    rows = rows_for_budget(policy, length, budget, discriminator)
    for rollouts in (48, 144):
        value(sequences, [80, 96], rollouts, rows)
        print(resident("VmHWM") - before, flush=True)
torch.set_num_threads(1)
for kind in sys.argv[2:]:
    child = os.fork()  # what was imported is shared, and the peak of a child is its own
    if not child:
        measure(kind, float(sys.argv[1]))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_keeps_to_the_budget_however_many_rollouts() -> None:
    """In processes of their own; the budget is full with the fewer roll-outs, which come first."""
    budget, kinds = 32, ("cnn", "mamba")
    command = [sys.executable, "-c", MEASURE, str(budget), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = torch.tensor(list(map(float, done.stdout.split()))).view(len(kinds), 2)
    assert ((grown > budget / 2.5) & (grown < 1.6 * budget)).all(), f"{kinds} grew by {grown.tolist()} MB"
    assert (grown[:, 1] < 1.15 * grown[:, 0]).all(), f"{kinds} grew by {grown.tolist()} MB"  # with 3 times as many


def test_sampling_and_rollouts_leave_no_graph_and_no_memory_behind(policy: MidiMambaForCausalLM) -> None:
    """What lives after a call is its result: counted over all tensors that Python can reach, twice in a row."""

    def living() -> tuple[int, int]:
        gc.collect()
        # By the exact type: a weak proxy, whose object may be gone, is none, nor is what torch.compile traced with.
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
        return sum(tensor.nbytes for tensor in tensors), sum(tensor.grad_fn is not None for tensor in tensors)

    policy.train()
    mean_reward = known_reward(lambda rows: rows.float().mean(1))
    prompts = torch.zeros(8, 1, dtype=torch.long)
    sequences = sample(policy, prompts, 40)  # a first call makes whatever torch keeps for good
    before = living()
    values = values_of(policy, mean_reward, sequences, [3, 20], 4, 64)
    resampled = sample(policy, prompts, 40)
    after = living()
    assert after[0] - before[0] == values.nbytes + resampled.nbytes
    assert after[1] == before[1] == 0
    assert not values.requires_grad
    assert policy.training
