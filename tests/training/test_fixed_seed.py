"""The losses of one run, committed: a change that means to change nothing must leave them as they are.

After a change that means to, write them anew: `python tests/training/test_fixed_seed.py`.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from midimamba.modeling.selective_scan import choose_backend
from trainer_support import ALL_STABILISERS, make_trainer

COMMITTED = Path(__file__).with_name("fixed_seed_losses.json")


def machine() -> str:
    """What rounding depends on: the libraries, and the processor that they choose instructions for."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        named = {name.strip(): value.strip() for name, value in fields.items()}
        processor = " ".join(named.get(name, "?") for name in ("vendor_id", "cpu family", "model"))
    return f"torch {torch.__version__}, {processor}, scan {choose_backend('cpu')}"


def losses(folder: Path) -> list[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = make_trainer(folder, **ALL_STABILISERS, max_steps=6)
        trainer.train()
    finally:
        torch.set_num_threads(threads)
    return [repr(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def test_the_losses_are_the_committed_ones(tmp_path: Path) -> None:
    committed = json.loads(COMMITTED.read_text())
    ours = losses(tmp_path)
    if committed["machine"] == machine():
        sys.stdout.write("compared bit for bit\n")
        assert ours == committed["losses"]
    else:
        sys.stdout.write(f"compared to 1e-4: committed on {committed['machine']}, this is {machine()}\n")
        assert list(map(float, ours)) == pytest.approx(list(map(float, committed["losses"])), rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        COMMITTED.write_text(json.dumps({"machine": machine(), "losses": losses(Path(scratch))}, indent=2) + "\n")
