"""Forking a state is exact, and never disturbs its origin."""

import torch
from torch import Tensor

from midimamba import MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.layer_states import MambaState


def read(model: MidiMambaForCausalLM, tokens: list[list[int]], cache: RecurrentCache | None = None) -> RecurrentCache:
    with torch.no_grad():
        read: RecurrentCache = model(torch.tensor(tokens), past_key_values=cache, use_cache=True).past_key_values
    return read


def logits_after(model: MidiMambaForCausalLM, cache: RecurrentCache, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens, past_key_values=cache).logits[:, -1]
    return logits


def scan_of(cache: RecurrentCache, layer: int) -> Tensor:
    state = cache.layers[layer]
    assert isinstance(state, MambaState)
    return state.scan


def assert_equal(ours: RecurrentCache, theirs: RecurrentCache) -> None:
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for tensor, expected in zip(mine.tensors, other.tensors, strict=True):
            assert torch.equal(tensor, expected)


def test_a_fork_continues_like_a_fresh_pass(generator: MidiMambaForCausalLM) -> None:
    prefixes = [[1, 4, 5, 6], [2, 3, 3, 9]]
    forks = read(generator, prefixes).fork(3)
    continuations = torch.arange(6)[:, None] + torch.tensor([[0, 3]])
    repeated = torch.tensor(prefixes).repeat_interleave(3, 0)
    with torch.no_grad():
        fresh = generator(torch.cat([repeated, continuations], 1)).logits[:, -1]
    torch.testing.assert_close(logits_after(generator, forks, continuations), fresh, atol=1e-4, rtol=0)


def test_a_fork_leaves_its_origin_as_it_was(generator: MidiMambaForCausalLM) -> None:
    cache = read(generator, [[1, 4, 5, 6]])
    before = cache.snapshot()
    read(generator, [[7], [8]], cache.fork(2))
    assert_equal(cache, before)


def test_select_and_reorder_take_sequences_by_index(generator: MidiMambaForCausalLM) -> None:
    cache = read(generator, [[1, 4], [2, 3], [5, 6]])
    indices = torch.tensor([2, 0, 2])
    selected = cache.select(indices)
    cache.reorder_cache(indices)
    assert_equal(selected, cache)
    expected = read(generator, [[5, 6], [1, 4], [5, 6]])
    torch.testing.assert_close(scan_of(selected, 1), scan_of(expected, 1))


def test_rows_are_a_view(generator: MidiMambaForCausalLM) -> None:
    cache = RecurrentCache.for_model(generator, 3)
    read(generator, [[4, 5]], cache.rows(1, 2))
    alone = read(generator, [[4, 5]])
    scan = scan_of(cache, 0)
    torch.testing.assert_close(scan[1:2], scan_of(alone, 0))
    assert not scan[0].any()
    assert not scan[2].any()


def test_the_size_of_a_state_does_not_grow(generator: MidiMambaForCausalLM) -> None:
    short, long = read(generator, [[1]]), read(generator, [list(range(10)) * 10])
    assert short.nbytes == long.nbytes
    channels, layers = generator.config.intermediate_size, generator.config.num_hidden_layers
    assert short.nbytes == 4 * layers * channels * (generator.config.conv_kernel - 1 + generator.config.state_size)
