"""Where MIDI files come from: a folder, an archive, a folder with archives in it, or the chorales of music21.

Archives are read as they are. Nothing is unpacked to the disk, so the names of members are only names, whatever path
they claim.
"""

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from itertools import groupby
from pathlib import Path
from typing import IO, cast

from midimamba.corpus.entries import MUSICXML_SUFFIXES, Entry, Refusal
from midimamba.corpus.manifests import Label, is_manifest, read_manifests
from midimamba.errors import InputError
from midimamba.tokenization.ingest import (
    MAX_FILE_BYTES,
    MIDI_SUFFIXES,
    TOO_LARGE,
    MidiRefusedError,
    read_content,
)

CHORALES = "chorales"
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
NO_MUSIC21 = 'the chorales come with music21: pip install "midimamba[demo]"'
# Name, size and place of a member, the last as in `Entry`.
_Member = tuple[str, int, int | str]
# The only one of music21's Bach entries that isn't a chorale: a prelude for keyboard.
_NOT_A_CHORALE = "bwv846"


def list_source(source: str, columns: Sequence[str] = ()) -> Iterator[Entry | Refusal | Label]:
    """The MIDI files of a source in any order, its broken archives, and what its manifests say about files.

    Args:
        source (`str`):
            A folder, searched recursively, archives included; an archive; or `chorales`.
        columns (sequence of `str`, *optional*):
            Columns of manifests to read as labels.

    Raises:
        InputError: if it isn't one of these, is a broken archive, or has a manifest that makes no sense.
    """
    if source == CHORALES:
        yield from _find_chorales()
        return
    manifests: dict[str, Entry] = {}
    for item in _list_files(source):
        if isinstance(item, Entry) and is_manifest(item.name):
            manifests[item.name] = item  # where an archive holds a name twice, the later one counts
        else:
            yield item
    yield from read_manifests(read_entries(manifests.values()), source, columns)


def read_entries(entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | MidiRefusedError]]:
    """The bytes of every entry, or why there are none. An archive is opened once for all entries in a row."""
    for path, group in groupby(entries, key=lambda entry: entry.path):
        members = list(group)
        if isinstance(members[0].member, str):
            yield from _read_zip(path, members)
        elif members[0].member is not None:
            yield from _read_tar(path, members)
        else:
            yield from zip(members, map(_read_file, members), strict=True)


def _list_files(source: str) -> Iterator[Entry | Refusal]:
    """MIDI files, manifests and broken archives."""
    path = Path(source)
    if path.is_dir():
        yield from _list_folder(path)
        return
    if not (path.is_file() and _is_archive(path)):
        raise InputError(
            f"{source} is not a folder, an archive ({', '.join(ARCHIVE_SUFFIXES)}) or a data set on the Hub "
            f"(owner/name): name one with MIDI files, or write {CHORALES}"
        )
    try:
        yield from _list_archive(path, path.name)
    except MidiRefusedError as error:
        raise InputError(f"{source}: {error.reason}") from error


def _list_folder(root: Path) -> Iterator[Entry | Refusal]:
    for folder, _, files in os.walk(root):
        for file in files:
            path = Path(folder, file)
            name = _printable(path.relative_to(root).as_posix())
            if not (_is_midi(file) or is_manifest(file) or _is_archive(path)) or not path.is_file():
                continue
            if not _is_archive(path):
                yield Entry(name, path, path.stat().st_size)
                continue
            try:
                yield from _list_archive(path, name)
            except MidiRefusedError as error:
                yield Refusal(name, _digest_of(path), "read", error.reason)


def _list_archive(path: Path, name: str) -> list[Entry]:
    """The MIDI files and manifests in an archive.

    Raises:
        MidiRefusedError: if the archive is broken.
    """
    try:
        members = list(_zip_members(path) if path.suffix.lower() == ".zip" else _tar_members(path))
    except Exception as error:
        # Python's archive readers answer hostile archives with struct.error, RecursionError, MemoryError and more.
        raise MidiRefusedError(f"the archive cannot be read ({_describe(error)})") from error
    wanted = [member for member in members if _is_midi(member[0]) or is_manifest(member[0])]
    return [Entry(_printable(f"{name}/{inner}"), path, size, place) for inner, size, place in wanted]


def _zip_members(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size, info.filename


def _tar_members(path: Path) -> Iterator[_Member]:
    with _open_tar(path) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as archive:
        for info in archive:
            if info.isreg() and not info.issparse():
                yield info.name, info.size, info.offset_data
        # tarfile takes a damaged header for the end of the archive. The end is zeros, or nothing.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {archive.offset:,}")


class _TarStream:
    """The content of a tar file for `tarfile`, which reads a header at once, however large it claims to be."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_FILE_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


@contextmanager
def _open_tar(path: Path) -> Iterator[_TarStream]:
    compressed = path.suffix.lower() in (".gz", ".tgz")
    with gzip.open(path) if compressed else path.open("rb") as file:
        yield _TarStream(cast(IO[bytes], file))


def _read_file(entry: Entry) -> bytes | MidiRefusedError:
    try:
        return read_content(entry.path)
    except MidiRefusedError as error:
        return error


def _read_tar(path: Path, entries: list[Entry]) -> Iterator[tuple[Entry, bytes | MidiRefusedError]]:
    """Members in the order of their offsets, so that a compressed file is read once."""
    with _open_tar(path) as stream:
        for entry in sorted(entries, key=lambda entry: cast(int, entry.member)):
            yield entry, _read_member(stream, entry)


def _read_zip(path: Path, entries: list[Entry]) -> Iterator[tuple[Entry, bytes | MidiRefusedError]]:
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            yield entry, _read_member(archive, entry)


def _read_member(archive: _TarStream | zipfile.ZipFile, entry: Entry) -> bytes | MidiRefusedError:
    if entry.size > MAX_FILE_BYTES:
        return MidiRefusedError(TOO_LARGE)
    try:
        if isinstance(archive, zipfile.ZipFile):
            with archive.open(cast(str, entry.member)) as file:
                return file.read(MAX_FILE_BYTES)
        archive.seek(cast(int, entry.member))
        return archive.read(entry.size)
    except Exception as error:  # as for the archive: a wrong checksum, a password, an unknown compression …
        return MidiRefusedError(f"it cannot be read from the archive ({_describe(error)})")


def _find_chorales() -> Iterator[Entry]:
    try:
        with redirect_stderr(io.StringIO()):  # music21 comments on other packages that one might install
            from music21 import corpus
    except ImportError as error:
        raise InputError(NO_MUSIC21) from error
    # Three more are Humdrum encodings (.krn) of chorales that are also there as MusicXML; one of them does not parse.
    paths = [Path(path) for path in corpus.getComposer("bach") if Path(path).suffix in MUSICXML_SUFFIXES]
    for path in paths:
        if path.stem != _NOT_A_CHORALE:
            yield Entry(f"bach/{path.stem}", path, path.stat().st_size)


def _is_midi(name: str) -> bool:
    return Path(name).suffix.lower() in MIDI_SUFFIXES


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def _printable(name: str) -> str:
    """A name that is not text in any encoding can be neither written as JSON nor stored by Arrow."""
    return name.encode(errors="backslashreplace").decode()


def _describe(error: Exception) -> str:
    """An error in one line, without the path that an error of the operating system repeats."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def _digest_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
