"""A tokenized corpus, read from a folder or from the Hub."""

from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from midimamba.corpus.data_sets import is_data_set
from midimamba.errors import InputError
from midimamba.files import read_json
from midimamba.tokenization.processor import MidiProcessor

SPLITS = ("train", "validation", "test")


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
    processor = MidiProcessor.from_pretrained(folder / "tokenizer")
    try:
        dataset = _read_rows(folder)
    except (OSError, ValueError, TypeError, LookupError, DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} is not whole ({reason}): delete it and make it again") from error
    return dataset, processor


def _read_rows(folder: Path) -> DatasetDict:
    if (folder / "dataset_dict.json").is_file():
        dataset = DatasetDict.load_from_disk(str(folder))
        return DatasetDict({split: dataset[split] for split in SPLITS})
    counts = read_json(folder / "corpus.json")["splits"]
    # `datasets` 5.2 cannot load a split without rows.
    filled = {split: str(folder / "data" / f"{split}-*.parquet") for split in SPLITS if counts[split]["pieces"]}
    dataset = load_dataset("parquet", data_files=filled)
    return DatasetDict({s: dataset[s] if s in filled else dataset["train"].select([]) for s in SPLITS})


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (OSError, ValueError, HFValidationError) as error:
        raise InputError(f"no corpus can be loaded from {name!r}: {str(error).splitlines()[0]}") from error
