"""Tunes with a form: their likelihood is exact, and what is drawn has it."""

import importlib
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def process() -> ModuleType:
    return importlib.import_module("form_process")


@pytest.fixture
def small(process: ModuleType) -> Any:
    """Three sections of a bar of one note each, in two keys: 4,096 sequences."""
    return process.FormProcess(
        forms=("AAB", "ABA", "ABB"),
        section_bars=1,
        bar_notes=1,
        pitches=2,
        scale=(0, 1),
        change=0.2,
        noise=0.1,
        seed=1,
    )


def every_sequence(process: Any, start: int) -> Tensor:
    rows = itertools.product(range(process.vocab_size), repeat=process.length - 1)
    return torch.tensor([(start, *tokens) for tokens in rows])


def letters(form: str) -> Iterator[tuple[int, int | None]]:
    """Each section of a form, and the section that it copies."""
    for index, letter in enumerate(form):
        yield index, max((i for i in range(index) if form[i] == letter), default=None)


def likelihood(tune: list[int], process: Any, bar: int) -> float:
    """The probability of a tune as its definition has it: a loop over keys, forms, sections and places."""
    total, size = 0.0, process.section_tokens
    for key, form in itertools.product(range(process.pitches), process.forms):
        product, note = 1.0, tune[0]
        for section, copied in letters(form):
            for offset in range(size):
                place = 1 + section * size + offset
                token = tune[place]
                if offset % (1 + process.bar_notes) == 0:
                    usual = float(token == bar)
                else:
                    usual = process.chain[key, note, token].item()
                    note = token
                if copied is not None and offset % (1 + process.bar_notes):
                    source = tune[1 + copied * size + offset]
                    usual = (1 - process.change) * (token == source) + process.change * usual
                product *= (1 - process.noise) * usual + process.noise / process.vocab_size
        total += product
    return total / (process.pitches * len(process.forms))


def test_likelihoods_of_all_sequences_sum_to_one_and_are_those_of_the_definition(
    process: ModuleType, small: Any
) -> None:
    sequences = every_sequence(small, process.BOS)
    likelihoods = small.log_likelihood(sequences).exp()
    assert likelihoods.sum().item() == pytest.approx(1, abs=1e-12)
    assert likelihoods.min().item() > 0
    for index in range(0, len(sequences), 97):
        expected = likelihood(sequences[index].tolist(), small, process.BAR)
        assert likelihoods[index].item() == pytest.approx(expected, rel=1e-9)


def test_samples_have_the_frequencies_of_their_likelihoods(process: ModuleType, small: Any) -> None:
    sequences, count = every_sequence(small, process.BOS), 100_000
    drawn = small.sample(count, torch.Generator().manual_seed(0))
    base = small.vocab_size ** torch.arange(small.length - 2, -1, -1)
    found = torch.bincount((drawn[:, 1:] * base).sum(1), minlength=len(sequences)).double()
    expected = count * small.log_likelihood(sequences).exp()
    # Pearson's statistic over the sequences that are expected often enough, against its own mean and deviation.
    usual = expected >= 5
    statistic = ((found - expected) ** 2 / expected)[usual].sum().item()
    degrees = int(usual.sum())
    assert degrees > 100
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_likelihood_of_a_usual_tune_is_that_of_the_definition(process: ModuleType) -> None:
    usual = process.FormProcess()
    tunes = usual.sample(3, torch.Generator().manual_seed(0))
    expected = torch.tensor([likelihood(tune, usual, process.BAR) for tune in tunes.tolist()], dtype=torch.float64)
    torch.testing.assert_close(usual.log_likelihood(tunes), expected.log())


def test_likelihood_does_not_change_when_a_tune_is_transposed(process: ModuleType) -> None:
    usual = process.FormProcess(noise=0.01)
    tunes = usual.sample(50, torch.Generator().manual_seed(0))
    for steps in (1, 7):
        raised = usual.transpose(tunes, steps)
        assert (raised != tunes).any(1).all()
        torch.testing.assert_close(usual.log_likelihood(raised), usual.log_likelihood(tunes))
        torch.testing.assert_close(usual.transpose(raised, usual.pitches - steps), tunes)


def test_tunes_have_a_form_and_lose_it_when_a_repeat_is_replaced(process: ModuleType) -> None:
    usual = process.FormProcess(forms=("AABA", "ABAC"))
    numbers = torch.Generator().manual_seed(0)
    tunes, others = usual.sample(200, numbers), usual.sample(200, numbers)
    assert usual.has_form(tunes).all()
    size = usual.section_tokens
    # Without its second section ABAC is still ABAC; without its third and fourth, a tune has neither form.
    second, last = tunes.clone(), tunes.clone()
    second[:, 1 + size : 1 + 2 * size] = others[:, 1 : 1 + size]
    last[:, 1 + 2 * size :] = others[:, 1 : 1 + 2 * size]
    assert 0.3 < usual.has_form(second).double().mean().item() < 0.7
    assert usual.has_form(last).double().mean().item() < 0.05
