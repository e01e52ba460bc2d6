"""The selective scan as two kernels for the processor, compiled by Numba.

A task owns a block of channels of one sequence and walks through time with its states in the cache nearest to the
core. As in the chunked scan, forward stores the state at the start of every chunk, and backward rescans a chunk before
it runs the adjoint through it. One pass over the states replaces the ten or more that vector operations take.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .numba_common import LOG2_E, exp2, in_parallel, kernel, use_wide_vectors
from .scan_common import first_derivative_only

# Steps between two stored states, and channels of a task. The scratch memory of the backward pass, 2 x CHUNK states of
# WIDTH channels, is 1 MB for a state of 16. With widths of 64, 128, 256 and 512, one core took 2.4 + 6.6,
# 2.2 + 6.1, 1.9 + 4.5 and 1.9 + 4.6 µs per token, forward and backward (512 channels, state 16).
CHUNK = 32
WIDTH = 256


def scan_numba(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See [`selective_scan`]. Float32 on the processor.

    Memory kept for the backward pass: the inputs, plus `time / CHUNK` states. The backward pass itself takes
    `channels / WIDTH` gradients of `B` and `C` each, which are added up at the end.
    """
    output, state = _NumbaScan.apply(x, dt, A, B, C, initial_state, reset)
    return output, state


@kernel
def place(task: int, channels: int) -> tuple[int, int, int]:
    """The sequence of a task, its first channel, and the number of its channels."""
    blocks = (channels + WIDTH - 1) // WIDTH
    c0 = task % blocks * WIDTH
    return task // blocks, c0, min(WIDTH, channels - c0)


def count_tasks(batch: int, channels: int) -> int:
    """One for every `WIDTH` channels of every sequence."""
    return batch * math.ceil(channels / WIDTH)


@kernel
def _forward(
    x: Any, dt: Any, A: Any, B: Any, C: Any, reset: Any, state: Any, output: Any, starts: Any, first: int, last: int
) -> None:
    """Tasks `first … last - 1`. `A`, `(state, channels)`, is in powers of two; `state` goes from initial to final."""
    use_wide_vectors()  # type: ignore[call-arg]  # Numba passes the first argument itself
    time, channels, size = x.shape[1], x.shape[2], A.shape[0]
    h, a = np.empty((size, WIDTH), np.float32), np.empty((size, WIDTH), np.float32)
    step, entering, y = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    for task in range(first, last):
        b, c0, width = place(task, channels)
        for n in range(size):
            for c in range(width):
                h[n, c] = state[b, n, c0 + c]
                a[n, c] = A[n, c0 + c]
        for t in range(time):
            if t % CHUNK == 0:
                for n in range(size):
                    for c in range(width):
                        starts[t // CHUNK, b, n, c0 + c] = h[n, c]
            if reset[b, t]:
                h[:] = 0
            for c in range(width):
                step[c] = dt[b, t, c0 + c]
                entering[c] = step[c] * x[b, t, c0 + c]
                y[c] = 0
            for n in range(size):
                enters, reads = B[b, t, n], C[b, t, n]
                for c in range(width):
                    value = exp2(step[c] * a[n, c]) * h[n, c] + entering[c] * enters
                    h[n, c] = value
                    y[c] += value * reads
            for c in range(width):
                output[b, t, c0 + c] = y[c]
        for n in range(size):
            for c in range(width):
                state[b, n, c0 + c] = h[n, c]


@kernel
def _backward(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    reset: Any,
    starts: Any,
    grad_output: Any,
    grad_state: Any,
    grad_x: Any,
    grad_dt: Any,
    grad_A: Any,
    grad_B: Any,
    grad_C: Any,
    first: int,
    last: int,
) -> None:
    """Tasks `first … last - 1`. `grad_state` goes from that of the final to that of the initial state.

    `grad_A` has a row per sequence, `grad_B` and `grad_C` have a slice per block of channels. `A` and `grad_A` are in
    natural units.
    """
    use_wide_vectors()  # type: ignore[call-arg]  # Numba passes the first argument itself
    time, channels, size = x.shape[1], x.shape[2], A.shape[0]
    states, decay = np.empty((CHUNK + 1, size, WIDTH), np.float32), np.empty((CHUNK, size, WIDTH), np.float32)
    adjoint, of_a = np.empty((size, WIDTH), np.float32), np.empty((size, WIDTH), np.float32)
    a = np.empty((size, WIDTH), np.float32)
    step, entering, g = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    of_entering, of_step = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    for task in range(first, last):
        b, c0, width = place(task, channels)
        block = c0 // WIDTH
        for n in range(size):
            for c in range(width):
                a[n, c] = A[n, c0 + c]
                adjoint[n, c] = grad_state[b, n, c0 + c]
                of_a[n, c] = 0
        for start in range((time - 1) // CHUNK * CHUNK, -1, -CHUNK):
            stop = min(start + CHUNK, time)
            for n in range(size):
                for c in range(width):
                    states[0, n, c] = starts[start // CHUNK, b, n, c0 + c]
            for t in range(start, stop):  # the states of the chunk once more
                i = t - start
                # A decay of zero is a reset, in both directions: neither the state nor the adjoint passes it.
                passes = np.float32(0) if reset[b, t] else np.float32(1)
                for c in range(width):
                    step[c] = dt[b, t, c0 + c]
                    entering[c] = step[c] * x[b, t, c0 + c]
                for n in range(size):
                    enters = B[b, t, n]
                    for c in range(width):
                        decay[i, n, c] = exp2(step[c] * a[n, c] * LOG2_E) * passes
                        states[i + 1, n, c] = decay[i, n, c] * states[i, n, c] + entering[c] * enters
            for t in range(stop - 1, start - 1, -1):
                i = t - start
                for c in range(width):
                    step[c] = dt[b, t, c0 + c]
                    entering[c] = step[c] * x[b, t, c0 + c]
                    g[c] = grad_output[b, t, c0 + c]
                    of_entering[c] = 0
                    of_step[c] = 0
                for n in range(size):
                    enters, reads = B[b, t, n], C[b, t, n]
                    of_enters, of_reads = np.float32(0), np.float32(0)
                    for c in range(width):
                        value = adjoint[n, c] + g[c] * reads
                        of_reads += g[c] * states[i + 1, n, c]
                        of_enters += entering[c] * value
                        of_entering[c] += value * enters
                        value = value * decay[i, n, c]
                        adjoint[n, c] = value
                        exponent = value * states[i, n, c]  # the gradient of dt_t A: adjoint_t * decay_t * h_{t-1}
                        of_step[c] += exponent * a[n, c]
                        of_a[n, c] += exponent * step[c]
                    grad_B[block, b, t, n] = of_enters
                    grad_C[block, b, t, n] = of_reads
                for c in range(width):
                    grad_x[b, t, c0 + c] = of_entering[c] * step[c]
                    grad_dt[b, t, c0 + c] = of_step[c] + of_entering[c] * x[b, t, c0 + c]
        for n in range(size):
            for c in range(width):
                grad_A[b, n, c0 + c] = of_a[n, c]
                grad_state[b, n, c0 + c] = adjoint[n, c]


class _NumbaScan(torch.autograd.Function):
    """Forward keeps the states at chunk starts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = [tensor.dtype for tensor in (x, dt, A, B, C, initial_state)]
        x, dt, A, B, C, initial_state = (tensor.float() for tensor in (x, dt, A.T, B, C, initial_state))
        x, dt, A, B, C = (tensor.contiguous() for tensor in (x, dt, A, B, C))
        batch, time, channels = x.shape
        reset = torch.zeros(batch, time, dtype=torch.bool) if reset is None else reset.contiguous()
        state = initial_state.clone(memory_format=torch.contiguous_format)
        output, starts = torch.empty_like(x), x.new_empty(math.ceil(time / CHUNK), *state.shape)
        arguments = (x, dt, A * float(LOG2_E), B, C, reset, state, output, starts)
        in_parallel(_forward, arguments, count_tasks(batch, channels))
        ctx.save_for_backward(x, dt, A, B, C, reset, starts)
        return output.to(ctx.dtypes[0]), state

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, reset, starts = ctx.saved_tensors
        batch, _, channels = x.shape
        blocks = math.ceil(channels / WIDTH)
        grad_state = grad_state.float().clone(memory_format=torch.contiguous_format)
        grad_x, grad_dt, grad_A = torch.empty_like(x), torch.empty_like(dt), A.new_empty(batch, *A.shape)
        grad_B, grad_C = B.new_empty(blocks, *B.shape), C.new_empty(blocks, *C.shape)
        incoming = (grad_output.float().contiguous(), grad_state)
        gradients = (grad_x, grad_dt, grad_A, grad_B, grad_C)
        in_parallel(_backward, (x, dt, A, B, C, reset, starts, *incoming, *gradients), count_tasks(batch, channels))
        results = (grad_x, grad_dt, grad_A.sum(0).T, grad_B.sum(0), grad_C.sum(0), grad_state)
        return *(result.to(dtype) for result, dtype in zip(results, ctx.dtypes, strict=True)), None


__all__ = ["WIDTH", "count_tasks", "place", "scan_numba"]
