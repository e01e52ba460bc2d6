"""The generator: the same function as transformers' Mamba, and an exact state."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, GPT2Config, MambaConfig, MambaForCausalLM

import midimamba
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.policy import CACHE
from midimamba.modeling.stock_names import plain_name
from support import gradients_of, make_generator


def tokens(batch: int = 3, time: int = 20, vocab: int = 11) -> Tensor:
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(1))


def generate(model: GenerationMixin, ids: Tensor, **options: Any) -> Tensor:
    generated = model.generate(ids, **options)
    assert isinstance(generated, Tensor)
    return generated


def test_a_saved_generator_is_a_stock_checkpoint(generator: MidiMambaForCausalLM, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock).__name__ == "MambaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens()).logits, generator(tokens()).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_saved_generator_loads_without_this_package(generator: MidiMambaForCausalLM, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    torch.save(tokens(), tmp_path / "ids.pt")
    script = f"""
import sys, torch
sys.modules["midimamba"] = None  # an import now raises
from transformers import AutoModelForCausalLM
ids = torch.load({str(tmp_path / "ids.pt")!r}, weights_only=True)
with torch.no_grad():
    torch.save(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})(ids).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    with torch.no_grad():
        ours = generator(tokens()).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), ours, atol=1e-5, rtol=0)


def test_any_stock_checkpoint_is_a_generator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, use_bias=True)).eval()
    stock.save_pretrained(tmp_path)
    ours = midimamba.load(str(tmp_path))
    assert type(ours) is MidiMambaForCausalLM
    assert isinstance(ours.config, MidiMambaConfig)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, stock(tokens()).logits, atol=1e-5, rtol=0)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    GPT2Config(vocab_size=11).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type 'gpt2', not a Mamba language model, nor a Llama one"):
        midimamba.load(str(tmp_path))


def test_importing_the_package_leaves_stock_classes_alone(generator: MidiMambaForCausalLM, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "MambaConfig"
    assert type(AutoModelForCausalLM.from_config(generator.config)) is MidiMambaForCausalLM


def test_gradients_equal_those_of_the_stock_model(generator: MidiMambaForCausalLM, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    stock = MambaForCausalLM.from_pretrained(tmp_path).train()
    generator.train()
    for model in (stock, generator):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    theirs = {plain_name(name): parameter for name, parameter in stock.named_parameters()}
    for name, parameter in generator.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 7])
def test_continuing_from_a_state_equals_the_full_pass(generator: MidiMambaForCausalLM, steps: int) -> None:
    ids = tokens()
    with torch.no_grad():
        whole = generator(ids).logits
        cache = RecurrentCache.for_model(generator, len(ids))
        parts = [generator(part, past_key_values=cache).logits for part in ids.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # transformers from 5.24 on, and before
def test_a_state_is_taken_by_every_name_that_transformers_has_for_it(
    generator: MidiMambaForCausalLM, name: str
) -> None:
    ids = tokens()
    with torch.no_grad():
        outputs = generator(ids[:, :8])
        continued = generator(ids[:, 8:], **{name: getattr(outputs, CACHE)}).logits
        torch.testing.assert_close(continued, generator(ids).logits[:, 8:], atol=1e-4, rtol=0)


def test_generate_gives_the_same_with_and_without_a_state(generator: MidiMambaForCausalLM) -> None:
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)  # else every token is followed by the same one, whatever came before
    with_state, without = (
        generate(generator, tokens(), max_new_tokens=16, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert len(set(without[0].tolist())) > 3
    assert with_state.tolist() == without.tolist()


def test_a_continuation_has_the_gradients_of_its_own_tokens(generator: MidiMambaForCausalLM) -> None:
    ids = tokens()
    cache = generator(ids[:, :8]).past_key_values
    loss = generator(ids[:, 8:], past_key_values=cache, labels=ids[:, 8:]).loss
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients_of(generator))
    assert not any(state.requires_grad for layer in cache.layers for state in layer.tensors)


@pytest.mark.parametrize("use_bias", [False, True])
def test_left_padding_is_exact(use_bias: bool) -> None:
    model = make_generator(use_conv_bias=True, use_bias=use_bias)
    ids = tokens(2, 9)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits)


def test_a_sequence_does_not_depend_on_its_batch(generator: MidiMambaForCausalLM) -> None:
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(generator(ids).logits[1:2], generator(ids[1:2]).logits)


def test_a_position_does_not_depend_on_what_follows(generator: MidiMambaForCausalLM) -> None:
    ids = tokens()
    changed = ids.clone()
    changed[:, 12:] = 0
    with torch.no_grad():
        torch.testing.assert_close(generator(changed).logits[:, :12], generator(ids).logits[:, :12])


@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
    ],
)
def test_generate_gives_the_tokens_of_the_stock_model(
    generator: MidiMambaForCausalLM, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    generator.save_pretrained(tmp_path)
    stock = MambaForCausalLM.from_pretrained(tmp_path)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, **strategy}
    assert torch.equal(generate(generator, tokens(), **arguments), generate(stock, tokens(), **arguments))


def test_sampling_gives_several_sequences_and_takes_left_padding(generator: MidiMambaForCausalLM) -> None:
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    torch.manual_seed(0)
    sampled = generate(
        generator,
        ids,
        attention_mask=mask,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=5,
        eos_token_id=None,
    )
    assert sampled.shape == (6, 11)
    assert len({tuple(row.tolist()) for row in sampled[:3, 6:]}) > 1
    padded = generate(generator, ids, attention_mask=mask, do_sample=False, max_new_tokens=5, eos_token_id=None)
    alone = generate(generator, ids[:1, 2:], do_sample=False, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(padded[0, 6:], alone[0, 4:])


def test_gradient_checkpointing_changes_no_gradient(generator: MidiMambaForCausalLM) -> None:
    gradients = []
    for checkpointing in (False, True):
        generator.train()
        if checkpointing:
            generator.gradient_checkpointing_enable()
        generator.zero_grad()
        generator(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append(gradients_of(generator))
    for without, with_checkpointing in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_checkpointing)


def test_bfloat16_keeps_states_in_float32() -> None:
    model = make_generator().bfloat16()
    with torch.no_grad():
        output = model(tokens())
    assert output.past_key_values.layers[0].scan.dtype == torch.float32
    assert output.logits.dtype == torch.float32
    assert output.logits.isfinite().all()


def test_a_cache_of_another_batch_size_is_refused(generator: MidiMambaForCausalLM) -> None:
    cache = RecurrentCache.for_model(generator, 2)
    with pytest.raises(ValueError, match="the cache holds 2 sequences, the input 3; fork or select"):
        generator(tokens(3), past_key_values=cache)


def test_exactly_one_kind_of_input_is_needed(generator: MidiMambaForCausalLM) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        generator()
