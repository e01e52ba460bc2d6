"""Pieces to blocks of equal length, and blocks to batches in which a piece never sees the one before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset

from midimamba.errors import InputError
from midimamba.tokenization.controls import is_control
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizations import FILL, GAP

IGNORED = -100  # the label that the losses of transformers and torch leave out


class PackedBlocks(TorchDataset[dict[str, Any]]):
    """
    The pieces of a split, one after another, cut into blocks.

    A piece starts with the begin-of-sequence id, which marks the boundary. The ids are read from the disk when a block
    is requested. Only the ids after the last whole block are lost.

    Args:
        split (`datasets.Dataset`): with a column `input_ids`, one piece per row.
        block_size (`int`): ids per block.

    Raises:
        InputError: if the pieces hold fewer than `block_size` ids.
    """

    def __init__(self, split: Dataset, block_size: int):
        self.block_size = block_size
        self._chunks = _chunks_of(split)
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)
        self.num_ids = int(self._ends[-1]) if len(self._ends) else 0
        if self.num_ids < block_size:
            name = f"the {split.split} split" if split.split else "the data set"
            raise InputError(
                f"{name} holds {self.num_ids} tokens, fewer than one block of {block_size}: choose smaller blocks"
            )

    def __len__(self) -> int:
        return self.num_ids // self.block_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = index % len(self) * self.block_size
        return {"input_ids": self._slice(start, start + self.block_size).tolist()}

    def _slice(self, start: int, end: int) -> np.ndarray:
        """Ids `start … end - 1` of the whole split, which may lie in several chunks."""
        parts = []
        chunk = int(np.searchsorted(self._ends, start, side="right"))
        while start < end:
            first = int(self._ends[chunk]) - len(self._chunks[chunk])
            parts.append(self._chunks[chunk][start - first : end - first])
            start = int(self._ends[chunk])
            chunk += 1
        return np.concatenate(parts)


def _chunks_of(split: Dataset) -> list[np.ndarray]:
    """The ids of all pieces in order: views on the file's memory map, unless rows were selected or shuffled."""
    table = split.with_format("arrow")[:]  # unlike `split.data`, it honours select and shuffle
    return [chunk.flatten().to_numpy() for chunk in table["input_ids"].chunks]


def some_of(blocks: PackedBlocks, count: int | None) -> PackedBlocks | Subset[dict[str, Any]]:
    """`count` of the blocks, evenly spread; all if there are no more, or `count` is `None`."""
    if count is None or count >= len(blocks):
        return blocks
    return Subset(blocks, [index * len(blocks) // count for index in range(count)])


def stack_blocks(rows: Sequence[dict[str, Any]]) -> Tensor:
    """The `input_ids` of blocks of equal length, as a tensor of shape `(batch, time)`."""
    return torch.tensor([row["input_ids"] for row in rows])


@dataclass(frozen=True)
class BlockCollator:
    """
    Collates blocks of packed pieces.

    Args:
        bos_token_id (`int`, *optional*): the id with which a piece starts. Without one, each block is a single piece.
        ignored_ids (`tuple[int]`, *optional*): tokens that are not music to predict: controls, which users request,
            what asks to fill a gap, and padding.
        carry_state (`bool`, *optional*, defaults to `False`): whether the state carries over from piece to piece.
    """

    bos_token_id: int | None = None
    ignored_ids: tuple[int, ...] = ()
    carry_state: bool = False

    @classmethod
    def for_processor(cls, processor: MidiProcessor, carry_state: bool = False) -> Self:
        """The collator for a corpus that was made with `processor`."""
        vocab = processor.midi_tokenizer.vocab
        given = [token for token in processor.midi_tokenizer.special_tokens if is_control(token)]
        given += [token for token in (GAP, FILL) if token in vocab]
        return cls(processor.bos_token_id, (processor.pad_token_id, *(vocab[t] for t in given)), carry_state)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Blocks of equal length to a batch, as [`~BlockCollator.separate`] describes it."""
        return self.separate(stack_blocks(rows))

    def separate(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What a model needs to learn from ids of shape `(batch, time)`: `input_ids`, `labels`, and `seq_idx`, the
        number of the piece that each token belongs to.

        The first token of a piece isn't a target: that a piece starts is not music, and it must not see what came
        before.
        """
        starts = torch.zeros_like(input_ids, dtype=torch.bool)
        if self.bos_token_id is not None:
            starts = input_ids == self.bos_token_id
        is_ignored = torch.isin(input_ids, input_ids.new_tensor(self.ignored_ids))
        batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(starts | is_ignored, IGNORED)}
        return batch if self.carry_state else {**batch, "seq_idx": starts.cumsum(1)}
