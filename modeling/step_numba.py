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


@kernel
def _convolve(projected: Any, past: Any, weight: Any, bias: Any, output: Any, first: int, last: int) -> None:
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
    A = np.empty((size, width), np.float32)
    for c in range(width):
        for n in range(size):
            A[n, c] = -LOG2_E * exp2(LOG2_E * A_log[c, n])
    entering_at, reading_at = selected.shape[1] - 2 * size, selected.shape[1] - size
    dt, entering = np.empty(width, np.float32), np.empty(width, np.float32)
    for b in range(first, last):
        for c in range(width):
            dt[c] = softplus(steps[b, c] + bias[c])
            entering[c] = dt[c] * channels[b, c]
            output[b, c] = D[c] * channels[b, c]
        for n in range(size):
            enters, reads = selected[b, entering_at + n], selected[b, reading_at + n]
            for c in range(width):
                value = exp2(dt[c] * A[n, c]) * state[b, n, c] + entering[c] * enters
                state[b, n, c] = value
                output[b, c] += value * reads
        for c in range(width):
            output[b, c] *= silu(projected[b, width + c])


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
        _convolve, (projected, past, weight[:, 0].T.contiguous(), bias, output), len(projected), _ROWS_PER_THREAD
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


__all__ = ["convolve_step_", "scan_step_"]
