"""The members of archives, read with bounds on everything that a hostile archive may claim or unpack to.

Python's archive readers believe what they read: a member of -1 bytes, a header of gigabytes, a table of contents as
long as a sparse file. Here every read has a limit, and an archive as a whole has a [`Budget`].
"""

import bz2
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import islice
from stat import S_ISLNK
from typing import IO, Any, cast

from midimamba.tokenization.abc_notation import NO_TUNE, Tunes
from midimamba.tokenization.ingest import MAX_FILE_BYTES, TOO_LARGE, MidiRefusedError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# A file of ABC notation may hold many tunes.
BOOK_SUFFIX = ".abc"
# Music is unpacked to 3 to 10 times its size. Zeros come to 1,000 times (gzip) and a million times (bzip2).
MAX_RATIO = 100
# What an archive may be unpacked to, however small it is.
MIN_UNPACKED = 2**28
# Python keeps about a kilobyte for each.
MAX_MEMBERS = 1_000_000
# Paths have 4,096 bytes on Linux. Extended headers also hold attributes of files.
_MAX_HEADER = 2**20
_MAX_CONTENTS_TABLE = 2**26
# `xz -9` needs 65 MB. A header can ask for 4 GB.
_MAX_XZ_MEMORY = 2**27
_STEP = 2**16


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive.

    Args:
        name (`str`):
            Its path, as the archive says.
        size (`int`):
            In bytes, as the archive says.
        place (`int` or `str`):
            Its offset in a tar file, its name in a zip file, its offset in a book of tunes.
        defect (`str`, *optional*):
            Why it cannot be read: it is a link, say.
    """

    name: str
    size: int
    place: int | str
    defect: str | None = None


class Budget:
    """What may still be unpacked from an archive and those in it, in bytes."""

    def __init__(self, size: int) -> None:
        self._limit = self._left = max(MIN_UNPACKED, MAX_RATIO * size)

    def spend(self, count: int) -> None:
        """Count unpacked bytes.

        Raises:
            MidiRefusedError: if there are more than the archive may be unpacked to.
        """
        self._left -= count
        if self._left < 0:
            raise MidiRefusedError(f"it unpacks to more than {self._limit // 2**20:,} MB, as only a bomb does")


class ZipArchive:
    """A zip file.

    Args:
        file (binary file):
            Its content.
        budget (`Budget`):
            Of what it may be unpacked to.
    """

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        self._archive = zipfile.ZipFile(cast(IO[bytes], _BoundedFile(file)))
        self._budget = budget

    def members(self) -> Iterator[Member]:
        """Every file, in the order of the table of contents."""
        for info in self._archive.infolist():
            if not info.is_dir():
                mode = info.external_attr >> 16
                yield Member(info.filename, info.file_size, info.filename, _LINK if S_ISLNK(mode) else None)

    def read(self, place: int | str, size: int) -> bytes:
        """A member's bytes, at most as many as the table of contents says."""
        self._budget.spend(size)
        info = self._archive.getinfo(cast(str, place))
        if info.compress_type == zipfile.ZIP_BZIP2:
            return self._read_bzip2(info)
        # `zipfile` unpacks the whole of what it reads of LZMA at once: 4 KB may hold 30 MB.
        step = 2**12 if info.compress_type == zipfile.ZIP_LZMA else _STEP
        with self._archive.open(info) as file:
            return b"".join(iter(lambda: cast(zipfile.ZipExtFile, file).read1(step), b""))

    def _read_bzip2(self, info: zipfile.ZipInfo) -> bytes:
        """4 KB of bzip2 may hold 4 GB, and `zipfile` unpacks all of it."""
        packed = copy(info)
        packed.compress_type, packed.file_size = zipfile.ZIP_STORED, min(info.compress_size, MAX_FILE_BYTES)
        cast(Any, packed).CRC = None  # that of the content, not of the packed bytes
        with self._archive.open(packed) as file:
            content = bz2.BZ2Decompressor().decompress(file.read(packed.file_size), info.file_size)
        if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
            raise zipfile.BadZipFile("Bad CRC-32")
        return content


class TarArchive:
    """A tar file, compressed or not, which is read forwards only.

    Args:
        file (binary file):
            Its content.
        name (`str`):
            The suffix says how it is compressed.
        budget (`Budget`):
            Of what it may be unpacked to.
    """

    def __init__(self, file: IO[bytes], name: str, budget: Budget) -> None:
        decoder = _DECODERS.get(name.lower()[-2:])
        self._stream = _TarStream(_Unpacked(file, decoder, budget) if decoder else file)

    def members(self) -> Iterator[Member]:
        """Every file but folders. A member can be read while it is the current one.

        Raises:
            tarfile.ReadError: if the archive is damaged.
        """
        archive = tarfile.open(fileobj=cast(IO[bytes], self._stream), mode="r:")  # noqa: SIM115
        while info := archive.next():
            cast(Any, archive).members.clear()  # `tarfile` keeps all headers
            self._stream.headers = 0
            if not info.isdir():
                yield Member(info.name, info.size, info.offset_data, _defect_of(info))
        # tarfile takes a damaged header for the end of the archive. The end is zeros, or nothing.
        if self._stream.last.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {archive.offset:,}")

    def read(self, place: int | str, size: int) -> bytes:
        """The `size` bytes of the member at an offset, which lies behind all that was read before."""
        self._stream.seek(cast(int, place))
        content = self._stream.take(size)
        if len(content) < size:
            raise tarfile.ReadError("the archive ends within it")
        return content


class TuneBook:
    """A file of ABC notation: each tune of it is a member.

    Args:
        file (binary file):
            Its content.
        budget (`Budget`):
            Of what all tunes together may have, each with what the file says for all of them.

    Raises:
        MidiRefusedError: if it is too large, or holds no tune.
    """

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise MidiRefusedError(TOO_LARGE)
        self._tunes = Tunes(content)
        self._budget = budget

    def members(self) -> Iterator[Member]:
        """Every tune, by its number counted from 1. A tune that is alone has no name but the book's.

        Raises:
            MidiRefusedError: if there is none.
        """
        several = len(list(islice(self._tunes.places(), 2)))
        if not several:
            raise MidiRefusedError(NO_TUNE)
        for number, (place, size) in enumerate(self._tunes.places(), 1):
            yield Member(str(number) if several > 1 else "", size, place)

    def read(self, place: int | str, size: int) -> bytes:
        """A tune, with what the book says for all tunes."""
        self._budget.spend(size)
        return self._tunes.read(cast(int, place), size)


Archive = ZipArchive | TarArchive | TuneBook


@contextmanager
def opened(file: IO[bytes], name: str, budget: Budget) -> Iterator[Archive]:
    """An archive of the kind that its name says.

    Raises:
        MidiRefusedError: if it cannot be read, whether on opening or while it is used.
    """
    try:
        if name.lower().endswith(BOOK_SUFFIX):
            yield TuneBook(file, budget)
        else:
            yield ZipArchive(file, budget) if name.lower().endswith(".zip") else TarArchive(file, name, budget)
    except MidiRefusedError:
        raise
    except Exception as error:
        # Python's archive readers answer hostile archives with struct.error, RecursionError, MemoryError and more.
        raise MidiRefusedError(f"the archive cannot be read ({describe(error)})") from error


def read_member(archive: Archive, place: int | str, size: int) -> bytes | MidiRefusedError:
    """The bytes of a member, or why there are none."""
    if size < 0:
        return MidiRefusedError(f"the archive says that it has {size:,} bytes")
    if size > MAX_FILE_BYTES:
        return MidiRefusedError(TOO_LARGE)
    try:
        return archive.read(place, size)
    except MidiRefusedError as error:
        return error
    except Exception as error:  # as for the archive: a wrong checksum, a password, an unknown compression …
        return MidiRefusedError(f"it cannot be read from the archive ({describe(error)})")


def is_archive(name: str) -> bool:
    """Whether a file of this name is an archive that can be read, or a book of tunes."""
    return name.lower().endswith((*ARCHIVE_SUFFIXES, BOOK_SUFFIX))


def kind_of(name: str) -> str:
    """The suffix that says how an archive is read."""
    return next(suffix for suffix in (*ARCHIVE_SUFFIXES, BOOK_SUFFIX) if name.lower().endswith(suffix))


def describe(error: Exception) -> str:
    """An error in one line, without the path that an error of the operating system repeats."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


_LINK = "it is a link in an archive"


def _defect_of(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return _LINK
    if info.issparse():
        return "it is a sparse file in an archive"
    return None if info.isreg() else "it is not a regular file"


class _BoundedFile:
    """A file for `zipfile`, which reads a table of contents at once, however long it claims to be."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable
        self.close = file.close

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._file.tell()
        size = left if size < 0 else min(size, left)
        if size > _MAX_CONTENTS_TABLE:
            raise zipfile.BadZipFile(f"a table of contents of {size:,} bytes")
        return self._file.read(max(size, 0))


class _TarStream:
    """The content of a tar file, forwards, for `tarfile` and [`TarArchive`].

    `tarfile` reads a header at once, however large it claims to be, and goes back where a size is negative.
    """

    def __init__(self, file: "IO[bytes] | _Unpacked") -> None:
        self._file = file
        self._position = 0
        self.headers = 0
        self.last = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError(f"a member of negative size before byte {self._position:,}")
        if not isinstance(self._file, _Unpacked):
            self._file.seek(position)
            self._position = position
        while self._position < position and self.take(min(2**20, position - self._position)):
            pass

    def read(self, size: int) -> bytes:
        """Headers, for `tarfile`."""
        self.headers += size
        if not 0 <= size <= _MAX_HEADER or self.headers > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size if abs(size) > _MAX_HEADER else self.headers:,} bytes")
        self.last = self.take(size)
        return self.last

    def take(self, size: int) -> bytes:
        content = self._file.read(size)
        self._position += len(content)
        return content


class _GzipDecoder:
    """`zlib`'s decoder with the methods that those of `bz2` and `lzma` have."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, packed: bytes, max_length: int) -> bytes:
        content = self._decoder.decompress(self._decoder.unconsumed_tail + packed, max_length)
        self.needs_input = not self._decoder.unconsumed_tail and len(content) < max_length
        return content


class _Unpacked:
    """What a compressed file unpacks to.

    Python's own classes set no limit to the memory of xz, skip zeros after gzip one by one, and take any number of
    empty streams.
    """

    def __init__(self, file: IO[bytes], new_decoder: Callable[[], Any], budget: Budget) -> None:
        self._file = file
        self._new_decoder = new_decoder
        self._budget = budget
        self._decoder = new_decoder()

    def read(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            packed = self._packed()
            if packed is None:
                break
            parts.append(self._decoder.decompress(packed, left))
            left -= len(parts[-1])
        content = b"".join(parts)
        self._budget.spend(len(content))
        return content

    def _packed(self) -> bytes | None:
        """What the decoder needs next; `None` at the end."""
        if not self._decoder.eof:
            packed = self._file.read(_STEP) if self._decoder.needs_input else b""
            if not packed and self._decoder.needs_input:
                raise EOFError("the compressed data ends too early")
            return packed
        # Another stream may follow, after zeros. Each is charged, since it may be empty.
        packed = self._decoder.unused_data.lstrip(b"\0") or self._file.read(_STEP).lstrip(b"\0")
        if not packed:
            return None
        self._budget.spend(_STEP)
        self._decoder = self._new_decoder()
        return packed


# By the end of the suffix.
_DECODERS: dict[str, Callable[[], Any]] = {
    "gz": _GzipDecoder,
    "z2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY),
}
