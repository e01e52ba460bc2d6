"""Publish a corpus as a data set: rows as Parquet files, the tokenizer and a card, in one commit."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi

from midimamba.corpus.load import SPLITS, load_corpus
from midimamba.errors import InputError

from .dataset_card import dataset_card

# In Arrow, the format on disk; the Parquet files are smaller.
MAX_SHARD_BYTES = 500_000_000
# The keys of `corpus.json` that a card needs.
_REPORTED = {"splits", "split_by", "sanitized", "duplicates", "vocab_size", "fingerprint", "arguments", "versions"}
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def publish_corpus(
    api: HfApi, folder: Path, repo_id: str, *, license: str | None = None, private: bool = False
) -> dict[str, str]:
    """
    Upload a corpus to the data set repository `repo_id`, in one commit.

    The rows of an earlier corpus in the repository are deleted. A card is added to the upload, unless the folder has a
    `README.md`. Paths of this machine are not published.

    Args:
        api (`HfApi`): the client of the Hub.
        folder (`Path`): written by `midimamba tokenize`, or downloaded from a data set repository.
        repo_id (`str`): `"owner/name"`, or `"name"` for the owner of the token. Created if it does not exist.
        license (`str`, *optional*): the identifier of the Hub; left out of the card by default.
        private (`bool`, *optional*, defaults to `False`): whether a repository that is created is private.

    Returns:
        `dict[str, str]`: the address of the `corpus`.

    Raises:
        InputError: if the folder is not a complete corpus.
    """
    report, dataset = _read_corpus(folder)
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    # The disk of the corpus has room for a second one; the temporary folder of the system may be small, or in memory.
    room = folder.resolve().parent
    with tempfile.TemporaryDirectory(dir=room if os.access(room, os.W_OK) else None, prefix=".publish-") as scratch:
        upload = Path(scratch)
        _collect(folder, report, dataset, upload)
        if not (upload / "README.md").exists():
            dataset_card(url.repo_id, report, upload / "quarantine.jsonl", license).save(upload / "README.md")
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=upload,
            repo_type="dataset",
            commit_message="Publish with midimamba",
            delete_patterns="data/*.parquet",
        )
    return {"corpus": str(url)}


def _read_corpus(folder: Path) -> tuple[dict[str, Any], DatasetDict]:
    """The report of a corpus, without paths of this machine, and its rows."""
    try:
        report = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        if missing := _REPORTED - set(report):
            raise LookupError(f"its corpus.json has no {min(missing)}")
        if not (folder / "quarantine.jsonl").is_file():
            raise LookupError("it has no quarantine.jsonl")
        dataset, _ = load_corpus(folder)
        if missing := set(SPLITS) - set(dataset):
            raise LookupError(f"it has no split {min(missing)}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder} is not a complete corpus: {reason}; write it again with `midimamba tokenize`"
        ) from error
    return {**report, "arguments": without_paths(report["arguments"])}, dataset


def without_paths(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a corpus, with paths cut to their last part: `/home/me/songs.zip` becomes `songs.zip`."""
    named = {name: arguments[name] for name in ("source", "tokenizer") if arguments.get(name) is not None}
    return {**arguments, **{name: _without_path(value) for name, value in named.items()}}


def _without_path(name: str) -> str:
    path = Path(name)
    if path.exists():
        return (path.resolve() if path.name in ("", "..") else path).name
    # A name that can be a repository on the Hub is one, or `chorales`. Any other is a path, maybe from another system,
    # and this class knows both kinds of slashes.
    return name if _REPOSITORY.fullmatch(name) else PureWindowsPath(name).name


def _collect(folder: Path, report: Mapping[str, Any], dataset: DatasetDict, upload: Path) -> None:
    """Fill the folder `upload` with the files for the Hub: only known names, whatever else the corpus folder has."""
    for pattern in ("README.md", "quarantine.jsonl", "tokenizer/*.json", "tokenizer/*.py"):
        for file in folder.glob(pattern):
            target = upload / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    (upload / "corpus.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for split in SPLITS:
        write_parquet(dataset[split], upload / "data", split)


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
