"""Publish a corpus as a data set: rows as Parquet files, the tokenizer and a card, in one commit."""

import errno
import math
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from datasets import Dataset, DatasetDict

from midimamba.corpus.load import SPLITS, load_corpus
from midimamba.errors import InputError
from midimamba.files import read_json
from midimamba.text import for_json

from .dataset_card import check_corpus_report, dataset_card
from .upload import copy_file, refuse_links

# In Arrow, the format on disk; the Parquet files are smaller.
MAX_SHARD_BYTES = 500_000_000
_COPIED = ("README.md", "quarantine.jsonl", "tokenizer/*.json", "tokenizer/*.py")
# What is read: files that are copied, the report and the rows, which are written again without paths of this machine.
KNOWN_OF_CORPUS = (
    *_COPIED,
    *("corpus.json", "dataset_dict.json", "data/*.parquet"),
    *(f"{split}/{name}" for split in SPLITS for name in ("*.arrow", "dataset_info.json", "state.json")),
)
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def collect_corpus(folder: Path, target: Path) -> None:
    """
    Fill `target` with what is uploaded of a corpus, and check it. Paths of this machine are not published.

    Args:
        folder (`Path`): written by `midimamba tokenize`, or downloaded from a data set repository.
        target (`Path`): the folder to make.

    Raises:
        InputError: if the folder is not a complete corpus, or a file in it is a link.
    """
    for pattern in KNOWN_OF_CORPUS:
        for file in folder.glob(pattern):
            refuse_links(folder, file)
    report, dataset = _read_corpus(folder)
    target.mkdir()
    for pattern in _COPIED:
        for file in sorted(folder.glob(pattern)):
            copy_file(folder, file, target / file.relative_to(folder), may_be_empty=file.name == "quarantine.jsonl")
    (target / "corpus.json").write_text(for_json(report, indent=2) + "\n", encoding="utf-8")
    for split in SPLITS:
        write_parquet(dataset[split], target / "data", split)


def add_corpus_card(target: Path, repo_id: str, license: str | None) -> None:
    """
    Write a card to `target`, unless the owner has written one.

    Args:
        target (`Path`): filled by [`collect_corpus`].
        repo_id (`str`): `"owner/name"`.
        license (`str`, *optional*): the identifier of the Hub.
    """
    if not (target / "README.md").exists():
        report = read_json(target / "corpus.json")
        dataset_card(repo_id, report, target / "quarantine.jsonl", license).save(target / "README.md")


def _read_corpus(folder: Path) -> tuple[dict[str, Any], DatasetDict]:
    """The report of a corpus, without paths of this machine, and its rows."""
    try:
        report = read_json(folder / "corpus.json")
        check_corpus_report(report)
        if not (folder / "quarantine.jsonl").is_file():
            raise LookupError("it has no quarantine.jsonl")
        dataset, _ = load_corpus(folder)
        if missing := set(SPLITS) - set(dataset):
            raise LookupError(f"it has no split {min(missing)}")
        for split in SPLITS:
            if len(dataset[split]) != report["splits"][split]["pieces"]:
                raise LookupError(f"its corpus.json counts other pieces in the split {split} than there are")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder} is not a complete corpus: {reason}; write it again with `midimamba tokenize`"
        ) from error
    return {**report, "arguments": without_paths(report["arguments"])}, dataset


def without_paths(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a corpus, with paths cut to their last part: `/home/me/songs.zip` becomes `songs.zip`."""
    named = {name: arguments[name] for name in ("source", "tokenizer") if isinstance(arguments.get(name), str)}
    return {**arguments, **{name: _without_path(value) for name, value in named.items()}}


def _without_path(name: str) -> str:
    path = Path(name)
    if path.exists():
        return (path.resolve() if path.name in ("", "..") else path).name
    # A name that can be a repository on the Hub is one, or `chorales`. Any other is a path, maybe from another system,
    # and this class knows both kinds of slashes.
    return name if _REPOSITORY.fullmatch(name) else PureWindowsPath(name).name


def write_parquet(dataset: Dataset, folder: Path, split: str) -> None:
    """
    Write `{split}-{index}-of-{count}.parquet`, in enough files to keep each below [`MAX_SHARD_BYTES`] of Arrow.

    The rows are never all in memory at once. A split without rows becomes one file with the columns only.

    Args:
        dataset (`Dataset`): the rows.
        folder (`Path`): the folder to write to.
        split (`str`): the first part of the file names.
    """
    folder.mkdir(exist_ok=True)
    count = max(1, min(len(dataset), math.ceil(dataset.data.nbytes / MAX_SHARD_BYTES)))
    for index in range(count):
        shard = dataset.shard(count, index, contiguous=True)
        shard.to_parquet(folder / f"{split}-{index:05d}-of-{count:05d}.parquet")
