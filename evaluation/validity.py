"""Whether what a model writes is music at all: files that can be read, sequences that keep the grammar."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from miditok import TokSequence
from symusic.core import ScoreTick
from torch import Tensor
from tqdm.auto import tqdm

from midimamba.errors import InputError
from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.ingest import MIDI_SUFFIXES, MidiRefusedError, check_score, parse_midi, read_content
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import expand_ids

_ROWS = 64  # prefixes that the grammar looks at in a go


@dataclass
class Samples:
    """
    What is to be judged.

    Args:
        scores (`list[symusic.Score]`): those that can be used: read, decoded, and with notes.
        empty (`int`, *optional*, defaults to 0): pieces without a note.
        refused (`dict[str, str]`, *optional*): pieces that cannot be used for another reason, and the reason.
    """

    scores: list[ScoreTick] = field(default_factory=list)
    empty: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Sequence[ScoreTick]) -> Self:
        """Generated scores, counted as usable, empty or refused."""
        samples = cls()
        for index, score in enumerate(scores):
            samples.add(f"sample {index}", score)
        return samples

    @property
    def total(self) -> int:
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


def midi_files(folder: Path) -> list[Path]:
    """All MIDI files of a folder and the folders in it, by name."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in MIDI_SUFFIXES and file.is_file())


def read_folder(folder: Path) -> Samples:
    """
    All MIDI files of a folder and the folders in it, by name.

    Raises:
        InputError: if there is none.
    """
    files = midi_files(folder)
    if not files:
        raise InputError(f"{folder} holds neither a generator (config.json) nor MIDI files")
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
    """Sequences as scores; what is no music is counted."""
    samples = Samples()
    for index, ids in enumerate(sequences):
        try:
            samples.add(f"sequence {index}", processor.decode(ids))
        except ValueError as error:
            samples.refused[f"sequence {index}"] = str(error)
    return samples


def until_end(ids: Sequence[int], eos_token_id: int) -> list[int]:
    """A sampled sequence up to the token that ends it, without the padding that follows."""
    ids = list(ids)
    return ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids


def grammar_errors(processor: MidiProcessor, sequences: Sequence[Sequence[int]]) -> list[float]:
    """
    Share of the tokens of every sequence that the grammar would not have allowed after the tokens before them.

    Like MidiTok's token syntax error (arXiv 2301.11975), but by all rules of
    [`~midimamba.tokenization.grammar.MidiGrammar`], under which also a position before the last one or a long silence
    is an error.

    Args:
        processor (`MidiProcessor`): to whose tokenizer the ids belong.
        sequences (`Sequence[Sequence[int]]`): with or without begin-of-sequence, controls and padding, which are not
            judged.

    Returns:
        `list[float]`: NaN for a sequence without music.

    Raises:
        InputError: if there are no rules for the tokenization.
    """
    grammar = processor.grammar()
    vocab = processor.midi_tokenizer.vocab_size
    shares = []
    for ids in tqdm(sequences, desc="grammar", leave=False, disable=None):
        sequence = torch.tensor(ids, dtype=torch.long)
        special = len(processor.tokenizer.all_special_ids)
        judged = ((sequence >= special) | (sequence == processor.eos_token_id)).nonzero().flatten()
        if not len(judged):
            shares.append(float("nan"))
            continue
        wrong = sum(_count_forbidden(grammar, sequence, steps, vocab) for steps in judged.split(_ROWS))
        shares.append(wrong / len(judged))
    return shares


def _count_forbidden(grammar: MidiGrammar, sequence: Tensor, steps: Tensor, vocab: int) -> int:
    """How many tokens at these steps, in ascending order, the grammar forbids after what is before them."""
    width = int(steps[-1])
    # Prefixes of different lengths in one batch: padding on the left changes nothing.
    places = torch.arange(width) - (width - steps)[:, None]
    prefixes = torch.where(places >= 0, sequence[places.clamp(min=0)], 0)
    scores = grammar(prefixes, torch.zeros(len(steps), vocab))
    return int(scores.gather(1, sequence[steps, None]).isneginf().sum())


def syntax_errors(processor: MidiProcessor, ids: Sequence[int]) -> float:
    """MidiTok's own share of base tokens that may not follow the one before, or that repeat a note; NaN for none.

    It is asked about base tokens, and about a copy: of subwords it returns shares above 1, and it rewrites its
    argument.
    """
    tokenizer = processor.midi_tokenizer
    first = len(tokenizer.special_tokens)
    music = [token for token in ids if first <= token]
    base = expand_ids(tokenizer, music)
    return float(tokenizer.tokens_errors(TokSequence(ids=list(base)))) if base else float("nan")
