"""What the backends of the scan share: the type they compute in, and refusals of gradients."""

from collections.abc import Callable
from functools import reduce, wraps
from typing import Any

import torch
from torch import Tensor

_NO_SECOND_DERIVATIVE = (
    'this backend of selective_scan has no second derivative: call selective_scan(..., backend="reference"), '
    "which has one, or do without create_graph"
)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of the recurrence: float32, or float64 where an input has it. In less, products of decays underflow."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


class _Refusal(torch.autograd.Function):
    """The identity, whose gradient is an error."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor, message: str) -> Tensor:
        ctx.message = message
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(ctx.message)


def refuse_gradient(tensor: Tensor, message: str) -> Tensor:
    """The same values, but a gradient through them raises `RuntimeError(message)`."""
    anchor = torch.ones((), device=tensor.device, requires_grad=True)  # so that there is a gradient to refuse
    refused: Tensor = _Refusal.apply(tensor.detach(), anchor, message)
    return refused


def first_derivative_only(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorate the `backward` of an autograd function: its gradients may be used, but not differentiated.

    Unlike `torch.autograd.function.once_differentiable`, it also refuses where the incoming gradients are constants,
    as they are after a sum: the gradients depend on the saved tensors all the same.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), torch.autocast(incoming[0].device.type, enabled=False):
            gradients = backward(ctx, *incoming)
        if not torch.is_grad_enabled():  # it is, under create_graph
            return gradients
        return tuple(None if g is None else refuse_gradient(g, _NO_SECOND_DERIVATIVE) for g in gradients)

    return wrapped
