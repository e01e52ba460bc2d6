"""The files of a source to base ids, in worker processes, into a [`PieceStore`]."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from miditok import MusicTokenizer
from symusic.core import ScoreSecond, ScoreTick
from tqdm import tqdm

from midimamba.corpus.chorales import read_chorale
from midimamba.corpus.data_sets import DataSetFiles
from midimamba.corpus.entries import OTHER_SUFFIXES, Entry, Refusal, Skipped
from midimamba.corpus.manifests import Label
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.sources import CHORALES, list_source, read_entries
from midimamba.corpus.store import Piece, PieceStore, Refused, pack_ids
from midimamba.corpus.workers import MAX_SECONDS, Lost, Mark, run_bounded
from midimamba.tokenization.controls import describe
from midimamba.tokenization.ingest import MidiRefusedError, check_score, parse_midi
from midimamba.tokenization.normalization import normalize_score, settle_notes
from midimamba.tokenization.tokenizer import encode_normalized
from midimamba.tokenization.voices import most_voices

# The stages of a file in a worker; a refusal names the one that it did not pass.
STAGES = ("read", "check", "tokenize")
# Of reasons why files are skipped. Further suffixes are counted together.
_MAX_REASONS = 20
_BEYOND_LIMIT = "beyond the limit"
# music21 takes 0.4 seconds for a usual chorale and 4 for the longest. These files are known to be good,
# so the bound is only against a hang.
_MUSICXML_SECONDS = 60.0

_Content = bytes | MidiRefusedError


@dataclass
class Found:
    """The files of a source. Each is used, a duplicate, refused or skipped.

    Args:
        files (`int`, *optional*, defaults to 0):
            How many there are. Folders and archives are what they hold, unless they cannot be read or hold nothing.
        skipped (`Counter`, *optional*):
            How many are not even refused, by reason.
    """

    files: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, item: Entry | Refusal | Skipped) -> None:
        """Count one more file, or several that are skipped."""
        count = item.count if isinstance(item, Skipped) else 1
        self.files += count
        if isinstance(item, Skipped):
            self.skipped[item.reason] += count

    def report(self) -> dict[str, Any]:
        """What `corpus.json` holds of it: the most frequent reasons first."""
        ranked = sorted((+self.skipped).items(), key=lambda item: (-item[1], item[0]))
        reasons = dict(ranked[:_MAX_REASONS])
        if rest := sum(count for _, count in ranked[_MAX_REASONS:]):
            reasons[OTHER_SUFFIXES] = reasons.get(OTHER_SUFFIXES, 0) + rest
        return {"found": self.files, "skipped": reasons}

    def reasons(self) -> str:
        """Why files are skipped, in brackets and after a space, or nothing."""
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.report()["skipped"].items())
        return f" ({reasons})" if reasons else ""

    def describe(self, report: Mapping[str, Any]) -> str:
        """What became of all files, in one line, from what `corpus.json` holds of the others."""
        return (
            f"{self.files:,} files found: {sum(split['pieces'] for split in report['splits'].values()):,} used, "
            f"{report['duplicates']:,} duplicates, {report['refused']:,} refused (quarantine.jsonl), "
            f"{sum(self.skipped.values()):,} skipped{self.reasons()}"
        )


def read_source(
    source: str | DataSetFiles, store: PieceStore, tokenizer: MusicTokenizer, options: CorpusOptions
) -> Found:
    """Read every file of a source that the store does not know yet.

    Args:
        source (`str` or `DataSetFiles`):
            What [`list_source`] takes, or a data set.
        store (`PieceStore`):
            Gets files, labels and outcomes.
        tokenizer (`miditok.MusicTokenizer`):
            Its base ids are taken.
        options (`CorpusOptions`):
            Of which `labels`, `limit` and `num_workers` are used, and whether there are any `controls`.

    Returns:
        `Found`: how many files there are, and how many of them are skipped.

    Raises:
        InputError: as [`list_source`].
    """
    if isinstance(source, DataSetFiles):
        found = beyond_limit(source, options.limit)
        total = min(len(source), options.limit or sys.maxsize) or None
        files = enter_rows(islice(source, options.limit), store, found)
    else:
        found = list_files(source, store, options)
        total, files = store.num_files(), read_entries(store.entries())
    read_files(files, store, tokenizer, options, seconds_for(source), total)
    return found


def seconds_for(source: str | DataSetFiles) -> float:
    """What reading one file may take."""
    return _MUSICXML_SECONDS if source == CHORALES else MAX_SECONDS


def read_files(
    files: Iterable[tuple[Entry, _Content]],
    store: PieceStore,
    tokenizer: MusicTokenizer,
    options: CorpusOptions,
    max_seconds: float,
    total: int | None = None,
    silent: bool = False,
) -> None:
    """Read files that the store does not know yet, each in a worker process with bounded time and memory.

    Args:
        files (iterable of pairs): entries with their bytes, or why there are none.
        store (`PieceStore`): gets outcomes.
        tokenizer (`miditok.MusicTokenizer`): its base ids are taken.
        options (`CorpusOptions`): as for [`read_source`].
        max_seconds (`float`): for each file.
        total (`int`, *optional*): how many files there are, if that is known.
        silent (`bool`, *optional*, defaults to `False`): show no progress.
    """
    workers = options.num_workers or os.cpu_count() or 1
    with tqdm(total=total, desc="Reading", unit="file", disable=silent) as progress:
        underway: set[str] = set()
        tasks = _new_files(files, store, underway, progress)
        for sha256, outcome in run_bounded(
            partial(_read, tokenizer, bool(options.controls)), tasks, workers, max_seconds=max_seconds
        ):
            if isinstance(outcome, Lost):
                outcome = Refused(outcome.reason, STAGES[outcome.stage], lost=True)
            store.add_outcome(sha256, outcome)
            underway.discard(sha256)
            progress.update()
    store.finish_reading()


def list_files(source: str, store: PieceStore, options: CorpusOptions) -> Found:
    """Enter the files of a folder or an archive in a store, with what manifests say of them.

    Raises:
        InputError: as [`list_source`].
    """
    found = Found()
    with tqdm(desc="Listing", unit="file", leave=False, delay=2) as progress:
        for item in list_source(source, options.labels):
            if isinstance(item, Label):
                store.add_label(item)
                continue
            found.add(item)
            if isinstance(item, Entry):
                store.add_file(item)
                progress.update()
            elif isinstance(item, Refusal):
                store.add_refusal(item)
    if matched := store.check_labels():
        tqdm.write(matched, file=sys.stderr)
    if options.limit is not None:
        listed = store.num_files()
        store.keep_first(options.limit)
        found.skipped[_BEYOND_LIMIT] += listed - store.num_files()
    return found


def beyond_limit(source: DataSetFiles, limit: int | None) -> Found:
    """The rows of a data set that are left out, as far as their number is known."""
    found = Found()
    if limit is not None and len(source) > limit:
        found.add(Skipped(_BEYOND_LIMIT, len(source) - limit))
    return found


def enter_rows(
    rows: Iterable[tuple[Entry, Label, _Content]], store: PieceStore, found: Found
) -> Iterator[tuple[Entry, _Content]]:
    """The files of a data set. What its rows say of them is entered in a store when they are taken."""
    for entry, label, content in rows:
        found.add(entry)
        store.add_label(label)
        yield entry, content


def _new_files(
    files: Iterable[tuple[Entry, _Content]], store: PieceStore, underway: set[str], progress: "tqdm[Any]"
) -> Iterator[tuple[str, bytes | Path]]:
    """What workers have to read, under the SHA-256 of its bytes. Every file is entered in the store."""
    for entry, content in files:
        if isinstance(content, MidiRefusedError):
            store.add_refusal(Refusal(entry.name, None, "read", content.reason))
            progress.update()
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        store.add_file(entry, sha256)
        if sha256 in underway or store.knows(sha256):
            progress.update()
            continue
        underway.add(sha256)
        yield sha256, entry.path if entry.is_musicxml else content


def _read(tokenizer: MusicTokenizer, with_controls: bool, content: bytes | Path, mark: Mark) -> Piece | Refused:
    """In a worker: the content of a MIDI file, or a MusicXML file, to base ids."""
    stage = STAGES[0]

    def enter(name: str) -> None:
        nonlocal stage
        stage = name
        mark(STAGES.index(name))

    try:
        score, sanitized = parse_midi(read_chorale(content) if isinstance(content, Path) else content)
        enter("check")
        score = check_score(score)
        enter("tokenize")
        return _tokenize(tokenizer, score, sanitized, with_controls)
    except MidiRefusedError as error:
        return Refused(error.reason, stage)
    except MemoryError:
        raise  # the memory bound of this process, which is then replaced
    except Exception as error:
        # Third-party parsers on arbitrary files: whatever they raise concerns this file, not the run.
        return Refused(f"{type(error).__name__}: {error}", stage)


def _tokenize(tokenizer: MusicTokenizer, score: ScoreTick, sanitized: bool, with_controls: bool) -> Piece:
    written = normalize_score(tokenizer, score)
    ids = encode_normalized(tokenizer, written)
    array = np.array(ids, dtype=np.int32)
    if not tokenizer.is_multi_voc:  # the same notes at another tempo are the same music
        array = array[np.isin(array, tokenizer.token_ids_of_type("Tempo"), invert=True)]
    content = hashlib.sha256(array.tobytes()).hexdigest()[:32]
    seconds = cast(ScoreSecond, score.to("second")).end()
    controls = describe(score) if with_controls else {}
    settle_notes(tokenizer, written)  # as decoding the ids ends notes
    voices = most_voices(written)
    return Piece(pack_ids(ids), content, score.note_num(), seconds, sanitized, controls, voices)
