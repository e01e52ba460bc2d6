"""The losses of some runs, committed: a change that is not meant to change them must leave every bit as it is.

After a change that is meant to, write them again: `python tests/training/test_fixed_seed.py`.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from midimamba.corpus.packing import BlockCollator
from midimamba.modeling.selective_scan import choose_backend
from support import make_generator
from trainer_support import ALL_STABILISERS, make_blocks, make_trainer

COMMITTED = Path(__file__).with_name("fixed_seed_losses.json")
ADVERSARIAL: dict[str, dict[str, Any]] = {
    "all stabilisers": ALL_STABILISERS,
    "mamba judge": {"kind": "mamba", "kl_coef": 0.1, "kl_target": 0.01, "ppo_epochs": 2, "ppo_clip": 0.2},
    "sequences that end": {"kind": "mamba", "generator": {"eos_token_id": 2}, "label_smoothing": 0.1},
    "dense log-odds": {"kind": "mamba", "estimator": "dense", "reward": "log-odds"},
    "terminal in groups": {"estimator": "terminal", "group_size": 2},
    "random reward": {"reward": "random"},
    "transformer": {"generator": {"eos_token_id": None, "layout": "transformer"}, "ema_decay": 0.5, "d_epochs": 2},
    "every action, no baseline": {
        **{"rollout_positions": None, "baseline": "none", "normalize_advantages": False, "mle_weight": 0.0},
    },
}
PRETRAINING = ("mamba", "moe-mamba", "transformer")


def machine() -> str:
    """What rounding depends on: the libraries, and the processor that they choose instructions for."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        named = {name.strip(): value.strip() for name, value in fields.items()}
        processor = " ".join(named.get(name, "?") for name in ("vendor_id", "cpu family", "model"))
    return f"torch {torch.__version__}, {processor}, scan {choose_backend('cpu')}"


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def logged(trainer: Trainer) -> list[str]:
    with one_thread():
        trainer.train()
    return [repr(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def adversarial(arm: str, folder: Path) -> list[str]:
    options = ADVERSARIAL[arm] | {"max_steps": 6}
    shape = options.pop("generator", {"eos_token_id": None})
    return logged(make_trainer(folder, generator=make_generator(**shape), **options))


def pretraining(layout: str, folder: Path) -> list[str]:
    shape: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "seed": 3,
    }
    args = TrainingArguments(str(folder), **shape, save_strategy="no", disable_tqdm=True, use_cpu=True)
    model = make_generator(layout=layout)
    return logged(Trainer(model, args, BlockCollator(model.config.bos_token_id), make_blocks()))


def compare(ours: list[str], name: str) -> None:
    committed = json.loads(COMMITTED.read_text())
    if committed["machine"] == machine():
        sys.stdout.write("compared bit for bit\n")
        assert ours == committed["losses"][name]
    else:
        sys.stdout.write(f"compared to 1e-4: committed on {committed['machine']}, this is {machine()}\n")
        assert list(map(float, ours)) == pytest.approx(list(map(float, committed["losses"][name])), rel=1e-4)


@pytest.mark.parametrize("arm", ADVERSARIAL)
def test_the_losses_of_tuning_are_the_committed_ones(arm: str, tmp_path: Path) -> None:
    compare(adversarial(arm, tmp_path), arm)


@pytest.mark.parametrize("layout", PRETRAINING)
def test_the_losses_of_pretraining_are_the_committed_ones(layout: str, tmp_path: Path) -> None:
    compare(pretraining(layout, tmp_path), f"pretrain {layout}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {arm: adversarial(arm, Path(scratch) / arm) for arm in ADVERSARIAL}
        found |= {f"pretrain {layout}": pretraining(layout, Path(scratch) / layout) for layout in PRETRAINING}
    COMMITTED.write_text(json.dumps({"machine": machine(), "losses": found}, indent=2) + "\n")
