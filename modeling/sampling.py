"""Drawing sequences from a generator's own distribution, token by token on an in-place state."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .policy import as_policy, inference
from .selective_scan import choose_backend


def draw(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """One token per row from logits `(n, vocab)` divided by a temperature, with one random number per row."""
    if temperature != 1:
        logits = logits / temperature
    return pick(logits, torch.rand(len(logits), 1, device=logits.device, dtype=logits.dtype))


def pick(logits: Tensor, numbers: Tensor) -> Tensor:
    """The tokens that uniform random numbers `(n, 1)` in [0, 1) stand for: the cumulative distribution, inverted."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or choose_backend("cpu") != "numba":
        return _invert(logits, numbers)
    from .pick_numba import UNSURE, pick_

    tokens = torch.empty(len(logits), dtype=torch.long)
    pick_(logits.detach().contiguous().numpy(), numbers[:, 0].contiguous().numpy(), tokens.numpy())
    if len(unsure := (tokens == UNSURE).nonzero()[:, 0]):  # so that the kernel draws exactly what torch would
        tokens[unsure] = _invert(logits[unsure], numbers[unsure])
    return tokens


def _invert(logits: Tensor, numbers: Tensor) -> Tensor:
    cumulative = logits.softmax(-1).cumsum(-1)
    # `1 - number` lies in (0, 1], so a token of probability zero before the first possible one is never drawn.
    return torch.searchsorted(cumulative, (1 - numbers) * cumulative[:, -1:]).squeeze(-1)


class Ending(NamedTuple):
    """
    Which token ends a sequence, and which fills it up afterwards.

    Args:
        eos_token_id (`int`, *optional*): the token that ends a sequence; by default nothing does.
        pad_token_id (`int`, *optional*, defaults to 0): the token that follows an end.
        bars (`int`, *optional*): a sequence counts up to the end of this many bars; by default all of it does.
        bar_token_ids (`tuple[int, ...]`, *optional*): the tokens that begin a bar, for `bars`.
    """

    eos_token_id: int | None = None
    pad_token_id: int = 0
    bars: int | None = None
    bar_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Any) -> Self:
        """How the sequences of a model with this configuration end: as `generate` ends them.

        Raises:
            ValueError: if several tokens end a sequence.
        """
        end, padding = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
        if end is None:
            return cls()
        if not isinstance(end, int):
            raise ValueError(f"eos_token_id is {end}; set it to a single token in the generator's configuration")
        return cls(end, end if padding is None else padding)

    def mask(self, sequences: Tensor, prompt: int) -> Tensor:
        """The attention mask of sequences: 1 up to the first end, that token included, and 0 after it. The token that
        begins the first bar too many has 0 as well.

        Args:
            sequences (`LongTensor` of shape `(batch, time)`): what [`sample`] returned, or real music.
            prompt (`int`): tokens at the start that were given. An end among them ends nothing: prompts cut out of
                packed blocks contain the ends of earlier pieces.

        Returns:
            `LongTensor` of shape `(batch, time)`.
        """
        mask = torch.ones_like(sequences)
        if self.eos_token_id is not None:
            ends = sequences == self.eos_token_id
            ends[:, :prompt] = False
            earlier = ends.cumsum(1) - ends.long()
            mask = (earlier == 0).long()
        if self.bars is not None:
            begun = torch.isin(sequences, sequences.new_tensor(self.bar_token_ids)).cumsum(1)
            mask = mask * (begun <= self.bars).long()
        return mask

    def close(self, tokens: Tensor, is_over: Tensor) -> Tensor:
        """What becomes of tokens `(n,)` just drawn: padding in rows that are over.

        Args:
            tokens (`LongTensor` of shape `(n,)`): drawn for the first `n` rows.
            is_over (`BoolTensor` of shape `(rows,)`): rows that have ended. Updated in place.
        """
        if self.eos_token_id is None:
            return tokens
        over = is_over[: len(tokens)]
        tokens = tokens.masked_fill(over, self.pad_token_id)
        over |= tokens == self.eos_token_id
        return tokens


class Sequences(NamedTuple):
    """
    Token sequences of one length, some of which may have ended earlier.

    Args:
        ids (`LongTensor` of shape `(batch, time)`): tokens, then padding.
        mask (`LongTensor` of shape `(batch, time)`): 1 on tokens, 0 on padding.
    """

    ids: Tensor
    mask: Tensor

    def split(self, rows: int) -> list["Sequences"]:
        """Parts of at most `rows` sequences."""
        return [Sequences(ids, mask) for ids, mask in zip(self.ids.split(rows), self.mask.split(rows), strict=True)]

    def rows(self, indices: Tensor | slice) -> "Sequences":
        """Some of the sequences."""
        return Sequences(self.ids[indices], self.mask[indices])

    def trimmed(self, least: int = 1) -> "Sequences":
        """The same without the columns at the end that are padding in every row; at least `least` columns."""
        longest = max(least, int(self.mask.sum(1).max()))
        return Sequences(self.ids[:, :longest], self.mask[:, :longest])


NEVER = Ending()
"""Sequences that nothing ends."""


def sample(model: Any, prompts: Tensor, length: int, ending: Ending = NEVER, temperature: float = 1.0) -> Tensor:
    """Continue prompts with tokens drawn from the model's own distribution, without a grammar.

    There is no top-p or top-k here: they give probability zero to tokens that the policy might draw, and no weight
    corrects an expectation under the policy for what never comes.

    Args:
        model (`Policy` or `PreTrainedModel`): the policy.
        prompts (`LongTensor` of shape `(batch, prompt)`): at least one token each.
        length (`int`): tokens in the result, prompt included.
        ending (`Ending`, *optional*): what ends a sequence and what fills it up then; by default nothing ends one.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits.

    Returns:
        `LongTensor` of shape `(batch, length)`.

    Raises:
        ValueError: if the temperature is not positive, or the model cannot be sampled from.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, but must be positive")
    policy = as_policy(model)
    batch, prompt = prompts.shape
    sequences = prompts.new_full((batch, length), ending.pad_token_id)
    sequences[:, :prompt] = prompts
    is_over = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    with inference(policy):
        state = policy.make_state(batch, max_length=length)
        unread = prompts
        for t in range(prompt, length):
            sequences[:, t] = ending.close(draw(policy.next_logits(unread, state), temperature), is_over)
            if ending.eos_token_id is not None and is_over.all():
                break
            unread = sequences[:, t : t + 1]
    return sequences


__all__ = ["NEVER", "Ending", "Sequences", "draw", "pick", "sample"]
