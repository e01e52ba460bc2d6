"""Documents packed into one sequence: none sees another, forwards, backwards or through a cache."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorWithFlattening

from midimamba import MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.configuration_midimamba import LAYOUTS
from support import make_discriminator, make_generator

# Lengths of the documents of each row; several are shorter than the convolution's kernel of 4.
LENGTHS = ((5, 1, 2, 9, 1, 1, 7), (1, 12, 13), (10, 14, 2))
TIME = 26
# Where calls begin. A call cannot see that its first token begins a document, so none of these does.
CALLS = [(), (3,), (16, 25), (4, 7, 16, 21), (2, 3, 4, 7, 9, 11, 12, 14, 15, 16, 20, 21, 22, 23, 25)]


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> MidiMambaForCausalLM:
    """With every bias: a product with zeros would not give away that something else was added.

    In training no expert is full and no router's loss is added, neither of which goes by documents.
    """
    experts = {"num_experts": 4, "capacity_factor": 4.0, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    return make_generator(layout=request.param, use_bias=True, use_conv_bias=True, num_key_value_heads=2, **experts)


def tokens() -> Tensor:
    return torch.randint(0, 11, (len(LENGTHS), TIME), generator=torch.Generator().manual_seed(1))


def numbers() -> Tensor:
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
    return torch.stack(rows) * 3 + 2  # documents need not be counted from 0, nor without gaps


def split(packed: Tensor) -> list[list[Tensor]]:
    """The documents of every row, each `(1, length, …)`."""
    return [list(packed[row : row + 1].split(LENGTHS[row], dim=1)) for row in range(len(packed))]


def read_alone(model: MidiMambaForCausalLM, ids: Tensor) -> Tensor:
    """Logits of packed ids, every document in a pass of its own."""
    return torch.cat([torch.cat([model(part).logits for part in row], 1) for row in split(ids)])


def calls(packed: Tensor, starts: tuple[int, ...]) -> tuple[Tensor, ...]:
    return packed.tensor_split(starts, dim=1)


def test_packed_documents_have_the_logits_of_separate_ones(model: MidiMambaForCausalLM) -> None:
    with torch.no_grad():
        packed = model(tokens(), seq_idx=numbers()).logits
        torch.testing.assert_close(packed, read_alone(model, tokens()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_have_the_gradients_of_separate_ones(
    model: MidiMambaForCausalLM, checkpointing: bool
) -> None:
    ids, seq_idx = tokens(), numbers()
    targets = sum(part[:, 1:].numel() for row in split(ids) for part in row)
    for row in split(ids):
        for part in row:
            logits = model(part).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").backward()
    alone = {name: part.grad / targets for name, part in model.named_parameters() if part.grad is not None}
    model.zero_grad()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    labels = ids.masked_fill(seq_idx.diff(dim=1, prepend=seq_idx[:, :1]) != 0, -100)
    model(ids, labels=labels, seq_idx=seq_idx).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, alone[name], atol=1e-5, rtol=1e-4)


def test_nothing_of_a_document_reaches_the_next(model: MidiMambaForCausalLM) -> None:
    ids = tokens()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    last = numbers() == numbers()[:, -1:]
    model(inputs_embeds=embeddings, seq_idx=numbers()).logits[last].square().sum().backward()
    assert (embeddings.grad[~last] == 0).all()
    assert (embeddings.grad[last] != 0).any(-1).all()


@pytest.mark.parametrize("starts", CALLS)
def test_documents_may_be_split_over_calls(model: MidiMambaForCausalLM, starts: tuple[int, ...]) -> None:
    with torch.no_grad():
        cache = RecurrentCache.for_model(model, len(LENGTHS))
        parts = [
            model(ids, past_key_values=cache, seq_idx=seq_idx).logits
            for ids, seq_idx in zip(calls(tokens(), starts), calls(numbers(), starts), strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), read_alone(model, tokens()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("starts", CALLS)
def test_the_cache_is_that_of_the_last_document_alone(model: MidiMambaForCausalLM, starts: tuple[int, ...]) -> None:
    with torch.no_grad():
        cache = RecurrentCache.for_model(model, len(LENGTHS))
        for ids, seq_idx in zip(calls(tokens(), starts), calls(numbers(), starts), strict=True):
            model(ids, past_key_values=cache, seq_idx=seq_idx)
        for row, documents in enumerate(split(tokens())):
            alone = model(documents[-1], use_cache=True).past_key_values
            packed = cache.rows(row, row + 1)
            length = documents[-1].shape[1]
            for mine, expected in zip(packed.layers, alone.layers, strict=True):
                for ours, theirs in zip(mine.tensors, expected.tensors, strict=True):
                    if mine.keeps_tokens:  # those of the last document are the last ones
                        ours, theirs = ours[:, :, TIME - length : TIME], theirs[:, :, :length]
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_training_pass_onto_a_cache_separates_documents_too(model: MidiMambaForCausalLM) -> None:
    cache = RecurrentCache.for_model(model, len(LENGTHS))
    logits = model.train()(tokens(), past_key_values=cache, seq_idx=numbers()).logits
    torch.testing.assert_close(logits, read_alone(model, tokens()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [0, 7])
def test_a_single_document_needs_no_number(model: MidiMambaForCausalLM, number: int) -> None:
    head, tail = tokens().split((9, TIME - 9), dim=1)
    with torch.no_grad():
        plain, numbered = (RecurrentCache.for_model(model, len(head)) for _ in range(2))
        for ids in (head, tail, tail[:, :1]):
            expected = model(ids, past_key_values=plain).logits
            logits = model(ids, past_key_values=numbered, seq_idx=torch.full_like(ids, number)).logits
            torch.testing.assert_close(logits, expected)


def test_the_first_token_of_a_call_goes_on_from_the_cache(model: MidiMambaForCausalLM) -> None:
    head, tail = tokens().split((9, TIME - 9), dim=1)
    with torch.no_grad():
        cache = model(head, seq_idx=torch.zeros_like(head)).past_key_values
        logits = model(tail, past_key_values=cache, seq_idx=torch.ones_like(tail)).logits
        torch.testing.assert_close(logits, model(tokens()).logits[:, 9:], atol=1e-4, rtol=0)


def test_left_padding_and_documents_go_together(model: MidiMambaForCausalLM) -> None:
    padded, seq_idx = F.pad(tokens(), (4, 0), value=3), F.pad(numbers(), (4, 0), value=2)
    mask = F.pad(torch.ones_like(tokens()), (4, 0))
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, seq_idx=seq_idx).logits[:, 4:]
        torch.testing.assert_close(logits, read_alone(model, tokens()), atol=1e-5, rtol=0)


def test_generate_continues_the_last_document(model: MidiMambaForCausalLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(tokens(), seq_idx=numbers(), **options)
    for row, documents in enumerate(split(tokens())):
        assert torch.equal(generated[row, -8:], model.generate(documents[-1], **options)[0, -8:])


def test_documents_may_be_told_by_positions(model: MidiMambaForCausalLM) -> None:
    rows = [[token for length in row for token in range(length)] for row in LENGTHS]
    with torch.no_grad():
        by_positions = model(tokens(), position_ids=torch.tensor(rows)).logits
        torch.testing.assert_close(by_positions, model(tokens(), seq_idx=numbers()).logits)


def test_a_collator_of_transformers_packs_documents(model: MidiMambaForCausalLM) -> None:
    documents = [{"input_ids": part[0].tolist()} for part in split(tokens())[0]]
    packed = DataCollatorWithFlattening()(documents)
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).logits[0], model(tokens(), seq_idx=numbers()).logits[0])


def test_numbers_of_another_shape_are_refused(model: MidiMambaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"seq_idx has shape \(3, 25\), the input \(3, 26\)"):
        model(tokens(), seq_idx=numbers()[:, 1:])


def test_a_discriminator_judges_a_block_as_one_document() -> None:
    discriminator = make_discriminator("mamba")
    ids = tokens()
    ids[:, 4] = 1  # the token with which a piece begins
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 11
    with torch.no_grad():
        difference = discriminator(ids).position_logits[:, 5] - discriminator(changed).position_logits[:, 5]
    assert (difference != 0).all()
