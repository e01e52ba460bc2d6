"""One token onto the state of a Mamba mixer, as two kernels for the processor, compiled by Numba.

The matrix products between them are torch's. The kernels do all the rest of a mixer, so that a state is read and
written once per token.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .numba_common import LOG2_E, exp2, in_parallel, kernel, silu, softplus

# 64 sequences take 110 µs on one thread (512 channels, state 16), and handing half of them over takes 50 to 100 µs.
_ROWS_PER_THREAD = 64
GAP = 16
"""Numbers between rows that are written side by side, which would else compete for the same lines of the cache."""


@kernel
def convolve(projected: Any, past: Any, weight: Any, bias: Any, output: Any, first: int, last: int) -> None:
    """See [`convolve_step_`]; `weight` is `(kernel, channels)`, and only sequences `first … last - 1` move on."""
    taps, channels = past.shape[1], past.shape[2]
    for b in range(first, last):
        for c in range(channels):
            output[b, c] = bias[c] + weight[taps, c] * projected[b, c]
        for tap in range(taps):
            for c in range(channels):
                output[b, c] += weight[tap, c] * past[b, tap, c]
        for tap in range(taps - 1):
            for c in range(channels):
                past[b, tap, c] = past[b, tap + 1, c]
        for c in range(channels):
            past[b, taps - 1, c] = projected[b, c]
            output[b, c] = silu(output[b, c])


@kernel
def decay_rates(A_log: Any) -> Any:
    """`A` times the binary logarithm of e, transposed: from `(channels, state)` to `(state, at least channels)`."""
    width, size = A_log.shape
    natural = np.empty((width, size), np.float32)  # in two passes, because the first one then vectorises
    flat, logarithms = natural.reshape(-1), A_log.reshape(-1)
    for place in range(len(flat)):
        flat[place] = -LOG2_E * exp2(LOG2_E * logarithms[place])
    rates = np.empty((size, width + GAP), np.float32)
    for c in range(width):
        for n in range(size):
            rates[n, c] = natural[c, n]
    return rates


@kernel
def _scan(
    channels: Any,
    steps: Any,
    bias: Any,
    A_log: Any,
    selected: Any,
    D: Any,
    projected: Any,
    state: Any,
    output: Any,
    first: int,
    last: int,
) -> None:
    width, size = A_log.shape
    rates = decay_rates(A_log)
    for b in range(first, last):
        scan(
            *(channels[b], steps[b], bias, rates, selected[b, -2 * size : -size], selected[b, -size:]),
            *(D, projected[b, width:], state[b], output[b]),
        )


@kernel
def scan(
    channels: Any,
    steps: Any,
    bias: Any,
    rates: Any,
    enters: Any,
    reads: Any,
    D: Any,
    gate: Any,
    state: Any,
    output: Any,
) -> None:
    """[`scan_step_`] of one sequence."""
    size, width = state.shape
    dt, entering = np.empty(width, np.float32), np.empty(width, np.float32)
    for c in range(width):
        dt[c] = softplus(steps[c] + bias[c])
        entering[c] = dt[c] * channels[c]
        output[c] = D[c] * channels[c]
    for n in range(size):
        enters_here, reads_here = enters[n], reads[n]
        for c in range(width):
            value = exp2(dt[c] * rates[n, c]) * state[n, c] + entering[c] * enters_here
            state[n, c] = value
            output[c] += value * reads_here
    for c in range(width):
        output[c] *= silu(gate[c])


def convolve_step_(past: Tensor, projected: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal convolution and SiLU of one token; `past` moves on. All in float32.

    Args:
        past (`Tensor` of shape `(batch, kernel - 1, channels)`): the channels of the tokens before, the oldest first.
        projected (`Tensor` of shape `(batch, 2 * channels)`): channels and gate of the token.
        weight (`Tensor` of shape `(channels, 1, kernel)`): of the convolution.
        bias (`Tensor` of shape `(channels,)`, *optional*): of the convolution.

    Returns:
        `Tensor` of shape `(batch, channels)`.
    """
    output = projected.new_empty(len(projected), past.shape[2])
    bias = torch.zeros(past.shape[2]) if bias is None else bias
    in_parallel(
        convolve, (projected, past, weight[:, 0].T.contiguous(), bias, output), len(projected), _ROWS_PER_THREAD
    )
    return output


def scan_step_(
    state: Tensor,
    channels: Tensor,
    steps: Tensor,
    bias: Tensor,
    A_log: Tensor,
    selected: Tensor,
    D: Tensor,
    projected: Tensor,
) -> Tensor:
    """One step of the scan, from its discretisation to the gate; `state` moves on. All in float32.

    Args:
        state (`Tensor` of shape `(batch, state, channels)`): of the scan.
        channels (`Tensor` of shape `(batch, channels)`): the convolved token.
        steps (`Tensor` of shape `(batch, channels)`): the time step before bias and softplus.
        bias (`Tensor` of shape `(channels,)`): of the time step.
        A_log (`Tensor` of shape `(channels, state)`): the logarithm of `-A`.
        selected (`Tensor` of shape `(batch, at least 2 * state)`): ends with B and C.
        D (`Tensor` of shape `(channels,)`): the weight of the skip connection.
        projected (`Tensor` of shape `(batch, 2 * channels)`): ends with the gate.

    Returns:
        `Tensor` of shape `(batch, channels)`: what the output projection takes.
    """
    output = torch.empty_like(channels)
    tensors = (channels, steps, bias, A_log, selected, D, projected, state, output)
    in_parallel(_scan, tensors, len(channels), _ROWS_PER_THREAD)
    return output


__all__ = ["GAP", "convolve", "convolve_step_", "decay_rates", "scan", "scan_step_"]
