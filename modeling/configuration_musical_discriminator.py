"""Configuration of the discriminator that hears musical features."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .config_checks import check_model_type, check_sizes, read_config, refuse_misspelled, refuse_unknown


@strict
class MusicalDiscriminatorConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MusicalDiscriminator`].

    Args:
        feature_names (`list[str]`, *optional*):
            The musical features, in the order of the columns that the discriminator takes; see
            [`~midimamba.evaluation.judged_features.JUDGED`].
        feature_widths (`list[int]`, *optional*):
            How many columns each of them has: 1 for a number, the number of bins for a histogram.
        squares (`bool`, *optional*, defaults to `False`):
            Whether it also hears how far a feature is from its mean on either side.
        bars (`int`, *optional*):
            The length of the pieces that it was fitted on. Its log-odds mean most for pieces of that length.
    """

    model_type = "midimamba-musical-discriminator"

    feature_names: list[str] | tuple[str, ...] = ()
    feature_widths: list[int] | tuple[int, ...] = ()
    squares: bool = False
    bars: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        refuse_misspelled(self, kwargs)
        check_sizes({**kwargs, **vars(self)}, ("feature_widths", "bars", "num_labels"))
        # One logit, the log-odds that a piece is real, as in a reward model of TRL.
        kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)

    def validate_features(self) -> None:
        """As many widths as names, and no name twice."""
        if len(self.feature_names) != len(self.feature_widths):
            raise ValueError(
                f"{len(self.feature_names)} feature_names need as many feature_widths, not {len(self.feature_widths)}"
            )
        if len(set(self.feature_names)) < len(self.feature_names):
            raise ValueError("feature_names has a name twice; each feature can be heard once")

    @property
    def num_columns(self) -> int:
        """Columns of the matrix that the discriminator takes."""
        return sum(self.feature_widths)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the configuration of a musical discriminator.

        Raises:
            ValueError: if it belongs to another kind of model.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_model_type(config, pretrained_model_name_or_path, cls.model_type, "a discriminator of musical features")
        return config, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but an argument that is not a field is refused."""
        return refuse_unknown(super().from_dict, config_dict, kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return read_config(json_file)


__all__ = ["MusicalDiscriminatorConfig"]
