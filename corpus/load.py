"""A tokenized corpus, read from a folder or from the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from midimamba.corpus.data_sets import is_data_set
from midimamba.errors import InputError, check_hub, reaching_hub
from midimamba.files import read_json
from midimamba.tokenization.processor import MidiProcessor

SPLITS = ("train", "validation", "test")
# What `datasets` raises for files of a data set that are missing, cut off, or of the wrong types.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, DatasetsError)


def load_corpus(name: str | Path) -> tuple[DatasetDict, MidiProcessor]:
    """Read what [`~midimamba.corpus.build.tokenize_corpus`] wrote, from a folder or a data set repository on the Hub.

    Raises:
        InputError: if `name` isn't such a corpus, or a part of it is damaged.
    """
    folder = Path(name)
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
