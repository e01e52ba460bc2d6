"""One token through all layers of a generator and its head, as one kernel for the processor, compiled by Numba.

Decoding one token is little work in many operations, which take longer to be called than to be computed. Here, a step
is one call. It reads the weights where the model keeps them, so nothing is prepared and nothing can be out of date.

Sequences lie side by side, see [`~midimamba.modeling.numba_products`]: what a product takes and makes has shape
`(groups, features, lanes)`. Convolution and scan work on channels side by side, as the states keep them.
"""

from typing import Any

import numpy as np

from .numba_common import floats, kernel, silu
from .numba_products import lanes_for, multiply
from .step_numba import GAP, convolve, decay_rates, scan

SLOTS = 20
"""Columns of a table, which says where everything is. Its first row is about the whole step, the others about a layer
each, with the two parts of the layer's state at the end."""
BATCH, EMBEDDED, ROOM, LOGITS, LAYERS, HIDDEN, CHANNELS, TAPS, STATE, RANK, INNER, VOCAB = range(12)
FINAL_NORM, HEAD, HEAD_BIAS = range(12, 15)
MIXER_NORM, IN, IN_BIAS, CONV, CONV_BIAS, SELECT, SELECT_BIAS, STEP, STEP_BIAS, A_LOG, D, OUT, OUT_BIAS = range(13)
INNER_NORM, GATE, UP, DOWN = range(13, 17)
CONV_STATE, SCAN_STATE = range(SLOTS - 2, SLOTS)

_BYTES = 4
# All lanes are computed by the same vector instructions, so that a sequence does not depend on its place among others:
# what is left over of a loop is compiled to other instructions, which round otherwise.
_TOGETHER = 8


@kernel
def room_per_sequence(hidden: int, channels: int, selects: int, inner: int, vocab: int) -> int:
    """How many floats a step works with, for each sequence."""
    return 2 * hidden + max(2 * channels, 2 * inner, vocab) + 2 * channels + selects + 4 * (channels + GAP)


@kernel
def decode(table: Any, epsilon: Any, first: int, last: int) -> None:
    """
    Read a token onto the states of sequences `first … last - 1`, and write the logits of what follows.

    Args:
        table (`array` of int64 and of shape `(1 + layers, SLOTS)`): sizes and addresses, in the order of the names
            above; 0 is the address of a bias that does not exist. The embeddings have shape `(batch, hidden)`, the
            logits `(batch, vocab)`. There is [`room_per_sequence`] for 16 sequences and twice the batch.
        epsilon (`float32`): of the norms.
    """
    whole = table[0]
    hidden, channels, inner, vocab = whole[HIDDEN], whole[CHANNELS], whole[INNER], whole[VOCAB]
    selects = whole[RANK] + 2 * whole[STATE]
    count = last - first
    lanes = lanes_for(count)
    groups = (count + lanes - 1) // lanes
    padded = groups * lanes
    # Another thread begins at 8 sequences or more, so the lanes of this one are fewer than twice its sequences.
    room = whole[ROOM] + _BYTES * 2 * first * room_per_sequence(hidden, channels, selects, inner, vocab)
    normed = room + _BYTES * hidden * padded
    wide = normed + _BYTES * hidden * padded
    rest = wide + _BYTES * max(2 * channels, 2 * inner, vocab) * padded
    stream, embedded = floats(room, (groups, hidden, lanes)), floats(whole[EMBEDDED], (whole[BATCH], hidden))
    _to_lanes(embedded[first:last], stream)
    for index in range(whole[LAYERS]):
        layer = table[1 + index]
        _norm(stream, layer[MIXER_NORM], epsilon, normed)
        multiply(layer[IN], layer[IN_BIAS], False, hidden, normed, wide, groups, 2 * channels, lanes)
        _mix(whole, layer, first, count, groups, lanes, wide, rest)
        multiply(layer[OUT], layer[OUT_BIAS], True, channels, rest, room, groups, hidden, lanes)
        if inner > 0:
            _norm(stream, layer[INNER_NORM], epsilon, normed)
            up = wide + _BYTES * inner * padded
            multiply(layer[GATE], 0, False, hidden, normed, wide, groups, inner, lanes)
            multiply(layer[UP], 0, False, hidden, normed, up, groups, inner, lanes)
            _gate(floats(wide, (groups * inner, lanes)), floats(up, (groups * inner, lanes)))
            multiply(layer[DOWN], 0, True, inner, wide, room, groups, hidden, lanes)
    _norm(stream, whole[FINAL_NORM], epsilon, normed)
    multiply(whole[HEAD], whole[HEAD_BIAS], False, hidden, normed, wide, groups, vocab, lanes)
    logits = floats(whole[LOGITS], (whole[BATCH], vocab))
    _to_rows(floats(wide, (groups, vocab, lanes)), logits[first:last])


@kernel
def _mix(whole: Any, layer: Any, first: int, count: int, groups: int, lanes: int, projected: int, mixed: int) -> None:
    """From channels and gate `(groups, 2 * channels, lanes)` to what the output projection takes.

    `mixed` receives it, `(groups, channels, lanes)`, and there is room behind it.
    """
    channels, taps, size, rank = whole[CHANNELS], whole[TAPS], whole[STATE], whole[RANK]
    selects, padded = rank + 2 * size, groups * lanes
    selected = mixed + _BYTES * channels * padded
    steps = selected + _BYTES * selects * padded
    rows = steps + _BYTES * channels * padded
    each = _BYTES * count * (channels + GAP)
    shape = count, channels + GAP
    inputs, convolved, waits, outputs = (
        floats(rows, shape),
        floats(rows + each, shape),
        floats(rows + 2 * each, shape),
        floats(rows + 3 * each, shape),
    )
    both = floats(projected, (groups, 2 * channels, lanes))
    in_lanes = floats(mixed, (groups, channels, lanes))

    kernels, weight = floats(layer[CONV], (channels, taps + 1)), np.empty((taps + 1, channels), np.float32)
    bias = np.zeros(channels, np.float32) if layer[CONV_BIAS] == 0 else floats(layer[CONV_BIAS], (channels,))
    for tap in range(taps + 1):
        for c in range(channels):
            weight[tap, c] = kernels[c, tap]
    past = floats(layer[CONV_STATE] + _BYTES * first * taps * channels, (count, taps, channels))
    _to_rows(both[:, :channels], inputs)
    convolve(inputs, past, weight, bias, convolved, 0, count)
    _to_lanes(convolved, in_lanes)

    multiply(layer[SELECT], layer[SELECT_BIAS], False, channels, mixed, selected, groups, selects, lanes)
    # The first outputs of a group are the inputs of the time step.
    for group in range(groups):
        at = _BYTES * group * lanes
        multiply(layer[STEP], 0, False, rank, selected + at * selects, steps + at * channels, 1, channels, lanes)
    _to_rows(floats(steps, (groups, channels, lanes)), waits)
    _to_rows(both[:, channels:], inputs)
    rates = decay_rates(floats(layer[A_LOG], (channels, size)))
    state = floats(layer[SCAN_STATE] + _BYTES * first * size * channels, (count, size, channels))
    step_bias, skip = floats(layer[STEP_BIAS], (channels,)), floats(layer[D], (channels,))
    chosen, enters, reads = (
        floats(selected, (groups, selects, lanes)),
        np.empty(size, np.float32),
        np.empty(size, np.float32),
    )
    for b in range(count):
        for n in range(size):
            enters[n] = chosen[b // lanes, rank + n, b % lanes]
            reads[n] = chosen[b // lanes, rank + size + n, b % lanes]
        scan(convolved[b], waits[b], step_bias, rates, enters, reads, skip, inputs[b], state[b], outputs[b])
    _to_lanes(outputs, in_lanes)


@kernel
def _norm(stream: Any, weight: int, epsilon: Any, normed: int) -> None:
    groups, features, lanes = stream.shape
    weights, outputs = floats(weight, (features,)), floats(normed, (groups, features, lanes))
    share, sums = np.float32(1 / features), np.empty(_TOGETHER, np.float32)
    if lanes == 1:  # along the features, because a loop over one lane is no vector instruction
        row, to_row = stream.reshape(-1), outputs.reshape(-1)
        total = np.float32(0)
        for feature in range(features):
            total += row[feature] * row[feature]
        scale = np.float32(1) / np.sqrt(total * share + epsilon)
        for feature in range(features):
            to_row[feature] = weights[feature] * (row[feature] * scale)
        return
    for group in range(groups):
        values, to = stream[group], outputs[group]
        for start in range(0, lanes, _TOGETHER):
            sums[:] = 0
            for feature in range(features):
                for lane in range(_TOGETHER):
                    sums[lane] += values[feature, start + lane] * values[feature, start + lane]
            for lane in range(_TOGETHER):
                sums[lane] = np.float32(1) / np.sqrt(sums[lane] * share + epsilon)
            for feature in range(features):
                for lane in range(_TOGETHER):
                    to[feature, start + lane] = weights[feature] * (values[feature, start + lane] * sums[lane])


@kernel
def _gate(gate: Any, up: Any) -> None:
    """`gate` becomes `silu(gate) * up`. Both are `(features, lanes)`."""
    features, lanes = gate.shape
    if lanes == 1:
        row, up_row = gate.reshape(-1), up.reshape(-1)
        for feature in range(features):
            row[feature] = silu(row[feature]) * up_row[feature]
        return
    for feature in range(features):
        for start in range(0, lanes, _TOGETHER):
            for lane in range(start, start + _TOGETHER):
                gate[feature, lane] = silu(gate[feature, lane]) * up[feature, lane]


@kernel
def _to_lanes(rows: Any, lanes: Any) -> None:
    """From `(sequences, at least features)` to `(groups, features, lanes)`. Lanes without a sequence get zeros."""
    width = lanes.shape[2]
    for group in range(lanes.shape[0]):
        for feature in range(lanes.shape[1]):
            for lane in range(width):
                b = group * width + lane
                lanes[group, feature, lane] = rows[b, feature] if b < len(rows) else 0


@kernel
def _to_rows(lanes: Any, rows: Any) -> None:
    """From `(groups, features, lanes)` to `(sequences, at least features)`."""
    width = lanes.shape[2]
    for b in range(len(rows)):
        for feature in range(lanes.shape[1]):
            rows[b, feature] = lanes[b // width, feature, b % width]


__all__ = ["FINAL_NORM", "LAYERS", "SLOTS", "decode", "room_per_sequence"]
