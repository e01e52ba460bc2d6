"""Benchmarks of many long runs: each is kept as a line of JSON when it is done, and a second start continues.

A run is an arm with a seed. Its row has both, and the settings that all runs of a benchmark share. Rows with other
settings in the same file are ignored.
"""

import json
import math
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
# The 97.5 % quantiles of Student's t distribution with 1, 2, … degrees of freedom; 1.96 for more.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def rows_done(rows: Path, settings: dict[str, Any]) -> dict[Job, Row]:
    """The kept runs with these settings, by arm and seed; the last one if a run was made twice."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    kept = [row for row in map(json.loads, lines) if row["settings"] == settings]
    return {(row["arm"], row["seed"]): row for row in kept}


def complete(
    jobs: Sequence[Job],
    run: Callable[[str, int], Row],
    settings: dict[str, Any],
    rows: Path,
    workers: int,
    describe: Callable[[Row], str],
) -> dict[Job, Row]:
    """Make those runs that the file does not have yet, see [`make_runs`], and print a line about each that ends.

    Returns:
        `dict`: all kept runs with these settings, by arm and seed.
    """
    done = rows_done(rows, settings)
    for row in make_runs([job for job in jobs if job not in done], run, rows, workers):
        print(describe(row), flush=True)
    return rows_done(rows, settings)


def make_runs(jobs: Sequence[Job], run: Callable[[str, int], Row], rows: Path, workers: int) -> Iterator[Row]:
    """Make runs and yield their rows as they finish.

    Every run is a separate process with one thread. With one worker, runs use this process and all its threads.

    Args:
        jobs (`Sequence[Job]`): the runs to make.
        run (`Callable`): takes an arm and a seed and returns its row; other processes must be able to import it.
        rows (`Path`): the file to which every row is appended.
        workers (`int`): the number of runs at once.
    """
    if workers == 1 or not jobs:
        yield from (_run_and_keep(run, *job, rows) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
    with ProcessPoolExecutor(workers, spawn, _prepare_worker) as pool:
        for done in as_completed([pool.submit(_run_and_keep, run, *job, rows) for job in jobs]):
            yield done.result()


def mean_and_deviation(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation; the deviation of a single value is 0."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [round(statistics.mean(values), 4), round(spread, 4)]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The mean of paired differences with its 95 % interval by the t distribution; a single pair has no interval."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(pairs)
    if len(pairs) < 2:
        return {"mean": round(mean, 4), "interval": None}
    quantile = T_QUANTILES[len(pairs) - 2] if len(pairs) - 2 < len(T_QUANTILES) else 1.96
    half = quantile * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return {"mean": round(mean, 4), "interval": [round(mean - half, 4), round(mean + half, 4)]}


def _run_and_keep(run: Callable[[str, int], Row], arm: str, seed: int, rows: Path) -> Row:
    """Make a run and append its row, so that it is kept even if another run fails meanwhile."""
    row = run(arm, seed)
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()  # of loading and saving a checkpoint
