"""The discriminator's steps: what each stabiliser changes, on sequences that are easy to tell apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from midimamba.modeling.sampling import NEVER, Ending, Sequences
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.discriminator_update import REPLAY_BATCHES, DiscriminatorUpdate, r1_penalty
from midimamba.training.metrics import Measures
from support import make_discriminator
from trainer_support import PLAIN

COUNT, LENGTH = 8, 6


def make_update(folder: Path, kind: str = "cnn", ending: Ending = NEVER, **options: Any) -> DiscriminatorUpdate:
    common: dict[str, Any] = {"sequence_length": LENGTH, "per_device_train_batch_size": COUNT, "d_learning_rate": 1e-2}
    args = AdversarialConfig(**PLAIN | common | {"output_dir": str(folder), "use_cpu": True} | options)
    torch.manual_seed(0)
    discriminator = make_discriminator(kind, dropout=0.0)
    return DiscriminatorUpdate(discriminator, args, Accelerator(cpu=True), ending, held_out=real())


def numbers(measures: Measures) -> dict[str, float]:
    return {name: float(value) for name, value in measures.items()}


def real() -> Tensor:
    return torch.randint(1, 6, (COUNT, LENGTH))


def fake(count: int = COUNT) -> Tensor:
    return torch.randint(6, 11, (count, LENGTH))


def weights(update: DiscriminatorUpdate) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in update.discriminator.parameters()])


@pytest.mark.parametrize("kind", ["cnn", "mamba"])
def test_steps_teach_the_discriminator_and_report_the_accuracy_before(tmp_path: Path, kind: str) -> None:
    update = make_update(tmp_path, kind)
    measured = [numbers(update(real(), fake())) for _ in range(30)]
    assert measured[0]["d_accuracy"] < 0.9
    assert measured[-1]["d_accuracy"] == 1.0
    assert all({"d_loss", "d_grad_norm", "d_real_probability"} <= measures.keys() for measures in measured)
    assert measured[-1]["d_loss"] < measured[0]["d_loss"] / 2
    before = make_update(tmp_path, kind)
    music, samples = real(), fake()
    with torch.no_grad():
        logits = before.discriminator(torch.cat([music, samples])).logits[:, 0]
    right = (logits > 0) == (torch.arange(2 * COUNT) < COUNT)
    measures = numbers(before(music, samples))
    assert measures["d_accuracy"] == pytest.approx(right.float().mean().item())
    assert measures["d_real_probability"] == pytest.approx(logits[:COUNT].sigmoid().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "ending"),
    [
        ("cnn", {"r1_weight": 0.5}, NEVER),
        ("cnn", {"d_epochs": 2}, Ending(8)),
        ("mamba", {}, NEVER),
        ("mamba", {}, Ending(8)),
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_do_not_change_the_update(
    tmp_path: Path, kind: str, options: dict[str, Any], ending: Ending, size: int
) -> None:
    sequences = real(), fake()
    gradients, metrics = [], []
    for micro_batch_size in (COUNT, size):
        common: dict[str, Any] = {"micro_batch_size": micro_batch_size, "label_smoothing": 0.1}
        update = make_update(tmp_path, kind, ending, **common | options)
        update.discriminator.double()  # so that what is not rounding shows
        rows: list[int] = []
        update.discriminator.register_forward_hook(
            lambda _module, inputs, _output, rows=rows: rows.append(len(inputs[0]))
        )
        metrics.append(numbers(update(*sequences)))
        assert max(rows) == 2 * micro_batch_size
        assert sum(rows) == 2 * COUNT * update.args.d_epochs
        gradients.append([parameter.grad for parameter in update.discriminator.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=0)
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-7)


def test_epochs_are_passes_over_the_same_sequences(tmp_path: Path) -> None:
    one, three = make_update(tmp_path), make_update(tmp_path, d_epochs=3)
    sequences = real(), fake()
    alone = [numbers(one(*sequences)) for _ in range(3)]
    together = numbers(three(*sequences))
    assert torch.equal(weights(one), weights(three))
    for name in ("d_loss", "d_grad_norm"):
        assert together[name] == pytest.approx(sum(measures[name] for measures in alone) / 3)
    for name in ("d_accuracy", "d_real_probability"):
        assert together[name] == alone[0][name]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_bounds_the_confidence_in_real_music_alone(tmp_path: Path, smoothing: float) -> None:
    update = make_update(tmp_path, label_smoothing=smoothing, weight_decay=0.0)
    for _ in range(150):
        measures = update(real(), fake())
    of_fake = update.discriminator(fake()).logits.sigmoid().mean().item()
    assert float(measures["d_real_probability"]) == pytest.approx(1 - smoothing, abs=0.03)
    assert of_fake == pytest.approx(0.0, abs=0.03)


def test_the_penalty_is_the_squared_slope_of_the_logit(tmp_path: Path) -> None:
    """Against finite differences in every coordinate of the embeddings."""
    discriminator = make_discriminator(dropout=0.0).double()
    # Different tokens: of equal ones the maximum over time takes either, and has no slope.
    rows = torch.stack([torch.randperm(11)[:LENGTH] for _ in range(3)])
    table = discriminator.get_input_embeddings()
    embedded = table(rows).detach()

    def logits(inputs: Tensor) -> Tensor:
        handle = table.register_forward_hook(lambda *_: inputs)
        try:
            return discriminator(rows).logits[:, 0]
        finally:
            handle.remove()

    inputs = embedded.clone().requires_grad_()
    penalty = r1_penalty(logits(inputs)[:2], inputs)
    assert penalty.requires_grad
    squared, step = 0.0, 1e-5
    with torch.no_grad():
        for index in range(embedded[0].numel()):
            nudge = torch.zeros_like(embedded)
            nudge.view(3, -1)[:, index] = step
            slopes = (logits(embedded + nudge) - logits(embedded - nudge)) / (2 * step)
            squared += slopes[:2].square().sum().item()
    assert penalty.item() == pytest.approx(squared / 2, rel=1e-3)


def test_the_penalty_flattens_the_discriminator_at_real_music(tmp_path: Path) -> None:
    slopes = []
    for weight in (1e-9, 1.0):  # the measure is only there when the penalty is
        update = make_update(tmp_path, r1_weight=weight)
        torch.manual_seed(1)
        for _ in range(40):
            measures = update(real(), fake())
        slopes.append(float(measures["d_r1"]))
    assert slopes[1] < slopes[0] / 3


def test_the_penalty_needs_a_second_derivative(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"r1_weight is 1\.0, but needs a discriminator of kind 'cnn'"):
        make_update(tmp_path, "mamba", r1_weight=1.0)


@pytest.mark.parametrize("limit", [0.01, 0.0])
def test_the_gradient_has_a_limit_of_its_own(tmp_path: Path, limit: float) -> None:
    update = make_update(tmp_path, d_max_grad_norm=limit, max_grad_norm=1e-6)
    logged = float(update(real(), fake())["d_grad_norm"])
    gradients = [parameter.grad for parameter in update.discriminator.parameters()]
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients])).item()
    assert logged > 0.05
    assert norm == pytest.approx(min(logged, limit or logged), rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_weight_decay_is_that_of_the_generator(tmp_path: Path, decay: float) -> None:
    update = make_update(tmp_path, weight_decay=decay)
    assert {group["weight_decay"] for group in update.optimizer.param_groups} == {decay}


def test_a_discriminator_that_is_too_strong_waits(tmp_path: Path) -> None:
    update = make_update(tmp_path, d_max_accuracy=0.9, d_epochs=2)
    skipped = [numbers(update(real(), fake()))["d_skipped"] for _ in range(40)]
    assert skipped[0] == 0.0
    before = weights(update)
    measures = numbers(update(real(), fake()))
    assert (measures["d_accuracy"], measures["d_skipped"]) == (1.0, 1.0)
    assert "d_grad_norm" not in measures
    assert torch.equal(weights(update), before)
    # Now it is fooled: what it takes for real is generated, and it must learn again.
    measures = numbers(update(fake(), real()))
    assert measures["d_accuracy"] < 0.9
    assert measures["d_skipped"] == 0.0
    assert not torch.equal(weights(update), before)
    # Without a limit, no step is left out and nothing says so.
    assert "d_skipped" not in make_update(tmp_path)(real(), fake())


def test_the_memory_holds_a_number_of_batches(tmp_path: Path) -> None:
    assert make_update(tmp_path).replay.size == 0
    assert make_update(tmp_path, replay_fraction=0.25).replay.size == REPLAY_BATCHES * COUNT


def test_old_negatives_fill_up_a_step_and_are_judged_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = make_update(tmp_path, replay_fraction=0.25)
    assert update.num_replayed(COUNT) == 0  # nothing to remember yet
    first = torch.full((COUNT, LENGTH), 6)
    assert "d_replay_accuracy" not in update(real(), first)
    assert update.num_replayed(COUNT) == 2
    judged: list[tuple[Tensor, Tensor]] = []
    loss = DiscriminatorUpdate._loss

    def watched(
        self: DiscriminatorUpdate, sequences: Sequences, labels: Tensor, num_real: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        judged.append((sequences.ids, labels))
        return loss(self, sequences, labels, num_real)

    monkeypatch.setattr(DiscriminatorUpdate, "_loss", watched)
    second = torch.full((COUNT - 2, LENGTH), 7)
    measures = update(real(), second)
    ((sequences, labels),) = judged
    assert len(sequences) == 2 * COUNT
    assert torch.equal(sequences[COUNT:], torch.cat([second, first[:2]]))
    assert labels.tolist() == [1.0] * COUNT + [0.0] * COUNT
    assert float(measures["d_replay_accuracy"]) in (0.0, 1.0)
    assert update.num_replayed(COUNT) == 2
    assert len(update.replay) == 2 * COUNT - 2
