"""MIDI files of any source as a tokenized `datasets.DatasetDict`."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from miditok import MusicTokenizer
from tqdm import tqdm

from midimamba.corpus.assembly import (
    digest,
    facts_of,
    features_of,
    make_tokenizer,
    programs_of,
    report_of,
    rows_of,
    settle,
    shift_of,
    tally,
    versions,
    write_quarantine,
)
from midimamba.corpus.data_sets import DataSetFiles, is_data_set
from midimamba.corpus.load import SPLITS
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.reading import Found, read_source
from midimamba.corpus.sources import CHORALES, NO_MUSIC21
from midimamba.corpus.store import PieceStore
from midimamba.corpus.upkeep import STORE_FILE, carry_over, contents, reading_store, showing_causes, target_of, tidy
from midimamba.errors import InputError
from midimamba.files import is_taken, locked, read_json, whole_file, whole_folder, write_whole
from midimamba.text import for_json, printable
from midimamba.tokenization.choices import CONTROLS
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.infilling import check_can_infill
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizations import GAP
from midimamba.tokenization.tokenizer import (
    build_tokenizer,
    check_subword_model,
    check_vocab_size,
    load_tokenizer,
)

# What a tokenizer that is there decides.
_DECIDED = ("tokenization", "tokenizer_options", "subword_model", "vocab_size", "training_tokens")
# What `corpus.json` says, among other things.
_REPORTED = {"splits", "split_by", "refused", "duplicates", "vocab_size", "arguments", "written"}


def tokenize_corpus(source: str, out: Path, options: CorpusOptions | None = None) -> dict[str, Any]:
    """Tokenize MIDI files into splits by piece, and save the data set and its processor.

    A piece's split is what a `manifest.csv` in the source says, in a table with the columns `file` (relative to the
    manifest) and `split` (train, test, or validation, also called valid, val, dev or eval), or what a data set says. A
    row that names no file, or a split with another name, is an error. Other pieces' splits are decided by a hash of
    the name and the seed, so adding files moves no piece. If a split gets no piece, it takes one of those from the
    largest: the one whose hash is nearest. The subword model is learned from the train split alone. Pieces with the
    same notes are kept once, and held out if one of them is. Every file is read in a worker process with bounded time
    and memory. Those that cannot be used are listed in `quarantine.jsonl` with `path`, `sha256` (null if the bytes
    could not be read), `stage` (read, check or tokenize) and `reason`.

    Memory does not grow with the number of files. What was read is kept beside `out`: an interrupted run continues
    where it stopped. Where `out` is the corpus of the same source and options, only new and changed files are read,
    and it is replaced if there are any. What somebody else put into it stays. Equal input gives equal bytes.

    Args:
        source (`str`):
            A folder, searched recursively; a zip or tar archive (also `.tar.gz`, `.tar.bz2`, `.tar.xz`), also in such
            a folder; a file of ABC notation, of which every tune is a piece; a data set with a column of MIDI bytes,
            in a folder or on the Hub (`owner/name`); or `chorales`: Bach's, from music21.
        out (`Path`):
            The folder to make. It appears when everything is in it, or not at all.
        options ([`~midimamba.corpus.options.CorpusOptions`], *optional*):
            How files are read, split and tokenized.

    Returns:
        `dict`: what `corpus.json` holds: counts for every split, refusals, duplicates, files that were `sanitized` to
        be read, how many pieces were `split_by` which rule, the tokenizer's fingerprint, arguments, versions.

    Raises:
        InputError: if nothing can be tokenized, an option makes no sense, `out` holds something else or is being
            written by another run, or a disk is full.
    """
    base, options = prepare(options or CorpusOptions())
    out = target_of(out)
    reader = reader_of(base, source, options)
    with locked(out):
        tidy(out)
        arguments = arguments_of(source, options)
        earlier = _earlier(out, arguments)
        with reading_store(out, reader, len(base.vocab) if base.is_multi_voc else 1) as store, showing_causes():
            found = read_source(files_of(source, options), store, base, options)
            if reused := store.num_reused():
                tqdm.write(f"{reused:,} of {store.num_files():,} files are as they were read before", file=sys.stderr)
            arguments["files"] = store.digest()
            if earlier is not None and earlier["arguments"] == arguments and _is_whole(out, earlier):
                _keep(out, store)
                report = earlier | found.report()
            else:
                with whole_folder(out, replace=earlier is not None) as folder:
                    report = _save(folder, store, base, options, arguments, found)
                    if earlier is not None:
                        carry_over(out, folder, set(earlier["written"]))
            tqdm.write(found.describe(report), file=sys.stderr)
            return report


def _keep(out: Path, store: PieceStore) -> None:
    """Leave the corpus as it is, but mend its own store if that was damaged, or is gone."""
    if store.num_read():
        with whole_file(out / STORE_FILE) as unfinished:
            store.copy_to(unfinished)
    tqdm.write(printable(f"{out} is already there"), file=sys.stderr)


def _is_whole(out: Path, earlier: Mapping[str, Any]) -> bool:
    """Whether everything is there that the run wrote which made the corpus."""
    return all((out / name).exists() for name in earlier["written"] if name != STORE_FILE)


def files_of(source: str, options: CorpusOptions) -> str | DataSetFiles:
    """A source as it is read: a data set is one."""
    if not is_data_set(source):
        return source
    return DataSetFiles(source, options.midi_column, options.labels, options.streaming)


def arguments_of(source: str, options: CorpusOptions) -> dict[str, Any]:
    """What the result depends on, as JSON holds it; with the digest of the files added, two equal ones are one corpus.

    Where the bytes come from in a data set, and how many processes read them, changes nothing.
    """
    arguments = {"source": source, **asdict(options)}
    for name in ("midi_column", "streaming", "num_workers"):
        del arguments[name]
    if not options.infill:  # corpora that were made before there was this option stay what they are
        del arguments["infill"]
    lists = {name: list(arguments[name]) for name in ("controls", "labels")}
    return arguments | lists | {"tokenizer_options": dict(options.tokenizer_options)}


def prepare(options: CorpusOptions) -> tuple[MusicTokenizer, CorpusOptions]:
    """The tokenizer that files are read with, and the options that it leaves.

    Raises:
        InputError: if the options make no sense, which is found here, before any work.
    """
    base = _base_tokenizer(options)
    # With several vocabularies there is no subword model.
    return base, replace(options, vocab_size=None) if base.is_multi_voc else options


def _base_tokenizer(options: CorpusOptions) -> MusicTokenizer:
    if unknown := [name for name in options.controls if name not in CONTROLS]:
        raise InputError(f"there is no control {unknown[0]!r}: choose one of {', '.join(CONTROLS)}")
    _check_labels(options)
    if options.tokenizer is not None:
        own = CorpusOptions()
        for name in _DECIDED:  # `prepare` leaves no size where there are several vocabularies
            if getattr(options, name) not in (getattr(own, name), None):
                raise InputError(f"{name} is decided by the tokenizer of {options.tokenizer}: leave it out")
        tokenizer = load_tokenizer(options.tokenizer)
        if options.infill and GAP not in tokenizer.special_tokens:
            raise InputError(f"the tokenizer of {options.tokenizer} has no tokens for infilling: leave out --infill")
        return tokenizer
    tokenizer = build_tokenizer(options.tokenization, **options.tokenizer_options)
    if options.infill:
        check_can_infill(tokenizer)
    if tokenizer.is_multi_voc:
        if options.controls or options.labels:
            raise InputError(f"{options.tokenization} cannot have control tokens: leave out controls and labels")
        return tokenizer
    check_subword_model(options.subword_model)
    if options.vocab_size is not None:
        check_vocab_size(tokenizer, options.vocab_size)
    return tokenizer


def _check_labels(options: CorpusOptions) -> None:
    """Refuse labels that would be taken for one another, or for a computed control."""
    taken = {name: f"the computed control {name!r}" for name in CONTROLS} if options.controls else {}
    for label in options.labels:
        # As it is written in tokens. Requests do not distinguish upper and lower case.
        name = control_token(label, "x").split("_")[0].split("-", 1)[1].lower()
        if name in taken:
            raise InputError(
                f"the label {label!r} has the name of {taken[name]}: rename the column, or leave one of them out"
            )
        taken[name] = f"the label {label!r}"


def _earlier(out: Path, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of the corpus at `out`, if it was made with the same arguments, perhaps from other files."""
    if not is_taken(out):
        return None
    try:
        report = read_json(out / "corpus.json")
    except InputError:
        report = {}
    check_is_same(str(out), report, arguments)
    return report


def check_is_same(out: str, report: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse what is at `out` if its `report` does not say that it is a corpus with the same arguments.

    Raises:
        InputError: if it is anything else.
    """
    try:
        made_with = {key: value for key, value in report["arguments"].items() if key != "files"}
    except (LookupError, AttributeError):
        made_with = {}
    if made_with != arguments or not report.keys() >= _REPORTED:
        raise InputError(f"{out} exists already and holds something else: delete it or choose another folder")


def reader_of(tokenizer: MusicTokenizer, source: str, options: CorpusOptions) -> str:
    """A digest of everything that reading depends on, apart from the files."""
    packages = ["midimamba", "miditok", "symusic", *(["music21"] if source == CHORALES else [])]
    try:
        installed = versions(packages)
    except PackageNotFoundError as error:
        raise InputError(NO_MUSIC21) from error  # of the four, the only one that may be missing
    return digest([tokenizer.to_dict(), bool(options.controls), installed])


def _save(
    folder: Path,
    store: PieceStore,
    base: MusicTokenizer,
    options: CorpusOptions,
    arguments: dict[str, Any],
    found: Found,
) -> dict[str, Any]:
    """Split, train, encode and write everything into `folder`."""
    counts = settle(store, arguments["source"], options, found)
    tokenizer = make_tokenizer(store, base, options)
    facts = facts_of(programs_of(store.pieces("train"), base), store.most_voices(), base, options)
    processor = MidiProcessor(tokenizer, **facts)
    with tqdm(total=counts["pieces"], desc="Encoding", unit="piece") as progress, _quiet_datasets():
        # `datasets` names its caches by the fingerprint: the same rows have the same one, and others another.
        fingerprint = digest([arguments, tokenizer.to_dict()])
        dataset = DatasetDict(
            {
                split: _encode(folder, split, f"{fingerprint}-{split}", store, processor, base, progress)
                for split in SPLITS
            }
        )
        # `datasets` 5.2 writes no file for an empty split unless `num_shards` is set, and then cannot load it.
        dataset.save_to_disk(str(folder), num_shards={split: None if len(dataset[split]) else 1 for split in SPLITS})
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    processor.save_pretrained(folder / "tokenizer")
    write_quarantine(store, folder / "quarantine.jsonl")
    store.copy_to(folder / STORE_FILE)
    tallies = {split: tally(dataset[split].with_format("arrow")[:]) for split in SPLITS}
    report = report_of(tallies, counts, found, tokenizer, arguments, contents(folder))
    write_whole(folder / "corpus.json", for_json(report, indent=2) + "\n")
    return report


def _encode(
    folder: Path,
    split: str,
    fingerprint: str,
    store: PieceStore,
    processor: MidiProcessor,
    base: MusicTokenizer,
    progress: "tqdm[Any]",
) -> Dataset:
    """A split as Arrow files, written piece by piece."""
    tokenizer = processor.midi_tokenizer
    features = features_of(tokenizer)

    def rows() -> Iterator[dict[str, Any]]:
        for row in rows_of(store.pieces(split), processor, shift_of(tokenizer, base)):
            yield row
            progress.update()

    if next(store.pieces(split), None) is None:
        return Dataset.from_dict({column: [] for column in features}, features=features, split=split)
    return Dataset.from_generator(
        rows,
        features=features,
        split=split,
        cache_dir=str(folder / ".cache"),
        fingerprint=fingerprint,
        writer_batch_size=100,
    )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Turn off the progress bars of `datasets`: one bar is enough."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
