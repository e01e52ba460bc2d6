"""What rewards sequences: a discriminator, or one of the controls that know nothing."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.policy import inference
from midimamba.modeling.recurrent_cache import RecurrentCache
from midimamba.modeling.sampling import Sequences
from midimamba.modeling.scoring import score
from midimamba.training.rollout import Forks

KINDS = ("discriminator", "log-odds", "constant", "random", "shuffled")


class Reader(Protocol):
    """Scores the completions of some sequences, then the sequences themselves."""

    def completions(self, forks: Forks, completed: Sequences) -> Tensor:
        """Scores `(n,)` of completed sequences. Calls come in the order of the forks' times."""

    def whole(self) -> Tensor:
        """Scores `(batch,)` of the sequences themselves; the last call."""


class Reward:
    """
    Values whole sequences, or every prefix of them.

    A *score* is what is computed first, in pieces; [`~Reward.of_scores`] turns scores into rewards. The score of a
    discriminator is its logit, the log-odds that a sequence is real.

    Args:
        kind (`str`): `discriminator`, the probability that a sequence is real; `log-odds`, its logit; or a control,
            `constant`, `random` or `shuffled`.
        discriminator (`MidiDiscriminator`): without the wrappers of distributed training.
        judges (`Callable`, *optional*): computes the log-odds of whole [`Sequences`] for the kinds `log-odds` and
            `shuffled`, as they were calibrated; by default the discriminator does.

    Attributes:
        control (`Callable`, *optional*): what scores sequences `(n, time)` instead of the discriminator.
    """

    def __init__(
        self, kind: str, discriminator: MidiDiscriminator, judges: Callable[[Sequences], Tensor] | None = None
    ):
        self.kind = kind
        self.discriminator = discriminator
        self.judges = judges
        self.control: Callable[[Tensor], Tensor] | None = None
        if kind == "constant":
            self.control = lambda sequences: torch.ones(len(sequences), device=sequences.device)
        elif kind == "random":
            self.control = lambda sequences: torch.rand(len(sequences), device=sequences.device)

    @property
    def judge(self) -> MidiDiscriminator | None:
        """The discriminator, if it is what rewards."""
        return self.discriminator if self.control is None else None

    def reader(self, sequences: Sequences, rows_at_once: int) -> Reader:
        """What scores the completions of sequences, reading `rows_at_once` of them at a time."""
        if self.control is None and self.discriminator.config.kind == "mamba":
            return _ForkedStates(self.discriminator, sequences, rows_at_once)
        return _WholeSequences(self._scores, sequences, rows_at_once)

    def of_scores(self, scores: Tensor) -> Tensor:
        """Rewards from scores, of any shape."""
        if self.control is not None:
            return scores
        return scores.float().sigmoid() if self.kind == "discriminator" else scores.float()

    def of_whole(self, sequences: Sequences, rows_at_once: int) -> Tensor:
        """Rewards `(batch,)` of whole sequences; for `shuffled`, dealt out among them."""
        if self.judges is not None and self.kind in ("log-odds", "shuffled"):
            scores = self.judges(sequences)
        else:
            scores = self._scores(sequences, rows_at_once)
        rewards = self.of_scores(scores)
        if self.kind == "shuffled":
            rewards = rewards[torch.randperm(len(rewards)).to(rewards.device)]
        return rewards

    def of_actions(self, sequences: Sequences, prompt: int, rows_at_once: int) -> Tensor:
        """Rewards `(batch, actions)` of every action, from the value D of the prefix that it ends: 2D - 1, or for
        `log-odds` what it adds to them. 0 on padding. For a discriminator that values every prefix."""
        if self.control is None:
            with inference(self.discriminator):
                logits = [
                    self.discriminator(part.ids, attention_mask=part.mask).position_logits
                    for part in sequences.split(rows_at_once)
                ]
            values = self.of_scores(torch.cat(logits))
        else:
            values = self.control(sequences.ids.flatten()).view(sequences.ids.shape)
        rewards = values.diff(dim=1)[:, prompt - 1 :] if self.kind == "log-odds" else 2 * values[:, prompt:] - 1
        return rewards * sequences.mask[:, prompt:]

    def _scores(self, sequences: Sequences, rows_at_once: int) -> Tensor:
        if self.control is not None:
            return self.control(sequences.ids)
        return score(self.discriminator, sequences.ids, sequences.mask, rows_at_once)


class _WholeSequences:
    """Reads every completion from its first token."""

    def __init__(self, scores: Callable[[Sequences, int], Tensor], sequences: Sequences, rows_at_once: int):
        self.scores = scores
        self.sequences = sequences
        self.rows_at_once = rows_at_once

    def completions(self, forks: Forks, completed: Sequences) -> Tensor:
        return self.scores(completed, self.rows_at_once)

    def whole(self) -> Tensor:
        return self.scores(self.sequences, self.rows_at_once)


class _ForkedStates:
    """A causal discriminator: it reads each prefix once, and of a completion only what is new."""

    def __init__(self, discriminator: MidiDiscriminator, sequences: Sequences, rows_at_once: int):
        rows, time = sequences.ids.shape
        self.discriminator = discriminator
        self.sequences = sequences
        self.rows_at_once = rows_at_once
        self.cache = discriminator.make_cache(rows)
        self.span = max(1, rows_at_once * time // rows)
        self.read = 0
        self.logits = torch.zeros(rows, dtype=discriminator.dtype, device=sequences.ids.device)  # of prefixes read

    def completions(self, forks: Forks, completed: Sequences) -> Tensor:
        logits = []
        for time, joining in forks.joins.items():
            self._read_to(time)
            for start in range(joining.start, joining.stop, self.rows_at_once):
                piece = slice(start, min(start + self.rows_at_once, joining.stop))
                origins = forks.rows[piece]
                new = Sequences(completed.ids[piece, time + 1 :], completed.mask[piece, time + 1 :])
                logits.append(self._continue(self.cache.select(origins), new, self.logits[origins]))
        return torch.cat(logits)

    def whole(self) -> Tensor:
        self._read_to(self.sequences.ids.shape[1] - 1)
        return self.logits

    def _read_to(self, time: int) -> None:
        while self.read <= time:
            stop = min(self.read + self.span, time + 1)
            new = Sequences(self.sequences.ids[:, self.read : stop], self.sequences.mask[:, self.read : stop])
            self.logits = self._continue(self.cache, new, self.logits)
            self.read = stop

    def _continue(self, state: RecurrentCache, new: Sequences, before: Tensor) -> Tensor:
        """Logits `(n,)` after more tokens `(n, time)`; where all of them are padding, the ones `before`."""
        with inference(self.discriminator):
            outputs = self.discriminator(new.ids, attention_mask=new.mask, past_key_values=state)
        logits: Tensor = outputs.logits[:, 0]
        return torch.where(new.mask.any(1), logits, before)
