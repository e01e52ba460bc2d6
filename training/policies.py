"""Copies of the generator that are not trained: the roll-out policy, the pre-trained reference, the average."""

import copy
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midimamba.files import whole_file
from midimamba.modeling.stock_names import plain_name
from midimamba.training.sharding import whole

Model = TypeVar("Model", bound=nn.Module)


def frozen_copy(policy: Model) -> Model:
    """A copy on the same device, in evaluation mode, whose parameters need no gradient."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


@torch.no_grad()
def follow(follower: nn.Module, policy: nn.Module, momentum: float) -> None:
    """`follower <- momentum follower + (1 - momentum) policy`, parameter by parameter. The policy may be sharded; then
    all processes call together."""
    for ours, theirs in zip(follower.parameters(), policy.parameters(), strict=True):
        if momentum:
            ours.lerp_(whole(theirs), 1 - momentum)
        else:
            ours.copy_(whole(theirs))  # which may have another precision


@torch.no_grad()
def distance(policy: nn.Module, other: nn.Module) -> Tensor:
    """The Euclidean distance of two sets of parameters, relative to the norm of the first; a scalar. The first may be
    sharded; then all processes call together."""
    apart, norm = torch.zeros(2, device=next(other.parameters()).device)
    for parameter, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        ours = whole(parameter)
        apart += (ours - theirs).square().sum()
        norm += ours.square().sum()
    return (apart / norm).sqrt()


def save_policy(policy: nn.Module, file: Path) -> None:
    """Write the parameters; tied ones once, as safetensors demands."""
    save_tensors({name: parameter.detach() for name, parameter in policy.named_parameters()}, file)


@torch.no_grad()
def load_policy(policy: nn.Module, file: Path) -> None:
    """Read what [`save_policy`] wrote."""
    own = dict(policy.named_parameters())
    for name, tensor in load_file(file).items():
        own[name if name in own else plain_name(name)].copy_(tensor)  # older files have the stock names


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that is either whole or not there."""
    with whole_file(file) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
