import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from symusic import Note, Score, Tempo, Track
from symusic.core import ScoreQuarter

from midimamba import MidiProcessor
from midimamba.tokenization import ingest
from midimamba.tokenization.ingest import MAX_FILE_BYTES, MidiRefusedError, parse_midi, read_score
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer
from support import make_score

TOKENIZER = build_tokenizer()


def smf(events: bytes, division: int = 480, kind: int = 0) -> bytes:
    """A standard MIDI file of one track."""
    track = events + b"\x00\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, kind, 1, division)
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
        *((smf(NOTE, division=0x10000 - 256 * rate + 4), "SMPTE") for rate in (24, 25, 29, 30)),
        (smf(NOTE, kind=2), "format 2"),
        (smf(NOTE, kind=3), "not a well-formed MIDI file"),
        (smf(b"\x00\xff\x58\x04\x04\x1f\x18\x08" + NOTE), "a time signature of 4/"),
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
    assert read_score(cast(ScoreQuarter, from_bytes.to("quarter"))).note_num() == 1


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


def test_data_bytes_beyond_the_standard_are_clamped() -> None:
    loud = b"\x00\x90\x3c\xf0\x60\x80\x3c\x40"
    score, sanitized = parse_midi(smf(loud))
    assert sanitized
    assert [note.velocity for note in score.tracks[0].notes] == [127]
    assert read_score(smf(loud)) == score
    assert parse_midi(smf(NOTE)) == (read_score(smf(NOTE)), False)


def test_what_stays_malformed_is_refused_for_its_own_defect() -> None:
    content = smf(b"\x00\x90\x3c\xf0\x60\x80\x3c\x40")[:-6]
    with pytest.raises(RuntimeError) as caught:
        Score.from_midi(content)
    with pytest.raises(MidiRefusedError) as refused:
        read_score(content)
    assert " ".join(str(caught.value).split()).removeprefix("MiniMidi: ") in refused.value.reason


SOUND = [make_score(1, bars=2).dumps_midi(), make_score(2, bars=3, programs=(0,), drums=False).dumps_midi(), smf(NOTE)]
PLACE = st.integers(0, 2**16)
CHUNK = re.compile(rb"MT(?:hd|rk).*?(?=MT(?:hd|rk)|\Z)", re.DOTALL)


def flip(content: bytes, place: int, value: int) -> bytes:
    at = place % len(content)
    return content[:at] + bytes([value % 256]) + content[at + 1 :]


def cut(content: bytes, place: int, value: int) -> bytes:
    at = place % len(content)
    return content[:at] + content[at + value :]


def insert(content: bytes, place: int, value: int) -> bytes:
    at = place % (len(content) + 1)
    return content[:at] + value.to_bytes(1 + value.bit_length() // 8) + content[at:]


def double_chunk(content: bytes, place: int, value: int) -> bytes:
    chunks = CHUNK.findall(content)
    if not chunks:
        return content * 2
    return b"".join([*chunks, *[chunks[place % len(chunks)]] * (value % 4)])


MUTATION = st.tuples(st.sampled_from([flip, cut, insert, double_chunk]), PLACE, st.integers(0, 2**16))


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(content=st.sampled_from(SOUND), mutations=st.lists(MUTATION, min_size=1, max_size=5))
def test_mutated_files_are_refused_or_can_be_encoded_and_decoded(
    content: bytes, mutations: list[tuple[Callable[[bytes, int, int], bytes], int, int]]
) -> None:
    for mutate, place, value in mutations:
        content = mutate(content, place, value) or b"\0"
    try:
        score = read_score(content)
    except MidiRefusedError as error:
        event(f"refused: {error.reason[:30]}")
        return
    event("read")
    ids = base_ids(TOKENIZER, score)
    assert ids
    assert 0 < MidiProcessor(TOKENIZER).decode(ids).note_num() <= score.note_num()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200).map(smf) | st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_or_can_be_encoded(content: bytes) -> None:
    try:
        score = read_score(content)
    except MidiRefusedError:
        return
    assert base_ids(TOKENIZER, score)


def wrapped(content: bytes, before: bytes = b"") -> bytes:
    """As Windows does it, in a RIFF file."""
    data = b"data" + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)
    return b"RIFF" + (4 + len(before) + len(data)).to_bytes(4, "little") + b"RMID" + before + data


@pytest.mark.parametrize("suffix", [".rmi", ".mid"])
def test_a_file_in_riff_or_gzip_is_unwrapped(suffix: str, tmp_path: Path, processor: MidiProcessor) -> None:
    score = Score(480)
    score.tracks.append(Track())
    score.tracks[0].notes.extend([Note(480 * index, 240, pitch, 80) for index, pitch in enumerate((60, 62, 64))])
    plain = bytes(score.dumps_midi())
    chunk = b"LIST" + (5).to_bytes(4, "little") + b"INFO\0\0"  # of odd length, so it is padded
    for content in (wrapped(plain), wrapped(plain, before=chunk), gzip.compress(plain), gzip.compress(wrapped(plain))):
        (tmp_path / f"a{suffix}").write_bytes(content)
        for source in (content, tmp_path / f"a{suffix}"):
            assert [note.pitch for note in read_score(source).tracks[0].notes] == [60, 62, 64]
            assert processor(source)["input_ids"] == processor(plain)["input_ids"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (wrapped(b"")[:12], "a RIFF file without MIDI data"),
        (b"RIFF\xff\xff\xff\xffRMIDLIST\xff\xff\xff\xff", "a RIFF file without MIDI data"),
        (gzip.compress(bytes(MAX_FILE_BYTES + 1), mtime=0), "larger than 16 MB"),
        (gzip.compress(smf(b""), mtime=0)[:-9], "it is compressed, and its end is missing"),
        (b"\x1f\x8b" + bytes(20), "it is compressed, and damaged"),
    ],
)
def test_what_is_wrapped_badly_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(MidiRefusedError, match=reason):
        read_score(content)
