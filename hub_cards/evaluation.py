"""What a report puts into a card, and which files it brings along: of a run, or of `midimamba evaluate`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from midimamba.errors import InputError
from midimamba.evaluation.comparison import features_from_json, figures_from_json
from midimamba.evaluation.comparison_page import EXPLANATION, features_table, figures_table
from midimamba.evaluation.report import evaluation_table, reading, sample_gallery

PUBLISHED_OF_RUN = ("curves.png", "samples/*.png", "samples/*.wav", "samples/*.mid")


class Evaluation(NamedTuple):
    """
    Args:
        table (`str`): the figures, as Markdown.
        reading (`str`): how to read them.
        pictures (`str`): of the figures, as Markdown, with paths of the repository.
        gallery (`str`): the samples, likewise.
        files (`dict[str, Path]`): what goes along, by its path in the repository.
        of_discriminator (`dict`, *optional*): its `accuracy_real` and `accuracy_fake`.
    """

    table: str
    reading: str
    pictures: str
    gallery: str
    files: dict[str, Path]
    of_discriminator: dict[str, float] | None = None


def read_evaluation(file: Path) -> Evaluation:
    """
    Read the report of a run (`python -m midimamba.evaluation.report`), or of a comparison (`midimamba evaluate`).

    Raises:
        InputError: if it is neither.
    """
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no report: {error}") from error
    keys = set(report) if isinstance(report, dict) else set()
    if {"before", "after", "real", "settings"} <= keys:
        return _of_run(file, report)
    if {"features", "figures", "settings"} <= keys:
        return _of_comparison(file, report)
    raise InputError(
        f"{file} is no report; write one with `midimamba evaluate`, or `python -m midimamba.evaluation.report RUN`"
    )


def _of_run(file: Path, report: dict[str, Any]) -> Evaluation:
    run = file.parent
    found = {path.relative_to(run).as_posix(): path for pattern in PUBLISHED_OF_RUN for path in run.glob(pattern)}
    return Evaluation(
        evaluation_table(report),
        reading(report),
        "![Curves of both training phases](curves.png)" if "curves.png" in found else "",
        sample_gallery(run),
        {**found, "evaluation.json": file},
        report["after"],
    )


def _of_comparison(file: Path, report: dict[str, Any]) -> Evaluation:
    pictures = {path.name: path for path in sorted(file.parent.glob(f"{file.stem}-*.png"))}
    features, settings = f"{file.stem}-features.png", report["settings"]
    measured = (
        f"{settings['samples']} samples beside {settings['reference_pieces']} pieces of held-out music, of which the "
        f"first {settings['bars_a_piece']} bars are compared."
    )
    rolls = [name for name in pictures if name.startswith(f"{file.stem}-sample-")]
    return Evaluation(
        f"{figures_table(figures_from_json(report['figures']))}\n\n"
        f"{features_table(features_from_json(report['features']))}",
        f"{measured} {EXPLANATION}",
        f"![Distributions of the features]({features})" if features in pictures else "",
        "\n\n".join(f"![Piano roll of a sample]({name})" for name in rolls),
        {**pictures, "evaluation.json": file},
    )
