"""A tokenized corpus, read from a folder or from the Hub."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetDict, config, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from midimamba.corpus.addresses import Folder, is_address
from midimamba.corpus.data_sets import is_data_set
from midimamba.errors import InputError, check_hub, reaching_hub
from midimamba.files import locked, read_json, whole_folder
from midimamba.tokenization.processor import MidiProcessor

SPLITS = ("train", "validation", "test")
# What `datasets` raises for files of a data set that are missing, cut off, or of the wrong types.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, DatasetsError)


def load_corpus(name: str | Path) -> tuple[DatasetDict, MidiProcessor]:
    """Read what [`~midimamba.corpus.build.tokenize_corpus`] wrote, from a folder or a data set repository on the Hub.

    `name` may also be an address on another file system, such as `s3://bucket/corpus`. As from the Hub, a copy is kept
    on this machine.

    Raises:
        InputError: if `name` isn't such a corpus, or a part of it is damaged.
    """
    folder = _copy_of(str(name)) if is_address(str(name)) else Path(name)
    if not folder.exists() and is_data_set(str(name)):
        folder = _download(str(name))
    if not (folder / "corpus.json").is_file():
        raise InputError(f"{name} is not a tokenized corpus: make one with `midimamba tokenize SOURCE --out {name}`")
    report = read_json(folder / "corpus.json")
    processor = MidiProcessor.from_pretrained(folder / "tokenizer")
    try:
        splits = _read_splits(folder, report)
        if missing := [split for split in SPLITS if "input_ids" not in splits[split].column_names]:
            raise InputError(f"{name} is not a tokenized corpus: its {missing[0]} split has no input_ids")
    except InputError:
        raise
    except _DAMAGED as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise InputError(f"{name} is damaged and cannot be read ({reason}): make or download it again") from error
    return splits, processor


def _read_splits(folder: Path, report: Mapping[str, Any]) -> DatasetDict:
    if (folder / "dataset_dict.json").is_file():
        dataset = DatasetDict.load_from_disk(str(folder))
        return DatasetDict({split: dataset[split] for split in SPLITS})
    # `datasets` 5.2 cannot load a split without rows.
    held = [split for split in SPLITS if report["splits"][split]["pieces"]]
    dataset = load_dataset(
        "parquet", data_files={split: str(folder / "data" / f"{split}-*.parquet") for split in held}
    )
    return DatasetDict({s: dataset[s] if s in held else dataset["train"].select([]) for s in SPLITS})


def _download(name: str) -> Path:
    purpose = f"no corpus can be loaded from {name!r}"
    try:
        check_hub(name, "dataset")
        with reaching_hub(purpose):
            return Path(snapshot_download(name, repo_type="dataset"))
    except (OSError, HFValidationError) as error:
        raise InputError(f"{purpose}: {str(error).splitlines()[0]}") from error


def _copy_of(address: str) -> Path:
    """A corpus at an address, on this machine. A copy that was made before is used as long as its report is the same.

    Raises:
        InputError: if there is no corpus, or it cannot be read.
    """
    there = Folder(address)
    try:
        if not there.has("corpus.json"):
            raise InputError(f"{address} is not a tokenized corpus: it has no corpus.json")
        version = hashlib.sha256(f"{address}\n{there.read('corpus.json')}".encode()).hexdigest()[:16]
        copy = Path(config.HF_DATASETS_CACHE, "midimamba", version)
        with locked(copy):
            if not copy.exists():
                with whole_folder(copy) as folder:
                    for file in there.names():
                        there.fetch(file, folder / file)
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{address} cannot be read ({reason}): check the address and your access") from error
    return copy
