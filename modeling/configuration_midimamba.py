"""Configuration of the generator."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MambaConfig


@strict
class MidiMambaConfig(MambaConfig):
    r"""
    Configuration of a [`MidiMambaForCausalLM`]: every field of [`~transformers.MambaConfig`], with defaults for MIDI.

    A model of this layout computes what transformers' own `MambaForCausalLM` computes, so the configuration is
    *written* as a `MambaConfig`: the checkpoint then loads anywhere, without this package. It is read from one, too.

    Args:
        vocab_size (`int`, *optional*, defaults to 1000):
            Number of token ids.
        hidden_size (`int`, *optional*, defaults to 256):
            Width of the residual stream; the mixer works on `expand` times as many channels.
        num_hidden_layers (`int`, *optional*, defaults to 6):
            Number of mixers.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*, defaults to 0, 1, 2):
            As this package's tokenizers number them.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal initialisation of embeddings and projections.
    """

    model_type = "midimamba"

    vocab_size: int = 1000
    hidden_size: int = 256
    num_hidden_layers: int = 6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    initializer_range: float = 0.02

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the configuration of a Mamba language model, as this class or transformers' own wrote it.

        Raises:
            ValueError: if it is one of another model, whose weights would be dropped without a word.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = config.get("model_type")
        if kind not in (MambaConfig.model_type, cls.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a model of type {kind!r}, not a Mamba language model"
            )
        return {**config, "model_type": cls.model_type}, unused

    def to_dict(self) -> dict[str, Any]:
        """The fields as a stock `MambaConfig` names them: what `save_pretrained` writes."""
        return {**super().to_dict(), "model_type": MambaConfig.model_type, "architectures": ["MambaForCausalLM"]}


__all__ = ["MidiMambaConfig"]
