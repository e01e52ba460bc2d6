"""A step of decoding by one kernel, against the layers that it stands in for."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from midimamba import MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling import decoding
from midimamba.modeling.layer_states import CacheMismatchError, MambaState
from midimamba.modeling.numba_products import lanes_for, multiply
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import sample
from support import make_generator

BACH = {"lookback_bars": [1, 2], "bar_token_ids": [3], "position_token_ids": [[4, 0], [5, 2]]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba-mlp": {"layout": "mamba-mlp"},
    "looks back": BACH,
    "mamba-mlp, looks back": {"layout": "mamba-mlp", **BACH},
    "untied, with every bias": {"tie_word_embeddings": False, "use_bias": True},
    "no bias": {"use_conv_bias": False},
    "odd sizes": {"hidden_size": 21, "expand": 3, "state_size": 5, "conv_kernel": 3, "time_step_rank": 7},
    "a large vocabulary": {"vocab_size": 5003, "hidden_size": 64, "state_size": 16, "time_step_rank": 4},
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of every step that the kernel took."""
    taken: list[int] = []
    step = decoding._step

    def count(weights: Any, embedded: Tensor, *others: Any) -> Tensor:
        taken.append(len(embedded))
        return step(weights, embedded, *others)

    monkeypatch.setattr(decoding, "_step", count)
    return taken


@contextmanager
def by_layers() -> Iterator[None]:
    """Compute with torch's own operations alone: the twin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDIMAMBA_SCAN", "chunked")
        yield


def tokens(model: MidiMambaForCausalLM, batch: int, time: int) -> Tensor:
    return torch.randint(0, min(11, model.config.vocab_size), (batch, time))


def read(model: Any, ids: Tensor, cache: RecurrentCache) -> Tensor:
    with inference(model):
        return torch.stack([model.next_logits(ids[:, t : t + 1], cache) for t in range(ids.shape[1])], 1)


def states(cache: RecurrentCache) -> list[Tensor]:
    return [tensor for state in cache.layers for tensor in state.tensors]


def assert_alike(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def assert_steps_equal_layers(model: MidiMambaForCausalLM, ids: Tensor) -> None:
    ours, theirs = (RecurrentCache.for_model(model, len(ids)) for _ in range(2))
    logits = read(model, ids, ours)
    with by_layers():
        assert_alike(logits, read(model, ids, theirs))
    assert_alike(states(ours), states(theirs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3, 16, 64])
def test_steps_equal_the_layers(layout: str, batch: int, steps: list[int]) -> None:
    model = make_generator(**LAYOUTS[layout])
    assert_steps_equal_layers(model, tokens(model, batch, 12))
    assert steps == [batch] * 12


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 17])
def test_nothing_drifts_over_300_tokens(layout: str, batch: int) -> None:
    model = make_generator(**LAYOUTS[layout])
    assert_steps_equal_layers(model, tokens(model, batch, 300))


@pytest.mark.parametrize("layout", ["mamba", "mamba-mlp, looks back"])
def test_states_go_on_however_they_were_made(layout: str, steps: list[int]) -> None:
    model = make_generator(**LAYOUTS[layout])
    ids, more = tokens(model, 20, 6), tokens(model, 20, 5)

    def go_on(cache: RecurrentCache) -> list[Tensor]:
        forks = cache.fork(2)
        chosen = cache.select(torch.tensor([7, 0, 7]))
        joined = model.make_state(0, max_length=11, room=25)
        joined.append(cache.select(torch.arange(20)))
        parts = cache.snapshot()
        first = read(model, more[:3], parts.rows(0, 3))
        parts = cache.snapshot()
        return [
            first,
            read(model, more[2:14], parts.rows(2, 14)),
            read(model, more.repeat_interleave(2, 0), forks),
            read(model, more[:3], chosen),
            read(model, more, joined),
        ]

    caches = [model.make_state(20, max_length=11) for _ in range(2)]
    with inference(model):  # a prompt of several tokens, through the layers
        for cache in caches:
            model.next_logits(ids, cache)
    ours = go_on(caches[0])
    assert {3, 12, 20, 40} == set(steps)
    with by_layers():
        assert_alike(ours, go_on(caches[1]))


def change_by_optimizer(model: MidiMambaForCausalLM) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()


def change_in_place(model: MidiMambaForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.data *= 1.1


def change_by_loading(model: MidiMambaForCausalLM) -> None:
    model.load_state_dict({name: 1.1 * weight for name, weight in model.state_dict().items()})


def mixer_of(model: MidiMambaForCausalLM, layer: int) -> Any:
    return model.backbone.layers[layer].mixer


def change_parameter(model: MidiMambaForCausalLM) -> None:
    mixer = mixer_of(model, 1)
    mixer.D = nn.Parameter(mixer.D + 1)


def change_module(model: MidiMambaForCausalLM) -> None:
    mixer = mixer_of(model, 1)
    mixer.out_proj = nn.Linear(mixer.out_proj.in_features, mixer.out_proj.out_features, bias=True)


def change_size(model: MidiMambaForCausalLM) -> None:
    model.resize_token_embeddings(20, mean_resizing=False)
    change_in_place(model)


def change_by_merging(model: MidiMambaForCausalLM) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    adapted.merge_and_unload()


@pytest.mark.parametrize(
    "change",
    [
        change_by_optimizer,
        change_in_place,
        change_by_loading,
        change_parameter,
        change_module,
        change_size,
        change_by_merging,
    ],
)
def test_changed_weights_are_used(change: Callable[[MidiMambaForCausalLM], None], steps: list[int]) -> None:
    model = make_generator()
    ids = tokens(model, 2, 4)
    before = read(model, ids, model.make_state(2))
    change(model)
    assert_steps_equal_layers(model, ids)
    assert len(steps) == 2 * 4  # the kernel goes on, with the new weights
    after = read(model, ids, model.make_state(2))
    assert (after[..., :11] - before).abs().max() > 1e-3


def hook(model: MidiMambaForCausalLM) -> None:
    model.backbone.layers[0].register_forward_hook(lambda _module, _inputs, output: (output[0] * 2, output[1]))


def hook_before(model: MidiMambaForCausalLM) -> None:
    mixer_of(model, 1).out_proj.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))


def adapt(model: MidiMambaForCausalLM) -> None:
    get_peft_model(model, LoraConfig(r=2, target_modules=["x_proj"], init_lora_weights=False))


def hook_model(model: MidiMambaForCausalLM) -> None:
    model.register_forward_pre_hook(lambda _module, _inputs: None)


def replace_forward(model: MidiMambaForCausalLM) -> None:
    norm = model.backbone.final_norm
    forward = norm.forward
    norm.forward = lambda *inputs: 2 * forward(*inputs)


def parametrize(model: MidiMambaForCausalLM) -> None:
    nn.utils.parametrizations.weight_norm(mixer_of(model, 0).in_proj)


def widen(model: MidiMambaForCausalLM) -> None:
    model.double()


def narrow(model: MidiMambaForCausalLM) -> None:
    model.bfloat16()


@pytest.mark.parametrize("change", [hook, hook_before, hook_model, adapt, replace_forward, parametrize, widen, narrow])
def test_changed_layers_are_called(change: Callable[[MidiMambaForCausalLM], None], steps: list[int]) -> None:
    model = make_generator()
    ids = tokens(model, 2, 4)
    read(model, ids, model.make_state(2))
    assert len(steps) == 4
    change(model)
    logits = read(model, ids, model.make_state(2))
    assert len(steps) == 4
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, whole, atol=1e-5 if model.dtype != torch.bfloat16 else 0.1, rtol=1e-4)


@pytest.mark.parametrize("options", [{"layout": "moe-mamba"}, {"layout": "hybrid"}, {"hidden_act": "gelu"}])
def test_other_layers_are_called(options: dict[str, Any], steps: list[int]) -> None:
    model = make_generator(**options)
    assert_steps_equal_layers(model, tokens(model, 2, 6))
    assert not steps


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({"attention_mask": torch.ones(2, 1)}, nullcontext()),
        ({"seq_idx": torch.zeros(2, 1, dtype=torch.long)}, nullcontext()),
        ({"output_hidden_states": True}, nullcontext()),
        ({"logits_to_keep": torch.tensor([0])}, nullcontext()),
        ({}, torch.enable_grad()),
        ({}, torch.autocast("cpu", torch.bfloat16)),
    ],
)
def test_whoever_asks_for_more_gets_it_from_the_layers(
    options: dict[str, Any], context: Any, steps: list[int]
) -> None:
    model = make_generator()
    with torch.no_grad(), context:
        output = model(input_ids=tokens(model, 2, 1), past_key_values=model.make_state(2), **options)
    assert output.logits.shape == (2, 1, 11)
    assert not steps


def test_a_cache_is_returned_where_one_is_wanted() -> None:
    model = make_generator()
    cache = model.make_state(2)
    with torch.no_grad():
        assert model(input_ids=tokens(model, 2, 1), past_key_values=cache).past_key_values is cache
        assert model(input_ids=tokens(model, 2, 1), past_key_values=cache, use_cache=False).past_key_values is None
    assert cache.seen_tokens == 2


def test_what_does_not_fit_is_refused_as_ever() -> None:
    model, wider = make_generator(), make_generator(hidden_size=32)
    with torch.no_grad():
        with pytest.raises(CacheMismatchError, match="another model"):
            model.next_logits(tokens(model, 2, 1), wider.make_state(2))
        with pytest.raises(CacheMismatchError, match="holds 2 sequences, the input 3"):
            model.next_logits(tokens(model, 3, 1), model.make_state(2))
        with pytest.raises(CacheMismatchError, match="on meta, the input on cpu"):
            model.next_logits(tokens(model, 2, 1), model.make_state(2).to("meta"))
        with pytest.raises(IndexError):
            model.next_logits(torch.full((2, 1), 11), model.make_state(2))


@pytest.mark.parametrize("batch", [2, 8, 9, 16, 33])
def test_a_row_depends_neither_on_its_neighbours_nor_on_threads(batch: int) -> None:
    model = make_generator(layout="mamba-mlp")
    ids = tokens(model, 40, 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = read(model, ids, model.make_state(40))
        torch.set_num_threads(3)
        assert torch.equal(read(model, ids, model.make_state(40)), expected)
        assert torch.equal(read(model, ids[:batch], model.make_state(batch)), expected[:batch])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", [1, 20])
def test_what_is_not_a_number_stays_that(batch: int) -> None:
    model = make_generator()
    cache = model.make_state(batch)
    state = cache.layers[0]
    assert isinstance(state, MambaState)
    state.scan[0, 1, 2] = torch.nan
    logits = read(model, tokens(model, batch, 2), cache)
    assert logits[0].isnan().all()
    assert logits[1:].isfinite().all()


def test_a_copy_has_weights_of_its_own() -> None:
    model = make_generator()
    ids = tokens(model, 2, 3)
    before = read(model, ids, model.make_state(2))
    twin, buffer = copy.deepcopy(model), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert not torch.equal(read(twin, ids, twin.make_state(2)), before)
    assert torch.equal(read(model, ids, model.make_state(2)), before)
    assert torch.equal(read(loaded, ids, loaded.make_state(2)), before)


def test_a_layer_less_is_noticed() -> None:
    model = make_generator()
    read(model, tokens(model, 2, 1), model.make_state(2))
    model.backbone.layers = model.backbone.layers[:1]
    with pytest.raises(ValueError, match="zip"):
        read(model, tokens(model, 2, 1), model.make_state(2))


def test_a_model_is_not_kept_alive() -> None:
    model = make_generator()
    read(model, tokens(model, 1, 1), model.make_state(1))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_same_tokens_are_drawn() -> None:
    model = make_generator(hidden_size=32)
    drawn = []
    for context in (nullcontext(), by_layers()):
        torch.manual_seed(0)
        with context:
            drawn.append(sample(model, tokens(model, 16, 1) * 0 + 1, 60))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (5, 3), (13, 40), (31, 7)])
@pytest.mark.parametrize("count", [1, 2, 8, 11, 33])
@pytest.mark.parametrize(("bias", "adds"), [(True, False), (False, False), (False, True), (True, True)])
def test_products_equal_those_in_float64(outputs: int, depth: int, count: int, bias: bool, adds: bool) -> None:
    generator = np.random.default_rng(0)
    lanes = lanes_for(count)
    groups = -(-count // lanes)

    def numbers(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32)

    weight, biases, x, y = numbers(outputs, depth), numbers(outputs), numbers(groups, depth, lanes), None
    y = numbers(groups, outputs, lanes)
    expected = np.einsum("od,gdl->gol", weight.astype(float), x)
    expected += (biases[:, None] if bias else 0) + (y if adds else 0)
    address = biases.ctypes.data if bias else 0
    multiply(weight.ctypes.data, address, adds, depth, x.ctypes.data, y.ctypes.data, groups, outputs, lanes)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
