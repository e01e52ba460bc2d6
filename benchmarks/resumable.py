"""Benchmarks of many long runs: each is kept as a line of JSON as soon as it is done, and a second start goes on.

A run is an arm with a seed. Its row holds both, and the settings that all runs of a benchmark share: rows of other
settings in the same file are left alone.
"""

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

Job = tuple[str, int]
"""Arm and seed."""
Row = dict[str, Any]


def rows_done(rows: Path, settings: dict[str, Any]) -> dict[Job, Row]:
    """The kept runs of these settings, by arm and seed; of one made twice the last."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    kept = [row for row in map(json.loads, lines) if row["settings"] == settings]
    return {(row["arm"], row["seed"]): row for row in kept}


def make_runs(jobs: Sequence[Job], run: Callable[[str, int], Row], rows: Path, workers: int) -> Iterator[Row]:
    """Rows as they come, of processes of one thread each, or with one worker of this process with all its threads.

    Args:
        jobs (`Sequence[Job]`): the runs to make.
        run (`Callable`): takes an arm and a seed and returns its row; other processes must be able to import it.
        rows (`Path`): file to which every row is appended.
        workers (`int`): runs at once.
    """
    if workers == 1 or not jobs:
        yield from (_run_and_keep(run, *job, rows) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
    with ProcessPoolExecutor(workers, spawn, _prepare_worker) as pool:
        for done in as_completed([pool.submit(_run_and_keep, run, *job, rows) for job in jobs]):
            yield done.result()


def mean_and_deviation(values: Sequence[float]) -> list[float]:
    """Of one value the deviation is 0."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [round(statistics.mean(values), 4), round(spread, 4)]


def _run_and_keep(run: Callable[[str, int], Row], arm: str, seed: int, rows: Path) -> Row:
    """A run appends its row itself: it is kept even if another run fails meanwhile."""
    row = run(arm, seed)
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()  # of loading and saving a checkpoint
