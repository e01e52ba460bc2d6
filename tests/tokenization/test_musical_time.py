"""Meters, bars, tempos and keys, against counting by hand and against `numpy.corrcoef`."""

import numpy as np
import pytest
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.tokenization.musical_time import (
    _PROFILES,
    KEYS,
    bar_starts,
    best_keys,
    count_bars,
    mean_tempo,
    meter_spans,
    meters,
)
from support import make_score

QUARTER = 480


def scored(end: int, signatures: tuple[tuple[int, int, int], ...] = ()) -> ScoreTick:
    """One note up to tick `end`, under these meters."""
    score, track = Score(QUARTER), Track(program=0)
    track.notes.append(Note(0, end, 60, 64))
    score.tracks.append(track)
    score.time_signatures.extend([TimeSignature(*signature) for signature in signatures])
    return score


def test_it_is_four_four_until_midi_says_something() -> None:
    assert meters(scored(10)) == [(0, 4, 4)]
    assert meters(scored(10, ((960, 3, 4), (0, 6, 8)))) == [(0, 6, 8), (960, 3, 4)]
    assert meters(scored(10, ((960, 3, 4),))) == [(0, 4, 4), (960, 3, 4)]
    assert [str(meter) for meter in meters(scored(10, ((960, 3, 4),)))] == ["4/4", "3/4"]


def test_spans_add_up_to_the_end_and_end_there() -> None:
    score = scored(10_000, ((0, 3, 4), (1440, 6, 8), (9000, 4, 4)))
    assert [span for _, span in meter_spans(score, 5000)] == [1440, 3560, 0]
    for end in (1, 1440, 9001):
        assert sum(span for _, span in meter_spans(score, end)) == end


@pytest.mark.parametrize(
    ("end", "signatures", "starts"),
    [
        (1920, (), [0, 1920]),
        (1921, (), [0, 1920, 3840]),
        (2000, ((0, 3, 8),), [0, 720, 1440, 2160]),
        (3000, ((1000, 2, 4),), [0, 1000, 1960, 2920, 3880]),  # a change of meter starts a bar
        (3000, ((0, 4, 4), (0, 2, 4)), [0, 960, 1920, 2880, 3840]),  # the last of two at one tick counts
    ],
)
def test_bars_start_where_the_meter_says(
    end: int, signatures: tuple[tuple[int, int, int], ...], starts: list[int]
) -> None:
    assert bar_starts(scored(end, signatures)).tolist() == starts


@pytest.mark.parametrize("seed", range(5))
def test_counting_bars_is_counting_their_starts(seed: int) -> None:
    score = make_score(seed, bars=7)
    starts = bar_starts(score)
    assert starts[-1] >= score.end() > starts[-2]
    for end in (1, *starts[1:-1].astype(int), *(starts[1:-1].astype(int) + 1)):
        assert count_bars(score, int(end)) == np.sum(starts < end)


def test_the_mean_tempo_is_quarters_by_minutes() -> None:
    score = scored(4 * QUARTER)
    assert mean_tempo(score, 4 * QUARTER) == 120
    score.tempos.append(Tempo(2 * QUARTER, 60.0))
    assert mean_tempo(score, 4 * QUARTER) == pytest.approx(4 / (2 / 120 + 2 / 60))


def test_the_best_key_is_that_of_the_highest_correlation() -> None:
    weights = np.random.default_rng(0).exponential(size=(50, 12))
    expected = [np.corrcoef([row, *_PROFILES])[0, 1:].argmax() for row in weights]
    assert best_keys(weights).tolist() == expected
    assert best_keys(_PROFILES).tolist() == list(range(24))
    assert KEYS[best_keys(np.eye(12)[:1])[0]] == "C-major"


def test_weights_that_are_all_alike_have_no_key() -> None:
    assert best_keys(np.array([np.ones(12), np.zeros(12), np.arange(12.0)])).shape == (1,)


def test_a_meter_after_the_last_note_ends_the_last_bar_and_begins_none() -> None:
    later = scored(100, ((0, 4, 4), (4 * QUARTER, 15, 16), (40 * QUARTER, 2, 4)))
    del later.time_signatures[0]
    # symusic counts meters as part of a piece, so that bars go on up to the last of them.
    assert bar_starts(later)[:2].tolist() == [0, 4 * QUARTER]
    assert bar_starts(later)[-1] == 40 * QUARTER
    at_end = scored(4 * QUARTER, ((4 * QUARTER, 15, 16),))
    assert bar_starts(at_end).tolist() == [0, 4 * QUARTER]
