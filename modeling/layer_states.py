"""What one layer remembers of the tokens it has read: one class per kind of layer, all with the same verbs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_midimamba import MidiMambaConfig

PADDING = -1
"""The document number of what no token may attend to: padding, and slots that were never filled."""

LATER = torch.iinfo(torch.int32).max
"""The place of tokens that have not come yet: behind every other."""


class CacheMismatchError(ValueError):
    """A cache does not belong to the model, batch or device that it was given to, or has no room left."""


class LayerState(ABC):
    """
    The state of a layer: a few tensors whose first dimension is the sequences. The verbs follow from that, so that a
    new kind of state declares its tensors and how it starts, and nothing else.

    Memory may be reserved for more sequences than there are. The tensors are then its first rows.

    Args:
        tensors (`Tensor` of shape `(batch, …)`): the memory, in the order of `names`.
    """

    kind: ClassVar[str]
    """The name of this kind of state in messages."""
    names: ClassVar[tuple[str, ...]]
    """The attributes that hold the tensors."""
    keeps_tokens: ClassVar[bool] = False
    """Whether it keeps something of every token, at the same place in every sequence."""
    fill: ClassVar[int] = 0
    """The value of memory that holds nothing."""

    def __init__(self, *tensors: Tensor):
        self._memory = tensors
        self.is_view = False
        for name, tensor in zip(self.names, tensors, strict=True):
            setattr(self, name, tensor)

    @classmethod
    @abstractmethod
    def empty(
        cls,
        config: MidiMambaConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_length: int | None = None,
    ) -> Self:
        """The state before the first token. See [`RecurrentCache.empty`]."""

    @classmethod
    @abstractmethod
    def sizes_of(cls, config: MidiMambaConfig) -> tuple[int, ...]:
        """The [`~LayerState.sizes`] of a layer of such a model."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """What states of one model have in common, whatever the number of sequences and tokens."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the sequences, in the order of `names`."""
        return tuple([getattr(self, name) for name in self.names])  # a list is faster to make than a generator

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.tensors[0])

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return self._memory[0].device

    @property
    def nbytes(self) -> int:
        """Memory in bytes, reserved memory included."""
        return sum(tensor.nbytes for tensor in self._memory)

    def show(self, batch_size: int) -> None:
        """Take the first rows of the memory as the sequences."""
        for name, memory in zip(self.names, self._memory, strict=True):
            setattr(self, name, memory if len(memory) == batch_size else memory[:batch_size])

    def fork(self, copies: int) -> Self:
        """Every sequence `copies` times, as neighbours."""
        return self._map(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def select(self, indices: Tensor) -> Self:
        """A copy of the sequences at `indices`, a `LongTensor` of shape `(n,)` on any device."""
        return self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def clone(self) -> Self:
        """A copy."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device; on its own device the state itself."""
        return self if self._memory[0].to(device).device == self.device else self._map(lambda part: part.to(device))

    def rows(self, start: int, stop: int) -> Self:
        """The sequences `start … stop - 1`, in the same memory."""
        view = self._map(lambda tensor: tensor[start:stop])
        view.is_view = True
        return view

    def copy_(self, other: Self, seen_tokens: int) -> None:
        """Overwrite all sequences with those of `other`, which has read that many tokens."""
        self._write(0, other, seen_tokens)

    def append(self, other: Self, seen_tokens: int) -> None:
        """Add the sequences of `other`, which has read that many tokens, behind those here."""
        first = self.batch_size
        total = first + other.batch_size
        missing = total - len(self._memory[0])
        if missing > 0:
            self._memory = tuple(self._pad(memory, 0, missing) for memory in self._memory)
        self.show(total)
        self._write(first, other, seen_tokens)

    def make_room(self, length: int) -> None:  # noqa: B027 (a state that does not grow has nothing to do)
        """Make sure that tokens up to `length` fit. Most states do not grow."""

    def _write(self, start: int, other: Self, seen_tokens: int) -> None:
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[start:].copy_(theirs)

    def _pad(self, memory: Tensor, dim: int, more: int) -> Tensor:
        return F.pad(memory, (0, 0) * (memory.dim() - 1 - dim) + (0, more), value=self.fill)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*map(function, self.tensors))


class MambaState(LayerState):
    """
    Of a Mamba mixer; constant in size.

    Args:
        conv (`Tensor` of shape `(batch, conv_kernel - 1, channels)`): the last inputs of the convolution.
        scan (`Tensor` of shape `(batch, state, channels)`): the state of the scan, in float32 or wider.
    """

    kind = "Mamba"
    names = ("conv", "scan")
    conv: Tensor
    scan: Tensor

    @classmethod
    def empty(
        cls,
        config: MidiMambaConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_length: int | None = None,
    ) -> Self:
        taps, states, channels = cls.sizes_of(config)
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(batch_size, taps, channels, dtype=dtype, device=device),
            torch.zeros(batch_size, states, channels, dtype=wide, device=device),
        )

    @classmethod
    def sizes_of(cls, config: MidiMambaConfig) -> tuple[int, ...]:
        return config.conv_kernel - 1, config.state_size, config.intermediate_size

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.conv.shape[1], *self.scan.shape[1:]


class TokenState(LayerState):
    """A state that keeps something of every token, in memory that doubles when it is full. See [`LayerState`]."""

    keeps_tokens = True
    time_dim: ClassVar[int]
    """The dimension of the tensors that counts tokens."""
    timeless: ClassVar[int] = 0
    """How many of the last tensors have no such dimension."""

    @property
    def room(self) -> int:
        """How many tokens the memory holds."""
        return self._memory[0].shape[self.time_dim]

    def make_room(self, length: int) -> None:
        room = self.room
        if length <= room:
            return
        if self.is_view:
            raise CacheMismatchError(
                f"a view of rows has room for {room} tokens and cannot grow to {length}; "
                "give max_length to the cache that it is a part of"
            )
        more, batch_size = max(length, 2 * room) - room, self.batch_size
        growing = len(self._memory) - self.timeless
        grown = [self._pad(memory, self.time_dim, more) for memory in self._memory[:growing]]
        self._memory = (*grown, *self._memory[growing:])
        self.show(batch_size)

    def _write(self, start: int, other: Self, seen_tokens: int) -> None:
        length = min(seen_tokens, other.room)  # a state that no layer needs has room for no token
        self.make_room(length)
        growing = len(self.tensors) - self.timeless
        for index, (mine, theirs) in enumerate(zip(self.tensors, other.tensors, strict=True)):
            if index < growing:
                mine[start:].narrow(self.time_dim, 0, length).copy_(theirs.narrow(self.time_dim, 0, length))
            else:
                mine[start:].copy_(theirs)


class AttentionState(TokenState):
    """
    Of an attention mixer.

    Args:
        keys, values (`Tensor` of shape `(batch, key-value heads, max_length, head)`): of every token.
    """

    kind = "attention"
    names = ("keys", "values")
    time_dim = 2
    keys: Tensor
    values: Tensor

    @classmethod
    def empty(
        cls,
        config: MidiMambaConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_length: int | None = None,
    ) -> Self:
        heads, width = cls.sizes_of(config)
        shape = batch_size, heads, max_length or 0, width
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @classmethod
    def sizes_of(cls, config: MidiMambaConfig) -> tuple[int, ...]:
        return config.attention_shape[1:]

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.keys.shape[1], self.keys.shape[3]

    def extend(self, keys: Tensor, values: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """
        Keep the keys and values of the next tokens. There must be room for them.

        Args:
            keys, values (`Tensor` of shape `(batch, heads, time, head)`): of the next tokens.
            past (`int`): how many tokens came before.

        Returns:
            Keys and values of all tokens, each `(batch, heads, past + time, head)`.
        """
        return _extend(self.keys, keys, past), _extend(self.values, values, past)


class DocumentState(TokenState):
    """
    Which document each token belongs to: one state for all layers that attend.

    Args:
        numbers (`LongTensor` of shape `(batch, max_length)`): the document's number, [`PADDING`] for none.
    """

    kind = "document"
    names = ("numbers",)
    time_dim = 1
    fill = PADDING
    numbers: Tensor

    @classmethod
    def empty(
        cls,
        config: MidiMambaConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_length: int | None = None,
    ) -> Self:
        return cls(torch.full((batch_size, max_length or 0), PADDING, device=device))

    @classmethod
    def sizes_of(cls, config: MidiMambaConfig) -> tuple[int, ...]:
        return ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return ()

    def extend(self, numbers: Tensor | int, past: int, time: int) -> None:
        """Keep the numbers `(batch, time)`, or one number, of the next tokens. There must be room for them."""
        self.numbers[:, past : past + time] = numbers

    def _write(self, start: int, other: Self, seen_tokens: int) -> None:
        super()._write(start, other, seen_tokens)
        self.numbers[start:, seen_tokens:] = PADDING


class LookBackState(TokenState):
    """
    The ids and places of all tokens, eight bytes per token.

    Args:
        ids, places (`IntTensor` of shape `(batch, max_length)`): of every token.
        request (`IntTensor` of shape `(batch, 3)`): what the document asks to fill: its gap tokens so far; the number
            of the first bar after the gap, of which the first gap token tells; and by how many bars the filling is
            further on than it would be right before that bar, or 0 outside of a filling.
    """

    kind = "look-back"
    names = ("ids", "places", "request")
    time_dim = 1
    timeless = 1
    fill = LATER
    ids: Tensor
    places: Tensor
    request: Tensor

    @classmethod
    def empty(
        cls,
        config: MidiMambaConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_length: int | None = None,
    ) -> Self:
        shape = batch_size, max_length or 0
        ids, places = (torch.full(shape, LATER, dtype=torch.int32, device=device) for _ in range(2))
        return cls(ids, places, torch.zeros(batch_size, 3, dtype=torch.int32, device=device))

    @classmethod
    def sizes_of(cls, config: MidiMambaConfig) -> tuple[int, ...]:
        return ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return ()

    def extend(self, ids: Tensor, places: Tensor, past: int) -> None:
        """Keep the ids and places `(batch, time)` of the next tokens. There must be room for them."""
        now = past + ids.shape[1]
        self.ids[:, past:now] = ids
        self.places[:, past:now] = places

    def _write(self, start: int, other: Self, seen_tokens: int) -> None:
        super()._write(start, other, seen_tokens)
        self.places[start:, seen_tokens:] = LATER


STATES: Mapping[str, type[LayerState]] = MappingProxyType({"mamba": MambaState, "attention": AttentionState})
"""The state of a layer by the name of its mixer in the configuration."""


class Scratch:
    """Memory that all layers may overwrite in turn, so that decoding allocates none."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._floats = torch.empty(0)

    def like(self, state: Tensor) -> Tensor:
        """Memory of the shape of `state` `(batch, …)`. The shape of one sequence must always be the same."""
        if self._memory is None or len(self._memory) < len(state):
            self._memory = torch.empty_like(state, memory_format=torch.contiguous_format)
        return self._memory[: len(state)]

    def floats(self, count: int) -> Tensor:
        """Memory for `count` numbers in float32 on the processor, or more."""
        if len(self._floats) < count:
            self._floats = torch.empty(count, dtype=torch.float32)
        return self._floats


def _extend(memory: Tensor, new: Tensor, past: int) -> Tensor:
    now = past + new.shape[2]
    memory[:, :, past:now] = new.detach()
    if past == 0:
        return new
    if torch.is_grad_enabled():  # a copy, because the backward pass needs it and the cache moves on
        return torch.cat([memory[:, :, :past].to(new.dtype), new], dim=2)
    return memory[:, :, :now].to(new.dtype)


__all__ = [
    "PADDING",
    "STATES",
    "AttentionState",
    "CacheMismatchError",
    "DocumentState",
    "LayerState",
    "LookBackState",
    "MambaState",
    "Scratch",
    "TokenState",
]
