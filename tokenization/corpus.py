"""A folder or an archive of MIDI files, or music21's chorales, as a tokenized `datasets.DatasetDict`."""

import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from miditok import MusicTokenizer
from symusic.core import ScoreSecond, ScoreTick
from tqdm import tqdm

from midimamba.errors import InputError
from midimamba.files import is_taken, whole_folder, write_whole
from midimamba.tokenization.ingest import MidiRefusedError, check_score, parse_midi
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.sources import MANIFEST, Entry, Refusal, find_entries, read_entries
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, check_vocab_size, merge_ids, train_on_ids
from midimamba.tokenization.workers import MAX_SECONDS, Mark, run_bounded

SPLITS = ("train", "validation", "test")
# What a file goes through in a worker; a refusal names the one that it did not pass.
STAGES = ("read", "check", "tokenize")
# music21 takes 0.4 seconds for a usual chorale and 4 for the longest. These files are known: the bound is for a hang.
_MUSICXML_SECONDS = 60.0

_FEATURES = Features(
    {
        "name": Value("string"),
        "input_ids": List(Value("int32")),
        "num_notes": Value("int32"),
        "seconds": Value("float32"),
    }
)


@dataclass(frozen=True)
class _Piece:
    """What a worker makes of a file."""

    name: str
    ids: np.ndarray  # base ids, (tokens,) int32
    content: str  # a digest of the notes
    num_notes: int
    seconds: float
    sanitized: bool = False


@dataclass(frozen=True)
class _Refused:
    """Why a worker makes nothing of a file."""

    reason: str
    stage: int  # in STAGES


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
    """Tokenise MIDI files into splits by piece, and save the data set and its processor.

    A piece's split is what a `manifest.csv` in the source says, in a table with the columns `file` (relative to the
    manifest) and `split` (train, valid, validation or test). Other pieces' splits are decided by a hash of the name
    and the seed, so adding files moves no piece. Should a split get no piece, it takes one of those from the largest:
    the one whose hash is nearest. Byte-pair encoding is learned from the train split alone. Pieces with the same
    notes are kept once. Every file is read in a worker process with bounds of time and memory; those that cannot be
    used are listed in `quarantine.jsonl` with `path`, `sha256` (null if the bytes could not be had), `stage` (read,
    check or tokenize) and `reason`.

    Args:
        source (`str`):
            A folder, searched recursively; a `.zip`, `.tar`, `.tar.gz` or `.tgz` archive, which may also lie in such
            a folder; or `chorales`: Bach's, from music21.
        out (`Path`):
            The folder to make. It appears when everything is in it, or not at all.
        tokenization (`str`, *optional*, defaults to `"REMI"`):
            One of [`~midimamba.tokenization.tokenizations.TOKENIZATIONS`].
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
        `dict`: what `corpus.json` holds: counts of every split, refusals, duplicates, files that were `sanitized` to
        be read, how many pieces each way `split_by`, arguments, versions.

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
    listing = find_entries(source)
    entries = listing.entries[:limit]
    arguments = {
        "source": source,
        "tokenization": tokenization,
        "vocab_size": vocab_size,
        "valid_fraction": valid_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
        "limit": limit,
        "files": _digest([(entry.name, entry.size, listing.splits.get(entry.name)) for entry in entries]),
    }
    if is_taken(out):
        return _already_there(out, arguments)
    with whole_folder(out) as folder:
        pieces, refused = _read_all(entries, tokenization, num_workers)
        refused = sorted([*listing.broken, *refused], key=lambda refusal: refusal.name)
        return _save(folder, pieces, refused, listing.splits, tokenizer, arguments)


def _already_there(out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((out / "corpus.json").read_text())
    except (OSError, ValueError):
        report = {}
    if report.get("arguments") != arguments:
        raise InputError(f"{out} exists already and holds something else: delete it or choose another folder")
    tqdm.write(f"{out} is already there", file=sys.stderr)
    return report


def _read_all(
    entries: Sequence[Entry], tokenization: str, num_workers: int | None
) -> tuple[list[_Piece], list[Refusal]]:
    """Read files in worker processes; the pieces are in the order of the files."""
    pieces: dict[str, _Piece] = {}
    refused: list[Refusal] = []
    digests: dict[str, str] = {}

    def tasks() -> Iterator[tuple[str, tuple[str, bytes | Path]]]:
        for entry, content in read_entries(entries):
            if isinstance(content, MidiRefusedError):
                refused.append(Refusal(entry.name, None, "read", content.reason))
                progress.update()
                continue
            digests[entry.name] = hashlib.sha256(content).hexdigest()
            yield entry.name, (entry.name, entry.path if entry.is_musicxml else content)

    _tokenizer(tokenization)  # a worker that is a fork inherits it
    workers = max(1, min(num_workers or os.cpu_count() or 1, len(entries)))
    max_seconds = _MUSICXML_SECONDS if any(entry.is_musicxml for entry in entries) else MAX_SECONDS
    with tqdm(total=len(entries), desc="Reading", unit="file") as progress:
        for name, outcome in run_bounded(partial(_read, tokenization), tasks(), workers, max_seconds=max_seconds):
            if isinstance(outcome, _Piece):
                pieces[name] = outcome
            else:
                refused.append(Refusal(name, digests[name], STAGES[outcome.stage], outcome.reason))
            progress.update()
    return [pieces[entry.name] for entry in entries if entry.name in pieces], refused


@cache
def _tokenizer(tokenization: str) -> MusicTokenizer:
    return build_tokenizer(tokenization)


def _read(tokenization: str, file: tuple[str, bytes | Path], mark: Mark) -> _Piece | _Refused:
    """In a worker: the content of a MIDI file, or a MusicXML file, to base ids."""
    name, content = file
    stage = 0

    def enter(name_of_stage: str) -> None:
        nonlocal stage
        stage = STAGES.index(name_of_stage)
        mark(stage)

    try:
        score, sanitized = parse_midi(_musicxml_to_midi(content) if isinstance(content, Path) else content)
        enter("check")
        score = check_score(score)
        enter("tokenize")
        return _tokenize(name, score, _tokenizer(tokenization), sanitized)
    except MidiRefusedError as error:
        return _Refused(error.reason, stage)
    except MemoryError:
        raise  # the bound of this process: it is to be replaced
    except Exception as error:
        # Third-party parsers on arbitrary files: whatever they trip over concerns this file, not the run.
        return _Refused(f"{type(error).__name__}: {error}", stage)


def _tokenize(name: str, score: ScoreTick, tokenizer: MusicTokenizer, sanitized: bool) -> _Piece:
    ids = base_ids(tokenizer, score)
    # The same notes at another tempo are the same music.
    tempos = set(tokenizer.token_ids_of_type("Tempo"))
    content = _digest([index for index in ids if index not in tempos])
    seconds = cast(ScoreSecond, score.to("second")).end()
    return _Piece(name, np.array(ids, dtype=np.int32), content, score.note_num(), seconds, sanitized)


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
    usable: Sequence[_Piece],
    refused: Sequence[Refusal],
    given: Mapping[str, str],
    tokenizer: MusicTokenizer,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Split, train, encode and write everything into `folder`."""
    if not usable:
        first = refused[0]
        raise InputError(f"no file of {arguments['source']} can be used; the first, {first.name}: {first.reason}")
    unique = list({piece.content: piece for piece in reversed(usable)}.values())[::-1]  # the first of equals
    splits = _split(unique, arguments["valid_fraction"], arguments["test_fraction"], arguments["seed"], given)
    if arguments["vocab_size"] is not None:
        train_on_ids(tokenizer, [piece.ids.tolist() for piece in splits["train"]], arguments["vocab_size"])
    processor = MidiProcessor(tokenizer)
    with tqdm(total=len(unique), desc="Encoding", unit="piece") as progress:
        dataset = DatasetDict({split: _encode(split, splits[split], processor, progress) for split in SPLITS})
    dataset.save_to_disk(str(folder))
    processor.save_pretrained(folder / "tokenizer")
    write_whole(folder / "quarantine.jsonl", "".join(_quarantine_line(refusal) for refusal in refused))
    by_manifest = sum(piece.name in given for piece in unique)
    report = {
        "splits": {split: _count(dataset[split]) for split in SPLITS},
        "split_by": {"manifest": by_manifest, "hash": len(unique) - by_manifest},
        "refused": len(refused),
        "sanitized": sum(piece.sanitized for piece in usable),
        "duplicates": len(usable) - len(unique),
        "vocab_size": processor.vocab_size,
        "arguments": arguments,
        "versions": {package: version(package) for package in ("miditok", "symusic")},
    }
    write_whole(folder / "corpus.json", json.dumps(report, indent=2) + "\n")
    return report


def _quarantine_line(refusal: Refusal) -> str:
    row = {"path": refusal.name, "sha256": refusal.sha256, "stage": refusal.stage, "reason": refusal.reason}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _split(
    pieces: Sequence[_Piece], valid_fraction: float, test_fraction: float, seed: int, given: Mapping[str, str]
) -> dict[str, list[_Piece]]:
    """Deal out the pieces whose split is not given, by hash: test, validation and train are intervals of [0, 1)."""
    fractions = {"test": test_fraction, "validation": valid_fraction, "train": 1.0}
    fixed = {split: [piece for piece in pieces if given.get(piece.name) == split] for split in fractions}
    splits: dict[str, list[_Piece]] = {split: [] for split in fractions}
    free = [piece for piece in pieces if piece.name not in given]
    for piece in sorted(free, key=lambda piece: _hash(piece.name, seed)):
        place = _hash(piece.name, seed)
        if place < test_fraction:
            splits["test"].append(piece)
        else:
            splits["validation" if place < test_fraction + valid_fraction else "train"].append(piece)
    for split in ("train", "test", "validation"):
        largest = max(splits.values(), key=len)
        wanted = fractions[split] and not splits[split] and not fixed[split]
        if wanted and (len(largest) > 1 or (split == "train" and largest)):
            splits[split].append(largest.pop(-1 if split == "train" else 0))
    if not splits["train"] and not fixed["train"]:
        raise InputError(f"the {MANIFEST} leaves no usable piece to train on")
    return {split: fixed[split] + splits[split] for split in fractions}


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
