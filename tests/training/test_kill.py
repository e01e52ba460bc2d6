"""A run that is killed at any moment, resumed until it is finished, is the run that was never killed."""

import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

STEPS = 12


def run(folder: Path) -> None:
    """Train to the end, or go on where a killed process left off; all stabilisers on."""
    torch.set_num_threads(1)
    from midimamba.training.resume import find_resume_point
    from trainer_support import ALL_STABILISERS, make_trainer

    saving: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "steps",
    }
    options: dict[str, Any] = saving | {
        "max_steps": STEPS,
        "eval_steps": 1,
        "max_nll_drift": 100.0,
        "resume_from_checkpoint": "true",
    }
    trainer = make_trainer(folder / "run", **ALL_STABILISERS, **options)
    trainer.train(resume_from_checkpoint=find_resume_point(trainer.args))
    networks = {"generator": trainer.generator, "discriminator": trainer.discriminator}
    networks |= trainer.adversarial_state.policies
    weights = {f"{key}.{name}": p.detach().clone() for key, n in networks.items() for name, p in n.named_parameters()}
    save_file(weights, folder / "weights.safetensors")


def half_written(folder: Path, known: set[str]) -> bool:
    """Whether a checkpoint that was not known is being written."""
    found = {path.name for path in (folder / "run").glob("checkpoint-*") if not (path / "trainer_state.json").exists()}
    return bool(found - known)


def start(target: Callable[..., None], *arguments: object) -> ForkServerProcess:
    # The server imports torch and transformers once; every run is forked from it, before anything has been computed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["midimamba.training.adversarial_trainer", "midimamba.training.scripts"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.slow
def test_killed_runs_end_bitwise_as_the_others(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    start(time.sleep, 0).join(120)  # until the server has imported everything
    begin = time.monotonic()
    straight = start(run, tmp_path / "straight")
    straight.join(120)
    duration = time.monotonic() - begin
    assert straight.exitcode == 0
    rng = random.Random(0)
    killed = tmp_path / "killed"
    killed.mkdir()
    kills, in_a_save = 0, 0
    while not (killed / "weights.safetensors").exists():
        may_kill = kills < (6 if in_a_save else 20)
        process = start(run, killed)
        known = {path.name for path in (killed / "run").glob("checkpoint-*")}
        deadline = time.monotonic() + rng.uniform(0.1, 0.6) * duration
        while process.is_alive() and may_kill:
            # Every other time in the middle of a save, a few milliseconds after it began.
            if kills % 2 and half_written(killed, known) and rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.01))
                break
            if not kills % 2 and time.monotonic() > deadline:
                break
            time.sleep(0.001)
        if may_kill and process.is_alive():
            process.kill()
            kills += 1
            process.join()
            in_a_save += half_written(killed, known)
        process.join(120)
        assert process.exitcode in (0, -9)
    sys.stdout.write(f"killed {kills} times, {in_a_save} times in a save; a run takes {duration:.1f} s\n")
    assert kills >= 3
    assert in_a_save
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("straight", "killed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
