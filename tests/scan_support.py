"""Inputs for the tests of the scan, and the comparison of a backend with the reference."""

import torch
from torch import Tensor

from midimamba.modeling.selective_scan import selective_scan


def make_inputs(batch: int, time: int, channels: int, state: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """`x`, `dt`, `A`, `B`, `C` and an initial state, all leaves of the graph."""
    generator = torch.Generator().manual_seed(batch * 1000 + time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = [
        normal(batch, time, channels),
        uniform(batch, time, channels) * 0.3 + 0.01,
        -uniform(channels, state) * 3 - 0.1,
        normal(batch, time, state),
        normal(batch, time, state),
        normal(batch, state, channels),
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in inputs]


def run(
    backend: str, inputs: list[Tensor], reset: Tensor | None = None, final_only: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, final state and all gradients of a loss in which every element of both (or of the state) counts."""
    output, state = selective_scan(*inputs, reset=reset, backend=backend)
    loss = state.sin().sum()
    if not final_only:
        weights = torch.arange(output.numel(), device=output.device) % 7 / 4 - 0.75  # exact in every type
        loss = loss + (output * weights.view_as(output)).sum()
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return output.detach(), state.detach(), list(gradients)


def assert_equals_reference(
    backend: str, inputs: list[Tensor], reset: Tensor | None = None, final_only: bool = False, rounding: float = 0
) -> None:
    """Values to 1e-5 and gradients to 1e-5 of their largest, or to what the rounding of the inputs' type allows."""
    output, state, gradients = run(backend, inputs, reset, final_only)
    expected_output, expected_state, expected_gradients = run("reference", inputs, reset, final_only)
    torch.testing.assert_close(state, expected_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, expected_output, atol=1e-5, rtol=max(1e-5, rounding))
    for name, ours, theirs in zip(("x", "dt", "A", "B", "C", "state"), gradients, expected_gradients, strict=False):
        scale = theirs.abs().max().clamp(min=1)
        # A mapping puts the name into the message.
        torch.testing.assert_close({name: ours / scale}, {name: theirs / scale}, atol=1e-5, rtol=rounding)
