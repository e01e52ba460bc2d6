"""The state of a generator between two tokens: exact to fork, and for Mamba constant in size."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .configuration_midimamba import MidiMambaConfig

PADDING = -1
"""The document number of what no token may attend to: padding, and slots that were never filled."""


class CacheMismatchError(ValueError):
    """A cache was given to a model, a batch or a device that it does not belong to, or has no room left."""


class _Clock:
    """What a cache shares with the views of its rows: they advance in lockstep.

    Args:
        tokens (`int`, *optional*, defaults to 0): tokens read so far, padding included.
        plain (`bool`, *optional*, defaults to `True`): every row read that many tokens of one document, none padding.
            Attention then needs no mask.
    """

    def __init__(self, tokens: int = 0, plain: bool = True):
        self.tokens = tokens
        self.plain = plain
        self.scratch: Tensor | None = None


class _Shape(NamedTuple):
    """What caches of one model have in common, to compare and to tell."""

    mixer: str
    layers: int
    sizes: tuple[int, ...]

    @classmethod
    def of_config(cls, config: MidiMambaConfig) -> "_Shape":
        if config.mixer == "attention":
            return cls("attention", config.num_hidden_layers, config.attention_shape[1:])
        sizes = (config.conv_kernel - 1, config.state_size, config.intermediate_size)
        return cls("Mamba", config.num_hidden_layers, sizes)

    def __str__(self) -> str:
        return f"{self.layers} {self.mixer} layers of {' x '.join(map(str, self.sizes))}"


class RecurrentCache:
    """
    What a [`MidiMambaForCausalLM`] remembers of the tokens it has read. A new cache is the state before the first
    token. For a Mamba layer it is the last `conv_kernel - 1` inputs of the convolution and the state of the scan. For
    an attention layer it is a key and a value of every token, in a buffer that doubles when it is full.

    A forward pass updates the tensors in place, without a graph: gradients never reach back through a cache.
    [`~RecurrentCache.fork`] and [`~RecurrentCache.select`] copy, so that a roll-out cannot corrupt its origin;
    [`~RecurrentCache.rows`] does not, and is how a decoding loop works on part of one allocation.

    Args:
        conv_states (`Sequence[Tensor]`, *optional*): one `(batch, conv_kernel - 1, channels)` a Mamba layer.
        scan_states (`Sequence[Tensor]`, *optional*): one `(batch, state, channels)` a Mamba layer, in float32 or
            wider.
        seen_tokens (`int`, *optional*, defaults to 0): tokens read so far, padding included.
        keys, values (`Sequence[Tensor]`, *optional*): one `(batch, key-value heads, max_length, head)` an attention
            layer.
        documents (`Tensor` of shape `(batch, max_length)`, *optional*): the number of the document of every key,
            [`PADDING`] for none. Needed with `keys`.
    """

    is_compileable = False  # asked by `generate`, which would compile the forward pass for a static cache

    def __init__(
        self,
        conv_states: Sequence[Tensor] = (),
        scan_states: Sequence[Tensor] = (),
        seen_tokens: int = 0,
        keys: Sequence[Tensor] = (),
        values: Sequence[Tensor] = (),
        documents: Tensor | None = None,
    ):
        self.conv_states = list(conv_states)
        self.scan_states = list(scan_states)
        self.keys = list(keys)
        self.values = list(values)
        self.documents = documents
        self._clock = _Clock(seen_tokens)
        self._whole: int | None = None  # of a view: how many rows the cache has that it is part of
        self._reserve: RecurrentCache | None = None  # memory for more rows; this cache is its first ones

    @classmethod
    def empty(
        cls,
        config: MidiMambaConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
    ) -> "RecurrentCache":
        """
        The state before the first token.

        Args:
            config (`MidiMambaConfig`): the model's.
            batch_size (`int`): number of sequences.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): the model's; the scan's own states are at
                least float32.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): the model's.
            max_length (`int`, *optional*): attention layers get room for so many tokens from the start. Room doubles
                when it is full, but not that of a view of rows: there it must suffice. Mamba layers need none.
        """
        layers = range(config.num_hidden_layers)
        if config.mixer == "attention":
            room = max_length or 0
            _, heads, width = config.attention_shape
            shape = (batch_size, heads, room, width)
            return cls(
                keys=[torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
                values=[torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
                documents=torch.full((batch_size, room), PADDING, device=device),
            )
        conv_shape = (batch_size, config.conv_kernel - 1, config.intermediate_size)
        scan_shape = (batch_size, config.state_size, config.intermediate_size)
        scan_dtype = torch.promote_types(dtype, torch.float32)
        return cls(
            [torch.zeros(conv_shape, dtype=dtype, device=device) for _ in layers],
            [torch.zeros(scan_shape, dtype=scan_dtype, device=device) for _ in layers],
        )

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, batch_size: int, max_length: int | None = None, room: int | None = None
    ) -> "RecurrentCache":
        """
        The state before the first token, in the model's type and on its device. See [`~RecurrentCache.empty`].

        Args:
            model (`PreTrainedModel`): a generator, or the network inside one.
            batch_size (`int`): number of sequences; may be 0 if others are [`~RecurrentCache.append`]ed.
            max_length (`int`, *optional*): see [`~RecurrentCache.empty`].
            room (`int`, *optional*): reserves memory for this many sequences, which `append` fills.
        """
        cache = cls.empty(model.config, max(batch_size, room or 0), model.dtype, model.device, max_length)
        if not room or room <= batch_size:
            return cache
        whole, cache = cache, cache._map(lambda tensor: tensor[:batch_size])
        cache._reserve = whole
        return cache

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._tensors()[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return self._tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Memory of all states, in bytes. For Mamba layers it does not depend on the number of tokens read."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def seen_tokens(self) -> int:
        """Tokens read so far, padding included. A cache and the views of its rows have one number."""
        return self._clock.tokens

    @property
    def plain(self) -> bool:
        """Whether every row read the same number of tokens, all of one document and none padding."""
        return self._clock.plain

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

    def to(self, device: torch.device | str) -> "RecurrentCache":
        """A copy on another device; on its own device the cache itself."""
        return self if self._tensors()[0].to(device).device == self.device else self._map(lambda part: part.to(device))

    def rows(self, start: int, stop: int) -> "RecurrentCache":
        """The sequences `start … stop - 1` as a view: what is read into it is read into this cache, too.

        Views and their cache count tokens together. An attention layer takes a row that did not read some of them, as
        other rows did, to be padded there.
        """
        view = self._map(lambda tensor: tensor[start:stop])
        view._clock = self._clock
        view._whole = self._whole or self.batch_size
        return view

    def copy_(self, other: "RecurrentCache") -> "RecurrentCache":
        """Overwrite the states with those of `other`, a cache of the same model and batch size.

        Raises:
            CacheMismatchError: if it is not, or this is a view of some rows of a cache with attention layers and the
                other rows have read another number of tokens.
        """
        if other._shape() != self._shape() or other.batch_size != self.batch_size:
            raise CacheMismatchError(
                f"cannot copy the state of {other.batch_size} sequences of {other._shape()} "
                f"onto {self.batch_size} of {self._shape()}"
            )
        seen = other.seen_tokens
        for mine, theirs in zip(
            self.conv_states + self.scan_states, other.conv_states + other.scan_states, strict=True
        ):
            mine.copy_(theirs)
        if self.documents is not None and other.documents is not None:
            if self._is_part and self.seen_tokens not in (0, seen):
                raise CacheMismatchError(
                    f"rows that read {seen} tokens cannot join rows that read {self.seen_tokens}; "
                    "bring them to the same number first"
                )
            self._make_room(seen)
            for mine, theirs in zip(self.keys + self.values, other.keys + other.values, strict=True):
                mine[:, :, :seen] = theirs[:, :, :seen]
            self.documents[:, :seen] = other.documents[:, :seen]
            self.documents[:, seen:] = PADDING
        self._clock.tokens = seen
        self._clock.plain = other.plain and not self._is_part
        return self

    def append(self, other: "RecurrentCache") -> "RecurrentCache":
        """Add the sequences of `other` behind those here: in place where memory is reserved, else by concatenation.

        Args:
            other (`RecurrentCache`): of the same model. It has read the same number of tokens, or this cache holds no
                sequence yet.

        Raises:
            CacheMismatchError: if the caches do not fit together, or this one is a view of rows.
        """
        mine, theirs = self.batch_size, other.batch_size
        if (
            other._shape() != self._shape()
            or self._whole is not None
            or (mine and self.seen_tokens != other.seen_tokens)
        ):
            raise CacheMismatchError(
                f"cannot append {theirs} sequences of {other._shape()} that read {other.seen_tokens} tokens "
                f"to {mine} of {self._shape()} that read {self.seen_tokens}"
            )
        whole = self._reserve
        plain = other.plain and (self.plain or not mine)
        self._clock.tokens = other.seen_tokens
        if whole is None or whole.batch_size < mine + theirs:
            more = max(0, mine + theirs - (mine if whole is None else whole.batch_size))
            whole = (whole or self)._map(lambda tensor: torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]))
        whole._clock = self._clock
        if self.documents is not None:
            whole._make_room(other.seen_tokens)
        part = whole._map(lambda tensor: tensor[mine : mine + theirs])
        part.copy_(other)
        rows = whole._map(lambda tensor: tensor[: mine + theirs])
        self.conv_states, self.scan_states = rows.conv_states, rows.scan_states
        self.keys, self.values, self.documents = rows.keys, rows.values, rows.documents
        self._clock.plain = plain
        self._reserve = whole
        return self

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with the sequences at `beam_idx`, in place: the hook of beam search."""
        self.copy_(self.select(beam_idx))

    def check_fits(self, config: MidiMambaConfig, batch_size: int, device: torch.device) -> None:
        """
        Raises:
            CacheMismatchError: if this is not the state of so many sequences of such a model, on that device.
        """
        expected = _Shape.of_config(config)
        if self._shape() != expected:
            raise CacheMismatchError(
                f"the cache is of another model: it has {self._shape()}, this model {expected}; "
                "make it with RecurrentCache.for_model(model, batch_size)"
            )
        if self.batch_size != batch_size:
            raise CacheMismatchError(
                f"the cache holds {self.batch_size} sequences, the input {batch_size}; fork or select it first"
            )
        if self.device != device:
            raise CacheMismatchError(f"the cache is on {self.device}, the input on {device}; move it with cache.to(…)")

    def begin(self, documents: Tensor | None, time: int) -> None:
        """Make room for `time` tokens, which layers then [`~RecurrentCache.extend`].

        Args:
            documents (`Tensor` of shape `(batch, time)` or `None`): the numbers of their documents, [`PADDING`] for
                padding; `None` if all belong to document 0. Attention layers only.
            time (`int`): how many tokens follow.
        """
        if self.documents is None:
            return
        self._make_room(self.seen_tokens + time)
        new = slice(self.seen_tokens, self.seen_tokens + time)
        self.documents[:, new] = 0 if documents is None else documents
        self._clock.plain &= documents is None and not self._is_part

    def extend(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values `(batch, heads, time, head)` of the next tokens; those of all tokens come back."""
        return self._extend(self.keys[layer_idx], keys), self._extend(self.values[layer_idx], values)

    def _extend(self, buffer: Tensor, new: Tensor) -> Tensor:
        past, now = self.seen_tokens, self.seen_tokens + new.shape[2]
        buffer[:, :, past:now] = new.detach()
        if past == 0:
            return new
        if torch.is_grad_enabled():  # a copy, because the backward pass needs it and the cache moves on
            return torch.cat([buffer[:, :, :past].to(new.dtype), new], dim=2)
        return buffer[:, :, :now].to(new.dtype)

    @property
    def scratch(self) -> Tensor:
        """Memory of the shape of a scan state that every layer may overwrite, so that decoding allocates none."""
        state = self.scan_states[0]
        if self._clock.scratch is None or len(self._clock.scratch) < len(state):
            self._clock.scratch = torch.empty_like(state, memory_format=torch.contiguous_format)
        return self._clock.scratch[: len(state)]

    def advance(self, time: int) -> None:
        """Count the tokens that all layers have read."""
        self._clock.tokens += time

    @property
    def _is_part(self) -> bool:
        return self._whole is not None and self._whole > self.batch_size

    def _make_room(self, length: int) -> None:
        assert self.documents is not None
        room = self.documents.shape[1]
        if length <= room:
            return
        if self._whole is not None:
            raise CacheMismatchError(
                f"a view of rows has room for {room} tokens and cannot grow to {length}; "
                "give max_length to the cache that it is a part of"
            )
        more = max(length, 2 * room) - room
        self._reserve = None
        self.keys = [F.pad(keys, (0, 0, 0, more)) for keys in self.keys]
        self.values = [F.pad(values, (0, 0, 0, more)) for values in self.values]
        self.documents = F.pad(self.documents, (0, more), value=PADDING)

    def _shape(self) -> "_Shape":
        if self.keys:
            return _Shape("attention", len(self.keys), (self.keys[0].shape[1], self.keys[0].shape[3]))
        conv, scan = self.conv_states[0].shape, self.scan_states[0].shape
        return _Shape("Mamba", len(self.scan_states), (conv[1], *scan[1:]))

    def _tensors(self) -> tuple[Tensor, ...]:
        documents = () if self.documents is None else (self.documents,)
        return (*self.conv_states, *self.scan_states, *self.keys, *self.values, *documents)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "RecurrentCache":
        parts = (self.conv_states, self.scan_states, self.keys, self.values)
        conv_states, scan_states, keys, values = ([function(tensor) for tensor in part] for part in parts)
        documents = None if self.documents is None else function(self.documents)
        copy = RecurrentCache(conv_states, scan_states, self.seen_tokens, keys, values, documents)
        copy._clock.plain = self.plain
        return copy


__all__ = ["PADDING", "CacheMismatchError", "RecurrentCache"]
