"""Two processes give the update of one, and none of them waits for another for ever.

This file is also the program that those processes run: `python test_distributed.py OUT ROWS_PER_PROCESS`.
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from distributed_support import (
    CONFIGS,
    GLOBAL_BATCH,
    draws_that_do_not_depend_on_processes,
    launch,
    make_trainer,
)
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.process import training_process

pytestmark = pytest.mark.slow  # most tests here need two more processes

# Every statistic over a batch that a process could take over its own part by mistake.
CASES: dict[str, dict[str, Any]] = {
    "leave-one-out": {"estimator": "terminal", "d_epochs": 2, "r1_weight": 0.1, "label_smoothing": 0.1},
    "group": {"estimator": "terminal", "group_size": 2, "advantage_clip": 0.5},
    "running": {"baseline": "running", "num_rollouts": 2, "rollout_positions": 2, "rollout_momentum": 0.5},
    "ppo with kl": {
        **{"estimator": "terminal", "ppo_epochs": 2, "ppo_clip": 0.2, "kl_coef": 0.5, "kl_target": 0.001},
        **{"entropy_coef": 0.01, "ema_decay": 0.5, "micro_batch_size": 2},
    },
    "skipping": {"estimator": "terminal", "d_warmup_steps": 60, "d_max_accuracy": 0.8},
    "dense": {"estimator": "dense", "kind": "mamba", "micro_batch_size": 1},
    "adapters": {"estimator": "terminal", "peft_config": LoraConfig(r=2), "kl_coef": 0.5},
    # Calibrated on the samples of all, whose weights have mean 1 over all.
    "distillation": {
        **{"estimator": "distill", "reward": "log-odds", "temperature": 0.8, "ppo_epochs": 2, "micro_batch_size": 2},
        **{"d_warmup_steps": 10},
    },
    # Sequences of different lengths, which count by their tokens in a discriminator of prefixes.
    "ends": {"estimator": "dense", "kind": "mamba", "ends": True, "micro_batch_size": 1, "ppo_clip": 0.2},
}


def work(out: Path, rows: int) -> None:
    """Train all cases and save what becomes of both networks, and what was logged."""
    for name, options in CASES.items():
        with draws_that_do_not_depend_on_processes():
            trainer = make_trainer(out, rows, **options)
            trainer.train()
        if trainer.is_world_process_zero():
            networks = {"g": trainer.generator, "d": trainer.accelerator.unwrap_model(trainer.discriminator)}
            state = {f"{key}.{n}": p.data for key, net in networks.items() for n, p in net.named_parameters()}
            for step, log in enumerate(trainer.state.log_history[:-1]):
                state |= {f"log.{step}.{key}": torch.tensor(float(value)) for key, value in log.items()}
            save_file(state, out / f"{name}.safetensors")
    # Random draws of their own: other data on each process, whose accuracies disagree.
    saving: dict[str, Any] = {"replay_fraction": 0.5, "save_strategy": "steps", "save_steps": 6, "max_steps": 12}
    trainer = make_trainer(out / "own", rows, **CASES["skipping"] | saving)
    trainer.train()
    logged = [log["d_skipped"] for log in trainer.state.log_history if "d_skipped" in log]
    skipped = logged[1:]  # the first is an average over the warm-up as well
    (out / f"skipped-{trainer.args.process_index}").write_text(" ".join(map(str, skipped)))
    (out / f"weights-{trainer.args.process_index}").write_text(str(sum_of_weights(trainer)))


def sum_of_weights(trainer: AdversarialTrainer) -> list[float]:
    networks = trainer.generator, trainer.accelerator.unwrap_model(trainer.discriminator)
    return [parameter.double().sum().item() for network in networks for parameter in network.parameters()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of one process, which is this one, and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    work(one, GLOBAL_BATCH)
    launch(__file__, two, GLOBAL_BATCH // 2)
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_update_of_one(case: str, runs: tuple[Path, Path]) -> None:
    one, two = (load_file(run / f"{case}.safetensors") for run in runs)
    assert one.keys() == two.keys()
    start = make_trainer(runs[0], GLOBAL_BATCH, **CASES[case])
    for network, before in (("g", start.generator), ("d", start.discriminator)):
        apart = [(one[f"{network}.{name}"] - parameter).abs().max() for name, parameter in before.named_parameters()]
        assert max(apart) > 1e-3
    exact = ("reward", "advantage_std", "d_accuracy", "d_loss", "kl", "kl_coef", "loss", "d_auc")
    for key in one:
        if not key.startswith("log."):
            torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=0, msg=partial("{}: {}".format, key))
        elif key.rpartition(".")[2] in exact:
            torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-5, msg=partial("{}: {}".format, key))


def test_processes_agree_on_what_to_skip_although_their_music_differs(runs: tuple[Path, Path]) -> None:
    skipped = [(runs[1] / f"skipped-{index}").read_text() for index in (0, 1)]
    assert skipped[0] == skipped[1]
    assert {"0.0", "1.0"} == set(skipped[0].split())
    assert (runs[1] / "weights-0").read_text() == (runs[1] / "weights-1").read_text()


def test_every_process_saves_its_own_memory_and_only_one_the_networks(runs: tuple[Path, Path]) -> None:
    checkpoint = runs[1] / "own" / "checkpoint-12"
    memories = [load_file(checkpoint / f"replay_{index}.safetensors")["input_ids"] for index in (0, 1)]
    assert not torch.equal(*memories)
    written = {file.name for file in checkpoint.iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "discriminator.safetensors"} <= written
    assert not any("unfinished" in name for name in written)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_are_accelerates_own(name: str) -> None:
    file = CONFIGS[name]
    loaded = load_config_from_file(str(file))
    machines, _, processes = name.rpartition("-")[2].rpartition("x")
    assert loaded.num_machines == int(machines or 1)
    assert loaded.num_processes == loaded.num_machines * int(processes)
    assert loaded.use_cpu == name.startswith("cpu")
    assert loaded.mixed_precision == ("no" if loaded.use_cpu else "bf16")
    # The header's command names this file, and a recipe and a script that are there.
    command = re.findall(r"training/\S+", file.read_text())
    assert command[0] == f"training/accelerate_configs/{file.name}"
    assert all((file.parents[2] / path).exists() for path in command)


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_accelerates_own_sharding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: str) -> None:
    create = AdversarialTrainer.create_accelerator_and_postprocess

    def sharded(trainer: AdversarialTrainer) -> None:
        create(trainer)
        setattr(trainer, sharding, True)

    monkeypatch.setattr(AdversarialTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="accelerate's FSDP and DeepSpeed fit no other number of processes: use"):
        make_trainer(tmp_path, 4)


if __name__ == "__main__":
    with training_process():  # like the scripts: torch's own end of a process group aborts now and then
        work(Path(sys.argv[1]), int(sys.argv[2]))
