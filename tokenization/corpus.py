"""A folder of MIDI files, or the chorales that music21 bundles, as a tokenized `datasets.DatasetDict`."""

import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from miditok import MusicTokenizer
from symusic.core import ScoreSecond
from tqdm import tqdm

from midimamba.errors import InputError
from midimamba.files import whole_folder, write_whole
from midimamba.tokenization.ingest import MIDI_SUFFIXES, MidiRefusedError, find_midi_files, read_score
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, check_vocab_size, merge_ids, train_on_ids

CHORALES = "chorales"
SPLITS = ("train", "validation", "test")

_FEATURES = Features(
    {
        "name": Value("string"),
        "input_ids": List(Value("int32")),
        "num_notes": Value("int32"),
        "seconds": Value("float32"),
    }
)
# Of music21's Bach entries, the only one that is no chorale: a prelude for keyboard.
_NO_CHORALE = "bwv846"


@dataclass(frozen=True)
class _Piece:
    """What a worker makes of a file."""

    name: str
    ids: np.ndarray  # base ids, (tokens,) int32
    content: str  # a digest of the notes
    num_notes: int
    seconds: float


@dataclass(frozen=True)
class _Refusal:
    """Why a worker makes nothing of a file."""

    name: str
    reason: str


def tokenize_corpus(
    source: str,
    out: Path,
    *,
    tokenization: str = "REMI",
    vocab_size: int | None = 1000,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Tokenise a folder of MIDI files into splits by piece, and save the data set and its processor.

    A piece's split is decided by a hash of its name and the seed, so adding files moves no piece. Should a split
    get no piece that way, it takes one from the largest: the one whose hash is nearest. Byte-pair encoding is
    learned from the train split alone. Pieces with the same notes are kept once; files that cannot be used are
    listed in `quarantine.jsonl`.

    Args:
        source (`str`):
            A folder, searched recursively, or `chorales`: Bach's, from music21.
        out (`Path`):
            The folder to make. It appears when everything is in it, or not at all.
        tokenization (`str`, *optional*, defaults to `"REMI"`):
            `"REMI"` or `"TSD"`.
        vocab_size (`int`, *optional*, defaults to 1000):
            Ids after byte-pair encoding; `None` keeps the base tokens.
        valid_fraction, test_fraction (`float`, *optional*, defaults to 0.1):
            Expected fractions of the pieces in these splits.
        seed (`int`, *optional*, defaults to 0):
            Decides the splits.
        limit (`int`, *optional*):
            Use only so many files, the first by name.
        num_workers (`int`, *optional*):
            Processes that read files, by default one for each processor. The result does not depend on it.

    Returns:
        `dict`: what `corpus.json` holds: counts of every split, refusals, duplicates, arguments, versions.

    Raises:
        InputError: if nothing can be tokenised, an argument makes no sense, or `out` holds something else.
    """
    if min(valid_fraction, test_fraction) < 0 or valid_fraction + test_fraction >= 1:
        raise InputError(
            f"validation and test fractions {valid_fraction} and {test_fraction} leave nothing to train on"
        )
    tokenizer = build_tokenizer(tokenization)
    if vocab_size is not None:
        check_vocab_size(tokenizer, vocab_size)
    files = _find(source)[:limit]
    arguments = {
        "source": source,
        "tokenization": tokenization,
        "vocab_size": vocab_size,
        "valid_fraction": valid_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
        "limit": limit,
        "files": _digest([(name, path.stat().st_size) for name, path in files]),
    }
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _already_there(out, arguments)
    with whole_folder(out) as folder:
        pieces = _read_all(files, tokenization, num_workers)
        return _save(folder, source, pieces, tokenizer, arguments)


def _already_there(out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((out / "corpus.json").read_text())
    except (OSError, ValueError):
        report = {}
    if report.get("arguments") != arguments:
        raise InputError(f"{out} exists already and holds something else: delete it or choose another folder")
    tqdm.write(f"{out} is already there", file=sys.stderr)
    return report


def _find(source: str) -> list[tuple[str, Path]]:
    """Names and paths of the files of a source, sorted by name. A name is the path within the source."""
    if source == CHORALES:
        return _find_chorales()
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{source} is no folder: give a folder of MIDI files, or the word {CHORALES}")
    files = [(path.relative_to(folder).as_posix(), path) for path in find_midi_files(folder)]
    if not files:
        raise InputError(f"{source} holds no MIDI files: they end in {', '.join(sorted(MIDI_SUFFIXES))}")
    return sorted(files)


def _find_chorales() -> list[tuple[str, Path]]:
    try:
        with redirect_stderr(io.StringIO()):  # music21 comments on what else one might install
            from music21 import corpus
    except ImportError as error:
        raise InputError('the chorales come with music21: pip install "midimamba[demo]"') from error
    # Three more are Humdrum encodings (.krn) of chorales that are there as MusicXML too; one of them does not parse.
    paths = [Path(path) for path in corpus.getComposer("bach") if Path(path).suffix in (".mxl", ".xml")]
    return sorted((f"bach/{path.stem}", path) for path in paths if path.stem != _NO_CHORALE)


def _read_all(
    files: Sequence[tuple[str, Path]], tokenization: str, num_workers: int | None
) -> list[_Piece | _Refusal]:
    """Read files in worker processes, in order. A file that kills its worker is refused as well."""
    workers = max(1, min(num_workers or os.cpu_count() or 1, len(files)))
    pieces: dict[str, _Piece | _Refusal] = {}
    with tqdm(total=len(files), desc="Reading", unit="file") as progress:
        for piece in _read_in_pool(files, tokenization, workers):
            pieces[piece.name] = piece
            progress.update()
        # Without a word from a dead worker it is unknown whose fault it was: the rest is read one by one.
        for name, path in files:
            if name not in pieces:
                alone = list(_read_in_pool([(name, path)], tokenization, 1))
                pieces[name] = alone[0] if alone else _Refusal(name, "reading it crashes the process")
                progress.update()
    return [pieces[name] for name, _ in files]


def _read_in_pool(files: Sequence[tuple[str, Path]], tokenization: str, workers: int) -> Iterator[_Piece | _Refusal]:
    """Pieces as they are ready; ends early if a worker dies."""
    pool = ProcessPoolExecutor(workers)
    try:
        futures: list[Future[_Piece | _Refusal]] = [
            pool.submit(_read, name, path, tokenization) for name, path in files
        ]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        return
    finally:
        pool.shutdown(cancel_futures=True)


@cache
def _tokenizer(tokenization: str) -> MusicTokenizer:
    return build_tokenizer(tokenization)


def _read(name: str, path: Path, tokenization: str) -> _Piece | _Refusal:
    """In a worker: one file to base ids."""
    try:
        score = read_score(path if path.suffix.lower() in MIDI_SUFFIXES else _musicxml_to_midi(path))
        tokenizer = _tokenizer(tokenization)
        ids = base_ids(tokenizer, score)
    except MidiRefusedError as error:
        return _Refusal(name, error.reason)
    except Exception as error:
        # Third-party parsers on arbitrary files: whatever they trip over concerns this file, not the run.
        return _Refusal(name, f"it cannot be tokenised ({type(error).__name__}: {error})")
    # The same notes at another tempo are the same music.
    tempos = set(tokenizer.token_ids_of_type("Tempo"))
    content = _digest([index for index in ids if index not in tempos])
    seconds = cast(ScoreSecond, score.to("second")).end()
    return _Piece(name, np.array(ids, dtype=np.int32), content, score.note_num(), seconds)


def _musicxml_to_midi(path: Path) -> bytes:
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from music21 import converter, midi

        content: bytes = midi.translate.streamToMidiFile(converter.parse(path)).writestr()
    return content


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _save(
    folder: Path,
    source: str,
    pieces: Sequence[_Piece | _Refusal],
    tokenizer: MusicTokenizer,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Split, train, encode and write everything into `folder`."""
    refused = [piece for piece in pieces if isinstance(piece, _Refusal)]
    usable = [piece for piece in pieces if isinstance(piece, _Piece)]
    if not usable:
        raise InputError(f"no file of {source} can be used; the first, {refused[0].name}: {refused[0].reason}")
    unique = list({piece.content: piece for piece in reversed(usable)}.values())[::-1]  # the first of equals
    splits = _split(unique, arguments["valid_fraction"], arguments["test_fraction"], arguments["seed"])
    if arguments["vocab_size"] is not None:
        train_on_ids(tokenizer, [piece.ids.tolist() for piece in splits["train"]], arguments["vocab_size"])
    processor = MidiProcessor(tokenizer)
    with tqdm(total=len(unique), desc="Encoding", unit="piece") as progress:
        dataset = DatasetDict({split: _encode(split, splits[split], processor, progress) for split in SPLITS})
    dataset.save_to_disk(str(folder))
    processor.save_pretrained(folder / "tokenizer")
    quarantine = [json.dumps({"path": piece.name, "reason": piece.reason}, ensure_ascii=False) for piece in refused]
    write_whole(folder / "quarantine.jsonl", "".join(line + "\n" for line in quarantine))
    report = {
        "splits": {split: _count(dataset[split]) for split in SPLITS},
        "refused": len(refused),
        "duplicates": len(usable) - len(unique),
        "vocab_size": processor.vocab_size,
        "arguments": arguments,
        "versions": {package: version(package) for package in ("miditok", "symusic")},
    }
    write_whole(folder / "corpus.json", json.dumps(report, indent=2) + "\n")
    return report


def _split(
    pieces: Sequence[_Piece], valid_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[_Piece]]:
    """Deal pieces out by hash: test, validation and train are neighbouring intervals of [0, 1)."""
    fractions = {"test": test_fraction, "validation": valid_fraction, "train": 1.0}
    ordered = sorted(pieces, key=lambda piece: _hash(piece.name, seed))
    splits: dict[str, list[_Piece]] = {split: [] for split in fractions}
    for piece in ordered:
        place = _hash(piece.name, seed)
        if place < test_fraction:
            splits["test"].append(piece)
        else:
            splits["validation" if place < test_fraction + valid_fraction else "train"].append(piece)
    for split in ("train", "test", "validation"):
        largest = max(splits.values(), key=len)
        if not splits[split] and fractions[split] and (split == "train" or len(largest) > 1):
            splits[split].append(largest.pop(-1 if split == "train" else 0))
    return splits


def _hash(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the name and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") / 2**64


def _encode(split: str, pieces: Sequence[_Piece], processor: MidiProcessor, progress: tqdm) -> Dataset:
    rows: dict[str, list[Any]] = {column: [] for column in _FEATURES}
    for piece in sorted(pieces, key=lambda piece: piece.name):
        ids = merge_ids(processor.midi_tokenizer, piece.ids.tolist())
        rows["name"].append(piece.name)
        rows["input_ids"].append([processor.bos_token_id, *ids, processor.eos_token_id])
        rows["num_notes"].append(piece.num_notes)
        rows["seconds"].append(piece.seconds)
        progress.update()
    return Dataset.from_dict(rows, features=_FEATURES, split=split)


def _count(dataset: Dataset) -> dict[str, int | float]:
    return {
        "pieces": len(dataset),
        "tokens": len(_flat_ids(dataset)),
        "notes": sum(dataset["num_notes"]),
        "hours": round(sum(dataset["seconds"]) / 3600, 3),
    }


def load_corpus(folder: str | Path) -> tuple[DatasetDict, MidiProcessor]:
    """Read what [`tokenize_corpus`] wrote.

    Raises:
        InputError: if `folder` is not such a corpus.
    """
    if not (Path(folder) / "corpus.json").is_file():
        raise InputError(f"{folder} is no tokenized corpus: make one with `midimamba tokenize SOURCE --out {folder}`")
    return DatasetDict.load_from_disk(str(folder)), MidiProcessor.from_pretrained(Path(folder) / "tokenizer")


def pack_blocks(dataset: Dataset, block_size: int) -> Dataset:
    """Concatenate the pieces of a split and cut them into blocks for training.

    Args:
        dataset (`datasets.Dataset`):
            A split, with a column `input_ids` of one piece a row.
        block_size (`int`):
            Tokens a block. Only the tokens after the last whole block are lost.

    Returns:
        `datasets.Dataset`: with a column `input_ids` of lists of `block_size` ids.

    Raises:
        InputError: if the pieces hold fewer than `block_size` tokens.
    """
    ids = _flat_ids(dataset)
    blocks = len(ids) // block_size
    if blocks == 0:
        split = f"the {dataset.split} split" if dataset.split else "the data set"
        raise InputError(
            f"{split} holds {len(ids)} tokens, fewer than one block of {block_size}: choose smaller blocks"
        )
    rows = ids[: blocks * block_size].reshape(blocks, block_size)
    features = Features({"input_ids": List(Value("int32"), length=block_size)})
    return Dataset.from_dict({"input_ids": rows}, features=features, split=dataset.split)


def _flat_ids(dataset: Dataset) -> np.ndarray:
    """All ids of all rows, in order, of shape (tokens,)."""
    table = dataset.with_format("arrow")[:]  # unlike `dataset.data`, it honours select and shuffle
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table["input_ids"].chunks]
    return np.concatenate([np.empty(0, dtype=np.int32), *chunks])
