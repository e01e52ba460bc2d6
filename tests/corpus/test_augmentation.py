"""Augmentation changes what it is asked to change, and nothing else."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from symusic.core import ScoreTick

from midimamba import MidiProcessor
from midimamba.corpus.augmentation import Augmentation, EpochBlocks
from midimamba.errors import InputError
from midimamba.tokenization.controls import control_token, describe
from midimamba.tokenization.musical_time import KEYS
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_score


def column(score: ScoreTick, name: str, drums: bool | None = None) -> np.ndarray:
    tracks = [track for track in score.tracks if drums is None or track.is_drum == drums]
    return np.concatenate([track.notes.numpy()[name] for track in tracks]).astype(int)


@pytest.fixture(scope="module")
def split(processor: MidiProcessor) -> Dataset:
    pieces = [[*processor.encode(make_score(seed)), processor.eos_token_id] for seed in range(6)]
    return Dataset.from_dict({"input_ids": pieces})


def test_transposition_keeps_intervals_and_drums() -> None:
    score = make_score(1)
    middle = score.copy()
    for track in middle.tracks:
        for note in track.notes:
            note.pitch = 40 + note.pitch % 40
    shifts = set()
    for seed in range(60):
        changed = Augmentation(transpose=3).apply(middle, np.random.default_rng(seed))
        difference = column(changed, "pitch", drums=False) - column(middle, "pitch", drums=False)
        assert len(set(difference)) == 1
        shifts.add(int(difference[0]))
        assert np.array_equal(column(changed, "pitch", drums=True), column(middle, "pitch", drums=True))
        for name in ("time", "duration", "velocity"):
            assert np.array_equal(column(changed, name), column(middle, name))
    assert shifts == {-3, -2, -1, 0, 1, 2, 3}


def test_transposition_never_leaves_the_range_of_midi() -> None:
    score = make_score(2)  # its pitches span nearly all of 0 … 127
    lowest, highest = column(score, "pitch", drums=False).min(), column(score, "pitch", drums=False).max()
    for seed in range(40):
        changed = Augmentation(transpose=12).apply(score, np.random.default_rng(seed))
        pitches = column(changed, "pitch", drums=False)
        assert pitches.min() >= 0
        assert pitches.max() - pitches.min() == highest - lowest


def test_each_kind_changes_its_own_column_within_bounds() -> None:
    score = make_score(3)
    for seed in range(20):
        louder = Augmentation(velocity_shift=20).apply(score, np.random.default_rng(seed))
        assert np.abs(column(louder, "velocity") - column(score, "velocity")).max() <= 20
        assert column(louder, "velocity").min() >= 1
        longer = Augmentation(duration_stretch=0.5).apply(score, np.random.default_rng(seed))
        ratio = column(longer, "duration") / column(score, "duration")
        assert np.ptp(ratio) < 0.05
        assert 0.45 < ratio.mean() < 1.55
        assert np.array_equal(column(longer, "time"), column(score, "time"))
        faster = Augmentation(tempo_stretch=0.2).apply(score, np.random.default_rng(seed))
        tempos = np.array([[a.qpm, b.qpm] for a, b in zip(faster.tempos, score.tempos, strict=True)])
        assert np.ptp(tempos[:, 0] / tempos[:, 1]) < 1e-3
        assert 0.79 < tempos[0, 0] / tempos[0, 1] < 1.21


def test_the_original_is_unchanged_and_zero_augmentation_changes_nothing() -> None:
    score = make_score(4)
    before = score.dumps_midi()
    Augmentation(5, 20, 0.2, 0.2).apply(score, np.random.default_rng(0))
    assert score.dumps_midi() == before
    assert Augmentation().apply(score, np.random.default_rng(0)).dumps_midi() == before
    assert not Augmentation().changes_music
    assert Augmentation(tempo_stretch=0.1).changes_music


@pytest.mark.parametrize(
    "values", [{"transpose": -1}, {"duration_stretch": 1.0}, {"tempo_stretch": -0.1}, {"control_dropout": -0.1}]
)
def test_impossible_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is impossible"):
        Augmentation(**values)


def test_an_epoch_depends_on_the_seed_and_its_number_alone(split: Dataset, processor: MidiProcessor) -> None:
    def read(seed: int, *epochs: int) -> np.ndarray:
        blocks = EpochBlocks(split, processor, 32, Augmentation(transpose=5), seed)
        for epoch in epochs:
            blocks.set_epoch(epoch)
        return np.array([blocks[index]["input_ids"] for index in range(len(blocks))])

    assert np.array_equal(read(0, 0, 1, 2), read(0, 2))
    assert not np.array_equal(read(0, 1), read(0, 2))
    assert not np.array_equal(read(0, 1), read(1, 1))
    assert len(read(0, 0)) == len(read(0, 7))


def test_blocks_without_changes_hold_the_pieces(split: Dataset, processor: MidiProcessor) -> None:
    """In another order, but the same tokens: what is cut off at the end is less than a block."""
    blocks = EpochBlocks(split, processor, 32, Augmentation())
    read = [token for index in range(len(blocks)) for token in blocks[index]["input_ids"]]
    everything = sorted(token for piece in split["input_ids"] for token in piece)
    assert 0 <= len(everything) - len(read) < 32
    starts = [index for index, token in enumerate(read) if token == processor.bos_token_id]
    pieces = {tuple(piece) for piece in split["input_ids"]}
    for start, stop in pairwise(starts):
        assert tuple(read[start:stop]) in pieces


def test_equal_music_has_equal_tokens_whatever_the_order_of_tracks(processor: MidiProcessor) -> None:
    score = make_score(5)
    turned = score.copy()
    turned.tracks = type(turned.tracks)(list(reversed(turned.tracks)))
    assert processor.encode(turned) == processor.encode(score)


def test_reading_beyond_the_end_is_an_index_error(split: Dataset, processor: MidiProcessor) -> None:
    blocks = EpochBlocks(split, processor, 32, Augmentation())
    assert blocks[-1] == blocks[len(blocks) - 1]
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@pytest.fixture(scope="module")
def conditioned() -> tuple[Dataset, MidiProcessor]:
    """Twenty pieces with the controls key and meter and a label."""
    tokens = [control_token("key", key) for key in KEYS]
    tokens += [control_token("meter", f"{n}/4") for n in (2, 3, 4, 5)]
    tokens += [control_token("composer", name) for name in ("A", "B")]
    processor = MidiProcessor(build_tokenizer("REMI", controls=tokens))
    pieces = []
    for seed in range(20):
        score = make_score(seed, bars=3)
        values = {name: found for name, found in describe(score).items() if name in ("key", "meter")}
        ids = processor.encode(score, controls={**values, "composer": "AB"[seed % 2]})
        pieces.append([*ids, processor.eos_token_id])
    return Dataset.from_dict({"input_ids": pieces}), processor


def pieces_of(blocks: EpochBlocks) -> list[list[int]]:
    """The whole pieces that an epoch's blocks hold."""
    ids = blocks.blocks.flatten()
    starts = [*np.flatnonzero(ids == blocks.processor.bos_token_id)]
    return [ids[start:stop].tolist() for start, stop in pairwise(starts)]


def test_controls_are_dropped_one_by_one_and_all_at_once(conditioned: tuple[Dataset, MidiProcessor]) -> None:
    split, processor = conditioned
    num_controls = sum(map(len, processor.controls.values()))
    without = {tuple(ids[:1] + [i for i in ids[1:] if i > 2 + num_controls or i == 2]) for ids in split["input_ids"]}
    kept = []
    for epoch in range(60):
        blocks = EpochBlocks(split, processor, 32, Augmentation(control_dropout=0.3), seed=epoch)
        for piece in pieces_of(blocks):
            controls = [index for index in piece if 3 <= index < 3 + num_controls]
            assert piece[1 : 1 + len(controls)] == controls == sorted(controls)
            assert (piece[0], *piece[1 + len(controls) :]) in without
            kept.append(len(controls))
    shares = np.bincount(kept, minlength=4) / len(kept)
    expected = [0.3 + 0.7 * 0.3**3, 0.7 * 3 * 0.3**2 * 0.7, 0.7 * 3 * 0.3 * 0.7**2, 0.7 * 0.7**3]
    assert np.abs(shares - expected).max() < 0.05


def test_nothing_is_dropped_at_0_and_everything_at_1(conditioned: tuple[Dataset, MidiProcessor]) -> None:
    split, processor = conditioned
    whole = {tuple(ids) for ids in split["input_ids"]}
    blocks = EpochBlocks(split, processor, 32, Augmentation(control_dropout=0.0))
    assert {tuple(piece) for piece in pieces_of(blocks)} <= whole
    blocks = EpochBlocks(split, processor, 32, Augmentation(control_dropout=1.0))
    assert not np.isin(blocks.blocks, processor.control_ids(processor.controls)).any()


def test_controls_are_those_of_the_changed_music(conditioned: tuple[Dataset, MidiProcessor]) -> None:
    split, processor = conditioned
    blocks = EpochBlocks(split, processor, 32, Augmentation(transpose=6, control_dropout=0.0))
    composers: Counter[str] = Counter()
    changed = 0
    for piece in pieces_of(blocks):
        tokens = processor.tokenizer.decode(piece[1:4]).split()
        composers.update(token for token in tokens if "composer" in token)
        music = describe(processor.decode(piece))
        assert control_token("key", music["key"][0]) in tokens
        assert control_token("meter", music["meter"][0]) in tokens
        changed += tuple(piece) not in {tuple(ids) for ids in split["input_ids"]}
    assert changed > 10
    assert len(composers) == 2


@pytest.mark.slow
def test_the_trainer_sets_the_epoch(split: Dataset, processor: MidiProcessor, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from midimamba.corpus.packing import BlockCollator
    from support import make_generator

    blocks = EpochBlocks(split, processor, 64, Augmentation(transpose=5))
    first = blocks.blocks
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, save_strategy="no", use_cpu=True
    )
    model = make_generator(vocab_size=processor.vocab_size)
    Trainer(model=model, args=args, data_collator=BlockCollator(), train_dataset=blocks).train()
    assert not np.array_equal(blocks.blocks[: len(first)], first[: len(blocks.blocks)])
