"""What a folder says of where its weights come from: music, base model, command, hardware and time."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import metadata_load
from transformers.utils.hub import cached_file
from yaml import YAMLError

from midimamba.errors import InputError
from midimamba.files import read_json
from midimamba.text import for_markdown, printable

# `owner/name`; a folder of this machine can look the same.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Provenance(NamedTuple):
    """
    Args:
        dataset (`str`, *optional*): the data set on the Hub that the model was trained on.
        data (`str`, *optional*): the name of the corpus, wherever it is.
        base_model (`str`, *optional*): the model on the Hub that training started from.
        command (`str`): how training was started; empty if it was not recorded.
        summary (`str`): hardware, time and versions in one sentence of Markdown; empty as well.
    """

    dataset: str | None = None
    data: str | None = None
    base_model: str | None = None
    command: str = ""
    summary: str = ""


def read_provenance(folder: Path) -> Provenance:
    """
    Read `training_args.json` and `training_run.json`, as far as there are any.

    Raises:
        TypeError: if a value is of another type than the training scripts write.
    """
    options, record = (_read(folder / name) for name in ("training_args.json", "training_run.json"))
    data = options.get("data")
    return Provenance(
        dataset=on_hub(data),
        data=data if isinstance(data, str) else None,
        base_model=on_hub(options.get("model")),
        command=printable(_text(record, "command")),
        summary=_summary(record) if record else "",
    )


def read_license(name: str) -> str | None:
    """
    The licence that the card of a model states, if it has a card and that states one.

    Args:
        name (`str`): a folder, or a repository on the Hub.

    Raises:
        InputError: if the card has a header that cannot be read.
    """
    card = cached_file(name, "README.md", _raise_exceptions_for_missing_entries=False)
    if card is None:
        return None
    try:
        license = (metadata_load(card) or {}).get("license")
    except (ValueError, YAMLError) as error:
        raise InputError(
            f"{card} has a header that is not YAML ({' '.join(str(error).split())}): correct it"
        ) from error
    return license if isinstance(license, str) else None


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def on_hub(name: Any) -> str | None:
    """A name that is one of a repository, and not of a folder here."""
    return name if isinstance(name, str) and _REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name, "")
    if not isinstance(value, str):
        raise TypeError(f"training_run.json has {type(value).__name__} for {name}, not text")
    return value


def _summary(record: dict[str, Any]) -> str:
    seconds, steps, versions = record.get("seconds"), record.get("steps"), record.get("versions", {})
    if not isinstance(versions, dict) or not isinstance(seconds, int | float | None) or type(steps) is not int:
        raise TypeError("training_run.json has other values than numbers for seconds and steps, and other versions")
    time = "" if seconds is None else f" in {_duration(seconds)}"
    used = ", ".join(f"{package} {version}" for package, version in versions.items())
    done = (
        f"Trained for {steps:,} steps" if steps else "The generator was not trained; discriminators were fitted to it"
    )
    sentence = f"{done}{time} on {for_markdown(_text(record, 'hardware'))}"
    return f"{sentence}, with {for_markdown(used)}." if used else f"{sentence}."


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
