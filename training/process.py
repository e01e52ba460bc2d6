"""How a training process ends: with one line, whatever ends it, and without waiting for the others of its run.

Light to import, so that a script is covered before it imports torch.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from midimamba.errors import exit_on_input_error

_STOPPED_BY = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_TIDYING_SECONDS = 20.0
"""How long a stopped process may take to remove what is half-written."""
_SILENT_SECONDS = {True: 2.0, False: 10.0}
"""How long the main process, and any other, waits before it reports an error: see `_let_the_first_speak`."""

Handler = Callable[[int, FrameType | None], Any]


def is_main_process() -> bool:
    """Whether this process writes and speaks for its run, by what launchers set; there need be no torch for it."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def training_process() -> Iterator[None]:
    """Surrounds a script: errors of the user and signals end it with one line, and no process of a run hangs.

    Exit codes are 2 for what the user can mend, 130 for SIGINT and 143 for SIGTERM. A signal ends the process at once,
    also while it imports, unless it is [`stoppable`].
    """
    with on_signals(_STOPPED_BY, _leave_at_once):
        try:
            with exit_on_input_error(), _let_the_first_speak():
                yield
        except SystemExit as leaving:
            if _has_process_group():
                _leave(leaving.code)
            raise
        if _has_process_group():
            atexit._run_exitfuncs()
            _leave(0)


@contextmanager
def stoppable() -> Iterator[None]:
    """While something is half-written, a signal raises `SystemExit`, so that it is removed. A second one does not."""
    with on_signals(_STOPPED_BY, _tidy_and_leave):
        yield


@contextmanager
def on_signals(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Handle signals in one way, and afterwards as before."""
    if threading.current_thread() is not threading.main_thread():  # a notebook's, which has handlers of its own
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _leave_at_once(number: int, _: FrameType | None) -> None:
    _say_what_stopped(number)
    _leave(128 + number)


def _tidy_and_leave(number: int, _: FrameType | None) -> None:
    for each in _STOPPED_BY:
        signal.signal(each, _leave_at_once)
    _say_what_stopped(number)
    # Python drops what is raised in a destructor, and a blocked collective never comes back.
    timer = threading.Timer(_TIDYING_SECONDS, _leave, [128 + number])
    timer.daemon = True
    timer.start()
    raise SystemExit(128 + number)


def _say_what_stopped(number: int) -> None:
    if is_main_process():
        os.write(2, f"{_STOPPED_BY[signal.Signals(number)]}\n".encode())  # a buffer may be locked by what it stopped


@contextmanager
def _let_the_first_speak() -> Iterator[None]:
    """Of a run's processes, one reports an error: usually all meet the same, or meet the end of the first.

    The launcher stops the others when the first has left. So the main process reports what it meets itself, and the
    others only what it did not meet. Nobody has met anything at first hand whose connection was lost.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        from midimamba.errors import InputError

        if _is_one_of_several():
            firsthand = is_main_process() and isinstance(error, (InputError, OSError))
            if not firsthand:
                with on_signals(_STOPPED_BY, lambda number, _: _leave(128 + number)):
                    time.sleep(_SILENT_SECONDS[is_main_process()])
            if not isinstance(error, (InputError, OSError)):
                sys.excepthook(type(error), error, error.__traceback__)
                _leave(1)
        raise


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _has_process_group() -> bool:
    """Whether to leave without destructors. Gloo's waits for threads which wait for the GIL, which its caller has.

    Destroying the group before the end, as Trainer's `end` does, calls the same destructor: of 30 runs of two
    processes, 5 did not return.
    """
    if "torch" not in sys.modules:
        return _is_one_of_several()
    from torch import distributed

    return _is_one_of_several() or (distributed.is_available() and distributed.is_initialized())


def _leave(code: Any) -> None:
    """End without the interpreter's destructors, which can wait for other processes or for ever."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, RuntimeError):  # closed, or interrupted while it wrote
            continue
    os._exit(code if isinstance(code, int) else int(code is not None))
