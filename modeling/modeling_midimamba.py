"""The generator: a Mamba language model (arXiv 2312.00752) with a linear scan and an exact state on any device.

Parameters carry the names of transformers' `MambaForCausalLM` and the mathematics is the same, so checkpoints go both
ways. What is different: training is linear in the sequence length without compiled packages, several tokens may be fed
onto a state, and states are updated in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, MambaPreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.mamba.modeling_mamba import MambaMixer, MambaRMSNorm

from .configuration_midimamba import MidiMambaConfig
from .recurrent_cache import RecurrentCache
from .selective_scan import selective_scan, selective_step_


class MidiMambaMixer(MambaMixer):
    """Transformers' mixer (its parameters and their initialisation) with our own forward pass."""

    def __init__(self, config: MidiMambaConfig, layer_idx: int):
        super().__init__(config, layer_idx, initialize_mixer_weights=False)

    def forward(
        self,
        hidden_states: Tensor,
        cache: RecurrentCache | None = None,
        mask: Tensor | None = None,
        begins: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, time, hidden)`): the normalised residual stream.
            cache (`RecurrentCache`, *optional*): the state to start from, updated in place.
            mask (`Tensor` of shape `(batch, time, 1)`, *optional*): 0 where a token is padding. A padding token enters
                neither convolution nor state, so padding on the left is exact.
            begins (`BoolTensor` of shape `(batch, time)`, *optional*): tokens with which a document begins, which
                neither convolution nor state looks across. Never the first, which goes on from the cache.

        Returns:
            `Tensor` of shape `(batch, time, hidden)`.
        """
        channels, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        if mask is not None:  # here, because the projection's bias would enter the convolution
            channels = channels * mask
        channels = self.act(self._convolve(channels, cache, begins))
        if mask is not None:
            channels = channels * mask
        dt, B, C = torch.split(
            self.x_proj(channels), [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        # The recurrence runs in float32 (or wider), whatever the model's own type: its products decay towards zero.
        wide = torch.promote_types(channels.dtype, torch.float32)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide))
        A = -torch.exp(self.A_log.to(wide))
        inputs, B, C = channels.to(wide), B.to(wide), C.to(wide)
        outputs = self._scan(inputs, dt, A, B, C, cache, begins)
        outputs = torch.addcmul(outputs, inputs, self.D.to(wide)) * self.act(gate)
        return self.out_proj(outputs.to(hidden_states.dtype))

    def _scan(
        self,
        inputs: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        cache: RecurrentCache | None,
        begins: Tensor | None,
    ) -> Tensor:
        if cache is None:
            return selective_scan(inputs, dt, A, B, C, reset=begins)[0]
        state = cache.scan_states[self.layer_idx]
        if inputs.shape[1] == 1 and not torch.is_grad_enabled():
            return selective_step_(state, inputs[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])[:, None]
        # A copy, because the scan keeps its initial state for the backward pass and the cache moves on.
        outputs, last = selective_scan(inputs, dt, A, B, C, state.clone(), begins)
        state.copy_(last.detach())
        return outputs

    def _convolve(self, channels: Tensor, cache: RecurrentCache | None, begins: Tensor | None) -> Tensor:
        """Causal depthwise convolution over time, as a sum of shifted products: no transposition, any length."""
        time, kernel = channels.shape[1], self.conv_kernel_size
        document = None
        if begins is not None:  # numbers over the whole window; what lies before this call belongs to the first, 0
            document = F.pad(begins.cumsum(1)[..., None], (0, 0, kernel - 1, 0))
        if cache is None:
            window = F.pad(channels, (0, 0, kernel - 1, 0))
        else:
            past = cache.conv_states[self.layer_idx]
            window = torch.cat([past.to(channels.dtype), channels], dim=1)
            past.copy_(window[:, time:].detach())
            if document is not None:
                past.masked_fill_(document[:, time:] != document[:, -1:], 0)
        weight = self.conv1d.weight[:, 0].to(channels.dtype)
        outputs = channels * weight[:, -1]
        for tap in range(kernel - 1):
            earlier = window[:, tap : tap + time]
            if document is None:
                outputs = torch.addcmul(outputs, earlier, weight[:, tap])
            else:
                # The product is masked, not the factor: autograd then keeps the window once, not once a tap.
                other = document[:, tap : tap + time] != document[:, kernel - 1 :]
                outputs = outputs + (earlier * weight[:, tap]).masked_fill(other, 0)
        return outputs if self.conv1d.bias is None else outputs + self.conv1d.bias.to(channels.dtype)


class MidiMambaBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: `x + mixer(norm(x))`."""

    def __init__(self, config: MidiMambaConfig, layer_idx: int):
        super().__init__()
        self.norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = MidiMambaMixer(config, layer_idx)
        self.residual_dtype = torch.float32 if config.residual_in_fp32 else None

    def forward(
        self,
        hidden_states: Tensor,
        cache: RecurrentCache | None = None,
        mask: Tensor | None = None,
        begins: Tensor | None = None,
    ) -> Tensor:
        mixed = self.mixer(self.norm(hidden_states.to(self.norm.weight.dtype)), cache, mask, begins)
        # Promoted rather than cast, so that a float64 model stays float64.
        dtype = torch.promote_types(hidden_states.dtype, self.residual_dtype or mixed.dtype)
        return hidden_states.to(dtype) + mixed


class MidiMambaPreTrainedModel(MambaPreTrainedModel):
    """Loading, saving and initialisation, as transformers does them for its Mamba."""

    config_class = MidiMambaConfig
    config: MidiMambaConfig
    _no_split_modules = ["MidiMambaBlock"]  # noqa: RUF012 (transformers' interface)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` then takes the RecurrentCache that the first forward pass returns


class MidiMambaModel(MidiMambaPreTrainedModel):
    """Embeddings, `num_hidden_layers` blocks and the final norm."""

    def __init__(self, config: MidiMambaConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MidiMambaBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See [`MidiMambaForCausalLM.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch, time, _ = hidden_states.shape
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = past_key_values
        if cache is None and use_cache:
            cache = RecurrentCache.empty(self.config, batch, hidden_states.dtype, hidden_states.device)
        if cache is not None and cache.batch_size != batch:
            raise ValueError(
                f"the cache holds {cache.batch_size} sequences, the input {batch}; fork or select it first"
            )
        mask = None
        if attention_mask is not None:  # it may cover the tokens already in the state as well
            mask = attention_mask[:, -time:, None].to(hidden_states.dtype)
        begins = None
        if seq_idx is not None:
            if seq_idx.shape != (batch, time):
                raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, the input {(batch, time)}")
            begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        all_hidden_states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, cache, mask, begins)
            all_hidden_states.append(hidden_states)
        hidden_states = self.norm_f(hidden_states)
        if cache is not None:
            cache.seen_tokens += time
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=(*all_hidden_states[:-1], hidden_states) if output_hidden_states else None,
        )


class MidiMambaForCausalLM(MidiMambaPreTrainedModel, GenerationMixin):
    """The generator: [`MidiMambaModel`] with a language-modelling head tied to the embeddings.

    Reads any `MambaForCausalLM` checkpoint, and saves one.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012 (transformers' interface)

    def __init__(self, config: MidiMambaConfig):
        super().__init__(config)
        self.backbone = MidiMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (`LongTensor` of shape `(batch, time)`): tokens; one or many may follow a state.
            attention_mask (`LongTensor` of shape `(batch, time)` or longer, *optional*): 0 on left padding.
            inputs_embeds (`Tensor` of shape `(batch, time, hidden)`, *optional*): instead of `input_ids`.
            past_key_values (`RecurrentCache`, *optional*): the state to continue from. **Updated in place**; take a
                `snapshot()` to keep it.
            labels (`LongTensor` of shape `(batch, time)`, *optional*): targets, shifted inside; -100 is ignored.
            use_cache (`bool`, *optional*): return the state. On by default in evaluation mode.
            logits_to_keep (`int` or `LongTensor`, *optional*, defaults to 0): only the last so many positions, or
                these; 0 keeps all.
            seq_idx (`LongTensor` of shape `(batch, time)`, *optional*): the number of every token's document. Where it
                changes, state and convolution begin anew, so packed documents do not see each other. The first token
                goes on from `past_key_values`, whatever its number.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`] with `logits` of shape `(batch, time, vocab)`.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept].to(self.lm_head.weight.dtype)
        logits = self.lm_head(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            # Padding on the left and earlier documents lie behind, in the state.
            inputs["attention_mask"] = inputs["seq_idx"] = None
        return inputs


__all__ = ["MidiMambaForCausalLM", "MidiMambaModel"]
