"""What `figure.py` makes of curves."""

import importlib
import math
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    return importlib.import_module("figure")


def row(*losses: float, seconds: float = 2.0) -> dict[str, Any]:
    return {"curve": [[10 * i, seconds * i, loss] for i, loss in enumerate(losses, 1)], "parameters": 5}


def test_a_loss_is_reached_between_two_points(figure: ModuleType) -> None:
    curve = row(4.0, 3.0, 2.0, 2.5)["curve"]
    assert figure.reached(curve, 2.25, 0) == pytest.approx(27.5)
    assert figure.reached(curve, 2.25, 1) == pytest.approx(5.5)
    assert figure.reached(curve, 3.0, 0) == 20  # a point itself
    assert figure.reached(curve, 9.0, 0) == 10  # no earlier point is known
    assert figure.reached(curve, 1.9, 0) is None


def test_factors_are_means_of_logarithms_over_seeds(figure: ModuleType) -> None:
    base = {seed: row(4.0, 3.0, 2.0, 1.0) for seed in (0, 1)}
    ours = {0: row(3.0, 1.0, 0.5, 0.5), 1: row(3.0, 2.0, 2.0, 1.0, seconds=1.0)}
    steps, seconds = (figure.factors(ours, base, column) for column in (0, 1))
    assert steps["factor"] == pytest.approx(math.sqrt(40 / 20 * 40 / 40), abs=1e-3)
    assert seconds["factor"] == pytest.approx(math.sqrt(8 / 4 * 8 / 4), abs=1e-3)
    assert steps["interval"][0] < 1 < steps["interval"][1]
    assert seconds["interval"] == [2.0, 2.0]
    assert figure.factors(base, base, 0) == {"factor": 1.0, "interval": [1.0, 1.0]}
    ours[1] = row(3.0, 2.0, 2.0, 1.5)  # never gets there
    assert figure.factors(ours, base, 0) is None


def test_every_layout_gets_the_rate_of_its_best_trial(figure: ModuleType) -> None:
    trial = figure.TRIAL_SEED
    rows = {
        ("mamba at 1e-3", trial): row(2.0),
        ("mamba at 3e-3", trial): row(1.0),
        ("mamba-mlp at 1e-3", trial): row(0.5),
        ("mamba-mlp at 3e-3", trial): row(0.6),
        ("mamba-mlp at 3e-3", 0): row(0.1),  # no trial
    }
    assert figure.best_rates(rows, ["mamba", "mamba-mlp"]) == {
        "mamba": "mamba at 3e-3",
        "mamba-mlp": "mamba-mlp at 1e-3",
    }
