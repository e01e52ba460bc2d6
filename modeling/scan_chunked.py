"""The selective scan in plain torch, on any device: chunk by chunk, each in vector operations."""

import math
from typing import Any

import torch
from torch import Tensor

from .scan_common import first_derivative_only, working_dtype

# Steps scanned between two stored states. Chunks of 8, 16, 32 and 64 took 43, 39, 37 and 49 ms on one core, forward
# and backward (batch 4, 512 steps, 512 channels, state 16). The work buffers, of `CHUNK * batch * state * channels`
# elements, should stay within the processor's cache.
CHUNK = 32


def scan_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See [`selective_scan`].

    Memory kept for the backward pass: the inputs, plus `time / CHUNK` states. Everything else is recomputed chunk by
    chunk.
    """
    output, state = _ChunkedScan.apply(x, dt, A, B, C, initial_state, reset)
    return output, state


class _Workspace:
    """The inputs in the working type and the buffers of one scan, time first: made once, reused for every chunk."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Tensor | None):
        dtype = working_dtype(x, dt, A, B, C)
        self.x, self.dt, self.B, self.C = (tensor.to(dtype).transpose(0, 1) for tensor in (x, dt, B, C))
        self.input = self.dt * self.x  # (time, batch, channels)
        self.A = A.T.to(dtype).contiguous()  # (state, channels)
        self.A_log2 = self.A / math.log(2)  # torch's exp2 takes a quarter of the time of its exp on a processor
        self.reset = None if reset is None else reset.T
        time, batch, channels = self.x.shape
        shape = (min(CHUNK, time), batch, A.shape[1], channels)
        self.decay_buffer, self.states_buffer = self.x.new_empty(shape), self.x.new_empty(shape)

    def scan_chunk(self, steps: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states of a chunk, each `(steps, batch, state, channels)`, in the buffers."""
        length = steps.stop - steps.start
        decay, states = self.decay_buffer[:length], self.states_buffer[:length]
        torch.mul(self.dt[steps, :, None, :], self.A_log2, out=decay).exp2_()
        # A decay of zero is a reset, in both directions: neither the state nor the adjoint passes it.
        if self.reset is not None:
            decay[self.reset[steps].nonzero(as_tuple=True)] = 0
        torch.mul(self.input[steps, :, None, :], self.B[steps, :, :, None], out=states)
        for step_decay, step_state in zip(decay.unbind(), states.unbind(), strict=True):
            state = step_state.addcmul_(step_decay, state)
        return decay, states


def _chunks(time: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, time)) for start in range(0, time, CHUNK)]


class _ChunkedScan(torch.autograd.Function):
    """Forward keeps the states at chunk starts; backward rescans a chunk, then runs the adjoint through it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        work = _Workspace(x, dt, A, B, C, reset)
        state = initial_state.to(work.A.dtype)
        starts, outputs = [], []
        for steps in _chunks(x.shape[1]):
            starts.append(state)
            _, states = work.scan_chunk(steps, state)
            outputs.append((work.C[steps, :, None, :] @ states).squeeze(2))
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, reset, *starts)
        ctx.state_dtype = initial_state.dtype
        return torch.cat(outputs).transpose(0, 1).to(x.dtype), state

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, reset, *starts = ctx.saved_tensors
        work = _Workspace(x, dt, A, B, C, reset)
        grad_y = grad_output.to(work.A.dtype).transpose(0, 1)
        grad_input, grad_dt, grad_B, grad_C = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (work.input, work.dt, work.B, work.C)
        )
        grad_A = torch.zeros_like(work.A)
        adjoint_buffer = torch.empty_like(work.states_buffer)
        for steps, start in zip(reversed(_chunks(x.shape[1])), reversed(starts), strict=True):
            decay, states = work.scan_chunk(steps, start)
            adjoint = torch.mul(grad_y[steps, :, None, :], work.C[steps, :, :, None], out=adjoint_buffer[: len(decay)])
            adjoint[-1].add_(grad_state)
            for t in reversed(range(len(decay) - 1)):
                adjoint[t].addcmul_(decay[t + 1], adjoint[t + 1])
            grad_state = decay[0] * adjoint[0]
            # Row times matrix: matrix times column takes ten times as long in torch's batched product.
            grad_C[steps] = (grad_y[steps, :, None, :] @ states.mT).squeeze(2)
            grad_B[steps] = (work.input[steps, :, None, :] @ adjoint.mT).squeeze(2)
            grad_input[steps] = (work.B[steps, :, None, :] @ adjoint).squeeze(2)
            # The gradient of dt_t A, the exponent: adjoint_t * decay_t * h_{t-1}.
            exponent = decay.mul_(adjoint)
            exponent[1:].mul_(states[:-1])
            exponent[0].mul_(start)
            grad_dt[steps] = torch.mul(exponent, work.A, out=states).sum(2)
            grad_A += torch.mul(exponent, work.dt[steps, :, None, :], out=states).sum((0, 1))
        grad_dt += grad_input * work.x
        return (
            (grad_input * work.dt).transpose(0, 1).to(x.dtype),
            grad_dt.transpose(0, 1).to(dt.dtype),
            grad_A.T.to(A.dtype),
            grad_B.transpose(0, 1).to(B.dtype),
            grad_C.transpose(0, 1).to(C.dtype),
            grad_state.to(ctx.state_dtype),
            None,
        )
