"""Copies of the generator that are not trained: the roll-out policy, the pre-trained reference, the average."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midimamba.files import whole_file
from midimamba.modeling.stock_names import plain_name

Model = TypeVar("Model", bound=nn.Module)


def frozen_copy(policy: Model) -> Model:
    """A copy on the same device, in evaluation mode, whose parameters need no gradient."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


@torch.no_grad()
def follow(follower: nn.Module, policy: nn.Module, momentum: float) -> None:
    """`follower <- momentum follower + (1 - momentum) policy`, parameter by parameter."""
    for ours, theirs in zip(follower.parameters(), policy.parameters(), strict=True):
        ours.lerp_(theirs.detach(), 1 - momentum)


@torch.no_grad()
def distance(policy: nn.Module, other: nn.Module) -> Tensor:
    """The Euclidean distance of two sets of parameters, relative to the norm of the first; a scalar."""
    pairs = list(zip(policy.parameters(), other.parameters(), strict=True))
    start = torch.zeros((), device=pairs[0][0].device)
    apart = sum(((ours - theirs).square().sum() for ours, theirs in pairs), start)
    norm = sum((ours.square().sum() for ours, _ in pairs), start)
    return (apart / norm).sqrt()


@contextmanager
def weights_of(policy: nn.Module, other: nn.Module) -> Iterator[None]:
    """Inside, the policy computes with the other's weights, and the other with the policy's."""
    _swap(policy, other)
    try:
        yield
    finally:
        _swap(policy, other)


def _swap(policy: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        ours.data, theirs.data = theirs.data, ours.data


def save_policy(policy: nn.Module, file: Path) -> None:
    """Write the parameters; tied ones once, as safetensors demands."""
    save_tensors({name: parameter.detach() for name, parameter in policy.named_parameters()}, file)


def load_policy(policy: nn.Module, file: Path) -> None:
    """Read what [`save_policy`] wrote."""
    own = dict(policy.named_parameters())
    for name, tensor in load_file(file).items():
        own[name if name in own else plain_name(name)].data.copy_(tensor)  # older files have the stock names


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that is either whole or not there."""
    with whole_file(file) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
