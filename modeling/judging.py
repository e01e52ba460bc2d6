"""Judges of token sequences: what values a sequence by the log-odds that it is real music."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

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
        pad_token_id (`int`, *optional*), eos_token_id (`int`, *optional*): those of the generator. The discriminator
            is given what [`music_of`] leaves of a sequence.
    """

    def __init__(self, discriminator: Any, pad_token_id: int | None, eos_token_id: int | None):
        # Of any type: this module is published with the pipeline, and the network's is not.
        self.discriminator = discriminator
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id

    def log_odds(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-odds `(n,)` of `n` sequences, in float64 on the CPU."""
        rows = [music_of(sequence, self.pad_token_id, self.eos_token_id) for sequence in sequences]
        return score_sequences(self.discriminator, rows, self.pad_token_id or 0).double().cpu()


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


def music_of(sequence: Sequence[int] | Tensor, pad_token_id: int | None, eos_token_id: int | None) -> list[int]:
    """What a judge is given of a sequence: prompt and continuation, without padding and the token that ends it.

    Whoever asks for a number of bars decides where a piece ends, so its end says nothing about the music. A judge that
    heard it would be calibrated on other sequences than those among which it chooses.

    Args:
        sequence (`Sequence[int]` or `LongTensor` of shape `(time,)`): padded on either side, or not at all.
        pad_token_id (`int`, *optional*), eos_token_id (`int`, *optional*): those of the generator; they may be the
            same.

    Returns:
        `list[int]`: from the first to the last token that is neither; what is between them stays. The first token of
        a sequence that has no other.
    """
    ids: list[int] = sequence.tolist() if isinstance(sequence, Tensor) else list(sequence)
    places = [place for place, token in enumerate(ids) if token not in (pad_token_id, eos_token_id)]
    return ids[places[0] : places[-1] + 1] if places else ids[:1]


__all__ = ["Ensemble", "Judge", "TokenJudge", "music_of"]
