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
    """One token a row from logits `(n, vocab)`, with one random number a row."""
    return pick(logits, torch.rand(len(logits), 1, device=logits.device, dtype=logits.dtype))


def pick(logits: Tensor, numbers: Tensor) -> Tensor:
    """The tokens that uniform random numbers `(n, 1)` in [0, 1) stand for: the cumulative distribution, inverted."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # `1 - number` lies in (0, 1], so a token of probability zero before the first possible one is never drawn.
    return torch.searchsorted(cumulative, (1 - numbers) * cumulative[:, -1:]).squeeze(-1)


def next_logits(model: MidiMambaForCausalLM, tokens: Tensor, cache: RecurrentCache) -> Tensor:
    """Read tokens `(n, time)` onto the state; logits `(n, vocab)` of what follows."""
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return logits


def valid_tokens(sequences: Tensor, eos_token_id: int | None, prompt: int) -> Tensor:
    """The attention mask of sampled sequences: 1 up to the first end, that token included, and 0 on padding.

    Args:
        sequences (`LongTensor` of shape `(batch, time)`): what [`sample`] returned.
        eos_token_id (`int` or `None`): the token that ends a sequence; with none all tokens are valid.
        prompt (`int`): so many tokens at the start were given. An end among them ends nothing: prompts cut out of
            packed blocks hold the ends of earlier pieces.

    Returns:
        `LongTensor` of shape `(batch, time)`.
    """
    if eos_token_id is None:
        return torch.ones_like(sequences)
    ends = sequences == eos_token_id
    ends[:, :prompt] = False
    earlier = ends.cumsum(1) - ends.long()
    return (earlier == 0).long()


class Ending:
    """
    Which rows of a decoding loop are over: they have drawn `eos_token_id`, and padding follows.

    Rows that are over go on being computed with the others, in lockstep; the loop stops when all are.

    Args:
        model (`MidiMambaForCausalLM`): its configuration has the `pad_token_id`.
        eos_token_id (`int`): the token that ends a sequence.
        is_over (`BoolTensor` of shape `(n,)`): rows that are over from the start. Updated in place.

    Raises:
        ValueError: if the model has no `pad_token_id`.
    """

    def __init__(self, model: MidiMambaForCausalLM, eos_token_id: int, is_over: Tensor):
        if model.config.pad_token_id is None:
            raise ValueError("sequences that end need padding: set pad_token_id in the generator's configuration")
        self.pad_token_id: int = model.config.pad_token_id
        self.eos_token_id = eos_token_id
        self.is_over = is_over

    def __call__(self, tokens: Tensor) -> Tensor:
        """What becomes of tokens just drawn for the first rows: padding behind an end. New ends are noted."""
        is_over = self.is_over[: len(tokens)]
        tokens = tokens.masked_fill(is_over, self.pad_token_id)
        is_over |= tokens == self.eos_token_id
        return tokens


def sample(
    model: MidiMambaForCausalLM,
    prompts: Tensor,
    length: int,
    eos_token_id: int | None = None,
    temperature: float = 1.0,
    log_probabilities: Tensor | None = None,
) -> Tensor:
    """Continue prompts with tokens drawn from the model's own distribution, without a grammar.

    There is no top-p or top-k here: they give tokens probability zero that the policy might draw, and an expectation
    under the policy cannot be corrected for what never comes.

    Args:
        model (`MidiMambaForCausalLM`): the policy.
        prompts (`LongTensor` of shape `(batch, prompt)`): at least one token each.
        length (`int`): tokens in the result, prompt included.
        eos_token_id (`int`, *optional*): behind this token, once drawn, a sequence is padded with the model's
            `pad_token_id`; [`valid_tokens`] tells padding from music. Nothing ends a sequence by default.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits. Other than 1, the sequences come from a
            behaviour policy that is not the model, and a gradient needs importance weights.
        log_probabilities (`Tensor` of shape `(batch, length - prompt)`, *optional*): memory that is overwritten with
            the log-probabilities under the behaviour policy of the tokens drawn, 0 on padding.

    Returns:
        `LongTensor` of shape `(batch, length)`.

    Raises:
        ValueError: if the temperature is not positive, or the model has no `pad_token_id` for sequences that end.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, but must be positive")
    batch, prompt = prompts.shape
    sequences = torch.empty(batch, length, dtype=torch.long, device=prompts.device)
    sequences[:, :prompt] = prompts
    ending = None
    if eos_token_id is not None:
        ending = Ending(model, eos_token_id, torch.zeros(batch, dtype=torch.bool, device=prompts.device))
        sequences[:, prompt:] = ending.pad_token_id
    if log_probabilities is not None:
        log_probabilities.zero_()
    with inference(model):
        cache = RecurrentCache.for_model(model, batch, max_length=length)
        unread = prompts
        for t in range(prompt, length):
            logits = next_logits(model, unread, cache)
            if temperature != 1:
                logits = logits / temperature
            tokens = draw(logits)
            if log_probabilities is not None:
                chosen = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
                log_probabilities[:, t - prompt] = chosen if ending is None else chosen * ~ending.is_over
            sequences[:, t] = tokens if ending is None else ending(tokens)
            if ending is not None and ending.is_over.all():
                break
            unread = sequences[:, t : t + 1]
    return sequences


__all__ = ["Ending", "draw", "inference", "next_logits", "pick", "sample", "valid_tokens"]
