"""The state of a generator between two tokens: exact to fork, and for Mamba constant in size."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from .configuration_midimamba import MidiMambaConfig
from .layer_states import STATES, CacheMismatchError, DocumentState, LayerState, LookBackState, Scratch


class _Model(Protocol):
    """Any generator, or the network of one."""

    config: MidiMambaConfig

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


class _Shared:
    """What a cache shares with the views of its rows: they count tokens together.

    Args:
        rows (`int`): number of sequences of the whole cache.
        tokens (`int`): tokens read so far, padding included.
        plain (`bool`): see [`RecurrentCache.plain`].
    """

    def __init__(self, rows: int, tokens: int, plain: bool):
        self.rows = rows
        self.tokens = tokens
        self.plain = plain
        self.scratch = Scratch()


class RecurrentCache:
    """
    What a [`MidiMambaForCausalLM`] remembers of the tokens it has read: a state per layer, and what belongs to the
    sequences as a whole. A new cache is the state before the first token.

    A forward pass updates the states in place, without a graph: gradients never reach back through a cache.
    [`~RecurrentCache.fork`] and [`~RecurrentCache.select`] copy, so that a roll-out cannot corrupt its origin;
    [`~RecurrentCache.rows`] does not, so that a decoding loop can work on a part of the sequences.

    Args:
        layers (`Sequence[LayerState]`): the state of each layer.
        documents (`DocumentState`): the number of each token's document, for layers that attend.
        look_back (`LookBackState`, *optional*): the tokens read, for a model that looks back.
        seen_tokens (`int`, *optional*, defaults to 0): tokens read so far, padding included.
        plain (`bool`, *optional*, defaults to `True`): see [`~RecurrentCache.plain`].
    """

    is_compileable = False  # asked by `generate`, which would compile the forward pass for a static cache

    def __init__(
        self,
        layers: Sequence[LayerState],
        documents: DocumentState,
        look_back: LookBackState | None = None,
        seen_tokens: int = 0,
        plain: bool = True,
    ):
        self.layers = list(layers)
        self.documents = documents
        self.look_back = look_back
        self._shared = _Shared(documents.batch_size, seen_tokens, plain)

    @classmethod
    def empty(
        cls,
        config: MidiMambaConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        room: int | None = None,
    ) -> "RecurrentCache":
        """
        The state before the first token.

        Args:
            config (`MidiMambaConfig`): the model's.
            batch_size (`int`): number of sequences. It may be 0 if sequences are [`~RecurrentCache.append`]ed.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): the model's; the states of scans are at
                least float32.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): the model's.
            max_length (`int`, *optional*): attention layers get room for this many tokens from the start. Room
                doubles when it is full, but not that of a view of rows: there it must suffice. Mamba layers need
                none.
            room (`int`, *optional*): reserves memory for this many sequences, which
                [`~RecurrentCache.append`] fills.
        """
        rows = max(batch_size, room or 0)
        layers = [STATES[mixer].empty(config, rows, dtype, device, max_length) for mixer in config.mixers]
        attends = any(state.keeps_tokens for state in layers)
        documents = DocumentState.empty(config, rows, dtype, device, max_length if attends else 0)
        look_back = LookBackState.empty(config, rows, dtype, device, max_length) if config.lookback_bars else None
        cache = cls(layers, documents, look_back)
        for state in cache._states:
            state.show(batch_size)
        cache._shared.rows = batch_size
        return cache

    @classmethod
    def for_model(
        cls, model: _Model, batch_size: int, max_length: int | None = None, room: int | None = None
    ) -> "RecurrentCache":
        """The state before the first token, in the model's type and on its device. See [`~RecurrentCache.empty`]."""
        return cls.empty(model.config, batch_size, model.dtype, model.device, max_length, room)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.documents.batch_size

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self.documents.device

    @property
    def nbytes(self) -> int:
        """Memory of all states, in bytes. For Mamba layers it does not depend on the number of tokens read."""
        return sum(state.nbytes for state in self._states)

    @cached_property
    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """The kind and the sizes of every state: the same for all caches of a model."""
        return [(state.kind, state.sizes) for state in self._states if state is not self.documents]

    @property
    def seen_tokens(self) -> int:
        """Tokens read so far, padding included. A cache and the views of its rows have one number."""
        return self._shared.tokens

    @property
    def plain(self) -> bool:
        """Whether every row read the same number of tokens of one document, none padding: attention needs no mask."""
        return self._shared.plain

    @property
    def scratch(self) -> Scratch:
        """Memory that layers may overwrite; shared with the views of rows."""
        return self._shared.scratch

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, as `generate` asks for it."""
        return self.seen_tokens

    def fork(self, copies: int) -> "RecurrentCache":
        """Every sequence `copies` times, as neighbours: row `i` becomes rows `i * copies` and following."""
        return self._map(lambda state: state.fork(copies))

    def select(self, indices: Tensor) -> "RecurrentCache":
        """The sequences at `indices`, a `LongTensor` of shape `(n,)`, copied; an index may repeat."""
        return self._map(lambda state: state.select(indices))

    def snapshot(self) -> "RecurrentCache":
        """A copy that later forward passes leave as it is."""
        return self._map(lambda state: state.clone())

    def to(self, device: torch.device | str) -> "RecurrentCache":
        """A copy on another device; on its own device the cache itself."""
        moved = self.documents.to(device)
        return self if moved is self.documents else self._map(lambda state: state.to(device))

    def rows(self, start: int, stop: int) -> "RecurrentCache":
        """The sequences `start … stop - 1` as a view: what is read into it is read into this cache as well.

        Views and their cache count tokens together. If some rows did not read tokens that others read, attention
        layers take them to be padded there.
        """
        view = self._map(lambda state: state.rows(start, stop))
        view._shared = self._shared
        return view

    def copy_(self, other: "RecurrentCache") -> "RecurrentCache":
        """Overwrite the states with those of `other`, a cache of the same model and batch size.

        Raises:
            CacheMismatchError: if it is not, or this is a view of some rows of a cache with attention layers and the
                other rows have read another number of tokens.
        """
        if other.layout != self.layout or other.batch_size != self.batch_size:
            raise CacheMismatchError(
                f"cannot copy the state of {other.batch_size} sequences of {_describe(other.layout)} "
                f"onto {self.batch_size} of {_describe(self.layout)}"
            )
        seen, is_part = other.seen_tokens, self._is_part
        in_lockstep = self.look_back is not None or any(state.keeps_tokens for state in self.layers)
        if is_part and in_lockstep and self.seen_tokens not in (0, seen):
            raise CacheMismatchError(
                f"rows that read {seen} tokens cannot join rows that read {self.seen_tokens}; "
                "bring them to the same number first"
            )
        for mine, theirs in zip(self._states, other._states, strict=True):
            mine.copy_(theirs, seen)
        self._shared.tokens = seen
        self._shared.plain = other.plain and not is_part
        return self

    def append(self, other: "RecurrentCache") -> "RecurrentCache":
        """Add the sequences of `other` behind those here: in reserved memory if it suffices, else in new memory.

        Args:
            other (`RecurrentCache`): of the same model and type. It has read the same number of tokens, unless this
                cache holds no sequence yet.

        Raises:
            CacheMismatchError: if the caches do not fit together, or this one is a view of rows.
        """
        if self.documents.is_view:
            raise CacheMismatchError("cannot append to a view of rows; append to the cache that it is a part of")
        if other.layout != self.layout or other._dtypes != self._dtypes:
            raise CacheMismatchError(
                f"cannot append sequences of {_describe(other.layout)} in {' and '.join(other._dtypes)} "
                f"to {_describe(self.layout)} in {' and '.join(self._dtypes)}"
            )
        is_first, seen = self.batch_size == 0, other.seen_tokens
        if not is_first and seen != self.seen_tokens:
            raise CacheMismatchError(
                f"cannot append sequences that read {seen} tokens to sequences that read {self.seen_tokens}; "
                "bring them to the same number first"
            )
        for mine, theirs in zip(self._states, other._states, strict=True):
            mine.append(theirs, seen)
        self._shared.rows = self.batch_size
        self._shared.tokens = seen
        self._shared.plain = other.plain and (is_first or self.plain)
        return self

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with the sequences at `beam_idx`, in place: the hook of beam search."""
        self.copy_(self.select(beam_idx))

    def check_fits(self, config: MidiMambaConfig, batch_size: int, device: torch.device) -> None:
        """
        Raises:
            CacheMismatchError: if this is not the state of `batch_size` sequences of such a model, on that device.
        """
        mixers = config.mixers
        sizes = {mixer: (STATES[mixer].kind, STATES[mixer].sizes_of(config)) for mixer in set(mixers)}
        expected = [sizes[mixer] for mixer in mixers]
        if config.lookback_bars:
            expected.append((LookBackState.kind, LookBackState.sizes_of(config)))
        if self.layout != expected:
            raise CacheMismatchError(
                f"the cache is of another model: it has {_describe(self.layout)}, this model {_describe(expected)}; "
                "make it with RecurrentCache.for_model(model, batch_size)"
            )
        if self.batch_size != batch_size:
            raise CacheMismatchError(
                f"the cache holds {self.batch_size} sequences, the input {batch_size}; fork or select it first"
            )
        if self.device != device:
            raise CacheMismatchError(f"the cache is on {self.device}, the input on {device}; move it with cache.to(…)")

    def begin(self, documents: Tensor | None, time: int) -> None:
        """Make room for the next `time` tokens and note their documents. Needed if any layer attends.

        Args:
            documents (`Tensor` of shape `(batch, time)` or `None`): the numbers of their documents,
                [`~midimamba.modeling.layer_states.PADDING`] for padding; `None` if all belong to document 0.
            time (`int`): how many tokens follow.
        """
        for state in (*self.layers, self.documents):
            state.make_room(self.seen_tokens + time)
        self.documents.extend(0 if documents is None else documents, self.seen_tokens, time)
        self._shared.plain &= documents is None and not self._is_part

    def forget(self, forget: Callable[[LookBackState, int], int]) -> None:
        """Forget tokens of the look-back, as if they had not been read. Layers that attend keep them all.

        Args:
            forget (`Callable[[LookBackState, int], int]`): given the look-back and how many tokens were read, forgets
                some of them in place and returns how many are left.
        """
        if self.look_back is not None and self.seen_tokens and not any(state.keeps_tokens for state in self.layers):
            self._shared.tokens = forget(self.look_back, self.seen_tokens)

    def advance(self, time: int) -> None:
        """Count the tokens that all layers have read."""
        self._shared.tokens += time

    @property
    def _states(self) -> tuple[LayerState, ...]:
        states = *self.layers, self.documents
        return states if self.look_back is None else (*states, self.look_back)

    @property
    def _is_part(self) -> bool:
        return self._shared.rows > self.batch_size

    @property
    def _dtypes(self) -> list[str]:
        return sorted({str(tensor.dtype) for state in self.layers for tensor in state.tensors})

    def _map(self, function: Callable[[LayerState], LayerState]) -> "RecurrentCache":
        layers, documents = [function(state) for state in self.layers], function(self.documents)
        look_back = None if self.look_back is None else function(self.look_back)
        assert isinstance(documents, DocumentState)
        assert isinstance(look_back, LookBackState | None)
        mapped = RecurrentCache(layers, documents, look_back, self.seen_tokens, self.plain)
        mapped.layout = self.layout  # asked for at every forward pass
        return mapped


def _describe(layout: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    parts = []
    for (kind, sizes), group in groupby(layout):
        parts.append(f"{len(list(group))} {kind} layers of {' x '.join(map(str, sizes))}")
    return " and ".join(parts)


__all__ = ["CacheMismatchError", "RecurrentCache"]
