"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752, equations 2 and 4) in plain torch.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t

[`selective_scan_reference`] is the obvious loop, [`selective_scan`] computes the same and is the one to use, and
[`selective_step_`] is a single step for decoding. The recurrent state has shape `(batch, state, channels)`: channels
are innermost because every product of the recurrence broadcasts over them, which keeps the vector units on contiguous
memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Steps scanned between two stored states. Chunks of 8, 16, 32 and 64 took 60, 51, 52 and 58 ms on 2 cores, forward
# and backward (batch 4, 512 steps, 512 channels, state 16). The work buffers, of `CHUNK * batch * state * channels`
# elements, should stay within the processor's cache.
CHUNK = 32


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step at a time, for tests: the definition, with autograd through every step. See [`selective_scan`]."""
    batch, time, channels = x.shape
    state = x.new_zeros(batch, A.shape[1], channels) if initial_state is None else initial_state
    outputs = []
    for t in range(time):
        decay = torch.exp(dt[:, t, None, :] * A.T)
        if reset is not None:
            decay = decay.masked_fill(reset[:, t, None, None], 0)
        state = decay * state + (dt[:, t] * x[:, t])[:, None, :] * B[:, t, :, None]
        outputs.append((C[:, t, :, None] * state).sum(1))
    return torch.stack(outputs, 1), state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence in time linear in its length, keeping one state a chunk of steps for the backward pass.

    Args:
        x (`Tensor` of shape `(batch, time, channels)`): the input, with `time >= 1`.
        dt (`Tensor` of shape `(batch, time, channels)`): the positive time step of every channel.
        A (`Tensor` of shape `(channels, state)`): the negative diagonal of the state matrix.
        B (`Tensor` of shape `(batch, time, state)`): how the input enters the state.
        C (`Tensor` of shape `(batch, time, state)`): how the state is read.
        initial_state (`Tensor` of shape `(batch, state, channels)`, *optional*): the state before the first step;
            zeros by default.
        reset (`BoolTensor` of shape `(batch, time)`, *optional*): steps before which the state becomes zero, the
            initial state included; none by default.

    Returns:
        The output of shape `(batch, time, channels)` and the state after the last step,
        of shape `(batch, state, channels)`. Both carry gradients to the first six inputs; there is no double backward.

    Memory: the inputs, plus `time / CHUNK` states. Everything else is recomputed chunk by chunk in the backward pass.
    """
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], A.shape[1], x.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        output, state = _ChunkedScan.apply(x, dt, A, B, C, initial_state, reset)
    return output, state


def selective_step_(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One step of the scan, for decoding: updates `state` `(batch, state, channels)` in place, without a graph.

    The other arguments are those of [`selective_scan`] without their time dimension. Returns `(batch, channels)`.
    """
    state.mul_(torch.exp(dt[:, None, :] * A.T)).addcmul_(B[:, :, None], (dt * x)[:, None, :])
    return (C[:, None, :] @ state).squeeze(1)


class _Workspace:
    """The buffers of one scan, time first: made once, reused for every chunk."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Tensor | None):
        self.dt, self.B, self.C = (tensor.transpose(0, 1) for tensor in (dt, B, C))
        self.input = (dt * x).transpose(0, 1)  # (time, batch, channels)
        self.A = A.T.contiguous()  # (state, channels)
        self.reset = None if reset is None else reset.T
        batch, time, channels = x.shape
        shape = (min(CHUNK, time), batch, A.shape[1], channels)
        self.decay_buffer, self.states_buffer = x.new_empty(shape), x.new_empty(shape)

    def scan_chunk(self, steps: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states of a chunk, each `(steps, batch, state, channels)`, in the buffers."""
        length = steps.stop - steps.start
        decay, states = self.decay_buffer[:length], self.states_buffer[:length]
        torch.mul(self.dt[steps, :, None, :], self.A, out=decay).exp_()
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
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        work = _Workspace(x, dt, A, B, C, reset)
        starts, outputs = [], []
        for steps in _chunks(x.shape[1]):
            starts.append(state)
            _, states = work.scan_chunk(steps, state)
            outputs.append((work.C[steps, :, None, :] @ states).squeeze(2))
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, reset, *starts)
        return torch.cat(outputs).transpose(0, 1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, reset, *starts = ctx.saved_tensors
        work = _Workspace(x, dt, A, B, C, reset)
        grad_y = grad_output.transpose(0, 1)
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
            grad_C[steps] = (states @ grad_y[steps, :, :, None]).squeeze(3)
            grad_B[steps] = (adjoint @ work.input[steps, :, :, None]).squeeze(3)
            grad_input[steps] = (work.B[steps, :, None, :] @ adjoint).squeeze(2)
            # The gradient of dt_t A, the exponent: adjoint_t * decay_t * h_{t-1}.
            exponent = decay.mul_(adjoint)
            exponent[1:].mul_(states[:-1])
            exponent[0].mul_(start)
            grad_dt[steps] = torch.mul(exponent, work.A, out=states).sum(2)
            grad_A += torch.mul(exponent, work.dt[steps, :, None, :], out=states).sum((0, 1))
        grad_dt += grad_input * x.transpose(0, 1)
        return (
            (grad_input * work.dt).transpose(0, 1),
            grad_dt.transpose(0, 1),
            grad_A.T,
            grad_B.transpose(0, 1),
            grad_C.transpose(0, 1),
            grad_state,
            None,
        )
