"""Pieces with as many tracks and notes as the limits allow are encoded in time, and as MidiTok encodes them."""

import random
import time

import pytest
from miditok import MusicTokenizer
from symusic import Note, Score, Tempo, Track
from symusic.core import ScoreTick

from midimamba.tokenization.ingest import MAX_NOTES, MAX_TRACKS, MidiRefusedError, check_score
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, normalize_score


def long_score(tracks: int, notes: int, bars: int = 100, tempos: int = 0) -> ScoreTick:
    rng = random.Random(0)
    score = Score(480)
    for index in range(tracks):
        track = Track(program=rng.randrange(128), is_drum=index % 10 == 9)
        for _ in range(notes):
            track.notes.append(Note(rng.randrange(0, 1920 * bars, 60), 240, rng.randrange(30, 90), 80))
        score.tracks.append(track)
    for index in range(tempos):
        score.tempos.append(Tempo(index * 480, 60 + index % 90))
    return check_score(score)


@pytest.mark.parametrize("name", ["REMI", "TSD", "MIDILike", "MMM"])
def test_many_tracks_take_linear_time_and_have_miditoks_ids(name: str) -> None:
    tokenizer = build_tokenizer(name)
    score = long_score(40, 30, tempos=20)
    plain: MusicTokenizer = build_tokenizer(name)
    assert base_ids(tokenizer, score) == plain.encode(normalize_score(plain, score), encode_ids=False).ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MIDILike", "MMM"])
def test_the_most_notes_on_the_most_tracks_take_seconds(name: str) -> None:
    tokenizer = build_tokenizer(name)
    score = long_score(MAX_TRACKS, MAX_NOTES // MAX_TRACKS)
    start = time.process_time()
    base_ids(tokenizer, score)
    assert time.process_time() - start < 5  # 1 to 2 seconds; 17 to 50 as MidiTok does it


def test_mmm_refuses_what_it_would_repeat_in_too_many_tracks() -> None:
    with pytest.raises(MidiRefusedError, match="MMM repeats 10,000 bars and changes of tempo and meter in each of"):
        base_ids(build_tokenizer("MMM"), long_score(200, 100, bars=10_000))
