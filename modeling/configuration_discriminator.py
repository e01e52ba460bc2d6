"""Configuration of the discriminator."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .config_checks import (
    check_look_back,
    check_model_type,
    check_sizes,
    read_config,
    refuse_misspelled,
    refuse_unknown,
)

_SIZES = (
    *("vocab_size", "hidden_size", "filter_sizes", "num_filters"),
    *("num_hidden_layers", "state_size", "expand", "conv_kernel", "num_labels", "lookback_bars"),
)


@strict
class MidiDiscriminatorConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MidiDiscriminator`].

    Args:
        kind (`str`, *optional*, defaults to `"cnn"`):
            `"cnn"`: SeqGAN's convolutions of several widths, max-over-time and a highway layer (arXiv 1609.05473,
            appendix), with one value per sequence. `"mamba"`: a causal Mamba with a value at every position.
        vocab_size (`int`, *optional*, defaults to 1000):
            Number of token ids: that of the generator.
        hidden_size (`int`, *optional*, defaults to 64):
            Size of the token embedding (`cnn`), width of the residual stream (`mamba`).
        dropout (`float`, *optional*, defaults to 0.25):
            Dropout before the last layer.
        filter_sizes (`list[int]`, *optional*):
            `cnn`: the widths of the convolutions, in tokens; SeqGAN's by default.
        num_filters (`list[int]`, *optional*):
            `cnn`: how many filters of each width; SeqGAN's by default.
        num_hidden_layers (`int`, *optional*, defaults to 2):
            `mamba`: number of layers.
        state_size, expand, conv_kernel (`int`, *optional*, defaults to 16, 2 and 4):
            `mamba`: as in [`MidiMambaConfig`].
        spectral_norm (`bool`, *optional*, defaults to `False`):
            Divide the weights of convolutions and linear layers by their largest singular value, so that no layer
            stretches a difference (arXiv 1802.05957). `cnn`: all of them; `mamba`: the projections of the mixers and
            the last layer.
        lookback_bars (`list[int]`, *optional*, defaults to `[]`):
            Show beside each token what followed the same place this many bars ago, and whether the token repeats what
            was there, as in [`MidiMambaConfig`]. Without it a discriminator hardly hears the form of the music.
        bar_token_ids, position_token_ids (`list`, *optional*, defaults to `[]`):
            For `lookback_bars`, as in [`MidiMambaConfig`].
        bos_token_id (`int`, *optional*):
            The token with which a piece begins.
        pad_token_id (`int`, *optional*, defaults to 0):
            Padding.
    """

    model_type = "midimamba-discriminator"

    kind: str = "cnn"
    vocab_size: int = 1000
    hidden_size: int = 64
    dropout: float = 0.25
    filter_sizes: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20)
    num_filters: list[int] | tuple[int, ...] = (100, 200, 200, 200, 200, 100, 100, 100, 100, 100, 160, 160)
    num_hidden_layers: int = 2
    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 4
    spectral_norm: bool = False
    lookback_bars: list[int] | tuple[int, ...] = ()
    bar_token_ids: list[int] | tuple[int, ...] = ()
    position_token_ids: list[list[int]] | tuple[list[int], ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: object) -> None:
        refuse_misspelled(self, kwargs)
        check_sizes({**kwargs, **vars(self)}, _SIZES)
        # One logit, the log-odds that a sequence is real, as in a reward model of TRL.
        kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)

    def validate_kind(self) -> None:
        """One of the two kinds, with one number of filters for every width."""
        if self.kind not in ("cnn", "mamba"):
            raise ValueError(f"discriminator kind {self.kind!r} is unknown; use 'cnn' or 'mamba'")
        if not self.filter_sizes:
            raise ValueError("filter_sizes is empty; give at least one width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if len(self.filter_sizes) != len(self.num_filters):
            raise ValueError(
                f"{len(self.filter_sizes)} filter_sizes need as many num_filters, not {len(self.num_filters)}"
            )
        check_look_back(self.lookback_bars, self.bar_token_ids, self.position_token_ids, self.vocab_size)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the configuration of a discriminator.

        Raises:
            ValueError: if it belongs to another kind of model.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_model_type(config, pretrained_model_name_or_path, cls.model_type, "a discriminator")
        return config, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but an argument that is not a field is refused."""
        return refuse_unknown(super().from_dict, config_dict, kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return read_config(json_file)


__all__ = ["MidiDiscriminatorConfig"]
