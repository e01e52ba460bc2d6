"""What a run leaves for its card: how it was started, on what, and how long it took."""

import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

RECORD_FILE = "training_run.json"
_SECRET = re.compile(r"--\w*(?:token|password|secret|api_?key)\b", re.IGNORECASE)
_VERSIONS = ("midimamba", "torch", "transformers", "miditok")


def run_record(line: Sequence[str], state: TrainerState) -> dict[str, Any]:
    """
    What `training_run.json` holds.

    Args:
        line (`Sequence[str]`): `sys.argv` of the training script.
        state (`TrainerState`): of the trainer, whose training has ended.

    Returns:
        `dict`: `command`, without secrets and without folders of this machine; `hardware`; `steps`; `versions`; and
        `seconds`, those of the last start where a run was resumed, if the trainer has logged them.
    """
    record = {
        "command": training_command(line),
        "hardware": hardware(),
        "steps": state.global_step,
        "versions": {package: importlib.metadata.version(package) for package in _VERSIONS},
    }
    seconds = [log["train_runtime"] for log in state.log_history if "train_runtime" in log]
    return record | ({"seconds": round(seconds[-1])} if seconds else {})


def training_command(line: Sequence[str]) -> str:
    """The command that starts such a run elsewhere: paths are cut to their last part, secrets are left out."""
    words = []
    secret = False
    for word in line[1:]:
        is_flag = word.startswith("--")
        if secret and not is_flag:
            continue
        secret = is_flag and _SECRET.match(word) is not None
        if not secret:
            flag, equals, value = word.partition("=") if is_flag else ("", "", word)
            words.append(f"{flag}{equals}{without_folders(value)}")
    script = Path(line[0]).stem if line else "pretrain"
    return shlex.join(["accelerate", "launch", "-m", f"midimamba.training.{script}", *words])


def without_folders(value: str) -> str:
    """The last part of a path of this machine. Any other text, such as the name of a repository, stays."""
    path = Path(value)
    try:
        is_here = path.is_absolute() or (len(path.parts) > 1 and path.exists())
    except (OSError, ValueError):  # too long for a path, or with signs that no path has
        return value
    return path.name if is_here else value


def hardware() -> str:
    """What the processes of this run compute on, such as `"2 x NVIDIA H100"` or `"CPU (x86_64), 8 threads"`."""
    if torch.cuda.is_available():
        count = int(os.environ.get("WORLD_SIZE", "1"))
        name = torch.cuda.get_device_name()
        return f"{count} x {name}" if count > 1 else name
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
