"""What the kernels for the processor share: elementary functions that vectorise, and threads.

Numba compiles a kernel at its first call, for the processor at hand, and keeps the result beside this file or in the
user's cache. Its loops over channels become vector instructions. That is why the functions here are polynomials: a
call into a mathematical library would keep a loop scalar.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

try:  # transformers reads the imports of published code, and requires all that are not within a `try`
    from llvmlite import ir
    from numba import njit, types
    from numba.extending import intrinsic
    from numba.np.numpy_support import carray
except ImportError as error:
    raise ImportError("the numba backend of selective_scan needs Numba: pip install numba") from error

# Sums may be reordered and products contracted. But a NaN stays a NaN: guards against divergence look for it.
_MATHEMATICS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
kernel = njit(nogil=True, cache=True, **_MATHEMATICS)
inline = njit(inline="always", **_MATHEMATICS)

# 2**f for |f| <= 1/2, to 3e-9.
_SERIES = Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=Polynomial).coef
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (np.float32(coefficient) for coefficient in _SERIES)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(127)  # the exponents of normal numbers
LOG2_E, _ONE, _TWO = np.float32(1 / np.log(2)), np.float32(1), np.float32(2)
# 1/3, 1/5, … of the area tangent.
_Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = (np.float32(1 / (2 * k + 1)) for k in range(1, 8))


@intrinsic
def _power_of_two(_: Any, exponent: Any) -> Any:
    """2**exponent of an int32 in -126 … 127, by writing its bits."""

    def generate(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    """The pointer to a float32 at an address."""

    def generate(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def use_wide_vectors(_: Any) -> Any:
    """Vectors of 512 bits for the kernel that this is called in, where the processor has them.

    LLVM takes 256 of them by default, because some processors have a lower clock with more.
    """

    def generate(context: Any, builder: Any, __: Any, ___: Any) -> Any:
        # llvmlite knows only attributes without a value, and would refuse this one.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@kernel
def floats(address: Any, shape: Any) -> Any:
    """The array of float32 that lies at an address, of this shape."""
    return carray(pointer(address), shape)  # type: ignore[call-arg]  # Numba passes the first argument itself


@inline
def exp2(z: Any) -> Any:
    """2**z of a float32, to 1e-7 of its value; z is cut to the exponents of normal numbers, -126 … 127."""
    z = min(max(z, _LOWEST), _HIGHEST)
    whole = np.rint(z)
    f = z - whole
    power = _P0 + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * (_P5 + f * _P6)))))
    return power * _power_of_two(np.int32(whole))  # type: ignore[call-arg]  # Numba passes the first argument itself


@inline
def silu(z: Any) -> Any:
    """z sigmoid(z) of a float32, to (1 + |z|) 1e-7 of its value."""
    return z / (_ONE + exp2(-z * LOG2_E))


@inline
def softplus(z: Any) -> Any:
    """log(1 + exp(z)) of a float32, to (1 + |z|) 1e-7 of its value, also where that is tiny.

    log(1 + e) is twice the area tangent of e / (2 + e), which is at most 1/3 here.
    """
    e = exp2(-abs(z) * LOG2_E)
    s = e / (_TWO + e)
    q = s * s
    series = _ONE + q * (_Q1 + q * (_Q2 + q * (_Q3 + q * (_Q4 + q * (_Q5 + q * (_Q6 + q * _Q7))))))
    return max(z, np.float32(0)) + _TWO * s * series


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="midimamba")


# Threads do not survive a fork, and a pool without them would wait forever.
os.register_at_fork(after_in_child=_threads.cache_clear)


def in_parallel(
    function: Callable[..., None], arguments: tuple[Tensor | int, ...], tasks: int, tasks_per_thread: int = 1
) -> None:
    """Call `function(*arguments, first, last)` with arrays in place of tensors, see [`share`]."""
    arrays = [each.detach().numpy() if isinstance(each, Tensor) else each for each in arguments]
    share(function, tuple(arrays), tasks, tasks_per_thread)


def share(function: Callable[..., None], arguments: tuple[Any, ...], tasks: int, tasks_per_thread: int = 1) -> None:
    """Call `function(*arguments, first, last)` so that all of `tasks` are done, by as many threads as torch uses.

    A thread gets at least `tasks_per_thread` tasks. What a task computes must not depend on the thread that does it:
    then results are the same for any number of threads.
    """
    threads = max(1, min(torch.get_num_threads(), tasks // tasks_per_thread))
    cuts = [tasks * index // threads for index in range(threads + 1)]
    others = []
    if threads > 1:
        pool = _threads(torch.get_num_threads() - 1)
        others = [pool.submit(function, *arguments, cuts[i], cuts[i + 1]) for i in range(1, threads)]
    function(*arguments, cuts[0], cuts[1])
    for other in others:
        other.result()


__all__ = [
    "LOG2_E",
    "exp2",
    "floats",
    "in_parallel",
    "inline",
    "intrinsic",
    "ir",
    "kernel",
    "share",
    "silu",
    "softplus",
    "types",
    "use_wide_vectors",
]
