"""The generator among other tools: compilation, adapters, placement on devices."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from midimamba import MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.configuration_midimamba import LAYOUTS
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import sample
from support import gradients_of, make_generator

# Modules that take part by being called. The mixer reads the weights of its convolution and of dt_proj directly.
ADAPTABLE = {"mamba": ["in_proj", "x_proj", "out_proj"], "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> MidiMambaForCausalLM:
    return make_generator(layout=request.param, hidden_size=32)


@pytest.fixture
def compiled(model: MidiMambaForCausalLM) -> Iterator[Any]:
    """The model as torch.compile traces it; without a compiler, which is torch's affair."""
    torch._dynamo.reset()
    yield torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()


def tokens(batch: int = 2, time: int = 9) -> torch.Tensor:
    return torch.randint(0, 11, (batch, time), generator=torch.Generator().manual_seed(7))


@pytest.mark.slow
def test_compiling_changes_nothing_forward_and_backward(model: MidiMambaForCausalLM, compiled: Any) -> None:
    ids = tokens()
    results = []
    for form in (model, compiled):
        model.zero_grad()
        output = form(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        results.append([output.logits.detach(), *gradients_of(model)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_decodes_alike(model: MidiMambaForCausalLM, compiled: Any) -> None:
    ids = tokens()
    with inference(model):
        expected = model(ids).logits[:, -1]
        cache = RecurrentCache.for_model(model, len(ids), max_length=ids.shape[1])
        for t in range(ids.shape[1]):
            logits = compiled(input_ids=ids[:, t : t + 1], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_trains_alone_and_merges(model: MidiMambaForCausalLM) -> None:
    targets = ADAPTABLE[model.config.mixer]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    ids = tokens()
    for _ in range(2):  # the first step moves B alone: A's gradient is zero while B is
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    with torch.no_grad():
        expected, without = adapted(input_ids=ids).logits, None
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - without).abs().max() > 1e-4
    assert isinstance(merged, MidiMambaForCausalLM)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_checkpoint_loads_by_device_map(
    model: MidiMambaForCausalLM, device_map: str | dict[str, str], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    placed = MidiMambaForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(placed(ids).logits, model(ids).logits)
    torch.manual_seed(0)
    ours = sample(placed, ids, 14)
    torch.manual_seed(0)
    assert torch.equal(ours, sample(model, ids, 14))
