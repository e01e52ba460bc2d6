import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import Note, Score, Track
from symusic.core import ScoreTick

from midimamba.tokenization.choices import ONE_STREAM
from midimamba.tokenization.normalization import normalize_score, settle_notes
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer, encode_normalized
from midimamba.tokenization.voices import limit_voices, most_voices
from support import TICKS_PER_QUARTER, make_score

# One note: (onset, duration, pitch).
NOTES = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 8), st.integers(60, 66)), max_size=12)
DRUMS = 2  # of the tracks below, the one of drums


def piece(*tracks: list[tuple[int, int, int]]) -> ScoreTick:
    score = Score(12)
    for index, notes in enumerate(tracks):
        track = Track(program=0 if index == DRUMS else 10 * index, is_drum=index == DRUMS)
        track.notes.extend([Note(*note, 80) for note in sorted(notes)])
        score.tracks.append(track)
    return score


def played(score: ScoreTick) -> list[list[tuple[int, ...]]]:
    """Onset, pitch, velocity and end of every note, track by track."""
    return [sorted((note.time, note.pitch, note.velocity, note.end) for note in t.notes) for t in score.tracks]


def ended_slowly(new: ScoreTick, voices: int, prompt: ScoreTick) -> list[list[tuple[int, ...]]]:
    """The rule once more: from tick to tick, all notes looked at."""
    notes: list[dict[str, Any]] = [
        {"onset": note.time, "end": note.end, "pitch": note.pitch, "track": index, "place": place, "new": score is new}
        for score in (new, prompt)
        for index, track in enumerate(score.tracks)
        for place, note in enumerate(track.notes)
    ]
    pitched = [note for note in notes if note["track"] != DRUMS]
    for tick in range(max((note["end"] for note in notes), default=0)):
        begin = [note for note in pitched if note["onset"] == tick]
        held = [note for note in pitched if note["onset"] < tick < note["end"]]
        may_end = sorted(
            (note for note in held if note["new"]), key=lambda n: (n["onset"], n["pitch"], n["track"], n["place"])
        )
        for note in may_end[: max(len(held) + len(begin) - voices, 0)] if begin else []:
            note["end"] = tick
    return [
        sorted((n["onset"], n["pitch"], 80, n["end"]) for n in notes if n["new"] and n["track"] == index)
        for index in range(len(new.tracks))
    ]


def test_most_voices_counts_the_notes_that_sound_at_once() -> None:
    assert most_voices(piece([(0, 4, 60), (4, 4, 60), (8, 4, 62)])) == 1  # the end of one, the start of another
    assert most_voices(piece([(0, 16, 48), (4, 8, 60)], [(8, 8, 64), (12, 4, 67)])) == 3
    assert most_voices(piece([], [], [(0, 4, 36), (0, 4, 38)])) == 0  # drums
    chance = random.Random(0)
    notes = [(chance.randrange(40), chance.randrange(1, 9), 60 + voice) for voice in range(30)]
    sounding = [sum(onset <= tick < onset + length for onset, length, _ in notes) for tick in range(60)]
    assert most_voices(piece(notes)) == max(sounding)


@given(st.tuples(NOTES, NOTES, NOTES), st.tuples(NOTES, NOTES, NOTES), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_note_that_began_first_ends_where_there_is_no_voice_left(new: Any, prompt: Any, voices: int) -> None:
    limited, beside = piece(*new), piece(*prompt)
    limit_voices(limited, voices, beside)
    assert played(limited) == ended_slowly(piece(*new), voices, piece(*prompt))
    assert played(beside) == played(piece(*prompt))
    assert all(list(track.notes) == list(track.copy().notes.sort()) for track in limited.tracks)


@given(st.tuples(NOTES, NOTES, NOTES), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_no_more_voices_sound_than_allowed_and_only_ends_change(tracks: Any, voices: int) -> None:
    before, after = piece(*tracks), piece(*tracks)
    limit_voices(after, voices)
    at_one_tick = max((sum(n[0] == tick for part in tracks[:DRUMS] for n in part) for tick in range(13)), default=0)
    assert most_voices(after) <= max(voices, at_one_tick)
    for old, new in zip(played(before), played(after), strict=True):
        assert [note[:3] for note in old] == [note[:3] for note in new]
    assert all(note.duration > 0 for track in after.tracks for note in track.notes)
    assert played(after)[DRUMS] == played(before)[DRUMS]
    if most_voices(before) <= voices:
        assert played(after) == played(before)


def test_of_notes_that_began_together_the_lowest_ends_first() -> None:
    score = piece([(0, 12, 67), (0, 12, 60)], [(0, 12, 60), (6, 2, 72), (8, 2, 74)])
    limit_voices(score, 3)
    # 72 ends as 74 begins, so only one voice is taken away: in the first track.
    assert played(score)[0] == [(0, 60, 80, 6), (0, 67, 80, 12)]
    assert played(score)[1] == [(0, 60, 80, 12), (6, 72, 80, 8), (8, 74, 80, 10)]


@pytest.mark.parametrize("name", ONE_STREAM)
def test_voices_are_counted_as_the_ids_have_them(name: str) -> None:
    tokenizer = build_tokenizer(name)
    for seed in range(6):
        score = make_score(seed, programs=(0, 0, 40))
        for track in score.tracks:  # some are so long that they are written as tied notes
            for note in track.notes[::5]:
                note.duration *= 9
        written = normalize_score(tokenizer, score)
        ids = encode_normalized(tokenizer, written)
        settle_notes(tokenizer, written)
        assert most_voices(written) == most_voices(MidiProcessor(tokenizer).decode(ids)) > 3


def test_new_music_is_limited_and_given_ids_and_prompts_stay_as_they_are() -> None:
    beat, tokenizer = TICKS_PER_QUARTER, build_tokenizer()
    processor, free = MidiProcessor(tokenizer, voices=2), MidiProcessor(tokenizer)
    chord = [Note(0, 8 * beat, 40, 80), *(Note(0, 4 * beat, pitch, 80) for pitch in (44, 47, 50))]
    added = [*(Note(4 * beat, 4 * beat, pitch, 80) for pitch in (60, 64)), Note(5 * beat, beat, 67, 80)]

    def score(notes: list[Note]) -> ScoreTick:
        made = Score(beat)
        made.tracks.append(Track("organ", 19, notes=notes))
        return made

    prompt = score(chord)
    ids = processor.encode(score(chord + added))
    assert most_voices(processor.decode(ids)) == 4
    assert played(processor.decode(ids)) == played(free.decode(ids)) == played(free.continue_score(None, ids))
    [found] = processor.continue_score(prompt, ids).tracks
    velocity = next(note.velocity for note in free.decode(ids).tracks[0].notes)
    kept = sorted((note.time, note.pitch, 80, note.end) for note in chord)
    [notes] = played(processor.continue_score(prompt, ids))
    assert (found.name, notes[:4]) == ("organ", kept)
    # The prompt holds one of two voices, and three notes more want to sound.
    new = [(4, 60, 5), (4, 64, 5), (5, 67, 6)]
    assert notes[4:] == [(onset * beat, pitch, velocity, end * beat) for onset, pitch, end in new]
    # Without a prompt everything is new; a chord of four stays, because it begins at one onset.
    alone = processor.continue_score(None, ids)
    quarter = alone.ticks_per_quarter
    assert [(time // quarter, pitch, end // quarter) for time, pitch, _, end in played(alone)[0]] == [
        *((0, pitch, 4) for pitch in (40, 44, 47, 50)),
        *new[:1],
        *((4, 64, 8), (5, 67, 6)),
    ]
