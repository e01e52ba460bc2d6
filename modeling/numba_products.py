"""Products of weights, as they lie in a linear layer, with a few vectors, compiled by Numba.

The vectors lie side by side: an array of shape `(groups, features, lanes)` holds `groups * lanes` of them, so that
one number of a weight meets the same feature of all vectors of a group. A weight is read once, without being packed
before, and the sums stay in registers. With 16 vectors that is 110 GFLOPS on one thread of an AMD EPYC, where MKL
does 37.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .numba_common import floats, intrinsic, ir, kernel, types

_FLOAT, _INT, _INDEX, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
_VECTOR = ir.VectorType(_FLOAT, 8)  # half a register of AVX-512, and two of NEON
_BYTES = 4


@kernel
def lanes_for(count: int) -> int:
    """The lanes of the groups in which so many vectors are multiplied."""
    return 1 if count == 1 else 8 if count <= 8 else 16


def _tile(rows: int, vectors: int) -> Callable[..., Any]:
    """
    Adds the products of some rows of weights with one group of vectors: twelve sums or fewer, each in a register.
    Numba's own loops would keep them in memory.
    """
    arguments = [_INT] * 6

    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        # A function of its own, so that the compiler does not optimise it again at every place that calls it.
        kind, name = ir.FunctionType(ir.VoidType(), arguments), f"midimamba_tile_{rows}_{vectors}"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        if function.is_declaration:
            function.linkage = "internal"
            function.attributes.add("noinline")
            _write_tile(ir.IRBuilder(function.append_basic_block("entry")), function.args, rows, vectors)
        builder.call(function, values)
        return ir.Constant(_INT, 0)

    @intrinsic
    def tile(_: Any, weight: Any, stride: Any, x: Any, y: Any, lanes: Any, depth: Any) -> Any:
        return types.int64(*[types.int64] * len(arguments)), generate

    return tile


def _write_tile(builder: Any, arguments: Any, rows: int, vectors: int) -> None:
    weight, stride, x, y, lanes, depth = arguments

    def number(value: int) -> Any:
        return ir.Constant(_INT, value)

    def at(address: Any, offset: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(address, builder.mul(offset, number(_BYTES))), kind.as_pointer())

    def at_vectors(address: Any, row: Any) -> list[Any]:
        start = builder.mul(row, lanes)
        return [at(address, builder.add(start, number(8 * vector)), _VECTOR) for vector in range(vectors)]

    def load(places: list[Any]) -> list[Any]:
        return [builder.load(place, align=_BYTES) for place in places]

    starts = [builder.add(weight, builder.mul(stride, number(_BYTES * row))) for row in range(rows)]
    places = [place for row in range(rows) for place in at_vectors(y, number(row))]
    before = load(places)
    entry, loop, done = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)

    builder.position_at_end(loop)
    k, sums = builder.phi(_INT), [builder.phi(_VECTOR) for _ in places]
    # The next tile begins where the last row of this one ends. Of short pieces of a few rows at a time, the processor
    # would notice too late that it needs them.
    next_tile = builder.add(builder.mul(stride, number(rows)), builder.mul(k, number(rows)))
    _prefetch(builder, at(weight, next_tile, _BYTE))
    features, after = load(at_vectors(x, k)), []
    for row, start in enumerate(starts):
        value = builder.load(at(start, k, _FLOAT), align=_BYTES)
        undefined, zeros = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_INDEX, 8), [0] * 8)
        first = builder.insert_element(undefined, value, ir.Constant(_INDEX, 0))
        everywhere = builder.shuffle_vector(first, undefined, zeros)
        for total, feature in zip(sums[row * vectors :], features, strict=False):
            product = builder.fmul(everywhere, feature, flags=("contract",))
            after.append(builder.fadd(total, product, flags=("contract",)))
    k_after = builder.add(k, number(1))
    for phi, earlier, later in zip([k, *sums], [number(0), *before], [k_after, *after], strict=True):
        phi.add_incoming(earlier, entry)
        phi.add_incoming(later, loop)
    builder.cbranch(builder.icmp_signed("<", k_after, depth), loop, done)

    builder.position_at_end(done)
    for place, total in zip(places, after, strict=True):
        builder.store(total, place, align=_BYTES)
    builder.ret_void()


def _prefetch(builder: Any, address: Any) -> None:
    """Bring what lies at an address into the cache, as far as there is anything."""
    kind = ir.FunctionType(ir.VoidType(), [address.type, _INDEX, _INDEX, _INDEX])
    function = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
    to_read, to_all_levels, data = (ir.Constant(_INDEX, value) for value in (0, 3, 1))
    builder.call(function, [address, to_read, to_all_levels, data])


_twelve_by_8, _two_by_8, _one_by_8 = _tile(12, 1), _tile(2, 1), _tile(1, 1)
_six_by_16, _two_by_16, _one_by_16 = _tile(6, 2), _tile(2, 2), _tile(1, 2)


@kernel
def multiply(
    weight: int, bias: int, adds: bool, depth: int, x: int, y: int, groups: int, outputs: int, lanes: int
) -> None:
    """
    A linear layer. All arrays are in float32, and given by their addresses.

    Args:
        weight (array of shape `(outputs, depth)`), bias (array of shape `(outputs,)`): 0 for no bias.
        adds: whether to add to what is in `y`.
        x (array of shape `(groups, depth, lanes)`): the inputs.
        y (array of shape `(groups, outputs, lanes)`): receives the outputs.
    """
    _begin(bias, adds, y, groups, outputs, lanes)
    if lanes == 1:
        _dot(weight, depth, x, y, outputs)
        return
    row = 0
    while row < outputs:
        left, count = outputs - row, 1
        for group in range(groups):
            w, from_x, to_y = (
                weight + 4 * row * depth,
                x + 4 * group * depth * lanes,
                y + 4 * (group * outputs + row) * lanes,
            )
            if lanes == 8:
                if left >= 12:
                    count = 12
                    _twelve_by_8(w, depth, from_x, to_y, lanes, depth)
                elif left >= 2:
                    count = 2
                    _two_by_8(w, depth, from_x, to_y, lanes, depth)
                else:
                    _one_by_8(w, depth, from_x, to_y, lanes, depth)
            elif left >= 6:
                count = 6
                _six_by_16(w, depth, from_x, to_y, lanes, depth)
            elif left >= 2:
                count = 2
                _two_by_16(w, depth, from_x, to_y, lanes, depth)
            else:
                _one_by_16(w, depth, from_x, to_y, lanes, depth)
        row += count


@kernel
def _begin(bias: int, adds: bool, y: int, groups: int, outputs: int, lanes: int) -> None:
    to = floats(y, (groups, outputs, lanes))
    for group in range(groups):
        for row in range(outputs):
            if bias != 0:
                value = floats(bias, (outputs,))[row]
                for lane in range(lanes):
                    to[group, row, lane] = value + (to[group, row, lane] if adds else np.float32(0))
            elif not adds:
                for lane in range(lanes):
                    to[group, row, lane] = 0


@kernel
def _dot(weight: int, depth: int, x: int, y: int, outputs: int) -> None:
    rows, vector, to = floats(weight, (outputs, depth)), floats(x, (depth,)), floats(y, (outputs,))
    for row in range(outputs):
        total = np.float32(0)
        for k in range(depth):
            total += rows[row, k] * vector[k]
        to[row] += total


__all__ = ["lanes_for", "multiply"]
