"""Programs of two processes, and trainers whose samples do not depend on which process draws them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from midimamba.modeling import sampling
from midimamba.training import rollout
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from support import make_discriminator, make_generator
from trainer_support import PLAIN

CONFIGS = {file.stem: file for file in (Path(__file__).parents[1] / "training" / "accelerate_configs").glob("*.yaml")}
LENGTH = 8
GLOBAL_BATCH = 8


def make_blocks(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(1, 11, (count, LENGTH), generator=generator).tolist()})


def make_trainer(
    folder: Path,
    rows: int,
    kind: str = "cnn",
    peft_config: LoraConfig | None = None,
    ends: bool = False,
    shards: bool = False,
    **options: Any,
) -> AdversarialTrainer:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "sequence_length": LENGTH,
        "prompt_length": 2,
        "max_steps": 2,
        "per_device_train_batch_size": rows,
        "d_warmup_steps": 2,
        "d_learning_rate": 1e-2,
        "learning_rate": 1e-2,
        "optim": "sgd",  # whose step, unlike Adam's, shows a gradient of a wrong size
        "max_grad_norm": 0.0,
        "num_eval_samples": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    args = AdversarialConfig(**PLAIN | common | options)
    discriminator = make_discriminator(kind, dropout=0.0)
    discriminator.double()  # Adam divides by what may be tiny, and then the rounding of float32 would show
    generator = make_generator(eos_token_id=2 if ends else None, pad_token_id=0)
    blocks = make_blocks(32, 5), make_blocks(8, 6)
    return AdversarialTrainer(generator, discriminator, args, *blocks, peft_config=peft_config, shards=shards)


def draw_by_content(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """A token for each row with a number that depends on that row alone, and not on who draws it."""
    numbers = (logits.argmax(-1) * 0.618 + logits.argmin(-1) * 0.414 + 0.1) % 1
    return sampling.pick(logits / temperature, numbers[:, None])


class Blocks:
    """Draws of real music that do not depend on how the batch is spread: consecutive rows of one list."""

    def __init__(self) -> None:
        self.rows = torch.tensor(make_blocks(512, 7)["input_ids"])
        self.drawn = 0

    def __call__(self, trainer: AdversarialTrainer, count: int) -> Tensor:
        start = self.drawn + trainer.args.process_index * count
        self.drawn += trainer.args.world_size * count
        return self.rows[start : start + count]


@contextmanager
def draws_that_do_not_depend_on_processes() -> Iterator[None]:
    """Inside, samples and music are the same however a batch is spread over processes."""
    blocks = Blocks()
    with (
        patch.object(sampling, "draw", draw_by_content),
        patch.object(rollout, "draw", draw_by_content),
        patch.object(AdversarialTrainer, "draw_blocks", lambda trainer, count: blocks(trainer, count)),
    ):
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(program: str, *arguments: object) -> None:
    """Start a program as two processes, as the configuration for a CPU says, and wait for them."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS["cpu-2"])]
    command += ["--main_process_port", str(free_port()), program, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else it asks the network for this machine's name
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    except subprocess.TimeoutExpired as slow:
        pytest.fail(f"no end in sight: {(slow.stderr or b'')[-3000:]!r}")
    assert done.returncode == 0, done.stderr[-5000:]
