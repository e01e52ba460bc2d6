"""What surrounds the scan in a Mamba mixer, as kernels for the processor, compiled by Numba.

Each is one pass over a sequence, forward and backward, where torch's operations take many. Little is kept for the
backward pass: what can be computed again from the inputs is. [`~midimamba.modeling.mamba_mixer.MidiMambaMixer`]
defines what the kernels compute. They take float32 on the processor.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .numba_common import LOG2_E, exp2, in_parallel, inline, kernel, silu, softplus, use_wide_vectors
from .scan_common import first_derivative_only
from .scan_numba import WIDTH, count_tasks, place

_ONE = np.float32(1)


def convolve(window: Tensor, weight: Tensor, bias: Tensor | None, begins: Tensor | None) -> Tensor:
    """
    The causal depthwise convolution over time, and SiLU of it.

    Args:
        window (`Tensor` of shape `(batch, taps - 1 + time, channels)`): what is convolved, after the steps before it.
        weight (`Tensor` of shape `(channels, 1, taps)`): as `torch.nn.Conv1d` has it, for the newest step last.
        bias (`Tensor` of shape `(channels,)`, *optional*): that of the convolution.
        begins (`BoolTensor` of shape `(batch, time)`, *optional*): where a document begins. Nothing earlier enters.

    Returns:
        `Tensor` of shape `(batch, time, channels)`.
    """
    result: Tensor = _Convolve.apply(window, weight, bias, begins)
    return result


def to_steps(projected: Tensor, bias: Tensor) -> Tensor:
    """`softplus(projected + bias)` of `(batch, time, channels)` and `(channels,)`."""
    result: Tensor = _ToSteps.apply(projected, bias)
    return result


def gate_outputs(outputs: Tensor, inputs: Tensor, D: Tensor, gate: Tensor) -> Tensor:
    """`(outputs + inputs * D) * silu(gate)` of `(batch, time, channels)`, where `D` is `(channels,)`."""
    result: Tensor = _GateOutputs.apply(outputs, inputs, D, gate)
    return result


@inline
def _sigmoid(z: Any) -> Any:
    return _ONE / (_ONE + exp2(-z * LOG2_E))


@inline
def _silu_slope(z: Any) -> Any:
    """The derivative of SiLU."""
    s = _sigmoid(z)
    return s * (_ONE + z * (_ONE - s))


@kernel
def _mix(window: Any, weight: Any, bias: Any, b: int, t: int, c0: int, reach: int, z: Any) -> None:
    """The convolution at step `t`, of that step and of `reach` before it. `weight` is `(taps, width)`."""
    newest, width = len(weight) - 1, len(bias)
    row, w = window[b, t + newest, c0 : c0 + width], weight[newest]
    for c in range(width):
        z[c] = bias[c] + w[c] * row[c]
    for tap in range(newest - reach, newest):
        row, w = window[b, t + tap, c0 : c0 + width], weight[tap]
        for c in range(width):
            z[c] += w[c] * row[c]


@kernel
def _convolve(window: Any, weight: Any, bias: Any, begins: Any, output: Any, first: int, last: int) -> None:
    """Tasks `first … last - 1`. `weight` is `(taps, channels)`."""
    use_wide_vectors()  # type: ignore[call-arg]  # Numba passes the first argument itself
    newest, z = len(weight) - 1, np.empty(WIDTH, np.float32)
    for task in range(first, last):
        b, c0, width = place(task, output.shape[2])
        w, offset, reach = weight[:, c0 : c0 + width].copy(), bias[c0 : c0 + width], newest
        for t in range(output.shape[1]):
            reach = 0 if begins[b, t] else min(reach + 1, newest)
            _mix(window, w, offset, b, t, c0, reach, z)
            row = output[b, t, c0 : c0 + width]
            for c in range(width):
                row[c] = silu(z[c])


@kernel
def _convolve_backward(
    window: Any,
    weight: Any,
    bias: Any,
    begins: Any,
    grad_output: Any,
    grad_window: Any,
    grad_weight: Any,
    grad_bias: Any,
    first: int,
    last: int,
) -> None:
    """Tasks `first … last - 1`. `grad_weight` and `grad_bias` have a slice for every sequence."""
    use_wide_vectors()  # type: ignore[call-arg]  # Numba passes the first argument itself
    newest, z = len(weight) - 1, np.empty(WIDTH, np.float32)
    for task in range(first, last):
        b, c0, width = place(task, grad_output.shape[2])
        w, offset, reach = weight[:, c0 : c0 + width].copy(), bias[c0 : c0 + width], newest
        grad_weight[b, :, c0 : c0 + width] = 0
        grad_window[b, :newest, c0 : c0 + width] = 0
        of_bias = grad_bias[b, c0 : c0 + width]
        of_bias[:] = 0
        for t in range(grad_output.shape[1]):
            reach = 0 if begins[b, t] else min(reach + 1, newest)
            _mix(window, w, offset, b, t, c0, reach, z)
            g = grad_output[b, t, c0 : c0 + width]
            for c in range(width):
                z[c] = g[c] * _silu_slope(z[c])
                of_bias[c] += z[c]
            grad_window[b, t + newest, c0 : c0 + width] = 0
            for tap in range(newest - reach, newest + 1):
                row, of_row = window[b, t + tap, c0 : c0 + width], grad_window[b, t + tap, c0 : c0 + width]
                by, of_tap = w[tap], grad_weight[b, tap, c0 : c0 + width]
                for c in range(width):
                    of_tap[c] += z[c] * row[c]
                    of_row[c] += z[c] * by[c]


@kernel
def _to_steps(projected: Any, bias: Any, output: Any, first: int, last: int) -> None:
    """Tasks `first … last - 1`."""
    use_wide_vectors()  # type: ignore[call-arg]  # Numba passes the first argument itself
    for task in range(first, last):
        b, c0, width = place(task, output.shape[2])
        offset = bias[c0 : c0 + width]
        for t in range(output.shape[1]):
            row, result = projected[b, t, c0 : c0 + width], output[b, t, c0 : c0 + width]
            for c in range(width):
                result[c] = softplus(row[c] + offset[c])


@kernel
def _to_steps_backward(
    projected: Any, bias: Any, grad_output: Any, grad: Any, grad_bias: Any, first: int, last: int
) -> None:
    """Tasks `first … last - 1`. `grad_bias` has a row for every sequence."""
    use_wide_vectors()  # type: ignore[call-arg]  # Numba passes the first argument itself
    for task in range(first, last):
        b, c0, width = place(task, grad.shape[2])
        offset, of_bias = bias[c0 : c0 + width], grad_bias[b, c0 : c0 + width]
        of_bias[:] = 0
        for t in range(grad.shape[1]):
            row, g = projected[b, t, c0 : c0 + width], grad_output[b, t, c0 : c0 + width]
            result = grad[b, t, c0 : c0 + width]
            for c in range(width):
                value = g[c] * _sigmoid(row[c] + offset[c])
                result[c] = value
                of_bias[c] += value


@kernel
def _gate(outputs: Any, inputs: Any, D: Any, gate: Any, stride: int, result: Any, first: int, last: int) -> None:
    """Tasks `first … last - 1`. `gate` is flat, with rows `stride` apart."""
    use_wide_vectors()  # type: ignore[call-arg]  # Numba passes the first argument itself
    time = result.shape[1]
    for task in range(first, last):
        b, c0, width = place(task, result.shape[2])
        skip = D[c0 : c0 + width]
        for t in range(time):
            at = (b * time + t) * stride + c0
            y, x, z = outputs[b, t, c0 : c0 + width], inputs[b, t, c0 : c0 + width], gate[at : at + width]
            row = result[b, t, c0 : c0 + width]
            for c in range(width):
                row[c] = (y[c] + x[c] * skip[c]) * silu(z[c])


@kernel
def _gate_backward(
    outputs: Any,
    inputs: Any,
    D: Any,
    gate: Any,
    stride: int,
    grad_result: Any,
    grad_outputs: Any,
    grad_inputs: Any,
    grad_D: Any,
    grad_gate: Any,
    first: int,
    last: int,
) -> None:
    """Tasks `first … last - 1`. `grad_D` has a row for every sequence."""
    use_wide_vectors()  # type: ignore[call-arg]  # Numba passes the first argument itself
    time = grad_result.shape[1]
    for task in range(first, last):
        b, c0, width = place(task, grad_result.shape[2])
        skip, of_skip = D[c0 : c0 + width], grad_D[b, c0 : c0 + width]
        of_skip[:] = 0
        for t in range(time):
            at = (b * time + t) * stride + c0
            y, x, z = outputs[b, t, c0 : c0 + width], inputs[b, t, c0 : c0 + width], gate[at : at + width]
            g, of_z = grad_result[b, t, c0 : c0 + width], grad_gate[b, t, c0 : c0 + width]
            of_y, of_x = grad_outputs[b, t, c0 : c0 + width], grad_inputs[b, t, c0 : c0 + width]
            for c in range(width):
                of_z[c] = g[c] * (y[c] + x[c] * skip[c]) * _silu_slope(z[c])
                value = g[c] * silu(z[c])
                of_y[c] = value
                of_x[c] = value * skip[c]
                of_skip[c] += value * x[c]


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor `(batch, time, channels)`, or the slice of a wider one, as a flat view of its memory that begins with
    the first of its rows, and the distance between rows. A copy if rows are not equally far apart."""
    batch, time, width = tensor.shape
    tensor = tensor.detach()
    if tensor.stride(2) != 1 or tensor.stride(0) != time * tensor.stride(1):
        tensor = tensor.contiguous()
    stride = tensor.stride(1)
    return tensor.as_strided(((batch * time - 1) * stride + width,), (1,)), stride


def _copy(parameter: Tensor) -> Tensor:
    """A copy for a kernel. FSDP frees the memory of a parameter between its uses, and an array of it forbids that."""
    return parameter.detach().clone(memory_format=torch.contiguous_format)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, window: Tensor, weight: Tensor, bias: Tensor | None, begins: Tensor | None) -> Tensor:
        batch, time, channels = len(window), window.shape[1] + 1 - weight.shape[2], window.shape[2]
        window, ctx.has_bias = window.contiguous(), bias is not None
        bias = weight.new_zeros(channels) if bias is None else bias
        begins = torch.zeros(batch, time, dtype=torch.bool) if begins is None else begins.contiguous()
        ctx.save_for_backward(window, weight, bias, begins)
        output = window.new_empty(batch, time, channels)
        in_parallel(_convolve, (window, _copy(weight[:, 0].T), _copy(bias), begins, output), _tasks(output))
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        window, weight, bias, begins = ctx.saved_tensors
        by_tap, grad = _copy(weight[:, 0].T), torch.empty_like(window)
        grad_weight, grad_bias = by_tap.new_empty(len(grad), *by_tap.shape), bias.new_empty(len(grad), *bias.shape)
        given = (window, by_tap, _copy(bias), begins, grad_output.contiguous())
        in_parallel(_convolve_backward, (*given, grad, grad_weight, grad_bias), _tasks(grad_output))
        return grad, grad_weight.sum(0).T[:, None], grad_bias.sum(0) if ctx.has_bias else None, None


class _ToSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, bias: Tensor) -> Tensor:
        projected = projected.contiguous()
        ctx.save_for_backward(projected, bias)
        output = torch.empty_like(projected)
        in_parallel(_to_steps, (projected, _copy(bias), output), _tasks(output))
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        projected, bias = ctx.saved_tensors
        grad, grad_bias = torch.empty_like(projected), bias.new_empty(len(projected), *bias.shape)
        arguments = (projected, _copy(bias), grad_output.contiguous(), grad, grad_bias)
        in_parallel(_to_steps_backward, arguments, _tasks(grad))
        return grad, grad_bias.sum(0)


class _GateOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, inputs: Tensor, D: Tensor, gate: Tensor) -> Tensor:
        outputs, inputs = outputs.contiguous(), inputs.contiguous()
        ctx.save_for_backward(outputs, inputs, D, gate)
        result = torch.empty_like(outputs)
        in_parallel(_gate, (outputs, inputs, _copy(D), *_rows(gate), result), _tasks(result))
        return result

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_result: Tensor) -> tuple[Tensor | None, ...]:
        outputs, inputs, D, gate = ctx.saved_tensors
        grads = [torch.empty_like(outputs), torch.empty_like(inputs), D.new_empty(len(outputs), *D.shape)]
        grads.append(gate.new_empty(gate.shape))
        incoming = grad_result.contiguous()
        in_parallel(_gate_backward, (outputs, inputs, _copy(D), *_rows(gate), incoming, *grads), _tasks(outputs))
        grads[2] = grads[2].sum(0)
        return tuple(grads)


def _tasks(output: Tensor) -> int:
    return count_tasks(len(output), output.shape[2])


__all__ = ["convolve", "gate_outputs", "to_steps"]
