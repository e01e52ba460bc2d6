"""Features of music whose values can be worked out by hand, and of edge cases."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.evaluation import features
from midimamba.evaluation.features import HISTOGRAMS, LENGTHS, NUMBERS, Piece, bar_self_similarity, measure, opening
from midimamba.tokenization.musical_time import bar_starts
from support import make_score

QUARTER = 480
BAR = 4 * QUARTER


def piece(*notes: tuple[float, float, int], meter: tuple[int, int] = (4, 4), drums: bool = False) -> ScoreTick:
    """Notes with onset and duration in quarters, and a pitch, at 120 quarters per minute."""
    score = Score(QUARTER)
    score.tempos.append(Tempo(0, 120.0))
    score.time_signatures.append(TimeSignature(0, *meter))
    track = Track(is_drum=drums)
    for onset, duration, pitch in notes:
        track.notes.append(Note(int(onset * QUARTER), int(duration * QUARTER), pitch, 80))
    score.tracks.append(track)
    return score


def melody(bars: list[list[int]]) -> ScoreTick:
    """Four quarter notes per bar."""
    return piece(*((4 * bar + beat, 1, pitch) for bar, line in enumerate(bars) for beat, pitch in enumerate(line)))


def tune(bars: int, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[60 + chance.choice((0, 2, 4, 5, 7, 9, 11)) for _ in range(4)] for _ in range(bars)]


def values(score: ScoreTick) -> dict[str, np.ndarray]:
    return {name: rows[0] for name, rows in measure([score]).items()}


def changed(before: ScoreTick, after: ScoreTick) -> set[str]:
    old, new = values(before), values(after)
    return {name for name in old if not np.allclose(old[name], new[name], equal_nan=True, atol=1e-9)}


def test_pitch_classes_are_counted_over_octaves() -> None:
    score = piece((0, 1, 60), (1, 1, 72), (2, 1, 67), (3, 1, 66))
    shares = features.pitch_class_histogram(Piece(score))
    assert shares[[0, 6, 7]] == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    assert features.pitch_class_entropy(Piece(score)) == pytest.approx(1.5)
    assert features.scale_consistency(Piece(score)) == pytest.approx(1)  # G major has C, F sharp and G
    chromatic = piece(*((i, 1, 60 + i) for i in range(12)))
    assert features.pitch_class_entropy(Piece(chromatic)) == pytest.approx(math.log2(12))
    assert features.scale_consistency(Piece(chromatic)) == pytest.approx(7 / 12)


def test_polyphony_counts_only_the_time_in_which_something_sounds() -> None:
    # Two notes for a quarter, one for another; then silence; then one for a quarter.
    assert features.polyphony(Piece(piece((0, 2, 60), (1, 1, 64), (5, 1, 67)))) == pytest.approx(4 / 3)
    assert features.polyphony(Piece(piece((0, 4, 60), (1, 1, 64), (2, 1, 64)))) == pytest.approx(6 / 4)


def test_polyphony_agrees_with_counting_on_a_fine_grid() -> None:
    score = make_score(3, drums=False)
    counts = np.zeros(score.end())
    for track in score.tracks:
        for note in track.notes:
            counts[note.time : note.end] += 1
    assert features.polyphony(Piece(score)) == pytest.approx(counts.sum() / (counts > 0).sum())


def test_density_is_per_second_and_per_bar() -> None:
    score = piece(*((i / 2, 0.5, 60) for i in range(16)))  # two bars of quavers in four seconds
    assert features.notes_per_second(Piece(score)) == pytest.approx(4)
    assert features.notes_per_bar(Piece(score)) == pytest.approx(8)
    score.tempos[0] = Tempo(0, 60.0)
    assert features.notes_per_second(Piece(score)) == pytest.approx(2)
    waltz = piece(*((i / 2, 0.5, 60) for i in range(12)), meter=(3, 4))
    assert features.notes_per_bar(Piece(waltz)) == pytest.approx(6)


def test_lengths_are_rounded_to_the_closest_one() -> None:
    score = piece((0, 1, 60), (1, 0.97, 60), (2, 0.5, 60), (2.5, 30, 60))
    durations = dict(zip(LENGTHS.tolist(), features.duration_histogram(Piece(score)), strict=True))
    assert (durations[1], durations[0.5], durations[8]) == pytest.approx((1 / 2, 1 / 4, 1 / 4))
    intervals = dict(zip(LENGTHS.tolist(), features.onset_interval_histogram(Piece(score)), strict=True))
    assert (intervals[1], intervals[0.5]) == pytest.approx((2 / 3, 1 / 3))


def test_groove_is_one_minus_the_hamming_distance_of_adjacent_bars() -> None:
    four = [(beat, 0.25, 60) for beat in range(4)]
    assert features.groove_consistency(Piece(piece(*four, *((4 + b, d, p) for b, d, p in four)))) == pytest.approx(1)
    # The second bar has none of the four onsets and one other: 5 of 16 positions differ.
    assert features.groove_consistency(Piece(piece(*four, (4.5, 1, 60)))) == pytest.approx(11 / 16)
    # An onset that is a sixteenth late is at another position, one that is a little late is not.
    assert features.groove_consistency(Piece(piece((0, 1, 60), (4.1, 1, 60)))) == pytest.approx(1)
    assert features.groove_consistency(Piece(piece((0, 1, 60), (3.95, 1, 60)))) == pytest.approx(1)
    assert features.groove_consistency(Piece(piece((0, 1, 60), (4.25, 1, 60)))) == pytest.approx(14 / 16)
    assert features.groove_consistency(Piece(piece((0, 1, 60), (3.25, 1, 60), meter=(3, 4)))) == pytest.approx(10 / 12)


def test_groove_agrees_with_its_definition() -> None:
    score = make_score(5)
    starts = bar_starts(score)
    grids = [np.zeros(20, bool) for _ in starts]
    for track in score.tracks:
        for note in track.notes:
            bar = int(np.searchsorted(starts, note.time + 60, side="right")) - 1
            grids[bar][int((note.time + 60 - starts[bar]) // 120)] = True
    bars = [bar for bar, grid in enumerate(grids) if grid.any()]
    lengths = np.diff(starts, append=2 * starts[-1] - starts[-2]) / 120
    scores = [1 - (grids[b] ^ grids[b + 1]).sum() / max(lengths[b], lengths[b + 1]) for b in range(bars[0], bars[-1])]
    assert features.groove_consistency(Piece(score)) == pytest.approx(np.mean(scores))


def test_beats_are_empty_where_nothing_sounds() -> None:
    assert features.empty_beat_rate(Piece(piece((2, 1, 60), (4.5, 0.25, 60), (6, 2, 60)))) == pytest.approx(2 / 6)
    assert features.empty_beat_rate(Piece(piece((0, 8, 60), (1, 1, 60)))) == 0


def test_bars_are_similar_where_they_repeat() -> None:
    theme = tune(4)
    assert bar_self_similarity(Piece(melody(theme * 5)), 4) == pytest.approx(1)
    assert bar_self_similarity(Piece(melody(theme * 5)), 8) == pytest.approx(1)
    assert bar_self_similarity(Piece(melody(tune(20))), 4) < 0.5
    assert math.isnan(bar_self_similarity(Piece(melody(theme)), 4))
    # A bar like the first, a bar with one of its four notes, a silent bar.
    line = [60, 62, 64, 65]
    score = melody([line, line, [60, 61, 63, 66], [], line])
    assert bar_self_similarity(Piece(score), 1) == pytest.approx((1 + 1 / 4 + 0 + 0) / 4)


def test_self_similarity_agrees_with_the_whole_matrix() -> None:
    score = make_score(2, bars=14)
    starts = bar_starts(score)
    grid = np.zeros((len(starts), 20, 12))
    for track in score.tracks:
        for note in track.notes if not track.is_drum else []:
            bar = int(np.searchsorted(starts, note.time + 60, side="right")) - 1
            grid[bar, int((note.time + 60 - starts[bar]) // 120), note.pitch % 12] += 1
    rows = grid.reshape(len(grid), -1)
    audible = np.flatnonzero(rows.any(axis=1))
    rows = rows[audible[0] : audible[-1] + 1]
    cosines = [
        a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-9)
        for a, b in zip(rows[:-4], rows[4:], strict=True)
        if a.any() or b.any()
    ]
    assert bar_self_similarity(Piece(score), 4) == pytest.approx(np.mean(cosines))


def test_key_is_stable_until_the_music_modulates() -> None:
    c_major = [[60, 64, 67, 72], [65, 69, 72, 65], [67, 71, 74, 67], [60, 64, 67, 60]] * 3
    up = [[pitch + 6 for pitch in line] for line in c_major]
    assert features.key_stability(Piece(melody(c_major))) == 1
    assert 0.4 < features.key_stability(Piece(melody(c_major * 2 + up))) < 0.8
    assert math.isnan(features.key_stability(Piece(melody(c_major[:3]))))


def test_meter_stability_is_weighted_by_time() -> None:
    score = piece((0, 1, 60), (9, 1, 60))
    score.time_signatures.append(TimeSignature(8 * QUARTER, 3, 4))
    assert features.meter_stability(Piece(score)) == pytest.approx(0.8)
    assert features.meter_stability(Piece(piece((0, 1, 60)))) == 1


@pytest.mark.parametrize("name", [*NUMBERS, *HISTOGRAMS])
def test_an_empty_score_is_undefined_and_one_note_is_not_an_error(name: str) -> None:
    functions: dict[str, Callable[[Piece], Any]] = {**NUMBERS, **HISTOGRAMS}
    function = functions[name]
    empty_track = Score(QUARTER)
    empty_track.tracks.append(Track())
    for score in (Score(QUARTER), empty_track):
        assert np.isnan(function(Piece(score))).all()
    for score in (piece((0, 0, 60)), piece((3.99, 1, 60)), piece((7, 1, 127), meter=(2, 4))):
        function(Piece(score))


def test_drums_have_rhythm_but_no_pitch() -> None:
    found = values(piece(*((i / 2, 0.5, 36 + i % 3) for i in range(200)), drums=True))
    rhythm = {"notes_per_second", "notes_per_bar", "groove_consistency", "empty_beat_rate", "meter_stability"}
    assert {name for name in found if not np.isnan(found[name]).any()} == rhythm | {"onset_interval_histogram"}
    both = melody(tune(20))
    with_drums = both.copy()
    with_drums.tracks.append(piece(*((i + 0.25, 0.25, 40) for i in range(80)), drums=True).tracks[0])
    assert changed(both, with_drums) == {"notes_per_second", "notes_per_bar", "onset_interval_histogram"}


def test_transposing_changes_only_the_pitch_classes() -> None:
    score = melody(tune(20))
    assert changed(score, score.shift_pitch(1)) == {"pitch_class_histogram"}
    assert changed(score, score.shift_pitch(12)) == set()


def test_shuffling_bars_changes_only_structure() -> None:
    bars = tune(4, 1) * 3 + tune(4, 2) * 3
    shuffled = random.Random(0).sample(bars, len(bars))
    moved = changed(melody(bars), melody(shuffled))
    assert moved == {"bar_self_similarity_4", "bar_self_similarity_8", "bar_self_similarity_16", "key_stability"}
    assert bar_self_similarity(Piece(melody(shuffled)), 4) < bar_self_similarity(Piece(melody(bars)), 4)


def test_shuffling_pitches_keeps_rhythm_and_pitch_classes() -> None:
    bars = tune(4) * 6
    pitches = random.Random(0).sample([pitch for line in bars for pitch in line], 4 * len(bars))
    moved = changed(melody(bars), melody([pitches[i : i + 4] for i in range(0, len(pitches), 4)]))
    assert {"bar_self_similarity_4", "bar_self_similarity_8"} <= moved
    assert not moved - {f"bar_self_similarity_{lag}" for lag in (4, 8, 16)} - {"key_stability"}


def test_truncating_keeps_density_and_loses_long_range_structure() -> None:
    score = melody(tune(4) * 6)
    moved = changed(score, opening(score, 12))
    assert moved == {"bar_self_similarity_16"}
    assert math.isnan(bar_self_similarity(Piece(opening(score, 12)), 16))


def test_an_opening_has_the_notes_of_its_bars_at_their_full_length() -> None:
    score = piece((0, 1, 60), (2.5, 9, 64), (3, 1, 67), meter=(3, 4))
    (track,) = opening(score, 1).tracks
    assert [(note.time, note.duration, note.pitch) for note in track.notes] == [
        (0, QUARTER, 60),
        (1200, 9 * QUARTER, 64),
    ]
    assert opening(score, 100).note_num() == 3


def test_features_do_not_depend_on_the_order_of_notes_and_tracks() -> None:
    score = make_score(4, bars=12)
    other: Any = score.copy()
    other.tracks = list(reversed(other.tracks))
    for track in other.tracks:
        track.notes = random.Random(0).sample(list(track.notes), len(track.notes))
    assert changed(score, other) == set()
