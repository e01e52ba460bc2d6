"""What becomes of the pieces in a store: splits, a tokenizer, rows, and a report. The same here and on a cluster."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, List, Value
from miditok import MusicTokenizer
from tqdm import tqdm

from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.reading import Found
from midimamba.corpus.store import PieceStore, StoredPiece
from midimamba.errors import InputError
from midimamba.text import for_json
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer, merge_ids, train_on_ids

# A label with more values says which piece it is, not what kind.
MAX_LABEL_VALUES = 1_000


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each package."""
    return {package: version(package) for package in packages}


def digest(value: Any) -> str:
    """A short digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def settle(store: PieceStore, source: str, options: CorpusOptions, found: Found) -> dict[str, int]:
    """Drop duplicates and decide the splits; return what [`PieceStore.counts`] does.

    Raises:
        InputError: if there is no piece, or none to train on.
    """
    store.assign_splits(options.valid_fraction, options.test_fraction, options.seed)
    counts = store.counts()
    ways = ", ".join(f"{count:,} by {way}" for way, count in store.splits_by().items())
    tqdm.write(f"splits: {ways or 'no pieces'}", file=sys.stderr)
    if several := store.num_contradictions():
        tqdm.write(f"{several:,} pieces are given to several splits: they are held out", file=sys.stderr)
    if not counts["pieces"]:
        first = next(store.refusals(), None)
        why = f"the first, {first.name}: {first.reason}" if first else "it holds no MIDI files"
        raise InputError(f"no file of {source} can be used: {why}{found.reasons()}")
    if not counts["train"]:
        raise InputError(
            f"the splits that {source} gives leave no usable piece to train on: put some files in the split train"
        )
    return counts


def write_quarantine(store: PieceStore, path: Path) -> None:
    """Write `quarantine.jsonl`: every file that is not used, and why."""
    with path.open("w", encoding="utf-8") as file:
        for refusal in store.refusals():
            row = {"path": refusal.name, "sha256": refusal.sha256, "stage": refusal.stage, "reason": refusal.reason}
            file.write(for_json(row) + "\n")


def make_tokenizer(store: PieceStore, base: MusicTokenizer, options: CorpusOptions) -> MusicTokenizer:
    """The tokenizer of the corpus, with the control tokens that occur in the train split, and a subword model.

    A tokenizer that was given stays as it is.
    """
    if options.tokenizer:
        return base
    values = store.control_values([*options.controls, *options.labels])
    for name in options.labels:
        if len(values[name]) > MAX_LABEL_VALUES:
            raise InputError(
                f"label {name!r} has {len(values[name]):,} values; the limit is {MAX_LABEL_VALUES:,}: "
                "leave it out of --labels"
            )
    tokens = list(dict.fromkeys(control_token(name, value) for name in values for value in values[name]))
    tokenizer = build_tokenizer(
        options.tokenization, controls=tokens, infill=options.infill, **options.tokenizer_options
    )
    if options.vocab_size is not None:
        added = shift_of(tokenizer, base)
        vocab_size = options.vocab_size + added
        pieces = (piece.ids + added for piece in store.pieces("train", order="place"))
        train_on_ids(tokenizer, _up_to(pieces, options.training_tokens), vocab_size, options.subword_model)
    return tokenizer


def _up_to(pieces: Iterator[np.ndarray], count: int) -> Iterator[list[int]]:
    """As many of the first pieces as hold `count` ids together, or all."""
    total = 0

    def more(piece: np.ndarray) -> bool:
        nonlocal total
        total += len(piece)
        return total - len(piece) < count

    return (piece.tolist() for piece in takewhile(more, pieces))


def shift_of(tokenizer: MusicTokenizer, base: MusicTokenizer) -> int:
    """By how much base ids move because of the control tokens before them."""
    return len(tokenizer.special_tokens) - len(base.special_tokens)


def facts_of(programs: Iterable[int], voices: int, base: MusicTokenizer, options: CorpusOptions) -> dict[str, Any]:
    """What a processor knows of its music: `programs` and `voices` of the train split, and of the corpus whose
    tokenizer it takes.

    `None` where that corpus does not know them, or for `voices` if there are only drums.
    """
    if base.is_multi_voc:
        return {}
    if not options.tokenizer:
        return {"programs": sorted(programs), "voices": voices or None}
    earlier = MidiProcessor.from_pretrained(options.tokenizer)
    return {
        "programs": None if earlier.programs is None else sorted({*earlier.programs, *programs}),
        "voices": None if earlier.voices is None else max(earlier.voices, voices),
    }


def programs_of(pieces: Iterable[StoredPiece], base: MusicTokenizer) -> set[int]:
    """The programs of pieces; none with several vocabularies."""
    if base.is_multi_voc:
        return set()
    programs = {index: int(token.split("_")[1]) for token, index in base.vocab.items() if token.startswith("Program_")}
    ids = np.array(list(programs))
    found = {int(index) for piece in pieces for index in ids[np.isin(ids, piece.ids)]}
    return {programs[index] for index in found}


def features_of(tokenizer: MusicTokenizer) -> Features:
    """The columns of a corpus."""
    ids = List(Value("int32"))
    return Features(
        {
            "name": Value("string"),
            "input_ids": List(ids) if tokenizer.is_multi_voc else ids,
            "num_notes": Value("int32"),
            "seconds": Value("float32"),
        }
    )


def rows_of(pieces: Iterable[StoredPiece], processor: MidiProcessor, shift: int) -> Iterator[dict[str, Any]]:
    """The rows of a split. Base ids move by `shift` to make room for control tokens."""
    for piece in pieces:
        yield {
            "name": piece.name,
            "input_ids": _with_ends(piece, processor, shift),
            "num_notes": piece.num_notes,
            "seconds": piece.seconds,
        }


def _with_ends(piece: StoredPiece, processor: MidiProcessor, shift: int) -> np.ndarray:
    """The ids of a row: BOS, controls, music, EOS."""
    tokenizer = processor.midi_tokenizer
    if tokenizer.is_multi_voc:
        return np.pad(
            piece.ids, ((1, 1), (0, 0)), constant_values=((processor.bos_token_id, processor.eos_token_id), (0, 0))
        )
    music = merge_ids(tokenizer, (piece.ids + shift).tolist())
    # A value that is missing in the train split has no token: the model could not have learned it.
    tokens = sorted(tokenizer.vocab[token] for token in piece.control_tokens if token in tokenizer.vocab)
    return np.array([processor.bos_token_id, *tokens, *music, processor.eos_token_id], dtype=np.int32)


def tally(table: pa.Table) -> dict[str, float]:
    """How many `pieces`, `tokens`, `notes` and `seconds` rows hold. Tallies of parts can be added."""
    return {
        "pieces": table.num_rows,
        "tokens": pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0,
        "notes": pc.sum(table["num_notes"]).as_py() or 0,
        "seconds": pc.sum(table["seconds"]).as_py() or 0,
    }


def report_of(
    tallies: Mapping[str, Mapping[str, float]],
    counts: Mapping[str, int],
    found: Found,
    tokenizer: MusicTokenizer,
    arguments: Mapping[str, Any],
    written: Sequence[str],
) -> dict[str, Any]:
    """What `corpus.json` holds.

    Args:
        tallies (mapping): of each split, what [`tally`] returns.
        counts (mapping): what [`settle`] returned.
        found (`Found`): the files of the source.
        tokenizer (`miditok.MusicTokenizer`): of the corpus.
        arguments (mapping): everything that the result depends on.
        written (sequence of `str`): what else is in the folder.
    """
    return {
        "splits": {split: _in_hours(tallied) for split, tallied in tallies.items()},
        "split_by": {"given": counts["given"], "hash": counts["pieces"] - counts["given"]},
        **found.report(),
        **{name: counts[name] for name in ("refused", "sanitized", "duplicates")},
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": digest(tokenizer.to_dict()),
        "arguments": dict(arguments),
        "versions": versions(["miditok", "symusic"]),
        "written": [*written, "corpus.json"],
    }


def _in_hours(tallied: Mapping[str, float]) -> dict[str, float]:
    counts = {name: tallied[name] for name in ("pieces", "tokens", "notes")}
    return counts | {"hours": round(tallied["seconds"] / 3600, 3)}
