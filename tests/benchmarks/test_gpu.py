"""What `gpu.py` measures, at tiny size and without what a GPU alone has."""

import argparse
import importlib
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return importlib.import_module("gpu")


@pytest.fixture
def tiny(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    options = "--device cpu --shape 1 16 --batch 1 2 --tokens 12"
    monkeypatch.setattr("sys.argv", ["gpu.py", *options.split()])
    monkeypatch.setitem(gpu.SHAPES, "10", (1, 16))
    args: argparse.Namespace = gpu.parse()
    args.repeats, args.parameters, args.length = 1, ["10"], [24]
    return args


def test_decoding_is_measured_for_every_batch(gpu: ModuleType, tiny: argparse.Namespace) -> None:
    rows = gpu.decoding(tiny)
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(set(row["ms_per_token"]) == {"ours", "transformers"} for row in rows)
    assert all(value > 0 for row in rows for value in row["ms_per_token"].values())


@pytest.mark.slow
def test_an_update_is_measured(gpu: ModuleType, tiny: argparse.Namespace) -> None:
    (row,) = gpu.update(tiny)
    assert (row["million_parameters"], row["length"], row["peak_mb"]) == (10, 24, None)
    assert row["seconds"] > 0


def test_bfloat16_is_near_float32_but_not_the_same(gpu: ModuleType, tiny: argparse.Namespace) -> None:
    found = gpu.bfloat16(tiny)
    assert 0 < found["loss_difference"] < 0.01
    assert 0.99 < found["gradient_cosine"] < 1
