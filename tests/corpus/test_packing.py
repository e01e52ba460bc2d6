import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from midimamba.corpus.packing import PackedBlocks
from midimamba.errors import InputError

PIECES = [
    np.random.default_rng(seed).integers(0, 1000, size=length).tolist()
    for seed, length in enumerate(np.random.default_rng(0).integers(0, 50, size=40))
]


def tokens_of(pieces: list[list[int]]) -> list[int]:
    return [token for piece in pieces for token in piece]


@pytest.mark.parametrize("block_size", [1, 7, 64, len(tokens_of(PIECES))])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_packing_keeps_every_token_but_the_last_incomplete_block(block_size: int, parts: int) -> None:
    # A table of several chunks, such as a data set of several files.
    chunks = [Dataset.from_dict({"input_ids": PIECES[i::parts]}) for i in range(parts)]
    dataset = concatenate_datasets(chunks)
    tokens = tokens_of(dataset["input_ids"])
    blocks = PackedBlocks(dataset, block_size)
    rows = [blocks[index]["input_ids"] for index in range(len(blocks))]
    assert len(rows) == len(blocks) == len(tokens) // block_size
    assert {len(row) for row in rows} == {block_size}
    assert tokens_of(rows) == tokens[: len(blocks) * block_size]
    assert blocks[-1] == blocks[len(blocks) - 1]
    for index in (len(blocks), -len(blocks) - 1):
        with pytest.raises(IndexError):
            blocks[index]


def test_a_selection_is_packed_in_its_order() -> None:
    blocks = PackedBlocks(Dataset.from_dict({"input_ids": PIECES}).select([5, 3]), 10)
    assert (
        tokens_of([blocks[index]["input_ids"] for index in range(len(blocks))])
        == (PIECES[5] + PIECES[3])[: 10 * len(blocks)]
    )


def test_a_too_short_split_is_named() -> None:
    dataset = Dataset.from_dict({"input_ids": PIECES}, split="test")
    with pytest.raises(InputError, match=f"the test split holds {len(tokens_of(PIECES))} tokens"):
        PackedBlocks(dataset, 10**6)
