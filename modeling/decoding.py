"""Which steps of decoding one kernel computes, and where it finds the weights.

[`~midimamba.modeling.decode_numba`] has the kernel. It stands in for the layers where nobody can tell: one token for
each sequence, on the processor, in float32, without a graph, through layers that are all our own and that nobody has
wrapped, replaced or hooked. Everything else goes through the layers. They define what is computed.
"""

from itertools import repeat
from operator import attrgetter, contains, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.models.mamba.modeling_mamba import MambaRMSNorm

from .configuration_midimamba import MidiMambaConfig
from .feed_forward import SwiGLU
from .layer_states import MambaState, Scratch
from .mamba_mixer import MidiMambaMixer
from .recurrent_cache import RecurrentCache
from .selective_scan import choose_backend

# A thread computes 8 sequences at once, or 16. Handing them over to it takes 50 to 100 µs.
_ROWS_PER_THREAD, _MOST_AT_ONCE = 8, 16


def decode_step(
    model: Any, tokens: Tensor | None, cache: RecurrentCache, own: tuple[type[nn.Module], ...]
) -> Tensor | None:
    """
    Read one token of each sequence onto a cache.

    Args:
        model (`MidiMambaForCausalLM`): the generator.
        tokens (`LongTensor` of shape `(batch, time)`): the next tokens.
        cache (`RecurrentCache`): updated in place.
        own (`tuple[type[nn.Module], ...]`): the classes of the network and of its layers that the kernel stands for.

    Returns:
        `Tensor` of shape `(batch, vocab)`: the logits of what follows, in float32. `None` if the layers have to be
        called. Then nothing has changed.
    """
    if tokens is None or tokens.dim() != 2 or tokens.shape[1] != 1 or tokens.device.type != "cpu":
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or choose_backend("cpu") != "numba":
        return None
    weights = _WEIGHTS.get(model)
    if weights is None or not weights.are_current(model):
        _WEIGHTS.pop(model, None)
        weights = _Weights.of(model, own)
        if weights is None:
            return None
        _WEIGHTS[model] = weights
    if not isinstance(cache, RecurrentCache) or cache.layout != weights.layout:
        return None
    states = [tensor for state in cache.layers for tensor in state.tensors]
    fits = cache.device == tokens.device and cache.batch_size == len(tokens) > 0
    if not fits or not _are_plain(states):
        return None
    backbone = model.backbone
    embedded: Tensor = backbone.add_look_back(backbone.embeddings(tokens), tokens, None, cache)
    logits = _step(weights, embedded[:, 0].float().contiguous(), states, cache.scratch)
    cache.advance(1)
    return logits


def _step(weights: "_Weights", embedded: Tensor, states: list[Tensor], scratch: Scratch) -> Tensor:
    from .decode_numba import decode, room_per_sequence
    from .numba_common import share

    batch, sizes = len(embedded), weights.sizes
    selects = sizes.rank + 2 * sizes.state
    per_sequence = room_per_sequence(sizes.hidden, sizes.channels, selects, sizes.inner, sizes.vocab)
    room = scratch.floats((2 * batch + _MOST_AT_ONCE) * per_sequence)
    logits = embedded.new_empty(batch, sizes.vocab)
    table = weights.table.copy()
    table[0, :4] = batch, embedded.data_ptr(), room.data_ptr(), logits.data_ptr()
    table[1:, -2:].flat = list(map(Tensor.data_ptr, states))
    share(decode, (table, weights.epsilon), batch, _ROWS_PER_THREAD)
    return logits


class _Sizes(NamedTuple):
    """Of a generator, in the order of the kernel's table."""

    layers: int
    hidden: int
    channels: int
    taps: int
    state: int
    rank: int
    inner: int
    vocab: int

    @classmethod
    def of(cls, config: MidiMambaConfig) -> "_Sizes":
        taps, state, channels = MambaState.sizes_of(config)
        inner = (config.mlp_intermediate_size or 0) if config.feed_forward == "mlp" else 0
        widths = config.num_hidden_layers, config.hidden_size, channels
        return cls(*widths, taps, state, int(config.time_step_rank), inner, config.vocab_size)


class _Weight(NamedTuple):
    """A parameter of a module, the shape that the kernel takes it to have, and whether it may be missing."""

    owner: nn.Module
    name: str
    shape: tuple[int, ...]
    is_optional: bool = False

    def is_as_expected(self) -> bool:
        tensor = self.owner._parameters.get(self.name)
        if tensor is None:
            return self.is_optional
        return type(tensor) is nn.Parameter and tensor.device.type == "cpu" and tensor.shape == self.shape


class _Weights:
    """
    Where the weights of a generator are. The kernel reads them there, so that it cannot miss a change of a value.
    Whatever else may change is looked at before every step, which takes 15 µs.

    Args:
        model (`MidiMambaForCausalLM`): a generator that the kernel can stand in for.
        modules (`list[tuple[nn.Module, str]]`): all modules that it stands in for, as an attribute of another.
        rows (`list[list[_Weight]]`): the weights after the layers, and those of each layer, in the kernel's order.
    """

    def __init__(self, model: Any, modules: list[tuple[nn.Module, str]], rows: list[list[_Weight]]):
        self.sizes = _Sizes.of(model.config)
        self.epsilon = np.float32(model.config.layer_norm_epsilon)
        self.layout = model.make_state(0).layout
        weights = [weight for row in rows for weight in row]
        # All of these are looked up in dictionaries of modules, because attributes of modules take ten times as long.
        self._places: list[tuple[dict[str, Any], str]] = [(owner._modules, name) for owner, name in modules]
        self._places += [(weight.owner._parameters, weight.name) for weight in weights]
        self._found = self._look_up()
        parts = self._found[: len(modules)]
        self._attributes = [vars(part) for part in parts]
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._tensors = [tensor for tensor in self._found[len(modules) :] if tensor is not None]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self.table = _table(self.sizes, rows)

    @classmethod
    def of(cls, model: Any, own: tuple[type[nn.Module], ...]) -> "_Weights | None":
        """Those of a generator; `None` if the kernel cannot stand in for its layers."""
        config = model.config
        if set(config.mixers) != {"mamba"} or config.feed_forward == "moe" or config.hidden_act != "silu":
            return None
        modules = _modules(model)
        kinds = *own, nn.ModuleList, MambaRMSNorm, MidiMambaMixer, SwiGLU, nn.Linear, nn.Conv1d
        if modules is None or any(type(owner._modules[name]) not in kinds for owner, name in modules):
            return None
        sizes, layers = _Sizes.of(config), model.backbone.layers
        if len(layers) != sizes.layers:
            return None
        rows = [_weights_of_head(model, sizes), *(_weights_of_layer(layer, sizes) for layer in layers)]
        if not all(weight.is_as_expected() for row in rows for weight in row):
            return None
        weights = cls(model, modules, rows)
        return weights if weights.are_current(model) else None

    def are_current(self, model: Any) -> bool:
        """Whether everything is still where it was, and the kernel may stand in for the layers."""
        return (
            all(map(is_, self._look_up(), self._found))
            and not any(self._hooks)
            and not any(map(contains, self._attributes, repeat("forward")))
            and not (model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and _are_plain(self._tensors)
        )

    def _look_up(self) -> list[Any]:
        return [attributes.get(name) for attributes, name in self._places]


def _are_plain(tensors: list[Tensor]) -> bool:
    """Whether the kernel can read all of them, if they are on the processor."""
    in_float32 = all(map(is_, map(_dtype_of, tensors), repeat(torch.float32)))
    return in_float32 and all(map(Tensor.is_contiguous, tensors))


_dtype_of = attrgetter("dtype")
# The weights of a model live as long as the model does, and are not copied or saved with it.
_WEIGHTS: "WeakKeyDictionary[Any, _Weights]" = WeakKeyDictionary()


def _modules(model: Any) -> list[tuple[nn.Module, str]] | None:
    """Every module that the kernel stands in for, as an attribute of another; `None` if one is missing."""
    backbone, mixer_parts = model.backbone, ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    final = "norm_f" if "norm_f" in backbone._modules else "norm"
    modules: list[tuple[nn.Module, str]] = [
        (model, "backbone"),
        (model, "lm_head"),
        (backbone, "layers"),
        (backbone, final),
    ]
    for index, layer in backbone.layers._modules.items():
        modules += [(backbone.layers, index), (layer, "mixer_norm"), (layer, "mixer")]
        modules += [(layer.mixer, part) for part in mixer_parts]
        if layer.feed_forward is not None:
            modules += [(layer, "feed_forward_norm"), (layer, "feed_forward")]
            modules += [(layer.feed_forward, part) for part in ("gate_proj", "up_proj", "down_proj")]
    return modules if all(name in owner._modules for owner, name in modules) else None


def _weights_of_head(model: Any, sizes: _Sizes) -> list[_Weight]:
    hidden, vocab = sizes.hidden, sizes.vocab
    head = _Weight(model.lm_head, "weight", (vocab, hidden)), _Weight(model.lm_head, "bias", (vocab,), True)
    return [_Weight(model.backbone.final_norm, "weight", (hidden,)), *head]


def _weights_of_layer(layer: Any, sizes: _Sizes) -> list[_Weight]:
    _, hidden, channels, taps, state, rank, inner, _ = sizes
    mixer = layer.mixer
    weights = [
        _Weight(layer.mixer_norm, "weight", (hidden,)),
        _Weight(mixer.in_proj, "weight", (2 * channels, hidden)),
        _Weight(mixer.in_proj, "bias", (2 * channels,), True),
        _Weight(mixer.conv1d, "weight", (channels, 1, taps + 1)),
        _Weight(mixer.conv1d, "bias", (channels,), True),
        _Weight(mixer.x_proj, "weight", (rank + 2 * state, channels)),
        _Weight(mixer.x_proj, "bias", (rank + 2 * state,), True),
        _Weight(mixer.dt_proj, "weight", (channels, rank)),
        _Weight(mixer.dt_proj, "bias", (channels,)),
        _Weight(mixer, "A_log", (channels, state)),
        _Weight(mixer, "D", (channels,)),
        _Weight(mixer.out_proj, "weight", (hidden, channels)),
        _Weight(mixer.out_proj, "bias", (hidden,), True),
    ]
    if inner:
        parts = layer.feed_forward
        weights += [_Weight(layer.feed_forward_norm, "weight", (hidden,))]
        weights += [_Weight(part, "weight", (inner, hidden)) for part in (parts.gate_proj, parts.up_proj)]
        weights += [_Weight(parts.down_proj, "weight", (hidden, inner))]
    return weights


def _table(sizes: _Sizes, rows: list[list[_Weight]]) -> Any:
    """The table of [`~midimamba.modeling.decode_numba.decode`], without what each step fills in."""
    from .decode_numba import FINAL_NORM, LAYERS, SLOTS

    table = np.zeros((len(rows), SLOTS), np.int64)
    table[0, LAYERS : LAYERS + len(sizes)] = sizes
    for index, row in enumerate(rows):
        tensors = [weight.owner._parameters.get(weight.name) for weight in row]
        start = 0 if index else FINAL_NORM
        table[index, start : start + len(row)] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return table


__all__ = ["decode_step"]
