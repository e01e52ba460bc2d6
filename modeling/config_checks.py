"""What a `config.json` must be before anything is built from it, for it may come from anyone."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

MAX_COUNT = 1024  # of layers and labels, each of which is made one by one
_COUNTS = ("num_hidden_layers", "num_labels")
MAX_SIZE = (
    2**24
)  # of any width or vocabulary: far beyond what is used, and products of three still fit 64 bits or fail

# Arguments that `AutoConfig` and `pipeline` pass on to a configuration although they concern its code or the model.
_OF_LOADING = frozenset(
    {"code_revision", "config", "dtype", "torch_dtype", "device_map", "max_memory", "variant", "quantization_config"}
    | {"offload_folder", "offload_buffers", "low_cpu_mem_usage", "use_safetensors", "weights_only", "key_mapping"}
    | {"adapter_kwargs", "adapter_name", "tp_plan", "tp_size", "device_mesh", "distributed_config", "use_kernels"}
    | {"kernel_config", "allow_all_kernels", "resume_download", "ignore_mismatched_sizes", "output_loading_info"}
    | {"state_dict", "tqdm_class", "generation_config", "trust_remote_code", "attn_implementation", "user_agent"}
)
_NAMES_OF_TOKENS = ("_token", "_token_id")  # of which there are many that are almost alike
_ALMOST = 0.8  # the similarity of two names, as difflib measures it


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: if it holds anything else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON can be too deep for Python's stack
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def refuse_unknown(from_dict: Callable[..., Any], config_dict: dict[str, Any], options: Mapping[str, Any]) -> Any:
    """Build a configuration by transformers' `from_dict`, which drops what it does not know without a word.

    Args:
        from_dict (`Callable`): that of the base class.
        config_dict (`dict[str, Any]`): what was read.
        options (`Mapping[str, Any]`): what it was given to change, and `return_unused_kwargs`.

    Raises:
        ValueError: if an argument is neither a field of the configuration nor one of loading, and the caller does not
            ask for those that were not used.
    """
    config, unused = from_dict(config_dict, **{**options, "return_unused_kwargs": True})
    if options.get("return_unused_kwargs"):
        return config, unused
    if unknown := sorted(name for name in unused if not name.startswith("_") and name not in _OF_LOADING):
        nearest = get_close_matches(unknown[0], vars(config), n=1)
        advice = f"write {nearest[0]}" if nearest else "leave it out"
        raise ValueError(f"{type(config).__name__} has no field {', '.join(unknown)}: {advice}")
    return config


def refuse_misspelled(config: Any, others: Mapping[str, Any]) -> None:
    """Refuse an argument that is almost a field: it would become an attribute that nothing reads.

    Transformers lets a configuration have attributes of any name, and a file may hold some of another version. So
    other names are left alone, and everything is where a file was read.

    Args:
        config (`PreTrainedConfig`): being made.
        others (`Mapping[str, Any]`): what it was given beside its fields.

    Raises:
        ValueError: if there is one.
    """
    if "model_type" in others:  # which every file has
        return
    known = {field.name for field in fields(config)}
    for name in sorted(others.keys() - vars(PreTrainedConfig()).keys() - vars(GenerationConfig()).keys()):
        nearest = get_close_matches(name, known, n=1, cutoff=_ALMOST)
        if nearest and not name.endswith(_NAMES_OF_TOKENS):
            raise ValueError(f"{type(config).__name__} has no field {name}: write {nearest[0]}")


def check_sizes(values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse sizes of which no network can be built, before one is tried.

    Args:
        values (`Mapping[str, Any]`): fields of a configuration.
        names (`Iterable[str]`): those that are whole numbers or lists of them. They may be `None` or `"auto"`.

    Raises:
        ValueError: if one of them is anything else, or out of bounds.
    """
    for name in names:
        value = values.get(name)
        limit = MAX_COUNT if name in _COUNTS else MAX_SIZE
        for size in value if isinstance(value, (list, tuple)) else [value]:
            if size in (None, "auto"):
                continue
            if type(size) is not int or not 1 <= size <= limit:  # `true` is an int as well
                raise ValueError(f"{name} is {size!r}; it must be a whole number between 1 and {limit:,}")


def check_positive(values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse numbers that would make every activation infinite or NaN.

    Raises:
        ValueError: if one of `names` is a number that is not finite and above 0.
    """
    for name in names:
        value = values.get(name)
        if isinstance(value, (int, float)) and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be a finite number above 0")


def check_model_type(config: Mapping[str, Any], name: str | os.PathLike[str], model_type: str, kind: str) -> None:
    """Refuse the configuration of another kind of model.

    Args:
        config (`Mapping[str, Any]`): what was read.
        name (`str`): where it was read.
        model_type (`str`): the type that it must have.
        kind (`str`): what a model of this type is called.

    Raises:
        ValueError: if nothing was read, or another type.
    """
    if not config:
        raise ValueError(f"{name} has no config.json")
    if config.get("model_type") != model_type:
        raise ValueError(f"{name} is a model of type {config.get('model_type')!r}, not {kind}")


def check_look_back(
    lags: Sequence[int], bars: Sequence[int], positions: Sequence[Sequence[int]], vocab_size: int
) -> None:
    """Refuse a look-back that cannot be computed.

    Args:
        lags (`Sequence[int]`): in bars.
        bars (`Sequence[int]`): the ids that open a bar.
        positions (`Sequence[Sequence[int]]`): pairs of an id and the position that it sets.
        vocab_size (`int`): number of ids.

    Raises:
        ValueError: if a lag is below 1, no id opens a bar, or an id is not in the vocabulary.
    """
    if any(lag < 1 for lag in lags):
        raise ValueError(f"lookback_bars is {list(lags)}; each lag must be at least 1")
    if lags and not bars:
        raise ValueError("lookback_bars needs bar_token_ids, the ids that open a bar")
    if any(not 0 <= index < vocab_size for index in (*bars, *(index for index, _ in positions))):
        raise ValueError(f"bar_token_ids and position_token_ids must lie below vocab_size ({vocab_size})")


def check_look_ahead(lags: Sequence[int], tokens: Sequence[int | None], looks_back: bool, vocab_size: int) -> None:
    """Refuse a look-ahead that cannot be computed.

    Args:
        lags (`Sequence[int]`): in bars.
        tokens (`Sequence[int | None]`): the ids of a gap and of a fill.
        looks_back (`bool`): whether the model looks back.
        vocab_size (`int`): number of ids.

    Raises:
        ValueError: if a lag is below 1, the model does not look back, or an id is missing or not in the vocabulary.
    """
    if any(lag < 1 for lag in lags):
        raise ValueError(f"lookahead_bars is {list(lags)}; each lag must be at least 1")
    if lags and (None in tokens or not looks_back):
        raise ValueError("lookahead_bars needs lookback_bars, gap_token_id and fill_token_id")
    if any(token is not None and not 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"gap_token_id and fill_token_id must lie below vocab_size ({vocab_size})")


__all__ = [
    "check_look_ahead",
    "check_look_back",
    "check_model_type",
    "check_positive",
    "check_sizes",
    "read_config",
    "refuse_misspelled",
    "refuse_unknown",
]
