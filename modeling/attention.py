"""Causal self-attention with rotary positions and grouped queries, on padded and on packed sequences."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_midimamba import MidiMambaConfig
from .frame import AttentionFrame, Frame
from .layer_states import PADDING, AttentionState
from .recurrent_cache import RecurrentCache


class MidiMambaAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions (arXiv 2104.09864); Llama's parameters."""

    is_causal = True  # asked by transformers' attention functions, as are config, scaling and num_key_value_groups

    def __init__(self, config: MidiMambaConfig, layer_idx: int):
        super().__init__()
        heads, shared, width = config.attention_shape
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width
        self.num_key_value_groups = heads // shared
        self.scaling = width**-0.5
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shared * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared * width, bias=False)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, state: AttentionState | None, frame: Frame) -> Tensor:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, time, hidden)`): the normalised residual stream.
            state (`AttentionState` or `None`): earlier keys and values, extended in place.
            frame (`Frame`): positions, and which keys a query sees.

        Returns:
            `Tensor` of shape `(batch, time, hidden)`.
        """
        shared = frame.attention
        assert shared is not None  # made by the model if any of its layers attends
        batch, time, _ = hidden_states.shape
        queries, keys, values = (
            projection(hidden_states).view(batch, time, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = rotate(queries, *shared.angles), rotate(keys, *shared.angles)
        if state is not None:
            keys, values = state.extend(keys, values, frame.past)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, _ = attend(
            self, queries, keys, values, shared.visible, dropout=0.0, scaling=self.scaling, **shared.packing
        )
        outputs: Tensor = self.o_proj(mixed.reshape(batch, time, -1))
        return outputs


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of channels `(i, i + head / 2)` of `(batch, heads, time, head)` by the angle of its position."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine.to(heads.dtype) + torch.cat([-second, first], dim=-1) * sine.to(heads.dtype)


def eager_attention(
    module: MidiMambaAttention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The definition, in the form of transformers' attention functions. Returns `(batch, time, heads, head)`."""
    keys, values = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (keys, values))
    if mask is None:
        time, length = queries.shape[2], keys.shape[2]
        mask = torch.ones(time, length, dtype=torch.bool, device=keys.device).tril(length - time)
    scores = (queries @ keys.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(values.dtype)
    return (weights @ values).transpose(1, 2), weights


def frame_attention(
    config: MidiMambaConfig,
    hidden_states: Tensor,
    mask: Tensor | None,
    begins: Tensor | None,
    cache: RecurrentCache | None,
) -> AttentionFrame:
    """
    Number the tokens of a forward pass, and make room for them in the cache.

    Args:
        config (`MidiMambaConfig`): the model's.
        hidden_states (`Tensor` of shape `(batch, time, hidden)`): the embeddings.
        mask (`Tensor` of shape `(batch, time, 1)`, *optional*): 0 where a token is padding.
        begins (`BoolTensor` of shape `(batch, time)`, *optional*): tokens with which a document begins.
        cache (`RecurrentCache`, *optional*): what was read before.

    Raises:
        ValueError: if flash attention is to read the start of a document behind earlier tokens.
        CacheMismatchError: if the cache is a view that has no room.
    """
    time, device = hidden_states.shape[1], hidden_states.device
    past = 0 if cache is None else cache.seen_tokens
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if begins is None and (mask is None or bool(mask.all())) and (cache is None or cache.plain):
        if cache is not None:
            cache.begin(None, time)
        visible = None
        if past and time > 1 and not _is_flash(config):
            # Torch's own causal mask would count queries and keys from the same start.
            visible = torch.ones(time, past + time, dtype=torch.bool, device=device).tril(past)[None, None]
        return AttentionFrame(rotary(torch.arange(past, past + time, device=device)[None], config, wide), visible)
    real = hidden_states.new_ones(hidden_states.shape[:2]).bool() if mask is None else mask.squeeze(-1).bool()
    begins = torch.zeros_like(real) if begins is None else begins
    earlier = real.new_empty(len(real), 0, dtype=torch.long)
    if cache is not None:
        earlier = cache.documents.numbers[:, :past]
    documents, positions = number_tokens(real, begins, earlier)
    if cache is not None:
        cache.begin(documents, time)
    known = torch.cat([earlier, documents], dim=1)
    if _is_flash(config):
        visible, packing = _flash_arguments(documents, known, begins)
    else:
        visible, packing = (documents[:, :, None] == known[:, None, :]).tril(past)[:, None], {}
    return AttentionFrame(rotary(positions, config, wide), visible, packing)


def number_tokens(real: Tensor, begins: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """
    Which document each token belongs to, and its place there. Attention stays within a document; padding is its own.

    Args:
        real (`BoolTensor` of shape `(batch, time)`): `False` on padding.
        begins (`BoolTensor` of shape `(batch, time)`): tokens with which a document begins.
        earlier (`LongTensor` of shape `(batch, past)`): document numbers of what was read before. The last
            document goes on.

    Returns:
        Document numbers, [`PADDING`] on padding, and positions, both `LongTensor` of shape `(batch, time)`.
    """
    latest = F.pad(earlier, (1, 0)).amax(1, keepdim=True)  # 0 where nothing was read
    within = begins.cumsum(1)
    before = real.cumsum(1) - real.long()
    start = (before * begins).cummax(1).values
    positions = before - start + (within == 0) * (earlier == latest).sum(1, keepdim=True)
    return (latest + within).masked_fill(~real, PADDING), positions


def rotary(positions: Tensor, config: MidiMambaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles `position * theta^(-2i / head)` of positions `(batch, time)`."""
    width = config.attention_shape[2]
    exponents = torch.arange(0, width, 2, dtype=dtype, device=positions.device) / width
    angles = positions[:, None, :, None].to(dtype) * (1.0 / config.rope_theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _is_flash(config: MidiMambaConfig) -> bool:
    return "flash" in (config._attn_implementation or "")


def _flash_arguments(documents: Tensor, known: Tensor, begins: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    """Flash attention takes no mask of pairs: it knows documents by their bounds or, behind a cache, by their keys."""
    if known.shape[1] > documents.shape[1]:
        if begins.any():
            raise ValueError(
                "flash attention cannot begin a document behind earlier tokens of a cache; "
                'load the model with attn_implementation="sdpa"'
            )
        return known == known.amax(1, keepdim=True), {}
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    bounds = F.pad(first.nonzero().squeeze(1), (0, 1), value=first.numel()).int()
    longest = int(bounds.diff().max())
    return None, {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


__all__ = ["MidiMambaAttention", "eager_attention", "frame_attention", "number_tokens", "rotary"]
