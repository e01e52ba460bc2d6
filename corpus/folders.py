"""The files of a folder and its subfolders, linked ones included. Whatever is not a regular file gets a reason."""

import os
from collections.abc import Iterator
from os import scandir
from pathlib import Path
from stat import S_ISBLK, S_ISCHR, S_ISDIR, S_ISFIFO, S_ISLNK, S_ISREG, S_ISSOCK

from midimamba.corpus.archives import describe
from midimamba.corpus.entries import Refusal, unique_name

_KINDS = {S_ISFIFO: "a named pipe", S_ISSOCK: "a socket", S_ISCHR: "a device", S_ISBLK: "a device"}
# A name, and where it is.
_Place = tuple[str, Path]


def walk(root: Path) -> Iterator[tuple[str, Path, int] | Refusal]:
    """Every regular file as its name, path and size in bytes, and a [`Refusal`] for everything else but folders.

    Linked folders come last, so that a folder that is also linked is read under its own name. Each folder is read
    once, so links cannot lead in circles.
    """
    links: list[_Place] = []
    seen = _Seen()
    seen.add(root)
    yield from _walk_tree(("", root), links, seen)
    while links:
        links.sort(reverse=True)
        name, path = links.pop()
        if reason := seen.objection_to(path):
            yield _refuse(name, reason)
        else:
            seen.add(path)
            yield from _walk_tree((f"{name}/", path), links, seen)


class _Seen:
    """The trees that are read: the source, and one for each linked folder."""

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._keys: set[tuple[int, int]] = set()

    def add(self, path: Path) -> None:
        self._paths.append(os.path.realpath(path))
        try:
            info = path.stat()
        except OSError:
            return  # reading it gives the reason
        self._keys.add((info.st_dev, info.st_ino))

    def objection_to(self, link: Path) -> str | None:
        """Why a linked folder must not be read."""
        target = os.path.realpath(link)
        if _lies_in(os.path.realpath(link.parent), target):
            return "it is a link to a folder that it lies in: a loop"
        if any(_lies_in(target, path) for path in self._paths):
            return "it is a link to a folder that is read already"
        return None

    def starts_at(self, info: os.stat_result) -> bool:
        """Whether a folder is the root of a tree that is read."""
        return (info.st_dev, info.st_ino) in self._keys


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _walk_tree(start: _Place, links: list[_Place], seen: _Seen) -> Iterator[tuple[str, Path, int] | Refusal]:
    """A tree without the folders that are linked in it, which are added to `links`."""
    folders = [start]
    while folders:
        prefix, folder = folders.pop()
        try:
            with scandir(folder) as entries:
                for entry in entries:
                    name, path = prefix + unique_name(entry.name), Path(entry.path)
                    try:
                        info = entry.stat()
                    except OSError as error:
                        what = "it is a link that leads nowhere" if _is_link(path) else "it cannot be read"
                        yield _refuse(name, f"{what} ({describe(error)})")
                        continue
                    if not S_ISDIR(info.st_mode):
                        yield (name, path, info.st_size) if S_ISREG(info.st_mode) else _refuse(name, _kind(info))
                    elif entry.is_symlink():
                        links.append((name, path))
                    elif seen.starts_at(info):
                        yield _refuse(name, "the folder is read already, through a link")
                    else:
                        folders.append((f"{name}/", path))
        except OSError as error:
            yield _refuse(prefix.rstrip("/") or ".", f"the folder cannot be read ({describe(error)})")


def _is_link(path: Path) -> bool:
    try:
        return S_ISLNK(path.lstat().st_mode)
    except OSError:
        return False


def _kind(info: os.stat_result) -> str:
    kind = next((kind for is_kind, kind in _KINDS.items() if is_kind(info.st_mode)), "something else")
    return f"it is {kind}, not a regular file"


def _refuse(name: str, reason: str) -> Refusal:
    return Refusal(name, None, "read", reason)
