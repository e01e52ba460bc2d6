"""What hostile archives claim or unpack to does not reach the memory of the process that reads them."""

import bz2
import gzip
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midimamba.tokenization.ingest import MidiRefusedError, read_content, read_score

# `ru_maxrss` begins with that of the parent process, VmHWM does not.
MEMORY = """
import json, sys
from collections import defaultdict
from midimamba.corpus.entries import Entry, Refusal
from midimamba.corpus.sources import list_source, read_entries
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before, outcomes = peak(), defaultdict(str)
items = sorted((i for i in list_source(sys.argv[1]) if isinstance(i, Entry | Refusal)), key=lambda item: item.name)
for item in items:
    if isinstance(item, Refusal):
        outcomes[item.name.split("/")[0]] += item.reason
for entry, content in read_entries(item for item in items if isinstance(item, Entry)):
    outcomes[entry.name.split("/")[0]] += str(content) if isinstance(content, Exception) else str(len(content))
print(json.dumps({"megabytes": peak() - before, "outcomes": outcomes}))
"""


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    # The size in base 256, with its sign.
    block[124:136] = (size % 2**96 | (0 if size < 0 else 2**95)).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def zeros(count: int, compressor: Any) -> bytes:
    return b"".join(compressor.compress(bytes(2**20)) for _ in range(count >> 20)) + compressor.flush()


def gz(path: Path, *parts: bytes | int) -> None:
    """A tar.gz of bytes, and zeros by their number."""
    with gzip.open(path, "wb", compresslevel=6) as file:
        for part in parts:
            for _ in range(part >> 20 if isinstance(part, int) else 1):
                file.write(bytes(2**20) if isinstance(part, int) else part)


def negative_size(folder: Path) -> None:
    gz(folder / "a.tar.gz", header("a.mid", -1), 2**27)


def backwards(folder: Path) -> None:
    (folder / "a.tar").write_bytes(member("a.mid", b"1") + header("b.mid", -2048) + bytes(1024))


def skipped_member(folder: Path) -> None:
    gz(folder / "a.tar.gz", header("a.bin", 2**29), 2**29, member("b.mid", b"music"))


def many_headers(folder: Path) -> None:
    comment = b"1000010 comment=" + b"x" * 999_993 + b"\n"
    gz(folder / "a.tar.gz", *([member("p", comment, tarfile.XHDTYPE) + member("a.txt", b"")] * 100))


def long_name(folder: Path) -> None:
    gz(folder / "a.tar.gz", header("././@LongLink", 2**27, tarfile.GNUTYPE_LONGNAME), 2**27)


def sparse_map(folder: Path) -> None:
    pax = b"".join(
        b"%d %s\n" % (len(pair) + 4, pair)
        for pair in (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=9")
    )
    content = b"99999999\n" + b"0\n" * 2**24
    gz(folder / "a.tar.gz", member("p", pax, tarfile.XHDTYPE), member("a.mid", content))


def bzip2_in_zip(folder: Path) -> None:
    packed = zeros(2**28, bz2.BZ2Compressor())
    lying_zip(folder / "a.zip", packed, zipfile.ZIP_BZIP2, 1000)


def lzma_in_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_LZMA) as archive, archive.open("a.mid", "w") as file:
        for _ in range(2**7):
            file.write(bytes(2**20))
    content = (folder / "a.zip").read_bytes()
    (folder / "a.zip").write_bytes(content.replace(struct.pack("<I", 2**27), struct.pack("<I", 1000)))


def lying_zip(path: Path, packed: bytes, method: int, size: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.mid", packed)
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\1\2")
    for start in (0, central + 2):
        struct.pack_into("<H", content, start + 8, method)
        struct.pack_into("<I", content, start + 22, size)
    path.write_bytes(content)


def table_of_contents(folder: Path) -> None:
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**31, 0, 0)
    with (folder / "a.zip").open("wb") as file:
        file.truncate(2**31)
        file.seek(0, 2)
        file.write(end)


def dictionary(folder: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1_500_000_000, "preset": 0}]
    small = bytearray(lzma.compress(b"x" * 100, filters=[filters[0] | {"dict_size": 2**16}]))
    place = small.index(b"\x21\x01", 12) + 2  # the size of the dictionary in the header of the block
    small[place] = 40  # 4 GB
    block = small[12 : 12 + (small[12] + 1) * 4 - 4]
    small[12 + len(block) : 16 + len(block)] = struct.pack("<I", zlib.crc32(block))
    (folder / "a.tar.xz").write_bytes(small)


def padding(folder: Path) -> None:
    """A tar file that doesn't end, so that what follows it is read: zeros without end."""
    with (folder / "a.tar.gz").open("wb") as file:
        file.write(gzip.compress(member("a.mid", b"music")))
        file.truncate(5 * 2**30)


def empty_streams(folder: Path) -> None:
    (folder / "a.tar.gz").write_bytes(gzip.compress(member("a.mid", b"music")) + gzip.compress(b"") * 10**6)


def sparse(folder: Path) -> None:
    for name in ("a.zip", "b.mid", "c.tar", "d.tar.gz"):
        with (folder / name).open("wb") as file:
            file.truncate(5 * 2**30)


BOMBS: dict[Callable[[Path], None], str] = {
    negative_size: "the archive says that it has -1 bytes",
    backwards: "a member of negative size before byte",
    skipped_member: "it unpacks to more than 256 MB, as only a bomb does",
    long_name: "a header of 134,217,728 bytes",
    sparse_map: "a header of 1,049,088 bytes",
    bzip2_in_zip: "Bad CRC-32",
    lzma_in_zip: "Bad CRC-32",
    table_of_contents: "a table of contents of 2,147,483,648 bytes",
    dictionary: "Memory usage limit exceeded",
    empty_streams: "as only a bomb does",
}


@pytest.mark.slow
def test_bombs_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    """Each once filled the memory, or took minutes."""
    for bomb in (*BOMBS, many_headers, padding, sparse):
        (tmp_path / bomb.__name__).mkdir()
        bomb(tmp_path / bomb.__name__)
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    told = json.loads(result.stdout)
    assert told["megabytes"] < 100
    assert time.monotonic() - start < 30  # 8 seconds, most of them for imports
    for bomb, reason in BOMBS.items():
        assert reason in told["outcomes"][bomb.__name__], bomb.__name__
    assert told["outcomes"]["padding"] == str(len(b"music"))
    assert "larger than 16 MB" in told["outcomes"]["sparse"]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device to link to")
def test_a_link_to_something_endless_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "zero.mid").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.mid")
    for name in ("zero.mid", "pipe.mid"):
        with pytest.raises(MidiRefusedError, match="it is not a regular file"):
            read_score(tmp_path / name)


def test_a_pipe_put_in_place_of_a_file_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mid"
    path.write_bytes(b"music")
    regular = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self: regular)
    with pytest.raises(MidiRefusedError, match="it is not a regular file"):
        read_content(path)
