"""`--push_to_hub` of the training scripts: one upload at the end, checked before training."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

from midimamba.errors import InputError
from midimamba.hub_cards.publish import DISCRIMINATORS
from midimamba.training.publishing import publish_run, take_over_push
from support import teach

from .fake_hub import FakeHub

TRAINING = Path(__file__).parents[2] / "training"


def arguments(folder: Path, **options: object) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_pretraining_pushes_once_and_only_what_users_load(
    online: FakeHub, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        **{"data": corpus, "output_dir": tmp_path / "model", "hidden_size": 16, "num_hidden_layers": 1},
        **{"sequence_length": 32, "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
        **{"eval_steps": 1, "save_steps": 1, "logging_steps": 1, "push_to_hub": True, "hub_model_id": "you/tiny"},
        **{"hub_token": "hf_ofTheUserWhoPublishes", "hub_private_repo": True},
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(TRAINING / "recipes/chorales-cpu.yaml"), *flags])
    runpy.run_path(str(TRAINING / "pretrain.py"), run_name="__main__")
    assert online.created == online.commits == ["you/tiny"]
    assert online.private == {"you/tiny"}
    files = online.repositories["you/tiny"]
    assert {"model.safetensors", "config.json", "miditok.json", "README.md"} <= set(files)
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    assert not any(b"hf_ofTheUserWhoPublishes" in content for content in files.values())
    assert "hub_token" not in json.loads(files["training_args.json"])
    record = json.loads(files["training_run.json"])
    assert record["steps"] == 2
    assert record["command"].startswith("accelerate launch -m midimamba.training.pretrain --config chorales-cpu.yaml")
    assert "hub_token" not in record["command"]
    assert not any(str(tmp_path).encode() in content for content in files.values())
    card = files["README.md"].decode()
    assert f"Trained for 2 steps in {record['seconds']} seconds on " in card


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 0])
def test_tuning_pushes_both_discriminators(
    online: FakeHub, corpus: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    options = {
        **{"model": teach(pretrained, corpus, tmp_path / "taught"), "data": corpus, "output_dir": tmp_path / "tuned"},
        **{"use_cpu": True, "max_steps": rounds},
        **{"sequence_length": 48, "bars": 2, "per_device_train_batch_size": 12, "mini_batch_size": 4},
        **{"d_lookback_bars": 1, "d_hidden_size": 16, "d_num_hidden_layers": 1, "d_epochs": 1, "d_warmup_steps": 1},
        **{"num_eval_samples": 4, "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False},
        **{"push_to_hub": True, "hub_model_id": "you/tuned"},
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    recipe = str(TRAINING / "recipes/distill-adversarial.yaml")
    monkeypatch.setattr(sys, "argv", ["adversarial.py", "--config", recipe, *flags])
    runpy.run_path(str(TRAINING / "adversarial.py"), run_name="__main__")
    names = ["you/tuned-discriminator", "you/tuned-musical-discriminator"]
    assert online.commits == ["you/tuned", *names]
    for name, kind in zip(names, ("midimamba-discriminator", "midimamba-musical-discriminator"), strict=True):
        files = online.repositories[name]
        assert json.loads(files["config.json"])["model_type"] == kind
        assert json.loads(files["training_args.json"])["musical_discriminator"] is True
    card = online.repositories["you/tuned"]["README.md"].decode()
    assert f"midimamba generate you/tuned --discriminator {' '.join(names)} --best-of 8" in card
    assert ("it learned from samples of its own" in card) == bool(rounds)
    assert "SeqGAN" not in card


def test_a_push_that_cannot_work_is_refused_before_training(online: FakeHub, tmp_path: Path) -> None:
    assert not take_over_push(arguments(tmp_path / "model"))
    args = arguments(tmp_path / "model", push_to_hub=True)
    assert take_over_push(args, DISCRIMINATORS)
    assert not args.push_to_hub
    with pytest.raises(InputError, match="cannot be the name"):
        take_over_push(arguments(tmp_path / "my model", push_to_hub=True))
    # Long enough that only one of the three names is too long: that of the discriminator of musical features.
    almost = arguments(tmp_path / ("x" * 80), push_to_hub=True)
    assert take_over_push(almost, DISCRIMINATORS[:1])
    almost.push_to_hub = True
    with pytest.raises(InputError, match="x-musical-discriminator' cannot be the name"):
        take_over_push(almost, DISCRIMINATORS)
    online.role = "read"
    with pytest.raises(InputError, match="may only read"):
        take_over_push(arguments(tmp_path / "model", push_to_hub=True))
    assert not online.created


def test_a_hub_out_of_reach_leaves_the_run_as_it_is(online: FakeHub, pretrained: Path) -> None:
    online.faults["."] = 503
    before = {file.name: file.read_bytes() for file in pretrained.iterdir()}
    with pytest.raises(InputError, match="the Hub answers 503"):
        publish_run(arguments(pretrained, push_to_hub=True, hub_model_id="you/x"), pretrained)
    assert {file.name: file.read_bytes() for file in pretrained.iterdir()} == before
