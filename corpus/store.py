"""The files of a source and what reading made of them, in one SQLite file, so that memory stays flat.

It makes runs incremental. What was read is kept under the SHA-256 of the file's bytes. A run that continues after an
interruption, or after files came and went, reads only what is new. SQLite commits whole transactions, so a run may be
killed at any moment.
"""

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np

from midimamba.corpus.entries import Entry, Refusal
from midimamba.corpus.manifests import Label, fold, names_no_music
from midimamba.corpus.sqlite_files import checksum, delete_store, explain, is_damage, tables_of
from midimamba.errors import InputError
from midimamba.tokenization.controls import control_token

_SCHEMA = """
CREATE TABLE IF NOT EXISTS reader (fingerprint TEXT);
CREATE TABLE IF NOT EXISTS outcomes (
    sha256 TEXT PRIMARY KEY, ids BLOB, content TEXT, num_notes INTEGER, seconds REAL, sanitized INTEGER,
    voices INTEGER, controls TEXT, stage TEXT, reason TEXT, lost INTEGER, checksum INTEGER
) WITHOUT ROWID;
"""
# What only this run needs. It may be on another disk: SQLite keeps it in the system's folder for temporary files.
_TEMPORARY = """
CREATE TEMP TABLE fresh (sha256 TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE files (
    name TEXT PRIMARY KEY, container BLOB, member, size INTEGER, sha256 TEXT, stage TEXT, reason TEXT
) WITHOUT ROWID;
CREATE TEMP TABLE labels (
    name TEXT PRIMARY KEY, split TEXT, labels TEXT, origin TEXT, place TEXT
) WITHOUT ROWID;
CREATE TEMP TABLE pieces (
    name TEXT PRIMARY KEY, sha256 TEXT, split TEXT, given INTEGER, place REAL, labels TEXT, origin TEXT
) WITHOUT ROWID;
"""
# An error shows this many rows of manifests.
_SHOWN = 3
# Rows between two commits: a killed run reads at most this many again.
_COMMIT_EVERY = 200


@dataclass(frozen=True)
class Piece:
    """What reading makes of a file.

    Args:
        ids (`bytes`):
            Base ids, as [`pack_ids`] writes them.
        content (`str`):
            A digest of the notes.
        num_notes (`int`), seconds (`float`), sanitized (`bool`):
            Facts about it; sanitized if bytes were clamped to read it.
        controls (`dict[str, list[str]]`):
            Values of computed controls, if they were requested.
        voices (`int`):
            The most pitched notes that sound at once, as the ids have them; 0 if there are only drums.
    """

    ids: bytes
    content: str
    num_notes: int
    seconds: float
    sanitized: bool = False
    controls: Mapping[str, Sequence[str]] = field(default_factory=dict)
    voices: int = 0


@dataclass(frozen=True)
class Refused:
    """Why a file cannot be used; `lost` if its worker process was, in which case another run may succeed."""

    reason: str
    stage: str
    lost: bool = False


@dataclass(frozen=True)
class StoredPiece:
    """A piece of the corpus: its file's name, base ids of shape (time,) or (time, vocabularies), facts and labels."""

    name: str
    ids: np.ndarray
    num_notes: int
    seconds: float
    controls: dict[str, list[str]]

    @property
    def control_tokens(self) -> list[str]:
        """The tokens of all its controls."""
        return [control_token(name, value) for name, values in self.controls.items() for value in values]


def pack_ids(ids: Sequence[int] | Sequence[Sequence[int]]) -> bytes:
    """Base ids as compressed int32."""
    return zlib.compress(np.asarray(ids, dtype=np.int32).tobytes(), level=1)


class PieceStore:
    """The files of a source, and what reading made of them.

    Args:
        path (`Path`):
            The SQLite file. Made if it is not there. A damaged one loses what is damaged, if need be everything.
        reader (`str`):
            A digest of everything that reading depends on, apart from the file itself. If it changes, everything is
            read again.
        vocabularies (`int`, *optional*, defaults to 1):
            Ids per step.

    Raises:
        InputError: if another run uses the file, or the disk is full.
    """

    def __init__(self, path: Path, reader: str, vocabularies: int = 1) -> None:
        self._vocabularies = vocabularies
        self._unsaved = 0
        # What was damaged, or nothing.
        self.damage = ""
        # Whether this run read a file that can be used.
        self.has_new_pieces = False
        # Rows of manifests that name a file, one that is no music, and none.
        self._matched = self._others = self._missing = 0
        self._shown: list[str] = []
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            self._db.close()
            if not is_damage(error):
                raise explain(path, error) from error
            self.damage = str(error)
            delete_store(path)
            self._open(path)
        if self._db.execute("SELECT fingerprint FROM reader").fetchone() != (reader,):
            self._db.execute("DELETE FROM outcomes")
            self._db.execute("DELETE FROM reader")
            self._db.execute("INSERT INTO reader VALUES (?)", (reader,))
        self._db.execute("DELETE FROM outcomes WHERE lost")
        self._db.commit()

    def _open(self, path: Path) -> None:
        try:
            # The trainers of `tokenizers` draw pieces from a thread of their own, while this one waits.
            self._db = sqlite3.connect(path, timeout=1, check_same_thread=False, uri=True)
        except sqlite3.DatabaseError as error:
            raise explain(path, error) from error
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("BEGIN EXCLUSIVE")
        self._db.commit()
        if tables_of(self._db):
            self._check()
        self._db.executescript(_SCHEMA)
        self._db.executescript(_TEMPORARY)
        self._db.create_function("fold", 1, fold, deterministic=True)

    def _check(self) -> None:
        """Remove what was read if it is not what was written. SQLite checks the order of its pages, but no content.

        Raises:
            sqlite3.DatabaseError: if nothing can be used.
        """
        with closing(sqlite3.connect(":memory:")) as ours:
            ours.executescript(_SCHEMA)
            if tables_of(self._db) != tables_of(ours):
                raise sqlite3.DatabaseError("it holds other tables than those of this version")
        (state,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(" ".join(state.split()))
        self._db.text_factory = bytes  # what is damaged need not be text
        rows = self._db.execute("SELECT * FROM outcomes")
        damaged = [(row[0],) for row in rows if checksum(row[:-1]) != row[-1]]
        self._db.executemany("DELETE FROM outcomes WHERE sha256 = CAST(? AS TEXT)", damaged)
        self._db.text_factory = str
        self._db.commit()
        if damaged:
            self.damage = f"{len(damaged)} of its rows are not as they were written"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Everything that a good end needs is saved. After an error, a full disk say, this saves what it can.
        with suppress(sqlite3.Error):
            self._db.commit()
        self._db.close()

    @contextmanager
    def beside(self, path: Path, new: bool = False) -> Iterator[sqlite3.Connection]:
        """This store's connection, in which another SQLite file is called `part` for a while.

        Args:
            path (`Path`): the file. Nobody may write to it.
            new (`bool`, *optional*, defaults to `False`): whether to make it.
        """
        self._db.commit()
        mode = "rwc" if new else "ro&immutable=1"
        address = f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}"
        self._db.execute("ATTACH ? AS part", (address,))
        try:
            yield self._db
            self._db.commit()
        finally:
            self._db.rollback()  # after an error
            self._db.execute("DETACH part")

    def copy_to(self, target: Path) -> None:
        """Write what was read to a file that is empty or not there. The same outcomes give the same bytes."""
        self._db.commit()
        self._db.execute("PRAGMA schema_version = 1")  # a copy counts one more, and copies of copies differ
        self._db.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(target),))

    # ---- files ----

    def add_file(self, entry: Entry, sha256: str | None = None) -> None:
        """List a file. Of two with one name the later counts."""
        container = os.fsencode(entry.path)
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, NULL, NULL)",
            (entry.name, container, entry.member, entry.size, sha256),
        )

    def add_refusal(self, refusal: Refusal) -> None:
        """List something that could not even be read."""
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, x'', NULL, 0, ?, ?, ?)",
            (refusal.name, refusal.sha256, refusal.stage, refusal.reason),
        )

    def add_label(self, label: Label) -> None:
        """Note what a manifest says of a file that is listed already, or a data set of one that will be.

        Raises:
            InputError: if something else was said of it before.
        """
        name = label.name if label.candidates is None else self._find(label.candidates)
        if name is None:
            if names_no_music(label.name):
                self._others += 1
            else:
                self._missing += 1
                if self._missing <= _SHOWN:
                    self._shown.append(f"{label.name!r} ({label.place})")
            return
        self._matched += label.candidates is not None
        split, labels = label.split, label.labels
        query = "SELECT split, labels, place FROM labels WHERE name = ?"
        if before := self._db.execute(query, (name,)).fetchone():
            earlier = {"split": before[0]} | json.loads(before[1])
            for column, value in ({"split": split} | labels).items():
                if None not in (value, earlier.get(column)) and value != earlier[column]:
                    raise InputError(
                        f"{label.place}: {column} {value!r} for {name}, but {before[2]} says {earlier[column]!r}: "
                        "keep one of the two"
                    )
            split, labels = split or before[0], json.loads(before[1]) | labels
        self._db.execute(
            "INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?, ?)",
            (name, split, json.dumps(labels), label.origin, label.place),
        )

    def _find(self, candidates: Iterable[str]) -> str | None:
        """The first file with one of these names, or with one that only looks different if no other looks like it."""
        self._db.execute("CREATE INDEX IF NOT EXISTS by_looks ON files (fold(name))")
        for candidate in candidates:
            if self._db.execute("SELECT 1 FROM files WHERE name = ?", (candidate,)).fetchone():
                return candidate
            query = "SELECT name FROM files WHERE fold(name) = ? LIMIT 2"
            if len(found := self._db.execute(query, (fold(candidate),)).fetchall()) == 1:
                return str(found[0][0])
        return None

    def check_labels(self) -> str:
        """How many rows of manifests name a file, as a line to print; nothing if there are no rows.

        Raises:
            InputError: if some name no file.
        """
        if self._missing:
            more = " and others" if self._missing > _SHOWN else ""
            rows = self._missing + self._matched + self._others
            raise InputError(
                f"{self._missing:,} of {rows:,} rows of manifests name no file, or one of several: "
                f"{', '.join(self._shown)}{more}: write paths relative to the manifest"
            )
        others = f", {self._others:,} name files that are no MIDI files" if self._others else ""
        return f"{self._matched:,} rows of manifests name files{others}" if self._matched or self._others else ""

    def keep_first(self, count: int) -> None:
        """Forget all files but the first `count` by name."""
        self._db.execute(
            "DELETE FROM files WHERE reason IS NULL AND name NOT IN "
            "(SELECT name FROM files WHERE reason IS NULL ORDER BY name LIMIT ?)",
            (count,),
        )

    def num_files(self) -> int:
        """Files that are listed and not refused."""
        return self._count("files WHERE reason IS NULL")

    def num_reused(self) -> int:
        """Files that an earlier run read."""
        return self._count("files WHERE sha256 NOT NULL AND sha256 NOT IN (SELECT sha256 FROM fresh)")

    def num_read(self) -> int:
        """Different contents that this run read."""
        return self._count("fresh")

    def entries(self) -> Iterator[Entry]:
        """The listed files, those of an archive together and in the order they lie in."""
        place: tuple[Any, ...] = (b"", -1, "")
        query = (
            "SELECT container, coalesce(member, 0), name, size, member FROM files WHERE reason IS NULL "
            "AND (container, coalesce(member, 0), name) > (?, ?, ?) ORDER BY 1, 2, 3 LIMIT 1000"
        )
        self._db.execute("CREATE INDEX IF NOT EXISTS by_place ON files (container, coalesce(member, 0), name)")
        # In batches, because rows change while they are read.
        while rows := self._db.execute(query, place).fetchall():
            for container, _, name, size, member in rows:
                yield Entry(name, Path(os.fsdecode(container)), size, member)
            place = rows[-1][:3]

    # ---- outcomes ----

    def knows(self, sha256: str) -> bool:
        """Whether a file with these bytes was read."""
        return self._db.execute("SELECT 1 FROM outcomes WHERE sha256 = ?", (sha256,)).fetchone() is not None

    def add_outcome(self, sha256: str, outcome: Piece | Refused) -> None:
        """Keep what reading made of a file with these bytes."""
        row: tuple[Any, ...]
        if isinstance(outcome, Piece):
            facts = (outcome.num_notes, outcome.seconds, outcome.sanitized, outcome.voices)
            row = (sha256, outcome.ids, outcome.content, *facts, json.dumps(outcome.controls), None, None, False)
            self.has_new_pieces = True
        else:
            row = (sha256, None, None, None, None, False, None, None, outcome.stage, outcome.reason, outcome.lost)
        row = (*row, checksum(row))
        self._db.execute(f"INSERT OR REPLACE INTO outcomes VALUES ({', '.join('?' * len(row))})", row)
        self._db.execute("INSERT OR IGNORE INTO fresh VALUES (?)", (sha256,))
        self._unsaved += 1
        if self._unsaved >= _COMMIT_EVERY:
            self._db.commit()
            self._unsaved = 0

    def finish_reading(self) -> None:
        """Forget what was read of files that are gone, and save."""
        self._db.execute(
            "DELETE FROM outcomes WHERE sha256 NOT IN (SELECT sha256 FROM files WHERE sha256 IS NOT NULL)"
        )
        self._db.commit()

    def digest(self) -> str:
        """Of all files, their bytes, splits and labels: two runs with the same digest have the same input."""
        digest = hashlib.sha256()
        query = "SELECT name, sha256, split, labels FROM files LEFT JOIN labels USING (name) ORDER BY name"
        for row in self._db.execute(query):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()[:16]

    def refusals(self) -> Iterator[Refusal]:
        """Every file that is not used, by name."""
        query = (
            "SELECT name, sha256, coalesce(files.stage, outcomes.stage), "
            "coalesce(files.reason, outcomes.reason) AS why "
            "FROM files LEFT JOIN outcomes USING (sha256) WHERE why IS NOT NULL ORDER BY name"
        )
        for row in self._db.execute(query):
            yield Refusal(*row)

    # ---- pieces ----

    def assign_splits(self, valid_fraction: float, test_fraction: float, seed: int) -> None:
        """Find the pieces, and the split of each.

        Of files with the same notes, one is the piece: one that is in the test split, otherwise in the validation
        split, otherwise in the train split, otherwise any; of several, the first by name. So nothing is trained on
        that is also held out. Where no split is given, a hash of the name decides: test, validation and train are
        intervals of [0, 1). If a wanted split stays empty, it takes a piece from the largest: the one whose hash is
        nearest.
        """
        self._db.create_function("place_of", 1, lambda name: _hash(name, seed), deterministic=True)
        self._db.execute(
            "INSERT INTO pieces SELECT name, sha256, coalesce(split, CASE WHEN place_of(name) < ? THEN 'test' "
            "WHEN place_of(name) < ? THEN 'validation' ELSE 'train' END), split IS NOT NULL, place_of(name), labels, "
            "origin FROM (SELECT name, sha256, split, labels, origin, "
            "row_number() OVER (PARTITION BY content ORDER BY "
            "CASE split WHEN 'test' THEN 0 WHEN 'validation' THEN 1 WHEN 'train' THEN 2 ELSE 3 END, name) AS rank "
            "FROM files JOIN outcomes USING (sha256) LEFT JOIN labels USING (name) WHERE ids IS NOT NULL) "
            "WHERE rank = 1",
            (test_fraction, test_fraction + valid_fraction),
        )
        for split, fraction in (("train", 1.0), ("test", test_fraction), ("validation", valid_fraction)):
            if fraction and not self._count(f"pieces WHERE split = '{split}'"):
                self._fill(split)

    def _fill(self, split: str) -> None:
        query = "SELECT split, count(*) FROM pieces WHERE NOT given GROUP BY split ORDER BY 2 DESC, split LIMIT 1"
        largest, size = self._db.execute(query).fetchone() or ("", 0)
        if size > 1 or (split == "train" and size):
            order = "DESC" if split == "train" else "ASC"
            self._db.execute(
                "UPDATE pieces SET split = ? WHERE name = "
                f"(SELECT name FROM pieces WHERE split = ? AND NOT given ORDER BY place {order} LIMIT 1)",
                (split, largest),
            )

    def splits_by(self) -> dict[str, int]:
        """How many pieces are in their splits by a manifest, a data set, or the hash."""
        way = "CASE WHEN given THEN origin ELSE 'hash' END AS way"
        query = f"SELECT {way}, count(*) FROM pieces GROUP BY way ORDER BY way = 'hash', way"
        return dict(self._db.execute(query).fetchall())

    def num_pieces(self) -> int:
        """Different pieces, once they have splits."""
        return self._count("pieces")

    def num_contradictions(self) -> int:
        """Pieces whose files are given to several splits."""
        return self._count(
            "(SELECT content FROM files JOIN outcomes USING (sha256) JOIN labels USING (name) "
            "WHERE ids IS NOT NULL GROUP BY content HAVING count(DISTINCT split) > 1)"
        )

    def pieces(self, split: str, order: str = "name") -> Iterator[StoredPiece]:
        """The pieces of a split, by `name`, or by `place`: at random, but always the same."""
        query = (
            "SELECT name, ids, num_notes, seconds, controls, labels FROM pieces JOIN outcomes USING (sha256) "
            f"WHERE split = ? ORDER BY {order}"
        )
        for name, ids, num_notes, seconds, controls, labels in self._db.execute(query, (split,)):
            array = np.frombuffer(zlib.decompress(ids), dtype=np.int32)
            array = array.reshape(-1, self._vocabularies) if self._vocabularies > 1 else array
            yield StoredPiece(name, array, num_notes, seconds, _controls_of(controls, labels))

    def most_voices(self) -> int:
        """The most pitched notes that sound at once in a piece of the train split."""
        query = "SELECT coalesce(max(voices), 0) FROM pieces JOIN outcomes USING (sha256) WHERE split = 'train'"
        return int(self._db.execute(query).fetchone()[0])

    def control_values(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The values that these controls have in the train split."""
        values: dict[str, set[str]] = {name: set() for name in names}
        query = "SELECT controls, labels FROM pieces JOIN outcomes USING (sha256) WHERE split = 'train'"
        for controls, labels in self._db.execute(query):
            for name, found in _controls_of(controls, labels).items():
                if name in values:
                    values[name].update(found)
        return {name: sorted(found) for name, found in values.items()}

    def counts(self) -> dict[str, int]:
        """Files `refused`, `sanitized`, `duplicates`; `pieces`, those with a `given` split, those to `train` on."""
        read = "files JOIN outcomes USING (sha256) WHERE ids IS NOT NULL"
        return {
            "refused": sum(1 for _ in self.refusals()),
            "sanitized": self._count(f"{read} AND sanitized"),
            "duplicates": self._count(read) - self.num_pieces(),
            "given": self._count("pieces WHERE given"),
            "train": self._count("pieces WHERE split = 'train'"),
            "pieces": self.num_pieces(),
        }

    def _count(self, table: str) -> int:
        (count,) = self._db.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)


def _controls_of(computed: str, labels: str | None) -> dict[str, list[str]]:
    """Computed controls and labels together. A label without a letter or digit is left out."""
    given = json.loads(labels or "{}").items()
    return json.loads(computed) | {name: [value] for name, value in given if value.strip("_ \t\r\n")}


def _hash(name: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the name and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") / 2**64
