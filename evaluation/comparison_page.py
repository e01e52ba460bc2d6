"""The page of a comparison: tables with intervals and floors, overlaid distributions, piano rolls."""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from midimamba.errors import InputError
from midimamba.evaluation.comparison import Comparison, FeatureFigures, Reference, to_json
from midimamba.evaluation.comparison_halves import Figure
from midimamba.evaluation.estimates import Estimate
from midimamba.evaluation.features import LENGTHS, NUMBERS, Vector
from midimamba.evaluation.rendering import (
    FAINT,
    INK,
    PITCH_CLASSES,
    draw_piano_roll,
    import_demo,
    new_figure,
    quiet,
    save_figure,
)
from midimamba.evaluation.report_page import bullet_list
from midimamba.files import flush_folder, locked
from midimamba.text import for_json, for_link, for_markdown

ROLLS = 2
REAL, SAMPLES = "#8a93a0", "#1f77b4"

_LENGTH_NAMES = [str(Fraction(length).limit_denominator(12)) for length in LENGTHS]

LABELS = {
    "pitch_class_entropy": "pitch-class entropy, bits",
    "scale_consistency": "scale consistency",
    "polyphony": "polyphony, notes",
    "notes_per_second": "notes per second",
    "notes_per_bar": "notes per bar",
    "groove_consistency": "groove consistency",
    "empty_beat_rate": "empty beats",
    "bar_self_similarity_4": "self-similarity, 4 bars apart",
    "bar_self_similarity_8": "self-similarity, 8 bars apart",
    "bar_self_similarity_16": "self-similarity, 16 bars apart",
    "key_stability": "key stability",
    "meter_stability": "meter stability",
    "pitch_class_histogram": "pitch classes",
    "duration_histogram": "note lengths, quarters",
    "onset_interval_histogram": "onset intervals, quarters",
    "held_out_nll_per_token": "held-out NLL, nats per token ↓",
    "held_out_nll_per_note": "held-out NLL, nats per note ↓",
    "held_out_nll_per_second": "held-out NLL, nats per second ↓",
    "usable_samples": "samples that contain music ↑",
    "empty_samples": "samples without a note ↓",
    "free_samples_usable": "samples drawn without the grammar that contain music ↑",
    "grammar_errors": "tokens that break the grammar, sampled without it ↓",
    "syntax_errors": "MidiTok's token syntax errors, sampled without the grammar ↓",
    "frechet_distance": "Fréchet distance of the features ↓",
    "classifier_features": "fresh classifier on features, accuracy ↓",
    "classifier_features_p_value": "… p-value",
    "classifier_tokens": "fresh classifier on tokens, accuracy ↓",
    "classifier_tokens_p_value": "… p-value",
    "distinct_4": "distinct-4",
    "self_bleu_4": "self-BLEU-4",
    "copied_runs_8": "runs of 8 notes found in the training set",
    "copied_runs_12": "runs of 12 notes found in the training set",
    "copied_runs_16": "runs of 16 notes found in the training set",
    "longest_copy": "longest run found in the training set, notes",
}

EXPLANATION = (
    "Intervals are 95 % intervals over pieces. The floor is the figure of real music: one half of the reference "
    "against the other or, for copies, all of the held-out music against the training set. Figures that depend on "
    "the halves are means over several random halvings. A figure that reaches its floor is as good as it can be; one "
    "far from it, such as many more runs of notes from the training set, is a reason to look twice. ↑ and ↓ show "
    "which way is better; without an arrow, close to the floor is better."
)


def check_target(out: Path) -> None:
    """Check before any work whether a report can be written.

    Raises:
        InputError: if `out` does not end in `.json` or already exists, or if matplotlib is not installed.
    """
    if out.suffix != ".json":
        raise InputError(f"a report cannot be written to {out}; give --out a name that ends in .json")
    # A run that was killed while it put its files into place may have left the page.
    files = (out,) if _scratch_of(out).exists() else (out, out.with_suffix(".md"))
    if taken := [file for file in files if file.exists()]:
        raise InputError(f"{taken[0]} already exists; choose another --out or delete it")
    import_demo("matplotlib")


def _scratch_of(out: Path) -> Path:
    return out.with_name(f".{out.stem}.unfinished")


@contextmanager
def _empty(folder: Path) -> Iterator[Path]:
    """A new folder, whatever a killed run left there. It is removed at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_comparison(out: Path, title: str, found: Comparison, reference: Reference, settings: dict[str, Any]) -> None:
    """
    Write `<name>.json`, `<name>.md`, `<name>-features.png` and piano rolls: all of them or none.

    Args:
        out (`Path`): the JSON file.
        title (`str`): the music that was evaluated.
        found (`Comparison`): the figures.
        reference (`Reference`): the music that it was compared with.
        settings (`dict`): how the samples were made; the sizes of the comparison are added.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = settings | found.sizes
    with locked(out), _empty(_scratch_of(out)) as folder:
        draw_distributions(found.measured, folder / f"{out.stem}-features.png")
        rolls = []
        for kind, pieces in (("sample", found.pieces), ("real", reference.pieces)):
            for index, piece in enumerate(pieces[:ROLLS]):
                rolls.append(f"{out.stem}-{kind}-{index}.png")
                draw_piano_roll(piece.score, folder / rolls[-1], title=f"{kind} {index}")
        page = _page(title, found, f"{out.stem}-features.png", rolls, settings)
        (folder / f"{out.stem}.md").write_text(page, encoding="utf-8")
        report = {"features": found.features, "figures": found.figures, "settings": settings}
        (folder / out.name).write_text(for_json(to_json(report), indent=2) + "\n", encoding="utf-8")
        flush_folder(folder)
        # The report itself comes last: if it exists, so do the other files.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == out.name):
            file.replace(out.parent / file.name)


def figures_table(figures: Mapping[str, Figure]) -> str:
    """Figures as a Markdown table with the columns value, interval and floor."""
    rows = ["| | value | 95 % interval | real music |", "|---|---:|---:|---:|"]
    for name, figure in figures.items():
        rows.append(f"| {LABELS[name]} | {_triple(figure)} |")
    return "\n".join(rows)


def features_table(features: Mapping[str, FeatureFigures]) -> str:
    """Features as a Markdown table: means of samples and of real music, and how far apart they are, with floors."""
    rows = [
        "| | samples | 95 % interval | real music | 95 % interval "
        "| overlapping area ↑ | 95 % interval | floor | KL, nats ↓ | 95 % interval | floor "
        "| classifier on this feature alone ↓ | 95 % interval | floor |",
        "|---|" + 13 * "---:|",
    ]
    for name, row in features.items():
        means = " | ".join(f"{_number(mean.value)} | {_interval(mean)}" for mean in (row.samples, row.real))
        apart = " | ".join(map(_triple, (row.overlapping_area, row.kl_divergence, row.classifier)))
        rows.append(f"| {LABELS[name]} | {means} | {apart} |")
    return "\n".join(rows)


def draw_distributions(measured: Mapping[str, tuple[Vector, Vector]], path: Path) -> None:
    """
    Draw the distribution of every feature for samples over that for real music, as a PNG of 1600 × 1200 pixels.

    Args:
        measured (`Mapping[str, tuple[array, array]]`): for every feature, arrays `(pieces, bins)` of samples
            and of real music.
        path (`Path`): the PNG file, replaced atomically.

    Raises:
        InputError: if matplotlib is not installed.
    """
    figure = new_figure(width=1600, height=1200)
    panels = figure.subplots(4, 4).flatten()
    for axes, (name, (samples, real)) in zip(panels, measured.items(), strict=False):
        if name in NUMBERS:
            _draw_number(axes, samples[:, 0], real[:, 0])
        else:
            _draw_histogram(axes, name, samples, real)
        axes.set_title(LABELS[name], loc="left", color=INK, fontsize=11, fontweight="bold")
        axes.set_yticks([])
        quiet(axes)
    for axes in panels[len(measured) :]:
        axes.set_axis_off()
    handles = [import_demo("matplotlib.patches").Patch(color=colour) for colour in (REAL, SAMPLES)]
    figure.legend(handles, ["real music", "samples"], loc="lower right", frameon=False, fontsize=11, labelcolor=INK)
    save_figure(figure, path)


def _draw_number(axes: Any, samples: Vector, real: Vector) -> None:
    """Histograms of both sets, each as shares of its pieces."""
    known = [values[~np.isnan(values)] for values in (real, samples)]
    if not all(map(len, known)):
        axes.text(0.5, 0.5, "not defined", ha="center", color=INK, transform=axes.transAxes)
        return
    low, high = np.min(np.concatenate(known)), np.max(np.concatenate(known))
    # If all pieces agree up to rounding, there is no range to divide.
    bins = np.linspace(low, high, 21) if high - low > 1e-6 else np.linspace(low - 0.5, high + 0.5, 21)
    for values, colour, style in ((known[0], REAL, "stepfilled"), (known[1], SAMPLES, "step")):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=weights, histtype=style, color=colour, alpha=0.9, linewidth=1.8)
        axes.axvline(values.mean(), color=colour, linestyle=":")


def _draw_histogram(axes: Any, name: str, samples: Vector, real: Vector) -> None:
    """The mean share of each bin, side by side for both sets."""
    places = np.arange(samples.shape[1])
    for shift, values, colour in ((-0.2, real, REAL), (0.2, samples, SAMPLES)):
        means = np.nansum(values, axis=0) / max(1, (~np.isnan(values[:, 0])).sum())
        axes.bar(places + shift, means, width=0.4, color=colour)
    names = PITCH_CLASSES if name == "pitch_class_histogram" else _LENGTH_NAMES
    axes.set_xticks(places, names)
    axes.tick_params(axis="x", labelsize=8, rotation=0 if names is PITCH_CLASSES else 60)
    axes.grid(axis="y", color=FAINT)


def _page(title: str, found: Comparison, plot: str, rolls: list[str], settings: dict[str, Any]) -> str:
    sections = [
        f"# {for_markdown(title)}",
        figures_table(found.figures),
        EXPLANATION,
        "## Musical features",
        features_table(found.features),
        f"![Distributions of the features]({for_link(plot)})",
        "## Piano rolls",
        *(f"![{for_markdown(Path(roll).stem)}]({for_link(roll)})" for roll in rolls),
        "## How it was measured",
        bullet_list(settings),
    ]
    return "\n\n".join(sections) + "\n"


def _triple(figure: Figure) -> str:
    return f"{_number(figure.estimate.value)} | {_interval(figure.estimate)} | {_number(figure.floor)}"


def _interval(estimate: Estimate) -> str:
    return "–" if math.isnan(estimate.low) else f"{_number(estimate.low)} … {_number(estimate.high)}"  # noqa: RUF001


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"  # noqa: RUF001
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
