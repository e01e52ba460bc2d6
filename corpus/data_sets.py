"""MIDI files in data sets: a column of bytes, on the Hub or on the disk, as `datasets` reads it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from midimamba.corpus.entries import Entry
from midimamba.corpus.manifests import SPLIT_ADVICE, Label, split_named
from midimamba.corpus.sources import holds_data_set
from midimamba.errors import InputError, check_hub
from midimamba.tokenization.ingest import MAX_FILE_BYTES, TOO_LARGE, MidiRefusedError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Names of a data set's only split that say nothing about its use. Like a lone train split, it is split by a hash.
_UNDIVIDED = {"default", "all", "full", "complete", "whole", "data", "unsplit"}
# Rows of each split in which the column with bytes is looked for: the first one may hold none.
_HEAD = 100
# What `save_to_disk` leaves in a folder.
_SAVED = ("dataset_dict.json", "dataset_info.json")


def is_data_set(source: str) -> bool:
    """Whether a source is a data set on the disk (saved by `datasets`, or Parquet files) or may be one on the Hub.

    A folder that holds MIDI is not one, whatever else lies in it.
    """
    path = Path(source)
    if not path.is_dir():
        return not path.exists() and _HUB_ID.fullmatch(source) is not None
    return holds_data_set(path)


class DataSetFiles:
    """The MIDI files of a data set, in the order of its rows. A file is named by split and row: `train/00000042`.

    Args:
        source (`str`):
            A folder or the name of a data set on the Hub.
        midi_column (`str`, *optional*):
            The column with the bytes; by default the only one that holds any.
        columns (sequence of `str`, *optional*):
            Columns to read as labels.
        streaming (`bool`, *optional*, defaults to `False`):
            Read from the Hub row by row instead of downloading everything first.

    Raises:
        InputError: if there is no such data set or column.
    """

    def __init__(
        self, source: str, midi_column: str | None = None, columns: Sequence[str] = (), streaming: bool = False
    ) -> None:
        self.source = source
        self._splits = _load(source, streaming)
        self._columns = columns
        self._own = {split: self._own_split(split) for split in self._splits}
        head = [row for rows in self._splits.values() for row in islice(rows, _HEAD)]
        if not head:
            raise InputError(f"the data set {source} holds no rows")
        first = head[0]
        self._midi_column = self._find_midi_column(head, midi_column)
        if missing := [column for column in columns if column not in first]:
            raise InputError(f"the data set {source} has no column {missing[0]!r}; its columns are {', '.join(first)}")
        self._split_column = [column for column in first if column.strip().casefold() == "split"]
        if len(self._split_column) > 1:
            raise InputError(f"the data set {source} has several columns for splits: keep one of {self._split_column}")

    def __len__(self) -> int:
        """The number of rows, or 0 if it is unknown."""
        infos = [rows.info.splits[name].num_examples for name, rows in self._splits.items() if rows.info.splits]
        if all(isinstance(rows, Dataset) for rows in self._splits.values()):
            infos = [rows.num_rows for rows in self._splits.values()]
        return sum(infos)

    def __iter__(self) -> Iterator[tuple[Entry, Label, bytes | MidiRefusedError]]:
        for split, rows in self._splits.items():
            yield from self._files(split, enumerate(rows))

    def part(self, start: int, end: int) -> Iterator[tuple[Entry, Label, bytes | MidiRefusedError]]:
        """The files of rows `start … end - 1`, counted over all splits, of a data set that is not streamed."""
        for split, rows in self._splits.items():
            own = range(max(0, start), min(len(rows), end))
            yield from self._files(split, zip(own, rows.select(own), strict=True))
            start, end = start - len(rows), end - len(rows)

    def _files(
        self, split: str, rows: Iterable[tuple[int, Mapping[str, Any]]]
    ) -> Iterator[tuple[Entry, Label, bytes | MidiRefusedError]]:
        for index, row in rows:
            label = self._label(split, index, row)
            content = _bytes_of(row.get(self._midi_column))
            size = len(content) if isinstance(content, bytes) else 0
            yield Entry(label.name, Path(self.source), size), label, content

    def _find_midi_column(self, head: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
        first = head[0]
        holding = [name for name in first if any(isinstance(_bytes_of(row.get(name)), bytes) for row in head)]
        if wanted is not None:
            if wanted not in first:
                raise InputError(
                    f"the data set {self.source} has no column {wanted!r}; its columns are {', '.join(first)}"
                )
            return wanted
        if len(holding) != 1:
            found = ", ".join(holding) if holding else "none"
            raise InputError(
                f"which column of the data set {self.source} holds MIDI bytes? Found {found}: "
                "name it with --midi-column"
            )
        return holding[0]

    def _label(self, split: str, index: int, row: Mapping[str, Any]) -> Label:
        """What a row says. Its column `split` decides; without a value there, the split of the data set that it is in.

        Raises:
            InputError: if one of the two is unknown, or if both are given and differ.
        """
        name = f"{split}/{index:08}"
        named = {
            column: self._name_of(split, column, row.get(column)) for column in (*self._columns, *self._split_column)
        }
        labels = {column: value for column in self._columns if (value := named[column]) is not None}
        given, origin = self._own[split], "the data set"
        for column in self._split_column:
            try:
                stated = split_named(named[column])
            except KeyError as error:
                raise InputError(
                    f"the data set {self.source}, row {name}: split {error} is unknown: {SPLIT_ADVICE}"
                ) from error
            if stated and given and stated != given:
                raise InputError(
                    f"the data set {self.source}, row {name}: the column {column!r} says {stated}, but the row is in "
                    f"the split {split!r}: rename one of the two"
                )
            if stated:
                given, origin = stated, f"the column {column!r}"
        return Label(name, given, labels, origin)

    def _name_of(self, split: str, column: str, value: Any) -> str | None:
        """A value as text; that of a class is its name, not its number."""
        feature = (self._splits[split].features or {}).get(column)
        if isinstance(feature, ClassLabel) and isinstance(value, int):
            return None if value < 0 else str(feature.int2str(value))
        return None if value is None else str(value)

    def _own_split(self, split: str) -> str | None:
        """The split that all rows of one of the data set's splits are in; `None` leaves them to a hash."""
        try:
            named = split_named(split)
        except KeyError as error:
            if len(self._splits) == 1 and split.casefold() in _UNDIVIDED:
                return None
            raise InputError(
                f"the data set {self.source} has a split {split!r}, which may be held out: rename it to train, "
                f"validation or test (its splits are {', '.join(self._splits)})"
            ) from error
        return None if len(self._splits) == 1 and named == "train" else named


def _load(source: str, streaming: bool) -> Mapping[str, Dataset | IterableDataset]:
    path = Path(source)
    try:
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            loaded = load_from_disk(source)
        else:
            check_hub(source, "dataset")
            loaded = load_dataset(source, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        what = "a data set" if path.is_dir() else "a folder, an archive, or a data set on the Hub"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{source} cannot be read as {what}: {reason}") from error
    if isinstance(loaded, Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    return loaded if not isinstance(loaded, IterableDatasetDict) else dict(loaded)


def _bytes_of(value: Any) -> bytes | MidiRefusedError:
    """A file in a column of bytes, or of `{"bytes": …, "path": …}` as `datasets` keeps files."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(content, bytes):
        return MidiRefusedError("the row holds no bytes")
    return content if len(content) <= MAX_FILE_BYTES else MidiRefusedError(TOO_LARGE)
