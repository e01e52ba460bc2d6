"""Attention: every function of transformers' interface sees the same keys, whatever form it wants them in."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from midimamba import MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.attention import MidiMambaAttention, eager_attention, number_tokens, rotary, rotate
from support import make_generator

TIME = 15
PADDED = torch.ones(2, TIME, dtype=torch.long)
PADDED[1, :3] = 0
DOCUMENTS = torch.arange(TIME).expand(2, -1) // 4


@pytest.fixture
def model() -> MidiMambaForCausalLM:
    return make_generator(layout="transformer", num_key_value_heads=2)


def tokens(time: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 11, (2, time), generator=torch.Generator().manual_seed(seed))


def flash_attention(
    module: MidiMambaAttention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    **packing: Any,
) -> tuple[Tensor, None]:
    """What flash attention makes of its arguments: sequences by bounds, or a mask of keys, or neither; causal."""
    outputs = torch.zeros_like(queries)
    if packing:
        flat = [part.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for part in (queries, keys, values)]
        bounds = packing["cu_seq_lens_q"].tolist()
        assert packing["cu_seq_lens_q"].dtype == torch.int32
        assert torch.equal(packing["cu_seq_lens_q"], packing["cu_seq_lens_k"])
        lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
        assert packing["max_length_q"] == packing["max_length_k"] == max(lengths)
        assert sum(lengths) == flat[0].shape[2]
        parts = zip(*(part.split(lengths, dim=2) for part in flat), strict=True)
        mixed = [eager_attention(module, q, k, v, None, scaling)[0] for q, k, v in parts]
        return torch.cat(mixed, 1).view(len(queries), -1, *mixed[0].shape[2:]), None
    for row in range(len(queries)):
        seen = torch.ones(keys.shape[2], dtype=torch.bool) if mask is None else mask[row].bool()
        asked = seen[-queries.shape[2] :]
        part = queries[row : row + 1, :, asked], keys[row : row + 1, :, seen], values[row : row + 1, :, seen]
        outputs[row, :, asked] = eager_attention(module, *part, None, scaling)[0][0].transpose(0, 1)
    return outputs.transpose(1, 2), None


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
@pytest.mark.parametrize(
    "inputs",
    [{}, {"attention_mask": PADDED}, {"seq_idx": DOCUMENTS}, {"attention_mask": PADDED, "seq_idx": DOCUMENTS}],
)
def test_attention_functions_agree(
    model: MidiMambaForCausalLM, implementation: str, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_attention)
    results = []
    assert model.config._attn_implementation == "sdpa"
    for chosen in ("sdpa", implementation):
        model.config._attn_implementation_internal = chosen
        cache = RecurrentCache.for_model(model, 2)
        with torch.no_grad():
            results.append([model(tokens(TIME), use_cache=False, **inputs).logits])
            results[-1].append(model(tokens(TIME), past_key_values=cache, **inputs).logits)
            results[-1] += [model(tokens(time, 2), past_key_values=cache).logits for time in (1, 5, 1)]
    for sdpa, other in zip(*results, strict=True):
        real = PADDED.bool() if sdpa.shape[1] == TIME else slice(None)
        torch.testing.assert_close(sdpa[real], other[real], atol=1e-5, rtol=1e-4)


def test_flash_attention_cannot_begin_a_document_behind_others(
    model: MidiMambaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_attention)
    model.config._attn_implementation_internal = "flash_attention_2"
    cache = RecurrentCache.for_model(model, 2)
    with torch.no_grad():
        model(tokens(TIME), past_key_values=cache)
        with pytest.raises(ValueError, match=r'cannot begin a document behind .* load the model with .*="sdpa"'):
            model(tokens(TIME), past_key_values=cache, seq_idx=DOCUMENTS)


def test_eager_attention_is_the_softmax_over_earlier_keys(model: MidiMambaForCausalLM) -> None:
    attention = next(module for module in model.modules() if isinstance(module, MidiMambaAttention))
    queries, keys, values = (torch.randn(1, heads, 4, 4) for heads in (4, 2, 2))
    outputs, _ = eager_attention(attention, queries, keys, values, None, 0.5)
    for head in range(4):
        for time in range(4):
            scores = keys[0, head // 2, : time + 1] @ queries[0, head, time] * 0.5
            expected = scores.softmax(0) @ values[0, head // 2, : time + 1]
            torch.testing.assert_close(outputs[0, time, head], expected)


def test_rotation_makes_scores_depend_on_distance_only(model: MidiMambaForCausalLM) -> None:
    query, key = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    positions = [rotary(torch.tensor([[at]]), model.config, torch.float64) for at in (0, 3, 50, 53)]
    scores = [
        (rotate(query.double(), *positions[q]) * rotate(key.double(), *positions[k])).sum()
        for q, k in ((1, 0), (3, 2), (0, 0))
    ]
    torch.testing.assert_close(scores[0], scores[1])
    assert not torch.isclose(scores[0], scores[2])
    torch.testing.assert_close(scores[2], (query * key).sum().double())


def test_tokens_are_numbered_by_document_without_padding() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]).bool()
    begins = torch.tensor([[0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]]).bool()
    documents, positions = number_tokens(real, begins, torch.empty(2, 0, dtype=torch.long))
    assert documents.tolist() == [[-1, -1, 0, 0, 1, 1], [0, 1, 1, -1, 1, 2]]
    assert positions[real].tolist() == [0, 1, 0, 1, 0, 0, 1, 2, 0]
    following, positions = number_tokens(real[:, 2:4], begins[:, :2], documents)
    assert following.tolist() == [[1, 1], [2, -1]]
    assert positions[:, 0].tolist() == [2, 1]
