"""A step that is exported to ONNX computes what the model computes, and what cannot be exported is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

import midimamba
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, RecurrentCache
from midimamba.errors import InputError
from midimamba.training.lora import add_adapters
from support import make_generator

onnxruntime = pytest.importorskip("onnxruntime")


def start(session: Any, batch: int) -> dict[str, np.ndarray]:
    """The states before the first token."""
    return {
        node.name: np.zeros([batch, *node.shape[1:]], np.float32) for node in session.get_inputs() if "." in node.name
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mamba", "mamba-mlp", "moe-mamba"])
@torch.no_grad()
def test_a_thousand_steps_give_the_logits_of_the_model(layout: str, tmp_path: Path) -> None:
    model = make_generator(layout=layout)
    midimamba.export_onnx(model, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    for batch, length in ((2, 1000), (1, 50)):
        ids = torch.randint(0, model.config.vocab_size, (batch, length))
        cache, states = RecurrentCache.for_model(model, batch), start(session, batch)
        worst = 0.0
        for step in range(ids.shape[1]):
            token = ids[:, step : step + 1]
            expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
            outputs = dict(zip(names, session.run(None, {"input_ids": token.numpy(), **states}), strict=True))
            states = {name: outputs[f"new_{name}"] for name in states}
            worst = max(worst, float(np.abs(outputs["logits"] - expected.numpy()).max()))
        assert worst < 1e-4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "transformer", "hidden_size": 64}, "layout transformer cannot be exported"),
        ({"layout": "hybrid", "hidden_size": 64}, "layout hybrid cannot be exported"),
        ({"lookback_bars": [1, 2], "bar_token_ids": [4]}, "looks back cannot be exported"),
    ],
)
def test_what_keeps_every_token_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = MidiMambaForCausalLM(MidiMambaConfig(vocab_size=11, num_hidden_layers=2, **{"hidden_size": 16, **options}))
    with pytest.raises(InputError, match=reason):
        midimamba.export_onnx(model, tmp_path / "step.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("midimamba.evaluation.rendering.import_module", missing)
    with pytest.raises(InputError, match=r"midimamba\[onnx\]"):
        midimamba.export_onnx(make_generator(), tmp_path / "step.onnx")


@pytest.mark.slow
@torch.no_grad()
def test_adapters_are_merged(tmp_path: Path) -> None:
    model = make_generator()
    for name, parameter in add_adapters(model, LoraConfig(r=4)).named_parameters():
        if "lora_B" in name:  # begins at zero, without an effect
            torch.nn.init.normal_(parameter, std=0.3)
    token = torch.tensor([[5]])
    expected = model(input_ids=token).logits[:, -1].numpy()
    assert np.abs(expected - make_generator()(input_ids=token).logits[:, -1].numpy()).max() > 0.1
    midimamba.export_onnx(model, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": token.numpy(), **start(session, 1)})
    np.testing.assert_allclose(logits, expected, atol=1e-5)
