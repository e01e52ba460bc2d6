"""The kernels of a decoding step, and their elementary functions, against torch in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from midimamba import MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling import numba_common
from midimamba.modeling.policy import inference
from midimamba.modeling.step_numba import _ROWS_PER_THREAD
from support import make_generator


@pytest.mark.parametrize(
    ("name", "reference", "lowest", "highest"),
    [
        ("exp2", torch.exp2, -125, 126),
        ("silu", torch.nn.functional.silu, -15, 100),
        # Where softplus is tiny, a logarithm of 1 + e would have lost it.
        ("softplus", torch.nn.functional.softplus, -15, 100),
    ],
)
def test_functions_keep_their_relative_precision(
    name: str, reference: Callable[[Tensor], Tensor], lowest: float, highest: float
) -> None:
    function = getattr(numba_common, name)

    @njit
    def apply(values: Any, results: Any) -> None:
        for index in range(len(values)):
            results[index] = function(values[index])

    values = np.concatenate([np.linspace(lowest, highest, 20_001), np.linspace(-2, 2, 4_001)]).astype(np.float32)
    results = np.empty_like(values)
    apply(values, results)
    expected = reference(torch.from_numpy(values).double())
    torch.testing.assert_close(torch.from_numpy(results).double(), expected, rtol=2e-6, atol=1e-37)
    apply(np.full(1, np.nan, np.float32), results[:1])
    assert np.isnan(results[0])


def logits_step_by_step(model: MidiMambaForCausalLM, ids: Tensor) -> tuple[Tensor, RecurrentCache]:
    with inference(model):
        cache = RecurrentCache.for_model(model, len(ids))
        steps = [model.next_logits(ids[:, t : t + 1], cache) for t in range(ids.shape[1])]
    return torch.stack(steps, 1), cache


@pytest.mark.parametrize("rows", [1, 3, 2 * _ROWS_PER_THREAD + 1])
@pytest.mark.parametrize("use_conv_bias", [True, False])
def test_a_step_by_kernels_equals_a_step_by_torch(
    rows: int, use_conv_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_generator(use_conv_bias=use_conv_bias)
    ids = torch.randint(0, 11, (rows, 12))
    monkeypatch.setenv("MIDIMAMBA_SCAN", "chunked")
    expected, expected_cache = logits_step_by_step(model, ids)
    monkeypatch.setenv("MIDIMAMBA_SCAN", "numba")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits, cache = logits_step_by_step(model, ids)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for mine, expected_state in zip(cache.layers, expected_cache.layers, strict=True):
        for ours, theirs in zip(mine.tensors, expected_state.tensors, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hidden_act", ["gelu", "silu"])
def test_another_activation_is_honoured(hidden_act: str) -> None:
    model = make_generator(hidden_act=hidden_act)
    ids = torch.randint(0, 11, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(logits_step_by_step(model, ids)[0], model(ids).logits, atol=1e-5, rtol=1e-5)
