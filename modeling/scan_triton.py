"""The selective scan as two Triton kernels, for CUDA, and for tests without it in Triton's CPU interpreter.

A program owns a block of channels of one sequence and walks through time with its states, `(state, channels)`, in
registers. As in the chunked scan, forward stores the state at the start of every chunk, and backward rescans a chunk
before it runs the adjoint through it. Nothing is added atomically, so that a gradient is the same every time.
"""

from typing import Any

import torch
from torch import Tensor

try:  # transformers reads the imports of published code, and requires all that are not within a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the triton backend of selective_scan needs Triton: pip install triton") from error

from .scan_common import first_derivative_only, working_dtype

# Steps between two stored states: a state costs `state / CHUNK` values per step and channel, and the scratch memory of
# the backward pass, `CHUNK` states for every program that runs, should stay within the GPU's L2 cache.
CHUNK = 16
# Channels of a program: with a state of 16 one warp holds them, 16 values per thread, and no two warps wait for each
# other; fewer would make more partial gradients of B and C.
BLOCK_C = 32


def scan_triton(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See [`selective_scan`].

    Memory kept for the backward pass: the inputs, plus `time / CHUNK` states. The backward pass itself takes
    `channels / 32` gradients of `B` and `C` each, one per block of channels, which are added up at the end.
    """
    output, state = _TritonScan.apply(x, dt, A, B, C, initial_state, reset)
    return output, state


@triton.jit
def _read_step(x, dt, B, reset, A, row, c, n, channels, states):
    """Input, time step, its decay of every state, and how the input enters them, in the type of `A`."""
    value = tl.load(x + row * channels + c, mask=c < channels, other=0).to(A.dtype)
    step = tl.load(dt + row * channels + c, mask=c < channels, other=0).to(A.dtype)
    enters = tl.load(B + row * states + n, mask=n < states, other=0).to(A.dtype)
    decay = tl.exp(step[None, :] * A)
    # A decay of zero is a reset, in both directions: neither the state nor the adjoint passes it.
    if reset is not None:
        decay = tl.where(tl.load(reset + row) != 0, 0.0, decay)
    return value, step, enters, decay


@triton.jit
def _place(channels, states, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """What a program owns: sequence, channels and states, which of them exist, and where in a state they lie."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    inside = (n < states)[:, None] & (c < channels)[None, :]
    return sequence, c, n, inside, n[:, None] * channels + c[None, :]


@triton.jit
def _forward_kernel(
    x, dt, A, B, C, initial, reset,
    output, starts, final,
    time, channels, states,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Outputs, final states, and `starts` `(chunks, batch, state, channels)`."""
    sequence, c, n, inside, tile = _place(channels, states, BLOCK_N, BLOCK_C)
    size = states * channels
    A = tl.load(A + c[None, :] * states + n[:, None], mask=inside, other=0).to(final.dtype.element_ty)
    state = tl.load(initial + sequence * size + tile, mask=inside, other=0)
    for chunk in range(tl.cdiv(time, CHUNK)):
        tl.store(starts + (chunk * tl.num_programs(0) + sequence) * size + tile, state, mask=inside)
        for t in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, time)):
            row = sequence * time + t
            value, step, enters, decay = _read_step(x, dt, B, reset, A, row, c, n, channels, states)
            reads = tl.load(C + row * states + n, mask=n < states, other=0).to(A.dtype)
            state = decay * state + (step * value)[None, :] * enters[:, None]
            tl.store(output + row * channels + c, tl.sum(reads[:, None] * state, 0), mask=c < channels)
    tl.store(final + sequence * size + tile, state, mask=inside)


@triton.jit
def _backward_kernel(
    x, dt, A, B, C, reset, starts, scratch, grad_output, grad_final,
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_initial,
    time, channels, states,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of what a program owns; of `A` per sequence; of `B` and `C` per block of channels."""
    sequence, c, n, inside, tile = _place(channels, states, BLOCK_N, BLOCK_C)
    size = states * channels
    A_tile = c[None, :] * states + n[:, None]
    A = tl.load(A + A_tile, mask=inside, other=0).to(starts.dtype.element_ty)
    scratch += (tl.program_id(1) * tl.num_programs(0) + sequence) * (CHUNK * BLOCK_N * BLOCK_C)
    scratch += n[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    block_rows = (tl.program_id(1) * tl.num_programs(0) + sequence) * time
    sum_A = tl.zeros((BLOCK_N, BLOCK_C), A.dtype)
    adjoint = tl.load(grad_final + sequence * size + tile, mask=inside, other=0)
    chunks = tl.cdiv(time, CHUNK)
    for back in range(chunks):
        chunk = chunks - 1 - back
        begin = chunk * CHUNK
        end = tl.minimum(begin + CHUNK, time)
        state = tl.load(starts + (chunk * tl.num_programs(0) + sequence) * size + tile, mask=inside, other=0)
        for t in range(begin, end):
            tl.store(scratch + (t - begin) * (BLOCK_N * BLOCK_C), state)
            row = sequence * time + t
            value, step, enters, decay = _read_step(x, dt, B, reset, A, row, c, n, channels, states)
            state = decay * state + (step * value)[None, :] * enters[:, None]
        tl.debug_barrier()  # the stores are seen by all threads before they read them, and read before the next chunk
        for past in range(end - begin):
            t = end - 1 - past
            row = sequence * time + t
            value, step, enters, decay = _read_step(x, dt, B, reset, A, row, c, n, channels, states)
            before = tl.load(scratch + (t - begin) * (BLOCK_N * BLOCK_C))
            reads = tl.load(C + row * states + n, mask=n < states, other=0).to(A.dtype)
            grad_y = tl.load(grad_output + row * channels + c, mask=c < channels, other=0).to(A.dtype)
            state = decay * before + (step * value)[None, :] * enters[:, None]
            adjoint += reads[:, None] * grad_y[None, :]
            own = (block_rows + t) * states + n
            tl.store(grad_C + own, tl.sum(state * grad_y[None, :], 1), mask=n < states)
            tl.store(grad_B + own, tl.sum(adjoint * (step * value)[None, :], 1), mask=n < states)
            grad_input = tl.sum(adjoint * enters[:, None], 0)
            adjoint *= decay
            exponent = adjoint * before  # the gradient of dt_t A
            sum_A += exponent * step[None, :]
            own = row * channels + c
            tl.store(grad_x + own, grad_input * step, mask=c < channels)
            tl.store(grad_dt + own, tl.sum(exponent * A, 0) + grad_input * value, mask=c < channels)
        tl.debug_barrier()
    tl.store(grad_initial + sequence * size + tile, adjoint, mask=inside)
    tl.store(grad_A + sequence * size + A_tile, sum_A, mask=inside)


def _launch_options(batch: int, channels: int, states: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and what the kernels are compiled for."""
    block_n = triton.next_power_of_2(states)
    # A thread holds 16 values of the state, so that a large state stays in registers as well.
    options = {"CHUNK": CHUNK, "BLOCK_N": block_n, "BLOCK_C": BLOCK_C, "num_warps": max(1, block_n // 16)}
    return (batch, triton.cdiv(channels, BLOCK_C)), options


class _TritonScan(torch.autograd.Function):
    """The kernels, with their memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C = (tensor.contiguous() for tensor in (x, dt, A, B, C))
        (batch, time, channels), states = x.shape, A.shape[1]
        reset = None if reset is None else reset.to(torch.uint8).contiguous()
        initial = initial_state.to(working_dtype(x, dt, A, B, C)).contiguous()
        output, final = torch.empty_like(x), torch.empty_like(initial)
        starts = initial.new_empty(triton.cdiv(time, CHUNK), *initial.shape)
        grid, options = _launch_options(batch, channels, states)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _forward_kernel[grid](
                x, dt, A, B, C, initial, reset, output, starts, final, time, channels, states, **options
            )
        ctx.save_for_backward(x, dt, A, B, C, reset, starts)
        ctx.state_dtype = initial_state.dtype
        return output, final

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, reset, starts = ctx.saved_tensors
        (batch, time, channels), states = x.shape, A.shape[1]
        grid, options = _launch_options(batch, channels, states)
        grad_x, grad_dt, grad_initial = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(starts[0])
        grad_A = starts.new_empty(batch, channels, states)
        grad_B, grad_C = (starts.new_empty(grid[1], batch, time, states) for _ in range(2))
        scratch = starts.new_empty(grid[0] * grid[1] * CHUNK * options["BLOCK_N"] * BLOCK_C)
        with torch.cuda.device_of(x):
            _backward_kernel[grid](
                x, dt, A, B, C, reset, starts, scratch, grad_output.contiguous(), grad_final.contiguous(),
                grad_x, grad_dt, grad_A, grad_B, grad_C, grad_initial, time, channels, states, **options,
            )  # fmt: skip
        return (
            grad_x,
            grad_dt,
            grad_A.sum(0).to(A.dtype),
            grad_B.sum(0).to(B.dtype),
            grad_C.sum(0).to(C.dtype),
            grad_initial.to(ctx.state_dtype),
            None,
        )
