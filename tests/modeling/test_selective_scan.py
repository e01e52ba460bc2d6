"""The chunked scan against the obvious loop, in values and in all gradients."""

import pytest
import torch
from torch import Tensor

from midimamba.modeling.selective_scan import (
    CHUNK,
    selective_scan,
    selective_scan_reference,
    selective_step_,
)


def make_inputs(batch: int, time: int, channels: int, state: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=dtype)

    return [
        normal(batch, time, channels),
        uniform(batch, time, channels) * 0.3 + 0.01,
        -uniform(channels, state) * 3 - 0.1,
        normal(batch, time, state),
        normal(batch, time, state),
        normal(batch, state, channels),
    ]


# Rows with resets at the first step, in succession and on both sides of a chunk's border; elsewhere; and nowhere.
RESETS = ((0, 3, 4, 5, CHUNK - 1, CHUNK), (1, CHUNK + 1, 70), ())


def make_reset(batch: int, time: int) -> Tensor:
    return torch.tensor([[t in times for t in range(time)] for times in RESETS[:batch]])


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 77])
def test_equals_the_reference_in_values_and_gradients(
    batch: int, time: int, with_state: bool, with_reset: bool
) -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(batch, time, 5, 3)]
    arguments = inputs if with_state else inputs[:5]
    reset = make_reset(batch, time) if with_reset else None
    results = [scan(*arguments, reset=reset) for scan in (selective_scan, selective_scan_reference)]
    gradients = []
    for output, state in results:
        weights = torch.linspace(0.5, 1.5, output.numel()).view_as(output)
        loss = (output * weights).sum() + state.sin().sum()
        gradients.append(torch.autograd.grad(loss, arguments))
    for ours, reference in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    for ours, reference in zip(*gradients, strict=True):
        scale = reference.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, reference / scale, atol=1e-5, rtol=0)


def test_gradients_equal_finite_differences() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, CHUNK + 3, 2, 2, torch.float64)]
    assert torch.autograd.gradcheck(selective_scan, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(selective_scan, (*inputs, make_reset(2, CHUNK + 3)), fast_mode=True)


def test_gradient_of_the_final_state_alone() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 40, 3, 2, torch.float64)]
    ours, reference = (
        torch.autograd.grad(scan(*inputs)[1].square().sum(), inputs, allow_unused=True)
        for scan in (selective_scan, selective_scan_reference)
    )
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


def test_a_split_sequence_equals_the_whole_when_the_state_is_handed_on() -> None:
    x, dt, A, B, C, state = make_inputs(2, 50, 4, 3, torch.float64)
    whole, final = selective_scan(x, dt, A, B, C, state)
    parts = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        output, state = selective_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("begin", [1, CHUNK - 1, CHUNK, CHUNK + 1, 49])
def test_a_reset_sequence_equals_two_sequences(begin: int) -> None:
    x, dt, A, B, C, state = make_inputs(2, 50, 4, 3, torch.float64)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[:, begin] = True
    output, final = selective_scan(x, dt, A, B, C, state, reset)
    head, _ = selective_scan(x[:, :begin], dt[:, :begin], A, B[:, :begin], C[:, :begin], state)
    tail, last = selective_scan(x[:, begin:], dt[:, begin:], A, B[:, begin:], C[:, begin:])
    torch.testing.assert_close(output, torch.cat([head, tail], 1))
    torch.testing.assert_close(final, last)


def test_a_reset_at_the_first_step_drops_the_initial_state() -> None:
    *inputs, state = (tensor.requires_grad_() for tensor in make_inputs(2, 5, 4, 3))
    reset = torch.tensor([[True] + 4 * [False], 5 * [False]])
    output, _ = selective_scan(*inputs, state, reset)
    assert torch.equal(output[0], selective_scan(*inputs)[0][0])
    (gradient,) = torch.autograd.grad(output.sum(), state)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()


def test_a_step_equals_a_scan_of_one_and_updates_the_state_in_place() -> None:
    x, dt, A, B, C, state = make_inputs(3, 1, 4, 3)
    output, final = selective_scan(x, dt, A, B, C, state)
    stepped = selective_step_(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    torch.testing.assert_close(stepped, output[:, 0])
    torch.testing.assert_close(state, final)


def test_the_initial_state_is_left_as_it_is() -> None:
    *inputs, state = make_inputs(2, 40, 4, 3)
    before = state.clone()
    selective_scan(*inputs, state)
    assert torch.equal(state, before)


def test_a_second_derivative_is_refused() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 3, 2, 2)]
    (gradient,) = torch.autograd.grad(selective_scan(*inputs)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_kept_for_backward_is_inputs_plus_one_state_a_chunk() -> None:
    batch, time, channels, state = 2, 8 * CHUNK, 16, 8
    inputs = [tensor.requires_grad_() for tensor in make_inputs(batch, time, channels, state)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(*inputs)
    inputs_without_state = sum(tensor.numel() for tensor in inputs[:5])
    assert sum(kept) == inputs_without_state + (time // CHUNK) * batch * state * channels
