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


def seconds(name: str, score: ScoreTick) -> float:
    """The shorter of two runs: another process on the machine makes some slower."""
    tokenizer = build_tokenizer(name)
    took = []
    for _ in range(2):
        start = time.process_time()
        base_ids(tokenizer, score)
        took.append(time.process_time() - start)
    return min(took)


@pytest.mark.slow
def test_the_most_notes_on_the_most_tracks_take_no_longer_than_where_nothing_is_inserted() -> None:
    """MIDILike and MMM take 1.2 to 1.5 times as long as TSD, and 5.6 to 6.7 times as MidiTok does it."""
    score = long_score(MAX_TRACKS, MAX_NOTES // MAX_TRACKS)
    least = seconds("TSD", score)
    assert {name: seconds(name, score) / least < 3 for name in ("MIDILike", "MMM")} == {"MIDILike": True, "MMM": True}


def test_mmm_refuses_what_it_would_repeat_in_too_many_tracks() -> None:
    with pytest.raises(MidiRefusedError, match="MMM repeats 10,000 bars and changes of tempo and meter in each of"):
        base_ids(build_tokenizer("MMM"), long_score(200, 100, bars=10_000))
