"""What a `manifest.csv` says about the files of a source: their splits and labels."""

import codecs
import csv
import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from midimamba.corpus.entries import Entry
from midimamba.errors import InputError
from midimamba.tokenization.ingest import MidiRefusedError

MANIFEST = "manifest.csv"
# What the splits are called, here and elsewhere.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_SPLITS = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
SPLIT_ADVICE = "write train, test, or validation (also called valid, val, dev or eval)"
_DELIMITERS = ",;\t|"
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with that of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# A table without a column `file` in which none of these occurs is about something else.
_OURS = re.compile(rf"\.(midi?|kar|rmi)\b|\b({'|'.join(_SPLITS)})\b", re.IGNORECASE)
# A row may name such a file. It is there, but it is no music that can be read.
_NOT_MUSIC = re.compile(
    r"\.(wav|flac|mp3|ogg|m4a|aiff?|txt|pdf|xml|mxl|musicxml|krn|abc|ly|mscz|json|ya?ml|csv|tsv|png|jpe?g|svg|md)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Label:
    """What a manifest, or a data set, says about a file.

    Args:
        name (`str`):
            As in [`Entry`]; as the manifest writes it if there are `candidates`.
        split (`str`, *optional*):
            `"train"`, `"validation"` or `"test"`.
        labels (`dict[str, str]`):
            Values of the requested columns.
        origin (`str`, *optional*, defaults to `"manifest.csv"`):
            What says it.
        place (`str`, *optional*):
            Where that says it, such as `"manifest.csv, line 3"`.
        candidates (iterable of `str`, *optional*):
            Names that the file may have, the likeliest first. It can be used once.
    """

    name: str
    split: str | None
    labels: dict[str, str]
    origin: str = MANIFEST
    place: str = ""
    candidates: Iterable[str] | None = field(default=None, compare=False)


def split_named(name: str | None) -> str | None:
    """The split that a manifest or a data set calls `name`, in any case; `None` if it gives none.

    Raises:
        KeyError: if there is no such split.
    """
    name = (name or "").strip().casefold()
    return _SPLITS[name] if name else None


def fold(name: str) -> str:
    """The same for names that differ in letter case, in how Unicode composes characters, or in parts like `./`."""
    name = unicodedata.normalize("NFC", os.path.normpath(name).replace(os.sep, "/"))
    return unicodedata.normalize("NFC", name.casefold())


def is_manifest(name: str) -> bool:
    """Whether a file of this name is a manifest."""
    return name.rpartition("/")[2].casefold() == MANIFEST


def read_manifests(
    manifests: Iterable[tuple[Entry, bytes | MidiRefusedError]], source: str, columns: Sequence[str]
) -> Iterator[Label]:
    """What the manifests of a source say about its files.

    Raises:
        InputError: if a manifest makes no sense, or none has one of the columns.
    """
    known: dict[str, str] = {}
    for entry, content in manifests:
        if isinstance(content, MidiRefusedError):
            raise InputError(f"{entry.name}: {content.reason}")
        yield from _read_manifest(entry.name, _decode(entry.name, content), source, columns, known)
    if missing := [column for column in columns if _plain(column) not in known]:
        there = f"the columns are {', '.join(sorted(known.values()))}" if known else "no manifest names files"
        raise InputError(f"{source}: no {MANIFEST} has a column {missing[0]!r}; {there}")


def _read_manifest(
    name: str, text: str, source: str, columns: Sequence[str], known: dict[str, str]
) -> Iterator[Label]:
    """What a manifest says about files. Its columns are added to `known`."""
    table = _Table(name, text)
    if table.delimiter is None:
        if _OURS.search(text):
            raise InputError(
                f"{name} has no column 'file', only {table.first_line!r}: name the column with the files' paths 'file'"
            )
        tqdm.write(f"{name} has no column 'file': it is ignored", file=sys.stderr)
        return
    known.update(table.header)
    places = _Places(name, source)
    # Columns that may be meant as `split`: all of their values are names of splits.
    alike = set() if "split" in table.header else table.header.keys() - {"file", *map(_plain, columns)}
    is_empty = True
    for line, cells in table.rows([*columns, "split"]):
        is_empty = False
        value, place = cells["file"], f"{name}, line {line}"
        if not value.strip() or "\n" in value:
            raise InputError(f"{place}: the column 'file' holds {value!r}: write the path of a file")
        try:
            split = split_named(cells.get("split"))
        except KeyError as error:
            raise InputError(f"{place}: split {error} is unknown: {SPLIT_ADVICE}") from error
        labels = {column: found for column in columns if (found := cells.get(_plain(column), "").strip())}
        alike = {column for column in alike if cells.get(column, "").strip().casefold() in _SPLITS}
        yield Label(value.strip(), split, labels, MANIFEST, place, places.candidates(value))
    if alike and not is_empty:
        column = table.header[min(alike)]
        raise InputError(f"{name}: the column {column!r} holds splits: call it 'split'")


class _Table:
    """A CSV table. Its columns are known by their names in lower case.

    Args:
        name (`str`):
            Of the file.
        text (`str`):
            Its content.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text.replace("\r\n", "\n").replace("\r", "\n")
        self.first_line = next((line for line in self._text.splitlines() if line.strip()), "")
        headers = {d: next(csv.reader([self.first_line], delimiter=d), []) for d in _DELIMITERS}
        found = {d: len(titles) for d, titles in headers.items() if "file" in map(_plain, titles)}
        self.delimiter = max(found, key=lambda d: found[d]) if found else None
        self._titles = headers[self.delimiter or ","]
        self.header = {_plain(title): title.strip() for title in self._titles}

    def rows(self, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
        """The rows that are not empty, each with the number of its line.

        Raises:
            InputError: if the table is not well-formed, or has one of the columns that are wanted twice.
        """
        names = list(map(_plain, self._titles))
        for title in ("file", *wanted):
            if names.count(_plain(title)) > 1:
                raise InputError(f"{self._name} has {names.count(_plain(title))} columns {title!r}: keep one")
        assert self.delimiter is not None
        # Python's reader takes blanks before a quote, but none behind it.
        text = re.sub(rf'" +(?={re.escape(self.delimiter)}|$)', '"', self._text, flags=re.MULTILINE)
        reader = csv.reader(io.StringIO(text), delimiter=self.delimiter, strict=True, skipinitialspace=True)
        start, is_header = 1, True
        try:
            for row in reader:
                line, start = start, reader.line_num + 1
                if not any(cell.strip() for cell in row):
                    continue
                if is_header:
                    is_header = False
                    continue
                if any(cell.strip() for cell in row[len(names) :]):
                    raise InputError(
                        f"{self._name}, line {line}: {len(row)} values for {len(names)} columns: "
                        f"put values with {self.delimiter!r} into quotes"
                    )
                yield line, dict(zip(names, row, strict=False))
        except csv.Error as error:
            raise InputError(
                f"{self._name}, line {start}: not a CSV table ({error}): is there a quote that is not closed?"
            ) from error


def _plain(title: str) -> str:
    return title.strip().casefold()


def _decode(name: str, content: bytes) -> str:
    """The text of a manifest, whatever program wrote it."""
    encoding = next((encoding for bom, encoding in _BOMS.items() if content.startswith(bom)), None)
    if encoding is None and b"\0" in content[:64]:
        encoding = "utf-16-be" if content.startswith(b"\0") else "utf-16-le"
    try:
        return content.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding is None:  # what spreadsheets on Windows write; then whatever has bytes
            return content.decode("cp1252", errors="replace")
        raise InputError(f"{name} is not text in {encoding.upper()} ({error.reason}): save it as UTF-8") from error


class _Places:
    """Where the files may be that a manifest names.

    A path is relative to the manifest, to a folder around it within the source, to the folder around the source, or
    to the current folder; or it is absolute.

    Args:
        manifest (`str`):
            Its name, as in [`Entry`].
        source (`str`):
            The source that it is in.
    """

    def __init__(self, manifest: str, source: str) -> None:
        root = Path(source).absolute()
        if not root.is_dir():  # an archive is a part of the names in it
            root = root.parent
        self._bases = (*(root / folder for folder in PurePosixPath(manifest).parents), root.parent, Path.cwd())
        roots = (os.path.normpath(root), str(root.resolve()))
        self._roots = {f"{folder.rstrip(os.sep)}{os.sep}" for folder in roots}

    def candidates(self, value: str) -> Iterator[str]:
        """Names that a file may have, as in [`Entry`], the likeliest first."""
        for text in dict.fromkeys((value, value.strip(), value.strip().replace("\\", "/"))):
            for base in self._bases:
                path = os.path.normpath(base / text)
                for root in self._roots:
                    if path.startswith(root):
                        yield path.removeprefix(root).replace(os.sep, "/")


def names_no_music(name: str) -> bool:
    """Whether a row that names no file of the source names a file of another kind."""
    return _NOT_MUSIC.fullmatch(PurePosixPath(name).suffix) is not None
