"""A training run that the page has started: `midimamba train` in a process of its own, and what it has said so far."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock, Thread
from typing import IO, NamedTuple

from midimamba.errors import InputError
from midimamba.files import check_can_be_made, whole_folder

_NAME = re.compile(r"\w[\w -]{0,39}")
_LINE_ENDS = re.compile(r"[\r\n]+")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# As [`midimamba.training.progress.line_of_figures`] writes them.
_FIGURES = re.compile(r"step \d+  (\w+ .*)")
# That of the training steps has no name in front.
_BAR = re.compile(r"(?:(\w[\w -]*): +)?(?:\d+%\|.*\| *)?(\d+)(?:/(\d+))?[a-z]* \[.*\]")
_END_SECONDS = 30.0
_INTERRUPTED = 130


class Point(NamedTuple):
    """A loss in nats per token, some minutes after the start."""

    minutes: float
    loss: float


class State(NamedTuple):
    """
    Where a run stands.

    Args:
        training, held_out (`list[Point]`): losses so far, on training music and on music that was kept aside.
        line (`str`): the last thing that the run said.
        progress (`str`): steps done and to do, such as `30/120`, if it trains.
        code (`int`, *optional*): the exit code, if the run has ended.
        was_stopped (`bool`): whether the user has stopped it.
    """

    training: list[Point]
    held_out: list[Point]
    line: str
    progress: str
    code: int | None
    was_stopped: bool


def check_name(name: str, out: Path) -> Path:
    """The folder of a generator by its name.

    Raises:
        InputError: if this is no name for one, or there is one with this name.
    """
    name = name.strip()
    if not _NAME.fullmatch(name) or name.endswith(("-data", "-music")):
        raise InputError(f"{name[:40]!r} cannot name a generator: take letters, digits, spaces and hyphens")
    folder = out / name
    if (folder / "config.json").exists():
        raise InputError(f"there is already a generator {name!r} in {out}: choose another name")
    check_can_be_made(folder)
    return folder


def collect(files: Sequence[Path], folder: Path) -> Path:
    """
    Copy dropped files beside the folder of a generator, where training finds them.

    Args:
        files (`Sequence[Path]`): MIDI and ABC files and archives.
        folder (`Path`): of the generator, `OUT/NAME`. The music goes to `OUT/NAME-music`.

    Raises:
        InputError: if there are none.
    """
    if not files:
        raise InputError("there is no music to train on: drop MIDI files, a folder or a zip first")
    music = folder.with_name(f"{folder.name}-music")
    with whole_folder(music, replace=True) as scratch:
        for number, file in enumerate(files):
            shutil.copyfile(file, scratch / f"{number:05}-{file.name}")
    return music


class TrainingRun:
    """
    `midimamba train` in a process of its own.

    Args:
        music (`Path` or `str`): what to train on.
        folder (`Path`): of the generator to make.
        flags (`Sequence[str]`): the other flags of the command.
    """

    def __init__(self, music: Path | str, folder: Path, flags: Sequence[str]):
        self.folder = folder
        self._lock = Lock()
        self._started = time.monotonic()
        self._training: list[Point] = []
        self._held_out: list[Point] = []
        self._line, self._progress, self._steps = "reading the music", "", 0
        self._was_stopped = False
        command = [sys.executable, "-m", "midimamba.cli", "train", str(music), "--out", str(folder), *flags]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            # A group of its own: Ctrl-C ends it once, when the page ends it.
            process_group=0 if os.name == "posix" else None,
        )
        assert self._process.stdout is not None
        self._reader = Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def state(self) -> State:
        """Where the run stands."""
        code = None if self._reader.is_alive() else self._process.wait()
        with self._lock:
            return State(
                list(self._training), list(self._held_out), self._line, self._progress, code, self._was_stopped
            )

    def stop(self) -> None:
        """Stop the run as Ctrl-C does. The same music and name go on from its last checkpoint."""
        self._was_stopped = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """Stop the run and wait for its end."""
        if self._process.poll() is not None:
            return
        self.stop()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self, output: IO[bytes]) -> None:
        """Read what the run says until it ends. A progress bar paints its line again after a carriage return."""
        rest = ""
        while part := os.read(output.fileno(), 65536):
            *lines, rest = _LINE_ENDS.split(rest + part.decode(errors="replace"))
            for line in lines:
                self._take(_ESCAPES.sub("", line).strip())
        self._take(_ESCAPES.sub("", rest).strip())
        output.close()
        self._process.wait()

    def _take(self, line: str) -> None:
        minutes = (time.monotonic() - self._started) / 60
        with self._lock:
            if found := _FIGURES.search(line):
                self._take_losses(found[1], minutes)
            elif found := _BAR.fullmatch(line):
                name, done, total = found.groups()
                if name:
                    self._line = f"{name} {done} of {total}" if total else f"{name} {done}"
                elif ("it/s" in line or "s/it" in line) and int(total) >= self._steps:  # not that of an evaluation
                    self._steps, self._progress = int(total), f"{done}/{total}"
            elif line:
                self._line = line

    def _take_losses(self, text: str, minutes: float) -> None:
        values = {name: value for name, _, value in (figure.rpartition(" ") for figure in text.split("  "))}
        for name, points in (("loss", self._training), ("eval_loss", self._held_out)):
            if name in values:
                points.append(Point(minutes, float(values[name])))
