"""Worker processes in which every task has a bound of time and of memory.

Parsers written in C++ and Rust read files that anybody may have made. A parser that hangs, aborts the process or eats
the memory must cost one file, not the run. `concurrent.futures` can neither stop a task nor say which one killed its
process. Here each worker has its own pipe and one task at a time, so it is known which task caused a loss.
"""

import gc
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

Task = TypeVar("Task")
Result = TypeVar("Result")
# A task calls it at the start of each of its stages, so that the stage is known if the process is lost.
Mark = Callable[[int], None]

# The slowest of 1,066 piano performances takes 0.3 seconds, checks and tokens included, and a file with as many notes
# as `ingest.MAX_NOTES` allows takes 4.
MAX_SECONDS = 5.0
# On top of what a worker starts with. The file with the most notes takes 0.1 GB.
MAX_EXTRA_BYTES = 2**30
# A spawned worker first imports what it needs, transformers included.
_START_SECONDS = 120.0

# A forked worker starts in milliseconds, with everything imported. Elsewhere a fork is unsafe or unknown.
_CONTEXT = get_context("fork") if sys.platform == "linux" else get_context("spawn")


@dataclass(frozen=True)
class Lost:
    """A task that its worker did not finish.

    Args:
        reason (`str`):
            What happened, in plain words.
        stage (`int`, *optional*, defaults to 0):
            The last stage that the task marked, 0 if none.
    """

    reason: str
    stage: int = 0


def run_bounded(
    function: Callable[[Task, Mark], Result],
    tasks: Iterable[tuple[str, Task]],
    workers: int,
    *,
    max_seconds: float = MAX_SECONDS,
    max_extra_bytes: int = MAX_EXTRA_BYTES,
) -> Generator[tuple[str, Result | Lost], None, None]:
    """Run a function on every task in worker processes.

    A worker that exceeds its time is killed; one that dies or runs out of memory is replaced. Its task is lost, all
    others go on, and none is run twice.

    Args:
        function (`Callable`):
            Called in a worker with a task and a function that marks the stage it is at. An exception in it loses the
            task.
        tasks (iterable of pairs):
            A name, and what the function gets. They are taken one by one, as workers become free.
        workers (`int`):
            Number of processes.
        max_seconds (`float`, *optional*, defaults to 5):
            What a task may take in wall-clock time: a task that waits forever uses no processor.
        max_extra_bytes (`int`, *optional*, defaults to 1 GB):
            Memory that a worker may map beyond what it starts with. Enforced on Linux only: no other system can.

    Yields:
        `tuple`: the name, and the function's result or a [`Lost`], in the order in which they are ready.

    Raises:
        RuntimeError: if a worker cannot even start.
    """
    pending = iter(tasks)
    pool: list[_Worker[Task, Result]] = []
    try:
        pool.extend(_Worker(function, max_seconds, max_extra_bytes) for _ in range(workers))
        while pool:
            for worker in _with_news(pool):
                name, message = worker.task, worker.collect()
                if isinstance(message, Lost):
                    pool.remove(worker)
                    if name is None:
                        raise RuntimeError(f"a worker process does not start: {message.reason}")
                    pool.append(_Worker(function, max_seconds, max_extra_bytes))
                elif (task := next(pending, None)) is not None:
                    worker.give(*task)
                else:
                    pool.remove(worker)
                    worker.end()
                if name is not None:
                    yield name, cast(Result | Lost, message)
    finally:
        for worker in pool:
            worker.end()


class _Worker(Generic[Task, Result]):
    """One process as its parent sees it: starting while `task` is None, then at work on that until `deadline`."""

    def __init__(self, function: Callable[[Task, Mark], Result], max_seconds: float, max_extra_bytes: int) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self._stage = _CONTEXT.Value("b", 0, lock=False)
        arguments = (theirs, self.connection, function, self._stage, max_extra_bytes)
        self._process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # the process must hold the only copy: otherwise its end would not close the pipe
        self._max_seconds = max_seconds
        self.task: str | None = None
        self.deadline = time.monotonic() + _START_SECONDS

    def give(self, name: str, task: Task) -> None:
        """Start the clock of a task. Only a worker that waits for one reads it."""
        self.task = name
        self._stage.value = 0
        with suppress(OSError):  # it has just died: `collect` will find out
            self.connection.send(task)
        self.deadline = time.monotonic() + self._max_seconds

    def collect(self) -> Result | Lost | None:
        """The task's result, or None from a worker that has started. After a `Lost` the process has ended."""
        message: Result | Lost | None = Lost(f"it took longer than {self._max_seconds:g} seconds")
        try:
            if self.connection.poll():  # without a message, it is past its deadline
                message = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(1.0)
            message = Lost(f"the process died of it ({_describe(self._process.exitcode or 0)})")
        if isinstance(message, Lost):
            message = replace(message, stage=self._stage.value)
            self.end()
        return message

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()


def _with_news(pool: list[_Worker[Task, Result]]) -> list[_Worker[Task, Result]]:
    """Wait for the workers that sent something, died, or are past their deadline."""
    first = min(worker.deadline for worker in pool)
    ready = set(wait([worker.connection for worker in pool], timeout=max(0.0, first - time.monotonic())))
    now = time.monotonic()
    return [worker for worker in pool if worker.connection in ready or worker.deadline <= now]


def _describe(exit_code: int) -> str:
    """How a process ended; a negative exit code is a signal."""
    return signal.strsignal(-exit_code) or f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"


def _serve(
    connection: Connection,
    parents: Connection,
    function: Callable[[Any, Mark], Any],
    stage: Any,
    max_extra_bytes: int,
) -> None:
    """The life of a worker: it ends with its parent, when it is killed, or when a task exceeds the memory."""
    parents.close()  # a copy of the parent's end would keep the pipe open when the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends its workers
    # What the fork shares is never garbage. Collections that walk through it take time and copy its memory.
    gc.freeze()
    # Nor are the events of a long piece. Walking through all of them again and again takes a third of its time.
    gc.disable()
    _bound_memory(max_extra_bytes)

    def mark(value: int) -> None:
        stage.value = value

    with suppress(EOFError, BrokenPipeError):
        connection.send(None)
        while True:
            try:
                message = function(connection.recv(), mark)
            except MemoryError:
                message = Lost(f"it took more than {max_extra_bytes / 2**30:g} GB of memory")
            connection.send(message)
            gc.collect()


def _bound_memory(extra_bytes: int) -> None:
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a process that aborts must not leave its memory on the disk
