"""Generated music to evaluate: drawn from a model, read from a folder of MIDI files, or decoded from tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from symusic.core import ScoreTick
from torch import Tensor
from tqdm.auto import tqdm

from midimamba.corpus.sources import midi_files
from midimamba.errors import InputError
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import NEVER, Ending, sample
from midimamba.tokenization.ingest import MidiRefusedError, check_score, parse_midi, read_content
from midimamba.tokenization.processor import MidiProcessor

_BATCH_SIZE = 16


@dataclass
class Samples:
    """
    Generated pieces, sorted into those that can be used and those that cannot.

    Args:
        scores (`list[symusic.Score]`): pieces that can be used: they could be read or decoded, and have notes.
        empty (`int`, *optional*, defaults to 0): the number of pieces without a note.
        refused (`dict[str, str]`, *optional*): the reason for every piece that cannot be used for another reason.
    """

    scores: list[ScoreTick] = field(default_factory=list)
    empty: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Sequence[ScoreTick]) -> Self:
        """Sort generated scores into usable, empty and refused ones."""
        samples = cls()
        for index, score in enumerate(scores):
            samples.add(f"sample {index}", score)
        return samples

    @property
    def total(self) -> int:
        """The number of pieces, usable or not."""
        return len(self.scores) + self.empty + len(self.refused)

    def add(self, name: str, score: ScoreTick) -> None:
        """Count a score as usable, empty or refused."""
        if not score.note_num():
            self.empty += 1
            return
        try:
            self.scores.append(check_score(score))
        except MidiRefusedError as refusal:
            self.refused[name] = refusal.reason


def read_folder(folder: Path) -> Samples:
    """
    Read all MIDI files of a folder and its subfolders, by name.

    Raises:
        InputError: if there are none.
    """
    files = midi_files(folder)
    if not files:
        raise InputError(
            f"{folder} holds neither a generator (config.json) nor MIDI files; name a folder that has one of them, "
            "with its archives unpacked"
        )
    samples = Samples()
    for file in tqdm(files, desc="reading", leave=False, disable=None):
        name = str(file.relative_to(folder))
        try:
            score, _ = parse_midi(read_content(file))
        except MidiRefusedError as refusal:
            samples.refused[name] = refusal.reason
        else:
            samples.add(name, score)
    return samples


def decode_all(processor: MidiProcessor, sequences: Sequence[Sequence[int]]) -> Samples:
    """Decode token sequences as new music, as users get it. Those that are not music are counted."""
    samples = Samples()
    for index, ids in enumerate(sequences):
        try:
            samples.add(f"sequence {index}", processor.continue_score(None, ids))
        except ValueError as error:
            samples.refused[f"sequence {index}"] = str(error)
    return samples


def fresh_samples(
    model: MidiMambaForCausalLM,
    prompts: Tensor,
    length: int,
    seed: int,
    ending: Ending = NEVER,
    temperature: float = 1.0,
) -> Tensor:
    """
    Draw continuations of prompts, without the grammar. The global random state is left as it was.

    Args:
        model (`MidiMambaForCausalLM`): the generator.
        prompts (`LongTensor` of shape `(count, prompt)`): the first tokens of every sequence.
        length (`int`): tokens per sequence, prompt included.
        seed (`int`): the same seed gives the same samples.
        ending (`Ending`, *optional*): what ends a sequence, and the padding that follows; by default nothing does.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits.

    Returns:
        `LongTensor` of shape `(count, length)`.
    """
    batches = prompts.to(model.device).split(_BATCH_SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        progress = tqdm(batches, desc="fresh samples", leave=False, disable=None)
        return torch.cat([sample(model, batch, length, ending, temperature) for batch in progress])


def until_end(ids: Sequence[int], eos_token_id: int) -> list[int]:
    """A sampled sequence up to and including the token that ends it, without the padding that follows."""
    ids = list(ids)
    return ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids
