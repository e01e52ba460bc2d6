"""Judges of token sequences: what values a sequence by the log-odds that it is real music."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .modeling_discriminator import MidiDiscriminator
from .scoring import score_sequences


class Judge(Protocol):
    """Whatever values token sequences."""

    def log_odds(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-odds `(n,)` that each of `n` sequences is real music rather than a sample, in float64 on the CPU."""


class TokenJudge:
    """
    A discriminator of token sequences.

    Args:
        discriminator (`MidiDiscriminator`): in any mode, which stays as it is.
        pad_token_id (`int`): padding, which is cut off the ends of sequences.
    """

    def __init__(self, discriminator: MidiDiscriminator, pad_token_id: int):
        self.discriminator = discriminator
        self.pad_token_id = pad_token_id

    def log_odds(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-odds `(n,)` of `n` sequences, in float64 on the CPU."""
        rows = [_without_padding(sequence, self.pad_token_id) for sequence in sequences]
        return score_sequences(self.discriminator, rows, self.pad_token_id).double().cpu()


class Ensemble:
    """
    Several judges whose log-odds are added. They are to be calibrated together: judges that hear the same add up to
    too much.

    Args:
        judges (`Sequence[Judge]`): at least one.
    """

    def __init__(self, judges: Sequence[Judge]):
        if not judges:
            raise ValueError("an ensemble needs at least one judge")
        self.judges = list(judges)

    def log_odds(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-odds `(n,)` of `n` sequences, in float64 on the CPU."""
        return torch.stack([judge.log_odds(sequences) for judge in self.judges]).sum(0)


def _without_padding(sequence: Sequence[int], pad_token_id: int) -> Tensor:
    """A sequence up to its last token that is not padding; at least its first token."""
    ids = torch.as_tensor(sequence, dtype=torch.long).cpu()
    music = (ids != pad_token_id).nonzero()
    return ids[: int(music[-1]) + 1 if len(music) else 1]


__all__ = ["Ensemble", "Judge", "TokenJudge"]
