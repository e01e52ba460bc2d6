"""Folders that are named by a path, or by an address such as `s3://bucket/corpus` of any file system of fsspec."""

import shutil
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from midimamba.errors import InputError
from midimamba.files import is_taken, is_unfinished, whole_file


def is_address(name: str) -> bool:
    """Whether a folder is named by an address, not by a path."""
    return "://" in name


class Folder:
    """
    A folder on any file system. Each file in it is written whole, or not at all.

    Args:
        address (`str`): a path, or an address that fsspec knows.

    Raises:
        InputError: if there is no such file system, or a package for it is missing.
    """

    def __init__(self, address: str) -> None:
        try:
            # To fsspec, `::` in a path is more than a part of its name.
            self._fs, path = (
                url_to_fs(address) if is_address(address) else (LocalFileSystem(), Path(address).absolute())
            )
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{address} cannot be used ({reason}): check the name, or install the package") from error
        self._path = str(path).rstrip("/")
        self.local = Path(self._path) if isinstance(self._fs, LocalFileSystem) else None
        """The path, if it is on a file system of this machine."""
        self.address = address if self.local is None else str(self.local)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return bool(self._fs.isfile(self._at(name)))

    def is_taken(self) -> bool:
        """Whether there is something that a new folder would replace."""
        return is_taken(self.local) if self.local is not None else bool(self.names())

    def names(self) -> list[str]:
        """The files in it and in its subfolders, relative to it, by name, without what a killed run left."""
        if not self._fs.isdir(self._path):
            return []
        found = (str(path).removeprefix(self._path).lstrip("/") for path in self._fs.find(self._path))
        return sorted(name for name in found if not is_unfinished(name))

    def get(self, name: str, scratch: Path) -> Path:
        """A file as one that is on this machine, if need be as a copy in the folder `scratch`."""
        if self.local is not None:
            return self.local / name
        self.fetch(name, scratch / name)
        return scratch / name

    def fetch(self, name: str, copy: Path) -> None:
        """Copy a file to this machine."""
        copy.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(self._at(name), str(copy))

    def put(self, source: Path, name: str) -> None:
        """Write a copy of a file, in place of one that is there."""
        if self.local is not None:
            with whole_file(self.local / name) as unfinished:
                shutil.copyfile(source, unfinished)
        else:
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(source), self._at(name))

    def read(self, name: str) -> str:
        """The text of a file."""
        return str(self._fs.cat_file(self._at(name)).decode())

    def write(self, name: str, text: str) -> None:
        """Write a file with this text."""
        if self.local is not None:
            with whole_file(self.local / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        else:
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(self._at(name), text.encode())

    def remove(self, *names: str) -> None:
        """Remove files and folders in it; itself without any."""
        for path in [self._at(name) for name in names] or [self._path]:
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def dissolve(self, last: str) -> None:
        """Remove all of it, one file after all others: by that file, what an interruption leaves is known."""
        self.remove(*({name.partition("/")[0] for name in self.names()} - {last}))
        self.remove()

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (self.address,)
