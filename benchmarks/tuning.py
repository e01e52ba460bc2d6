"""Training in benchmarks: adversarial as a user would start it, by the script in its own process, with a recipe and
other options; and likelihood until a clock ends it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import TrainingArguments

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
# A reward that knows nothing needs no discriminator: it is trained as little as the options allow. A constant one
# needs no roll-outs either: all action values are the same however they are estimated.
RANDOM: dict[str, Any] = {"reward": "random", "d_warmup_steps": 0, "d_steps": 1, "d_epochs": 1}
CONSTANT: dict[str, Any] = {**RANDOM, "reward": "constant", "estimator": "terminal"}


class Trained(NamedTuple):
    """
    Args:
        failed (`bool`): whether the script ended with an error.
        printed (`str`): the end of what it printed.
        seconds, cpu_seconds (`float`): of the clock, and of processors.
    """

    failed: bool
    printed: str
    seconds: float
    cpu_seconds: float


def read_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe in training/recipes."""
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return recipe


def option(text: str) -> Any:
    """The value that the text of an option stands for. YAML reads `2e-4` as a string."""
    try:
        return float(text) if "e" in text else json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def train(recipe: dict[str, Any], output: Path, script: str = "adversarial") -> Trained:
    """Run a training script on one thread. An option that is `None` is unset, whatever its default is.

    Args:
        recipe (`dict[str, Any]`): all options but `output_dir`.
        output (`Path`): folder of the generator; those of discriminators, a configuration and a log stand beside it.
        script (`str`, *optional*, defaults to `"adversarial"`): or `"pretrain"`.
    """
    forget(output)  # of an interrupted run: later checkpoints outlive earlier ones
    options = {**recipe, "output_dir": str(output), "disable_tqdm": True}
    config, log = output.with_suffix(".yaml"), output.with_suffix(".log")
    config.write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", f"midimamba.training.{script}", "--config", str(config)]
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    trained = Trained(
        status != 0, log.read_text()[-2000:], time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    )
    config.unlink()
    log.unlink()
    return trained


def forget(output: Path) -> None:
    """Delete the networks of a run."""
    for folder in (output, Path(f"{output}-discriminator"), Path(f"{output}-musical-discriminator")):
        shutil.rmtree(folder, ignore_errors=True)


def timed_arguments(output: str | Path, **options: Any) -> TrainingArguments:
    """Options of a `Trainer` that a clock ends, evaluates and lets save: the weights that were best are kept.

    Args:
        output (`str` or `Path`): the folder of its checkpoints.
        options: others of its options.
    """
    return TrainingArguments(
        output_dir=str(output),
        max_steps=1_000_000,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1_000_000,
        save_steps=1_000_000,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        **options,
    )
