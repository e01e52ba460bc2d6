"""Sequences that join a running state are what they were, wherever the memory comes from."""

import pytest
import torch
from torch import Tensor, nn

from midimamba import CacheMismatchError, MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.configuration_midimamba import LAYOUTS
from support import make_generator


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> MidiMambaForCausalLM:
    return make_generator(layout=request.param, num_key_value_heads=2)


def tokens(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 11, (batch, time), generator=torch.Generator().manual_seed(seed))


def read(model: MidiMambaForCausalLM, ids: Tensor, max_length: int | None = None) -> RecurrentCache:
    state = model.make_state(len(ids), max_length)
    with torch.no_grad():
        model.next_logits(ids, state)
    return state


def memory(state: RecurrentCache) -> list[int]:
    return [tensor.data_ptr() for layer in state.layers for tensor in layer.tensors]


@pytest.mark.parametrize("room", [None, 3, 5, 8])
@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_appended_rows_continue_bitwise_as_before(
    model: MidiMambaForCausalLM, room: int | None, max_length: int | None, dtype: torch.dtype
) -> None:
    nn.Module.to(model, dtype)
    ids = tokens(5, 12)
    whole = read(model, ids[:, :4])
    state = model.make_state(0, max_length, room)
    for part in (ids[:2, :4], ids[2:3, :4], ids[3:, :4]):
        state.append(read(model, part))
    assert (state.batch_size, state.seen_tokens, state.plain) == (5, 4, True)
    with torch.no_grad():
        for t in range(4, 12):
            # One matrix product of five rows and three products of fewer differ by a rounding.
            ours, theirs = (model.next_logits(ids[:, t : t + 1], one) for one in (state, whole))
            torch.testing.assert_close(ours, theirs, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0)


def test_an_appended_row_is_exactly_what_it_was(model: MidiMambaForCausalLM) -> None:
    first, second = read(model, tokens(2, 4)), read(model, tokens(3, 4, seed=2))
    expected = model.next_logits(tokens(3, 1, seed=3), second.snapshot())
    for state in (model.make_state(0, 9, 5), model.make_state(0)):
        state.append(first).append(second)
        rows = state.rows(2, 5)
        assert torch.equal(model.next_logits(tokens(3, 1, seed=3), rows.snapshot()), expected)


@pytest.mark.parametrize("room", [None, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rollouts_that_join_have_the_logits_of_full_passes(
    model: MidiMambaForCausalLM, room: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    """As in roll-outs: three prefixes advance, and at some lengths copies of them join the sequences that run."""
    nn.Module.to(model, dtype)
    prefixes, length, joins = tokens(3, 12), 12, (1, 4, 5, 10)
    running, ids = model.make_state(0, length, room), prefixes[:0, :1]
    ahead = model.make_state(3, length)
    with torch.no_grad():
        model.next_logits(prefixes[:, :1], ahead)
        for t in range(1, length):
            if t in joins:
                running.append(ahead.select(torch.tensor([2, 0, 1])))
                ids = torch.cat([ids, prefixes[[2, 0, 1], :t]])
            following = tokens(len(ids), 1, seed=t)
            ids = torch.cat([ids, following], 1)
            ours = model.next_logits(following, running)
            theirs = model(ids, use_cache=False).logits[:, -1]
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
            model.next_logits(prefixes[:, t : t + 1], ahead)
    assert running.batch_size == 3 * len(joins)


def test_reserved_memory_is_used_and_not_moved(model: MidiMambaForCausalLM) -> None:
    state = model.make_state(0, max_length=10, room=6)
    state.append(read(model, tokens(2, 4)))
    before = memory(state)
    with torch.no_grad():
        model.next_logits(tokens(2, 1), state)
    state.append(read(model, tokens(4, 5)))
    assert memory(state) == before
    state.append(read(model, tokens(1, 5)))
    assert memory(state) != before
    assert state.batch_size == 7


def test_views_of_rows_take_part(model: MidiMambaForCausalLM) -> None:
    """Appending from a view, and reading into a view of what was appended."""
    ids = tokens(4, 6)
    whole = read(model, ids[:, :4], max_length=8)
    state = model.make_state(0, max_length=8, room=4)
    state.append(whole.rows(2, 4)).append(whole.rows(0, 2))
    with torch.no_grad():
        ours = model.next_logits(ids[:2, 4:5], state.rows(2, 4))
        theirs = model.next_logits(ids[:2, 4:5], read(model, ids[:2, :4]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    with pytest.raises(CacheMismatchError, match="cannot append to a view of rows; append to the cache"):
        state.rows(0, 2).append(whole)


def test_rows_of_another_length_cannot_be_appended(model: MidiMambaForCausalLM) -> None:
    state = read(model, tokens(2, 4))
    with pytest.raises(CacheMismatchError, match="sequences that read 3 tokens to sequences that read 4"):
        state.append(read(model, tokens(2, 3)))
