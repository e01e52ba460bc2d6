"""What every benchmark shares: how to time, and how to say where it was timed."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run`, in seconds, after nothing: warm up yourself."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def surroundings() -> dict[str, Any]:
    """Versions, processor and load: a figure without them says little."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python", *sys.argv]),
    }


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Print the result as the last line and, if asked, keep it."""
    line = json.dumps({**result, **surroundings()})
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n")
    print(line)
