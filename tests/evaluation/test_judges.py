"""Judges against brute force and closed forms; the musical one also on music that differs in what it hears."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import Note, Score, Track
from symusic.core import ScoreTick
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from midimamba import MidiProcessor, MusicalDiscriminator, MusicalDiscriminatorConfig
from midimamba.errors import InputError
from midimamba.evaluation.judges import (
    NOT_MUSIC,
    Ensemble,
    MusicalJudge,
    TokenJudge,
    auc,
    calibrate,
    calibration_error,
    fit_musical,
    likelihood_gain,
    load_judges,
    musical_columns,
)
from midimamba.evaluation.logistic import balanced, logistic_regression
from midimamba.modeling.calibration import Calibration
from support import make_discriminator, make_score

QUARTER = 480


def tune(chance: random.Random, repeats: bool) -> ScoreTick:
    """Sixteen bars; their last eight are the first eight, or new."""
    score = Score(QUARTER)
    track = Track()
    bars = [[60 + chance.choice((0, 2, 4, 5, 7, 9, 11)) for _ in range(4)] for _ in range(16)]
    for index, bar in enumerate(bars[:8] + (bars[:8] if repeats else bars[8:])):
        for beat, pitch in enumerate(bar):
            track.notes.append(Note((4 * index + beat) * QUARTER, QUARTER, pitch, 80))
    score.tracks.append(track)
    return score


@pytest.fixture(scope="module")
def tunes() -> tuple[list[ScoreTick], list[ScoreTick]]:
    """Tunes that repeat themselves in four of five cases, and tunes that do so in one."""
    chance = random.Random(0)
    return tuple([tune(chance, chance.random() < share) for _ in range(150)] for share in (0.8, 0.2))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def musical(tunes: tuple[list[ScoreTick], list[ScoreTick]]) -> MusicalDiscriminator:
    real, fake = tunes
    return fit_musical(real[:100], fake[:100], bars=16)


class Known:
    """Judges a sequence by its first id: a normal variable, whose log-odds are known."""

    def __init__(self, values: Tensor, calibration: Calibration | None = None):
        self.values = values
        self.calibration = calibration or Calibration()
        self.discriminator = self

    def log_odds(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        log_odds: Tensor = self.calibration(self.values[[row[0] for row in sequences]]).double()
        return log_odds


ints = st.integers(-4, 4)


@given(st.lists(ints, min_size=1, max_size=12), st.lists(ints, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_auc_is_the_share_of_pairs_in_the_right_order(real: list[int], fake: list[int]) -> None:
    wins = sum(1.0 if r > f else 0.5 if r == f else 0.0 for r in real for f in fake)
    assert auc(torch.tensor(real), torch.tensor(fake)) == pytest.approx(wins / (len(real) * len(fake)))


@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=20),
    st.lists(st.floats(-8, 8), min_size=1, max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_calibration_error_agrees_with_its_definition(real: list[float], fake: list[float]) -> None:
    pieces = [(1 / (1 + math.exp(-value)), 1, 0.5 / len(real)) for value in real]
    pieces += [(1 / (1 + math.exp(-value)), 0, 0.5 / len(fake)) for value in fake]
    expected = 0.0
    for index in range(10):
        within = [piece for piece in pieces if min(int(piece[0] * 10), 9) == index]
        expected += abs(sum(weight * (chance - label) for chance, label, weight in within))
    assert calibration_error(torch.tensor(real).double(), torch.tensor(fake).double()) == pytest.approx(expected)


def test_likelihood_gain_of_exact_log_odds_is_the_divergence() -> None:
    """Of discrete distributions p and q: E_q[log q/p] - log E_p[q/p] = KL(q || p)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    exact = (q / p).log()
    counts_q, counts_p = (10 * q).long(), (10 * p).long()
    real, fake = exact.repeat_interleave(counts_q), exact.repeat_interleave(counts_p)
    assert likelihood_gain(real, fake) == pytest.approx(float((q * exact).sum()))
    assert likelihood_gain(real + 3, fake + 3) == pytest.approx(likelihood_gain(real, fake))
    assert likelihood_gain(torch.zeros(4), torch.zeros(7)) == pytest.approx(0)


def test_logistic_regression_is_where_the_gradient_vanishes() -> None:
    random_ = np.random.default_rng(0)
    points = np.concatenate([random_.normal(size=(80, 3)) * [1, 30, 0.1], np.ones((80, 1))], axis=1)
    labels = (random_.random(80) < 1 / (1 + np.exp(-3 * points[:, 0]))).astype(float)
    counts = balanced(labels)
    weights = logistic_regression(points, labels, 2.0, counts)
    gradient = points.T @ (counts * (1 / (1 + np.exp(-points @ weights)) - labels)) + 2.0 * weights * [1, 1, 1, 0]
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert counts[labels == 1].sum() == pytest.approx(counts[labels == 0].sum())


def test_calibration_finds_the_scale_of_gaussians() -> None:
    """Real N(1, 1) and samples N(-1, 1) have log-odds 2x; the judge says 10x + 5."""
    torch.manual_seed(0)
    values = torch.cat([torch.randn(3000) + 1, torch.randn(6000) - 1])
    judge = Known(10 * values + 5)
    real, fake = [[index] for index in range(3000)], [[index] for index in range(3000, 9000)]
    calibrate([judge], real, fake)  # type: ignore[list-item]
    assert judge.calibration.scale.item() == pytest.approx(0.2, abs=0.02)
    assert judge.calibration.offset.item() == pytest.approx(-1, abs=0.1)
    assert calibration_error(judge.log_odds(real), judge.log_odds(fake)) < 0.02
    before = judge.calibration.scale.item()
    calibrate([judge], real, fake)  # type: ignore[list-item]
    assert judge.calibration.scale.item() == pytest.approx(before, rel=1e-3)  # it is right already


def test_judges_that_hear_the_same_share_its_weight() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(2000) + 1, torch.randn(2000) - 1])  # whose log-odds are 2 values
    real, fake = [[index] for index in range(2000)], [[index] for index in range(2000, 4000)]
    twins = [Known(2 * values), Known(2 * values)]
    calibrate(twins, real, fake)  # type: ignore[arg-type]
    assert sum(judge.calibration.scale.item() for judge in twins) == pytest.approx(1, abs=0.1)
    both = Ensemble(twins)
    assert calibration_error(both.log_odds(real), both.log_odds(fake)) < 0.03
    torch.testing.assert_close(both.log_odds(real), twins[0].log_odds(real) + twins[1].log_odds(real))


def test_no_judge_counts_against_the_others() -> None:
    """The best weights of v + n and n - v would be 1 and -1; with none below 0 they are those of v + n alone."""
    torch.manual_seed(0)
    values, noise = torch.cat([torch.randn(3000) + 1, torch.randn(3000) - 1]), torch.randn(6000)
    judges = [Known(values + noise), Known(noise - values)]
    calibrate(judges, [[index] for index in range(3000)], [[index] for index in range(3000, 6000)])  # type: ignore[arg-type]
    assert judges[1].calibration.scale.item() == 0
    assert judges[0].calibration.scale.item() == pytest.approx(1, abs=0.1)  # 2 / (1 + 1), of N(+-1, 2)


def test_judges_that_are_never_wrong_stay_finite() -> None:
    judge = Known(torch.tensor([50.0] * 20 + [-50.0] * 20))
    calibrate([judge], [[i] for i in range(20)], [[i] for i in range(20, 40)])  # type: ignore[list-item]
    odds = judge.log_odds([[0], [20]])
    torch.testing.assert_close(odds, torch.tensor([1, -1]).double() * math.log(21), atol=0.02, rtol=0)


def test_a_musical_judge_hears_that_tunes_repeat(
    musical: MusicalDiscriminator, tunes: tuple[list[ScoreTick], list[ScoreTick]], processor: MidiProcessor
) -> None:
    judge = MusicalJudge(musical, processor)
    real, fake = (judge.of_scores(scores[100:]) for scores in tunes)
    assert auc(real, fake) > 0.7  # 0.8 if it heard nothing but this
    assert calibration_error(real, fake) < 0.2
    # Whether a tune repeats is worth log(0.8 / 0.2) in either direction.
    chance = random.Random(9)
    gaps = (
        judge.of_scores([tune(chance, True) for _ in range(60)]).mean()
        - judge.of_scores([tune(chance, False) for _ in range(60)]).mean()
    )
    assert 1.4 < float(gaps) < 4.5  # 2.8


def test_squares_are_kept_where_samples_err_on_both_sides() -> None:
    """Real tunes hold half of their repetitions; samples all or none."""
    chance = random.Random(0)

    def half(share: float) -> ScoreTick:
        bars = [[60 + chance.choice((0, 2, 4, 5, 7, 9, 11)) for _ in range(4)] for _ in range(8)]
        later = [bar if chance.random() < share else [pitch + 1 for pitch in bar[::-1]] for bar in bars]
        score = Score(QUARTER)
        score.tracks.append(Track())
        for index, bar in enumerate(bars + later):
            for beat, pitch in enumerate(bar):
                score.tracks[0].notes.append(Note((4 * index + beat) * QUARTER, QUARTER, pitch, 80))
        return score

    real, fake = [half(0.5) for _ in range(80)], [half(share) for share in (0.0, 1.0) * 40]
    discriminator = fit_musical(real, fake)
    assert discriminator.config.squares


def test_log_odds_of_sequences_are_those_of_their_music(
    musical: MusicalDiscriminator, processor: MidiProcessor
) -> None:
    judge = MusicalJudge(musical, processor)
    score = make_score(2, bars=9)
    ids = processor.encode(score)
    expected = judge.of_scores([processor.continue_score(None, ids)])
    found = judge.log_odds([ids, [processor.bos_token_id], [*ids, processor.eos_token_id, processor.pad_token_id]])
    torch.testing.assert_close(found[[0, 2]], expected.repeat(2), atol=1e-5, rtol=0)
    assert found[1] == NOT_MUSIC


def test_a_musical_discriminator_loads_with_the_auto_class(musical: MusicalDiscriminator, tmp_path: Path) -> None:
    assert musical.calibration.scale.item() != 1  # so that it shows whether it is saved
    musical.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is MusicalDiscriminator
    assert loaded.config.bars == 16
    columns = torch.from_numpy(
        musical_columns([make_score(seed, bars=1 + 5 * seed) for seed in range(4)], _names(loaded))
    )
    assert columns.isnan().any()
    assert torch.equal(loaded(columns).logits, musical(columns).logits)
    labels = torch.tensor([1.0, 0, 1, 0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(loaded(columns).logits[:, 0], labels)
    torch.testing.assert_close(loaded(columns, labels=labels).loss, expected)


def _names(discriminator: MusicalDiscriminator) -> list[str]:
    return list(discriminator.config.feature_names)


def test_what_a_piece_lacks_counts_as_average_and_no_feature_outweighs_all_others() -> None:
    config = MusicalDiscriminatorConfig(feature_names=["a", "b"], feature_widths=[1, 1], squares=True)
    discriminator = MusicalDiscriminator(config)
    with torch.no_grad():
        discriminator.center.copy_(torch.tensor([2.0, 0.0]))
        discriminator.spread.copy_(torch.tensor([0.5, 1.0]))
    found = discriminator.standardize(torch.tensor([[3.0, math.nan], [1e6, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, 0, 3, 0], [5, -1, 24, 0]]))
    with pytest.raises(ValueError, match=r"takes \(batch, 2\)"):
        discriminator(torch.zeros(3, 4))


def test_a_token_judge_reads_sequences_of_any_length_without_their_padding() -> None:
    for kind in ("cnn", "mamba"):
        discriminator = make_discriminator(kind)
        sequences = [[1, 5, 3], [2] * 9, [4, 4, 1, 6, 8, 8, 3, 2]]
        expected = [discriminator(torch.tensor([row])).logits.item() for row in sequences]
        found = TokenJudge(discriminator, 0, None).log_odds(
            [[*row, 0, 0] if len(row) == 3 else row for row in sequences]
        )
        torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-5, rtol=0)


def test_each_discriminator_is_loaded_as_what_it_is(
    musical: MusicalDiscriminator, processor: MidiProcessor, tmp_path: Path
) -> None:
    musical.save_pretrained(tmp_path / "musical")
    make_discriminator(vocab_size=processor.vocab_size).save_pretrained(tmp_path / "tokens")
    make_discriminator(vocab_size=50).save_pretrained(tmp_path / "other")
    found = load_judges([tmp_path / "musical", tmp_path / "tokens"], processor)
    assert [type(judge) for judge in found] == [MusicalJudge, TokenJudge]
    with pytest.raises(InputError, match="reads 50 different tokens, but the generator's tokenizer has 760"):
        load_judges([tmp_path / "other"], processor)
    with pytest.raises(InputError, match="no discriminator can be loaded"):
        load_judges([tmp_path / "nowhere"], processor)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"feature_names": ["birdsong"], "feature_widths": [1]}, "the feature 'birdsong', which this version"),
        ({"feature_names": ["degree_histogram"], "feature_widths": [11]}, r"features of \[11\] columns"),
    ],
)
def test_features_that_this_version_does_not_compute_are_refused(
    change: dict[str, Any], reason: str, processor: MidiProcessor
) -> None:
    discriminator = MusicalDiscriminator(MusicalDiscriminatorConfig(**change))
    with pytest.raises(InputError, match=reason):
        MusicalJudge(discriminator, processor)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_names": ["a"], "feature_widths": [1, 2]},
        {"feature_names": ["a", "a"], "feature_widths": [1, 2]},
        {"feature_names": ["a"], "feature_widths": [0]},
        {"feature_names": ["a"], "feature_widths": [2**40]},
        {"feature_names": ["a"], "feature_widths": [1], "bars": -1},
    ],
)
def test_configurations_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=r"feature|bars"):
        MusicalDiscriminatorConfig(**options)


def test_too_little_music_to_fit_is_refused(tunes: tuple[list[ScoreTick], list[ScoreTick]]) -> None:
    with pytest.raises(ValueError, match="4 different real pieces and 150 samples are too few"):
        fit_musical(tunes[0][:4], tunes[1])
    with pytest.raises(ValueError, match="4 different real pieces and 0 samples"):
        fit_musical(tunes[0][:4] * 2, [])


def test_pieces_that_come_twice_count_once(tunes: tuple[list[ScoreTick], list[ScoreTick]]) -> None:
    """In other keys as well: else a fold tests what the others have learned, and weights are held back too little."""
    real, fake = (some[:40] for some in tunes)
    once = fit_musical(real, fake)
    again = fit_musical([*real, *(score.shift_pitch(3) for score in real)], [*fake, *fake])
    for name, weights in once.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weights, msg=name)
