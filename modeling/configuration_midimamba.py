"""Configuration of the generator."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MambaConfig
from transformers.activations import ACT2CLS

from .config_checks import (
    check_look_ahead,
    check_look_back,
    check_positive,
    check_sizes,
    read_config,
    refuse_misspelled,
    refuse_unknown,
)

# The named layouts: what mixes tokens in a layer, and what works on each token after it. In a hybrid, a few layers
# attend instead.
LAYOUTS = {
    "mamba": ("mamba", "none"),
    "mamba-mlp": ("mamba", "mlp"),
    "moe-mamba": ("mamba", "moe"),
    "transformer": ("attention", "mlp"),
    "transformer-moe": ("attention", "moe"),
    "hybrid": ("mamba", "none"),
}
# The layouts that transformers has a class for: the model type of its configuration, and the name of the class.
STOCK = {
    "mamba": (MambaConfig.model_type, "MambaForCausalLM"),
    "transformer": (LlamaConfig.model_type, "LlamaForCausalLM"),
}

_SIZES_OF_TENSORS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel", "time_step_rank"),
    *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("mlp_intermediate_size", "num_experts", "moe_intermediate_size", "num_labels"),
)
_POSITIVE = ("layer_norm_epsilon", "rms_norm_eps", "rope_theta")

# Named sizes: width, number of Mamba mixers in the `mamba` layout, attention heads, the size of the MLP beside a Mamba
# and beside an attention mixer, and the width of a head in a hybrid, whose attention is as large as a Mamba mixer. A
# layer with a feed-forward counts for two mixers, as in the Mamba paper.
_SIZES = {
    "tiny": (128, 4, 4, 304, 432, 56),
    "small": (256, 6, 4, 576, 800, 104),
    "medium": (512, 12, 8, 1104, 1520, 104),
    "large": (1024, 24, 16, 2176, 2976, 104),
}
# One layer in six attends, as in Jamba's family of hybrids (arXiv 2403.19887 has one in eight).
_ATTENDS_EVERY = 6


@strict
class MidiMambaConfig(MambaConfig):
    r"""
    Configuration of a [`MidiMambaForCausalLM`]: every field of [`~transformers.MambaConfig`], with defaults for MIDI,
    and the fields of the other layouts.

    Two layouts compute what a class of transformers computes, and are *written* as its configuration: `mamba` as a
    `MambaConfig`, `transformer` as a `LlamaConfig`. Such a checkpoint loads anywhere, without this package. They are
    read from one as well. The others are written together with the code that reads them.

    Args:
        layout (`str`, *optional*, defaults to `"mamba"`):
            What a layer is: a mixer, and a feed-forward that follows it. `"mamba"`: a Mamba mixer alone.
            `"mamba-mlp"`: with a SwiGLU MLP. `"moe-mamba"`: with top-1 experts in place of the MLP (arXiv 2401.04081).
            `"transformer"`: attention and an MLP, as Llama. `"transformer-moe"`: attention and top-1 experts.
            `"hybrid"`: Mamba mixers alone, but attention in the layers `attention_layers`.
        vocab_size (`int`, *optional*, defaults to 1000):
            Number of token ids.
        hidden_size (`int`, *optional*, defaults to 256):
            Width of the residual stream; a Mamba mixer works on `expand` times as many channels.
        num_hidden_layers (`int`, *optional*, defaults to 6):
            Number of mixers.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*, defaults to 0, 1, 2):
            As this package's tokenizers number them.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal initialisation of embeddings and projections.
        num_attention_heads (`int`, *optional*, defaults to 4):
            Heads of an attention mixer; they divide `hidden_size`.
        num_key_value_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Heads of its keys and values (grouped-query attention, arXiv 2305.13245); they divide
            `num_attention_heads`.
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads`):
            Width of a head, an even number.
        rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the rotary position embedding (arXiv 2104.09864).
        mlp_intermediate_size (`int`, *optional*):
            Width inside an MLP; 8/3 of `hidden_size` by default, rounded up to a multiple of 16. (`intermediate_size`
            is the number of a Mamba mixer's channels.)
        num_experts (`int`, *optional*, defaults to 8):
            Experts per layer; every token is sent to one of them.
        moe_intermediate_size (`int`, *optional*, defaults to `mlp_intermediate_size`):
            Width inside an expert.
        capacity_factor (`float`, *optional*, defaults to 1.25):
            In training an expert takes at most this many times its even share of the tokens (Switch Transformer,
            arXiv 2101.03961, equation 3); the others pass by. In evaluation none is dropped.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the load-balancing loss in training.
        router_z_loss_coef (`float`, *optional*, defaults to 0.001):
            Weight of the router's z-loss in training.
        attention_layers (`list[int]`, *optional*):
            The layers of a hybrid that attend, counted from 0; by default one in six.
        lookback_bars (`list[int]`, *optional*, defaults to `[]`):
            Lags of the look-back embeddings, in bars: see [`~midimamba.modeling.look_back`]. None by default.
        bar_token_ids (`list[int]`, *optional*, defaults to `[]`):
            Ids that open a bar, for the look-back.
        position_token_ids (`list[list[int]]`, *optional*, defaults to `[]`):
            Pairs of an id and the last position in the bar that it sets, for the look-back.
        lookahead_bars (`list[int]`, *optional*, defaults to `[]`):
            Lags by which a filling looks ahead at the bars after its gap. None by default.
        gap_token_id, fill_token_id (`int`, *optional*):
            The ids of infilling, for the look-back: it does not reach across a gap, and looks ahead after a fill.
    """

    model_type = "midimamba"
    # What `Trainer` does not gather when it evaluates with metrics.
    keys_to_ignore_at_inference = ["cache", "past_key_values", "aux_loss", "z_loss", "dropped_tokens"]  # noqa: RUF012

    layout: str = "mamba"
    vocab_size: int = 1000
    hidden_size: int = 256
    num_hidden_layers: int = 6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    initializer_range: float = 0.02
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | int = 10000.0
    mlp_intermediate_size: int | None = None
    num_experts: int = 8
    moe_intermediate_size: int | None = None
    capacity_factor: float | int = 1.25
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    attention_layers: list[int] | tuple[int, ...] | None = None
    lookback_bars: list[int] | tuple[int, ...] = ()
    bar_token_ids: list[int] | tuple[int, ...] = ()
    position_token_ids: list[list[int]] | tuple[list[int], ...] = ()
    lookahead_bars: list[int] | tuple[int, ...] = ()
    gap_token_id: int | None = None
    fill_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_misspelled(self, kwargs)
        _check_numbers({**kwargs, **vars(self)})
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.mlp_intermediate_size is None:
            self.mlp_intermediate_size = -(-8 * self.hidden_size // (3 * 16)) * 16
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.mlp_intermediate_size
        if self.attention_layers is None:
            first = min(_ATTENDS_EVERY, self.num_hidden_layers) // 2
            attends = range(first, self.num_hidden_layers, _ATTENDS_EVERY) if self.layout == "hybrid" else ()
            self.attention_layers = list(attends)
        if self.layout in LAYOUTS:
            if self.mixer == "attention":
                self.residual_in_fp32 = False  # Llama's residual stream has the model's own type
            if not self.is_stock:
                # Asked by `save_pretrained`: export the code that reads it. Only some layouts need any.
                self._auto_class = "AutoConfig"  # type: ignore[misc]
        super().__post_init__(**kwargs)

    @classmethod
    def of_size(cls, size: str, layout: str = "mamba", **overrides: Any) -> Self:
        """
        A configuration of a named size. At one size the layouts have the same number of *active* parameters (those
        that one token passes through, embeddings aside) within 3 %, so that they may be compared.

        Args:
            size (`str`): `"tiny"`, `"small"`, `"medium"` or `"large"`: 0.5, 2.6, 20 or 160 million active parameters.
            layout (`str`, *optional*, defaults to `"mamba"`): one of the named layouts.
            overrides: other fields, such as `vocab_size`. They take precedence over those of the size.

        Raises:
            ValueError: if there is no such size.
        """
        if size not in _SIZES:
            raise ValueError(f"size {size!r} is unknown; use one of {', '.join(_SIZES)}")
        hidden_size, mixers, heads, beside_mamba, beside_attention, hybrid_head = _SIZES[size]
        mixer, feed_forward = LAYOUTS.get(layout, ("mamba", "none"))
        shape = {
            "hidden_size": hidden_size,
            "num_hidden_layers": mixers if feed_forward == "none" else mixers // 2,
            "num_attention_heads": heads,
            "mlp_intermediate_size": beside_mamba if mixer == "mamba" else beside_attention,
        }
        if layout == "hybrid":
            shape["head_dim"] = hybrid_head
        return cls(layout=layout, **{**shape, **overrides})

    @property
    def is_stock(self) -> bool:
        """Whether a class of transformers computes the same, so that checkpoints need no code."""
        return self.layout in STOCK and not self.lookback_bars

    @property
    def mixer(self) -> str:
        """What mixes tokens in all layers, or in most of a hybrid: `"mamba"` or `"attention"`."""
        return LAYOUTS[self.layout][0]

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        attends = set(self.attention_layers or ())
        return tuple("attention" if index in attends else self.mixer for index in range(self.num_hidden_layers))

    @property
    def feed_forward(self) -> str:
        """What follows a mixer: `"none"`, `"mlp"` or `"moe"`."""
        return LAYOUTS[self.layout][1]

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Of an attention mixer: the heads of queries, the heads of keys and values, and the width of a head."""
        heads = self.num_attention_heads
        return heads, self.num_key_value_heads or heads, self.head_dim or self.hidden_size // heads

    def validate_layout(self) -> None:
        """The layout is one of those named, and its shape is possible."""
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
        if self.hidden_act not in ACT2CLS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown; use silu, or another that transformers has")
        if self.layout == "hybrid":
            wrong = [index for index in self.attention_layers or () if not 0 <= index < self.num_hidden_layers]
            if wrong or not self.attention_layers:
                raise ValueError(
                    f"attention_layers is {self.attention_layers}; "
                    f"a hybrid of {self.num_hidden_layers} layers needs some of 0 to {self.num_hidden_layers - 1}"
                )
        elif self.attention_layers:
            raise ValueError(f"attention_layers is for layout 'hybrid', not {self.layout!r}")
        check_look_back(self.lookback_bars, self.bar_token_ids, self.position_token_ids, self.vocab_size)
        tokens = self.gap_token_id, self.fill_token_id
        check_look_ahead(self.lookahead_bars, tokens, bool(self.lookback_bars), self.vocab_size)
        if "attention" in self.mixers:
            self._check_heads()
        if self.feed_forward == "moe" and not self.capacity_factor > 0:  # NaN as well
            raise ValueError(f"capacity_factor is {self.capacity_factor}; it must be above 0")

    def _check_heads(self) -> None:
        heads, shared, width = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if heads < 1 or self.hidden_size % heads:
            raise ValueError(f"num_attention_heads ({heads}) must divide hidden_size ({self.hidden_size})")
        if not shared or shared < 1 or heads % shared:
            raise ValueError(f"num_key_value_heads ({shared}) must divide num_attention_heads ({heads})")
        if not width or width % 2:
            raise ValueError(f"head_dim is {width}; rotary positions need an even number")

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the configuration of a generator, or of a stock Mamba or Llama language model.

        Raises:
            ValueError: if it belongs to another kind of model, whose weights would be dropped silently, or to a
                Llama with parts that the `transformer` layout lacks.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config:
            raise ValueError(f"{pretrained_model_name_or_path} has no config.json")
        kind = config.get("model_type")
        if kind not in (MambaConfig.model_type, LlamaConfig.model_type, cls.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a model of type {kind!r}, not a Mamba language model, "
                "nor a Llama one"
            )
        _check_numbers(config)
        if kind == LlamaConfig.model_type:
            config = _from_llama(config, str(pretrained_model_name_or_path))
        return {**config, "model_type": cls.model_type}, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but an argument that is not a field is refused."""
        return refuse_unknown(super().from_dict, config_dict, kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return read_config(json_file)

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: the fields as a stock configuration names them where there is one."""
        config = super().to_dict()
        # Of a published model: a folder that is written now does not have the code of its pipelines.
        config.pop("custom_pipelines", None)
        if not self.is_stock:
            return {**config, "model_type": self.model_type, "architectures": ["MidiMambaForCausalLM"]}
        if self.layout == "mamba":
            own = {field.name for field in fields(MidiMambaConfig)} - {field.name for field in fields(MambaConfig)}
            config = {name: value for name, value in config.items() if name not in own}
        else:
            config = _to_llama(config)
        model_type, architecture = STOCK[self.layout]
        return {**config, "model_type": model_type, "architectures": [architecture]}


def _check_numbers(config: Mapping[str, Any]) -> None:
    check_sizes(config, _SIZES_OF_TENSORS)
    check_positive(config, _POSITIVE)


def _to_llama(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `transformer` layout as `LlamaConfig` names them. Fields of neither class stay as they are."""
    theirs = {field.name for field in fields(LlamaConfig)}
    ours = {field.name for field in fields(MidiMambaConfig)}
    return {
        **{name: value for name, value in config.items() if name in theirs or name not in ours},
        "hidden_act": "silu",
        "intermediate_size": config["mlp_intermediate_size"],
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
    }


def _from_llama(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The reverse, with `LlamaConfig`'s defaults for what is missing.

    Raises:
        ValueError: if the model is not a plain Llama, which is all that the `transformer` layout computes.
    """
    llama = LlamaConfig.from_dict(dict(config))
    rope = llama.rope_parameters
    assert rope is not None  # `LlamaConfig` fills it in
    for part, value, plain in (
        ("hidden_act", llama.hidden_act, "silu"),
        ("attention_bias", llama.attention_bias, False),
        ("mlp_bias", llama.mlp_bias, False),
        ("rope_type", rope["rope_type"], "default"),
    ):
        if value != plain:
            raise ValueError(f"{name} is a Llama with {part}={value!r}, which the transformer layout cannot compute")
    theirs = {field.name for field in fields(LlamaConfig)}
    replaced = theirs - {"max_position_embeddings"} | {"rope_theta", "rope_scaling"}
    kept = {key: value for key, value in config.items() if key not in replaced}
    shared = theirs & {field.name for field in fields(MidiMambaConfig)} - {"hidden_act"}
    return {
        **kept,
        **{key: getattr(llama, key) for key in shared},
        "layout": "transformer",
        "mlp_intermediate_size": llama.intermediate_size,
        "layer_norm_epsilon": llama.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
    }


__all__ = ["LAYOUTS", "STOCK", "MidiMambaConfig"]
