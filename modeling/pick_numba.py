"""Drawing a token from logits, as a kernel for the processor, compiled by Numba.

torch shares such small operations out among its threads. They take longer that way, and when they are done they hold
the cores that the next step needs, see [`~midimamba.runtime.limit_spinning`].
"""

from typing import Any

import numpy as np

from .numba_common import LOG2_E, exp2, kernel

UNSURE = -1
# torch rounds softmax and each sum to float32. Measured with 300 to 20,000 tokens, its sums and ours differ by up to
# 1.2e-7 of the whole.
_MARGIN = 4e-6


@kernel
def pick_(logits: Any, numbers: Any, tokens: Any) -> None:
    """
    Invert the cumulative distribution of each row.

    Args:
        logits (`array` of shape `(n, vocab)`), numbers (`array` of shape `(n,)`): in float32; the numbers in [0, 1).
        tokens (`array` of int64 and of shape `(n,)`): receives the tokens; [`UNSURE`] where the number lies so close
            to the border of two tokens that rounding decides, or where the logits are no distribution.
    """
    vocab = logits.shape[1]
    weights = np.empty(vocab, np.float32)
    for row in range(len(logits)):
        scores = logits[row]
        highest = scores[0]
        for token in range(vocab):
            highest = max(highest, scores[token])
        for token in range(vocab):
            weights[token] = exp2((scores[token] - highest) * LOG2_E)
        total = np.float64(0)
        for token in range(vocab):
            total += weights[token]
        target, margin = (1 - numbers[row]) * total, _MARGIN * total
        token, below, reached = 0, np.float64(0), np.float64(weights[0])
        while reached < target and token < vocab - 1:
            token += 1
            below, reached = reached, reached + weights[token]
        is_sure = below + margin < target and target < reached - margin
        tokens[row] = token if is_sure else UNSURE


__all__ = ["UNSURE", "pick_"]
