"""Copies are found whatever their key, tempo and place, and they are those that brute force finds."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from symusic import Note, Score, Track
from symusic.core import ScoreTick

from midimamba.evaluation.copying import CopyRate, Melodies, RunIndex, copied_share, longest_copies
from support import make_score

QUARTER = 480


def random_melody(notes: int, seed: int, pitches: int = 5, program: int = 0) -> ScoreTick:
    chance = random.Random(seed)
    score, time = Score(QUARTER), 0
    track = Track(program=program)
    for _ in range(notes):
        track.notes.append(Note(time, QUARTER // 2, 60 + chance.randrange(pitches), 80))
        time += chance.choice((QUARTER // 2, QUARTER))
    score.tracks.append(track)
    return score


def steps(score: ScoreTick) -> list[tuple[int, int]]:
    """The melody of a score with one voice."""
    notes = sorted((note.time, note.pitch) for track in score.tracks for note in track.notes)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(notes)]


def runs(score: ScoreTick, notes: int) -> list[tuple[tuple[int, int], ...]]:
    own = steps(score)
    return [tuple(own[i : i + notes - 1]) for i in range(len(own) - notes + 2)]


def share(sample: ScoreTick, training: list[ScoreTick], notes: int) -> float:
    return copied_share(Melodies([sample]).runs(notes), np.unique(Melodies(training).runs(notes)))


@pytest.mark.parametrize("notes", [2, 3, 4, 5, 8, 9])
def test_shares_and_longest_runs_are_those_of_brute_force(notes: int) -> None:
    training = [random_melody(60, seed, pitches=3) for seed in range(5)]
    samples = [random_melody(40, seed, pitches=3) for seed in range(10, 16)]
    known = {run for score in training for run in runs(score, notes)}
    for sample in samples:
        expected = np.mean([run in known for run in runs(sample, notes)])
        assert share(sample, training, notes) == pytest.approx(expected)
    longest = [
        max(n for n in range(1, 41) if n == 1 or any(set(runs(s, n)) & set(runs(t, n)) for t in training))
        for s in samples
    ]
    assert max(longest) > 5
    assert longest_copies([Melodies([sample]) for sample in samples], Melodies(training)) == longest


def test_copies_are_found_in_any_key_at_any_tempo_and_from_any_bar() -> None:
    training = [random_melody(60, seed, pitches=40) for seed in range(4)]
    training[2].tracks.append(random_melody(30, 9, program=40).tracks[0])
    copy = Score(960)
    for track in training[2].tracks:
        later = Track(program=track.program, is_drum=track.is_drum)
        for note in track.notes:  # at twice the resolution
            later.notes.append(Note(2 * note.time + 3840, note.duration, note.pitch, 1))
        copy.tracks.append(later)
    whole = Melodies(training)
    for sample in (training[1], training[1].shift_pitch(-1, inplace=False), copy):
        assert share(sample, training, 8) == 1
        melodies = Melodies([sample])
        assert longest_copies([melodies], whole) == [melodies.longest]
    assert share(random_melody(60, 99, pitches=40), training, 8) == 0


def test_an_excerpt_is_a_copy_of_its_own_length() -> None:
    training, stranger = random_melody(100, 1, pitches=40), random_melody(50, 2, pitches=40)
    sample = stranger.copy()
    end = sample.end() + 7 * QUARTER
    for note in list(training.tracks[0].notes)[30:60]:
        sample.tracks[0].notes.append(Note(note.time + end, 10, note.pitch - 7, 3))
    assert longest_copies([Melodies([sample])], Melodies([training])) == [30]
    assert share(sample, [training], 12) == pytest.approx(19 / 69)


def test_duplicating_the_training_set_changes_nothing_and_shuffling_notes_does() -> None:
    training = [random_melody(80, seed) for seed in range(3)]
    assert share(training[0], training * 3, 8) == 1
    shuffled = training[0].copy()
    pitches = random.Random(0).sample([note.pitch for note in shuffled.tracks[0].notes], 80)
    for note, pitch in zip(shuffled.tracks[0].notes, pitches, strict=True):
        note.pitch = pitch
    assert share(shuffled, training, 8) < 0.1


def test_no_run_extends_from_one_melody_into_the_next() -> None:
    first, second = random_melody(10, 1, pitches=40), random_melody(10, 2, pitches=40)
    joined = first.copy()
    offset = first.end() + QUARTER
    for note in second.tracks[0].notes:
        joined.tracks[0].notes.append(Note(note.time + offset, note.duration, note.pitch, note.velocity))
    assert longest_copies([Melodies([joined])], Melodies([first, second])) == [10]
    two_programs = first.copy()
    two_programs.tracks.append(random_melody(10, 2, pitches=40, program=40).tracks[0])
    assert Melodies([two_programs]).longest == 10
    assert len(Melodies([first, second]).runs(10)) == 2


def test_music_that_is_too_short_or_silent_has_no_share() -> None:
    training = Melodies([random_melody(30, 0)])
    drums = make_score(0, programs=())
    for score, longest in ((Score(QUARTER), 0), (drums, 0), (random_melody(1, 0), 1)):
        assert np.isnan(copied_share(Melodies([score]).runs(8), np.unique(training.runs(8))))
        assert longest_copies([Melodies([score])], training) == [longest]
    assert longest_copies([training], Melodies([])) == [0]
    assert longest_copies([], training) == []


def test_the_copy_rate_is_the_share_of_ngrams_that_the_training_music_contains() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(3, (20, 12), generator=generator).tolist()
    samples = [*torch.randint(3, (30, 10), generator=generator).tolist(), blocks[3]]
    known = {tuple(row[i : i + 4]) for row in blocks for i in range(9)}
    grams = [tuple(row[i : i + 4]) for row in samples for i in range(len(row) - 3)]
    rate = CopyRate([{"input_ids": row} for row in blocks], n=4)
    assert rate(samples) == pytest.approx(sum(gram in known for gram in grams) / len(grams))
    assert rate(blocks) == 1.0
    assert rate([[1, 2]]) == 0.0


def test_at_most_the_allowed_number_of_ngrams_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midimamba.evaluation.copying.MAX_NGRAMS", 20)
    blocks = [{"input_ids": list(range(10 * i, 10 * i + 10))} for i in range(100)]
    rate = CopyRate(blocks, n=6)
    assert 0 < len(rate.known) <= 20
    assert rate([blocks[0]["input_ids"]]) == 1.0
    assert rate([blocks[1]["input_ids"]]) == 0.0


def test_the_longest_copy_of_tokens_is_that_of_brute_force() -> None:
    chance = random.Random(0)
    training = [[chance.randrange(3) for _ in range(40)] for _ in range(4)]
    samples = [[chance.randrange(3) for _ in range(30)] for _ in range(6)]

    def runs_of(rows: list[list[int]], length: int) -> set[tuple[int, ...]]:
        return {tuple(row[i : i + length]) for row in rows for i in range(len(row) - length + 1)}

    expected = [
        max(length for length in range(1, 31) if runs_of([row], length) & runs_of(training, length)) for row in samples
    ]
    assert max(expected) > 3
    assert longest_copies([RunIndex([row]) for row in samples], RunIndex(training)) == expected


def test_token_zero_does_not_end_a_sequence() -> None:
    assert len(RunIndex([[0, 0, 0, 0]]).runs(3)) == 2
    assert len(RunIndex([[0, 0], [0, 0]]).runs(3)) == 0
