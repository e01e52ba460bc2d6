"""Tunes in ABC notation become scores, and no text makes reading hang, crash or lose music without a word."""

import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midimamba.tokenization.abc_notation import Tunes, is_abc
from midimamba.tokenization.ingest import MidiRefusedError, read_score, read_unordered
from midimamba.tokenization.processor import MidiProcessor

SCALE = "CDEFGABcdefgab"
PITCHES = (60, 62, 64, 65, 67, 69, 71, 72, 74, 76, 77, 79, 81, 83)


def tune(body: str, *fields: str) -> bytes:
    return "\n".join(["X:1", "T:Test", "L:1/8", *fields, "K:C", body, ""]).encode()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 13), min_size=1, max_size=3), st.integers(1, 8)), min_size=1))
def test_every_note_has_its_onset_length_and_pitch(chords: list[tuple[set[int], int]]) -> None:
    body = " ".join(f"[{''.join(SCALE[step] for step in steps)}]{length}" for steps, length in chords)
    expected, now = [], 0
    for steps, length in chords:
        expected += [(now, length * 240, PITCHES[step]) for step in steps]
        now += length * 240
    score = read_score(tune(body, "M:none"))
    assert score.ticks_per_quarter == 480
    found = [(note.time, note.duration, note.pitch) for track in score.tracks for note in track.notes]
    assert sorted(found) == sorted(expected)


def test_meters_keys_and_tempos_are_those_of_the_first_voice() -> None:
    """abc2midi puts the changes of a voice that begins with a rest in the wrong place."""
    body = "V:1\nC8|[M:3/4][K:F#m]C6|C6|\nV:2\nz8|[M:3/4][K:F#m]z6|c6|"
    score = read_score(tune(body, "M:4/4", "Q:1/4=90"))
    assert [(meter.time, meter.numerator, meter.denominator) for meter in score.time_signatures] == [
        (0, 4, 4),
        (1920, 3, 4),
    ]
    assert [(key.time, key.key, key.tonality) for key in score.key_signatures] == [(0, 0, 0), (1920, 3, 1)]
    assert round(score.tempos[0].qpm) == 90
    assert sorted(note.time for track in score.tracks for note in track.notes) == [0, 1920, 3360, 3360]


def test_line_ends_of_other_systems_and_a_byte_order_mark_change_nothing() -> None:
    plain = tune("CDE")
    for other in (b"\xef\xbb\xbf" + plain, plain.replace(b"\n", b"\r\n"), plain.replace(b"\n", b"\r"), plain[:-1]):
        assert read_score(other) == read_score(plain)


def test_what_cannot_be_read_is_told_with_its_line() -> None:
    _, changes = read_unordered(tune("CDE [1/E=A$b [M:0/0]C"))
    assert len(changes) == 1
    assert "line 5" in changes[0]
    assert read_unordered(tune("CDE"))[1] == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"T:no tune\nK:C\nCDE\n", "no ABC tune"),
        (tune("CDE") + b"\n" + tune("FGA"), "2 ABC tunes"),
        (tune("CDE", "%%abc-include /etc/passwd"), "includes another file"),
        (tune("z8|z8"), "no notes"),
        (tune("C D1/3 E"), r"not a power of 2, line 5"),
        (b"X:1\n", "makes no music|no notes"),
    ],
)
def test_unusable_text_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(MidiRefusedError, match=reason):
        read_score(content)


def test_a_program_that_hangs_or_dies_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "abc2midi"
    monkeypatch.setenv("SYMUSIC_ABC2MIDI", str(program))
    monkeypatch.setattr("midimamba.tokenization.abc_notation._MAX_SECONDS", 1)
    for script, reason in (("exec sleep 60", "longer than 1 seconds"), ("kill -SEGV $$", "died of it")):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        started = time.monotonic()
        with pytest.raises(MidiRefusedError, match=reason):
            read_score(tune("CDE"))
        assert time.monotonic() - started < 10


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="latin-1"), max_size=60), st.text(st.sampled_from('[](){}|:1234/^_=-<>&!"CDz\n')))
def test_no_text_does_more_than_be_refused(field: str, body: str) -> None:
    content = f"X:1\nT:{field}\nK:C\n{body}\n".encode("latin-1")
    with suppress(MidiRefusedError):
        assert read_score(content).note_num()


def test_tunes_of_a_book_have_what_is_meant_for_all_of_them() -> None:
    book = b"A book\nM:3/4\n%%MIDI program 40\n\nX:7\nT:One\nK:C\nCDE\n\nX:7\nT:Two\nK:D\nDEF"
    tunes = Tunes(book)
    assert [tunes.read(*place) for place in tunes.places()] == [
        b"M:3/4\n%%MIDI program 40\nX:7\nT:One\nK:C\nCDE\n\n",
        b"M:3/4\n%%MIDI program 40\nX:7\nT:Two\nK:D\nDEF\n",
    ]


def test_midi_is_not_taken_for_abc(tmp_path: Path) -> None:
    assert is_abc(tune("C"))
    assert not is_abc(b"MThd\nX:1\n")
    assert not is_abc(b"\0X:1\n")
    assert not is_abc(b"hello")


def test_a_processor_continues_a_tune(processor: MidiProcessor, tmp_path: Path) -> None:
    (tmp_path / "opening.abc").write_bytes(tune("CDEF GABc|", "M:4/4"))
    score = read_score(tmp_path / "opening.abc")
    ids = processor.encode(tmp_path / "opening.abc")
    assert ids == processor.encode(score.dumps_midi())
    assert processor.continue_score(tmp_path / "opening.abc", ids).note_num() == score.note_num() == 8
