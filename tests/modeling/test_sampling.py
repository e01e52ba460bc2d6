"""Temperature, behaviour probabilities and ends of sampled sequences."""

import math

import pytest
import torch

from midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import sample, valid_tokens
from support import make_generator

END = 2


@pytest.fixture
def policy() -> MidiMambaForCausalLM:
    return make_generator(vocab_size=5)


def prompts(batch: int, time: int = 2) -> torch.Tensor:
    return torch.randint(0, 5, (batch, time), generator=torch.Generator().manual_seed(1))


def test_the_frequencies_are_those_of_the_tempered_distribution(policy: MidiMambaForCausalLM) -> None:
    count, temperature = 40_000, 0.5
    torch.manual_seed(0)
    drawn = sample(policy, torch.ones(count, 1, dtype=torch.long), 2, temperature=temperature)[:, 1]
    with torch.no_grad():
        expected = (policy(torch.ones(1, 1, dtype=torch.long)).logits[0, -1] / temperature).softmax(-1)
    frequencies = torch.bincount(drawn, minlength=5) / count
    assert ((frequencies - expected).abs() < 6 * (expected * (1 - expected) / count).sqrt()).all()


def test_behaviour_probabilities_are_those_of_a_pass_over_the_samples(policy: MidiMambaForCausalLM) -> None:
    log_probabilities = torch.full((6, 10), math.nan)
    torch.manual_seed(0)
    drawn = sample(policy, prompts(6), 12, END, temperature=1.7, log_probabilities=log_probabilities)
    valid = valid_tokens(drawn, END, 2)[:, 2:]
    with torch.no_grad():
        passed = (policy(drawn).logits[:, 1:-1] / 1.7).log_softmax(-1).gather(-1, drawn[:, 2:, None]).squeeze(-1)
    assert 0 < valid.sum() < valid.numel()
    torch.testing.assert_close(log_probabilities, passed * valid, atol=1e-5, rtol=0)


def test_importance_weights_give_the_policys_own_expectation(policy: MidiMambaForCausalLM) -> None:
    count, length = 40_000, 3
    log_probabilities = torch.empty(count, length - 1)
    torch.manual_seed(0)
    start = torch.ones(count, 1, dtype=torch.long)
    drawn = sample(policy, start, length, temperature=1.5, log_probabilities=log_probabilities)
    with torch.no_grad():
        own = policy(drawn).logits[:, :-1].log_softmax(-1).gather(-1, drawn[:, 1:, None]).squeeze(-1)
    weights = (own - log_probabilities).sum(1).exp()
    weighted = (drawn[:, 2] == 3) * weights
    plain = (sample(policy, start, length)[:, 2] == 3).float()
    error = math.sqrt((weighted.var() + plain.var()).item() / count)
    assert abs(weighted.mean() - plain.mean()).item() < 6 * error


def test_ends_change_nothing_before_them(policy: MidiMambaForCausalLM) -> None:
    """The same random numbers with and without ends: equal up to the first end, padding behind it."""
    torch.manual_seed(0)
    free = sample(policy, prompts(8), 14)
    torch.manual_seed(0)
    ended = sample(policy, prompts(8), 14, END)
    mask = valid_tokens(free, END, 2).bool()
    assert 0 < mask[:, 2:].sum() < mask[:, 2:].numel()
    assert torch.equal(ended, free.masked_fill(~mask, policy.config.pad_token_id))
    assert torch.equal(valid_tokens(ended, END, 2).bool(), mask)


def test_valid_tokens_hold_the_end_and_overlook_those_in_the_prompt() -> None:
    sequences = torch.tensor([[2, 1, 2, 0, 0], [2, 2, 1, 1, 2], [1, 2, 1, 1, 1]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert valid_tokens(sequences, END, 2).tolist() == expected


def test_sampling_stops_when_all_sequences_have_ended(policy: MidiMambaForCausalLM) -> None:
    steps: list[int] = []
    policy.register_forward_hook(lambda *_: steps.append(1))
    torch.manual_seed(0)
    drawn = sample(policy, prompts(3), 400, END)
    longest = int(valid_tokens(drawn, END, 2).sum(1).max())
    assert len(steps) == longest - 2 < 398
    assert drawn.shape == (3, 400)


def test_bad_options_are_refused(policy: MidiMambaForCausalLM) -> None:
    with pytest.raises(ValueError, match="temperature is 0, but must be positive"):
        sample(policy, prompts(2), 4, temperature=0)
    policy.config.pad_token_id = None
    with pytest.raises(ValueError, match="set pad_token_id"):
        sample(policy, prompts(2), 4, END)
