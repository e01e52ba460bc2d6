"""A discriminator as the reward function of TRL's trainers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.scoring import score
from midimamba.tokenization.processor import MidiProcessor


class DiscriminatorReward:
    """
    How likely a prompt with its completion is real music: for `reward_funcs` of TRL's `GRPOTrainer` and `RLOOTrainer`.

    Args:
        discriminator (`MidiDiscriminator`): judges whole sequences.
        processor (`MidiProcessor`): its `tokenizer` is the trainer's `processing_class`, and prompts are its text,
            such as `"BOS_None Bar_None"`.
        batch_size (`int`, *optional*, defaults to 64): sequences read at once.
    """

    def __init__(self, discriminator: MidiDiscriminator, processor: MidiProcessor, batch_size: int = 64):
        self.discriminator = discriminator
        self.processor = processor
        self.batch_size = batch_size
        self.__name__ = "discriminator"  # under which TRL logs it

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """A probability for each completion. What else TRL passes by name is not used."""
        tokenizer = self.processor.tokenizer
        sequences = [
            torch.tensor([*tokenizer(prompt).input_ids, *ids])
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        ids = pad_sequence(sequences, batch_first=True, padding_value=self.processor.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in sequences], batch_first=True)
        rewards: list[float] = score(self.discriminator, ids, mask, self.batch_size).sigmoid().tolist()
        return rewards


__all__ = ["DiscriminatorReward"]
