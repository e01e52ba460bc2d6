"""Low-rank adapters: what moves, what is saved, and which layers they would have no effect on."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaForCausalLM

import trainer_support
from midimamba import MidiMambaForCausalLM
from midimamba.errors import InputError
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.lora import LoraArguments, add_adapters, lora_config, merged
from support import make_generator
from trainer_support import make_blocks, parameters


def make_trainer(folder: Path, **options: Any) -> AdversarialTrainer:
    config = LoraConfig(task_type="CAUSAL_LM", r=4)
    return trainer_support.make_trainer(folder, peft_config=config, **{"estimator": "terminal"} | options)


def with_trained_adapters(**layout: Any) -> MidiMambaForCausalLM:
    """Adapters begin with no effect; these have one."""
    model = make_generator(**layout)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in add_adapters(model, LoraConfig(r=4)).named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize("layout", ["mamba", "mamba-mlp", "moe-mamba", "transformer", "transformer-moe"])
def test_every_adapter_has_an_effect(layout: str) -> None:
    model = with_trained_adapters(layout=layout)
    rows = torch.tensor(make_blocks(4)["input_ids"])
    model(rows).logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients
    for name, gradient in gradients.items():
        assert "lora_" in name
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_a_mamba_is_adapted_at_its_three_projections() -> None:
    names = {name.split(".mixer.")[1].split(".")[0] for name in parameters(with_trained_adapters()) if "lora_" in name}
    assert names == {"in_proj", "x_proj", "out_proj"}


@pytest.mark.parametrize("layout", ["mamba", "moe-mamba", "transformer"])
def test_the_merged_model_computes_what_the_adapted_one_does(layout: str, tmp_path: Path) -> None:
    model = with_trained_adapters(layout=layout)
    rows = torch.tensor(make_blocks(4)["input_ids"])
    before = parameters(model)
    whole = merged(model)
    assert parameters(whole).keys() == parameters(make_generator(layout=layout)).keys()
    assert all(parameter.requires_grad for parameter in whole.parameters())
    with torch.no_grad():
        torch.testing.assert_close(whole(rows).logits, model(rows).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(whole(rows).logits, make_generator(layout=layout)(rows).logits, atol=1e-2)
    assert all(torch.equal(before[name], value) for name, value in parameters(model).items())
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = MidiMambaForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(rows).logits, whole(rows).logits)
    if layout == "mamba":
        assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), MambaForCausalLM)
        assert "peft" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_model_without_adapters_is_saved_as_it_is() -> None:
    model = make_generator()
    assert merged(model) is model


def test_training_moves_the_adapters_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = parameters(trainer.generator)
    trainer.train()
    moved = {name for name, value in parameters(trainer.generator).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    rows = torch.tensor(make_blocks(4)["input_ids"])
    with torch.no_grad():
        adapted, whole = trainer.generator.eval()(rows).logits, trainer.generator_for_saving.eval()(rows).logits
    torch.testing.assert_close(adapted, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"estimator": "monte-carlo", "kl_coef": 0.1, "ema_decay": 0.5}])
def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    common: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_rollouts": 2,
        "rollout_positions": 2,
    }
    straight = make_trainer(tmp_path / "straight", **common, **options)
    straight.train()
    assert (tmp_path / "straight" / "checkpoint-2" / "adapter_model.safetensors").exists()
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = make_trainer(tmp_path / "resumed", **common, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    for name in ("model", "discriminator", "rollout_policy", "generator_for_saving"):
        ours, theirs = (parameters(getattr(run, name)) for run in (straight, resumed))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.parametrize("target", ["dt_proj", "conv1d", "lm_head", "embeddings", "q_proj"])
def test_adapters_without_an_effect_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=f"is {target}, but adapters have an effect on in_proj, out_proj, x_proj"):
        add_adapters(make_generator(), LoraConfig(target_modules=["in_proj", target]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "all-linear"}, "is all-linear, but"),
        ({"target_modules": []}, "is empty, but"),
        ({"modules_to_save": ["lm_head"]}, "not supported"),
        ({"target_parameters": ["mixer.A_log"]}, "not supported"),
    ],
)
def test_what_would_not_be_merged_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_adapters(make_generator(), LoraConfig(**options))


SMALL: dict[str, dict[str, Any]] = {
    "pretrain.py": {"eval_strategy": "no", "save_strategy": "no"},
    "adversarial.py": {"estimator": "terminal", "d_warmup_steps": 1, "d_filter_sizes": 2, "d_num_filters": 4},
}


def run(script: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """The exit code of a training script with adapters, in this process."""
    common: dict[str, Any] = {
        "sequence_length": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
    }
    common |= {"use_cpu": True, "use_peft": True, "disable_tqdm": True} | SMALL[script]
    flags = [f"--{name}={value}" for name, value in (common | options).items()]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        runpy.run_path(str(Path(__file__).parents[2] / "training" / script), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("script", SMALL)
def test_scripts_save_a_plain_generator(
    script: str, corpus: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(script, monkeypatch, data=corpus, model=pretrained, output_dir=out, lora_r=2) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, out))
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == {
        *("in_proj", "x_proj", "out_proj")
    }
    assert before.keys() == after.keys()
    assert json.loads((out / "training_args.json").read_text())["lora_r"] == 2
    assert not any(file.name.startswith("adapter") for file in out.iterdir())
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)  # declared as a model alone
    model, loading = loaded
    assert isinstance(model, MambaForCausalLM)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@pytest.fixture
def usual(corpus: Path, pretrained: Path, tmp_path: Path) -> dict[str, Path]:
    """Options that every script needs."""
    return {"data": corpus, "model": pretrained, "output_dir": tmp_path / "out"}


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("pretrain.py", {"lora_target_modules": "dt_proj"}, "is dt_proj, but adapters have an effect on in_proj"),
        ("adversarial.py", {"lora_target_modules": "dt_proj"}, "is dt_proj, but adapters have an effect on in_proj"),
        ("adversarial.py", {"lora_r": 0}, "`r` should be a positive integer"),
        ("pretrain.py", {"model": None}, "use_peft needs --model"),
    ],
)
def test_scripts_refuse_with_one_line(
    script: str,
    options: dict[str, Any],
    message: str,
    usual: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = {name: value for name, value in (usual | options).items() if value is not None}
    assert run(script, monkeypatch, **given) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not usual["output_dir"].exists()


def test_what_peft_is_needed_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midimamba.training.lora.is_peft_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'midimamba\[lora\]'"):
        lora_config(LoraArguments(use_peft=True))
    assert lora_config(LoraArguments()) is None
    model = make_generator()
    assert merged(model) is model
