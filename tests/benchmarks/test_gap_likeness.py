"""How alike the bars of a gap are, on tunes whose figures can be worked out by hand."""

import importlib
from types import ModuleType

import numpy as np
import pytest
from symusic import Note, Score, TimeSignature, Track
from symusic.core import ScoreTick


@pytest.fixture(scope="module")
def gaps() -> ModuleType:
    return importlib.import_module("gap_likeness")


def tune(*bars: list[tuple[int, int]]) -> ScoreTick:
    """Bars of 4/4, each with notes as (quarter, pitch)."""
    score = Score(480)
    score.time_signatures.append(TimeSignature(0, 4, 4))
    notes = [Note(480 * (4 * bar + at), 480, pitch, 80) for bar, some in enumerate(bars) for at, pitch in some]
    score.tracks.append(Track())
    score.tracks[0].notes.extend(notes)
    return score


A, B = [(0, 60), (1, 64), (2, 67), (3, 60)], [(0, 62), (2, 65)]


def test_the_piece_itself_is_alike_in_every_way(gaps: ModuleType) -> None:
    real, gap = gaps.cells_of(tune(A, B, A, B, A)), gaps.Gap(1, 3)
    assert gaps.likeness(real, gaps.within(real, gap), gap) == pytest.approx(dict.fromkeys(gaps.LIKENESSES, 1.0))


def test_shared_areas_are_those_of_the_histograms(gaps: ModuleType) -> None:
    real, gap = gaps.cells_of(tune(B, A, B)), gaps.Gap(1, 2)
    other = gaps.within(gaps.cells_of(tune(B, [(0, 72), (1, 61)], B)), gap)
    found = gaps.likeness(real, other, gap)
    assert found["pitch_classes"] == pytest.approx(0.5)  # C has half of the true notes, and half of the others
    assert found["onset_rhythm"] == pytest.approx(0.5)  # two of four onsets, with a quarter of the true notes each


def test_bars_that_return_are_missed_where_other_bars_stand(gaps: ModuleType) -> None:
    real, gap = gaps.cells_of(tune(A, B, A, B, A)), gaps.Gap(2, 3)
    wrong = gaps.within(gaps.cells_of(tune(A, B, B, B, A)), gap)
    # Two bars before and after: A is wholly like A, and B is not like it at all.
    assert gaps.likeness(real, wrong, gap)["self_similarity"] == pytest.approx(0.0)


def test_silence_is_like_nothing(gaps: ModuleType) -> None:
    real, gap = gaps.cells_of(tune(A, B, A)), gaps.Gap(1, 2)
    assert gaps.likeness(real, real[:0], gap) == dict.fromkeys(gaps.LIKENESSES, 0.0)


def test_the_bar_before_is_copied_into_every_bar(gaps: ModuleType) -> None:
    real, gap = gaps.cells_of(tune(A, B, A, A)), gaps.Gap(2, 4)
    expected = gaps.cells_of(tune(A, B, B, B))
    assert np.array_equal(gaps.copied(real, gap), expected[expected[:, 0] >= 2])
