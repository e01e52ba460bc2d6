"""Copies of the generator that are not trained: the roll-out policy, the pre-trained reference, the average."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from midimamba.files import whole_file
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.stock_names import plain_name


def frozen_copy(policy: MidiMambaForCausalLM) -> MidiMambaForCausalLM:
    """A copy on the same device, in evaluation mode, whose parameters need no gradient."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


@torch.no_grad()
def follow(follower: MidiMambaForCausalLM, policy: MidiMambaForCausalLM, momentum: float) -> None:
    """`follower <- momentum follower + (1 - momentum) policy`, parameter by parameter."""
    for ours, theirs in zip(follower.parameters(), policy.parameters(), strict=True):
        ours.lerp_(theirs.detach(), 1 - momentum)


@torch.no_grad()
def distance(policy: MidiMambaForCausalLM, other: MidiMambaForCausalLM) -> float:
    """The Euclidean distance of two sets of parameters, relative to the norm of the first."""
    pairs = list(zip(policy.parameters(), other.parameters(), strict=True))
    apart = sum(((ours - theirs).square().sum() for ours, theirs in pairs), torch.zeros((), device=policy.device))
    norm = sum((ours.square().sum() for ours, _ in pairs), torch.zeros((), device=policy.device))
    return (apart / norm).sqrt().item()


@contextmanager
def weights_of(policy: MidiMambaForCausalLM, other: MidiMambaForCausalLM) -> Iterator[None]:
    """Inside, the policy computes with the other's weights, and the other with the policy's."""
    _swap(policy, other)
    try:
        yield
    finally:
        _swap(policy, other)


def _swap(policy: MidiMambaForCausalLM, other: MidiMambaForCausalLM) -> None:
    for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        ours.data, theirs.data = theirs.data, ours.data


def save_policy(policy: MidiMambaForCausalLM, file: Path) -> None:
    """Write the parameters; tied ones once, as safetensors demands."""
    save_tensors({name: parameter.detach() for name, parameter in policy.named_parameters()}, file)


def load_policy(policy: MidiMambaForCausalLM, file: Path) -> None:
    """Read what [`save_policy`] wrote."""
    for name, tensor in load_file(file).items():
        policy.get_parameter(plain_name(name)).data.copy_(tensor)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that is either whole or not there."""
    with whole_file(file) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
