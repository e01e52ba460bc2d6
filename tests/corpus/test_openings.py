"""Openings: every row is a piece from its first token on, and padding is nothing to learn."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from midimamba import MidiProcessor
from midimamba.corpus.augmentation import Augmentation, EpochOpenings
from midimamba.corpus.packing import IGNORED, BlockCollator
from support import make_generator, make_score


@pytest.fixture(scope="module")
def split(processor: MidiProcessor) -> Dataset:
    pieces = [[*processor.encode(make_score(seed, bars=1 + seed)), processor.eos_token_id] for seed in range(6)]
    return Dataset.from_dict({"input_ids": pieces})


@pytest.fixture
def length(split: Dataset) -> int:
    """Some pieces are longer, some shorter, and one is exactly as long."""
    return int(sorted(map(len, split["input_ids"]))[3])


def read(openings: EpochOpenings) -> list[list[int]]:
    return [openings[index]["input_ids"] for index in range(len(openings))]


def test_every_row_is_a_piece_from_its_beginning_cut_or_padded(
    split: Dataset, processor: MidiProcessor, length: int
) -> None:
    openings = EpochOpenings(split, processor, length, Augmentation())
    padding = [processor.pad_token_id] * length
    expected = sorted([*piece, *padding][:length] for piece in split["input_ids"])
    assert len(openings) == len(split)
    assert sorted(read(openings)) == expected
    lengths = {len(piece) < length for piece in split["input_ids"]}
    assert lengths == {True, False}


def test_changed_pieces_still_begin_at_their_beginning(split: Dataset, processor: MidiProcessor) -> None:
    openings = EpochOpenings(split, processor, 4096, Augmentation(transpose=6))
    first = read(openings)
    openings.set_epoch(1)
    assert sorted(first) != sorted(read(openings))
    for row in read(openings):
        music = [token for token in row if token != processor.pad_token_id]
        assert row == music + [processor.pad_token_id] * (4096 - len(music))
        assert (music[0], music[-1]) == (processor.bos_token_id, processor.eos_token_id)
        assert music.count(processor.bos_token_id) == music.count(processor.eos_token_id) == 1


def test_the_same_seed_and_epoch_are_the_same_rows_in_whatever_order_they_are_read(
    split: Dataset, processor: MidiProcessor
) -> None:
    def after(seed: int, *epochs: int) -> list[list[int]]:
        openings = EpochOpenings(split, processor, 64, Augmentation(transpose=5), seed)
        for epoch in epochs:
            openings.set_epoch(epoch)
        return read(openings)

    resumed = after(3, 2)  # a run that goes on in the third epoch
    assert resumed == after(3, 0, 1, 2) == after(3, 2, 1, 2)
    assert resumed != after(3, 1)
    assert resumed != after(4, 2)


def test_padding_is_no_target_and_changes_no_likelihood(split: Dataset, processor: MidiProcessor) -> None:
    """The loss of padded openings is that of the pieces, each alone."""
    openings = EpochOpenings(split, processor, 700, Augmentation())
    batch = BlockCollator.for_processor(processor)([{"input_ids": row} for row in read(openings)])
    is_padding = batch["input_ids"] == processor.pad_token_id
    assert is_padding.any()
    assert torch.equal(batch["labels"] == IGNORED, is_padding | (batch["input_ids"] == processor.bos_token_id))
    model = make_generator(vocab_size=processor.vocab_size)
    with torch.no_grad():
        padded = model(**batch).loss
        total, count = 0.0, 0
        for row in np.array(read(openings)):
            piece = torch.from_numpy(row[row != processor.pad_token_id])
            chosen = model(piece[None]).logits[0, :-1].log_softmax(-1).gather(-1, piece[1:, None])
            total, count = total - chosen.sum(), count + len(chosen)
    torch.testing.assert_close(padded, total / count, rtol=1e-4, atol=1e-4)
