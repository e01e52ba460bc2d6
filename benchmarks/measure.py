"""What all benchmarks share: their options, how to measure time, and how to record where it was measured."""

import argparse
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


def make_parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """A parser for the options of a benchmark, with `--out`.

    Args:
        description (`str`, *optional*): the docstring of the script.
        example (`str`): a command line, without `python benchmarks/`.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python benchmarks/{example}",
    )
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    return parser


def add_model_size(parser: argparse.ArgumentParser) -> None:
    """Add the options that set the size of a model."""
    parser.add_argument("--layers", type=int, default=6, help="layers (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=1000, help="size of the vocabulary (default: %(default)s)")


def add_temperatures(parser: argparse.ArgumentParser, default: list[float], more: str = "") -> None:
    """Add the option for the temperatures that are tried; `more` is added to its help."""
    shown = f"temperatures to try{more} (default: %(default)s)"
    parser.add_argument("--temperatures", type=float, nargs="*", default=default, help=shown)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run`, in seconds. There is no warm-up: call `run` once before."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def surroundings() -> dict[str, Any]:
    """Versions, processor and load, without which a figure means little."""
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
    """Print the result as the last line, and write it to `out` if that is given."""
    line = json.dumps({**result, **surroundings()})
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n")
    print(line)
