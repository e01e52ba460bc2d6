"""What sampling and roll-outs need of a generator, whoever wrote it.

A policy reads tokens onto a state and says how likely each next token is. [`MidiMambaForCausalLM`] is one. A causal
language model of transformers becomes one through [`as_policy`]; anything else needs the two methods of [`Policy`], as
the LSTM of the tests shows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))
"""What transformers calls a state that is given to a model or returned by it: `cache` since 5.24."""


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode without a graph; the former mode comes back afterwards. For a module or a policy."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class PolicyState(Protocol):
    """What a policy remembers of the sequences it has read. Reading more tokens changes it in place."""

    @property
    def nbytes(self) -> int:
        """Memory of the state, in bytes."""

    def select(self, indices: Tensor) -> Self:
        """A copy of the sequences at `indices`, a `LongTensor` of shape `(n,)`; an index may repeat."""

    def append(self, other: Self) -> None:
        """Add the sequences of `other` behind those here. Both have read the same number of tokens, or this holds no
        sequence yet."""


@runtime_checkable
class Policy(Protocol):
    """
    A distribution over token sequences. `config` has a `vocab_size` and may have a `pad_token_id` and an
    `eos_token_id`; the rest is what any `torch.nn.Module` has.
    """

    config: Any
    training: bool

    def eval(self) -> Any:
        """Switch to evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, or back."""

    def make_state(self, batch_size: int, max_length: int | None = None, room: int | None = None) -> Any:
        """The [`PolicyState`] of sequences before their first token.

        Args:
            batch_size (`int`): number of sequences; 0 for a state that others are appended to.
            max_length (`int`, *optional*): the most tokens a sequence will have; a hint for how much to allocate.
            room (`int`, *optional*): the most sequences the state will hold; a hint as well.
        """

    def next_logits(self, tokens: Tensor, state: Any) -> Tensor:
        """Read tokens `(n, time)` onto the state; logits `(n, vocab)` of what follows, in float32 or wider."""


class StockState:
    """The state of a [`StockPolicy`]: a `DynamicCache` of keys and values."""

    def __init__(self, cache: DynamicCache):
        self.cache = cache

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values, in bytes."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._read_layers())

    def select(self, indices: Tensor) -> "StockState":
        """See [`PolicyState.select`]."""
        copy = StockState(DynamicCache())
        for layer in self._read_layers():
            keys, values = (part.index_select(0, indices.to(part.device)) for part in (layer.keys, layer.values))
            copy.cache.update(keys, values, len(copy.cache.layers))
        return copy

    def append(self, other: "StockState") -> None:
        """See [`PolicyState.append`]."""
        if not self._read_layers():
            self.cache = other.cache
            return
        for mine, theirs in zip(self._read_layers(), other._read_layers(), strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])

    def _read_layers(self) -> list[Any]:
        # Any, since the keys of a layer are declared as a tensor or None, and are a tensor once it has read something.
        return [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer) and layer.get_seq_length()]


class StockPolicy:
    """
    A causal language model of transformers as a [`Policy`].

    Args:
        model (`PreTrainedModel`): any whose state is a full cache of keys and values, such as GPT-2 or Llama.

    Raises:
        ValueError: if its layers keep another state. A stock Mamba is one: it cannot read several tokens onto a state.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.config = model.config
        kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {"DynamicLayer"}
        if kinds or getattr(model, "_is_stateful", False):
            raise ValueError(
                f"a {type(model).__name__} cannot be sampled from forked states; load a Mamba with midimamba.load, or "
                "give the model the two methods of midimamba.modeling.policy.Policy"
            )

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.model.training

    def eval(self) -> None:
        """Switch the model to evaluation mode."""
        self.model.eval()

    def train(self, mode: bool = True) -> None:
        """Switch the model to training mode, or back."""
        self.model.train(mode)

    def make_state(self, batch_size: int, max_length: int | None = None, room: int | None = None) -> StockState:
        """See [`Policy.make_state`]. The cache takes its size from what is read."""
        return StockState(DynamicCache())

    def next_logits(self, tokens: Tensor, state: StockState) -> Tensor:
        """See [`Policy.next_logits`]."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=True, **{CACHE: state.cache}).logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def as_policy(model: Any) -> Policy:
    """The model itself if it is a [`Policy`], else a [`StockPolicy`] around it.

    Raises:
        ValueError: if it is neither a policy nor a causal language model of transformers that can become one.
    """
    if isinstance(model, Policy):
        return model
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} is not a policy: it needs the methods make_state and next_logits of "
            "midimamba.modeling.policy.Policy"
        )
    return cast(Policy, StockPolicy(model))


__all__ = ["Policy", "PolicyState", "StockPolicy", "StockState", "as_policy", "inference"]
