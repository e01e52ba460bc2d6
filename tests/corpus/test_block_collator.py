"""The collator: which document a token belongs to, and which tokens are targets."""

import torch

from midimamba.corpus.packing import BlockCollator, stack_blocks
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer

BOS = 1
ROWS = [{"input_ids": [1, 5, 2, 1, 1, 6]}, {"input_ids": [7, 2, 1, 8, 9, 2]}]


def test_a_document_starts_at_every_bos() -> None:
    batch = BlockCollator(BOS)(ROWS)
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in ROWS]
    assert batch["seq_idx"].tolist() == [[1, 1, 1, 2, 3, 3], [0, 0, 1, 1, 1, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_the_start_of_a_document_is_not_a_target() -> None:
    assert BlockCollator(BOS)(ROWS)["labels"].tolist() == [[-100, 5, 2, -100, -100, 6], [7, 2, -100, 8, 9, 2]]


def test_control_tokens_are_not_targets() -> None:
    labels = BlockCollator(BOS, ignored_ids=(5, 8))(ROWS)["labels"]
    assert labels.tolist() == [[-100, -100, 2, -100, -100, 6], [7, 2, -100, -100, 9, 2]]


def test_a_state_that_is_carried_has_the_same_targets() -> None:
    separated, carried = BlockCollator(BOS)(ROWS), BlockCollator(BOS, carry_state=True)(ROWS)
    assert "seq_idx" not in carried
    assert torch.equal(separated["labels"], carried["labels"])


def test_without_bos_a_block_is_one_document_and_all_of_it_a_target() -> None:
    batch = BlockCollator()(ROWS)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert not batch["seq_idx"].any()


def test_blocks_on_a_device_are_separated_as_rows_are() -> None:
    collator = BlockCollator(BOS)
    separated = collator.separate(stack_blocks(ROWS))
    assert all(torch.equal(separated[name], tensor) for name, tensor in collator(ROWS).items())


def test_the_collator_of_a_processor_knows_its_controls_and_its_padding() -> None:
    processor = MidiProcessor(build_tokenizer("REMI", controls=["Control-key_C-major", "Control-meter_3/4"]))
    assert BlockCollator.for_processor(processor, carry_state=True) == BlockCollator(1, (0, 3, 4), True)
