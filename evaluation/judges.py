"""Judges: how much likelier is a piece as real music than as a sample of a generator?

A judge is a discriminator with what it needs to read token sequences. What it says of a piece are log-odds L, and the
weight exp(L) turns samples into real music as far as the judge is right. That holds only if the log-odds are
calibrated, which [`calibrate`] does on music and samples that no judge was fitted on, for all judges together: judges
that hear the same add up to too much.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from symusic import Score
from symusic.core import ScoreTick
from torch import Tensor, nn

from midimamba.errors import InputError
from midimamba.evaluation.features import Piece, measure_with
from midimamba.evaluation.judged_features import JUDGED
from midimamba.evaluation.logistic import Matrix, balanced, logistic_regression, with_constant
from midimamba.loading import load_any_discriminator
from midimamba.modeling.configuration_musical_discriminator import MusicalDiscriminatorConfig
from midimamba.modeling.judging import Ensemble, Judge, TokenJudge
from midimamba.modeling.modeling_musical_discriminator import MusicalDiscriminator
from midimamba.modeling.resampling import effective_sample_size
from midimamba.tokenization.processor import MidiProcessor

NOT_MUSIC = -20.0
"""The log-odds of a sequence that cannot be decoded or holds no note: never chosen, and finite as a reward."""
RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 5
BINS = 10
_FLAT = 1e-6  # of the scales in calibration


class NothingToCompareError(ValueError):
    """Judges cannot be calibrated: all real music or all samples are missing, or are not music."""


class MusicalJudge:
    """
    A discriminator of musical features, which hears what token sequences sound like.

    Args:
        discriminator (`MusicalDiscriminator`): in any mode.
        processor (`MidiProcessor`): decodes the sequences, whatever its tokenization.

    Raises:
        InputError: if the discriminator hears features that this version of midimamba does not have.
    """

    def __init__(self, discriminator: MusicalDiscriminator, processor: MidiProcessor):
        config = discriminator.config
        if unknown := [name for name in config.feature_names if name not in JUDGED]:
            raise InputError(
                f"the discriminator hears the feature {unknown[0]!r}, which this version of midimamba does not "
                "compute: install the version that it was fitted with"
            )
        if (widths := [_width(name) for name in config.feature_names]) != list(config.feature_widths):
            raise InputError(
                f"the discriminator takes features of {list(config.feature_widths)} columns, but they have {widths}: "
                "install the version of midimamba that it was fitted with"
            )
        self.discriminator = discriminator
        self.processor = processor

    def log_odds(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-odds `(n,)` of `n` sequences, in float64 on the CPU; [`NOT_MUSIC`] where a sequence is none."""
        scores = [self._decode(sequence) for sequence in sequences]
        places = [place for place, score in enumerate(scores) if score is not None]
        log_odds = torch.full((len(scores),), NOT_MUSIC, dtype=torch.float64)
        if places:
            log_odds[places] = self.of_scores([score for score in scores if score is not None])
        return log_odds

    @torch.no_grad()
    def of_scores(self, scores: Sequence[ScoreTick]) -> Tensor:
        """The same of scores that hold notes."""
        columns = torch.from_numpy(musical_columns(scores, self.discriminator.config.feature_names))
        logits: Tensor = self.discriminator(columns.to(self.discriminator.device)).logits
        return logits[:, 0].double().cpu()

    def _decode(self, sequence: Sequence[int]) -> ScoreTick | None:
        """What a user would get; `None` if it is not music."""
        try:
            score = self.processor.continue_score(None, sequence)
        except ValueError:
            return None
        return score if score.note_num() else None


def load_judges(names: Sequence[str | Path], processor: MidiProcessor) -> list[TokenJudge | MusicalJudge]:
    """
    Load discriminators of either kind, on the best device there is.

    Args:
        names (`Sequence[str | Path]`): folders, or repositories on the Hub.
        processor (`MidiProcessor`): that of the generator whose samples are judged.

    Raises:
        InputError: if one of them is no whole discriminator, or reads another vocabulary.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judges: list[TokenJudge | MusicalJudge] = []
    for name in names:
        discriminator = load_any_discriminator(name)
        network: nn.Module = discriminator  # the types of transformers' own `to` are wrong
        network.to(device).eval()
        if isinstance(discriminator, MusicalDiscriminator):
            judges.append(MusicalJudge(discriminator, processor))
            continue
        if discriminator.config.vocab_size != processor.vocab_size:
            raise InputError(
                f"{name}: the discriminator reads {discriminator.config.vocab_size} different tokens, but the "
                f"generator's tokenizer has {processor.vocab_size}: name a discriminator of this generator"
            )
        judges.append(TokenJudge(discriminator, processor.pad_token_id, processor.eos_token_id))
    return judges


def fit_musical(
    real: Sequence[ScoreTick], fake: Sequence[ScoreTick], *, bars: int | None = None, seed: int = 0
) -> MusicalDiscriminator:
    """
    Fit a discriminator of all musical features by logistic regression, in a few seconds.

    How much the weights are held back, and whether squares of the features help, is chosen by cross-validation, and
    so is the calibration: by log-odds of pieces that the weights were not fitted on. Real music and samples count
    alike, however many there are of each. A piece that is given twice, in whatever keys, counts once.

    Args:
        real (`Sequence[symusic.Score]`): real music, with notes, of about the length of the samples.
        fake (`Sequence[symusic.Score]`): samples, with notes.
        bars (`int`, *optional*): the length of the pieces, which the discriminator remembers.
        seed (`int`, *optional*, defaults to 0): for the folds.

    Raises:
        ValueError: if there are fewer than 5 different pieces of a kind.
    """
    music, samples = (_distinct_columns(scores) for scores in (real, fake))
    if min(len(music), len(samples)) < FOLDS:
        raise ValueError(
            f"{len(music)} different real pieces and {len(samples)} samples are too few to fit a judge: give {FOLDS}"
        )
    columns = np.concatenate([music, samples])
    labels = np.repeat([1.0, 0.0], [len(music), len(samples)])
    folds = _folds(labels, seed)
    fits = []
    for squares in (False, True):
        discriminator = _standardized(music, squares, bars)
        points = discriminator.standardize(torch.from_numpy(columns)).double().numpy()
        points = with_constant(points)
        held_out = {ridge: _out_of_fold(points, labels, folds, ridge) for ridge in RIDGES}
        ridge = min(RIDGES, key=lambda each: _cross_entropy(held_out[each], labels))
        loss = _cross_entropy(held_out[ridge], labels)
        fits.append((loss, discriminator, points, ridge, held_out[ridge]))
    _, discriminator, points, ridge, log_odds = min(fits, key=lambda fit: fit[0])  # the first, if they are equal
    weights = logistic_regression(points, labels, ridge, balanced(labels))
    with torch.no_grad():
        discriminator.score.weight.copy_(torch.from_numpy(weights[None, :-1]))
        discriminator.score.bias.copy_(torch.from_numpy(weights[-1:]))
    scales, offset = _platt(log_odds[:, None], labels)
    discriminator.calibration.set(float(scales[0]), offset)
    return discriminator.eval()


def calibrate(
    judges: Sequence[TokenJudge | MusicalJudge], real: Sequence[Sequence[int]], fake: Sequence[Sequence[int]]
) -> None:
    """
    Set the calibration of judges so that the *sum* of their log-odds is right: Platt scaling of all of them together.

    The label is regressed on the log-odds of every judge, with scales of at least 0 and targets that are a little
    less than certain (Platt 1999), so that judges which tell all pieces apart stay finite. Both kinds count alike.

    Args:
        judges (`Sequence`): their calibration is changed, so what is in place before is refined.
        real (`Sequence[Sequence[int]]`): real music that no judge was fitted on.
        fake (`Sequence[Sequence[int]]`): samples that no judge was fitted on.

    Raises:
        NothingToCompareError: if there is nothing of one kind, or a judge can read nothing of it as music.
    """
    columns = [torch.cat([judge.log_odds(real), judge.log_odds(fake)]).numpy() for judge in judges]
    log_odds = np.stack(columns, axis=1)
    labels = np.repeat([1.0, 0.0], [len(real), len(fake)])
    music = (log_odds != NOT_MUSIC).all(axis=1)  # which stays what it is, whatever the calibration
    log_odds, labels = log_odds[music], labels[music]
    for label, kind, given in ((1.0, "pieces of real music", real), (0.0, "samples", fake)):
        if label not in labels:
            raise NothingToCompareError(f"none of {len(given)} {kind} is music, so there is nothing to compare")
    scales, offset = _platt(log_odds, labels)
    for judge, scale in zip(judges, scales.tolist(), strict=True):
        before = judge.discriminator.calibration
        before.set(scale * before.scale.item(), scale * before.offset.item() + offset / len(judges))


def auc(real: Tensor, fake: Tensor) -> float:
    """
    The area under the ROC curve: the chance that of two pieces the real one has the higher log-odds; ties count half.

    Args:
        real (`Tensor` of shape `(n,)`), fake (`Tensor` of shape `(m,)`): log-odds, or any other values.

    Raises:
        ValueError: if one of them is empty.
    """
    if not (len(real) and len(fake)):
        raise ValueError("an AUC compares two sets, and one of them is empty")
    ordered = fake.double().sort().values
    values = real.double()
    below, up_to = (torch.searchsorted(ordered, values, right=right).sum().item() for right in (False, True))
    return (below + up_to) / (2 * len(real) * len(fake))


def calibration_error(real: Tensor, fake: Tensor, bins: int = BINS) -> float:
    """
    Expected calibration error (Naeini et al. 2015): how far the probability of being real is from how many are.

    Args:
        real (`Tensor` of shape `(n,)`), fake (`Tensor` of shape `(m,)`): log-odds. Both kinds count alike.
        bins (`int`, *optional*, defaults to 10): of equal width, between probabilities 0 and 1.

    Returns:
        `float`: the mean over all pieces of the difference within their bins; 0 is best.
    """
    chances = torch.cat([real, fake]).double().sigmoid()
    labels = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))]).double()
    weights = torch.from_numpy(balanced(labels.numpy())) / len(labels)
    places = (chances * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, places, weights * (chances - labels))
    return float(gaps.abs().sum())


def likelihood_gain(real: Tensor, fake: Tensor) -> float:
    """
    By how many nats a piece the reweighted generator p·exp(L)/Z is likelier to write real music than p itself.

    It is E_real[L] - log Z, with Z = E_p[exp(L)]. A judge that knows nothing has 0.

    Args:
        real (`Tensor` of shape `(n,)`): log-odds of held-out real music.
        fake (`Tensor` of shape `(m,)`): log-odds of samples that the judge was not fitted on.
    """
    return float(real.double().mean() - (fake.double().logsumexp(0) - math.log(len(fake))))


def musical_columns(scores: Sequence[ScoreTick], names: Iterable[str]) -> Matrix:
    """Features of scores side by side, as a [`MusicalDiscriminator`] takes them: `(scores, columns)`."""
    return np.concatenate(list(measure_with({name: JUDGED[name] for name in names}, scores).values()), axis=1)


def _distinct_columns(scores: Sequence[ScoreTick]) -> Matrix:
    """All features, without the rows that repeat one up to rounding: no fold may hold what another one tests."""
    if not scores:
        return np.zeros((0, 0))
    columns = musical_columns(scores, JUDGED)
    known = np.where(np.isnan(columns), math.inf, columns.round(6))  # NaN is not even equal to itself
    _, first = np.unique(known, axis=0, return_index=True)
    return columns[np.sort(first)]


def _width(name: str) -> int:
    """Columns of a feature."""
    return int(np.size(JUDGED[name](Piece(Score(480)))))


def _standardized(real: Matrix, squares: bool, bars: int | None) -> MusicalDiscriminator:
    """A discriminator that knows the means and standard deviations of real music, and nothing else yet."""
    config = MusicalDiscriminatorConfig(
        feature_names=list(JUDGED), feature_widths=[_width(name) for name in JUDGED], squares=squares, bars=bars
    )
    discriminator = MusicalDiscriminator(config)
    known = ~np.isnan(real)
    counts = np.maximum(known.sum(0), 1)
    center = np.where(known, real, 0).sum(0) / counts
    spread = np.sqrt((np.where(known, real - center, 0) ** 2).sum(0) / counts)
    with torch.no_grad():
        discriminator.center.copy_(torch.from_numpy(center))
        # What never varies in real music keeps its own unit.
        discriminator.spread.copy_(torch.from_numpy(np.where(spread > 1e-6, spread, 1.0)))
    return discriminator


def _folds(labels: Matrix, seed: int) -> NDArray[np.int64]:
    """The fold of every piece: real music and samples are spread evenly."""
    folds = np.arange(len(labels)) % FOLDS
    random = np.random.default_rng(seed)
    for label in (0.0, 1.0):
        places = np.flatnonzero(labels == label)
        folds[places] = random.permutation(len(places)) % FOLDS
    return folds


def _out_of_fold(points: Matrix, labels: Matrix, folds: NDArray[np.int64], ridge: float) -> Matrix:
    """Log-odds `(n,)` of every piece by weights that were fitted on the other folds."""
    log_odds = np.zeros(len(points))
    for fold in range(FOLDS):
        train = folds != fold
        weights = logistic_regression(points[train], labels[train], ridge, balanced(labels[train]))
        log_odds[~train] = points[~train] @ weights
    return log_odds


def _cross_entropy(log_odds: Matrix, labels: Matrix) -> float:
    return float(np.mean(balanced(labels) * (np.logaddexp(0, log_odds) - labels * log_odds)))


def _platt(log_odds: Matrix, labels: Matrix) -> tuple[Matrix, float]:
    """
    Scales of at least 0 for each column, and an offset, under which the sum of the columns is calibrated.

    The best scales are those of a regression on the columns that are above 0 in it, so all sets of columns are tried;
    judges are few.

    Args:
        log_odds (`array` of shape `(n, judges)`).
        labels (`array` of shape `(n,)`): 1 for real, 0 for samples.
    """
    count = labels.sum()
    targets = np.where(labels == 1, (count + 1) / (count + 2), 1 / (len(labels) - count + 2))
    weights = balanced(labels)
    units = np.maximum(log_odds.std(0), 1e-12)
    points = with_constant(log_odds / units)
    judges = log_odds.shape[1]
    best, lowest = np.zeros(judges + 1), math.inf
    for size in range(judges + 1):
        for chosen in combinations(range(judges), size):
            columns = [*chosen, judges]
            found = logistic_regression(points[:, columns], targets, _FLAT, weights)
            sums = points[:, columns] @ found
            loss = float(weights @ (np.logaddexp(0, sums) - targets * sums))
            if (found[:-1] >= 0).all() and loss < lowest:
                best, lowest = np.zeros(judges + 1), loss
                best[columns] = found
    return best[:-1] / units, float(best[-1])


__all__ = [
    "Ensemble",
    "Judge",
    "MusicalJudge",
    "NothingToCompareError",
    "TokenJudge",
    "auc",
    "calibrate",
    "calibration_error",
    "effective_sample_size",
    "fit_musical",
    "likelihood_gain",
    "load_judges",
    "musical_columns",
]
