"""Augmentation of scores in memory: every epoch hears the training pieces in other keys, louder, longer or faster."""

from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from symusic.core import ScoreTick
from torch.utils.data import Dataset as TorchDataset

from midimamba.errors import InputError
from midimamba.tokenization.processor import MidiProcessor


@dataclass(frozen=True)
class Augmentation:
    """
    How far a piece may be changed. Each piece draws one value of each kind an epoch; 0 leaves it as it is.

    Args:
        transpose (`int`, *optional*, defaults to 0): up or down by so many semitones at most, as far as all its notes
            stay within MIDI's 128 pitches. Drums keep theirs.
        velocity_shift (`int`, *optional*, defaults to 0): all velocities up or down by so much at most.
        duration_stretch (`float`, *optional*, defaults to 0.0): all durations longer or shorter by this share at most.
        tempo_stretch (`float`, *optional*, defaults to 0.0): all tempos faster or slower by this share at most.
    """

    transpose: int = field(default=0, metadata={"help": "Augmentation: transpose by so many semitones at most."})
    velocity_shift: int = field(default=0, metadata={"help": "Augmentation: shift velocities by so much at most."})
    duration_stretch: float = field(default=0.0, metadata={"help": "Augmentation: stretch durations by this share."})
    tempo_stretch: float = field(default=0.0, metadata={"help": "Augmentation: stretch tempos by this share."})

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or max(self.duration_stretch, self.tempo_stretch) >= 1:
            raise InputError(f"{self} cannot be: no value is negative, and a stretch is less than 1")

    def __bool__(self) -> bool:
        """Whether anything is changed at all."""
        return any(astuple(self))

    def apply(self, score: ScoreTick, random: np.random.Generator) -> ScoreTick:
        """A changed copy of a score, by draws from `random`."""
        score = score.copy()
        shift = self._draw_shift(score, random)
        louder = int(random.integers(-self.velocity_shift, self.velocity_shift + 1))
        longer = 1 + random.uniform(-self.duration_stretch, self.duration_stretch)
        faster = 1 + random.uniform(-self.tempo_stretch, self.tempo_stretch)
        for track in score.tracks:
            notes = track.notes.numpy()
            pitches = notes["pitch"] + (0 if track.is_drum else shift)
            velocities = (notes["velocity"].astype(int) + louder).clip(1, 127)  # 0 would be the end of a note
            durations = (notes["duration"] * longer).round().clip(1)
            track.notes = type(track.notes).from_numpy(
                notes["time"], durations.astype(np.int32), pitches.astype(np.int8), velocities.astype(np.int8)
            )
        for tempo in score.tempos:
            tempo.qpm = tempo.qpm * faster
        return score

    def _draw_shift(self, score: ScoreTick, random: np.random.Generator) -> int:
        pitched = [track.notes.numpy()["pitch"] for track in score.tracks if not track.is_drum and len(track.notes)]
        if not pitched:
            return 0
        pitches = np.concatenate(pitched).astype(int)
        lowest, highest = max(-self.transpose, -pitches.min()), min(self.transpose, 127 - pitches.max())
        return int(random.integers(lowest, highest + 1))


class AugmentedBlocks(TorchDataset[dict[str, Any]]):
    """
    Blocks of a split whose pieces are changed anew every epoch, in another order, and then packed.

    What an epoch holds depends on `seed` and the epoch alone, so a resumed run reads what the interrupted one would
    have. The number of blocks stays that of the pieces as they are.

    Args:
        split (`datasets.Dataset`): the training split of a corpus, one piece a row. Never give it another split.
        processor (`MidiProcessor`): the corpus's.
        block_size (`int`): tokens a block.
        augmentation (`Augmentation`): what to change.
        seed (`int`, *optional*, defaults to 0): of all draws.
    """

    def __init__(
        self, split: Dataset, processor: MidiProcessor, block_size: int, augmentation: Augmentation, seed: int = 0
    ):
        self.processor = processor
        self.block_size = block_size
        self.augmentation = augmentation
        self.seed = seed
        pieces = split["input_ids"]
        self.scores = [processor.decode(piece) for piece in pieces]
        self.num_blocks = sum(len(piece) for piece in pieces) // block_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Make the blocks of an epoch; the data loader calls it."""
        pieces = []
        for index in np.random.default_rng([self.seed, epoch]).permutation(len(self.scores)):
            changed = self.augmentation.apply(
                self.scores[index], np.random.default_rng([self.seed, epoch, int(index)])
            )
            pieces.append([*self.processor.encode(changed), self.processor.eos_token_id])
        ids = np.concatenate(pieces)
        # Rare keys merge worse, so an epoch may have more blocks than `num_blocks`; should it have fewer, it repeats.
        self.blocks = ids[: len(ids) // self.block_size * self.block_size].reshape(-1, self.block_size)

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {"input_ids": self.blocks[index % len(self) % len(self.blocks)].tolist()}
