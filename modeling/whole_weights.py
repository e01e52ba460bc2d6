"""Weights are read whole or not at all.

Where a checkpoint lacks a tensor, transformers fills in random values and says so in a log. For the new head of a
classifier that is meant; for a generator's network it makes noise. So the classes here refuse a checkpoint that does
not hold what they need, that holds layers they have no place for, or that is a pickle, which could run code.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from .stock_names import stock_names_for_loading

_SHOWN = 3  # of the names in a message
_IGNORED = "rotary_emb.inv_freq"  # a constant that old Llama checkpoints hold


class WholeWeights(PreTrainedModel):
    """What `from_pretrained` of our models does beyond that of transformers: it reads stock names, and checks.

    A class declares in `_own_weights` how the names of the weights begin that every checkpoint of it holds. Others,
    such as those of a head in a user's subclass, are left to transformers, which warns.
    """

    _own_weights: ClassVar[tuple[str, ...]]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As transformers does it, from a checkpoint with stock names. Only safetensors files are read.

        Raises:
            ValueError: if weights are missing, left over, or of another shape or kind than the configuration says.
        """
        return stock_names_for_loading(super().from_pretrained, *args, **{**kwargs, "use_safetensors": True})

    # Transformers calls it for a model and for its adapters, after it has compared the names and before it fills in
    # what is missing. A test holds that it is still called.
    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        expected_keys: list[str] | None = None,
    ) -> tuple[LoadStateDictInfo, dict[str, Any]]:
        if state_dict is None and not load_config.is_quantized:
            _check_kinds(checkpoint_files or [])
        loaded: tuple[LoadStateDictInfo, dict[str, Any]] = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        _check_names(model, loaded[0], load_config, expected_keys)
        return loaded


def _check_kinds(files: Sequence[str]) -> None:
    """Refuse pickles, and tensors of whole numbers, which transformers would convert to weights."""
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(f"{file} is a pickle, which can run code when it is read: save it as safetensors")
        with safe_open(file, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118 (not a mapping)
                kind = saved.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")):
                    raise ValueError(f"{Path(file).name} holds {name} as {kind}, and weights are real numbers")


def _check_names(
    model: PreTrainedModel,
    found: LoadStateDictInfo,
    load_config: LoadStateDictConfig,
    expected: Collection[str] | None,
) -> None:
    """Raise a `ValueError` that names what a checkpoint lacks or has in excess. See [`WholeWeights`]."""
    assert isinstance(model, WholeWeights)
    own = model._own_weights
    missing = {name for name in found.missing_keys if name.startswith(own)}
    if expected is not None:  # of adapters; the network was read before
        missing &= set(expected)
    for tied, source in model.all_tied_weights_keys.items():  # one of the two is enough
        if not {tied, source} <= missing:
            missing -= {tied, source}
    unexpected = {name for name in found.unexpected_keys if _IGNORED not in name}
    reasons = []
    if missing:
        reasons.append(f"it lacks {_listed(missing)}")
    if unexpected and (missing or any(name.startswith(own) for name in unexpected)):
        reasons.append(f"the model has no place for {_listed(unexpected)}")
    if found.mismatched_keys and not load_config.ignore_mismatched_sizes:
        shapes = {f"{name} {list(theirs)} instead of {list(ours)}" for name, theirs, ours in found.mismatched_keys}
        reasons.append(f"it has other shapes: {_listed(shapes)}")
    reasons += [" ".join(message.split()) for message in (*found.error_msgs, *found.conversion_errors.values())]
    if reasons:
        name = load_config.pretrained_model_name_or_path
        raise ValueError(
            f"the checkpoint {name or ''} does not fit its configuration: {'; '.join(reasons)}. "
            "Save or download the model again, all of its files together"
        )


def _listed(names: Collection[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


__all__ = ["WholeWeights"]
