"""Figures between two logs: their averages, and that they are fetched together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from midimamba.training.guarded_trainer import GuardedTrainer
from midimamba.training.metrics import Metrics, RunningMeans, weighted_mean
from support import make_generator
from trainer_support import ALL_STABILISERS, LENGTH, make_blocks, make_trainer


def test_averages_are_weighted_and_the_largest_is_kept() -> None:
    metrics = Metrics()
    metrics.add({"loss": torch.tensor(1.0), "ratio_max": torch.tensor(5.0), "rate": 2.0}, weight=3.0)
    metrics.add({"loss": torch.tensor(5.0), "ratio_max": torch.tensor(-7.0)})
    expected = {"loss": 2.0, "ratio_max": 5.0, "rate": 2.0}
    assert metrics.averages() == expected
    assert metrics.averages() == expected  # asking changes nothing
    metrics.add({"loss": 8.0, "ratio_max": 9.0})
    assert metrics.averages() == {"loss": 3.2, "ratio_max": 9.0, "rate": 2.0}
    metrics.add({"loss": torch.tensor(1.0)})
    metrics.clear()
    assert metrics.averages() == {}


def test_a_largest_figure_may_be_negative() -> None:
    metrics = Metrics()
    metrics.add({"log_ratio_max": torch.tensor(-3.0)})
    metrics.add({"log_ratio_max": -2.0})
    assert metrics.averages() == {"log_ratio_max": -2.0}
    parts: list[tuple[dict[str, torch.Tensor], dict[str, float]]] = [
        ({"log_ratio_max": torch.tensor(value)}, {}) for value in (-3.0, -2.0)
    ]
    assert weighted_mean(parts)["log_ratio_max"] == -2.0


def test_each_figure_counts_by_what_it_is_a_mean_over() -> None:
    first = {"a": torch.tensor(1.0), "c": torch.tensor(1.0)}, {"a": torch.tensor(6)}
    second = {"a": torch.tensor(5.0), "b": torch.tensor(4.0), "c": torch.tensor(2.0)}, {"a": torch.tensor(2)}
    expected = {"a": torch.tensor(2.0), "b": torch.tensor(4.0), "c": torch.tensor(1.5)}
    assert weighted_mean([first, second]) == expected


def test_running_means_are_over_the_steps_that_have_a_figure() -> None:
    found, first = RunningMeans(), {"a": torch.tensor(1.0), "b_max": torch.tensor(-3.0)}
    found.add(first)
    found.add({"a": torch.tensor(4.0, requires_grad=True), "b_max": torch.tensor(-2.0), "c": torch.tensor(5.0)})
    found.add({"a": torch.tensor(4.0), "b_max": torch.tensor(-4.0)})
    assert found.means() == {"a": torch.tensor(3.0), "b_max": torch.tensor(-2.0), "c": torch.tensor(5.0)}
    assert first == {"a": torch.tensor(1.0), "b_max": torch.tensor(-3.0)}  # they are not added up in the caller's


def test_all_figures_are_fetched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    for value in range(3):
        metrics.add({"a": torch.tensor(float(value)), "b_max": torch.tensor(float(value))})
    calls: list[torch.Size] = []
    tolist = torch.Tensor.tolist

    def watched(tensor: torch.Tensor) -> Any:
        calls.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", watched)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("one figure was fetched alone"))
    assert metrics.fetch(torch.tensor(7), torch.tensor(True)) == [7.0, 1.0]
    assert calls == [(8,)]
    assert metrics.fetch() == []
    assert metrics.averages() == {"a": 1.0, "b_max": 2.0}
    assert calls == [(8,)]


def test_figures_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    """Four sequences in micro-batches of three are one of three and one of one: their means have to be weighted, by
    sequences, by actions where sequences end early, and by targets where pieces begin inside blocks."""
    averages = []
    torch.manual_seed(5)
    blocks = torch.randint(3, 11, (4, LENGTH))
    blocks[0, 3] = blocks[1, 5] = 1
    for size in (3, 4):
        options: dict[str, Any] = ALL_STABILISERS | {
            "estimator": "terminal",
            "replay_fraction": 0.0,
            "learning_rate": 1e-3,
        }
        ending = make_generator(eos_token_id=4)
        trainer = make_trainer(tmp_path, micro_batch_size=size, generator=ending, **options)
        trainer.create_optimizer()
        # Dropout would draw other numbers for other micro-batches.
        for module in trainer.discriminator.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        trainer.train_discriminator()
        trainer._train_generator(trainer.model, blocks)
        averages.append(trainer.metrics.averages())
    assert averages[0].keys() == averages[1].keys()
    expected = {"policy_loss", "entropy", "kl", "mle_loss", "policy_ratio_max", "clip_fraction", "approx_kl", "d_r1"}
    assert expected <= averages[0].keys()
    assert averages[0] == pytest.approx(averages[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["cnn", "mamba"])
def test_a_generators_step_waits_for_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Figures are fetched at the end of a step. In between only the positions of roll-outs are needed as numbers."""
    options = {"r1_weight": 0.0} if kind == "mamba" else {}
    trainer = make_trainer(tmp_path, kind, **ALL_STABILISERS | options)
    trainer.create_optimizer()
    blocks = torch.tensor(make_blocks(4)["input_ids"])
    fetched: list[torch.dtype] = []
    tolist = torch.Tensor.tolist
    for name in ("item", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor: pytest.fail("a figure was fetched within the step"))

    def watched(tensor: torch.Tensor) -> Any:
        fetched.append(tensor.dtype)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", watched)
    trainer._train_generator(trainer.model, blocks)
    assert set(fetched) <= {torch.int64, torch.bool}


def test_a_finished_step_is_judged_by_one_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, **ALL_STABILISERS)
    finish, tolist, item = GuardedTrainer.finish_step, torch.Tensor.tolist, torch.Tensor.item
    fetches: list[list[int]] = []

    def counting(fetch: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def counted(tensor: torch.Tensor) -> Any:
            fetches[-1].append(tensor.numel())
            return fetch(tensor)

        return counted

    def watched(trainer: GuardedTrainer, started: float, drawn: int) -> None:
        fetches.append([])
        with monkeypatch.context() as patch:
            for name, fetch in (("tolist", tolist), ("item", item)):
                patch.setattr(torch.Tensor, name, counting(fetch))
            finish(trainer, started, drawn)

    monkeypatch.setattr(GuardedTrainer, "finish_step", watched)
    trainer.train()
    assert [len(counts) for counts in fetches] == [1] * 3
    assert min(counts[0] for counts in fetches) > 20
