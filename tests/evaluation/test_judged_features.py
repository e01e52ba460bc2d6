"""Features of the musical judge: by hand, by brute force, and that none of them knows the key."""

import math
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import Note, Score, Track
from symusic.core import ScoreTick

from midimamba.evaluation.features import Feature, Piece, measure_with
from midimamba.evaluation.judged_features import (
    JUDGED,
    bar_repetition,
    degree_histogram,
    distinct_bars,
    harmonic_interval_histogram,
    melodic_interval_histogram,
    onset_position_histogram,
)
from support import make_score

QUARTER = 480


def piece(*notes: tuple[float, float, int]) -> Piece:
    """Notes with onset and duration in quarters, and a pitch, in 4/4."""
    score = Score(QUARTER)
    score.tracks.append(Track())
    for onset, duration, pitch in notes:
        score.tracks[0].notes.append(Note(int(onset * QUARTER), int(duration * QUARTER), pitch, 80))
    return Piece(score)


def melody(bars: list[list[int]]) -> Piece:
    """Four quarter notes per bar."""
    return piece(*((4 * bar + beat, 1, pitch) for bar, line in enumerate(bars) for beat, pitch in enumerate(line)))


def test_bars_repeat_only_if_nothing_differs() -> None:
    a, b, c = [60, 62, 64, 65], [67, 65, 64, 62], [60, 62, 64, 66]
    tune = melody([a, b, a, b, a, c])  # of the four pairs two bars apart, one differs in one note
    assert bar_repetition(tune, 2) == pytest.approx(3 / 4)
    assert bar_repetition(tune, 1) == 0
    assert math.isnan(bar_repetition(tune, 6))
    assert distinct_bars(tune) == pytest.approx(3 / 6)
    assert distinct_bars(melody([a, [72, 74, 76, 77], a])) == pytest.approx(1 / 3)  # an octave higher is the same
    assert distinct_bars(piece((0, 1, 60), (8, 1, 60), (8, 1, 72))) == 1  # once, never, twice


def test_onsets_are_counted_by_sixteenths_of_their_bar() -> None:
    found = onset_position_histogram(piece((0, 1, 60), (4.5, 1, 60), (5.5, 1, 60), (8.02, 1, 60)))
    assert found[[0, 2, 6]] == pytest.approx([1 / 2, 1 / 4, 1 / 4])


def test_the_upper_line_moves_by_signed_steps() -> None:
    found = melodic_interval_histogram(piece((0, 1, 60), (0, 1, 48), (1, 1, 62), (2, 1, 50), (3, 1, 90)))
    assert found[[14, 0, 24]] == pytest.approx([1 / 3] * 3)  # 2 up, 12 down, and 40 up, which counts as 12


def test_degrees_count_from_the_tonic_of_the_key() -> None:
    scale = [0, 2, 4, 5, 7, 9, 11, 12]
    c_major = degree_histogram(piece(*((i, 1, 60 + step) for i, step in enumerate(scale))))
    assert c_major[[0, 2, 4, 5, 7, 9, 11]] == pytest.approx([2 / 8] + [1 / 8] * 6)
    d_major = degree_histogram(piece(*((i, 1, 62 + step) for i, step in enumerate(scale))))
    assert d_major == pytest.approx(c_major)


@given(
    st.lists(
        st.tuples(st.integers(0, 24), st.integers(1, 12), st.integers(50, 75)),
        max_size=25,
        unique_by=lambda note: (note[0], note[2]),
    )
)
@settings(max_examples=60, deadline=None)
def test_harmony_is_every_pair_of_notes_that_sound_when_the_later_one_begins(
    notes: list[tuple[int, int, int]],
) -> None:
    """Against a loop over all pairs."""
    counts = np.zeros(7)
    for first, second in combinations(sorted(notes), 2):
        if first[0] + first[1] > second[0]:
            distance = (first[2] - second[2]) % 12
            counts[min(distance, 12 - distance)] += 1
    found = harmonic_interval_histogram(piece(*((onset / 4, length / 4, pitch) for onset, length, pitch in notes)))
    if counts.sum():
        assert found == pytest.approx(counts / counts.sum())
    else:
        assert np.isnan(found).all()


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_no_feature_knows_the_key(steps: int) -> None:
    chance = random.Random(0)
    score = melody([[60 + chance.choice((0, 2, 4, 5, 7, 9, 11)) for _ in range(4)] for _ in range(20)]).score
    before, after = measure_with(JUDGED, [score]), measure_with(JUDGED, [score.shift_pitch(steps)])
    for name in JUDGED:
        np.testing.assert_allclose(before[name], after[name], atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", JUDGED)
def test_an_empty_score_is_undefined_and_one_note_is_not_an_error(name: str) -> None:
    assert np.isnan(JUDGED[name](Piece(Score(QUARTER)))).all()
    JUDGED[name](piece((3.99, 1, 60)))


@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
@settings(max_examples=20, deadline=None)
def test_what_features_share_changes_none_of_them(seed: int, bars: int, drums: bool) -> None:
    """In any order, and each from a piece of its own."""
    score: ScoreTick = make_score(seed, bars=bars, drums=drums)
    names = list(JUDGED)
    random.Random(seed).shuffle(names)
    together = measure_with({name: JUDGED[name] for name in names}, [score])
    for name in names:
        feature: Feature = JUDGED[name]
        np.testing.assert_array_equal(together[name][0], np.atleast_1d(feature(Piece(score))), err_msg=name)
