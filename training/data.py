"""Batches of packed blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stack_blocks(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks of equal length to a batch: `input_ids` and `labels` of shape `(batch, time)`. Nothing is padded."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}
