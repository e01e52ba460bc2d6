"""The discriminator: how likely is it that a token sequence is real music?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import initialization as init
from transformers.core_model_loading import WeightTransform
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .calibration import Calibration
from .configuration_discriminator import MidiDiscriminatorConfig
from .configuration_midimamba import MidiMambaConfig
from .look_back import LookBack
from .modeling_midimamba import MidiMambaForCausalLM, MidiMambaModel
from .recurrent_cache import RecurrentCache
from .stock_names import write_stock_names
from .whole_weights import WholeWeights

# What a discriminator of kind mamba takes over from a generator, and what it cannot choose.
_LOOK_BACK = ("lookback_bars", "bar_token_ids", "position_token_ids", "bos_token_id")
_SHAPE = ("hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel", *_LOOK_BACK)
_FIXED = (
    *("layout", "use_bias", "use_conv_bias", "hidden_act", "layer_norm_epsilon", "residual_in_fp32"),
    "time_step_rank",
)


@dataclass
class DiscriminatorOutput(SequenceClassifierOutput):
    """
    Args:
        logits (`Tensor` of shape `(batch, 1)`): log-odds that the whole sequence is real.
        position_logits (`Tensor` of shape `(batch, time)`, *optional*): the same for every prefix. Kind `mamba`
            only.
    """

    position_logits: Tensor | None = None


class ConvolutionEncoder(nn.Module):
    """SeqGAN's features: convolutions of several widths, each filter's maximum over time, and one highway layer."""

    def __init__(self, config: MidiDiscriminatorConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.look_back = LookBack(_network(config, ("hidden_size", *_LOOK_BACK))) if config.lookback_bars else None
        self.widths = tuple(config.filter_sizes)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.hidden_size, count, width)
            for width, count in zip(config.filter_sizes, config.num_filters, strict=True)
        )
        self.num_features = sum(config.num_filters)
        self.highway = nn.Linear(self.num_features, 2 * self.num_features)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask of shape `(batch, time)` to features of shape `(batch, num_features)`."""
        missing = max(0, max(self.widths) - input_ids.shape[1])
        mask = F.pad(mask, (0, missing))
        embedded = self.embeddings(input_ids)
        if self.look_back is not None:
            embedded = embedded + self.look_back(input_ids, self.embeddings, None, None, 0)
        embedded = (F.pad(embedded, (0, 0, 0, missing)) * mask[..., None]).transpose(1, 2)
        pooled = []
        for width, convolution in zip(self.widths, self.convolutions, strict=True):
            # Only windows without padding count; rectified activations are at least 0, so 0 means "not there".
            is_padded = mask.unfold(1, width, 1).amin(-1)[:, None] == 0
            # For the backward pass `max` keeps indices, where `amax` would keep the activations of every window. Only
            # the maxima are rectified. So training takes the memory of one width instead of all of them.
            pooled.append(convolution(embedded).masked_fill_(is_padded, 0).max(-1).values)
        features = F.relu(torch.cat(pooled, dim=1))
        candidate, gate = self.highway(features).chunk(2, dim=-1)
        carry = torch.sigmoid(gate - 2.0)  # SeqGAN's bias: at first, pass features through
        return carry * F.relu(candidate) + (1 - carry) * features


def _network(config: MidiDiscriminatorConfig, names: Sequence[str]) -> MidiMambaConfig:
    """What a part of a discriminator shares with a generator."""
    return MidiMambaConfig(vocab_size=config.vocab_size, **{name: getattr(config, name) for name in names})


class MidiDiscriminator(WholeWeights):
    """Sequence classification with one logit; `sigmoid(logit)` is the probability that the sequence is real.

    Loads with `AutoModelForSequenceClassification` once `midimamba` is imported.
    """

    config_class = MidiDiscriminatorConfig
    config: MidiDiscriminatorConfig
    _weight_conversions: list[WeightTransform]
    _own_weights = ("encoder.", "score.")
    base_model_prefix = "encoder"

    def __init__(self, config: MidiDiscriminatorConfig):
        super().__init__(config)
        self.encoder: ConvolutionEncoder | MidiMambaModel
        if config.kind == "cnn":
            self.encoder = ConvolutionEncoder(config)
            num_features = self.encoder.num_features
        else:
            self.encoder = MidiMambaModel(_network(config, _SHAPE))
            write_stock_names(self, self.encoder.config)
            num_features = config.hidden_size
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(num_features, 1)
        self.calibration = Calibration()
        self._keys_to_ignore_on_load_missing = ["calibration."]
        self.post_init()
        if config.spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d) and module.groups == 1):
                    spectral_norm(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """See [`~midimamba.modeling.whole_weights.WholeWeights.from_pretrained`]."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model.encoder, MidiMambaModel):
            write_stock_names(model, model.encoder.config)
        return loaded

    @classmethod
    def from_generator(cls, generator: MidiMambaForCausalLM, dropout: float = 0.25) -> Self:
        """
        A discriminator of kind `mamba` that starts as a copy of the generator's network with a new last layer, as
        reward models start as the policy (Ziegler et al., arXiv 1909.08593).

        Args:
            generator (`MidiMambaForCausalLM`): of layout `mamba`. It does not change.
            dropout (`float`, *optional*, defaults to 0.25): before the last layer.

        Raises:
            ValueError: if the generator's network is of another kind.
        """
        theirs = generator.config
        shared = {name: getattr(theirs, name) for name in ("vocab_size", "pad_token_id", *_SHAPE)}
        discriminator = cls(MidiDiscriminatorConfig(kind="mamba", dropout=dropout, **shared))
        assert isinstance(discriminator.encoder, MidiMambaModel)
        mine = discriminator.encoder.config
        if different := [name for name in _FIXED if getattr(mine, name) != getattr(theirs, name)]:
            name = different[0]
            raise ValueError(
                f"a discriminator can begin as a generator of {name} {getattr(mine, name)!r}, "
                f"but this one has {getattr(theirs, name)!r}"
            )
        discriminator.encoder.load_state_dict(generator.backbone.state_dict())
        return discriminator

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """SeqGAN's initialisation for the convolutions: with transformers' usual 0.02 their features would vanish."""
        if isinstance(module, Calibration):
            init.ones_(module.scale)
            init.zeros_(module.offset)
        elif isinstance(module, LookBack):
            module.initialize()
        elif self.config.kind != "cnn":
            super()._init_weights(module)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1.0, 1.0)
        elif isinstance(module, (nn.Conv1d, nn.Linear)) and module.bias is not None:  # those of a look-back have none
            init.trunc_normal_(module.weight, std=0.1)
            init.constant_(module.bias, 0.1)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.encoder.embeddings
        return embeddings

    def make_cache(self, batch_size: int) -> RecurrentCache:
        """The state before the first token of `batch_size` sequences, for kind `mamba`.

        Raises:
            ValueError: for kind `cnn`, which keeps no state.
        """
        if not isinstance(self.encoder, MidiMambaModel):
            raise ValueError("a discriminator of kind 'cnn' has no state; it reads whole sequences")
        return RecurrentCache.for_model(self.encoder, batch_size)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        **kwargs: Any,
    ) -> DiscriminatorOutput:
        """
        Args:
            input_ids (`LongTensor` of shape `(batch, time)`): whole sequences, or what follows `past_key_values`.
            attention_mask (`LongTensor` of shape `(batch, time)`, *optional*): 0 on padding of the `input_ids`.
            labels (`Tensor` of shape `(batch,)`, *optional*): 1 for real, 0 for generated (or between, for smoothed
                labels). The loss is the cross-entropy; for `mamba` its mean over every prefix of a sequence.
            past_key_values (`RecurrentCache`, *optional*): `mamba` only: the state to continue from, made by
                [`~MidiDiscriminator.make_cache`] and **updated in place**. `logits` then value the sequences from
                their start to the last new token that is not padding; in a row of padding alone they mean nothing.

        Raises:
            ValueError: if `past_key_values` is given to a discriminator of kind `cnn`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_logits = None
        if self.config.kind == "cnn":
            if past_key_values is not None:
                raise ValueError("a discriminator of kind 'cnn' has no state; leave past_key_values out")
            features = self.encoder(input_ids, mask.to(self.dtype))
            logits = self.calibration(self.score(self.dropout(features)))
        else:
            hidden = self.encoder(
                input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
            ).last_hidden_state
            position_logits = self.calibration(self.score(self.dropout(hidden.to(self.dtype)))).squeeze(-1)
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1, keepdim=True)
            logits = position_logits.gather(1, last)
        loss = None
        if labels is not None:
            loss = self._cross_entropy(logits, position_logits, mask, labels)
        return DiscriminatorOutput(loss=loss, logits=logits, position_logits=position_logits)

    def _cross_entropy(self, logits: Tensor, position_logits: Tensor | None, mask: Tensor, labels: Tensor) -> Tensor:
        if position_logits is None:
            return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
        targets = labels.to(position_logits.dtype)[:, None].expand_as(position_logits)
        weights = mask.to(position_logits.dtype)
        losses = F.binary_cross_entropy_with_logits(position_logits, targets, weight=weights, reduction="sum")
        return losses / weights.sum()


__all__ = ["MidiDiscriminator"]
