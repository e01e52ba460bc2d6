"""Files and folders that are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_taken(target: Path) -> bool:
    """Whether there is something at `target` that a new folder would replace; an empty folder is nothing."""
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary sibling of `target`; on success it becomes `target`, on any error it is removed.

    Raises:
        FileExistsError: if `target` exists already and is not an empty folder.
    """
    if is_taken(target):
        raise FileExistsError(f"{target} exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_whole(target: Path, content: str | bytes) -> None:
    """Write `content` under a temporary name and rename, so that no reader ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        Path(scratch).chmod(0o644)
        Path(scratch).replace(target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
