"""Training for infilling: pieces are rearranged without loss, a share of them, others in every epoch."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from midimamba import MidiProcessor
from midimamba.corpus.augmentation import Augmentation, EpochBlocks
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.packing import IGNORED, BlockCollator, PackedBlocks
from midimamba.corpus.rearranging import InfillBlocks
from midimamba.errors import InputError
from midimamba.tokenization.infilling import Piece
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from midimamba.training.scripts import load_training_blocks
from support import make_score

CONTROL = "Control-composer_Bach"
SCORES = [make_score(seed, bars=bars) for seed, bars in enumerate((6, 7, 8, 20, 40, 3))]
Bar = Counter[tuple[int, ...]]  # its notes


def make_processor(size: int | None) -> MidiProcessor:
    tokenizer = build_tokenizer("REMI", infill=True, controls=[CONTROL])
    if size is not None:
        train_tokenizer(tokenizer, SCORES, size)
    return MidiProcessor(tokenizer)


PLAIN, MERGED = make_processor(None), make_processor(900)


def make_split(processor: MidiProcessor) -> Dataset:
    bos, control, eos = processor.bos_token_id, 3, processor.eos_token_id
    return Dataset.from_dict({"input_ids": [[bos, control, *processor.encode(s, False), eos] for s in SCORES]})


def make_blocks(processor: MidiProcessor, size: int, share: float, seed: int = 0) -> InfillBlocks:
    return InfillBlocks(make_split(processor), processor, size, Augmentation(control_dropout=0.0), seed, share)


def bars_of(piece: Piece) -> list[Bar]:
    """The notes of each bar, with the bar's meter."""
    bars: list[Bar] = [Counter({(-1, int(meter)): 1}) for meter in piece.meters]
    for note in zip(piece.bar, piece.position, piece.program, *piece.tokens.T, strict=True):
        bars[int(note[0])][tuple(map(int, note[1:]))] += 1
    return bars


def put_back(processor: MidiProcessor, document: np.ndarray) -> list[Bar]:
    """The bars of a rearranged piece in the order of the music."""
    arranger = processor.arranger
    ids = arranger.expand(document.tolist())
    names = processor.midi_tokenizer._ids_to_tokens(ids.tolist())
    first, second, *wanted = np.flatnonzero(ids == arranger.gap_id).tolist()
    fills = np.flatnonzero(ids == arranger.fill_id)
    runs = [run.tolist() for run in np.split(fills, np.flatnonzero(np.diff(fills) > 1) + 1)]
    after, text = (bars_of(arranger.take_apart(part)) for part in (ids[first + 1 : second], ids[fills[-1] + 1 :]))
    if len(runs) == 1:
        assert runs[0][0] == wanted[-1] + 1
        shown = len(runs[0]) - 1
        before, beside, filling = text[:shown], list[Bar](), text[shown:]
    else:  # with no bar before the gap, there is nothing but what stays in it
        *earlier, [start], [stop] = runs
        assert (earlier[0] if earlier else [start])[0] == wanted[-1] + 1
        before, beside = (
            bars_of(arranger.take_apart(part))
            for part in (ids[earlier[0][-1] + 1 : start] if earlier else ids[:0], ids[start + 1 : stop])
        )
        assert len(before) == (len(earlier[0]) - 1 if earlier else 0)
        filling = text
    assert [names[place - 1].split("_")[1] for place in wanted] == [
        names[int(np.flatnonzero(ids == meter)[0])].split("_")[1]
        for bar in filling
        for kind, meter, *_ in bar
        if kind < 0
    ]
    for ours, its in zip(filling, beside, strict=False):
        its.subtract({key: count for key, count in its.items() if key[0] < 0})  # the meter is in both
        ours.update(+its)
    assert len(beside) in (0, len(filling))
    return [*before, *filling, *after]


def documents_of(blocks: InfillBlocks, processor: MidiProcessor) -> list[np.ndarray]:
    """All documents in blocks of rearranged pieces."""
    found = []
    for block in blocks.blocks:
        starts = [*np.flatnonzero(block == processor.bos_token_id), len(block)]
        assert starts[0] == 0
        for start, stop in pairwise(starts):
            found.append(block[start:stop][block[start:stop] != processor.pad_token_id])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processor", [PLAIN, MERGED], ids=["plain", "merged"])
@pytest.mark.parametrize("size", [300, 1500])
def test_every_rearranged_piece_is_whole_in_its_block_and_an_excerpt_of_the_music(
    processor: MidiProcessor, size: int
) -> None:
    arranger = processor.arranger
    originals = [bars_of(arranger.take_apart(arranger.expand(ids))) for ids in make_split(processor)["input_ids"]]
    blocks = make_blocks(processor, size, share=1.0)
    lengths = Counter[int]()
    for epoch in range(4):
        blocks.set_epoch(epoch)
        for document in documents_of(blocks, processor):
            assert document[1] == 3  # the control
            assert document[-1] == processor.eos_token_id
            if arranger.gap_id not in document:
                continue  # too dense to fit
            excerpt = put_back(processor, document)
            lengths[int((document == arranger.gap_id).sum()) - 2] += 1
            places = [
                start
                for bars in originals
                for start in range(len(bars) - len(excerpt) + 1)
                if bars[start : start + len(excerpt)] == excerpt
            ]
            assert len(places) >= 1
    assert len(lengths) > (1 if size == 300 else 3)
    assert max(lengths) <= 8


@pytest.mark.slow
def test_an_epoch_is_decided_by_the_seed_and_the_share_is_kept() -> None:
    blocks, same, other = (make_blocks(PLAIN, 1500, 0.5, seed) for seed in (0, 0, 1))
    assert np.array_equal(blocks.blocks, same.blocks)
    assert not np.array_equal(blocks.blocks, other.blocks)
    first, drawn = blocks.blocks, 0
    for epoch in range(12):
        blocks.set_epoch(epoch)
        drawn += int((blocks.blocks == PLAIN.arranger.fill_id).any(axis=1).sum())
    assert not np.array_equal(first, blocks.blocks)
    whole, every = make_blocks(PLAIN, 1500, 1.0), 0
    for epoch in range(12):
        whole.set_epoch(epoch)
        every += int((whole.blocks == PLAIN.arranger.fill_id).any(axis=1).sum())
    assert 0.3 < drawn / every < 0.7


def test_what_asks_for_a_filling_is_not_to_be_predicted() -> None:
    block = next(block for block in make_blocks(PLAIN, 1500, 1.0).blocks if PLAIN.arranger.fill_id in block)
    batch = BlockCollator.for_processor(PLAIN)([{"input_ids": block.tolist()}])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    for token in (PLAIN.arranger.gap_id, PLAIN.arranger.fill_id, PLAIN.pad_token_id, 3):
        assert (labels[ids == token] == IGNORED).all()
    assert (labels[ids > PLAIN.arranger.fill_id] == ids[ids > PLAIN.arranger.fill_id]).all()


@pytest.mark.slow
def test_without_a_share_blocks_are_bitwise_what_they_were(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "music").mkdir()
    for seed in range(6):
        make_score(seed).dump_midi(tmp_path / "music" / f"{seed}.mid")
    options = CorpusOptions(vocab_size=None, infill=True, num_workers=1, valid_fraction=0, test_fraction=0)
    tokenize_corpus(str(tmp_path / "music"), tmp_path / "infill", options)
    data, changing = str(tmp_path / "infill"), Augmentation(transpose=2)
    for augmentation in (Augmentation(), changing):
        blocks, splits, processor = load_training_blocks(data, 64, augmentation, 3, infill_share=0)
        expected: PackedBlocks | EpochBlocks = PackedBlocks(splits["train"], 64)
        if augmentation is changing:
            expected = EpochBlocks(splits["train"], processor, 64, augmentation, 3)
        assert type(blocks) is type(expected)
        assert [blocks[i] for i in range(len(blocks))] == [expected[i] for i in range(len(expected))]
        # The corpus decides where nothing is said.
        assert isinstance(load_training_blocks(data, 64, augmentation, 3, infill_share=None)[0], InfillBlocks)
    assert isinstance(load_training_blocks(str(corpus), 64, Augmentation(), 3, None)[0], PackedBlocks)
    with pytest.raises(InputError, match=r"infill_share is 0.5, but the corpus has no tokens for infilling"):
        load_training_blocks(str(corpus), 64, Augmentation(), 3, 0.5)
    with pytest.raises(InputError, match=r"infill_share is 1.5: give a number from 0 to 1"):
        load_training_blocks(data, 64, Augmentation(), 3, 1.5)
