"""How alike the bars of a gap are, in a piece as it was written and with other music in the gap."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from symusic.core import ScoreTick

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import DrawingOptions, SamplingOptions
from midimamba.evaluation.features import Piece
from midimamba.generation import generate_scores, infill_scores

LIKENESSES = ("pitch_classes", "onset_rhythm", "self_similarity")
LAGS = (2, 4, 8)  # bars from one in the gap to those that it is compared with
AROUND = 4  # bars before and after the gap that a picture shows
Cells = NDArray[np.int64]


class Gap(NamedTuple):
    """The bars from `first` up to `last`, which is not one of them, counted from 0."""

    first: int
    last: int


def cells_of(score: ScoreTick) -> Cells:
    """Bar, position in sixteenths and pitch class of every pitched note, `(notes, 3)`."""
    piece = Piece(score)
    return np.stack([piece.pitched_grid.bars, piece.pitched_grid.positions, piece.pitched.pitches % 12], axis=1)


def within(cells: Cells, gap: Gap) -> Cells:
    """The notes that begin in a gap."""
    return cells[(cells[:, 0] >= gap.first) & (cells[:, 0] < gap.last)]


def copied(cells: Cells, gap: Gap) -> Cells:
    """What is in a gap if the bar before it is copied into each of its bars."""
    bar = within(cells, Gap(gap.first - 1, gap.first))
    return np.concatenate([bar + np.array([1 + later, 0, 0]) for later in range(gap.last - gap.first)])


def likeness(real: Cells, other: Cells, gap: Gap) -> dict[str, float]:
    """
    How alike a piece and other music for its gap are, 1 if they are the same.

    Args:
        real (`array` of shape `(notes, 3)`): the whole piece, by [`cells_of`].
        other (`array` of shape `(notes, 3)`): what is in the gap instead.
        gap (`Gap`): the piece has notes in it.

    Returns:
        `dict[str, float]`: `pitch_classes` and `onset_rhythm`, the shared area of the histograms of pitch classes, and
        of bars and positions in them. `self_similarity`: 1 minus the mean absolute difference between how similar a
        bar in the gap is to bars outside it, [`LAGS`] earlier and later, and how similar the true bar is to those.
    """
    true = within(real, gap)
    if not len(other):
        return dict.fromkeys(LIKENESSES, 0.0)
    similar, wanted = (_similarities(real, cells, gap) for cells in (other, true))
    return {
        "pitch_classes": _shared_area(true[:, 2], other[:, 2]),
        "onset_rhythm": _shared_area(true[:, 0] * 1000 + true[:, 1], other[:, 0] * 1000 + other[:, 1]),
        "self_similarity": 1 - float(np.abs(similar - wanted).mean()) if len(wanted) else float("nan"),
    }


def _shared_area(a: Cells, b: Cells) -> float:
    """Of two histograms."""
    values, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    shares = [np.bincount(part, minlength=len(values)) / len(part) for part in np.split(codes, [len(a)])]
    return float(np.minimum(*shares).sum())


def _similarities(real: Cells, inside: Cells, gap: Gap) -> NDArray[np.float64]:
    """The cosine of every bar in the gap and every bar of the piece outside it, a lag earlier or later."""
    others = [(bar, bar + sign * lag) for bar in range(*gap) for lag in LAGS for sign in (-1, 1)]
    bars = real[:, 0].max() + 1
    outside = [(bar, other) for bar, other in others if 0 <= other < bars and not gap.first <= other < gap.last]
    return np.array([_cosine(_vector(inside, bar), _vector(real, other)) for bar, other in outside])


def _vector(cells: Cells, bar: int) -> dict[tuple[int, int], int]:
    """The notes of a bar by position and pitch class."""
    counts: dict[tuple[int, int], int] = {}
    for _, position, pitch in cells[cells[:, 0] == bar].tolist():
        counts[position, pitch] = counts.get((position, pitch), 0) + 1
    return counts


def _cosine(a: dict[tuple[int, int], int], b: dict[tuple[int, int], int]) -> float:
    """Of two bars; silent bars are like each other and like nothing else."""
    if not a or not b:
        return float(not a and not b)
    product = sum(count * b.get(cell, 0) for cell, count in a.items())
    return float(product / np.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values())))


class Comparison(NamedTuple):
    """
    What a generator puts into the gap of a piece.

    Args:
        likeness (`dict[str, dict[str, float]]`): of `filled`, `continued` and `copied`, means over the draws.
        rolls (`dict[str, list]`): of `real`, `filled` and `continued`, the notes of the first draw around the gap:
            onset and duration in quarter notes, pitch.
    """

    likeness: dict[str, dict[str, float]]
    rolls: dict[str, list[list[float]]]


def compare(
    model: MidiMambaForCausalLM, processor: MidiProcessor, piece: ScoreTick, gap: Gap, drawing: DrawingOptions
) -> Comparison | None:
    """Fill a gap, continue what comes before it for as many bars, and copy the bar before it into each of its bars;
    `None` where the gap or the bar before it is silent."""
    real = cells_of(piece)
    copy = copied(real, gap)
    if not len(within(real, gap)) or not len(copy):
        return None
    start = round(Piece(piece).starts[gap.first] * piece.ticks_per_quarter)
    sampling = SamplingOptions(
        num=drawing.num,
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        seed=drawing.seed,
        bars=gap.last - gap.first,
    )
    scores = {
        "filled": infill_scores(model, processor, piece, (gap.first + 1, gap.last), options=drawing),
        "continued": generate_scores(model, processor, sampling, prompt=piece.clip(0, start, clip_end=True)),
    }
    alike = {
        name: _mean([likeness(real, within(cells_of(s), gap), gap) for s in some]) for name, some in scores.items()
    }
    firsts = {"real": piece, **{name: some[0] for name, some in scores.items()}}
    return Comparison(
        {**alike, "copied": likeness(real, copy, gap)},
        {name: _around(score, gap) for name, score in firsts.items()},
    )


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in LIKENESSES}


def _around(score: ScoreTick, gap: Gap) -> list[list[float]]:
    piece = Piece(score)
    bars = piece.pitched_grid.bars
    rows = (bars >= gap.first - AROUND) & (bars < gap.last + AROUND)
    notes = piece.pitched
    return np.stack([notes.onsets[rows], notes.durations[rows], notes.pitches[rows]], axis=1).round(3).tolist()


def draw(examples: Sequence[dict[str, Any]], axes: Any) -> None:
    """Piano rolls of pieces, one in a row.

    Args:
        examples (`Sequence[dict]`): `rolls` of a [`Comparison`], and the `start` and `end` of the gap in quarters.
        axes (array of matplotlib axes): rows of three.
    """
    for row, example in zip(axes, examples, strict=True):
        for panel, name in zip(row, ("real", "filled", "continued"), strict=True):
            onsets, durations, pitches = np.array(example["rolls"][name]).T
            inside = (onsets >= example["start"]) & (onsets < example["end"])
            colours = np.where(inside & (name != "real"), "C1", "C0")
            panel.barh(pitches, durations * 0.92, left=onsets, height=0.82, color=colours)
            panel.axvspan(example["start"], example["end"], color="0.93", zorder=0)
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0, labelsize=7)
    for panel, name in zip(axes[0], ("real", "filled", "continued"), strict=True):
        panel.set_title(name)
