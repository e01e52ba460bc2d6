"""Adversarial training as a user would start it: a recipe with other options, by the script, in its own process."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

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


def train(recipe: dict[str, Any], output: Path) -> Trained:
    """Run `training/adversarial.py` on one thread. An option that is `None` is unset, whatever its default is.

    Args:
        recipe (`dict[str, Any]`): all options but `output_dir`.
        output (`Path`): folder of the generator; that of the discriminator, a configuration and a log stand beside it.
    """
    forget(output)  # of an interrupted run: later checkpoints outlive earlier ones
    options = {**recipe, "output_dir": str(output), "disable_tqdm": True}
    config, log = output.with_suffix(".yaml"), output.with_suffix(".log")
    config.write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", "midimamba.training.adversarial", "--config", str(config)]
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
    for folder in (output, Path(f"{output}-discriminator")):
        shutil.rmtree(folder, ignore_errors=True)
