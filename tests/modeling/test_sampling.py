"""Temperature and ends of sampled sequences."""

from types import SimpleNamespace

import pytest
import torch

from midimamba import MidiMambaForCausalLM
from midimamba.modeling import sampling
from midimamba.modeling.sampling import NEVER, Ending, pick, sample
from support import make_generator

ENDING = Ending(2, 0)


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


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_the_kernel_picks_what_torch_would(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also next to the borders of two tokens, where the last bit decides, and beside tokens that are impossible."""
    random = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(4_000, 300, generator=random)
    logits[torch.rand(logits.shape, generator=random) < 0.3] = -torch.inf
    cumulative = logits.softmax(-1).cumsum(-1)
    borders = 1 - cumulative.gather(1, torch.randint(0, 300, (4_000, 1), generator=random)) / cumulative[:, -1:]
    distances = 10.0 ** -torch.randint(4, 9, borders.shape, generator=random)
    near = borders + distances * torch.randn(borders.shape, generator=random)
    largest = torch.full_like(borders, 1 - 2**-24)
    for numbers in (torch.rand(borders.shape, generator=random), near.clamp(0, 1 - 2**-24), 0 * borders, largest):
        monkeypatch.setenv("MIDIMAMBA_SCAN", "numba")
        picked = pick(logits, numbers)
        monkeypatch.setenv("MIDIMAMBA_SCAN", "chunked")
        assert torch.equal(picked, pick(logits, numbers))
        assert logits.gather(1, picked[:, None]).isfinite().all()


def test_the_kernel_decides_alone_nearly_always(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    logits, numbers = torch.randn(4_000, 300, generator=random), torch.rand(4_000, 1, generator=random)
    rows: list[int] = []
    invert = sampling._invert

    def count(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows.append(len(logits))
        return invert(logits, numbers)

    monkeypatch.setenv("MIDIMAMBA_SCAN", "numba")
    monkeypatch.setattr(sampling, "_invert", count)
    pick(logits, numbers)
    assert 0 < sum(rows) < 40


def test_ends_change_nothing_before_them(policy: MidiMambaForCausalLM) -> None:
    """The same random numbers with and without ends: equal up to the first end, padding after it."""
    torch.manual_seed(0)
    free = sample(policy, prompts(8), 14)
    torch.manual_seed(0)
    ended = sample(policy, prompts(8), 14, ENDING)
    mask = ENDING.mask(free, 2).bool()
    assert 0 < mask[:, 2:].sum() < mask[:, 2:].numel()
    assert torch.equal(ended, free.masked_fill(~mask, ENDING.pad_token_id))
    assert torch.equal(ENDING.mask(ended, 2).bool(), mask)


def test_the_mask_includes_the_end_and_ignores_ends_in_the_prompt() -> None:
    sequences = torch.tensor([[2, 1, 2, 0, 0], [2, 2, 1, 1, 2], [1, 2, 1, 1, 1]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert ENDING.mask(sequences, 2).tolist() == expected
    assert NEVER.mask(sequences, 2).tolist() == [[1] * 5] * 3


def test_sampling_stops_when_all_sequences_have_ended(policy: MidiMambaForCausalLM) -> None:
    steps: list[int] = []
    policy.register_forward_hook(lambda *_: steps.append(1))
    torch.manual_seed(0)
    drawn = sample(policy, prompts(3), 400, ENDING)
    longest = int(ENDING.mask(drawn, 2).sum(1).max())
    assert len(steps) == longest - 2 < 398
    assert drawn.shape == (3, 400)


def test_tokens_after_an_end_become_padding_and_ends_are_remembered() -> None:
    is_over = torch.tensor([True, False, False, False])
    assert ENDING.close(torch.tensor([4, 2, 3]), is_over).tolist() == [0, 2, 3]
    assert is_over.tolist() == [True, True, False, False]
    assert ENDING.close(torch.tensor([4, 2, 2, 1]), is_over).tolist() == [0, 0, 2, 1]
    assert is_over.tolist() == [True, True, True, False]
    assert NEVER.close(torch.tensor([4, 2]), is_over).tolist() == [4, 2]
    assert is_over.tolist() == [True, True, True, False]


def test_padding_that_is_the_end_itself_counts_as_padding(policy: MidiMambaForCausalLM) -> None:
    """As `generate` does it for a model without a padding token."""
    ending = Ending(2, 2)
    torch.manual_seed(0)
    drawn = sample(policy, prompts(8), 14, ending)
    torch.manual_seed(0)
    padded = sample(policy, prompts(8), 14, ENDING)
    mask = ending.mask(drawn, 2)
    assert 0 < mask[:, 2:].sum() < mask[:, 2:].numel()
    assert torch.equal(mask, ENDING.mask(padded, 2))
    assert torch.equal(drawn * mask, padded * mask)
    assert (drawn[mask == 0] == 2).all()


def test_the_ending_is_that_of_the_configuration(policy: MidiMambaForCausalLM) -> None:
    assert Ending.of(policy.config) == Ending(2, 0)
    assert Ending.of(SimpleNamespace(eos_token_id=7, pad_token_id=None)) == Ending(7, 7)
    assert Ending.of(SimpleNamespace(eos_token_id=None, pad_token_id=3)) == NEVER
    assert Ending.of(SimpleNamespace()) == NEVER
    with pytest.raises(ValueError, match=r"eos_token_id is \[2, 4\]; set it to a single token"):
        Ending.of(SimpleNamespace(eos_token_id=[2, 4], pad_token_id=0))


def test_a_temperature_of_zero_is_refused(policy: MidiMambaForCausalLM) -> None:
    with pytest.raises(ValueError, match="temperature is 0, but must be positive"):
        sample(policy, prompts(2), 4, temperature=0)
