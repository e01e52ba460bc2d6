"""What the processor's `from_pretrained` may be given, and what a folder says of the training data."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import PROCESSOR_NAME
from transformers.utils.hub import cached_file

from .errors import InputError

# What concerns the Hub.
_OF_THE_HUB = frozenset(
    {"cache_dir", "force_download", "local_files_only", "token", "revision", "proxies", "subfolder", "user_agent"}
)
_OF_THE_TOKENIZER = frozenset({"padding_side", "truncation_side", "model_max_length"})
# `AutoProcessor` and `pipeline` pass on whatever they are given for the model, its configuration, its code and other
# kinds of processors. For this one it has no meaning.
_OF_OTHERS = frozenset(
    {"trust_remote_code", "code_revision", "use_fast", "backend", "config", "return_unused_kwargs", "gguf_file"}
    | {"dtype", "torch_dtype", "device_map", "attn_implementation", "experts_implementation", "max_memory", "variant"}
    | {"offload_folder", "offload_buffers", "quantization_config", "low_cpu_mem_usage", "use_safetensors"}
    | {"adapter_kwargs", "adapter_name", "tp_plan", "tp_size", "device_mesh", "distributed_config", "key_mapping"}
    | {
        "use_kernels",
        "kernel_config",
        "allow_all_kernels",
        "resume_download",
        "ignore_mismatched_sizes",
        "weights_only",
    }
    | {"output_loading_info", "state_dict", "tqdm_class", "generation_config"}
)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Part the keyword arguments of `from_pretrained`.

    Returns:
        `tuple[dict, dict]`: those that concern the Hub, and those of the text tokenizer. Those of models are dropped,
        and so are transformers' own, which begin with an underscore.

    Raises:
        InputError: if there is no such argument anywhere.
    """
    unknown = {name for name in options if not name.startswith("_")} - _OF_THE_HUB - _OF_THE_TOKENIZER - _OF_OTHERS
    if unknown:
        raise InputError(
            f"from_pretrained of a MidiProcessor has no argument {', '.join(sorted(unknown))}: leave it out; "
            f"it takes {', '.join(sorted(_OF_THE_HUB | _OF_THE_TOKENIZER))}"
        )
    return _some(options, _OF_THE_HUB), _some(options, _OF_THE_TOKENIZER)


def _some(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def load_facts(name: str, hub_options: Mapping[str, Any]) -> dict[str, Any]:
    """What `processor_config.json` says of the training data. Folders of earlier versions say less, or nothing."""
    path = cached_file(name, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **hub_options)
    if path is None:
        return {}
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        programs, voices = config.get("programs"), config.get("voices")
        programs_fit = programs is None or all(program in range(-1, 128) for program in programs)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{name}: its {PROCESSOR_NAME} cannot be read ({error}): save the processor again") from error
    if not programs_fit:
        raise InputError(
            f"{name}: programs in {PROCESSOR_NAME} must be numbers from -1 to 127: save the processor again"
        )
    if voices is not None and (type(voices) is not int or voices < 1):
        raise InputError(f"{name}: voices in {PROCESSOR_NAME} must be a number from 1 up: save the processor again")
    return {"programs": programs, "voices": voices}


__all__ = ["load_facts", "split_options"]
