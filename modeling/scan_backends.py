"""Which backend computes a scan: the one asked for by name or by the environment, or the fastest that can."""

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .scan_common import refuse_gradient, working_dtype

# The fastest first.
BACKENDS = ("mamba_ssm", "triton", "numba", "chunked", "reference")
VARIABLE = "MIDIMAMBA_SCAN"
# A program of the Triton kernels holds the states in registers; mamba_ssm documents its own limit.
_MAX_TRITON_STATE, _MAX_MAMBA_SSM_STATE = 64, 256
_INTERFACE = "mamba_ssm.ops.selective_scan_interface"


class _Call(NamedTuple):
    """What a backend has to be able to do."""

    device: torch.device
    dtype: torch.dtype
    state_size: int
    has_initial_state: bool
    has_reset: bool


def available_backends(device: torch.device | str) -> list[str]:
    """The backends that run on a device, the fastest first.

    Args:
        device (`torch.device` or `str`): where the tensors would be.

    Returns:
        `list[str]`: some of `"mamba_ssm"`, `"triton"`, `"numba"`, `"chunked"` and `"reference"`.
    """
    call = _Call(torch.device(device), torch.float32, 1, False, False)
    return [name for name in BACKENDS if _obstacle(name, call) is None]


def choose_backend(
    device: torch.device | str,
    backend: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    state_size: int = 16,
    has_initial_state: bool = False,
    has_reset: bool = False,
) -> str:
    """The backend that [`selective_scan`] takes for a call.

    Args:
        device (`torch.device` or `str`): where the tensors are.
        backend (`str`, *optional*): the backend asked for. By default the one that the environment variable
            `MIDIMAMBA_SCAN` names or, where it is unset or empty, the fastest that is installed and can do it: of
            `mamba_ssm`, `triton` and `chunked` on CUDA, of `numba` and `chunked` elsewhere.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): the type of the recurrent state.
        state_size (`int`, *optional*, defaults to 16): the size of the state of a channel.
        has_initial_state (`bool`, *optional*, defaults to `False`): whether an initial state is given.
        has_reset (`bool`, *optional*, defaults to `False`): whether resets are given.

    Returns:
        `str`: the name of a backend.

    Raises:
        `ValueError`: the backend asked for is unknown, or unable to do this call.
    """
    call = _Call(torch.device(device), dtype, state_size, has_initial_state, has_reset)
    asked, source = (backend, "backend") if backend is not None else (os.environ.get(VARIABLE, ""), VARIABLE)
    if asked == "" and backend is None:
        candidates = BACKENDS if call.device.type == "cuda" else ("numba", "chunked")
        return next(name for name in candidates if _obstacle(name, call) is None)
    if asked not in BACKENDS:
        raise ValueError(
            f"{source}={asked!r} is not a backend of the scan: choose one of {', '.join(sorted(BACKENDS))}"
        )
    obstacle = _obstacle(asked, call)
    if obstacle is not None:
        able = " or ".join(name for name in BACKENDS if _obstacle(name, call) is None)
        raise ValueError(f"{source}={asked!r} cannot do this scan: {obstacle}. Choose {able}, or leave {source} unset")
    return asked


def _obstacle(name: str, call: _Call) -> str | None:
    """Why a backend cannot do a call; `None` if it can."""
    if name == "triton":
        return _triton_obstacle(call)
    if name == "mamba_ssm":
        return _mamba_ssm_obstacle(call)
    if name == "numba":
        return _numba_obstacle(call)
    return None


def _triton_obstacle(call: _Call) -> str | None:
    if call.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it takes tensors on CUDA and these are on {call.device}"
    if not _importable("triton"):
        return "Triton cannot be imported (pip install triton)"
    if call.state_size > _MAX_TRITON_STATE:
        return f"it takes at most {_MAX_TRITON_STATE} state values per channel, but here there are {call.state_size}"
    return None


def _numba_obstacle(call: _Call) -> str | None:
    if call.device.type != "cpu":
        return f"it takes tensors on the processor and these are on {call.device}"
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into its kernels"
    if not _importable("numba"):
        return "Numba cannot be imported (pip install numba)"
    if call.dtype != torch.float32:
        return f"its state is float32, and here it is {str(call.dtype).removeprefix('torch.')}"
    return None


def _mamba_ssm_obstacle(call: _Call) -> str | None:
    if call.device.type != "cuda":
        return f"it takes tensors on CUDA and these are on {call.device}"
    if not _importable(_INTERFACE):
        return "mamba_ssm cannot be imported (pip install mamba-ssm)"
    if call.has_initial_state:
        return "it takes no initial state"
    if call.has_reset:
        return "it takes no reset"
    if call.dtype == torch.float64:
        return "it has no float64"
    if call.state_size > _MAX_MAMBA_SSM_STATE:
        return (
            f"it takes at most {_MAX_MAMBA_SSM_STATE} state values per channel, but here there are {call.state_size}"
        )
    return None


@cache
def _importable(module: str) -> bool:
    """Import it rather than look it up: a package that was compiled for another torch is found, but does not load."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def scan_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """`selective_scan_fn` of the package `mamba_ssm`, which has time last. See [`selective_scan`].

    The package computes no gradient through the final state: asking for one is an error, not a silent zero.
    """
    interface = importlib.import_module(_INTERFACE)
    scan: Callable[..., tuple[Tensor, Tensor]] = interface.selective_scan_fn
    dtype = working_dtype(x, dt, A, B, C)
    u, delta, enters, reads = (tensor.to(dtype).transpose(1, 2).contiguous() for tensor in (x, dt, B, C))
    output, state = scan(u, delta, A.to(dtype), enters, reads, return_last_state=True)
    message = "mamba_ssm has no gradient through the final state: choose another backend, such as 'triton'"
    return output.transpose(1, 2).to(x.dtype), refuse_gradient(state.transpose(1, 2), message)
