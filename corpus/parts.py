"""What tasks of a cluster hand to each other: SQLite files with some tables of a store, or with some rows of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from midimamba.corpus.store import PieceStore

# The tables of a store, and where SQLite keeps them.
_SCHEMAS = {"files": "temp", "labels": "temp", "pieces": "temp", "outcomes": "main"}


def write_part(store: PieceStore, path: Path, *tables: str, but: str = "0") -> None:
    """Write whole tables of a store to a new file, of `files` only those for which the SQL term `but` is false."""
    with store.beside(path, new=True) as db:
        for table in tables:
            rows = f"{_SCHEMAS[table]}.{table}" + (f" WHERE NOT ({but})" if table == "files" else "")
            db.execute(f"CREATE TABLE part.{table} AS SELECT * FROM {rows}")


def take_part(store: PieceStore, path: Path) -> None:
    """Add the rows of a part to a store. What was read of the same bytes stays, unless its worker was lost."""
    with store.beside(path) as db:
        there = {name for (name,) in db.execute("SELECT name FROM part.sqlite_master")}
        for table, schema in _SCHEMAS.items():
            if table in there:
                known = "sha256 IN (SELECT sha256 FROM main.outcomes WHERE NOT lost)"
                rows = f"part.{table}" + (f" WHERE NOT ({known})" if table == "outcomes" else "")
                db.execute(f"INSERT OR REPLACE INTO {schema}.{table} SELECT * FROM {rows}")


def divide_files(store: PieceStore, count: int, folder: Path) -> None:
    """Write the files that are to be read to `count` parts.

    They stay in the order in which they lie, so that few tasks open the same archive.
    """
    total = store.num_files()
    place: tuple[Any, ...] = (b"", -1, "")
    columns = "container, coalesce(member, 0), name"
    for index in range(count):
        with store.beside(folder / f"{index:05}.sqlite", new=True) as db:
            db.execute(
                "CREATE TABLE part.files AS SELECT * FROM temp.files WHERE reason IS NULL "
                f"AND ({columns}) > (?, ?, ?) ORDER BY {columns} LIMIT ?",
                (*place, _share(total, index, count)),
            )
            place = db.execute(f"SELECT {columns} FROM part.files ORDER BY rowid DESC LIMIT 1").fetchone() or place


def divide_pieces(store: PieceStore, count: int, folder: Path) -> Iterator[Path]:
    """Write the pieces to `count` parts, by name, with what was read of them. A part may be removed when the next one
    is asked for."""
    total, name = store.num_pieces(), ""
    for index in range(count):
        path = folder / f"{index:05}.sqlite"
        with store.beside(path, new=True) as db:
            db.execute(
                "CREATE TABLE part.pieces AS SELECT * FROM temp.pieces WHERE name > ? ORDER BY name LIMIT ?",
                (name, _share(total, index, count)),
            )
            db.execute(
                "CREATE TABLE part.outcomes AS SELECT * FROM main.outcomes "
                "WHERE sha256 IN (SELECT sha256 FROM part.pieces)"
            )
            name = db.execute("SELECT max(name) FROM part.pieces").fetchone()[0] or name
        yield path


def _share(total: int, index: int, count: int) -> int:
    """How many of `total` things the part with this number gets."""
    return (index + 1) * total // count - index * total // count
