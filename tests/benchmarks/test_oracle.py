"""SeqGAN's synthetic benchmark: an oracle that can be enumerated, generators at a temperature, runs that continue."""

import dataclasses
import importlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from midimamba.modeling.policy import Policy
from support import make_generator

VOCABULARY, LENGTH = 4, 3


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    return importlib.import_module("oracle")


@pytest.fixture(scope="module")
def models(oracle: ModuleType) -> ModuleType:
    return importlib.import_module("oracle_models")


@pytest.fixture
def settings(oracle: ModuleType) -> Any:
    return oracle.Settings(
        vocab_size=30,
        hidden_size=4,
        length=5,
        samples=40,
        epochs=2,
        adversarial={
            **{
                "max_steps": 2,
                "num_rollouts": 2,
                "rollout_positions": 2,
                "d_warmup_steps": 1,
                "d_steps": 1,
                "d_epochs": 1,
            },
            **{"d_filter_sizes": [1, 2], "d_num_filters": [4, 4], "per_device_train_batch_size": 8},
        },
        inverse_temperatures=[1.0, 2.0],
    )


def every_sequence() -> Tensor:
    """All sequences that follow the start token."""
    rows = [(0, *tokens) for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH)]
    return torch.tensor(rows)


def probabilities(model: torch.nn.Module, models: ModuleType, sequences: Tensor, factor: float) -> Tensor:
    """Of each sequence, by a softmax over the logits of one prefix after the other."""
    result = torch.ones(len(sequences), dtype=torch.float64)
    with torch.no_grad():
        for time in range(1, sequences.shape[1]):
            logits = logits_of(model, sequences[:, :time])[:, -1].double()
            weights = torch.exp(factor * logits)
            result *= (weights / weights.sum(-1, keepdim=True)).gather(1, sequences[:, time : time + 1])[:, 0]
    return result


def logits_of(model: torch.nn.Module, sequences: torch.Tensor) -> torch.Tensor:
    return model(sequences).logits


def make_models(models: ModuleType) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [models.LSTMLanguageModel.of_sizes(VOCABULARY, 3, 5), make_generator(vocab_size=VOCABULARY)]


def write_oracle(file: Path) -> dict[str, np.ndarray]:
    """A file of random parameters: what is in it."""
    numbers, hidden, width = np.random.default_rng(0), 3, 2
    arrays = {"embedding": numbers.normal(size=(VOCABULARY, width)), "bo": numbers.normal(size=VOCABULARY)}
    arrays["Wo"] = numbers.normal(size=(hidden, VOCABULARY))
    for gate in ("i", "f", "og", "c"):
        arrays[f"W{gate}"] = numbers.normal(size=(width, hidden))
        arrays[f"U{gate}"] = numbers.normal(size=(hidden, hidden))
        arrays[f"b{gate}"] = numbers.normal(size=hidden)
    named: dict[str, Any] = arrays  # numpy types only its own options
    np.savez(file, **named)
    return arrays


def test_the_oracle_computes_what_the_original_file_means(models: ModuleType, tmp_path: Path) -> None:
    arrays, hidden = write_oracle(tmp_path / "oracle.npz"), 3

    def nll(row: list[int]) -> float:
        h, c, total = np.zeros(hidden), np.zeros(hidden), 0.0
        for token, following in itertools.pairwise(row):
            x = arrays["embedding"][token]
            i, f, o, new = (x @ arrays[f"W{g}"] + h @ arrays[f"U{g}"] + arrays[f"b{g}"] for g in ("i", "f", "og", "c"))
            c = c / (1 + np.exp(-f)) + np.tanh(new) / (1 + np.exp(-i))
            h = np.tanh(c) / (1 + np.exp(-o))
            logits = h @ arrays["Wo"] + arrays["bo"]
            total += np.log(np.exp(logits).sum()) - logits[following]
        return total / (len(row) - 1)

    sequences = every_sequence()
    expected = np.mean([nll(row) for row in sequences.tolist()])
    assert models.Oracle.load(tmp_path / "oracle.npz").nll(sequences) == pytest.approx(expected, abs=1e-5)


def test_an_lstm_is_a_policy_with_an_exact_state(models: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.LSTMLanguageModel.of_sizes(VOCABULARY, 3, 5).eval()
    is_policy = isinstance(model, Policy)  # asserted at once, it would narrow the type
    assert is_policy
    sequences = every_sequence()[::7]
    expected = logits_of(model, sequences)
    with torch.no_grad():
        state = model.make_state(len(sequences))
        for part, stop in zip(sequences.split([1, 2, 1], dim=1), (1, 3, 4), strict=True):
            torch.testing.assert_close(model.next_logits(part, state), expected[:, stop - 1])
        state = model.make_state(len(sequences))
        model.next_logits(sequences[:, :2], state)
        forks = model.make_state(0)
        for copies in (2, 1):
            forks.append(state.select(torch.arange(len(sequences)).repeat_interleave(copies)))
        rows = torch.cat([sequences.repeat_interleave(2, 0), sequences])
        torch.testing.assert_close(model.next_logits(rows[:, 2:], forks), logits_of(model, rows)[:, -1])
        assert forks.nbytes == 3 * state.nbytes
    model.save_pretrained(tmp_path)
    loaded = models.LSTMLanguageModel.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, sequences), expected)


def test_the_oracle_scores_its_own_samples_at_its_entropy(models: ModuleType) -> None:
    oracle = models.Oracle.seeded(VOCABULARY, 3)
    chances = probabilities(oracle, models, every_sequence(), 1.0)
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    entropy = -(chances * chances.log()).sum().item() / LENGTH
    samples = oracle.draw(20_000, LENGTH, seed=1)
    assert oracle.nll(samples) == pytest.approx(entropy, abs=0.02)
    assert torch.equal(samples, oracle.draw(20_000, LENGTH, seed=1))
    assert not torch.equal(samples, oracle.draw(20_000, LENGTH, seed=2))


def test_tempered_likelihood_is_a_softmax_of_multiplied_logits(models: ModuleType) -> None:
    sequences = every_sequence()
    factors = (0.5, 1.0, 2.5)
    for model in make_models(models):
        expected = [
            -probabilities(model, models, sequences, factor).log().mean().item() / LENGTH for factor in factors
        ]
        assert models.tempered_nll(model, sequences, factors) == pytest.approx(expected, abs=1e-5)


def test_samples_come_from_the_tempered_distribution(models: ModuleType) -> None:
    sequences, count = every_sequence(), 20_000
    for model in make_models(models):
        torch.manual_seed(0)
        drawn = models.draw_sequences(model, count, LENGTH, inverse_temperature=2.0)
        assert (drawn[:, 0] == models.START).all()
        base = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
        frequencies = torch.bincount((drawn[:, 1:] * base).sum(1), minlength=len(sequences)) / count
        expected = probabilities(model, models, sequences, 2.0)
        assert (frequencies - expected).abs().max().item() < 4 * (expected.max().item() / count) ** 0.5


def test_sharpening_games_both_likelihoods_but_not_the_divergence(models: ModuleType) -> None:
    sequences = every_sequence()
    oracle = models.Oracle.seeded(VOCABULARY, 3)
    true, sharp = (probabilities(oracle, models, sequences, factor) for factor in (1.0, 1.5))
    expected = ((sharp - true) * (sharp / true).log()).sum().item() / LENGTH
    torch.manual_seed(0)
    at_one, sharpened = models.sweep(oracle, oracle, oracle.draw(20_000, LENGTH, seed=1), 20_000, [1.0, 1.5])
    assert sharpened["nll_oracle"] < at_one["nll_oracle"]
    assert sharpened["nll_oracle"] + sharpened["nll_test"] < at_one["nll_oracle"] + at_one["nll_test"]
    assert at_one["divergence"] == pytest.approx(0, abs=1e-6)
    assert sharpened["divergence"] == pytest.approx(expected, abs=0.02)


def test_the_loss_of_maximum_likelihood_has_the_gradients_of_cross_entropy(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "ROWS", 7)
    sequences = every_sequence()[::5]
    for model in make_models(models):
        logits = logits_of(model, sequences[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        loss = models.likelihood_loss(model, sequences)
        torch.testing.assert_close(loss, expected)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(3 * loss, parameters)
        torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, parameters), rtol=1e-4, atol=1e-6)


def test_dropping_changes_the_loss_but_nothing_else(models: ModuleType) -> None:
    sequences = every_sequence()
    for model in make_models(models):
        plain = logits_of(model, sequences)
        losses = {models.likelihood_loss(model, sequences, rate).item() for rate in (0.0, 0.5, 0.5)}
        assert len(losses) == 3
        assert torch.equal(logits_of(model, sequences), plain)


def test_fitting_continues_from_the_best_weights_at_lower_rates(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = models.Oracle.seeded(30, 4).draw(20, 5, 1)
    recipe = models.Recipe("lstm", 16, 0.0, learning_rate=0.05, weight_decay=0.0, batch_size=20)
    model = recipe.build(30)
    # Every epoch is one batch: the weights before and after it, and the NLL that we pretend they have.
    before, after, rates = [], [], []
    nlls = iter([5.0, 4.0, 6.0, 6.0, 3.0, 6.0, 6.0, 6.0, 6.0])
    loss = models.likelihood_loss

    class Optimizer(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"] / recipe.learning_rate)
            return super().step(closure)

    def weights() -> Tensor:
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def likelihood_loss(*args: object) -> Tensor:
        before.append(weights())
        return loss(*args)

    def tempered_nll(*_: object) -> list[float]:
        after.append(weights())
        return [next(nlls)]

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    monkeypatch.setattr(models, "likelihood_loss", likelihood_loss)
    monkeypatch.setattr(models, "tempered_nll", tempered_nll)
    assert models.fit(model, recipe, sequences, sequences, epochs=30, patience=1) == 5
    assert rates == pytest.approx([1] * 4 + [1 / 3] * 3 + [1 / 9] * 2)
    origins = [1, 2, 3, 2, 5, 6, 5, 8]  # the epoch whose weights epochs 2, 3, … started from
    for started, epoch in zip(before[1:], origins, strict=True):
        assert torch.equal(started, after[epoch - 1])
    assert torch.equal(weights(), after[4])


def test_fitting_without_early_stopping_overfits(models: ModuleType) -> None:
    train, valid = (models.Oracle.seeded(30, 4).draw(60, 5, seed) for seed in (1, 2))
    recipe = models.Recipe("lstm", 16, 0.0, learning_rate=0.05, weight_decay=0.0, batch_size=20)
    torch.manual_seed(0)
    model = recipe.build(30)
    epochs = models.fit(model, recipe, train, valid, epochs=30, patience=2)
    assert epochs < 30
    overfitting = dataclasses.replace(recipe, stops_early=False)
    torch.manual_seed(0)
    paper = overfitting.build(30)
    assert models.fit(paper, overfitting, train, valid, epochs=30, patience=0) == 30
    assert models.tempered_nll(paper, valid, (1.0,)) > models.tempered_nll(model, valid, (1.0,))


def test_runs_are_kept_and_continued(
    oracle: ModuleType, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    done = oracle.measure(settings, ["paper", "stable-constant", "mle"], 1, 1, rows)
    # What an adversarial arm starts from is trained even if nobody asked for it. The oracle is always measured.
    arms = {"oracle", "mle", "mle-lstm-paper", "paper", "stable-constant"}
    assert set(done) == {(arm, 0) for arm in arms}
    assert done["paper", 0]["training"]["steps"] == done["stable-constant", 0]["training"]["steps"] == 2
    kept = rows.read_text()
    monkeypatch.setattr(oracle, "run", lambda *_: pytest.fail("a run was made twice"))
    assert oracle.measure(settings, ["mle", "paper", "mle-lstm-paper"], 1, 1, rows) == done
    assert rows.read_text() == kept
    assert not oracle.rows_done(rows, dataclasses.asdict(oracle.QUICK))

    result = oracle.summary([done["paper", 0]], done)
    sums = {arm: min(p["nll_oracle"] + p["nll_test"] for p in done[arm, 0]["sweep"]) for arm in arms}
    assert result["best_sum"] == [round(sums["paper"], 4), 0.0]
    shift = {"mean": round(sums["paper"] - sums["mle-lstm-paper"], 4), "interval": None}
    assert result["best_sum_minus_origin"] == shift
    assert "best_sum_minus_origin" not in oracle.summary([done["mle", 0]], done)
    oracle.plot({"paper": [done["paper", 0]]}, tmp_path / "frontier.png", published=True)
    assert (tmp_path / "frontier.png").stat().st_size > 0


def test_runs_of_an_oracle_are_found_wherever_its_file_lies(
    oracle: ModuleType, models: ModuleType, settings: Any, tmp_path: Path
) -> None:
    file, rows = tmp_path / "oracle.npz", tmp_path / "rows.jsonl"
    write_oracle(file)
    named = dataclasses.replace(settings, oracle=file.name)
    done = oracle.measure(named, [], 0, 1, rows, file)
    loaded = models.Oracle.load(file)
    expected = loaded.nll(loaded.draw(named.samples, named.length, oracle.TEST_SEED))
    assert done["oracle", 0]["sweep"][0]["nll_test"] == pytest.approx(expected, abs=1e-6)
    assert oracle.measure(named, [], 0, 1, rows, tmp_path / "elsewhere" / file.name) == done


def test_controls_differ_from_their_recipe_in_the_reward_alone(oracle: ModuleType) -> None:
    for control, recipe in (("constant", "paper"), ("random", "paper"), ("stable-random", "stable")):
        mine, theirs = oracle.ADVERSARIAL[control], oracle.ADVERSARIAL[recipe]
        assert (mine.origin, mine.recipe) == (theirs.origin, theirs.recipe)
        changed = {key for key, value in mine.options.items() if theirs.options.get(key) != value}
        of_the_generator = {key for key in changed if not key.startswith("d_")} - {"estimator"}
        assert of_the_generator == {"reward"}
