"""A corpus that is made in tasks, which datatrove runs as local processes, as Slurm jobs, or on a Ray cluster.

The files are listed here. Everything else is done in four stages of tasks, which [`midimamba.corpus.cluster_steps`]
describes. datatrove notes in the work folder which tasks are done, so that the same command continues.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from midimamba.corpus.addresses import Folder, is_address
from midimamba.corpus.build import arguments_of, check_is_same, files_of, prepare, reader_of
from midimamba.corpus.cluster_job import LISTED, OTHERS, REPORT, Job
from midimamba.corpus.data_sets import DataSetFiles
from midimamba.corpus.options import ClusterOptions, CorpusOptions
from midimamba.corpus.parts import divide_files, write_part
from midimamba.corpus.reading import Found, beyond_limit, list_files
from midimamba.corpus.store import PieceStore
from midimamba.corpus.upkeep import showing_causes, target_of
from midimamba.errors import InputError
from midimamba.files import check_can_be_made, locked
from midimamba.text import printable

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep

TASKS = 8
# In the work folder: what this run is, which job of Slurm is the last, and the notes of datatrove.
STATE, _SUBMITTED, _LOGS = "run.json", "submitted.txt", "logs"
# What a call leaves there that is killed before it has listed all files.
OURS = (f"{LISTED}/", OTHERS)
_SLURM_TIME = "24:00:00"
_POLL_SECONDS = 1.0


def tokenize_on_cluster(
    source: str, out: str, options: CorpusOptions, cluster: ClusterOptions
) -> dict[str, Any] | None:
    """Make the corpus that [`~midimamba.corpus.build.tokenize_corpus`] makes, in tasks of a cluster.

    The rows, their order, the tokenizer and the report are the same, whatever the number of tasks. The rows are in
    Parquet files, as in a corpus that was downloaded from the Hub: `data/{split}-{task}-of-{tasks}.parquet`.

    What tasks read is in the work folder until the corpus is complete. The same command continues from there. At an
    address, `corpus.json` is written last: without it there is no corpus yet.

    Args:
        source (`str`):
            As for `tokenize_corpus`. All tasks must see it under the same name.
        out (`str`):
            The folder to make, or its address on a file system of fsspec, such as `s3://bucket/corpus`.
        options ([`~midimamba.corpus.options.CorpusOptions`]):
            How files are read, split and tokenized. `num_workers` bounds the tasks that run at once: by default one
            for each processor of this machine, and any number on a cluster.
        cluster ([`~midimamba.corpus.options.ClusterOptions`]):
            Where the tasks run.

    Returns:
        `dict`: what `corpus.json` holds, or `None` while Slurm's jobs are not done.

    Raises:
        InputError: if a package or a program is missing, a task fails, or as `tokenize_corpus`.
    """
    _check_installed(cluster)
    base, options = prepare(options)
    if options.streaming:
        raise InputError("tasks cannot share a data set that is streamed: leave out --streaming")
    if not is_address(out):
        check_can_be_made(Path(out))
        out = str(target_of(Path(out)))
    target, work = Folder(out), _work_folder(out, cluster)
    run = {
        "out": target.address,
        "tasks": cluster.tasks or TASKS,
        "arguments": arguments_of(source, options),
        "reader": reader_of(base, source, options),
    }
    with nullcontext() if work.local is None else locked(work.local):
        state = _state_of(work, run, target)
        if target.has(REPORT):
            tqdm.write(printable(f"{out} is already there"), file=sys.stderr)
        elif cluster.executor == "slurm" and _is_queued(work):
            return None
        else:
            state = _list(work, target, run, source, options, state)
            _run_stages(_job(run, source, options, work, state), cluster)
        if not target.has(REPORT):
            return None
        report = _object_in(target, REPORT)
        if state is not None:
            work.dissolve(STATE)
            tqdm.write(_found_in(state).describe(report), file=sys.stderr)
        return report


def _check_installed(cluster: ClusterOptions) -> None:
    for package, extra in (("datatrove", "cluster"), *([("ray", "ray")] if cluster.executor == "ray" else [])):
        if importlib.util.find_spec(package) is None:
            raise InputError(f'--executor {cluster.executor} needs {package}: pip install "midimamba[{extra}]"')
    if cluster.executor == "slurm" and shutil.which("sbatch") is None:
        raise InputError("there is no sbatch here: run this where jobs are submitted, on a login node of Slurm")


def _work_folder(out: str, cluster: ClusterOptions) -> Folder:
    if cluster.work is not None:
        return Folder(cluster.work)
    target = Folder(out).local
    if target is None:
        raise InputError(f"{out} is not a path: name a folder that all tasks see with --work")
    return Folder(str(target.with_name(f".{target.name}.work")))


def _state_of(work: Folder, run: dict[str, Any], target: Folder) -> dict[str, Any] | None:
    """What an earlier call of the same run left in the work folder, if there is any.

    Raises:
        InputError: if the work folder or the target holds something else.
    """
    state = _object_in(work, STATE) if work.has(STATE) else None
    same = state is not None and state.get("run") == run
    if target.has(REPORT):
        check_is_same(target.address, _object_in(target, REPORT), run["arguments"])
        return state if same else None
    # At an address, files of a run that goes on lie already where they will stay.
    if target.is_taken() and not (same and target.local is None):
        raise InputError(f"{target.address} exists already and holds something else: delete it or choose another")
    if state is None and (others := [name for name in work.names() if not name.startswith(OURS)]):
        raise InputError(f"{work.address} holds something else ({others[0]}): name another folder with --work")
    if state is not None and not same:
        raise InputError(
            f"{work.address} belongs to a run with other options: repeat that one, or delete the folder first"
        )
    return state


def _object_in(folder: Folder, name: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(name))
    except ValueError as error:
        raise InputError(f"{folder.address}/{name} is not JSON ({error}): delete the folder") from error
    return content if isinstance(content, dict) else {}


def _list(
    work: Folder,
    target: Folder,
    run: Mapping[str, Any],
    source: str,
    options: CorpusOptions,
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """List the files of the source, and give every task its part, unless an `earlier` call gave it the same.

    Returns:
        `dict`: what the next call of the same run will find.
    """
    files, rows = files_of(_absolute(source), options), 0
    with tempfile.TemporaryDirectory(prefix="midimamba-") as folder:
        scratch = Path(folder)
        parts = scratch / "parts"
        (parts / LISTED).mkdir(parents=True)
        with PieceStore(scratch / "store.sqlite", run["reader"]) as store:
            if isinstance(files, DataSetFiles):
                found, rows = beyond_limit(files, options.limit), min(len(files), options.limit or sys.maxsize)
                found.files += rows
            else:
                found = list_files(files, store, options)
                divide_files(store, run["tasks"], parts / LISTED)
            write_part(store, parts / OTHERS, "files", "labels", but="reason IS NULL")
        digest = hashlib.sha256()
        names = sorted(path.relative_to(parts).as_posix() for path in parts.rglob("*.sqlite"))
        for name in names:
            digest.update(name.encode() + (parts / name).read_bytes())
        counts = {"files": found.files, "skipped": dict(found.skipped)}
        state = {"run": run, "rows": rows, "found": counts, "listing": digest.hexdigest()}
        if state != earlier:
            if earlier is not None:
                tqdm.write("the source is not as it was: the run starts again", file=sys.stderr)
                if target.local is None:  # first: by the state in the work folder, it is known to be ours
                    target.remove()
                work.dissolve(STATE)
            for name in names:
                work.put(parts / name, name)
            work.write(STATE, json.dumps(state))
    return state


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).exists() else name


def _found_in(state: Mapping[str, Any]) -> Found:
    return Found(state["found"]["files"], Counter(state["found"]["skipped"]))


def _job(run: Mapping[str, Any], source: str, options: CorpusOptions, work: Folder, state: Mapping[str, Any]) -> Job:
    if options.tokenizer is not None:
        options = replace(options, tokenizer=_absolute(options.tokenizer))
    return Job(
        source=_absolute(source),
        out=run["out"],
        work=work.address,
        options=options,
        arguments=run["arguments"],
        reader=run["reader"],
        tasks=run["tasks"],
        num_rows=state["rows"],
        num_files=state["found"]["files"],
        skipped=state["found"]["skipped"],
    )


def _run_stages(job: Job, cluster: ClusterOptions) -> None:
    """Run the stages one after the other. Slurm's jobs are submitted together, and each waits for the one before.

    Raises:
        InputError: if a task fails, or Slurm refuses a job.
    """
    from loguru import logger

    logger.disable("datatrove")  # in this process and those that it forks; tasks elsewhere write logs
    stages = {step.name: (step, tasks) for step, tasks in _steps_of(job)}
    if cluster.executor == "slurm":
        _submit(job, cluster, stages)
        return
    for name, (step, tasks) in stages.items():
        executor = _executor(job, cluster, step, tasks)
        with _progress(name.capitalize(), executor), showing_causes():
            executor.run()
        if missing := _missing(executor):
            raise InputError(f"{len(missing)} of {tasks} tasks failed to {name}: {_why(job, name, missing[0])}")


def _steps_of(job: Job) -> list[tuple["PipelineStep", int]]:
    from midimamba.corpus.cluster_steps import EncodePieces, FinishCorpus, MergeParts, ReadFiles

    return [(ReadFiles(job), job.tasks), (MergeParts(job), 1), (EncodePieces(job), job.tasks), (FinishCorpus(job), 1)]


def _logs_of(job: Job, name: str) -> str:
    return f"{job.work}/{_LOGS}/{name.replace(' ', '-')}"


def _executor(job: Job, cluster: ClusterOptions, step: "PipelineStep", tasks: int) -> "PipelineExecutor":
    most = job.options.num_workers
    settings: dict[str, Any] = {"pipeline": [step], "tasks": tasks, "logging_dir": _logs_of(job, step.name)}
    if cluster.executor in (None, "local"):
        from datatrove.executor import LocalPipelineExecutor

        workers = most or os.cpu_count() or 1
        # One worker is this process. As in `workers`, a fork is safe and quick on Linux alone.
        workers = min(workers, max(2, tasks))
        method = "fork" if sys.platform == "linux" else "spawn"
        return LocalPipelineExecutor(workers=workers, start_method=method, **settings)
    if cluster.executor == "ray":
        import ray
        from datatrove.executor import RayPipelineExecutor

        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        return RayPipelineExecutor(workers=most or -1, **settings)
    from datatrove.executor import SlurmPipelineExecutor

    options = {"kill-on-invalid-dep": "yes"} | cluster.sbatch
    return SlurmPipelineExecutor(
        time=options.pop("time", _SLURM_TIME),
        partition=options.pop("partition"),
        qos=options.pop("qos", ""),
        sbatch_args=options,
        job_name=f"midimamba-{step.name.replace(' ', '-')}",
        # Jobs run the Python that submits them.
        env_command=f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        workers=most or -1,
        **settings,
    )


def _submit(job: Job, cluster: ClusterOptions, stages: Mapping[str, tuple["PipelineStep", int]]) -> None:
    work = Folder(job.work)
    executor: Any = None
    for step, tasks in stages.values():
        executor, before = _executor(job, cluster, step, tasks), executor
        executor.depends = before
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        raise InputError(f"sbatch refuses a job (exit code {error.returncode}): mend what it says above") from error
    work.write(_SUBMITTED, str(executor.job_id))
    tqdm.write(
        f"the last job is {executor.job_id}; when it is done, or has failed, run the same command again; "
        f"the logs are in {work.address}/{_LOGS}",
        file=sys.stderr,
    )


def _is_queued(work: Folder) -> bool:
    """Whether Slurm still has jobs to run that an earlier call submitted."""
    if not work.has(_SUBMITTED):
        return False
    last = work.read(_SUBMITTED)
    answer = subprocess.run(["squeue", "--noheader", "--jobs", last], capture_output=True, text=True, check=False)
    if answer.returncode or not answer.stdout.strip():
        return False
    tqdm.write(f"job {last} is not done yet: `squeue --me` shows what it waits for", file=sys.stderr)
    return True


def _missing(executor: "PipelineExecutor") -> list[int]:
    """The tasks that are not done."""
    executor.logging_dir.fs.invalidate_cache()
    return list(executor.get_incomplete_ranks())


def _why(job: Job, name: str, task: int) -> str:
    """The last line that a task wrote to its log, which for an error is its message."""
    logs = Folder(_logs_of(job, name))
    log = f"logs/task_{task:05}.log"
    lines = logs.read(log).split("\n") if logs.has(log) else []
    last = next((line for line in reversed(lines) if line.strip()), "it left no log")
    return f"{last.rpartition('InputError: ')[2]} ({logs.address}/{log})"


@contextmanager
def _progress(what: str, executor: "PipelineExecutor") -> Iterator[None]:
    """Show how many tasks are done."""
    done, tasks = threading.Event(), executor.world_size

    def show(bar: "tqdm[Any]") -> None:
        bar.update(tasks - len(_missing(executor)) - bar.n)

    def watch(bar: "tqdm[Any]") -> None:
        while not done.wait(_POLL_SECONDS):
            show(bar)

    with tqdm(total=tasks, desc=what, unit="task") as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            show(bar)
