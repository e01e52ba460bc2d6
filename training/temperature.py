"""The best sampling temperature of a generator: the one whose music is closest to the validation split.

At every candidate, pieces are drawn from the same seed, with the grammar and the model's own other defaults, as
`midimamba generate` draws them. Their musical features are compared with those of real music by energy distances.
Form counts for half: a wrong temperature shows in it first, and two of fifteen features would hardly be heard among
the others. Overlapping areas, which reports show, are too blunt for this. On the Nottingham tunes, a model with
look-back repeats itself too much at 0.7: bars 4 apart are alike by 0.75, and by 0.55 in real tunes. The mean
overlapping area is 0.92 there and at 0.8, whereas the distance is 0.105 and 0.049.

Sixty-four pieces leave noise: a distance on the same tunes varies by 0.006 to 0.012. Leaving out one group of pieces
at a time gives the standard error of the difference between two candidates (the jackknife). Candidates within one
standard error of the closest are tied with it, and of these the one nearest to 1 is chosen, which changes the model
least (the one-standard-error rule of Breiman et al., "Classification and Regression Trees", 1984).
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from symusic.core import ScoreTick
from tqdm.auto import tqdm

from midimamba.corpus.load import load_corpus
from midimamba.evaluation.distances import compare_sets, energy_distance
from midimamba.evaluation.estimates import jackknife
from midimamba.evaluation.features import Indices, Vector, measure, opening
from midimamba.evaluation.samples import decode_all
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import time_ids
from midimamba.training.scripts import announce

FORM = ("bar_self_similarity_4", "bar_self_similarity_8")
"""The features that count for half."""
SEED = 0
PIECES = 64
BARS = 16
"""Of every piece, as `midimamba generate` draws by default."""
MAX_NEW_TOKENS = 1024
"""Sixteen bars seldom need more."""
GROUPS = 16
LEAST_PIECES = GROUPS
"""Of fewer pieces, drawn or real, the features say nothing."""
_MOST_REAL_PIECES = 256
_TRIAL_TOKENS = 32
"""Tokens whose drawing is timed, to know how long a candidate takes."""

Features = Mapping[str, Vector]


@dataclass(frozen=True)
class Tried:
    """
    What music is like at one temperature.

    Args:
        temperature (`float`): a candidate.
        distance (`float`): from the validation split; about 0 if nothing tells the two apart.
        error (`float`): standard error of the difference between this distance and the smallest one.
        self_similarity (`float`): of bars that are 8 apart; NaN without bars.
        overlapping_area (`float`): mean over all features.
    """

    temperature: float
    distance: float
    error: float
    self_similarity: float
    overlapping_area: float

    def line(self, real: float) -> str:
        """For the person who waits, beside the self-similarity of real music, which short pieces do not have."""
        form = f"bars 8 apart alike by {self.self_similarity:.2f} (real {real:.2f}), "
        return (
            f"temperature {self.temperature:g}: distance {self.distance:.3f}, {'' if 'nan' in form else form}"
            f"overlapping area {self.overlapping_area:.3f}"
        )


class _Music(NamedTuple):
    """The features of all pieces, and the group of every piece."""

    features: Features
    groups: Indices

    @classmethod
    def of(cls, scores: Sequence[ScoreTick]) -> "_Music":
        return cls(measure(scores), np.arange(len(scores)) * GROUPS // len(scores))


def choose_temperature(
    model: Any, processor: MidiProcessor, data: str, candidates: Sequence[float], until: float | None = None
) -> float | None:
    """
    Sample at every candidate, compare with the validation split, and make the best one the model's own.

    One line per candidate says what was found. Candidates for which there is no time are left out, those farthest from
    1 first, which a line says. No other split is read, and torch's random state is left as it was.

    Args:
        model (`PreTrainedModel`): the trained generator. Its generation config is changed.
        processor (`MidiProcessor`): its processor.
        data (`str`): its corpus.
        candidates (`Sequence[float]`): the temperatures to try.
        until (`float`, *optional*): when drawing has to end, as `time.time` has it. Unset: there is time for all.

    Returns:
        `float`, *optional*: the temperature, or `None` if there is too little music or time to compare, which a line
        says.
    """
    rows = _some(load_corpus(data)[0]["validation"])
    real = _openings([processor.decode(ids) for ids in rows])
    if len(real) < LEAST_PIECES:
        announce(
            f"no temperature is chosen: the validation split has {len(real)} pieces, and {LEAST_PIECES} are needed"
        )
        return None
    wanted = sorted(set(candidates), key=lambda candidate: abs(candidate - 1))
    drawn = _draw_at_each(model, processor, wanted, until, _tokens_of_opening(rows, processor))
    late = set(wanted) - set(drawn)
    if late and len(drawn) < 2:
        announce(f"no temperature is chosen: there was no time to compare {len(wanted)} of them")
        return None
    if late:
        announce(f"not compared, because there was no time: temperature {_listed(late)}")
    if few := [candidate for candidate, scores in drawn.items() if len(scores) < LEAST_PIECES]:
        announce(f"not compared, because too few of its samples are music: temperature {_listed(few)}")
    usable = {candidate: _Music.of(drawn[candidate]) for candidate in sorted(drawn) if candidate not in few}
    if not usable:
        return None
    music = measure(real)
    tried = compare_temperatures(usable, music)
    for row in tried:
        announce(row.line(_mean(music, FORM[-1])))
    best = best_of(tried)
    model.generation_config.temperature = best
    announce(f"the model's own temperature is now {best:g}: within the noise, none is closer to the validation split")
    return best


def compare_temperatures(drawn: Mapping[float, _Music], real: Features) -> list[Tried]:
    """
    How far music at every temperature is from real music.

    Args:
        drawn (`Mapping[float, _Music]`): the music by temperature.
        real (`Mapping[str, array]`): the features of real music.
    """
    # A feature that many pieces lack, such as the self-similarity of short ones, would be that of a few.
    sets = [real, *(music.features for music in drawn.values())]
    names = [name for name in real if all(_share_known(features[name]) >= 0.5 for features in sets)]

    def distance(temperature: float, groups: Sequence[int]) -> float:
        music = drawn[temperature]
        rows = np.isin(music.groups, groups)
        found = {name: energy_distance(music.features[name][rows], real[name]) for name in names}
        return _half_form({name: value for name, value in found.items() if math.isfinite(value)})

    distances = {temperature: distance(temperature, range(GROUPS)) for temperature in drawn}
    closest = min(distances, key=lambda temperature: distances[temperature])
    tried = []
    for temperature, music in drawn.items():

        def difference(groups: Sequence[int], other: float = temperature) -> float:
            return distance(other, groups) - distance(closest, groups)

        interval = jackknife(difference, GROUPS)
        areas = [compare_sets(music.features[name], real[name], replicates=0)[0].value for name in names]
        similarity = _mean(music.features, FORM[-1])
        error = (interval.high - interval.low) / (2 * 1.96)
        tried.append(Tried(temperature, distances[temperature], error, similarity, float(np.nanmean(areas))))
    return tried


def best_of(tried: Sequence[Tried]) -> float:
    """The temperature nearest to 1 of those that are as close to real music as the closest, within the noise."""
    smallest = min(row.distance for row in tried)
    tied = [row.temperature for row in tried if row.distance - row.error <= smallest]
    return min(tied, key=lambda temperature: abs(temperature - 1))


def _half_form(distances: Mapping[str, float]) -> float:
    """The mean of the distances, half of it that of form where there is any."""
    halves = [[each for name, each in distances.items() if (name in FORM) == is_form] for is_form in (True, False)]
    return fmean(fmean(half) for half in halves if half)


def _listed(temperatures: Iterable[float]) -> str:
    return ", ".join(f"{each:g}" for each in sorted(temperatures))


def _some(rows: Dataset) -> list[list[int]]:
    """The pieces of a split, as tokens; some, evenly spread, if it is a large one."""
    count = min(len(rows), _MOST_REAL_PIECES)
    some: list[list[int]] = rows.select([index * len(rows) // count for index in range(count)])["input_ids"][:]
    return some


def _tokens_of_opening(pieces: Sequence[Sequence[int]], processor: MidiProcessor) -> int:
    """How many tokens a sample will have, by the longest opening of real pieces."""
    bars = list(time_ids(processor.midi_tokenizer)[0])
    ends = [np.flatnonzero(np.isin(ids, bars))[BARS : BARS + 1] for ids in pieces]
    longest = max(int(end[0]) if len(end) else len(ids) for end, ids in zip(ends, pieces, strict=True))
    return min(longest, MAX_NEW_TOKENS)


def _draw_at_each(
    model: Any, processor: MidiProcessor, candidates: Sequence[float], until: float | None, tokens: int
) -> dict[float, list[ScoreTick]]:
    """
    New pieces by temperature. Without a grammar, what is not music counts as lost and is not drawn again.

    Args:
        model (`PreTrainedModel`), processor (`MidiProcessor`): what draws.
        candidates (`Sequence[float]`): the temperatures, those that matter most first.
        until (`float`, *optional*): a candidate that would take longer, and all after it, are left out.
        tokens (`int`): of a piece, about.
    """
    inputs = {name: value.to(model.device) for name, value in processor(None, return_tensors="pt").items()}

    def draw(temperature: float, longest: int) -> tuple[list[ScoreTick], float]:
        """The pieces, and how long drawing them took."""
        start = time.time()
        options = {"num": PIECES, "seed": SEED, "temperature": temperature, "max_new_tokens": longest}
        composed = processor.compose(model, inputs, bars=BARS, redraw=False, **options)
        return _openings(decode_all(processor, composed.ids.tolist()).scores), time.time() - start

    drawn, seconds = dict[float, list[ScoreTick]](), 0.0
    was_training = model.training
    model.eval()
    if until is not None and time.time() < until:
        draw(1.0, _TRIAL_TOKENS)  # kernels are compiled
        seconds = draw(1.0, _TRIAL_TOKENS)[1] * tokens / _TRIAL_TOKENS
    for temperature in tqdm(candidates, desc="trying temperatures", leave=False, disable=None):
        if until is not None and time.time() + seconds > until:
            break
        drawn[temperature], spent = draw(temperature, MAX_NEW_TOKENS)
        seconds = max(seconds, spent)
    model.train(was_training)
    return drawn


def _openings(scores: Sequence[ScoreTick]) -> list[ScoreTick]:
    """The first bars, of real music and of samples, both of which come from tokens. Silence is left out."""
    return [score for score in (opening(whole, BARS) for whole in scores) if score.note_num()]


def _share_known(values: Vector) -> float:
    return float(np.mean(~np.isnan(values).any(axis=1)))


def _mean(features: Features, name: str) -> float:
    """The mean of a number over the pieces that have it; NaN if none has."""
    known = features[name][~np.isnan(features[name])]
    return float(known.mean()) if len(known) else math.nan
