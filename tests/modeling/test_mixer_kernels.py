"""The kernels around the scan of a Mamba mixer, against torch in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from midimamba.modeling import mixer_numba
from midimamba.modeling.mixer_numba import convolve, gate_outputs, to_steps
from midimamba.modeling.scan_numba import WIDTH
from support import gradients_of, make_generator

CHANNELS = WIDTH + 40
"""More than a task has."""


def of_convolution(window: Tensor, weight: Tensor, bias: Tensor | None, begins: Tensor | None) -> Tensor:
    """By the definition: every sum over the steps of the same document."""
    before = weight.shape[2] - 1
    time = window.shape[1] - before
    document = F.pad(torch.zeros(len(window), time) if begins is None else begins.cumsum(1), (before, 0))
    rows = []
    for t in range(before, before + time):
        total = torch.zeros_like(window[:, 0]) if bias is None else bias.expand_as(window[:, 0])
        for back in range(before + 1):
            same = (document[:, t - back] == document[:, t])[:, None]
            total = total + window[:, t - back] * weight[:, 0, before - back] * same
        rows.append(F.silu(total))
    return torch.stack(rows, 1)


def of_gate(outputs: Tensor, inputs: Tensor, D: Tensor, projected: Tensor) -> Tensor:
    return (outputs + inputs * D) * F.silu(projected[..., CHANNELS:])


def assert_same_with_gradients(
    ours: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """The result and the gradients of all inputs."""
    narrow = [each.detach().clone().requires_grad_() for each in inputs]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    result, expected = ours(*narrow), definition(*wide)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    incoming = torch.randn_like(result)
    result.backward(incoming)
    expected.backward(incoming.double())
    for mine, other in zip(narrow, wide, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("taps", [1, 2, 4, 9])  # 9 are more than there are steps
@pytest.mark.parametrize("has_begins", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_convolution_is_that_of_its_definition(taps: int, has_begins: bool, has_bias: bool) -> None:
    torch.manual_seed(0)
    begins = torch.rand(3, 7) < 0.3 if has_begins else None
    given = [
        torch.randn(3, taps - 1 + 7, CHANNELS),
        torch.randn(CHANNELS, 1, taps),
        *[torch.randn(CHANNELS)] * has_bias,
    ]

    def of_kernel(window: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolve(window, weight, bias, begins)

    def of_definition(window: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return of_convolution(window, weight, bias, begins)

    assert_same_with_gradients(of_kernel, of_definition, *given)


def test_a_gate_may_be_any_slice() -> None:
    """Rows are read where they lie, or copied if they are not equally far apart or their numbers not side by side."""
    torch.manual_seed(0)
    outputs, inputs, D = torch.randn(2, 5, CHANNELS), torch.randn(2, 5, CHANNELS), torch.randn(CHANNELS)
    whole, across = torch.randn(4, 9, 2 * CHANNELS), torch.randn(2, CHANNELS, 5).transpose(1, 2)
    for gate in (whole[1:3, 2:7, :CHANNELS], whole[:2, :5, 7 : 7 + CHANNELS], whole[::2, 4:, CHANNELS:], across):
        expected = gate_outputs(outputs, inputs, D, gate.contiguous())
        assert torch.equal(gate_outputs(outputs, inputs, D, gate), expected)


def test_steps_and_gate_are_those_of_their_definitions() -> None:
    torch.manual_seed(0)
    outputs, inputs, projected = (
        3 * torch.randn(2, 5, CHANNELS),
        torch.randn(2, 5, CHANNELS),
        torch.randn(2, 5, 2 * CHANNELS),
    )
    assert_same_with_gradients(
        to_steps, lambda rows, bias: F.softplus(rows + bias), 4 * outputs, torch.randn(CHANNELS)
    )
    assert_same_with_gradients(
        lambda outputs, inputs, D, projected: gate_outputs(outputs, inputs, D, projected[..., CHANNELS:]),
        of_gate,
        *(outputs, inputs, torch.randn(CHANNELS), 4 * projected),
    )


@pytest.mark.parametrize("use_conv_bias", [True, False])
@pytest.mark.parametrize("given", ["nothing", "padding", "documents"])
def test_a_pass_by_kernels_equals_a_pass_by_torch(
    use_conv_bias: bool, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 11, (3, 21), generator=torch.Generator().manual_seed(0))
    more: dict[str, Tensor] = {}
    if given == "padding":  # on the left, and on the right
        more["attention_mask"] = torch.ones_like(ids)
        more["attention_mask"][0, :6] = more["attention_mask"][1, -4:] = 0
    if given == "documents":
        more["seq_idx"] = torch.tensor([0] * 5 + [1] * 2 + [2] * 14, dtype=torch.int32).expand(3, -1)
    used: list[str] = []

    def watch(name: str, function: Callable[..., Tensor]) -> None:
        def call(*arguments: Any) -> Tensor:
            used.append(name)
            return function(*arguments)

        monkeypatch.setattr(mixer_numba, name, call)

    for name in ("convolve", "to_steps", "gate_outputs"):
        watch(name, getattr(mixer_numba, name))
    found = []
    for backend, dtype in (("numba", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("MIDIMAMBA_SCAN", backend)
        model = make_generator(use_conv_bias=use_conv_bias, hidden_size=144)
        model.to(dtype)  # type: ignore[arg-type]  # transformers annotates it wrongly
        loss = model(input_ids=ids, labels=ids, **more).loss
        loss.backward()
        found.append([loss.detach().double(), *(gradient.double() for gradient in gradients_of(model))])
    assert used == ["convolve", "to_steps", "gate_outputs"] * 2  # of two layers, and not in float64
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_changes_nothing() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            projected = torch.randn(2, 33, 2 * CHANNELS, generator=torch.Generator().manual_seed(1)).requires_grad_()
            weight, bias = torch.ones(CHANNELS, 1, 4, requires_grad=True), torch.zeros(CHANNELS, requires_grad=True)
            channels, gate = projected.chunk(2, -1)
            inputs = convolve(F.pad(channels, (0, 0, 3, 0)), weight, bias, None)
            gate_outputs(to_steps(inputs, bias), inputs, bias, gate).sum().backward()
            found.append([projected.grad, weight.grad, bias.grad])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)


def test_a_second_derivative_is_refused() -> None:
    channels = torch.randn(1, 3, 4, requires_grad=True)
    result = convolve(channels, torch.randn(4, 1, 2), None, None)
    (gradient,) = torch.autograd.grad(result.sum(), channels, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        gradient.sum().backward()
