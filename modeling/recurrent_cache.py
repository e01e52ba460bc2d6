"""The state of a Mamba model between two tokens: constant in size, exact to fork."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .configuration_midimamba import MidiMambaConfig


class RecurrentCache:
    """
    What a [`MidiMambaForCausalLM`] remembers of the tokens it has read: for every layer the last `conv_kernel - 1`
    inputs of the convolution and the state of the scan. A new cache is the state before the first token.

    A forward pass updates the tensors in place, without a graph: gradients never reach back through a cache.
    [`~RecurrentCache.fork`] and [`~RecurrentCache.select`] copy, so that a roll-out cannot corrupt its origin;
    [`~RecurrentCache.rows`] does not, and is how a decoding loop works on part of one allocation.

    Args:
        conv_states (`list[Tensor]`): one `(batch, conv_kernel - 1, channels)` a layer.
        scan_states (`list[Tensor]`): one `(batch, state, channels)` a layer, in float32 or wider.
        seen_tokens (`int`, *optional*, defaults to 0): tokens read so far, padding included.
    """

    is_compileable = False  # asked by `generate`, which would compile the forward pass for a static cache

    def __init__(self, conv_states: list[Tensor], scan_states: list[Tensor], seen_tokens: int = 0):
        self.conv_states = conv_states
        self.scan_states = scan_states
        self.seen_tokens = seen_tokens

    @classmethod
    def empty(
        cls,
        config: MidiMambaConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "RecurrentCache":
        """The state before the first token; `dtype` is the model's, the scan's own states are at least float32."""
        channels, layers = config.intermediate_size, range(config.num_hidden_layers)
        conv_shape = (batch_size, config.conv_kernel - 1, channels)
        scan_shape = (batch_size, config.state_size, channels)
        scan_dtype = torch.promote_types(dtype, torch.float32)
        return cls(
            [torch.zeros(conv_shape, dtype=dtype, device=device) for _ in layers],
            [torch.zeros(scan_shape, dtype=scan_dtype, device=device) for _ in layers],
        )

    @classmethod
    def for_model(cls, model: PreTrainedModel, batch_size: int) -> "RecurrentCache":
        """The state before the first token, in the model's type and on its device."""
        return cls.empty(model.config, batch_size, model.dtype, model.device)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.scan_states[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of all states, in bytes. It does not depend on the number of tokens read."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, as `generate` asks for it."""
        return self.seen_tokens

    def fork(self, copies: int) -> "RecurrentCache":
        """Every sequence `copies` times, neighbours together: row `i` becomes rows `i * copies` and following."""
        return self._map(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def select(self, indices: Tensor) -> "RecurrentCache":
        """The sequences at `indices`, a `LongTensor` of shape `(n,)`, copied; an index may repeat."""
        return self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def snapshot(self) -> "RecurrentCache":
        """A copy that later forward passes leave as it is."""
        return self._map(Tensor.clone)

    def rows(self, start: int, stop: int) -> "RecurrentCache":
        """The sequences `start … stop - 1` as a view: what is read into it is read into this cache, too."""
        return self._map(lambda tensor: tensor[start:stop])

    def copy_(self, other: "RecurrentCache") -> "RecurrentCache":
        """Overwrite the states with those of `other`, a cache of the same shapes."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)
        self.seen_tokens = other.seen_tokens
        return self

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with the sequences at `beam_idx`, in place: the hook of beam search."""
        self.copy_(self.select(beam_idx))

    def _tensors(self) -> Iterable[Tensor]:
        return (*self.conv_states, *self.scan_states)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "RecurrentCache":
        return RecurrentCache(
            [function(tensor) for tensor in self.conv_states],
            [function(tensor) for tensor in self.scan_states],
            self.seen_tokens,
        )


__all__ = ["RecurrentCache"]
