"""Compare samples with one half of the reference, and the other half with it: the second comparison is the floor.

Both halves and the samples have the same size, because overlaps, Fréchet distances and classifiers depend on it. Which
pieces are compared is a matter of chance, which decides much if a set has only a dozen pieces. So the reference is
halved several times, with other samples each time, and figures are means over the halvings. Intervals are the mean
intervals of a single halving, which are wider.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple, Self

import numpy as np
import torch
from tqdm.auto import tqdm

from midimamba.evaluation.distances import compare_sets
from midimamba.evaluation.estimates import UNDEFINED, Estimate, jackknife
from midimamba.evaluation.features import Vector
from midimamba.evaluation.frechet import embed, frechet_distance
from midimamba.evaluation.metrics import distinct_n, self_bleu
from midimamba.evaluation.two_sample import FOLDS, Indices, TwoSampleTest, feature_test, token_test

HALVINGS = 5


@dataclass(frozen=True)
class Figure:
    """
    One line of a report.

    Args:
        estimate (`Estimate`): of the samples, or of the model.
        floor (`float`, *optional*, defaults to NaN): the same figure of real music; NaN if it has no meaning there.
    """

    estimate: Estimate
    floor: float = math.nan


class Music(NamedTuple):
    """
    The features and the tokens of some pieces.

    Args:
        features (`Mapping[str, array]`): as [`~midimamba.evaluation.features.measure`] returns them.
        ids (`Sequence[list[int]]`): the tokens of every piece.
    """

    features: Mapping[str, Vector]
    ids: Sequence[list[int]]

    def take(self, rows: Indices) -> Self:
        """Some of the pieces."""
        features = {name: values[rows] for name, values in self.features.items()}
        return self._replace(features=features, ids=[self.ids[row] for row in rows])


def compare_halves(
    samples: Music, reference: Music, vocab_size: int, length: int, seed: int = 0
) -> tuple[dict[str, dict[str, Figure]], dict[str, Figure]]:
    """
    Compare samples with halves of the reference.

    Args:
        samples, reference (`Music`): at least 5 samples and at least 10 pieces of real music.
        vocab_size (`int`): number of token ids.
        length (`int`): tokens per sequence, for the figures that compare sequences of equal length.
        seed (`int`, *optional*, defaults to 0): for halves, intervals and classifiers.

    Returns:
        `tuple`: for every feature by name, the figures `overlapping_area`, `kl_divergence` and `classifier`; and the
        figures of whole pieces by name.
    """
    size = min(len(samples.ids), len(reference.ids) // 2)
    random = np.random.default_rng(seed)
    features, figures = [], []
    for _ in tqdm(range(HALVINGS), desc="halvings", leave=False, disable=None):
        ours = samples.take(random.permutation(len(samples.ids))[:size])
        halves = random.permutation(len(reference.ids))[: 2 * size].reshape(2, size)
        base, other = (reference.take(half) for half in halves)
        figures.append(
            _piece_figures(ours, base, other, seed) | _token_figures(ours, base, other, vocab_size, length, seed)
        )
        features.append(
            {
                name: _feature_figures(name, values, base.features[name], other.features[name], seed)
                for name, values in ours.features.items()
            }
        )
    return {name: _means([each[name] for each in features]) for name in features[0]}, _means(figures)


def _means(halvings: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """The mean of every figure over the halvings in which it is defined."""
    means = {}
    for name in halvings[0]:
        known = [figures[name] for figures in halvings if not math.isnan(figures[name].estimate.value)]
        rows = [(row.estimate.value, row.estimate.low, row.estimate.high, row.floor) for row in known]
        value, low, high, floor = map(fmean, zip(*rows, strict=True)) if rows else (math.nan,) * 4
        if name.endswith("_p_value"):
            # Twice the mean of p-values is a p-value, however they depend on each other (arXiv 1212.4966).
            value, floor = min(1.0, 2 * value), min(1.0, 2 * floor)
        means[name] = Figure(Estimate(value, low, high), floor)
    return means


def _feature_figures(name: str, ours: Vector, base: Vector, other: Vector, seed: int) -> dict[str, Figure]:
    """The figures of one feature."""
    found, floors = compare_sets(ours, base, seed), compare_sets(other, base, seed, replicates=0)
    overlap, divergence = (Figure(a, b.value) for a, b in zip(found, floors, strict=True))
    classifier = Figure(UNDEFINED)
    if ours.shape[1] == 1 and not math.isnan(overlap.estimate.value):
        points, *others = (embed({name: values}, {name: base}, [name]) for values in (base, ours, other))
        tests = [feature_test(points, each, seed).accuracy for each in others]
        classifier = Figure(tests[0], tests[1].value)
    return {"overlapping_area": overlap, "kl_divergence": divergence, "classifier": classifier}


def _piece_figures(samples: Music, first: Music, second: Music, seed: int) -> dict[str, Figure]:
    """The figures that use all numeric features together."""
    ours, base, floor = (embed(music.features, first.features) for music in (samples, first, second))
    distance = frechet_distance(floor, base, seed, replicates=0).value
    return {
        "frechet_distance": Figure(frechet_distance(ours, base, seed), distance),
        **_test_figures("features", feature_test(base, ours, seed), feature_test(base, floor, seed)),
    }


def _token_figures(
    samples: Music, first: Music, second: Music, vocab_size: int, length: int, seed: int
) -> dict[str, Figure]:
    """The figures of sequences of equal length: of the pieces that are long enough, the same number from each set."""
    sets = [[ids[:length] for ids in music.ids if len(ids) >= length] for music in (samples, first, second)]
    count = min(map(len, sets))
    names = ("classifier_tokens", "classifier_tokens_p_value", "distinct_4", "self_bleu_4")
    if count < FOLDS:
        return {name: Figure(UNDEFINED) for name in names}
    ours, base, floor = (torch.tensor(group[:count]) for group in sets)
    tests = [token_test(base, other, vocab_size, seed) for other in (ours, floor)]
    rows = ours.tolist()
    distinct = jackknife(lambda present: distinct_n([rows[index] for index in present], 4), count)
    repeated = jackknife(lambda present: self_bleu([rows[index] for index in present]), count)
    return _test_figures("tokens", *tests) | {
        "distinct_4": Figure(distinct, distinct_n(base, 4)),
        "self_bleu_4": Figure(repeated, self_bleu(base)),
    }


def _test_figures(kind: str, test: TwoSampleTest, floor: TwoSampleTest) -> dict[str, Figure]:
    p_value = Estimate(test.p_value, math.nan, math.nan)
    return {
        f"classifier_{kind}": Figure(test.accuracy, floor.accuracy.value),
        f"classifier_{kind}_p_value": Figure(p_value, floor.p_value),
    }
