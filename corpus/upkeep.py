"""What stands in a corpus and beside it, apart from the corpus: what its owner put there, and what a run keeps.

A run keeps what it reads in a hidden file beside the corpus, so that another one can continue. Everything here expects
the lock of the corpus.
"""

import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from datasets.exceptions import DatasetsError
from tqdm import tqdm

from midimamba.corpus.load import SPLITS
from midimamba.corpus.sqlite_files import delete_store, explain
from midimamba.corpus.store import PieceStore
from midimamba.errors import InputError
from midimamba.files import recover

# In the corpus: the result of reading every file, for the next run.
STORE_FILE = "pieces.sqlite"
# What `datasets` leaves in the folder of a split when somebody maps or filters its rows. It belongs to those rows.
_CACHES = ("cache-*.arrow", "tmp*")
# What a folder holds that an earlier version of this package was filling when it was killed.
_PARTS = {*SPLITS, ".cache", "tokenizer", "dataset_dict.json", "quarantine.jsonl"}
# How errors of Rust libraries end.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)$")


def target_of(out: Path) -> Path:
    """The folder that `out` means: a link leads to it.

    Raises:
        InputError: if it cannot be replaced, because it is the current folder or a disk.
    """
    real = Path(os.path.realpath(out))
    if Path.cwd().is_relative_to(real):
        raise InputError(f"{out} is the current folder, or one around it: name a folder inside")
    if real.is_mount():
        raise InputError(f"{out} is a disk of its own, which no corpus can replace: name a folder inside")
    return out if out.absolute() == real else real


def tidy(out: Path) -> None:
    """Put back what a killed run was replacing, and remove what it left, of this version or an earlier one.

    Only folders that no run completed are removed: another may be somebody's copy.
    """
    recover(out)
    copy = _store_path(out).name
    for left in out.parent.iterdir():
        name = left.name
        if name.startswith(f".unfinished-{copy}-") or name == f"{copy}.unfinished":
            left.unlink()
        elif re.fullmatch(rf"\.{re.escape(out.name)}-[a-z0-9_]{{8}}", name) and left.is_dir():
            if {path.name for path in left.iterdir()} <= _PARTS:
                shutil.rmtree(left)
        elif re.fullmatch(rf"\.{re.escape(out.name)}-old-[a-z0-9_]{{8}}", name) and left.is_dir():
            if not out.exists() and (left / out.name).is_dir():
                (left / out.name).rename(out)
            if not any(left.iterdir()):
                left.rmdir()


def carry_over(former: Path, folder: Path, written: Collection[str]) -> None:
    """Put into the new `folder` what a corpus holds that no run wrote: notes, a card, folders, links.

    Files are linked, not moved: until the new folder is in its place, the former one stays complete.

    Args:
        former (`Path`): the corpus that will be replaced.
        folder (`Path`): the new one. What it has already stays.
        written (collection of `str`): what the run that made the former one wrote, relative to it.
    """
    for path in sorted(former.iterdir()):
        _carry(path, folder / path.name, former, written)
    shutil.copymode(former, folder)


def _carry(path: Path, target: Path, former: Path, written: Collection[str]) -> None:
    name = path.relative_to(former).as_posix()
    if path.is_dir() and not path.is_symlink():
        made = not target.exists()
        target.mkdir(exist_ok=True)
        for inner in sorted(path.iterdir()):
            _carry(inner, target / inner.name, former, written)
        if made and name in written and not any(target.iterdir()):
            target.rmdir()
        elif made:
            shutil.copystat(path, target)
    elif not (os.path.lexists(target) or name in written or _is_cache(path, former)):
        link(path, target)


def _is_cache(path: Path, former: Path) -> bool:
    return path.parent in {former / split for split in SPLITS} and any(fnmatch(path.name, name) for name in _CACHES)


def link(path: Path, target: Path) -> None:
    """Put a file, or a link, at another place as well; where the disk cannot do that, a copy of it."""
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        if not (path.is_file() or path.is_symlink()):
            raise
        # Some disks have no hard links, and some systems allow them only to a file's owner.
        shutil.copy2(path, target, follow_symlinks=False)


def contents(folder: Path) -> list[str]:
    """Everything in a folder, relative to it, by name."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _store_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.{STORE_FILE}")


@contextmanager
def reading_store(out: Path, reader: str, vocabularies: int) -> Iterator[PieceStore]:
    """Where a run keeps what it reads. It continues from an interrupted run, or from the corpus at `out`.

    It is removed when the run ends well. An error leaves it there if another run can use it.

    Raises:
        InputError: if the disk is full, or the file cannot be used for another reason.
    """
    path = _store_path(out)
    origin = path
    if not (continued := path.exists()):
        delete_store(path)  # SQLite would take a journal that was left here for one of the copy
        if (out / STORE_FILE).is_file():
            origin = out / STORE_FILE
            unfinished = path.with_name(f"{path.name}.unfinished")
            shutil.copyfile(origin, unfinished)
            unfinished.replace(path)
    store = None
    try:
        with PieceStore(path, reader, vocabularies) as store:
            if store.damage:
                tqdm.write(f"{origin} is damaged ({store.damage}): what is lost is read again", file=sys.stderr)
            yield store
    except sqlite3.DatabaseError as error:
        raise explain(path, error) from error
    except InputError:
        if not continued and not (store and store.has_new_pieces):
            delete_store(path)
        raise
    delete_store(path)


@contextmanager
def showing_causes() -> Iterator[None]:
    """Raise the cause of an error that a library wraps, so that a full disk is told from a bug."""
    try:
        yield
    except DatasetsError as error:
        cause: BaseException | None = error
        while isinstance(cause, DatasetsError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from error
    except Exception as error:
        # `tokenizers` raises a bare `Exception` for errors of the operating system.
        if type(error) is Exception and (found := _RUST_ERROR.search(str(error))):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise
