"""The steps in which a corpus is made on a cluster, as steps of datatrove's pipelines.

`ReadFiles` (many tasks) reads a part of the files, `MergeParts` (one task) drops duplicates, decides the splits and
trains the tokenizer, `EncodePieces` (many tasks) writes a part of the pieces as Parquet files, and `FinishCorpus` (one
task) writes the rest. What they do is what one machine does: it is in [`midimamba.corpus.reading`] and
[`midimamba.corpus.assembly`]. A task that is interrupted has written nothing, or whole files, which it writes again
when it starts again.
"""

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep
from miditok import MusicTokenizer

from midimamba.corpus.addresses import Folder
from midimamba.corpus.assembly import (
    facts_of,
    features_of,
    make_tokenizer,
    programs_of,
    report_of,
    rows_of,
    settle,
    shift_of,
    tally,
    write_quarantine,
)
from midimamba.corpus.build import files_of, prepare
from midimamba.corpus.cluster_job import LISTED, OTHERS, REPORT, Job
from midimamba.corpus.data_sets import DataSetFiles
from midimamba.corpus.entries import Entry
from midimamba.corpus.load import SPLITS
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.parts import divide_pieces, take_part, write_part
from midimamba.corpus.reading import Found, enter_rows, read_files, seconds_for
from midimamba.corpus.sources import read_entries
from midimamba.corpus.sqlite_files import explain
from midimamba.corpus.store import PieceStore
from midimamba.corpus.upkeep import link
from midimamba.errors import InputError
from midimamba.files import is_taken, whole_folder
from midimamba.text import for_json
from midimamba.tokenization.ingest import MidiRefusedError
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import MIDITOK_FILE, load_tokenizer

_READ, _PIECES, _ENCODED, _MERGED = "read", "pieces", "encoded", "merged.json"
_QUARANTINE = "quarantine.jsonl"
# Ids that a task gathers before it writes them as a row group.
_GROUP_IDS = 2**20


class _Step(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    type = "midimamba"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.work = Folder(job.work)

    @contextmanager
    def store(self) -> Iterator[tuple[PieceStore, MusicTokenizer, CorpusOptions, Path]]:
        """An empty store, the tokenizer that files are read with and its options, and a folder for this task alone."""
        base, options = prepare(self.job.options)
        with tempfile.TemporaryDirectory(prefix="midimamba-") as scratch, self.track_time():
            vocabularies = len(base.vocab) if base.is_multi_voc else 1
            path = Path(scratch, "store.sqlite")
            try:
                with PieceStore(path, self.job.reader, vocabularies) as store:
                    yield store, base, options, Path(scratch)
            except sqlite3.DatabaseError as error:
                raise explain(path, error) from error


class ReadFiles(_Step):
    """Read the files of a part, each under the same limits as everywhere."""

    name = "read files"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        with self.store() as (store, base, options, scratch):
            source = files_of(self.job.source, options)
            files: Iterable[tuple[Entry, bytes | MidiRefusedError]]
            if isinstance(source, DataSetFiles):
                start, end = (self.job.num_rows * index // world_size for index in (rank, rank + 1))
                files = enter_rows(source.part(start, end), store, Found())
            else:
                take_part(store, self.work.get(f"{LISTED}/{rank:05}.sqlite", scratch))
                files = read_entries(store.entries())
            one = replace(options, num_workers=1)  # a task has one processor
            read_files(files, store, base, one, seconds_for(source), silent=True)
            self.stat_update("files", value=store.num_files())
            self.stat_update("refused", value=sum(1 for _ in store.refusals()))
            write_part(store, scratch / "part.sqlite", "files", "labels", "outcomes")
            self.work.put(scratch / "part.sqlite", f"{_READ}/{rank:05}.sqlite")


class MergeParts(_Step):
    """Bring the parts together: drop duplicates, decide the splits, train the tokenizer; and divide the pieces."""

    name = "merge parts"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        job = self.job
        with self.store() as (store, base, options, scratch):
            for name in (OTHERS, *(f"{_READ}/{index:05}.sqlite" for index in range(job.tasks))):
                take_part(store, self.work.get(name, scratch))
            counts = settle(store, job.arguments["source"], options, job.found)
            for name, value in counts.items():
                self.stat_update(name, value=value)
            tokenizer = make_tokenizer(store, base, options)
            self.work.write(f"tokenizer/{MIDITOK_FILE}", json.dumps(tokenizer.to_dict(), indent=2))
            write_quarantine(store, scratch / _QUARANTINE)
            self.work.put(scratch / _QUARANTINE, _QUARANTINE)
            (scratch / "divided").mkdir()
            for part in divide_pieces(store, job.tasks, scratch / "divided"):
                self.work.put(part, f"{_PIECES}/{part.name}")
                part.unlink()
            arguments = job.arguments | {"files": store.digest()}
            merged = {"counts": counts, "voices": store.most_voices(), "arguments": arguments}
            self.work.write(_MERGED, json.dumps(merged))


class EncodePieces(_Step):
    """Write the pieces of a part as rows, a Parquet file for each split that has some."""

    name = "encode pieces"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        with self.store() as (store, base, _, scratch):
            take_part(store, self.work.get(f"{_PIECES}/{rank:05}.sqlite", scratch))
            processor = MidiProcessor(_tokenizer(self.work, scratch))
            tallies: dict[str, dict[str, float]] = {}
            for split in SPLITS:
                rows = rows_of(store.pieces(split), processor, shift_of(processor.midi_tokenizer, base))
                path = scratch / f"{split}-{rank:05}-of-{world_size:05}.parquet"
                tallies[split] = _write_rows(rows, processor.midi_tokenizer, path)
                self.stat_update(split, value=int(tallies[split]["pieces"]))
                if tallies[split]["pieces"]:
                    self.job.product.put(path, f"data/{path.name}")
            found = {"splits": tallies, "programs": sorted(programs_of(store.pieces("train"), base))}
            self.work.write(f"{_ENCODED}/{rank:05}.json", json.dumps(found))


class FinishCorpus(_Step):
    """Write tokenizer, quarantine and report. Then the corpus is in its place, or for an address, complete."""

    name = "finish corpus"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        job, product = self.job, self.job.product
        base, options = prepare(job.options)
        merged = json.loads(self.work.read(_MERGED))
        parts = [json.loads(self.work.read(f"{_ENCODED}/{index:05}.json")) for index in range(job.tasks)]
        with tempfile.TemporaryDirectory(prefix="midimamba-") as folder, self.track_time():
            scratch = Path(folder)
            programs = {program for part in parts for program in part["programs"]}
            facts = facts_of(programs, merged["voices"], base, options)
            tokenizer = _tokenizer(self.work, scratch)
            MidiProcessor(tokenizer, **facts).save_pretrained(scratch / "new" / "tokenizer")
            shutil.copyfile(self.work.get(_QUARANTINE, scratch), scratch / "new" / _QUARANTINE)
            for path in sorted(path for path in (scratch / "new").rglob("*") if path.is_file()):
                product.put(path, path.relative_to(scratch / "new").as_posix())
        tallies = {split: _sum([part["splits"][split] for part in parts]) for split in SPLITS}
        files = [name for name in product.names() if name != REPORT]
        written = sorted({*files, *(name.rpartition("/")[0] for name in files if "/" in name)})
        report = report_of(tallies, merged["counts"], job.found, tokenizer, merged["arguments"], written)
        product.write(REPORT, for_json(report, indent=2) + "\n")
        if product.local is not None:
            _put_in_place(product, Path(job.out))
        self.work.remove(LISTED, OTHERS, _READ, _PIECES)  # what is large


def _tokenizer(work: Folder, scratch: Path) -> MusicTokenizer:
    """The tokenizer that `MergeParts` made."""
    return load_tokenizer(str(work.get(f"tokenizer/{MIDITOK_FILE}", scratch).parent))


def _write_rows(rows: Iterable[dict[str, Any]], tokenizer: MusicTokenizer, path: Path) -> dict[str, float]:
    """Write rows to a Parquet file and return what [`tally`] counts. Few of them are in memory at once."""
    schema = features_of(tokenizer).arrow_schema
    tallies = [tally(schema.empty_table())]
    with pq.ParquetWriter(path, schema) as writer:
        for group in _groups(rows):
            table = pa.Table.from_pydict({name: [row[name] for row in group] for name in schema.names}, schema)
            writer.write_table(table)
            tallies.append(tally(table))
    return _sum(tallies)


def _sum(tallies: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(tallied[name] for tallied in tallies) for name in tallies[0]}


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows in groups with about as many ids each."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row | {"input_ids": list(row["input_ids"])})
        size += row["input_ids"].size
        if size >= _GROUP_IDS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _put_in_place(product: Folder, out: Path) -> None:
    """Make `out` of links to the files of a local folder, which stays: an interrupted task starts again.

    Raises:
        InputError: if something else is there by now.
    """
    made = Path(product.address)
    if (out / REPORT).is_file() and (out / REPORT).read_bytes() == (made / REPORT).read_bytes():
        return
    if is_taken(out):
        raise InputError(f"{out} was made by somebody else meanwhile: move it away, then run the same command again")
    with whole_folder(out) as folder:
        for name in product.names():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link(made / name, target)
