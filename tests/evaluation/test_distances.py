"""Distances between sets: closed forms, and sets compared with themselves."""

import math

import numpy as np
import pytest

from midimamba.evaluation.distances import (
    DistanceDensities,
    compare_sets,
    energy_distance,
    kl_divergence,
    overlapping_area,
    pairwise_distances,
)
from midimamba.evaluation.features import NUMBERS
from midimamba.evaluation.frechet import embed, frechet_distance, gaussian_frechet

NORMAL = np.random.default_rng(0).normal


def densities(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = DistanceDensities(first, second)
    return both.density(0, np.ones(len(first))), both.density(1, np.ones(len(second)))


def test_pairwise_distances_are_euclidean() -> None:
    first, second = NORMAL(size=(4, 3)), NORMAL(size=(5, 3))
    expected = [[math.dist(a, b) for b in second] for a in first]
    assert pairwise_distances(first, second) == pytest.approx(np.array(expected))


def test_a_set_overlaps_itself_completely_and_a_distant_one_not_at_all() -> None:
    values = NORMAL(size=200)
    assert overlapping_area(*densities(values, values)) == pytest.approx(1)
    assert kl_divergence(*densities(values, values)) == pytest.approx(0, abs=1e-9)
    assert overlapping_area(*densities(values, values + 100)) == pytest.approx(0, abs=1e-6)
    constant = np.full(7, 3.0)
    assert overlapping_area(*densities(constant, constant)) == pytest.approx(1)


def test_overlap_and_divergence_of_normal_distributions_agree_with_the_textbook() -> None:
    # N(0, 1) and N(1, 1): the area is 2 Φ(-1/2), the divergence 1/2; the kernel widens both a little.
    found = densities(NORMAL(size=40_000), NORMAL(1, size=40_000))
    assert overlapping_area(*found) == pytest.approx(math.erfc(0.5 / math.sqrt(2)), abs=0.02)
    assert kl_divergence(*found) == pytest.approx(0.5, abs=0.05)


def test_a_density_is_the_weighted_sum_of_the_kernels() -> None:
    values = NORMAL(size=60)
    weights = np.random.default_rng(1).integers(0, 4, size=60).astype(float)
    both = DistanceDensities(values, values)
    width = values.std() * 60 ** (-1 / 5)
    grid = np.linspace(values.min() - 4 * width, values.max() + 4 * width, 512)
    expected = (weights * np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2)).sum(1)
    assert overlapping_area(both.density(0, weights), expected / expected.sum()) == pytest.approx(1, abs=0.01)


def test_sets_of_one_kind_overlap_more_than_sets_of_two() -> None:
    real, alike, shifted = NORMAL(size=(60, 1)), NORMAL(size=(60, 1)), NORMAL(4, size=(60, 1))
    (near, near_kl), (far, far_kl) = compare_sets(alike, real), compare_sets(shifted, real)
    assert near.value > 0.9 > far.value
    assert near_kl.value < 0.1 < far_kl.value
    for estimate in (near, near_kl, far, far_kl):
        assert estimate.low <= estimate.value <= estimate.high
    assert far.high < near.low
    narrow = compare_sets(0.01 * NORMAL(size=(60, 1)), real)[0]  # the same centre, but all samples alike
    assert narrow.value < near.value


def test_pieces_without_the_feature_are_left_out() -> None:
    real, samples = NORMAL(size=(20, 1)), NORMAL(size=(20, 1))
    missing = np.full((3, 1), np.nan)
    whole = compare_sets(np.concatenate([samples, missing]), np.concatenate([missing, real]))
    assert whole == compare_sets(samples, real)
    assert math.isnan(compare_sets(missing, real)[0].value)


def test_one_stray_piece_does_not_separate_sets_that_agree() -> None:
    agreeing = np.ones((40, 1))
    stray = agreeing.copy()
    stray[0] = 0.5
    assert compare_sets(stray, agreeing)[0].value > 0.9
    assert compare_sets(agreeing, agreeing)[0].value == pytest.approx(1)


def test_frechet_distance_of_gaussians_has_closed_forms() -> None:
    identity = np.eye(3)
    assert gaussian_frechet(np.zeros(3), identity, np.ones(3), identity) == pytest.approx(3)
    # If covariances commute, it is the distance of the standard deviations.
    one, four = np.diag([1.0, 4, 9]), np.diag([4.0, 4, 1])
    assert gaussian_frechet(np.zeros(3), one, np.zeros(3), four) == pytest.approx(1 + 0 + 4)
    turn = np.linalg.qr(NORMAL(size=(3, 3)))[0]
    assert gaussian_frechet(np.zeros(3), turn @ one @ turn.T, np.zeros(3), turn @ four @ turn.T) == pytest.approx(5)
    # In general: the root of the product of two covariances, from its own eigenvalues.
    first, second = (root @ root.T for root in (NORMAL(size=(3, 3)), NORMAL(size=(3, 3))))
    root = np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    expected = np.trace(first) + np.trace(second) - 2 * root
    assert gaussian_frechet(np.zeros(3), first, np.zeros(3), second) == pytest.approx(expected)
    flat = np.diag([1.0, 0, 0])  # a set that does not vary everywhere
    assert gaussian_frechet(np.zeros(3), flat, np.zeros(3), flat) == pytest.approx(0)


def test_frechet_distance_of_points_is_that_of_their_moments() -> None:
    first, second = NORMAL(size=(40, 4)), NORMAL(0.5, 2, size=(30, 4))
    found = frechet_distance(first, second)
    expected = gaussian_frechet(first.mean(0), np.cov(first.T), second.mean(0), np.cov(second.T))
    assert found.value == pytest.approx(expected)
    assert 0 <= found.low < found.value < found.high
    assert frechet_distance(first, first).value == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two points"):
        frechet_distance(first[:1], second)


def test_an_embedding_is_standardised_by_the_reference_and_marks_what_is_missing() -> None:
    reference = {name: NORMAL(5, 2, size=(30, 1)) for name in NUMBERS}
    points = embed(reference, reference)
    assert points[:, ::2].mean(0) == pytest.approx(0, abs=1e-9)
    assert points[:, ::2].std(0) == pytest.approx(1)
    assert not points[:, 1::2].any()
    strange = {name: values.copy() for name, values in reference.items()}
    strange["polyphony"][:] = np.nan
    strange["key_stability"][0] = 1e9
    moved = embed(strange, reference) - points
    assert moved[:, 2 * list(NUMBERS).index("polyphony") + 1] == pytest.approx(1)
    assert np.abs(embed(strange, reference)).max() == 5
    assert frechet_distance(embed(strange, reference), points).value > 1


def test_the_energy_distance_is_that_of_the_definition() -> None:
    ours, real = np.array([[0.0], [1.0], [np.nan], [4.0]]), np.array([[0.0], [2.0]])
    between = 2 * np.mean([0, 2, 1, 1, 4, 2])
    within = np.mean([1, 4, 3]) + 2
    assert energy_distance(ours, real) == pytest.approx((between - within) / between)
    assert np.isnan(energy_distance(ours, real[:1]))
    assert energy_distance(np.zeros((3, 1)), np.zeros((4, 1))) == 0
    assert energy_distance(np.ones((3, 2)), np.zeros((4, 2))) == 1


def test_the_energy_distance_is_0_by_chance_however_few_pieces_and_grows_with_a_shift() -> None:
    random = np.random.default_rng(0)

    def mean(count: int, shift: float) -> float:
        pairs = [random.normal(size=(2, count, 3)) for _ in range(200)]
        return float(np.mean([energy_distance(ours + shift, real) for ours, real in pairs]))

    assert mean(4, 0) == pytest.approx(0, abs=0.02)
    assert mean(30, 0) == pytest.approx(0, abs=0.004)
    assert 0.02 < mean(30, 0.5) < mean(30, 1.0) < mean(30, 2.0) < 1
