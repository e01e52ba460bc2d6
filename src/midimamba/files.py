"""Files and folders that are either whole or not there, and locks that say who is at work.

Everything is written to a hidden sibling, flushed to the disk and renamed. A run that is killed leaves at most that
sibling and its lock file; the next run for the same target puts back what was there and removes them.
"""

import errno
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from midimamba.errors import InputError

# Of the hidden siblings of a target: scratch folders, locks, the journal of a store.
_LONGEST_SUFFIX = 32
_UNFINISHED = ".unfinished-"
_WRITING_SECONDS = 1.0  # the longest that the owner of a lock takes to write its name

# Locks of this process, so that what runs under a lock may take it again.
_held: set[Path] = set()


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        InputError: if it is missing, is not JSON, or holds anything but an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSON can be too deep for Python's stack
        raise InputError(f"{path} is not JSON that can be read ({error}): make it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object: make it again")
    return content


def is_taken(target: Path) -> bool:
    """Whether there is something at `target` that a new folder would replace. An empty folder does not count."""
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def check_can_be_made(target: Path) -> None:
    """Refuse a file or folder that cannot be written at the end, before any work. Nothing is created.

    Raises:
        InputError: if it is the current folder or the root, lies in a file or in a folder that cannot be written to,
            or its name is too long.
    """
    if target.name in ("", ".."):
        raise InputError(f"{target} is a folder that is there already: name a new one, such as {target / 'new'}")
    try:
        os.lstat(target.with_name(f".{target.name}{'x' * _LONGEST_SUFFIX}"))  # as long as what is written beside it
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{target.name[:40]}… is too long a name to write to: choose a shorter one") from error
    folder = next((parent for parent in target.absolute().parents if os.path.lexists(parent)), None)
    if folder is None or not folder.is_dir():
        raise InputError(f"{target} cannot be written, because {folder} is not a folder: choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{target} cannot be written, because {folder} is read-only: choose another place")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other runs from writing to `target`. The lock ends with this process, whatever ends it.

    Args:
        target (`Path`): the file or folder. The lock is a hidden file beside it, which is gone afterwards.

    Raises:
        InputError: if another run holds the lock; the message says which.
    """
    target = target.absolute()
    if target in _held:
        yield
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_name(f".{target.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        try:
            owner = _owner_in(file)
        except OSError:  # it is gone again, or was never there
            raise InputError(
                f"{target} cannot be locked for writing: wait for a run that just ended, or choose another place"
            ) from error
        raise InputError(
            f"{target} is being written by another run{f' ({owner})' if owner else ''}: "
            "wait until it ends, or choose another name"
        ) from error
    try:
        _held.add(target)
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        _held.discard(target)
        file.unlink(missing_ok=True)  # before the release: who waits for a removed file takes a new one
        lock.release()


def _owner_in(file: Path) -> str:
    """What a lock file says of its owner, who writes it a moment after taking the lock.

    Raises:
        OSError: if there is no such file.
    """
    end = time.monotonic() + _WRITING_SECONDS
    while not (owner := file.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    return owner


def _scratch_of(target: Path) -> Path:
    """Where a new folder is filled."""
    return target.with_name(f".{target.name}.unfinished")


def _former_of(target: Path) -> Path:
    """Where what was at `target` waits while the new folder takes its place."""
    return target.with_name(f".{target.name}.replaced")


def recover(target: Path) -> None:
    """Put back what was at `target` if a run was killed while it replaced it, and remove what it left.

    Call it under the lock of `target`.
    """
    former, scratch = _former_of(target), _scratch_of(target)
    if former.exists() and not target.exists():
        former.rename(target)
    for left in (former, scratch):
        _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for folder, inner, _ in os.walk(path):  # an owner may have made folders that nobody can change
            for name in inner:
                if not (child := Path(folder, name)).is_symlink():
                    child.chmod(0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Fill a hidden sibling of `target`; on success it becomes `target`, on any error it is removed.

    Args:
        target (`Path`): the folder to make.
        replace (`bool`, *optional*, defaults to `False`): whether it may replace what is there.

    Raises:
        FileExistsError: if `target` exists, is not an empty folder and may not be replaced.
        InputError: if another run is making it.
    """
    target = target.absolute()
    with locked(target):
        recover(target)
        if is_taken(target) and not replace:
            raise FileExistsError(f"{target} exists already")
        scratch = _scratch_of(target)
        scratch.mkdir()
        try:
            yield scratch
            flush_folder(scratch)
            _take_place(scratch, target)
        except BaseException:
            recover(target)
            raise


def _take_place(scratch: Path, target: Path) -> None:
    former = _former_of(target)
    if target.exists():
        target.rename(former)
    scratch.rename(target)
    _flush(target.parent)
    _remove(former)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A hidden sibling of `target` to write to; on success it becomes `target`, on any error it is removed.

    No reader ever sees half a file, and two writers never collide: the last one to finish wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{_UNFINISHED}{target.name}-"
    _remove_abandoned(target.parent, prefix)
    handle, name = tempfile.mkstemp(prefix=prefix, dir=target.parent)
    scratch = Path(name)
    with ExitStack() as stack:
        stack.callback(scratch.unlink, missing_ok=True)
        stack.callback(os.close, handle)
        _try_flock(handle)
        yield scratch
        scratch.chmod(0o644)
        _flush(scratch)
        scratch.replace(target)
        _flush(target.parent)


def is_unfinished(name: str) -> bool:
    """Whether a file of this name, or relative path, is one that a [`whole_file`] is being written to, or was."""
    return name.rpartition("/")[2].startswith(_UNFINISHED)


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove what killed writers left: nobody holds its lock any more."""
    for left in folder.glob(f"{_literal(prefix)}*"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDWR)
            try:
                if _try_flock(handle):
                    left.unlink()
            finally:
                os.close(handle)


def _literal(name: str) -> str:
    """A pattern that matches only `name`."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _try_flock(handle: int) -> bool:
    """Lock an open file until it is closed, if nobody else has. Where there are no such locks, never."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def flush_folder(folder: Path) -> None:
    """Have the system write a folder and all that is in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Have the system write a file or folder to the disk, so that a loss of power cannot lose it after a rename."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    if path.is_dir() and os.name == "nt":  # Windows has no handles of folders
        return
    try:
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:  # it was not written by this run
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(target: Path, content: str | bytes) -> None:
    """Write `content` as a [`whole_file`]."""
    with whole_file(target) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
