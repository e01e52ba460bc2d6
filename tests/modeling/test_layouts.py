"""The five layouts: one state machine, whatever mixes the tokens and whatever follows."""

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from midimamba import CacheMismatchError, MidiMambaConfig, MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.configuration_midimamba import LAYOUTS
from support import gradients_of, make_generator

WITH_EXPERTS = [layout for layout, (_, feed_forward) in LAYOUTS.items() if feed_forward == "moe"]
WITH_ATTENTION = [layout for layout, (mixer, _) in LAYOUTS.items() if mixer == "attention"]
GENERATION: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def make(layout: str, **overrides: Any) -> MidiMambaForCausalLM:
    """Two heads share keys and values, every bias is there, and no expert is ever full."""
    shape = {"num_key_value_heads": 2, "num_experts": 4, "capacity_factor": 4.0, "use_bias": True}
    return make_generator(layout=layout, **{**shape, **overrides})


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> MidiMambaForCausalLM:
    return make(request.param)


def tokens(batch: int = 3, time: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(0, 11, (batch, time), generator=torch.Generator().manual_seed(seed))


def read(model: MidiMambaForCausalLM, ids: Tensor, cache: Cache | RecurrentCache, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache, **kwargs).logits
    return logits


def logits_of(model: MidiMambaForCausalLM, ids: Tensor, **kwargs: Any) -> Tensor:
    """Of one pass without any state."""
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False, **kwargs).logits
    return logits


def generate(model: MidiMambaForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    generated = model.generate(ids, **options, **GENERATION)
    assert isinstance(generated, Tensor)
    return generated


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [1, 7, 64])
@pytest.mark.parametrize("max_length", [None, 130])
def test_decoding_in_steps_equals_the_full_pass(
    model: MidiMambaForCausalLM, steps: int, max_length: int | None
) -> None:
    ids = tokens(2, 130)
    cache = RecurrentCache.for_model(model, 2, max_length)
    parts = [read(model, part, cache) for part in ids.split(steps, dim=1)]
    assert_close(torch.cat(parts, 1), logits_of(model, ids))
    assert cache.get_seq_length() == 130


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_left_padding_is_exact_with_and_without_a_state(model: MidiMambaForCausalLM, steps: int) -> None:
    ids = tokens(2, 20)
    padding = torch.tensor([4, 1])
    mask = (torch.arange(20) >= padding[:, None]).long()
    padded = torch.full((2, 20), 7)
    for row, count in enumerate(padding):
        padded[row, count:] = ids[row, : 20 - count]
    alone = [logits_of(model, padded[row : row + 1, count:])[0] for row, count in enumerate(padding)]
    whole = logits_of(model, padded, attention_mask=mask)
    cache = RecurrentCache.for_model(model, 2)
    stepwise = [read(model, padded[:, :5], cache, attention_mask=mask[:, :5])]
    # What follows is not padding, and need not say so.
    stepwise += [read(model, part, cache) for part in padded[:, 5:].split(steps, dim=1)]
    for row, count in enumerate(padding):
        assert_close(whole[row, count:], alone[row])
        assert_close(torch.cat(stepwise, 1)[row, count:], alone[row])


def test_padding_may_be_given_for_the_state_as_well(model: MidiMambaForCausalLM) -> None:
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = RecurrentCache.for_model(model, 2)
    read(model, ids[:, :8], cache, attention_mask=mask[:, :8])
    assert_close(read(model, ids[:, 8:], cache, attention_mask=mask)[0], logits_of(model, ids[:1, 3:])[0, 5:])


def test_a_sequence_depends_neither_on_its_batch_nor_on_what_follows(model: MidiMambaForCausalLM) -> None:
    ids = tokens()
    changed = ids.clone()
    changed[:, 12:] = 0
    whole = logits_of(model, ids)
    assert_close(logits_of(model, ids[1:2]), whole[1:2])
    assert_close(logits_of(model, changed)[:, :12], whole[:, :12])


def test_every_earlier_token_matters(model: MidiMambaForCausalLM) -> None:
    embeddings = model.get_input_embeddings()(tokens(1, 9)).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits[:, -1].square().sum().backward()
    assert (embeddings.grad != 0).any(-1).all()


def test_a_continuation_has_the_gradients_of_its_own_tokens(model: MidiMambaForCausalLM) -> None:
    ids = tokens()
    cache = RecurrentCache.for_model(model, 3)
    read(model, ids[:, :8], cache)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings[:, 8:], past_key_values=cache.snapshot()).logits.square().sum().backward()
    ours = embeddings.grad[:, 8:].clone()
    embeddings.grad = None
    model(inputs_embeds=embeddings, use_cache=False).logits[:, 8:].square().sum().backward()
    torch.testing.assert_close(ours, embeddings.grad[:, 8:], atol=1e-4, rtol=1e-3)
    model(ids[:, 8:], past_key_values=cache)  # with a graph, which must not reach the state
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors)


def test_gradients_equal_those_of_float64(model: MidiMambaForCausalLM) -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):
        nn.Module.to(model, dtype).train()
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([gradient.double() for gradient in gradients_of(model)])
    for single, double in zip(*gradients, strict=True):
        torch.testing.assert_close(single, double, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("use_cache", [None, True])
def test_gradient_checkpointing_changes_no_gradient(
    layout_in_training: str, use_cache: bool | None, use_reentrant: bool
) -> None:
    model = make(layout_in_training, capacity_factor=0.5).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=use_cache).loss
        loss.backward()
        results.append([loss.detach(), *gradients_of(model)])
    for without, with_checkpointing in zip(*results, strict=True):
        torch.testing.assert_close(without, with_checkpointing)


@pytest.fixture(params=LAYOUTS)
def layout_in_training(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_fork_continues_like_a_fresh_pass_and_leaves_its_origin(model: MidiMambaForCausalLM) -> None:
    prefixes, continuations = tokens(2, 5), tokens(6, 4, seed=2)
    cache = RecurrentCache.for_model(model, 2)
    read(model, prefixes, cache)
    forks = cache.fork(3)
    ours = read(model, continuations, forks)
    fresh = logits_of(model, torch.cat([prefixes.repeat_interleave(3, 0), continuations], 1))
    assert_close(ours, fresh[:, 5:])
    selected = cache.select(torch.tensor([1, 0, 1]))
    assert_close(read(model, continuations[[3, 0, 4]], selected), fresh[[3, 0, 4], 5:])
    assert_close(read(model, continuations[:2], cache.snapshot())[0], fresh[0, 5:])
    assert cache.seen_tokens == 5


def test_rows_join_a_running_batch_in_lockstep(model: MidiMambaForCausalLM) -> None:
    """As roll-outs do: prefixes advance, and their forks join those that already run."""
    ids = tokens(4, 12)
    forks = RecurrentCache.for_model(model, 4, max_length=12)
    prefixes = RecurrentCache.for_model(model, 2, max_length=12)
    read(model, ids[:2, :4], prefixes)
    forks.rows(0, 2).copy_(prefixes.select(torch.tensor([0, 1])))
    for t in (4, 5):
        read(model, ids[:2, t : t + 1], forks.rows(0, 2))
    joining = RecurrentCache.for_model(model, 2)
    read(model, ids[2:, :6], joining)
    forks.rows(2, 4).copy_(joining)
    together = [read(model, ids[:, t : t + 1], forks.rows(0, 4)) for t in range(6, 12)]
    assert_close(torch.cat(together, 1), logits_of(model, ids)[:, 6:])


def test_rows_that_read_later_are_exact(model: MidiMambaForCausalLM) -> None:
    ids = tokens(2, 9)
    cache = RecurrentCache.for_model(model, 2, max_length=12)
    read(model, ids[:1, :3], cache.rows(0, 1))
    read(model, ids[1:, :3], cache.rows(1, 2))
    expected = logits_of(model, ids)
    assert_close(read(model, ids[:, 3:4], cache), expected[:, 3:4])
    assert_close(read(model, ids[:, 4:], cache), expected[:, 4:])


def test_rows_that_pause_after_growth_are_exact(model: MidiMambaForCausalLM) -> None:
    ids = tokens(2, 8)
    cache = RecurrentCache.for_model(model, 2)
    read(model, ids[:, :3], cache)
    read(model, ids[:, 3:4], cache)
    read(model, ids[:1, :2], cache.rows(0, 1))  # what row 0 reads is of no interest to row 1
    assert_close(read(model, ids[:, 4:], cache)[1], logits_of(model, ids)[1, 4:])


def test_rows_that_were_not_copied_to_begin_afresh(model: MidiMambaForCausalLM) -> None:
    ids = tokens(2, 8)
    cache, prefix = RecurrentCache.for_model(model, 2, max_length=12), RecurrentCache.for_model(model, 1)
    read(model, ids[:1, :3], prefix)
    cache.rows(0, 1).copy_(prefix)
    both = torch.stack([ids[0, 3:], ids[1, :5]])
    together = torch.cat([read(model, part, cache) for part in both.split(1, dim=1)], 1)
    assert_close(together[0], logits_of(model, ids[:1])[0, 3:])
    assert_close(together[1], logits_of(model, ids[1:, :5])[0])


@pytest.mark.parametrize("layout", WITH_ATTENTION)
def test_a_view_of_rows_has_the_room_of_its_cache(layout: str) -> None:
    model = make(layout)
    cache = RecurrentCache.for_model(model, 3, max_length=4)
    read(model, tokens(3, 4), cache)
    with pytest.raises(
        CacheMismatchError, match="room for 4 tokens and cannot grow to 5; give max_length to the cache"
    ):
        read(model, tokens(2, 1), cache.rows(0, 2))
    assert cache.seen_tokens == 4
    before = cache.nbytes
    read(model, tokens(3, 1), cache)  # the cache itself grows
    assert cache.nbytes == 2 * before


@pytest.mark.parametrize("layout", WITH_ATTENTION)
def test_rows_of_another_length_cannot_join(layout: str) -> None:
    model = make(layout)
    cache, other = (RecurrentCache.for_model(model, batch, max_length=8) for batch in (3, 1))
    read(model, tokens(3, 5), cache)
    read(model, tokens(1, 4), other)
    with pytest.raises(CacheMismatchError, match="rows that read 4 tokens cannot join rows that read 5"):
        cache.rows(0, 1).copy_(other)


def test_a_copy_forgets_what_was_there(model: MidiMambaForCausalLM) -> None:
    long, short = (RecurrentCache.for_model(model, 2, max_length=20) for _ in range(2))
    read(model, tokens(2, 15, seed=3), long)
    read(model, tokens(2, 4), short)
    long.copy_(short)
    # A row reads alone, so that the other's slots stay as the copy left them.
    read(model, tokens(1, 3, seed=5), long.rows(0, 1))
    assert_close(
        read(model, tokens(2, 2, seed=4), long)[1],
        logits_of(model, torch.cat([tokens(2, 4), tokens(2, 2, seed=4)], 1))[1, 4:],
    )


def test_a_cache_stays_where_it_is_or_moves(model: MidiMambaForCausalLM) -> None:
    cache = RecurrentCache.for_model(model, 2, max_length=5)
    read(model, tokens(2, 3), cache)
    assert cache.to("cpu") is cache
    moved = cache.to("meta")
    assert moved.device.type == "meta"
    assert moved.seen_tokens == 3
    with pytest.raises(CacheMismatchError, match=r"the cache is on meta, the input on cpu; move it with cache\.to"):
        read(model, tokens(2, 1), moved)


def test_a_foreign_cache_is_refused(model: MidiMambaForCausalLM) -> None:
    config = model.config
    others: list[dict[str, Any]] = [
        {"num_hidden_layers": 3},
        {"hidden_size": 32},
        {"layout": "mamba" if config.mixer == "attention" else "transformer"},
        {"num_key_value_heads": 4} if config.mixer == "attention" else {"state_size": 8},
    ]
    shape: dict[str, Any] = {"layout": config.layout, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    shape["num_key_value_heads"] = 2
    for other in others:
        foreign = MidiMambaConfig(**{**shape, **other})
        with pytest.raises(
            CacheMismatchError, match=r"the cache is of another model: it has .* this model .*for_model"
        ):
            read(model, tokens(2, 1), RecurrentCache.empty(foreign, 2))
        with pytest.raises(CacheMismatchError, match="cannot copy the state of 2 sequences of"):
            RecurrentCache.for_model(model, 2).copy_(RecurrentCache.empty(foreign, 2))
    with pytest.raises(CacheMismatchError, match="the cache holds 2 sequences, the input 3; fork or select"):
        read(model, tokens(3, 1), RecurrentCache.for_model(model, 2))
    with pytest.raises(
        CacheMismatchError, match="past_key_values is a DynamicCache; make a cache with RecurrentCache"
    ):
        read(model, tokens(3, 1), DynamicCache())


def test_checkpointing_onto_a_state_is_refused(model: MidiMambaForCausalLM) -> None:
    cache = RecurrentCache.for_model(model, 3)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing .* leave past_key_values out"):
        model(tokens(), past_key_values=cache)
    read(model, tokens(), cache)  # without a graph nothing is computed twice


@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
def test_generating_with_a_state_gives_the_tokens_without(
    model: MidiMambaForCausalLM, strategy: dict[str, Any]
) -> None:
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, ids, attention_mask=mask, use_cache=use_cache, **strategy))
    assert torch.equal(results[0], results[1])
    assert results[0].shape == (2 * strategy.get("num_return_sequences", 1), 13)


def test_left_padding_does_not_change_what_is_generated(model: MidiMambaForCausalLM) -> None:
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = generate(model, ids, attention_mask=mask, do_sample=False)
    alone = generate(model, ids[:1, 3:], do_sample=False)
    assert torch.equal(padded[0, 7:], alone[0, 4:])


def test_bfloat16_keeps_close_to_float32(model: MidiMambaForCausalLM) -> None:
    expected = logits_of(model, tokens())
    output = model.bfloat16()(tokens())
    assert output.logits.dtype == torch.float32
    # bfloat16 has 8 bits; a router may send a token elsewhere, so not every position need agree.
    close = (output.logits - expected).abs().amax(-1) < 0.1 * expected.abs().max()
    assert close.float().mean() > 0.8


@pytest.mark.parametrize("padded", [False, True])
def test_autocast_trains(model: MidiMambaForCausalLM, padded: bool) -> None:
    model.train()
    mask = (torch.arange(20) >= 4).long().expand(3, -1) if padded else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens(), attention_mask=mask, labels=tokens()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients_of(model))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.eval()(tokens()).past_key_values
        assert model(tokens(3, 2), past_key_values=cache).logits.isfinite().all()
        generate(model, tokens(), attention_mask=mask)


def test_a_model_continues_embeddings(model: MidiMambaForCausalLM) -> None:
    embedded = model.get_input_embeddings()(tokens())
    options = {"attention_mask": torch.ones_like(tokens()), "do_sample": False, **GENERATION}
    expected = model.generate(tokens(), **options)[:, tokens().shape[1] :]
    generated = model.generate(inputs_embeds=embedded, **options)
    assert isinstance(generated, Tensor)
    assert torch.equal(generated, expected)


def test_a_tuple_is_returned_on_request(model: MidiMambaForCausalLM) -> None:
    logits, *_ = model(tokens(), return_dict=False)
    assert_close(logits.detach(), logits_of(model, tokens()))
    model.config.return_dict = False
    assert isinstance(model(tokens()), tuple)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_resized(model: MidiMambaForCausalLM, tied: bool) -> None:
    model = make(model.config.layout, tie_word_embeddings=tied)
    before = logits_of(model, tokens())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.resize_token_embeddings(15)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = logits_of(model, tokens())
    assert after.shape[-1] == model.config.vocab_size == 15
    assert_close(after[..., :11], before)


def test_loss_is_the_likelihood_in_evaluation(model: MidiMambaForCausalLM) -> None:
    output = model(tokens(), labels=tokens())
    likelihood = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(output.loss, likelihood)
    assert (output.aux_loss is not None) == (model.config.layout in WITH_EXPERTS)


def active_parameters(layout: str, size: str) -> int:
    """Those that one token meets, embeddings aside: of the experts of a layer it meets one."""
    with torch.device("meta"):
        model = MidiMambaForCausalLM(MidiMambaConfig.of_size(size, layout=layout))
    embeddings = model.get_input_embeddings().weight
    shares = {"gate_up_proj", "down_proj"} if layout in WITH_EXPERTS else set()
    return sum(
        parameter.numel() // (model.config.num_experts if name.rpartition(".")[2] in shares else 1)
        for name, parameter in model.named_parameters()
        if parameter is not embeddings
    )


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.5), ("small", 2.6), ("medium", 20), ("large", 160)])
def test_a_named_size_is_the_same_in_every_layout(size: str, millions: float) -> None:
    counts = [active_parameters(layout, size) for layout in LAYOUTS]
    assert max(counts) / min(counts) <= 1.03
    assert math.isclose(counts[0], millions * 1e6, rel_tol=0.1)


def test_small_is_the_default_mamba() -> None:
    assert MidiMambaConfig.of_size("small").to_dict() == MidiMambaConfig().to_dict()


def test_what_a_size_does_not_say_can_be_overridden() -> None:
    config = MidiMambaConfig.of_size("tiny", layout="moe-mamba", num_hidden_layers=1, vocab_size=77)
    assert (config.num_hidden_layers, config.vocab_size, config.hidden_size) == (1, 77, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "mambo"}, "'mambo' is unknown; use one of " + ", ".join(LAYOUTS)),
        ({"layout": "transformer", "num_attention_heads": 3}, r"num_attention_heads \(3\) must divide hidden_size"),
        ({"layout": "transformer-moe", "num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide num_att"),
        ({"layout": "transformer", "head_dim": 7}, "head_dim is 7; rotary positions need an even number"),
        ({"layout": "moe-mamba", "num_experts": 0}, "num_experts is 0; it must be a whole number between 1"),
        ({"layout": "moe-mamba", "capacity_factor": 0}, "capacity_factor is 0; it must be above 0"),
    ],
)
def test_an_impossible_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        MidiMambaConfig(hidden_size=16, **fields)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size 'huge' is unknown; use one of tiny, small, medium, large"):
        MidiMambaConfig.of_size("huge")
