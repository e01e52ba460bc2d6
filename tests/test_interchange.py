"""Checkpoints travel: as a stock class where there is one, with their own code where there is none."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
)

import midimamba
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.hub_cards.publish import PUBLISHED
from midimamba.modeling import modeling_midimamba
from midimamba.modeling.configuration_midimamba import LAYOUTS
from midimamba.modeling.stock_names import plain_name
from support import make_generator

STOCK = {"mamba": MambaForCausalLM, "transformer": LlamaForCausalLM}
WITH_CODE = [layout for layout in LAYOUTS if layout not in STOCK]
MODELING = Path(modeling_midimamba.__file__).parent


def make(layout: str, **overrides: Any) -> MidiMambaForCausalLM:
    return make_generator(layout=layout, **{"num_key_value_heads": 2, "num_experts": 4} | overrides)


def tokens(batch: int = 3, time: int = 20) -> Tensor:
    """Without 0, which is padding: it is never trained in a Llama, and `generate` would take it for a mask."""
    return torch.randint(1, 11, (batch, time), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_generator_comes_back_as_it_was(layout: str, tied: bool, tmp_path: Path) -> None:
    model = make(layout, tie_word_embeddings=tied, rope_theta=500.0, layer_norm_epsilon=1e-4)
    model.save_pretrained(tmp_path / "first")
    loaded: Any = MidiMambaForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    again, report = loaded
    assert not any(report.values())
    assert again.config.layout == layout
    assert again.config.tie_word_embeddings == tied
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert_same_logits(again, model)
    again.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert {**second, "dtype": first.get("dtype")} == {**first, "dtype": first.get("dtype")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_classes_give_the_stock_class_or_ours(layout: str, tmp_path: Path) -> None:
    model = make(layout)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is STOCK.get(layout, MidiMambaForCausalLM)
    assert_same_logits(loaded, model)
    assert type(midimamba.load(str(tmp_path))) is MidiMambaForCausalLM


def test_a_mamba_is_written_as_mamba_only(tmp_path: Path) -> None:
    make("mamba").save_pretrained(tmp_path / "ours")
    MambaConfig().save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert set(ours) - {"architectures", "dtype"} == set(theirs)
    assert not list((tmp_path / "ours").glob("*.py"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_transformer_is_a_stock_llama(tied: bool, implementation: str, tmp_path: Path) -> None:
    model = make("transformer", tie_word_embeddings=tied, mlp_intermediate_size=24, rope_theta=300.0, head_dim=6)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation(implementation)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=implementation
    )
    stock, report = loaded
    assert type(stock) is LlamaForCausalLM
    assert not any(report.values())
    assert {plain_name(name) for name in stock.state_dict()} == set(model.state_dict())
    assert_same_logits(stock, model)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    mask = torch.ones_like(tokens())
    mask[0, :6] = 0
    strategies: list[dict[str, Any]] = [{}, {"num_beams": 3, "num_return_sequences": 2}]
    for strategy in strategies:
        ours, theirs = (
            cast(Tensor, generator.generate(tokens(), attention_mask=mask, **options, **strategy))
            for generator in (model, stock)
        )
        assert torch.equal(ours, theirs)
    for generator in (model, stock):
        generator.train()(tokens(), labels=tokens()).loss.backward()
    gradients = {plain_name(name): parameter for name, parameter in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4)


def test_a_transformer_rounds_as_llama_does(tmp_path: Path) -> None:
    model = make("transformer")
    model.save_pretrained(tmp_path)
    stock = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = MidiMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(tokens()).logits
        assert torch.equal(ours, stock(tokens()).logits.float())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 2, "rms_norm_eps": 1e-3},
        {"head_dim": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"max_position_embeddings": 64, "rope_parameters": None},
    ],
)
def test_any_plain_llama_is_a_generator(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    stock = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, initializer_range=0.3, **fields)).eval()
    stock.save_pretrained(tmp_path / "theirs")
    ours = midimamba.load(str(tmp_path / "theirs"))
    assert type(ours) is MidiMambaForCausalLM
    assert ours.config.layout == "transformer"
    assert_same_logits(ours, stock)
    ours.save_pretrained(tmp_path / "ours")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is LlamaForCausalLM
    assert_same_logits(again, stock)
    assert again.config.to_dict() | {"_name_or_path": ""} == {
        **AutoConfig.from_pretrained(tmp_path / "theirs").to_dict(),
        "_name_or_path": "",
    }


def test_a_llama_of_older_transformers_is_a_generator(tmp_path: Path) -> None:
    """It wrote `rope_theta` as a field of its own."""
    make("transformer", rope_theta=300.0).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps({**config, "rope_theta": 300.0, "rope_scaling": None, "torch_dtype": "float32"}))
    assert_same_logits(midimamba.load(str(tmp_path)), make("transformer", rope_theta=300.0))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "rope_type='linear'",
        ),
    ],
)
def test_a_llama_with_other_parts_is_refused(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    LlamaConfig(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a Llama with {reason}, which the transformer layout cannot compute"):
        MidiMambaConfig.from_pretrained(tmp_path)


GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STRATEGIES: list[dict[str, Any]] = [{}, {"num_beams": 2}]
# What a process does in which midimamba is not installed. It is given how to generate, and folders.
ALONE = """
import json, sys, torch
sys.modules["midimamba"] = None  # an import now raises
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    ids = torch.load(folder + "/ids.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids).logits
    generated = [model.generate(ids, **options) for options in json.loads(sys.argv[1])]
    torch.save([logits, *generated], folder + "/results.pt")
    model.save_pretrained(folder + "/again")
"""


@pytest.mark.slow
def test_generators_load_where_this_package_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    models = {tmp_path / layout: make(layout) for layout in LAYOUTS}
    for folder, model in models.items():
        model.save_pretrained(folder)
        torch.save(tokens(), folder / "ids.pt")
    options = json.dumps([GREEDY | strategy for strategy in STRATEGIES])
    command = [sys.executable, "-c", ALONE, options, *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, model in models.items():
        logits, *generated = torch.load(folder / "results.pt", weights_only=True)
        with torch.no_grad():
            assert (model(tokens()).logits - logits).abs().max() < 1e-5, folder.name
        for theirs, strategy in zip(generated, STRATEGIES, strict=True):
            ours = model.generate(tokens(), **GREEDY, **strategy)
            assert isinstance(ours, Tensor)
            assert torch.equal(theirs, ours), f"{folder.name} with {strategy}"
        # What the exported code writes is as good as what it was read from.
        assert_same_logits(midimamba.load(str(folder / "again")), model)
        assert {file.name for file in folder.glob("*.py")} == {file.name for file in (folder / "again").glob("*.py")}


@pytest.mark.parametrize("layout", WITH_CODE)
def test_exported_code_is_whole_and_published(layout: str, tmp_path: Path) -> None:
    make(layout).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_midimamba.MidiMambaConfig",
        "AutoModelForCausalLM": "modeling_midimamba.MidiMambaForCausalLM",
    }
    exported = {file.name for file in tmp_path.glob("*.py")}
    assert exported <= set(PUBLISHED)
    for name in exported:
        text = (tmp_path / name).read_text()
        assert text == (MODELING / name).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in exported, f"{name} imports {node.module}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokenizer_and_processor_do_not_mind_the_layout(layout: str, processor: MidiProcessor, tmp_path: Path) -> None:
    make(layout, vocab_size=processor.vocab_size).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    text = processor.tokenizer.decode(list(range(3, 40)))
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == processor.tokenizer(text).input_ids
    assert type(midimamba.load(str(tmp_path))) is MidiMambaForCausalLM


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_resumes_from_a_checkpoint(layout: str, tmp_path: Path) -> None:
    """`Trainer` reads the weights by the names of the modules: files must have these."""
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]

    def train(steps: int, resume: bool) -> MidiMambaForCausalLM:
        model = make(layout)
        options: dict[str, Any] = {
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "save_steps": 2,
            "seed": 3,
        }
        arguments = TrainingArguments(str(tmp_path), max_steps=steps, lr_scheduler_type="constant", **options)
        Trainer(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return model.eval()

    whole = train(4, resume=False)
    (tmp_path / "checkpoint-4").rename(tmp_path / "done")
    assert_same_logits(train(4, resume=True), whole)
