"""Pre-training: which model the options make, and that every layout learns."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import midimamba
from midimamba import MidiProcessor
from midimamba.errors import InputError
from midimamba.modeling.configuration_midimamba import LAYOUTS
from midimamba.training.pretrain import PretrainArguments, new_config

SCRIPT = Path(__file__).parents[2] / "training" / "pretrain.py"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_named_size_makes_the_model_of_that_size(layout: str, processor: MidiProcessor) -> None:
    config = new_config(PretrainArguments("data", layout=layout, size="tiny", hidden_size=512), processor)
    assert (config.layout, config.hidden_size) == (layout, 128)
    assert config.num_hidden_layers == (4 if layout in ("mamba", "hybrid") else 2)
    assert config.vocab_size == processor.vocab_size


def test_without_a_named_size_the_sizes_are_as_given(processor: MidiProcessor) -> None:
    arguments = PretrainArguments("data", layout="mamba-mlp", hidden_size=48, num_hidden_layers=3, state_size=5)
    config = new_config(arguments, processor)
    assert (config.hidden_size, config.num_hidden_layers, config.state_size) == (48, 3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "mambo"}, "layout 'mambo' is unknown; use one of mamba, mamba-mlp"),
        ({"layout": "mambo", "size": "tiny"}, "layout 'mambo' is unknown; use one of mamba, mamba-mlp"),
        ({"size": "huge"}, "size 'huge' is unknown; use one of tiny"),
        ({"layout": "transformer", "hidden_size": 30}, r"num_attention_heads \(4\) must divide hidden_size \(30\)"),
    ],
)
def test_an_impossible_model_is_refused_in_one_line(
    options: dict[str, Any], message: str, processor: MidiProcessor
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        new_config(PretrainArguments("data", **options), processor)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("learning_rate", "nan", "learning_rate is nan, but must be at least 0"),
        ("learning_rate", "inf", "learning_rate is inf, but must be at least 0"),
        ("weight_decay", -1, "weight_decay is -1.0, but must be at least 0"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size is 0, but must be at least 1"),
        ("num_train_epochs", -1, "num_train_epochs is -1.0, but must be greater than 0"),
        ("max_steps", 0, "max_steps is 0, but must be -1, for any, or at least 1"),
        ("save_steps", 0, "save_steps is 0.0, but must be greater than 0"),
        ("save_total_limit", 0, "save_total_limit is 0, but must be at least 1"),
        ("seed", -1, "seed is -1, but must be in"),
        ("sequence_length", 1, "sequence_length is 1, but must be at least 2"),
        ("adam_beta1", 1, "adam_beta1 is 1.0, but must be in"),
        ("save_only_model", True, "checkpoints that cannot be resumed"),
        ("resume_from_checkpoint", "false", "resume_from_checkpoint false says nothing"),
    ],
)
def test_impossible_options_are_refused_before_any_work(
    option: str,
    value: object,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = ["--data", "nowhere", "--output_dir", str(tmp_path / "out"), "--use_cpu", f"--{option}", str(value)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2
    assert len(said) == 1
    assert message in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["moe-mamba", "transformer"])
def test_pretraining_learns_and_writes_what_loads(
    layout: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data": corpus, "output_dir": tmp_path / "model", "layout": layout, "hidden_size": 16}
    options |= {"num_hidden_layers": 1, "sequence_length": 32, "max_steps": 12, "learning_rate": 0.02, "use_cpu": True}
    options |= {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 4, "save_strategy": "no"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    history = json.loads((tmp_path / "model" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    model = midimamba.load(str(tmp_path / "model"))
    assert model.config.layout == layout
    assert bool(list((tmp_path / "model").glob("modeling_*.py"))) == (layout == "moe-mamba")
