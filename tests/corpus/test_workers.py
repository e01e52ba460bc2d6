import faulthandler
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import pytest

from midimamba.corpus import workers
from midimamba.corpus.workers import Lost, Mark, run_bounded

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="needs the bound of memory, and forks for local functions"
)


def run(function: Callable[[int, Mark], object], count: int = 8, processes: int = 2, **bounds: Any) -> dict[str, Any]:
    outcomes = list(run_bounded(function, ((str(i), i) for i in range(count)), processes, **bounds))
    assert len(outcomes) == count
    return dict(outcomes)


def square(task: int, mark: Mark) -> int:
    return task**2


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_task_has_its_result_whatever_the_number_of_workers(processes: int) -> None:
    assert run(square, 20, processes) == {str(i): i**2 for i in range(20)}
    assert run(square, 0, processes) == {}
    assert not active_children()


def hang(task: int) -> None:
    time.sleep(60)


def spin(task: int) -> None:
    while True:
        pass


def leave(task: int) -> None:
    os._exit(3)


def crash(task: int) -> None:
    faulthandler.disable()  # pytest's, which would fill the screen
    os.kill(os.getpid(), signal.SIGSEGV)


def refuse_to_be_stopped(task: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(60)


def eat(task: int) -> None:
    bytearray(2**29)


def eat_slowly(task: int) -> None:
    eaten = []
    while True:
        eaten.append(bytes(2**16))


def fail(task: int) -> None:
    raise LookupError("on purpose")


@pytest.mark.parametrize(
    ("misbehave", "reason"),
    [
        (hang, "it took longer than 0.5 seconds"),
        (spin, "it took longer than 0.5 seconds"),
        (refuse_to_be_stopped, "it took longer than 0.5 seconds"),
        (leave, "the process died of it (exit code 3)"),
        (crash, "the process died of it (Segmentation fault)"),
        (fail, "the process died of it (exit code 1)"),
        (eat, "it took more than 0.25 GB of memory"),
        (eat_slowly, "it took more than 0.25 GB of memory"),
    ],
)
@pytest.mark.parametrize("processes", [1, 3])
def test_a_lost_task_does_not_cost_the_others_and_none_runs_twice(
    misbehave: Callable[[int], None], reason: str, processes: int, tmp_path: Path
) -> None:
    def work(task: int, mark: Mark) -> int:
        with (tmp_path / str(task)).open("a") as file:
            file.write("run ")
        mark(1)
        if task in (0, 3, 4):
            mark(2)
            misbehave(task)
        return -task

    # On a busy machine, what is to run out of memory or to die may take its time.
    max_seconds = 0.5 if "seconds" in reason else 60.0
    outcomes = run(work, 8, processes, max_seconds=max_seconds, max_extra_bytes=2**28)
    lost = {"0", "3", "4"}
    assert {name: outcomes[name] for name in lost} == dict.fromkeys(lost, Lost(reason, stage=2))
    assert all(outcomes[name] == -int(name) for name in outcomes.keys() - lost)
    assert [(tmp_path / str(task)).read_text() for task in range(8)] == ["run "] * 8
    assert not active_children()


def test_the_time_of_a_task_does_not_count_for_the_next_one() -> None:
    def nap(task: int, mark: Mark) -> int:
        time.sleep(0.2)
        return task

    assert run(nap, 6, 1, max_seconds=0.7) == {str(i): i for i in range(6)}


def test_tasks_are_taken_only_as_workers_become_free() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[tuple[str, int]]:
        for task in range(50):
            taken.append(task)
            yield str(task), task

    outcomes = run_bounded(square, tasks(), 2)
    next(outcomes)
    assert len(taken) <= 4
    outcomes.close()
    assert not active_children()


def test_a_large_task_and_a_large_result_pass() -> None:
    content = os.urandom(2**24)
    assert list(run_bounded(lambda task, mark: task[::-1], [("big", content)], 1)) == [("big", content[::-1])]


def test_an_error_in_the_source_of_tasks_ends_the_workers() -> None:
    def tasks() -> Iterator[tuple[str, int]]:
        yield "0", 0
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(run_bounded(square, tasks(), 2))
    assert not active_children()


def test_a_worker_that_cannot_start_does_not_loop_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_bound_memory", lambda extra_bytes: os._exit(7))
    with pytest.raises(RuntimeError, match="does not start"):
        run(square)
    assert not active_children()


@pytest.mark.slow
def test_workers_that_do_not_fork_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_CONTEXT", get_context("spawn"))
    assert run(operator.is_, 3, 1) == {"0": False, "1": False, "2": False}


def test_leaving_after_a_loss_is_clean() -> None:
    outcomes = run_bounded(lambda task, mark: os._exit(1), [("0", 0), ("1", 1)], 1)
    assert isinstance(next(outcomes)[1], Lost)
    outcomes.close()
    assert not active_children()


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed() -> None:
    script = (
        "import os, time\n"
        "from midimamba.corpus.workers import run_bounded\n"
        "def work(task, mark):\n"
        "    return os.getpid()\n"
        "outcomes = run_bounded(work, ((str(i), i) for i in range(1000)), 3)\n"
        "pids = set()\n"
        "while len(pids) < 3:\n"
        "    pids.add(next(outcomes)[1])\n"
        "print(*pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 3
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
