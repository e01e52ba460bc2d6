"""Files and folders that are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_taken(target: Path) -> bool:
    """Whether there is something at `target` that a new folder would replace. An empty folder does not count."""
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


@contextmanager
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Fill a temporary sibling of `target`; on success it becomes `target`, on any error it is removed.

    Args:
        target (`Path`): the folder to make.
        replace (`bool`, *optional*, defaults to `False`): whether it may replace what is there.

    Raises:
        FileExistsError: if `target` exists, is not an empty folder and may not be replaced.
    """
    if is_taken(target) and not replace:
        raise FileExistsError(f"{target} exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-old-", dir=target.parent) as old:
            if target.exists() and (replace or not is_taken(target)):
                target.rename(Path(old) / target.name)
            scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` to write to; on success it becomes `target`, on any error it is removed.

    No reader ever sees half a file, and two writers never collide.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".unfinished-{target.name}-", dir=target.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(target: Path, content: str | bytes) -> None:
    """Write `content` as a [`whole_file`]."""
    with whole_file(target) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
