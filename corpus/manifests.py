"""What a `manifest.csv` says about the files of a source: their splits and labels."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from midimamba.corpus.entries import Entry
from midimamba.errors import InputError
from midimamba.tokenization.ingest import MidiRefusedError

MANIFEST = "manifest.csv"
# What a manifest may call the splits.
_SPLIT_NAMES = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Label:
    """What a manifest says about a file.

    Args:
        name (`str`):
            As in [`Entry`].
        split (`str`, *optional*):
            `"train"`, `"validation"` or `"test"`.
        labels (`dict[str, str]`):
            Values of the requested columns.
    """

    name: str
    split: str | None
    labels: dict[str, str]


def read_manifests(
    manifests: Iterable[tuple[Entry, bytes | MidiRefusedError]], source: str, columns: Sequence[str]
) -> Iterator[Label]:
    """What the manifests of a source say about its files.

    Raises:
        InputError: if a manifest makes no sense, or none has one of the columns.
    """
    known: set[str] = set()
    for entry, content in manifests:
        yield from _read_manifest(entry, content, columns, known)
    if missing := [column for column in columns if column not in known]:
        there = f"the columns are {', '.join(sorted(known))}" if known else f"no {MANIFEST} has a column 'file'"
        raise InputError(f"{source}: no {MANIFEST} has a column {missing[0]!r}; {there}")


def _read_manifest(
    entry: Entry, content: bytes | MidiRefusedError, columns: Sequence[str], known: set[str]
) -> Iterator[Label]:
    """What a manifest says about files, which it names relative to itself. Its columns are added to `known`.

    A manifest without a column `file` is about something else.
    """
    if isinstance(content, MidiRefusedError):
        raise InputError(f"{entry.name}: {content.reason}")
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig", errors="replace")))
    try:
        if "file" not in (rows.fieldnames or ()):
            return
        known.update(rows.fieldnames or ())
        for row in rows:
            name = entry.name.removesuffix(MANIFEST) + (row["file"] or "")
            labels = {column: value for column in columns if (value := (row.get(column) or "").strip())}
            yield Label(name, split_named(row.get("split")), labels)
    except KeyError as error:
        raise InputError(
            f"{entry.name}, line {rows.line_num}: split {error} is unknown: write one of {', '.join(_SPLIT_NAMES)}"
        ) from error
    except csv.Error as error:
        raise InputError(f"{entry.name}, line {rows.line_num}: not a CSV table ({error})") from error


def split_named(name: str | None) -> str | None:
    """The split that a manifest or a data set calls `name`; `None` if it gives none.

    Raises:
        KeyError: if there is no such split.
    """
    name = (name or "").strip().lower()
    return _SPLIT_NAMES[name] if name else None


def is_manifest(name: str) -> bool:
    """Whether a file of this name is a manifest."""
    return name.rpartition("/")[2] == MANIFEST
