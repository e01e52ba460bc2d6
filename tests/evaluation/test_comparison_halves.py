"""Comparing samples with halves of the reference, several times."""

import math
import statistics

import numpy as np
import pytest

from midimamba.evaluation import comparison_halves
from midimamba.evaluation.comparison_halves import Figure, Music, compare_halves
from midimamba.evaluation.estimates import UNDEFINED, Estimate
from midimamba.evaluation.features import NUMBERS


def music(pieces: int, seed: int, shift: float = 0.0, tokens: int = 0) -> Music:
    """Pieces whose numbers are independent and normal, with the given number of random tokens each."""
    random = np.random.default_rng(seed)
    features = {name: random.normal(shift, size=(pieces, 1)) for name in NUMBERS}
    return Music(features, random.integers(0, 20, size=(pieces, tokens)).tolist())


@pytest.fixture
def no_feature_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not read the figures of single features, which take most of the time."""
    monkeypatch.setattr(comparison_halves, "_feature_figures", lambda *_: {})


@pytest.mark.usefixtures("no_feature_figures")
def test_samples_and_both_halves_have_one_size_and_no_piece_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    inner = comparison_halves._piece_figures

    def watched(samples: Music, first: Music, second: Music, seed: int) -> dict[str, Figure]:
        met.append([[tuple(ids) for ids in each.ids] for each in (samples, first, second)])
        return inner(samples, first, second, seed)

    monkeypatch.setattr(comparison_halves, "_piece_figures", watched)
    samples, reference = music(30, 0, tokens=9), music(15, 1, tokens=9)
    compare_halves(samples, reference, vocab_size=20, length=100)
    assert len(met) == comparison_halves.HALVINGS
    assert len({str(sets) for sets in met}) == comparison_halves.HALVINGS
    for ours, first, second in met:
        assert len(set(ours)) == len(set(first)) == len(set(second)) == 7
        assert set(ours) <= set(map(tuple, samples.ids))
        assert set(first) | set(second) <= set(map(tuple, reference.ids))
        assert not set(first) & set(second)


@pytest.mark.usefixtures("no_feature_figures")
def test_figures_are_means_over_halvings(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([(0.2, 0.1), (0.4, 0.1), (math.nan, math.nan), (0.6, 0.4), (0.8, 0.4)])

    def figures(*_: object) -> dict[str, Figure]:
        value, floor = next(drawn)
        figure = Figure(Estimate(value, value - 0.1, value + 0.3), floor)
        return {"known": figure, "a_p_value": figure, "unknown": Figure(Estimate(math.nan, math.nan, math.nan))}

    monkeypatch.setattr(comparison_halves, "_piece_figures", figures)
    _, means = compare_halves(music(10, 0), music(20, 1), vocab_size=20, length=4)
    known = means["known"]
    assert (known.estimate.value, known.estimate.low, known.estimate.high) == pytest.approx((0.5, 0.4, 0.8))
    assert known.floor == pytest.approx(0.25)
    # Twice the mean, and at most 1.
    assert (means["a_p_value"].estimate.value, means["a_p_value"].floor) == pytest.approx((1.0, 0.5))
    assert math.isnan(means["unknown"].estimate.value)
    assert math.isnan(means["unknown"].floor)


@pytest.mark.usefixtures("no_feature_figures")
def test_more_halvings_depend_less_on_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = music(60, 0, shift=0.5), music(40, 1)
    monkeypatch.setattr(comparison_halves, "frechet_distance", lambda *_, **__: UNDEFINED)

    def spread(halvings: int) -> float:
        monkeypatch.setattr(comparison_halves, "HALVINGS", halvings)
        found = [compare_halves(samples, reference, 20, 4, seed)[1]["classifier_features"] for seed in range(8)]
        return statistics.stdev(figure.estimate.value for figure in found)

    assert spread(5) < spread(1)


@pytest.mark.usefixtures("quick_comparison")
def test_the_same_seed_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_halves, "HALVINGS", 2)
    samples, reference = music(12, 0, tokens=30), music(24, 1, tokens=30)
    features, figures = compare_halves(samples, reference, vocab_size=20, length=30, seed=3)
    again = compare_halves(samples, reference, vocab_size=20, length=30, seed=3)
    assert str((features, figures)) == str(again)  # NaN is not equal to itself
    assert set(features) == set(NUMBERS)
    assert {"frechet_distance", "classifier_features", "classifier_tokens", "self_bleu_4"} <= set(figures)
