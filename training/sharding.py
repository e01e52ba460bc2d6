"""A generator in parts: every process of a run keeps a share of the weights, gradients and moments (FSDP2).

Torch's `fully_shard` splits each parameter over the processes, and gathers those of a layer while it computes. Outside
of a pass, a parameter is a `DTensor`. What samples needs plain tensors, and gets a whole copy.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

Model = TypeVar("Model", bound=nn.Module)


def shard(model: nn.Module, device: torch.device) -> None:
    """Split the parameters of a model over all processes, in place. Their gradients are then means over all.

    A layer is gathered as one; what is in none, such as the embeddings with the head that is tied to them, as another.
    Nothing is cast: mixed precision is that of autocast, so that the numbers do not depend on who keeps what.

    Args:
        model (`nn.Module`): layers are the modules that its `_no_split_modules` names, if it is of transformers.
        device (`torch.device`): where it computes.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for module in (*layers, model):  # without the default for the last: it would stay whole after a pass without graph
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.register_load_state_dict_pre_hook(_split_weights)


def is_sharded(model: nn.Module) -> bool:
    """Whether [`shard`] has split a model."""
    return isinstance(next(model.parameters(), None), DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor of all values, gathered if it is split: all processes call together."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def own_part(tensor: Tensor) -> Tensor:
    """A plain tensor of the values that this process keeps: of a tensor that is not split, all."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part


def with_parameters(model: Model, parameter: Callable[[nn.Parameter], Tensor]) -> Model:
    """A copy of a model with other tensors for its parameters. Those that were tied are tied again."""
    memory: dict[int, Any] = {
        id(old): nn.Parameter(parameter(old), requires_grad=old.requires_grad) for old in model.parameters()
    }
    return copy.deepcopy(model, memory)


def hollow_copy(model: Model) -> Model:
    """A copy that has shapes and no weights: a mould for [`whole_copy`]."""
    return with_parameters(model, lambda parameter: parameter.detach().to("meta"))


def whole_copy(mould: Model, model: nn.Module) -> Model:
    """A plain copy of a sharded model, in the memory of the processor. All processes call together.

    Args:
        mould (`nn.Module`): a [`hollow_copy`] of the model, made before it was split.
        model (`nn.Module`): the model.

    Returns:
        In the main process a copy with its weights, in the others one without.
    """
    weights = {}
    for hollow, split in zip(mould.parameters(), model.parameters(), strict=True):
        weights[hollow] = _kept_by_the_first(split.detach(), hollow.detach())
    return with_parameters(mould, weights.__getitem__)


def _kept_by_the_first(tensor: Tensor, otherwise: Any = None) -> Any:
    """The whole of a tensor in the memory of the processor, in the main process; `otherwise` in the others."""
    gathered = whole(tensor)  # one at a time: no process but the first holds them all
    return gathered.cpu() if distributed.get_rank() == 0 else otherwise


@contextmanager
def whole_moments(optimizer: Optimizer) -> Iterator[None]:
    """Inside, `state_dict` holds whole tensors in the main process, as if the parameters were not split. All processes
    enter together; inside, none waits for another."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    gathered = {
        key: {name: _kept_by_the_first(value) if isinstance(value, DTensor) else value for name, value in each.items()}
        for key, each in inner.state_dict()["state"].items()
    }
    handle = inner.register_state_dict_post_hook(lambda _, state: {**state, "state": gathered})
    try:
        yield
    finally:
        handle.remove()


def split_on_loading(optimizer: Optimizer) -> None:
    """Let the optimizer of a sharded model load what one of a whole model saved."""
    optimizer.register_load_state_dict_pre_hook(_split_moments)


def _split_weights(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """What `load_state_dict` of a sharded model does first: take this process's part of whole tensors."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = _like(parameter, state[name])


def _split_moments(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split = {
        key: {name: _like(parameters[key], value) for name, value in each.items()}
        for key, each in state["state"].items()
    }
    return {**state, "state": split}


def _like(parameter: Tensor, value: Any) -> Any:
    """A value split as a parameter is, if it has a number for each of the parameter's."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    # Every process has read the whole and keeps its part: nothing is sent.
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
