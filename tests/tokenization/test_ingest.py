import struct
from pathlib import Path

import pytest
from symusic import Note, Score, Tempo, Track

from midimamba.tokenization import ingest
from midimamba.tokenization.ingest import MidiRefusedError, find_midi_files, read_score
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer


def smf(events: bytes, division: int = 480) -> bytes:
    """A standard MIDI file of one track."""
    track = events + b"\x00\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, division)
    return header + b"MTrk" + struct.pack(">I", len(track)) + track


NOTE = b"\x00\x90\x3c\x40\x60\x80\x3c\x40"
LONGEST_PAUSE = b"\xff\xff\xff\x7f"  # 2²⁸ - 1 ticks


def long_pause(times: int) -> bytes:
    filler = LONGEST_PAUSE + b"\xb0\x07\x40"
    return smf(NOTE + filler * times + NOTE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"no music at all", "not a well-formed MIDI file"),
        (smf(NOTE)[:20], "not a well-formed MIDI file"),
        (smf(NOTE)[:-6], "not a well-formed MIDI file"),
        (smf(b""), "no notes"),
        (smf(NOTE, division=0), "time division is 0"),
        (long_pause(1), "quarter notes; the limit"),
        (long_pause(8), "negative"),
        (smf(b"\x00\xff\x51\x03\x00\x00\x00" + NOTE), "tempo of 0"),
    ],
)
def test_an_unusable_file_is_refused_with_its_defect(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(MidiRefusedError, match=reason):
        read_score(content)
    path = tmp_path / "bad.mid"
    path.write_bytes(content)
    with pytest.raises(MidiRefusedError, match=reason) as caught:
        read_score(path)
    assert str(path) in str(caught.value)
    assert str(path) not in caught.value.reason


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MidiRefusedError, match=r"gone\.mid: the file cannot be read"):
        read_score(tmp_path / "gone.mid")


def test_a_sound_file_is_read_the_same_from_path_bytes_and_score(tmp_path: Path) -> None:
    path = tmp_path / "good.mid"
    path.write_bytes(smf(NOTE))
    from_bytes = read_score(smf(NOTE))
    assert from_bytes == read_score(path) == read_score(str(path)) == read_score(from_bytes)
    assert read_score(from_bytes.to("quarter")).note_num() == 1


@pytest.mark.parametrize("note", [Note(-10, 5, 60, 60), Note(10, -20, 60, 60)])
def test_impossible_times_in_a_score_are_refused(note: Note) -> None:
    score = Score(480)
    score.tracks.append(Track(notes=[Note(0, 10, 60, 60), note]))
    with pytest.raises(MidiRefusedError):
        read_score(score)


def test_limits_hold_for_notes_tracks_and_tempos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "MAX_NOTES", 3)
    monkeypatch.setattr(ingest, "MAX_TRACKS", 2)
    monkeypatch.setattr(ingest, "MAX_GLOBAL_EVENTS", 2)
    score = Score(480)
    score.tracks.append(Track(notes=[Note(i, 10, 60, 60) for i in range(3)]))
    assert read_score(score).note_num() == 3
    score.tempos.extend([Tempo(0, 100.0), Tempo(1, 101.0), Tempo(2, 102.0)])
    with pytest.raises(MidiRefusedError, match="3 tempo and time signature changes"):
        read_score(score)
    score.tempos.pop()
    score.tracks.append(Track(notes=[Note(0, 10, 60, 60)]))
    with pytest.raises(MidiRefusedError, match="4 notes"):
        read_score(score)
    score.tracks.append(Track())
    with pytest.raises(MidiRefusedError, match="3 tracks"):
        read_score(score)


def test_a_late_tempo_cannot_smuggle_in_millions_of_bars() -> None:
    score = Score(24)
    score.tracks.append(Track(notes=[Note(0, 10, 60, 60)]))
    score.tempos.append(Tempo(2**30, 100.0))
    with pytest.raises(MidiRefusedError, match="quarter notes"):
        read_score(score)


def test_whatever_passes_can_be_tokenised_even_after_random_damage(random_score) -> None:
    import random

    rng = random.Random(0)
    tokenizer = build_tokenizer()
    sound = random_score(1, bars=3).dumps_midi()
    passed = 0
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            score = read_score(bytes(damaged))
        except MidiRefusedError:
            continue
        assert base_ids(tokenizer, score)
        passed += 1
    assert 0 < passed < 300


def test_midi_files_are_found_in_any_case_and_sorted(tmp_path: Path) -> None:
    for name in ("b.MID", "a.midi", "sub/c.Kar", "sub/d.mid", "notes.txt", "e.mid.bak"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mid").mkdir()
    assert [path.name for path in find_midi_files(tmp_path)] == ["a.midi", "b.MID", "c.Kar", "d.mid"]
