"""Sampling defaults travel with a model: everything that samples reads the same ones, and options win over them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import SamplingOptions
from midimamba.errors import InputError
from midimamba.generation import generate_samples, generate_scores
from midimamba.result_options import EvaluateOptions
from midimamba.tokenization.sampling_limits import SAMPLING_DEFAULTS, complete_sampling, give_sampling_defaults
from midimamba.training.lora import add_adapters, merged
from support import command, make_generator
from trainer_support import make_trainer, parameters

OWN = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 40}
BOS = torch.ones(1, 1, dtype=torch.long)


@pytest.fixture
def model(processor: MidiProcessor) -> MidiMambaForCausalLM:
    """With defaults of its own."""
    model = make_generator(vocab_size=processor.vocab_size)
    model.generation_config.update(**OWN)
    return model


@pytest.fixture
def folder(model: MidiMambaForCausalLM, processor: MidiProcessor, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How `generate` samples, call by call: its options on top of the model's own."""
    seen: list[dict[str, Any]] = []
    generate = MidiMambaForCausalLM.generate

    def spy(self: MidiMambaForCausalLM, *inputs: Any, **options: Any) -> Any:
        config, _ = self._prepare_generation_config(None, **options)
        seen.append({name: getattr(config, name) for name in SAMPLING_DEFAULTS})
        return generate(self, *inputs, **options)

    monkeypatch.setattr(MidiMambaForCausalLM, "generate", spy)
    return seen


def test_plain_generate_of_a_stock_load_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_generator(eos_token_id=None)
    give_sampling_defaults(model.generation_config)
    model.generation_config.update(temperature=0.8, max_new_tokens=24)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved[name] for name in SAMPLING_DEFAULTS} == SAMPLING_DEFAULTS | {
        "temperature": 0.8,
        "max_new_tokens": 24,
    }
    assert (saved["bos_token_id"], saved["pad_token_id"]) == (1, 0)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock).__name__ == "MambaForCausalLM"

    def draw(seed: int, **options: Any) -> list[int]:
        torch.manual_seed(seed)
        ids: list[int] = stock.generate(BOS, **options)[0].tolist()
        return ids

    explicit = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_new_tokens": 24}
    assert draw(0) == draw(0, **explicit) != draw(1)
    assert len(draw(0)) == 25
    assert not [record for record in caplog.records if "generation" in record.message]


def test_training_adds_what_a_model_lacks_and_keeps_what_it_has() -> None:
    config = GenerationConfig(do_sample=False, max_new_tokens=99)
    give_sampling_defaults(config)
    assert {name: getattr(config, name) for name in SAMPLING_DEFAULTS} == SAMPLING_DEFAULTS | {"max_new_tokens": 99}


def test_pipeline_and_command_read_the_models_own(
    folder: Path, tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(monkeypatch, "generate", folder, "--bars", 1, "--num", 1, "--out", tmp_path / "out") == 0
    compose: Any = pipeline("midi-generation", model=str(folder), device="cpu")  # type: ignore[call-overload]
    compose(None, bars=1)
    assert asked == [OWN, OWN]
    flags = ("--temperature", 0.5, "--top-p", 0.8, "--max-new-tokens", 30)
    assert command(monkeypatch, "generate", folder, "--bars", 1, "--num", 1, *flags, "--out", tmp_path / "b") == 0
    chosen = {"temperature": 0.5, "top_p": 0.8, "max_new_tokens": 30}
    compose(None, bars=1, **chosen)
    compose(None, bars=1, generation_config=GenerationConfig(**chosen, do_sample=True))
    assert asked[2:] == [OWN | chosen] * 3
    compose(None, bars=1, max_length=20)
    assert asked[-1] == OWN | {"max_new_tokens": None}


def test_a_model_without_any_is_sampled_as_before(processor: MidiProcessor, asked: list[dict[str, Any]]) -> None:
    model = make_generator(vocab_size=processor.vocab_size)
    generate_scores(model, processor, SamplingOptions(num=1, bars=1))
    processor.compose(model, processor(None, return_tensors="pt"), bars=1)
    expected = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 2048}
    assert asked == [expected] * 2


def test_an_evaluation_measures_the_models_own_distribution(
    model: MidiMambaForCausalLM, processor: MidiProcessor, asked: list[dict[str, Any]]
) -> None:
    options = EvaluateOptions("model", "corpus", Path("report.json"), bars=1, num=5, max_new_tokens=30)
    generate_samples(model, processor, options.sampling)
    assert asked == [{"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 30}]


@pytest.mark.parametrize(
    ("default", "reason"),
    [
        (("temperature", float("nan")), "temperature is nan: give a number from 0.001 to 1000"),
        (("temperature", -1), "temperature is -1: give a number"),
        (("temperature", "warm"), "temperature is 'warm', not a number"),
        (("top_p", 1.5), "top_p is 1.5: give a number above 0"),
        (("top_k", -3), "top_k is -3: give at least 0"),
        (("max_new_tokens", -3), "max_new_tokens is -3: give at least 16"),
    ],
)
def test_bad_defaults_are_one_clear_line(
    default: tuple[str, Any],
    reason: str,
    folder: Path,
    tmp_path: Path,
    processor: MidiProcessor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, value = default
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    assert command(monkeypatch, "generate", folder, "--out", tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{file}: {reason}" in line
    assert "remove the line" in line
    assert not (tmp_path / "out").exists()

    model = make_generator(vocab_size=processor.vocab_size)  # a pipeline loads models in transformers' way
    setattr(model.generation_config, name, value)
    with pytest.raises(InputError, match=f"generation_config.json: {name} is .* or remove the line"):
        processor.compose(model, processor(None, return_tensors="pt"), bars=1)


def test_an_option_heals_a_bad_default() -> None:
    config = GenerationConfig(do_sample=True)
    config.temperature = float("nan")
    assert complete_sampling(config, {"temperature": 0.9})["temperature"] == 0.9


def test_greedy_choices_need_no_sampling_options(model: MidiMambaForCausalLM) -> None:
    greedy = complete_sampling(model.generation_config, {"do_sample": False, "temperature": None})
    assert greedy == {"do_sample": False, "max_new_tokens": 40}


def test_tuning_keeps_them_and_is_not_changed_by_them(tmp_path: Path) -> None:
    tuned = []
    for name, own in (("with", {**OWN, "max_new_tokens": 20}), ("without", {})):
        generator = make_generator(eos_token_id=None)
        generator.generation_config.update(**own)
        trainer = make_trainer(tmp_path / name, generator=generator, max_steps=2, ema_decay=0.5)
        trainer.train()
        tuned.append(parameters(trainer.generator_for_saving))
        kept = trainer.generator_for_saving.generation_config
        assert all(getattr(kept, option) == value for option, value in own.items())
    assert all(torch.equal(tuned[0][name], tuned[1][name]) for name in tuned[0])


def test_merged_adapters_keep_them() -> None:
    peft = pytest.importorskip("peft")
    generator = make_generator()
    generator.generation_config.update(**OWN)
    adapted: Any = add_adapters(generator, peft.LoraConfig(task_type="CAUSAL_LM"))
    whole = merged(adapted.get_base_model())
    assert all(getattr(whole.generation_config, name) == value for name, value in OWN.items())
