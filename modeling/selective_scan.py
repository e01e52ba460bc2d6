"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752, equations 2 and 4), with several backends.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t

[`selective_scan`] is the one to use. [`selective_scan_reference`] is the obvious loop that every backend is tested
against, and [`selective_step_`] is a single step for decoding. The recurrent state has shape
`(batch, state, channels)`: channels are innermost because every product of the recurrence broadcasts over them, which
keeps the vector units on contiguous memory.
"""

import math

import torch
from torch import Tensor

from .scan_backends import available_backends, choose_backend, scan_mamba_ssm
from .scan_chunked import scan_chunked
from .scan_common import working_dtype

__all__ = ["available_backends", "choose_backend", "selective_scan", "selective_scan_reference", "selective_step_"]


@torch.compiler.disable  # traced, the loop over time would be unrolled: minutes of compilation for a few hundred steps
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence in time linear in its length (arXiv 2312.00752, equations 2 and 4).

    Args:
        x (`Tensor` of shape `(batch, time, channels)`): the input, with `time >= 1`.
        dt (`Tensor` of shape `(batch, time, channels)`): the positive time step of every channel.
        A (`Tensor` of shape `(channels, state)`): the negative diagonal of the state matrix.
        B (`Tensor` of shape `(batch, time, state)`): how the input enters the state.
        C (`Tensor` of shape `(batch, time, state)`): how the state is read.
        initial_state (`Tensor` of shape `(batch, state, channels)`, *optional*): the state before the first step;
            zeros by default.
        reset (`BoolTensor` of shape `(batch, time)`, *optional*): steps at which a document begins: the state before
            them is zero, the initial state included; none by default.
        backend (`str`, *optional*): `"reference"`, `"chunked"`, `"numba"`, `"triton"` or `"mamba_ssm"`; chosen
            by [`choose_backend`] by default.

    Returns:
        `tuple[Tensor, Tensor]`: the output of shape `(batch, time, channels)` in the type of `x`, and the state after
        the last step, of shape `(batch, state, channels)`, in float32 (float64 where an input has it), in which the
        recurrence runs whatever the inputs' type. Both carry gradients to the first six inputs, except for the
        state of `mamba_ssm`. Only `reference` has a second derivative.

    Raises:
        `ValueError`: a shape does not fit, tensors are on different devices, or the backend is unknown or unable.
    """
    _check(x, dt, A, B, C, initial_state, reset)
    dtype = working_dtype(x, dt, A, B, C)
    name = choose_backend(
        x.device,
        backend,
        dtype=dtype,
        state_size=A.shape[1],
        has_initial_state=initial_state is not None,
        has_reset=reset is not None,
    )
    with torch.autocast(x.device.type, enabled=False):
        if name == "mamba_ssm":
            return scan_mamba_ssm(x, dt, A, B, C)
        if name == "reference":
            return selective_scan_reference(x, dt, A, B, C, initial_state, reset)
        if initial_state is None:
            initial_state = x.new_zeros(x.shape[0], A.shape[1], x.shape[2], dtype=dtype)
        if name == "triton":
            from .scan_triton import scan_triton

            return scan_triton(x, dt, A, B, C, initial_state, reset)
        if name == "numba":
            from .scan_numba import scan_numba

            return scan_numba(x, dt, A, B, C, initial_state, reset)
        return scan_chunked(x, dt, A, B, C, initial_state, reset)


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step at a time: the definition, with autograd through every step. See [`selective_scan`]."""
    batch, time, channels = x.shape
    output_dtype, dtype = x.dtype, working_dtype(x, dt, A, B, C)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    state = x.new_zeros(batch, A.shape[1], channels) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(time):
        decay = torch.exp(dt[:, t, None, :] * A.T)
        if reset is not None:
            decay = decay.masked_fill(reset[:, t, None, None], 0)
        state = decay * state + (dt[:, t] * x[:, t])[:, None, :] * B[:, t, :, None]
        outputs.append((C[:, t, :, None] * state).sum(1))
    return torch.stack(outputs, 1).to(output_dtype), state


def selective_step_(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, scratch: Tensor | None = None
) -> Tensor:
    """One step of the scan, for decoding: updates `state` in place, without a graph.

    Args:
        state (`Tensor` of shape `(batch, state, channels)`): in the working type.
        x, dt, A, B, C (`Tensor`): as for [`selective_scan`], without the time dimension.
        scratch (`Tensor` of the shape of `state`, *optional*): is overwritten. A loop that passes its own allocates
            nothing of this size: fresh pages took up to three quarters of the time of a step.

    Returns:
        `Tensor` of shape `(batch, channels)`.
    """
    A_log2 = A.T.contiguous() / math.log(2)  # as in the chunked backend
    decay = torch.mul(dt[:, None, :], A_log2, out=scratch).exp2_()
    state.mul_(decay).addcmul_(B[:, :, None], (dt * x)[:, None, :])
    return (C[:, None, :] @ state).squeeze(1)


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reset: Tensor | None
) -> None:
    """Refuse what would otherwise broadcast, read past the end, or fail without naming the argument."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, time, channels) with at least one step")
    batch, time, channels = x.shape
    if A.dim() != 2:
        raise ValueError(f"A has shape {tuple(A.shape)}, expected ({channels}, state), the channels of x first")
    state = A.shape[1]
    expected = {
        "dt": (dt, (batch, time, channels)),
        "A": (A, (channels, state)),
        "B": (B, (batch, time, state)),
        "C": (C, (batch, time, state)),
        "initial_state": (initial_state, (batch, state, channels)),
        "reset": (reset, (batch, time)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape}: x has {tuple(x.shape)}, A {tuple(A.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move it, {name}.to(x.device)")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset has type {reset.dtype}, expected torch.bool: write reset.bool()")
