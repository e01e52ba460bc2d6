"""The files of a source to base ids, in worker processes, into a [`PieceStore`]."""

import hashlib
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from miditok import MusicTokenizer
from symusic.core import ScoreSecond, ScoreTick
from tqdm import tqdm

from midimamba.corpus.data_sets import DataSetFiles
from midimamba.corpus.entries import Entry, Refusal
from midimamba.corpus.manifests import Label
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.sources import CHORALES, list_source, read_entries
from midimamba.corpus.store import Piece, PieceStore, Refused, pack_ids
from midimamba.corpus.workers import MAX_SECONDS, Lost, Mark, run_bounded
from midimamba.tokenization.controls import describe
from midimamba.tokenization.ingest import MidiRefusedError, check_score, parse_midi
from midimamba.tokenization.tokenizer import base_ids

# The stages of a file in a worker; a refusal names the one that it did not pass.
STAGES = ("read", "check", "tokenize")
# music21 takes 0.4 seconds for a usual chorale and 4 for the longest. These files are known to be good,
# so the bound is only against a hang.
_MUSICXML_SECONDS = 60.0

_Content = bytes | MidiRefusedError


def read_source(
    source: str | DataSetFiles, store: PieceStore, tokenizer: MusicTokenizer, options: CorpusOptions
) -> None:
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

    Raises:
        InputError: as [`list_source`].
    """
    workers = options.num_workers or os.cpu_count() or 1
    if isinstance(source, DataSetFiles):
        total = min(len(source), options.limit or sys.maxsize) or None
        files = _list_rows(islice(source, options.limit), store)
    else:
        _list_files(source, store, options.labels, options.limit)
        total, files = store.num_files(), read_entries(store.entries())
    max_seconds = _MUSICXML_SECONDS if source == CHORALES else MAX_SECONDS
    with tqdm(total=total, desc="Reading", unit="file") as progress:
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


def _list_files(source: str, store: PieceStore, columns: Sequence[str], limit: int | None) -> None:
    with tqdm(desc="Listing", unit="file", leave=False, delay=2) as progress:
        for item in list_source(source, columns):
            if isinstance(item, Entry):
                store.add_file(item)
                progress.update()
            elif isinstance(item, Label):
                store.add_label(item)
            else:
                store.add_refusal(item)
    if matched := store.check_labels():
        tqdm.write(matched, file=sys.stderr)
    if limit is not None:
        store.keep_first(limit)


def _list_rows(rows: Iterable[tuple[Entry, Label, _Content]], store: PieceStore) -> Iterator[tuple[Entry, _Content]]:
    for entry, label, content in rows:
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
        score, sanitized = parse_midi(_musicxml_to_midi(content) if isinstance(content, Path) else content)
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
    ids = base_ids(tokenizer, score)
    array = np.array(ids, dtype=np.int32)
    if not tokenizer.is_multi_voc:  # the same notes at another tempo are the same music
        array = array[np.isin(array, tokenizer.token_ids_of_type("Tempo"), invert=True)]
    content = hashlib.sha256(array.tobytes()).hexdigest()[:32]
    seconds = cast(ScoreSecond, score.to("second")).end()
    controls = describe(score) if with_controls else {}
    return Piece(pack_ids(ids), content, score.note_num(), seconds, sanitized, controls)


def _musicxml_to_midi(path: Path) -> bytes:
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from music21 import converter, midi

        content: bytes = midi.translate.streamToMidiFile(converter.parse(path)).writestr()
    return content
