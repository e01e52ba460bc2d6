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
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Fill a temporary sibling of `target`; on success it becomes `target`, on any error it is removed.

    Args:
        target (`Path`): the folder to make.
        replace (`bool`, *optional*, defaults to `False`): whether it may take the place of what is there.

    Raises:
        FileExistsError: if `target` exists already, is not an empty folder and may not be replaced.
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
