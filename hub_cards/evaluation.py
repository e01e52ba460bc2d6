"""The evaluation section of a card and its files, from the report of a run or of `midimamba evaluate`."""

import math
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from midimamba.errors import InputError
from midimamba.evaluation.comparison import features_from_json, figures_from_json
from midimamba.evaluation.comparison_page import EXPLANATION, LABELS, features_table, figures_table
from midimamba.evaluation.estimates import Estimate
from midimamba.evaluation.report_page import (
    MUSICAL_DISCRIMINATOR,
    check_report,
    evaluation_table,
    interpretation,
)
from midimamba.files import read_json
from midimamba.text import for_link

from .gallery import PUBLISHED_SAMPLES
from .results import Result

_WRITE_ONE = "write one with `midimamba evaluate` or `python -m midimamba.evaluation.report RUN`"
PUBLISHED_OF_RUN = ("curves.png", *PUBLISHED_SAMPLES)
# What a run measures of its generator, for the metadata.
_OF_RUN = {"held_out_nll": "held-out NLL, nats per token", "distinct_4": "distinct-4", "self_bleu_4": "self-BLEU-4"}


class Evaluation(NamedTuple):
    """
    What a report adds to a card and to a repository.

    Args:
        table (`str`): the figures, as Markdown.
        interpretation (`str`): what the figures say, and how to read them.
        pictures (`str`): pictures of the figures, as Markdown with paths of the repository.
        gallery (`str`): pictures of the samples that were compared, as Markdown with paths of the repository.
        files (`dict[str, Path]`): the files to upload, by their path in the repository.
        results (`Sequence[Result]`): figures for the metadata.
        reference (`str`, *optional*): the corpus that they were measured on, if the report says.
        split (`str`, *optional*, defaults to `"test"`): the part of it.
        of_discriminators (`Mapping`, *optional*): the `accuracy_real` and `accuracy_fake` of every discriminator that
            was measured, by its kind.
    """

    table: str
    interpretation: str
    pictures: str
    gallery: str
    files: dict[str, Path]
    results: Sequence[Result] = ()
    reference: str | None = None
    split: str = "test"
    of_discriminators: Mapping[str, dict[str, float] | None] = {}


def read_evaluation(file: Path) -> Evaluation:
    """
    Read the report of a run (`python -m midimamba.evaluation.report`) or of a comparison (`midimamba evaluate`).

    Raises:
        InputError: if it is neither.
    """
    try:
        report = read_json(file)
    except InputError as error:
        raise InputError(f"{error}, which is not a report; {_WRITE_ONE}") from error
    keys = set(report)
    try:
        if {"before", "after", "real", "settings"} <= keys:
            return _of_run(file, report)
        if {"features", "figures", "settings"} <= keys:
            return _of_comparison(file, report)
    except KeyError as error:
        raise InputError(f"{file} is a report of another version, without {error}; {_WRITE_ONE}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} is not a report, because {reason}; {_WRITE_ONE}") from error
    raise InputError(f"{file} is not a report; {_WRITE_ONE}")


def _of_run(file: Path, report: dict[str, Any]) -> Evaluation:
    check_report(report)
    run = file.parent
    found = {path.relative_to(run).as_posix(): path for pattern in PUBLISHED_OF_RUN for path in run.glob(pattern)}
    return Evaluation(
        evaluation_table(report),
        interpretation(report),
        "![Curves of both training phases](curves.png)" if "curves.png" in found else "",
        "",
        {**found, "evaluation.json": file},
        [Result(name, label, float(report["after"][name])) for name, label in _OF_RUN.items()],
        of_discriminators={
            "discriminator": report["after"],
            MUSICAL_DISCRIMINATOR: report["after"].get(MUSICAL_DISCRIMINATOR),
        },
    )


def _of_comparison(file: Path, report: dict[str, Any]) -> Evaluation:
    pictures = {path.name: path for path in sorted(file.parent.glob(f"{escape(file.stem)}-*.png"))}
    features, settings = f"{file.stem}-features.png", report["settings"]
    for name in ("samples", "reference_pieces", "bars_per_piece"):
        if not isinstance(settings[name], int):
            raise TypeError(f"settings.{name} is {type(settings[name]).__name__} and not a number")
    measured = (
        f"{settings['samples']} samples are compared with {settings['reference_pieces']} pieces of held-out music, by "
        f"the first {settings['bars_per_piece']} bars of each."
    )
    rolls = [name for name in pictures if name.startswith(f"{file.stem}-sample-")]
    figures = figures_from_json(report["figures"])
    reference, split = settings.get("reference"), settings.get("split", "test")
    return Evaluation(
        f"{figures_table(figures)}\n\n{features_table(features_from_json(report['features']))}",
        f"{measured} {EXPLANATION}",
        f"![Distributions of the features]({for_link(features)})" if features in pictures else "",
        "\n\n".join(f"![Piano roll of a sample]({for_link(name)})" for name in rolls),
        {**pictures, "evaluation.json": file},
        [
            Result(name, LABELS[name].rstrip(" ↑↓"), figure.estimate.value, _interval(figure.estimate))
            for name, figure in figures.items()
            if math.isfinite(figure.estimate.value) and not name.endswith("_p_value")
        ],
        reference if isinstance(reference, str) else None,
        split if isinstance(split, str) else "test",
    )


def _interval(estimate: Estimate) -> tuple[float, float] | None:
    return (estimate.low, estimate.high) if math.isfinite(estimate.low) and math.isfinite(estimate.high) else None
