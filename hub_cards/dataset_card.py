"""The card of a corpus that is published as a data set."""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from midimamba.corpus.load import SPLITS
from midimamba.evaluation.report_page import bullet_list

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
    with quarantine.open(encoding="utf-8") as lines:
        stages, reasons = _count_refusals(json.loads(line) for line in lines)
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
        del arguments["training_tokens"]
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    settings = arguments | {
        "vocab_size": f"{report['vocab_size']:,}",
        "fingerprint": f"{report['fingerprint']} (of the tokenizer)",
        "versions": versions,
    }
    settings.pop("files", None)
    return {name: _plain(value) for name, value in settings.items()}


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


def _count_refusals(rows: Iterable[Mapping[str, str]]) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """The number of files refused at each stage, and at each stage for each reason, with its numbers replaced."""
    stages, reasons = Counter[str](), Counter[tuple[str, str]]()
    for row in rows:
        stages[row["stage"]] += 1
        reasons[row["stage"], _NUMBER.sub("N", row["reason"])] += 1
    return stages, reasons


def _left_out(report: Mapping[str, Any], stages: Counter[str]) -> str:
    counts = ", ".join(f"{count:,} at the stage `{stage}`" for stage, count in stages.most_common())
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
        text = textwrap.shorten(reason, _MAX_REASON_LENGTH, placeholder=" …").replace("|", "\\|")
        rows.append(f"| {count:,} | {stage} | {text} |")
    others = reasons.total() - sum(count for _, count in reasons.most_common(_MAX_REASONS))
    return "\n".join([*rows, f"\nOther reasons account for {others:,} refused files."] if others else rows)
