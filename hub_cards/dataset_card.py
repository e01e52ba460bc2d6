"""The card of a corpus that is published as a data set."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from midimamba.corpus.load import SPLITS
from midimamba.errors import InputError
from midimamba.evaluation.report_page import bullet_list
from midimamba.text import as_code, for_markdown, shortened

TAGS = ["midi", "music", "midimamba", "symbolic-music"]
# How the tokenizer of a corpus was made. These arguments have no effect if a tokenizer was given.
_OF_NEW_TOKENIZERS = ("tokenization", "tokenizer_options", "subword_model", "training_tokens")
_MAX_REASONS = 10
_MAX_REASON_LENGTH = 120
_NUMBER = re.compile(r"\b(?:0x[0-9a-f]+|\d[\d,]*)\b")


def dataset_card(repo_id: str, report: Mapping[str, Any], quarantine: Path, license: str | None = None) -> DatasetCard:
    """
    Describe a corpus, with metadata that tells the Hub and `datasets` where its splits are.

    Args:
        repo_id (`str`): `"owner/name"`.
        report (`dict`): the content of its `corpus.json`.
        quarantine (`Path`): its `quarantine.jsonl`.
        license (`str`, *optional*): the identifier of the Hub; without one the card says that none was stated.

    Returns:
        `DatasetCard`: the card.

    Raises:
        InputError: if a line of the quarantine is not what `midimamba tokenize` writes.
    """
    pieces = sum(counts["pieces"] for counts in report["splits"].values())
    # `datasets` 5.2 refuses all splits if one of them has no rows.
    data_files = [
        {"split": split, "path": f"data/{split}-*.parquet"} for split in SPLITS if report["splits"][split]["pieces"]
    ]
    data = DatasetCardData(
        license=license,
        tags=TAGS,
        size_categories=size_category(pieces),
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    stages, reasons = _count_refusals(quarantine)
    return DatasetCard.from_template(
        data,
        template_str=(files("midimamba.hub_cards") / "dataset_card.md").read_text(encoding="utf-8"),
        repo_id=repo_id,
        pieces=pieces,
        splits=_split_table(report["splits"]),
        settings=bullet_list(_settings(report)),
        splitting=_splitting(report),
        left_out=_left_out(report, stages),
        reasons=_reason_table(reasons),
    )


def size_category(rows: int) -> str:
    """The name that the Hub has for the size of a data set: `"n<1K"` for 823 rows, `"1K<n<10K"` for 1,029 rows."""
    bounds = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    # Every bound is ten times the one before.
    place = len(str(rows // 1000)) if rows >= 1000 else 0
    if place == 0:
        return f"n<{bounds[0]}"
    return f"{bounds[place - 1]}<n<{bounds[place]}" if place < len(bounds) else f"n>{bounds[-1]}"


def _split_table(splits: Mapping[str, Mapping[str, float]]) -> str:
    rows = ["| split | pieces | tokens | notes | hours |", "|---|---:|---:|---:|---:|"]
    for split in SPLITS:
        counts = splits[split]
        rows.append(
            f"| {split} | {counts['pieces']:,} | {counts['tokens']:,} | {counts['notes']:,} | {counts['hours']:,.1f} |"
        )
    return "\n".join(rows)


def _settings(report: Mapping[str, Any]) -> dict[str, str]:
    """What determined the rows: the arguments that had an effect, the tokenizer and the versions."""
    arguments = {name: value for name, value in report["arguments"].items() if value not in (None, [], {})}
    if "tokenizer" in arguments:
        arguments = {name: value for name, value in arguments.items() if name not in _OF_NEW_TOKENIZERS}
    elif "vocab_size" not in arguments:
        arguments = {**arguments, "subword_model": "none"}
        arguments.pop("training_tokens", None)
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    settings = arguments | {
        "vocab_size": _sizes(report["vocab_size"]),
        "fingerprint": f"{report['fingerprint']} (of the tokenizer)",
        "versions": versions,
    }
    settings.pop("files", None)
    return {name: _plain(value) for name, value in settings.items()}


def _sizes(sizes: int | list[int]) -> str:
    """A tokenizer of several vocabularies has a size for each."""
    return ", ".join(f"{size:,}" for size in ([sizes] if isinstance(sizes, int) else sizes))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _splitting(report: Mapping[str, Any]) -> str:
    given, hashed = report["split_by"]["given"], report["split_by"]["hash"]
    parts = [
        f"The source assigns {given:,} of the pieces to splits." * bool(given),
        f"The splits of {hashed:,} pieces were chosen by a hash of their names and the seed." * bool(hashed),
    ]
    if report["arguments"]["vocab_size"] is not None and report["arguments"]["tokenizer"] is None:
        parts.append("The subword model was trained on the train split alone.")
    return " ".join(filter(None, parts))


def check_corpus_report(report: Mapping[str, Any]) -> None:
    """
    Check that a `corpus.json` has what a card needs.

    Raises:
        LookupError: if something is missing; the message says what.
        TypeError: if something is of another type.
    """
    for name in ("splits", "split_by", "arguments", "versions"):
        _need(report, name, dict)
    for name in ("sanitized", "duplicates"):
        _need(report, name, int)
    _need(report, "vocab_size", int, list)
    _need(report, "fingerprint", str)
    for name in ("given", "hash"):
        _need(report["split_by"], name, int)
    for name in ("vocab_size", "tokenizer", "training_tokens"):
        _need(report["arguments"], name, int, str, type(None))
    for split in SPLITS:
        _need(report["splits"], split, dict)
        for name in ("pieces", "tokens", "notes"):
            _need(report["splits"][split], name, int)
        _need(report["splits"][split], "hours", float, int)


def _need(content: Mapping[str, Any], name: str, *kinds: type) -> None:
    if name not in content:
        raise LookupError(f"its corpus.json has no {name}")
    if not isinstance(content[name], kinds) or isinstance(content[name], bool):
        raise TypeError(f"its corpus.json has {type(content[name]).__name__} for {name}")


def _count_refusals(quarantine: Path) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """The number of files refused at each stage, and at each stage for each reason, with its numbers replaced."""
    stages, reasons = Counter[str](), Counter[tuple[str, str]]()
    for stage, reason in _read_refusals(quarantine):
        stages[stage] += 1
        reasons[stage, _NUMBER.sub("N", reason)] += 1
    return stages, reasons


def _read_refusals(quarantine: Path) -> Iterator[tuple[str, str]]:
    """Stage and reason of every line."""
    with quarantine.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{quarantine}, line {number} is not JSON ({error}): tokenize again") from error
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("stage", "reason")):
                raise InputError(f"{quarantine}, line {number} has no stage and reason as text: tokenize again")
            yield row["stage"], row["reason"]


def _left_out(report: Mapping[str, Any], stages: Counter[str]) -> str:
    counts = ", ".join(f"{count:,} at the stage {as_code(stage)}" for stage, count in stages.most_common())
    return " ".join(
        [
            f"{stages.total():,} files were refused: {counts}." if stages else "No file was refused.",
            f"{report['duplicates']:,} files have the same notes as another file and were dropped.",
            f"{report['sanitized']:,} files could be read only after invalid bytes were clamped, and were kept.",
        ]
    )


def _reason_table(reasons: Counter[tuple[str, str]]) -> str:
    """The most frequent reasons as a Markdown table; nothing if no file was refused."""
    if not reasons:
        return ""
    rows = ["| files | stage | reason |", "|---:|---|---|"]
    for (stage, reason), count in reasons.most_common(_MAX_REASONS):
        text = for_markdown(shortened(reason, _MAX_REASON_LENGTH))
        rows.append(f"| {count:,} | {for_markdown(shortened(stage, _MAX_REASON_LENGTH))} | {text} |")
    others = reasons.total() - sum(count for _, count in reasons.most_common(_MAX_REASONS))
    return "\n".join([*rows, f"\nOther reasons account for {others:,} refused files."] if others else rows)
