"""The benchmark of forms: divergences and weights against enumeration, calibrated rewards, runs that continue."""

import dataclasses
import functools
import importlib
import itertools
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from support import make_generator


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    return importlib.import_module("form_oracle")


@pytest.fixture(scope="module")
def arms() -> ModuleType:
    return importlib.import_module("form_arms")


@pytest.fixture(scope="module")
def process() -> Any:
    """Two sections of a bar of one note: 256 sequences."""
    module = importlib.import_module("form_process")
    return module.FormProcess(
        forms=("AA", "AB"), section_bars=1, bar_notes=1, pitches=2, scale=(0, 1), change=0.1, noise=0.1
    )


@pytest.fixture
def settings(oracle: ModuleType) -> Any:
    return dataclasses.replace(oracle.QUICK, seconds=0.1, tunes=16, valid=8, test=16, pool=16)


def every_sequence(process: Any) -> Tensor:
    rows = itertools.product(range(process.vocab_size), repeat=process.length - 1)
    return torch.tensor([(0, *tokens) for tokens in rows])


def test_divergences_are_those_of_the_enumerated_distributions(oracle: ModuleType, process: Any) -> None:
    torch.manual_seed(0)
    model, sequences = make_generator(vocab_size=process.vocab_size), every_sequence(process)
    real, ours = process.log_likelihood(sequences), oracle.score(model, sequences)
    assert ours.exp().sum().item() == pytest.approx(1, abs=1e-5)
    test = process.sample(4000, torch.Generator().manual_seed(1))
    figures = oracle.figures(model, oracle.Problem(process, test, test, test))
    assert figures["kl_real"] == pytest.approx((real.exp() * (real - ours)).sum().item(), abs=0.1)
    assert figures["kl_generator"] == pytest.approx((ours.exp() * (ours - real)).sum().item(), abs=0.1)
    assert figures["nll"] == pytest.approx(-(real.exp() * ours).sum().item(), abs=0.1)
    forms = process.has_form(sequences).double()
    assert figures["form"] == pytest.approx((ours.exp() * forms).sum().item(), abs=0.02)


def test_the_exact_reward_makes_samples_look_real(oracle: ModuleType, process: Any, settings: Any) -> None:
    torch.manual_seed(0)
    model, sequences = make_generator(vocab_size=process.vocab_size), every_sequence(process)
    problem = oracle.Problem(process, *(process.sample(16, torch.Generator()) for _ in range(3)))
    fake = oracle.draw(model, 20_000, process)
    weights = oracle.reward_of("exact", problem, settings)(model, fake).softmax(0)
    base = process.vocab_size ** torch.arange(process.length - 2, -1, -1)
    found = torch.zeros(len(sequences), dtype=torch.float64).index_add_(0, (fake[:, 1:] * base).sum(1), weights)
    assert (found - process.log_likelihood(sequences).exp()).abs().max().item() < 0.03


def test_no_weight_exceeds_the_root_of_the_number_and_others_keep_their_ratios(arms: ModuleType) -> None:
    log_odds = torch.cat([torch.linspace(-1, 1, 399), torch.tensor([30.0])]).double()
    weights = arms.truncated(log_odds)
    assert weights.sum().item() == pytest.approx(1)
    usual = arms.truncated(log_odds[:-1])
    torch.testing.assert_close(usual, log_odds[:-1].softmax(0))
    torch.testing.assert_close(weights[:-1] / weights[0], usual / usual[0])
    assert 1 / weights.square().sum().item() < 400


def test_controls_know_nothing(oracle: ModuleType, process: Any, settings: Any) -> None:
    torch.manual_seed(0)
    model = make_generator(vocab_size=process.vocab_size)
    problem = oracle.Problem(process, *(process.sample(16, torch.Generator()) for _ in range(3)))
    fake = oracle.draw(model, 10_000, process)
    exact, constant, random, shuffled = (
        oracle.reward_of(arm, problem, settings)(model, fake).double() for arm in ("exact", *oracle.CONTROLS)
    )
    assert constant.unique().tolist() == [0]
    torch.testing.assert_close(shuffled.sort().values, exact.sort().values)
    assert random.std().item() == pytest.approx(exact.std().item(), rel=0.05)
    for control in (random, shuffled):
        assert abs(torch.corrcoef(torch.stack([exact, control]))[0, 1].item()) < 0.04


@pytest.mark.slow
def test_the_exact_reward_closes_a_gap_that_a_constant_reward_leaves(
    oracle: ModuleType, process: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that counts: the same steps on every machine.
    monkeypatch.setattr("time.process_time", functools.partial(next, itertools.count(0, 0.005)))
    settings = dataclasses.replace(
        settings, seconds=1.5, pool=512, steps=20, rounds_kept=10, batch=32, learning_rate=1e-2
    )
    tunes = process.sample(512, torch.Generator().manual_seed(1))
    problem = oracle.Problem(process, tunes, tunes, tunes)
    gaps = {}
    for arm in ("exact", "constant"):
        torch.manual_seed(0)
        model = make_generator(vocab_size=process.vocab_size)
        before = oracle.figures(model, problem)
        tuned, _ = oracle.distill(model, oracle.reward_of(arm, problem, settings), problem, settings)
        gaps[arm] = oracle.figures(tuned, problem)["kl_real"] / before["kl_real"]
    assert gaps["exact"] < 0.5 < 0.85 < gaps["constant"]


@pytest.mark.slow
def test_a_learned_reward_tells_tunes_from_noise_and_is_calibrated(arms: ModuleType, settings: Any) -> None:
    torch.manual_seed(0)
    settings = dataclasses.replace(settings, tunes=300, valid=200, batch=32, every=20)
    problem = arms.Problem.of(settings, 0)
    # Real tunes, but for their second half, which is that of others: without their form.
    fake = problem.process.sample(800, torch.Generator().manual_seed(5))
    half = 1 + 2 * problem.process.section_tokens
    fake[:, half:] = fake.roll(1, 0)[:, half:]
    reward = arms.LearnedReward(problem, settings, learning_rate=1e-2, patience=40)
    of_fake = reward(torch.nn.Identity(), fake)
    real = problem.process.sample(800, torch.Generator().manual_seed(6))
    for heard in (reward._logits, lambda tunes: torch.from_numpy(reward._fit_musical(fake)(tunes))):
        assert (heard(real)[:, None] > heard(fake)[None]).double().mean().item() > 0.75
    # In calibrated log-odds, exp(L) is a ratio of likelihoods: its mean over the samples is 1.
    assert of_fake.exp().mean().item() == pytest.approx(1, abs=0.3)


def test_the_likelihood_of_the_generator_has_as_much_say_as_it_should(
    arms: ModuleType, process: Any, settings: Any
) -> None:
    """Real tunes are as likely as the root of their likelihood under the generator, so the log-odds are minus half."""

    class Table(torch.nn.Module):
        """The next token depends on the last one alone."""

        def forward(self, ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=logits[ids])

    torch.manual_seed(0)
    logits, generator = torch.randn(process.vocab_size, process.vocab_size) * 2, Table()
    sequences = every_sequence(process)
    likelihoods = arms.score(generator, sequences)
    real, fake = (
        sequences[(power * likelihoods).softmax(0).multinomial(8000, replacement=True)] for power in (0.5, 1.0)
    )
    problem = arms.Problem(process, real[:0], real, real[:0])
    reward = arms.LearnedReward(problem, settings, discriminators=False, likelihood=True)
    of_fake = reward(generator, fake)
    drawn = arms.score(generator, fake)
    slope = torch.cov(torch.stack([drawn, of_fake]))[0, 1] / drawn.var()
    assert slope.item() == pytest.approx(-0.5, abs=0.05)
    assert of_fake.exp().mean().item() == pytest.approx(1, abs=0.05)


def test_tunes_are_learned_from_in_all_keys(arms: ModuleType, settings: Any) -> None:
    problem = arms.Problem.of(settings, 0)
    keys = problem.process.pitches
    assert (len(problem.train), len(problem.valid), len(problem.test)) == (16 * keys, 8 * keys, 16)
    torch.testing.assert_close(problem.train[16:32], problem.process.transpose(problem.train[:16], 1))


def test_maximum_likelihood_never_returns_worse_weights_than_it_started_from(
    oracle: ModuleType, settings: Any
) -> None:
    torch.manual_seed(0)
    problem = oracle.Problem.of(settings, 0)
    model = oracle.make_generator("small", problem.process)
    before = oracle.score(model, problem.valid).mean().item()
    noise = torch.randint(2, problem.process.vocab_size, (16, problem.process.length))
    high = dataclasses.replace(settings, learning_rate=1.0)
    after = oracle.fit(model, problem.valid, high, lambda: noise)
    assert oracle.score(after, problem.valid).mean().item() == pytest.approx(before)


@pytest.mark.slow
def test_runs_are_kept_and_continued(
    oracle: ModuleType, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setitem(oracle.TRAINED, "gradient", oracle.TRAINED["gradient"] | {"d_warmup_steps": 1})
    arms = ["plain/exact", "plain/gradient", "small/more", "small/constant"]
    done = oracle.measure(settings, arms, [0], 1, rows)
    # What an arm starts from is trained even if nobody asked for it.
    assert set(done) == {(arm, 0) for arm in (*arms, "plain/mle", "small/mle")}
    kept = rows.read_text()
    monkeypatch.setattr(oracle, "run", lambda *_, **__: pytest.fail("a run was made twice"))
    assert oracle.measure(settings, arms, [0], 1, rows) == done
    assert rows.read_text() == kept
    closed = 1 - done["small/constant", 0]["kl_real"] / done["small/more", 0]["kl_real"]
    assert oracle.summary("small/constant", done)["kl_real_closed"]["mean"] == pytest.approx(closed, abs=1e-4)
    assert "kl_real_closed" not in oracle.summary("plain/exact", done)  # its `more` was not run
