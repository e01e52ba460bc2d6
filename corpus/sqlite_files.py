"""SQLite files that other programs, full disks and broken ones may harm."""

import sqlite3
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midimamba.errors import InputError

# What SQLite says of a file that is not as it wrote it: damaged, foreign, cut off, without our tables.
_DAMAGE = {
    None,  # what Python's `sqlite3` and this package say
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_MISMATCH,
}


def delete_store(path: Path) -> None:
    """Remove a store and what SQLite may have left beside it. Nobody may have it open."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def explain(path: Path, error: sqlite3.DatabaseError) -> Exception:
    """What a user reads instead of an error of SQLite; bugs stay what they are."""
    code = _code_of(error)
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        where = f"the disk of {path} or the folder for temporary files, {tempfile.gettempdir()}"
        return InputError(f"{where}, is full or broken ({error}): make room, then run the same command again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return InputError(f"{path} is in use by another program ({error}): wait until it ends")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return InputError(
            f"{path} cannot be used ({error}): choose a folder that can be written to, or a shorter name"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return InputError(f"{path} was damaged while it was in use ({error}): run the same command again")
    return error


def _code_of(error: sqlite3.DatabaseError) -> int | None:
    """SQLite's primary error code; `None` for errors of Python's `sqlite3`."""
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return sqlite3.SQLITE_CORRUPT  # the file was cut off
    return None if code is None else code & 0xFF


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether a file is not as SQLite and this package wrote it."""
    return _code_of(error) in _DAMAGE


def tables_of(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """What tables a file has, as the statements that made them."""
    return db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()


def checksum(row: Sequence[Any]) -> int:
    """Of an outcome, whether SQLite gave its text as `str` or as `bytes`."""
    values = (value if isinstance(value, bytes) else str(_plain(value)).encode() for value in row)
    return zlib.crc32(b"\0".join(values))


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value
