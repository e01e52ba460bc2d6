"""On disk, weights have the names that transformers' own classes give them; the modules here have plain names.

So a checkpoint of layout `mamba` is one of `MambaForCausalLM`, a checkpoint of layout `transformer` is one of
`LlamaForCausalLM`, and the other layouts follow them.
"""

import re
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming, WeightTransform

from .configuration_midimamba import MidiMambaConfig

# Regular expressions for the parts of a name that differ, on disk and here, by the mixer of the layers. Transformers
# reads them in both directions.
_RENAMINGS = {
    "mamba": {r"(?<=\d)\.norm\.": r"\.mixer_norm\."},
    "attention": {
        r"^model\.": r"backbone\.",
        r"(?<!\w)embed_tokens\.": r"embeddings\.",
        r"\.input_layernorm\.": r"\.mixer_norm\.",
        r"\.self_attn\.": r"\.mixer\.",
        r"\.post_attention_layernorm\.": r"\.feed_forward_norm\.",
        r"\.mlp\.": r"\.feed_forward\.",
    },
}
# No name fits those of another mixer, so that all may be tried where a file does not say what it holds.
_ALL = {stock: plain for renamings in _RENAMINGS.values() for stock, plain in renamings.items()}


class _Written(Protocol):
    _weight_conversions: list[WeightTransform]


def plain_name(name: str) -> str:
    """The name that a weight has in a model here, from its name on disk. A plain name stays as it is."""
    for stock, plain in _ALL.items():
        name = re.sub(stock, plain.replace("\\", ""), name, count=1)
    return name


def write_stock_names(model: _Written, config: MidiMambaConfig) -> None:
    """Let `save_pretrained` of the model write the names of the stock class.

    Args:
        model (`PreTrainedModel`): a generator, or a model with a generator's network inside.
        config (`MidiMambaConfig`): the network's.
    """
    # What `from_pretrained` leaves here to be reversed on saving. A new model has nothing, and a loaded one only what
    # its file needed, so all of them are set. Conversions of a quantizer stay.
    others = [one for one in getattr(model, "_weight_conversions", []) if not isinstance(one, WeightRenaming)]
    renamings = [WeightRenaming(stock, plain) for stock, plain in _RENAMINGS[config.mixer].items()]
    model._weight_conversions = [*renamings, *others]


def stock_names_for_loading(from_pretrained: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a `from_pretrained` so that it understands the names of the stock classes."""
    return from_pretrained(*args, **{**kwargs, "key_mapping": _ALL | (kwargs.get("key_mapping") or {})})


def read_stock_names(module: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
    """The same for `load_state_dict`, by which `Trainer` resumes from a file: its hook before loading."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        tensor = state_dict.pop(name)
        state_dict[prefix + plain_name(name.removeprefix(prefix))] = tensor


__all__ = ["plain_name", "read_stock_names", "stock_names_for_loading", "write_stock_names"]
