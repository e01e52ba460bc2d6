"""The one way in which commands and scripts load a model: whole, finite, or refused in one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from midimamba.errors import InputError, check_hub
from midimamba.files import read_json
from midimamba.modeling.configuration_musical_discriminator import MusicalDiscriminatorConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.modeling_musical_discriminator import MusicalDiscriminator
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.sampling_limits import SAMPLING_DEFAULTS, check_sampling

Network = TypeVar("Network", MidiMambaForCausalLM, MidiDiscriminator, MusicalDiscriminator)

# Transformers and peft check little of what they read: a wrong type or number in a file shows as any of these.
_UNUSABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
# What `from_pretrained` reads beside `config.json`, and ignores or stumbles over if it is broken.
_MORE_FILES = (GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME)
_NUMBERS = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
)
_HUB_OPTIONS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"})


def load_generator(name: str | Path, **options: Any) -> MidiMambaForCausalLM:
    """Load a generator as the fast class.

    Args:
        name (`str` or `Path`): a folder, or a repository on the Hub.
        options: as for `from_pretrained`.

    Raises:
        InputError: if there is no whole generator, or its weights are not finite.
    """
    return _load(MidiMambaForCausalLM, "generator", name, options)


def load_processor(name: str | Path) -> MidiProcessor:
    """Load a processor.

    Args:
        name (`str` or `Path`): a folder, or a repository on the Hub.

    Raises:
        InputError: if there is none.
    """
    check_hub(str(name))
    return MidiProcessor.from_pretrained(name)


def load_discriminator(name: str | Path, **options: Any) -> MidiDiscriminator:
    """Load a discriminator.

    Args:
        name (`str` or `Path`): a folder, or a repository on the Hub.
        options: as for `from_pretrained`.

    Raises:
        InputError: if there is no whole discriminator, or its weights are not finite.
    """
    return _load(MidiDiscriminator, "discriminator", name, options)


def load_any_discriminator(name: str | Path, **options: Any) -> MidiDiscriminator | MusicalDiscriminator:
    """Load a discriminator of tokens or of musical features, whichever its configuration says.

    Args:
        name (`str` or `Path`): a folder, or a repository on the Hub.
        options: as for `from_pretrained`.

    Raises:
        InputError: if there is no whole discriminator of either kind, or its weights are not finite.
    """
    with _loading("discriminator", name, options):
        where = {key: value for key, value in options.items() if key in _HUB_OPTIONS}
        config, _ = PreTrainedConfig.get_config_dict(name, **where)
    if config.get("model_type") == MusicalDiscriminatorConfig.model_type:
        return _load(MusicalDiscriminator, "discriminator", name, options)
    return load_discriminator(name, **options)


def _load(network: type[Network], kind: str, name: str | Path, options: Mapping[str, Any]) -> Network:
    with _loading(kind, name, options):
        model: Network = network.from_pretrained(name, **options)
        _check_finite(model)
    return model


@contextmanager
def _loading(kind: str, name: str | Path, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn what `from_pretrained` raises for a missing, foreign or broken checkpoint into an [`InputError`]."""
    check_hub(str(name))
    try:
        _check_more_files(str(name), options)
        yield
    except _UNUSABLE as error:
        raise InputError(f"no {kind} can be loaded from {str(name)!r}: {_reason(error)}{_pickles(name)}") from error


def _reason(error: Exception) -> str:
    """In one line. Errors of the Hub go on with advice to programmers, which is left out."""
    text = str(error).strip()
    if isinstance(error, OSError) and text:
        text = text.splitlines()[0]
    text = " ".join(text.split())
    if isinstance(error, SafetensorError):
        return f"its weights are damaged or cut off ({text}): copy or download them again"
    if isinstance(error, (OSError, ValueError, RuntimeError, StrictDataclassError)) and text:
        return text
    return f"{type(error).__name__} {text}".strip()


def _pickles(name: str | Path) -> str:
    """What to do about a folder whose weights are not read."""
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        return ""
    return " (its *.bin are pickles, which can run code and are never read: save the model as safetensors)"


def _check_more_files(name: str, options: Mapping[str, Any]) -> None:
    where = {key: value for key, value in options.items() if key in _HUB_OPTIONS}
    for file in _MORE_FILES:
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **where,
        )
        if path is not None:
            _check_content(Path(path), read_json(Path(path)))


def _check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse values of the wrong type, of which transformers would complain later and less clearly."""
    if path.name == SAFE_WEIGHTS_INDEX_NAME:
        files = content.get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{path} has no `weight_map` from names to files: save or download the model again")
    for name, value in content.items() if path.name == GENERATION_CONFIG_NAME else ():
        parts = value if isinstance(value, list) and name.endswith("_token_id") else [value]
        numbers = all(isinstance(part, (int, float, type(None))) for part in parts)
        if not numbers and (name in _NUMBERS or name.endswith("_token_id")):
            raise ValueError(f"{path}: {name} is {value!r}, not a number; correct it or remove the line")
    if path.name == GENERATION_CONFIG_NAME:
        try:
            check_sampling(**{name: content.get(name) for name in SAMPLING_DEFAULTS})
        except InputError as error:
            raise ValueError(f"{path}: {error}, or remove the line") from error


def _check_finite(model: nn.Module) -> None:
    """Raise a `ValueError` if a weight is NaN or infinite: the smallest or the largest of its tensor then is."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(
                f"its weights hold NaN or infinity, in {name} first; the training has diverged or the file is "
                "damaged: take an earlier checkpoint"
            )
