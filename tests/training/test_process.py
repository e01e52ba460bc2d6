"""However a training process ends, it returns, says so in one line, and nothing that was there is lost."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from midimamba import files
from midimamba.errors import InputError
from midimamba.files import locked
from midimamba.training.process import stoppable, training_process
from midimamba.training.resume import claimed
from midimamba.training.whole_checkpoints import checkpoints_in, fault_of

ROOT = Path(__file__).parents[2]
TINY: dict[str, object] = {
    **{"sequence_length": 32, "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
    **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "disable_tqdm": True},
}
SCRIPTS: dict[str, dict[str, object]] = {
    "pretrain": {"hidden_size": 16, "num_hidden_layers": 1},
    "adversarial": {
        **{"num_rollouts": 2, "rollout_positions": 3, "d_warmup_steps": 1, "num_eval_samples": 4},
        **{"max_nll_drift": "none", "max_self_bleu_increase": "none", "eval_on_start": False},
    },
}


def arguments(script: str, data: Path, model: Path, out: Path, **options: object) -> list[str]:
    chosen = TINY | SCRIPTS[script] | {"data": data, "output_dir": out} | options
    if script == "adversarial":
        chosen["model"] = model
    return [str(part) for name, value in chosen.items() for part in (f"--{name}", value)]


# ---- in this process ----


def in_child(work: Callable[[], None], meanwhile: Callable[[int], None] = lambda _: None) -> tuple[int, str]:
    """Exit code and standard error of work in a forked process, while this one does something to it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 2)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        files._held.clear()  # the locks of the other process
        code: Any = 99
        try:
            work()
        except SystemExit as leaving:
            code = leaving.code
        finally:
            os._exit(code)
    os.close(writer)
    meanwhile(child)
    with os.fdopen(reader) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")]
)
def test_a_signal_is_one_line_and_what_is_half_written_is_removed(
    number: int, code: int, line: str, tmp_path: Path
) -> None:
    def importing() -> None:
        with training_process():
            (tmp_path / "ready").touch()
            while True:  # an import that takes whatever is raised in it for its own error
                try:
                    time.sleep(10)
                except BaseException:
                    continue

    def training() -> None:
        with training_process(), claimed(tmp_path / "run"):
            try:
                (tmp_path / "half").touch()
                (tmp_path / "ready").touch()
                time.sleep(10)
            finally:
                (tmp_path / "half").unlink()

    def stop(child: int) -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        (tmp_path / "ready").unlink()
        os.kill(child, number)

    for work in (importing, training):
        assert in_child(work, stop) == (code, line)
        assert list(tmp_path.iterdir()) == []


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with training_process():
        inside = signal.getsignal(signal.SIGINT)
        with stoppable():
            assert signal.getsignal(signal.SIGINT) not in (inside, before[0])
        assert signal.getsignal(signal.SIGINT) == inside != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_of_two_runs_into_one_folder_one_is_refused_before_it_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def refused() -> None:
        with training_process(), claimed(run):
            (run / "of the second").touch()

    with claimed(run):
        run.mkdir()
        code, said = in_child(refused)
        assert code == 2
        assert said.startswith(f"error: {run} is being written by another run (process {os.getpid()} on ")
        assert said.count("\n") == 1
        assert list(run.iterdir()) == []
    assert list(tmp_path.iterdir()) == [run]


def test_only_the_main_process_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> None:
        monkeypatch.setenv("RANK", "1")
        with training_process(), claimed(tmp_path / "run"):
            pass
        sys.exit(0)

    with locked(tmp_path / "run"):
        assert in_child(other) == (0, "")


def test_of_several_processes_only_the_main_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with training_process():
            raise InputError("the corpus is gone")

    def stop(child: int) -> None:
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)  # as a launcher does when the main process has left

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert in_child(fail) == (2, "error: the corpus is gone\n")
    monkeypatch.setenv("RANK", "1")
    assert in_child(fail, stop) == (143, "")


# ---- whole scripts ----


def run_script(script: str, given: list[str]) -> None:
    import torch

    from midimamba.training import adversarial, pretrain

    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *given]
    with training_process():
        (pretrain if script == "pretrain" else adversarial).main()


def start(script: str, given: list[str]) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["midimamba.training.adversarial_trainer", "midimamba.training.resume"])
    process = context.Process(target=run_script, args=(script, given))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stopped_run_leaves_only_whole_checkpoints_and_goes_on(
    script: str, corpus: Path, pretrained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = arguments(script, corpus, pretrained, out, max_steps=2000, save_total_limit=2)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(script, [*given, "--resume_from_checkpoint", "true"])
        known = {path.name for path in checkpoints_in(out)}
        while process.is_alive() and len({path.name for path in checkpoints_in(out)} - known) < 2:
            time.sleep(0.002)
        os.kill(process.pid or 0, number)
        process.join(60)
        assert process.exitcode == code
        assert all(fault_of(path) is None for path in checkpoints_in(out))
        assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_of_two_trainings_into_one_folder_one_wins(
    script: str, corpus: Path, pretrained: Path, tmp_path: Path
) -> None:
    given = arguments(script, corpus, pretrained, tmp_path / "run")
    runs = [start(script, given) for _ in range(2)]
    for process in runs:
        process.join(100)
    assert sorted(process.exitcode or 0 for process in runs) == [0, 2]
    assert (tmp_path / "run" / "config.json").exists()
    assert all(fault_of(path) is None for path in checkpoints_in(tmp_path / "run"))


def launched(script: str, given: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script as two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else it asks the network for this machine's name
    return subprocess.run(
        [*command, str(ROOT / "training" / f"{script}.py"), *given],
        **{"capture_output": True, "text": True, "env": environment, "timeout": 240},  # type: ignore[call-overload]
    )


@pytest.mark.slow
def test_two_processes_return_and_say_an_error_once(corpus: Path, pretrained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = launched("pretrain", arguments("pretrain", corpus, pretrained, out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert fault_of(out / "checkpoint-2") is None
    with locked(tmp_path / "other"):  # only the main process meets it, while the other one waits for it
        done = launched("pretrain", arguments("pretrain", corpus, pretrained, tmp_path / "other"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr[-3000:]
    assert "other is being written by another run" in done.stderr
    assert not (tmp_path / "other").exists()
