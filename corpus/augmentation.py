"""Training pieces that change every epoch: other keys, louder, longer or faster, with some of their controls."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from symusic.core import ScoreTick
from torch.utils.data import Dataset as TorchDataset

from midimamba.errors import InputError
from midimamba.tokenization.choices import CONTROLS
from midimamba.tokenization.controls import describe, is_control
from midimamba.tokenization.processor import MidiProcessor


@dataclass(frozen=True)
class Augmentation:
    """
    How far a piece may be changed. Each piece draws one value of each kind per epoch; 0 leaves it as it is.

    Args:
        transpose (`int`, *optional*, defaults to 0): up or down by at most this many semitones, as far as all notes
            stay within MIDI's 128 pitches. Drums keep their pitches.
        velocity_shift (`int`, *optional*, defaults to 0): all velocities up or down by at most this much.
        duration_stretch (`float`, *optional*, defaults to 0.0): all durations longer or shorter by at most this
            fraction.
        tempo_stretch (`float`, *optional*, defaults to 0.0): all tempos faster or slower by at most this fraction.
        control_dropout (`float`, *optional*, defaults to 0.3): with this probability a piece loses all its control
            tokens; otherwise it loses each one with this probability. So the model copes with any of them, and with
            none.
    """

    transpose: int = field(default=0, metadata={"help": "Augmentation: transpose by at most this many semitones."})
    velocity_shift: int = field(default=0, metadata={"help": "Augmentation: shift velocities by at most this much."})
    duration_stretch: float = field(
        default=0.0, metadata={"help": "Augmentation: stretch durations by at most this fraction."}
    )
    tempo_stretch: float = field(
        default=0.0, metadata={"help": "Augmentation: stretch tempos by at most this fraction."}
    )

    control_dropout: float = field(
        default=0.3, metadata={"help": "Augmentation: probability of leaving out control tokens."}
    )

    def __post_init__(self) -> None:
        stretches = (self.duration_stretch, self.tempo_stretch)
        if min(self.transpose, self.velocity_shift, self.control_dropout, *stretches) < 0 or max(stretches) >= 1:
            raise InputError(f"{self} is impossible: choose values that are not negative, and stretches below 1")
        if self.control_dropout > 1:
            raise InputError(
                f"control_dropout {self.control_dropout} is not a probability: choose one between 0 and 1"
            )

    @property
    def changes_music(self) -> bool:
        """Whether the music itself is changed at all."""
        return any((self.transpose, self.velocity_shift, self.duration_stretch, self.tempo_stretch))

    def keep_controls(self, controls: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The control tokens of a piece that are not dropped, by draws from `random`."""
        drawn = random.uniform(size=1 + len(controls))
        kept = (drawn[0] >= self.control_dropout) & (drawn[1:] >= self.control_dropout)
        return controls[kept]

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
            velocities = (notes["velocity"].astype(int) + louder).clip(1, 127)  # 0 would end the note
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


class EpochBlocks(TorchDataset[dict[str, Any]]):
    """
    Blocks of a split whose pieces are changed and shuffled again in every epoch, and then packed.

    Computed controls are those of the changed music. What an epoch holds depends only on `seed` and the epoch, so a
    resumed run reads what the interrupted one would have read. The number of blocks is that of the unchanged pieces.
    All pieces are in memory.

    Args:
        split (`datasets.Dataset`): the training split of a corpus, one piece per row. Never give it another split.
        processor (`MidiProcessor`): of the corpus.
        block_size (`int`): tokens per block.
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
        self.pieces = [np.array(piece, dtype=np.int32) for piece in split["input_ids"]]
        self.scores = [processor.decode(piece) for piece in self.pieces] if augmentation.changes_music else []
        vocab = processor.midi_tokenizer.vocab
        self._controls = np.array([vocab[t] for t in processor.midi_tokenizer.special_tokens if is_control(t)])
        self._labels = np.array(processor.control_ids(_labels_of(processor.controls)))
        self.num_blocks = sum(map(len, self.pieces)) // block_size
        self.epoch: int | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Make the blocks of an epoch, unless they are there. The data loader calls this."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pieces))
        self.blocks = self._arrange([self._piece(int(index), epoch) for index in order])

    def _arrange(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Blocks `(n, block_size)` of pieces, one after another."""
        ids = np.concatenate(pieces)
        # Changed pieces may have more tokens or fewer. An epoch with fewer blocks than `num_blocks` repeats them.
        return ids[: len(ids) // self.block_size * self.block_size].reshape(-1, self.block_size)

    def _piece(self, index: int, epoch: int) -> np.ndarray:
        """The ids of a piece in an epoch: BOS, controls, music, EOS."""
        random = np.random.default_rng([self.seed, epoch, index])
        is_control = np.isin(self.pieces[index], self._controls)
        controls, rest = self.pieces[index][is_control], self.pieces[index][~is_control]
        if self.augmentation.changes_music:
            changed = self.augmentation.apply(self.scores[index], random)
            rest = np.array([*self.processor.encode(changed), self.processor.eos_token_id])
            if len(controls):
                controls = self._controls_of(changed, controls)
        return np.concatenate([rest[:1], self.augmentation.keep_controls(controls, random), rest[1:]])

    def _controls_of(self, changed: ScoreTick, before: np.ndarray) -> np.ndarray:
        """The labels that the piece had, and those computed controls of the changed music that have a token."""
        known = self.processor.controls
        computed = {
            name: [v for v in values if v in known[name]]
            for name, values in describe(changed).items()
            if name in known
        }
        labels = before[np.isin(before, self._labels)]
        return np.sort(np.concatenate([labels, np.array(self.processor.control_ids(computed), dtype=int)]))

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {"input_ids": self.blocks[index % len(self) % len(self.blocks)].tolist()}


class EpochOpenings(EpochBlocks):
    """
    As [`EpochBlocks`], but a block is a piece from its beginning on, cut or padded to `block_size` tokens.

    So a block has the form of its piece, which a discriminator can hear, and samples start as pieces do.
    """

    def __init__(
        self, split: Dataset, processor: MidiProcessor, block_size: int, augmentation: Augmentation, seed: int = 0
    ):
        super().__init__(split, processor, block_size, augmentation, seed)
        self.num_blocks = len(self.pieces)

    def _arrange(self, pieces: list[np.ndarray]) -> np.ndarray:
        blocks = np.full((len(pieces), self.block_size), self.processor.pad_token_id)
        for block, piece in zip(blocks, pieces, strict=True):
            block[: len(piece)] = piece[: self.block_size]
        return blocks


def _labels_of(controls: dict[str, list[str]]) -> dict[str, list[str]]:
    """The controls that cannot be computed from the music."""
    return {name: values for name, values in controls.items() if name not in CONTROLS}
