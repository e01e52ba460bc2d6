"""The generator: a Mamba (arXiv 2312.00752), a MoE-Mamba (arXiv 2401.04081), a transformer, or what lies between.

On disk, the weights of the `mamba` layout have the names of transformers' `MambaForCausalLM`, those of `transformer`
the names of its `LlamaForCausalLM`. The mathematics is the same as theirs, so checkpoints go both ways. What is
different: training a Mamba is linear in the sequence length without compiled packages, several tokens may be fed onto
a state, and states are updated in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, MambaPreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import WeightTransform
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.mamba.modeling_mamba import MambaRMSNorm
from transformers.utils.generic import can_return_tuple

from .attention import MidiMambaAttention, frame_attention
from .configuration_midimamba import MidiMambaConfig
from .decoding import decode_step
from .feed_forward import SwiGLU, SwitchExperts
from .frame import Frame
from .layer_states import CacheMismatchError, LayerState
from .look_back import LookBack
from .mamba_mixer import MidiMambaMixer
from .policy import CACHE
from .recurrent_cache import RecurrentCache
from .stock_names import read_stock_names, write_stock_names
from .whole_weights import WholeWeights

_MIXERS: dict[str, type[nn.Module]] = {"mamba": MidiMambaMixer, "attention": MidiMambaAttention}
_FEED_FORWARDS: dict[str, type[nn.Module]] = {"mlp": SwiGLU, "moe": SwitchExperts}


@dataclass
class MidiMambaModelOutput(BaseModelOutputWithPast):
    """
    Args:
        router (`Tensor` of shape `(3,)`, *optional*): load-balancing loss, z-loss and the share of tokens dropped by
            capacity, each the mean over the layers.
    """

    router: Tensor | None = None


@dataclass
class MidiMambaOutput(CausalLMOutputWithPast):
    """
    The last three are for layouts with experts, and are means over the layers.

    Args:
        aux_loss (`Tensor`, *optional*): load-balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6),
            without its coefficient; 1 if the tokens are spread evenly over the experts.
        z_loss (`Tensor`, *optional*): the router's z-loss (ST-MoE, arXiv 2202.08906, equation 5), without its
            coefficient.
        dropped_tokens (`Tensor`, *optional*): the share of tokens whose expert was full.
    """

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    dropped_tokens: Tensor | None = None


class MidiMambaBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: `x + mixer(norm(x))`, then the same with the feed-forward if there is one."""

    def __init__(self, config: MidiMambaConfig, layer_idx: int):
        super().__init__()
        self.mixer_norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = _MIXERS[config.mixers[layer_idx]](config, layer_idx)
        self.feed_forward: nn.Module | None = None
        if config.feed_forward != "none":
            self.feed_forward_norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
            self.feed_forward = _FEED_FORWARDS[config.feed_forward](config)
        self.residual_dtype = torch.float32 if config.residual_in_fp32 else None

    def forward(self, hidden_states: Tensor, state: LayerState | None, frame: Frame) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, time, hidden)`): the residual stream.
            state (`LayerState` or `None`): the state to start from, updated in place.
            frame (`Frame`): what the layers share.

        Returns:
            The residual stream, and of a router its two losses and the share of tokens that it dropped.
        """
        mixed = self.mixer(_apply_norm(self.mixer_norm, hidden_states), state, frame)
        hidden_states = self._add(hidden_states, mixed)
        if self.feed_forward is None:
            return hidden_states, None
        normed = _apply_norm(self.feed_forward_norm, hidden_states)
        if isinstance(self.feed_forward, SwitchExperts):
            outputs, router = self.feed_forward(normed, frame.mask)
            return self._add(hidden_states, outputs), router
        return self._add(hidden_states, self.feed_forward(normed)), None

    def _add(self, hidden_states: Tensor, outputs: Tensor) -> Tensor:
        # Promoted rather than cast, so that a float64 model stays float64.
        dtype = torch.promote_types(hidden_states.dtype, self.residual_dtype or outputs.dtype)
        return hidden_states.to(dtype) + outputs


def _apply_norm(norm: MambaRMSNorm, hidden_states: Tensor) -> Tensor:
    """In the type of the norm's own weight, whatever the type of the residual stream."""
    normed: Tensor = norm(hidden_states.to(norm.weight.dtype))
    return normed


class MidiMambaPreTrainedModel(WholeWeights, MambaPreTrainedModel):
    """Loading, saving and initialisation, as transformers does them for its Mamba.

    On disk, weights have the names of the stock classes, see [`~midimamba.modeling.stock_names`].
    """

    config_class = MidiMambaConfig
    config: MidiMambaConfig
    _weight_conversions: list[WeightTransform]
    _own_weights: ClassVar[tuple[str, ...]] = ("backbone.",)
    _no_split_modules = ["MidiMambaBlock"]  # noqa: RUF012 (transformers' interface)
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MidiMambaConfig):
        super().__init__(config)
        write_stock_names(self, config)
        self.register_load_state_dict_pre_hook(read_stock_names)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """See [`~midimamba.modeling.whole_weights.WholeWeights.from_pretrained`]."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        write_stock_names(model, model.config)
        return loaded

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` then takes the RecurrentCache that the first forward pass returns

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SwitchExperts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)
        elif isinstance(module, LookBack):
            module.initialize()


class MidiMambaModel(MidiMambaPreTrainedModel):
    """Embeddings, `num_hidden_layers` blocks and the final norm."""

    _own_weights = ("embeddings.", "look_back.", "layers.", "norm.", "norm_f.")

    def __init__(self, config: MidiMambaConfig):
        super().__init__(config)
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.look_back = LookBack(config) if config.lookback_bars else None
        self.layers = nn.ModuleList(MidiMambaBlock(config, index) for index in range(config.num_hidden_layers))
        final_norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        # `Trainer` chooses by name which weights decay: a Mamba's `norm_f` does, a Llama's `norm` does not.
        if config.mixer == "mamba":
            self.norm_f = final_norm
        else:
            self.norm = final_norm
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def final_norm(self) -> nn.Module:
        """What the residual stream passes last."""
        return self.norm_f if self.config.mixer == "mamba" else self.norm

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MidiMambaModelOutput:
        """See [`MidiMambaForCausalLM.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch, time, _ = hidden_states.shape
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = self._prepare_cache(past_key_values, use_cache, hidden_states)
        mask = None
        if attention_mask is not None:  # it may cover the tokens already in the state as well
            mask = attention_mask[:, -time:, None].to(hidden_states.dtype)
        begins = None
        if seq_idx is None and position_ids is not None:
            seq_idx = (position_ids == 0).cumsum(1).expand(batch, -1)
        if seq_idx is not None:
            if seq_idx.shape != (batch, time):
                raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, the input {(batch, time)}")
            begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        hidden_states = self.add_look_back(hidden_states, input_ids, begins, cache)
        frame = Frame(mask=mask, begins=begins)
        states: Sequence[LayerState | None] = [None] * len(self.layers)
        if cache is not None:
            states, frame.past, frame.scratch = cache.layers, cache.seen_tokens, cache.scratch
        if "attention" in self.config.mixers:
            frame.attention = frame_attention(self.config, hidden_states, mask, begins, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_hidden_states, routers = [], []
        for layer, state in zip(self.layers, states, strict=True):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states, router = layer(hidden_states, state, frame)
            if router is not None:
                routers.append(router)
        hidden_states = self.final_norm(hidden_states)
        if cache is not None:
            cache.advance(time)
        return MidiMambaModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            router=torch.stack(routers).mean(0) if routers else None,
            **_state(cache if use_cache else None),
        )

    def add_look_back(
        self, hidden_states: Tensor, input_ids: Tensor | None, begins: Tensor | None, cache: RecurrentCache | None
    ) -> Tensor:
        """
        Add to the embeddings of tokens what a model that looks back shows beside them, and keep the tokens.

        Args:
            hidden_states (`Tensor` of shape `(batch, time, hidden)`): the embeddings.
            input_ids, begins, cache: as in the forward pass; see [`~midimamba.modeling.look_back.LookBack.forward`].
        """
        if self.look_back is None:
            return hidden_states
        if input_ids is None:
            raise ValueError("a model that looks back needs input_ids, not inputs_embeds")
        memory, past = (None, 0) if cache is None else (cache.look_back, cache.seen_tokens)
        shown: Tensor = self.look_back(input_ids, self.embeddings, begins, memory, past)
        return hidden_states + shown

    def _prepare_cache(
        self, cache: RecurrentCache | None, use_cache: bool, hidden_states: Tensor
    ) -> RecurrentCache | None:
        """The cache to start from: the given one if it fits, or a new one if one is asked for."""
        batch, device = len(hidden_states), hidden_states.device
        reads_twice = self.training and self.is_gradient_checkpointing and torch.is_grad_enabled()
        if cache is None:
            if not use_cache or reads_twice:  # as stock models do
                return None
            return RecurrentCache.empty(self.config, batch, hidden_states.dtype, device)
        if not isinstance(cache, RecurrentCache):
            raise CacheMismatchError(
                f"past_key_values is a {type(cache).__name__}; "
                "make a cache with RecurrentCache.for_model(model, batch_size)"
            )
        cache.check_fits(self.config, batch, device)
        if reads_twice:
            raise ValueError(
                "gradient checkpointing would read the tokens onto the cache a second time in the backward pass; "
                "leave past_key_values out, or call gradient_checkpointing_disable()"
            )
        return cache


# What a kernel stands in for, where it can.
_DECODED = (MidiMambaModel, MidiMambaBlock)


def _always() -> bool:
    return True


def _state(cache: RecurrentCache | None) -> dict[str, Any]:
    """The state for an output, under the name that this version of transformers has for it."""
    return {CACHE: cache}


def _split_router(router: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if router is None:
        return None, None, None
    aux_loss, z_loss, dropped_tokens = router.unbind()
    return aux_loss, z_loss, dropped_tokens.detach()


class MidiMambaForCausalLM(MidiMambaPreTrainedModel, GenerationMixin):
    """The generator: [`MidiMambaModel`] with a language-modelling head, tied to the embeddings by default.

    Reads any `MambaForCausalLM` checkpoint and any plain `LlamaForCausalLM` checkpoint. In layouts `mamba` and
    `transformer` it saves one; in the others, a checkpoint with its code, for `trust_remote_code=True`.
    """

    _own_weights = ("backbone.", "lm_head.")
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012 (transformers' interface)

    def __init__(self, config: MidiMambaConfig):
        super().__init__(config)
        if not config.is_stock:
            # `save_pretrained` asks both whether to export the code. They are set on the model, not on the class,
            # because other layouts need no code.
            self._auto_class = "AutoModelForCausalLM"
            self.is_remote_code = _always  # type: ignore[method-assign]  # see above
        self.backbone = MidiMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cache: RecurrentCache | None = None,
        **kwargs: Any,
    ) -> MidiMambaOutput:
        """
        Args:
            input_ids (`LongTensor` of shape `(batch, time)`): tokens; one or many may follow a state.
            attention_mask (`LongTensor` of shape `(batch, time)` or longer, *optional*): 0 on left padding.
            inputs_embeds (`Tensor` of shape `(batch, time, hidden)`, *optional*): instead of `input_ids`.
            past_key_values (`RecurrentCache`, *optional*): the state to continue from. **Updated in place**; take a
                `snapshot()` to keep it.
            labels (`LongTensor` of shape `(batch, time)`, *optional*): targets, shifted inside; -100 is ignored.
            logits_to_keep (`int` or `LongTensor`, *optional*, defaults to 0): how many of the last positions to
                keep, or which positions; 0 keeps all.
            seq_idx (`LongTensor` of shape `(batch, time)`, *optional*): the number of every token's document. Where it
                changes, state, convolution, attention and positions start again, so packed documents do not see each
                other. The first token goes on from `past_key_values`, whatever its number. Without it, a document
                begins wherever `position_ids`, as transformers' collators give them, are 0.
            cache (`RecurrentCache`, *optional*): `past_key_values`, by its name in transformers 5.24.
            kwargs: `use_cache` (`bool`), to return the state, by default in evaluation mode alone, and never where
                gradient checkpointing would read tokens twice;
                `output_hidden_states` (`bool`); and arguments of the loss.

        Returns:
            [`MidiMambaOutput`] with `logits` of shape `(batch, time, vocab)`. In training, the `loss` of a layout with
            experts includes the router's two losses, with their coefficients.

        Raises:
            CacheMismatchError: if `past_key_values` belongs to another model, batch or device.
            ValueError: if the input is ambiguous, `seq_idx` has another shape, or gradient checkpointing is on and
                a cache is given.
        """
        past_key_values = past_key_values if cache is None else cache
        use_cache, output_hidden_states = kwargs.pop("use_cache", None), kwargs.pop("output_hidden_states", None)
        position_ids = kwargs.pop("position_ids", None)
        special = attention_mask, inputs_embeds, labels, seq_idx, position_ids
        if past_key_values is not None and all(argument is None for argument in special):
            wants_more = (
                output_hidden_states or self.config.output_hidden_states or not isinstance(logits_to_keep, int)
            )
            decoded = None if wants_more else decode_step(self, input_ids, past_key_values, _DECODED)
            if decoded is not None:
                return MidiMambaOutput(
                    logits=decoded[:, None], **_state(None if use_cache is False else past_key_values)
                )
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
            position_ids=position_ids,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept].to(self.lm_head.weight.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None if labels is None else self._next_token_loss(logits, labels, outputs.router, **kwargs)
        aux_loss, z_loss, dropped_tokens = _split_router(outputs.router)
        return MidiMambaOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            aux_loss=aux_loss,
            z_loss=z_loss,
            dropped_tokens=dropped_tokens,
            **_state(getattr(outputs, CACHE)),
        )

    def make_state(self, batch_size: int, max_length: int | None = None, room: int | None = None) -> RecurrentCache:
        """The state before the first token; see [`RecurrentCache.for_model`]."""
        return RecurrentCache.for_model(self, batch_size, max_length, room)

    def next_logits(self, tokens: Tensor, state: RecurrentCache) -> Tensor:
        """
        Read tokens onto a state, in place.

        Args:
            tokens (`LongTensor` of shape `(n, time)`): what comes next in each of the `n` sequences of the state.
            state (`RecurrentCache`): from [`~MidiMambaForCausalLM.make_state`].

        Returns:
            `Tensor` of shape `(n, vocab)`: logits of what follows the last of the tokens, in float32 or wider.
        """
        # Asked here as well, because a `ModelOutput` takes as long as a tenth of a step.
        logits = decode_step(self, tokens, state, _DECODED)
        if logits is None:
            logits = self(input_ids=tokens, past_key_values=state, logits_to_keep=1).logits[:, -1]
        return logits

    def forget(self, state: RecurrentCache) -> None:
        """
        Forget, in place, what nothing that follows can depend on: tokens that no look-back reaches. Called now and
        then, it keeps the state of music without end constant in size. Logits stay the same. Layers that attend need
        all tokens, so a state with such layers is left as it is.
        """
        look_back = self.backbone.look_back
        if look_back is not None:
            state.forget(look_back.forget)

    def _next_token_loss(self, logits: Tensor, labels: Tensor, router: Tensor | None, **kwargs: Any) -> Tensor:
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if self.training and router is not None:
            loss = loss + self._router_loss(router, labels, kwargs.get("num_items_in_batch"))
        return loss

    def _router_loss(self, router: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        loss = self.config.router_aux_loss_coef * router[0] + self.config.router_z_loss_coef * router[1]
        if num_items_in_batch is None:
            return loss
        # `Trainer` adds up the losses of the micro-batches of a step, so each is weighted by its share of the tokens.
        return loss * (labels[:, 1:] != -100).sum() / num_items_in_batch

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs["inputs_embeds"] = inputs_embeds  # `generate` takes them only if they have a name here
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            # Padding on the left and earlier documents are in the cache already.
            inputs["attention_mask"] = inputs["seq_idx"] = None
        return inputs


__all__ = ["MidiMambaForCausalLM", "MidiMambaModel", "MidiMambaModelOutput", "MidiMambaOutput"]
