"""Drawing sequences from a generator's own distribution, token by token on an in-place state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .modeling_midimamba import MidiMambaForCausalLM
from .recurrent_cache import RecurrentCache


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without a graph; the former mode comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def draw(logits: Tensor) -> Tensor:
    """One token a row from logits `(n, vocab)`: inversion of the cumulative distribution, one random number a row."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # `1 - rand` lies in (0, 1], so a token of probability zero before the first possible one is never drawn.
    threshold = (1 - torch.rand(len(logits), 1, device=logits.device, dtype=logits.dtype)) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold).squeeze(-1)


def next_logits(model: MidiMambaForCausalLM, tokens: Tensor, cache: RecurrentCache) -> Tensor:
    """Read tokens `(n, time)` onto the state; logits `(n, vocab)` of what follows."""
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return logits


def sample(model: MidiMambaForCausalLM, prompts: Tensor, length: int) -> Tensor:
    """Continue prompts with tokens drawn from the model's own distribution: no grammar, temperature 1, no end.

    Args:
        model (`MidiMambaForCausalLM`): the policy.
        prompts (`LongTensor` of shape `(batch, prompt)`): at least one token each.
        length (`int`): tokens in the result, prompt included.

    Returns:
        `LongTensor` of shape `(batch, length)`.
    """
    batch, prompt = prompts.shape
    sequences = torch.empty(batch, length, dtype=torch.long, device=prompts.device)
    sequences[:, :prompt] = prompts
    with inference(model):
        cache = RecurrentCache.for_model(model, batch, max_length=length)
        unread = prompts
        for t in range(prompt, length):
            sequences[:, t] = draw(next_logits(model, unread, cache))
            unread = sequences[:, t : t + 1]
    return sequences


__all__ = ["draw", "inference", "next_logits", "sample"]
