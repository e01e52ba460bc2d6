"""Files are written in a process of their own: the synthesizer forks, and a process with many threads must not."""

import os
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple, ParamSpec, TypeVar

from symusic.core import ScoreTick

from midimamba.errors import InputError

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

SUFFIXES = (".mid", ".wav", ".abc")


class Written(NamedTuple):
    """
    A piece in files.

    Args:
        files (`dict[str, Path]`): by suffix. A suffix is missing where the piece cannot be written so.
        changes (`list[str]`): in plain English, what a format cannot say, or why a file is missing.
    """

    files: dict[str, Path]
    changes: list[str]


class Workshop:
    """
    A process that writes files, and the folder to which it writes. It starts with the first task.

    Args:
        folder (`Path`): an existing folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = Lock()
        self._pool = self._start()

    @staticmethod
    def _start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare)

    def new_folder(self) -> Path:
        """A new folder for the files of one piece."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def run(
        self, function: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Result:
        """Call a function in the process, and wait for what it returns.

        Raises:
            InputError: if the process dies of it; and whatever the function raises.
        """
        try:
            return self._pool.submit(function, *arguments, **options).result()
        except BrokenProcessPool as error:
            with self._lock:
                self._pool.shutdown(wait=False)
                self._pool = self._start()
            raise InputError("the process that writes files has died: try again, or with a shorter piece") from error

    def write(self, score: ScoreTick, name: str) -> Written:
        """Write a piece as MIDI, sound and ABC to a new folder.

        Args:
            score (`symusic.Score`): times in ticks.
            name (`str`): of the files, without a suffix.
        """
        return self.run(_write, score, self.new_folder() / name)

    def close(self) -> None:
        """End the process, without what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _prepare() -> None:
    """Ctrl-C reaches all processes of a terminal. This one ends with that of the page, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TQDM_DISABLE"] = "1"
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(0)


def _write(score: ScoreTick, stem: Path) -> Written:
    from midimamba.converting import writer_of

    written = Written({}, [])
    for suffix in SUFFIXES:
        path = stem.with_name(f"{stem.name}{suffix}")
        try:
            changes: list[Any] = writer_of(path)(score, path)
        except InputError as error:
            written.changes.append(str(error).replace(f"{path}: ", ""))
            continue
        written.files[suffix] = path
        written.changes.extend(f"in {path.name}: {change}" for change in changes)
    return written
