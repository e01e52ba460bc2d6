"""Chorales of music21: four voices of one sound, with bar lines where the music has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from symusic import Score
from symusic.core import ScoreTick

from midimamba.corpus.chorales import PROGRAM, VOICES, Bar, bars_of, read_chorale, score_of
from midimamba.tokenization.musical_time import bar_starts

QUARTER = 480
COMMON, TRIPLE = (4, 4), (3, 4)


def test_an_upbeat_ends_its_bar_and_halves_of_a_bar_are_one() -> None:
    """Four quarters: one of upbeat, a bar, three before the repeat sign, the upbeat again, and a last one of three."""
    lengths = [1, 4, 3, 1, 4, 3]
    starts = np.cumsum([0, *lengths])
    measures = [
        (int(start) * QUARTER, length * QUARTER, COMMON) for start, length in zip(starts, lengths, strict=False)
    ]
    assert list(bars_of(measures)) == [Bar(quarters * QUARTER, 4 * QUARTER, COMMON) for quarters in (-3, 1, 5, 9, 13)]


def test_a_bar_that_nothing_completes_has_a_meter_of_its_own() -> None:
    measures = [(0, 4, COMMON), (4, 10, COMMON), (14, 4, COMMON), (18, 3, COMMON), (21, 1, TRIPLE), (22, 3, TRIPLE)]
    found = bars_of([(start * QUARTER, length * QUARTER, meter) for start, length, meter in measures])
    assert [(bar.start // QUARTER, bar.length // QUARTER, bar.meter) for bar in found] == [
        *((0, 4, COMMON), (4, 4, COMMON), (8, 4, COMMON), (12, 2, (2, 4)), (14, 4, COMMON)),
        *((18, 3, TRIPLE), (21, 1, (1, 4)), (22, 3, TRIPLE)),
    ]
    assert next(bars_of([(0, 720, COMMON), (720, 1920, COMMON)])) == Bar(-1200, 1920, COMMON)
    assert list(bars_of([(0, 1920, COMMON), (1920, 600, COMMON), (2520, 1920, COMMON)]))[1].meter == (5, 16)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(60, 63)), min_size=1))
def test_notes_of_one_pitch_never_overlap_and_sound_where_a_voice_sounds(voices: list[tuple[int, int, int]]) -> None:
    notes = np.array([(onset, onset + length, pitch) for onset, length, pitch in voices])
    score = score_of(notes, [Bar(0, 60, COMMON)])
    expected = np.zeros((128, 60), bool)
    for onset, end, pitch in notes:
        expected[pitch, onset:end] = True
    sounding = np.zeros((128, 60), int)
    for note in score.tracks[0].notes:
        sounding[note.pitch, note.time : note.end] += 1
    assert np.array_equal(sounding, expected)
    assert {(n.time, n.pitch) for n in score.tracks[0].notes} == {(onset, pitch) for onset, _, pitch in voices}


def test_silent_bars_are_cut_out_with_their_time() -> None:
    bars = [Bar(start, 4, COMMON) for start in (0, 4, 8)] + [Bar(12, 3, TRIPLE), Bar(15, 3, TRIPLE)]
    score = score_of(np.array([(0, 2, 60), (9, 10, 62), (17, 18, 64)]), bars)
    assert [(note.time, note.duration) for note in score.tracks[0].notes] == [(0, 2), (5, 1), (10, 1)]
    assert [(meter.time, meter.numerator) for meter in score.time_signatures] == [(0, 4), (8, 3)]


@pytest.fixture
def chorale(tmp_path: Path) -> Path:
    """Four voices of different instruments and a violin; an upbeat, a repeat, a tie, a unison and a silent bar."""
    music21: Any = pytest.importorskip("music21")
    score = music21.stream.Score()
    pitches = {"Violin": 90, "Soprano\nOboe": 72, "Alto": 67, "Tenor": 67, "Bass": 48}
    for name, pitch in pitches.items():
        part = music21.stream.Part()
        part.append(getattr(music21.instrument, "Violin" if name == "Violin" else "Horn")())
        part.partName = name
        for number, lengths in enumerate([(1,), (4,), (2, 1), (1,), (4,), (4,)]):
            measure = music21.stream.Measure(number=number)
            if number == 0:
                measure.timeSignature = music21.meter.TimeSignature("4/4")
            if lengths == (1,):
                measure.paddingLeft = 3.0
            elif number == 2:
                measure.paddingRight = 1.0
            for length in lengths:
                silent = number == 4 and name != "Violin"
                measure.append(
                    music21.note.Rest(quarterLength=length)
                    if silent
                    else music21.note.Note(midi=pitch, quarterLength=length)
                )
            part.append(measure)
        first, second = part.getElementsByClass("Measure")[1:3]
        first.notes[0].tie, second.notes[0].tie = music21.tie.Tie("start"), music21.tie.Tie("stop")
        second.rightBarline = music21.bar.Repeat(direction="end")
        score.insert(0, part)
    return Path(score.write("musicxml", tmp_path / "chorale.musicxml"))


def read(path: Path) -> ScoreTick:
    score = Score.from_midi(read_chorale(path))
    assert isinstance(score, ScoreTick)
    return score


def test_all_voices_are_one_instrument_in_one_track(chorale: Path) -> None:
    score = read(chorale)
    assert [(track.program, track.is_drum) for track in score.tracks] == [(PROGRAM, False)]
    notes = [(n.time / QUARTER, n.duration / QUARTER, n.pitch) for n in score.tracks[0].notes]
    # Alto and tenor are one note. The bar in which only the violin plays is left out.
    onsets = [(3, 1), (4, 6), (10, 1), (11, 1), (12, 6), (18, 1), (19, 1), (20, 4)]
    assert sorted(notes) == sorted((on, length, pitch) for on, length in onsets for pitch in (48, 67, 72))
    assert (bar_starts(score) / QUARTER).tolist()[:6] == [0, 4, 8, 12, 16, 20]
    assert [(meter.time, meter.numerator) for meter in score.time_signatures][:1] == [(0, 4)]


def test_a_chorale_without_a_voice_is_refused(tmp_path: Path) -> None:
    music21: Any = pytest.importorskip("music21")
    score = music21.stream.Score()
    for name in VOICES[:3]:
        part = music21.stream.Part([music21.note.Note("C4")])
        part.partName = name
        score.insert(0, part)
    path = Path(score.write("musicxml", tmp_path / "three.musicxml"))
    with pytest.raises(ValueError, match="no part Bass"):
        read_chorale(path)
