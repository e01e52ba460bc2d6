"""`midimamba convert`: what goes through a format comes back, and what a format cannot say is told."""

import random
import re
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import KeySignature, Note, Pedal, Score, Tempo, TextMeta, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba import cli, musicxml
from midimamba.abc_page import write_abc
from midimamba.musicxml import write_musicxml
from midimamba.notation import GRID, VALUES, note_values, write_down
from midimamba.tokenization.ingest import read_unordered


def piece(seed: int, drums: bool = True) -> ScoreTick:
    """A melody, chords with rests, and drums, in two meters and two keys, on the grid of notation."""
    rng = random.Random(seed)
    score = Score(480)
    first = rng.choice([(4, 4), (3, 4), (6, 8), (5, 8)])
    change = 2 * 480 * 4 * first[0] // first[1]
    score.time_signatures.extend([TimeSignature(0, *first), TimeSignature(change, *rng.choice([(2, 4), (7, 8)]))])
    score.key_signatures.append(KeySignature(0, rng.randint(-7, 7), rng.randint(0, 1)))
    score.key_signatures.append(KeySignature(change, rng.randint(-7, 7), rng.randint(0, 1)))
    score.tempos.extend([Tempo(0, rng.randint(40, 200)), Tempo(change, rng.randint(40, 200))])
    for program, size, is_drum in ((40, 1, False), (0, 3, False), (0, 1, True))[: 3 if drums else 2]:
        track, now = Track(name=f"Part {program}", program=program, is_drum=is_drum), 0
        while now < change + 1920:
            units = rng.choice([1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 18, 24, 30, 36, 40, 48, 72, 100])
            if rng.random() < 0.8 or not now:
                for pitch in rng.sample(range(36, 96), size):
                    track.notes.append(Note(now, units * 20, pitch, rng.randint(1, 127)))
            now += units * 20
        score.tracks.append(track)
    return score


def contents(score: ScoreTick, velocities: bool) -> dict[str, Any]:
    """Times in units of the notation's grid."""
    scale = GRID / score.ticks_per_quarter
    return {
        "notes": sorted(
            (round(n.time * scale), round(n.duration * scale), n.pitch, n.velocity * velocities, track.is_drum)
            for track in score.tracks
            for n in track.notes
        ),
        "meters": [(round(m.time * scale), m.numerator, m.denominator) for m in distinct(score.time_signatures)],
        "keys": [(round(k.time * scale), k.key, k.tonality) for k in distinct(score.key_signatures)],
        "tempos": [(round(t.time * scale), round(t.qpm)) for t in distinct(score.tempos)],
        "programs": {(track.program, track.is_drum) for track in score.tracks},
    }


def distinct(events: Any) -> Iterator[Any]:
    """Events that change something."""
    before = None
    for event in events:
        value = [getattr(event, name, None) for name in ("numerator", "denominator", "key", "tonality", "mspq")]
        if value != before:
            yield event
        before = value


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_abc_keeps_notes_meters_keys_and_tempos(seed: int) -> None:
    score = piece(seed)
    text, told = write_abc(write_down(score), "piece")
    again, changes = read_unordered(text.encode())
    assert changes == []
    assert contents(again, velocities=False) == contents(score, velocities=False)
    assert any("velocities" in line for line in told)


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10**6))
def test_musicxml_keeps_everything(seed: int) -> None:
    score = piece(seed)
    again = musicxml._read(write_musicxml(write_down(score), "piece").encode(), lambda stage: None)
    assert isinstance(again, ScoreTick), again
    assert contents(again, velocities=True) == contents(score, velocities=True)
    assert [track.name for track in again.tracks] == [track.name for track in score.tracks]


@given(st.integers(0, 200), st.integers(1, 500))
def test_note_values_fill_any_length(place: int, units: int) -> None:
    values = list(note_values(place, units))
    assert sum(values) == units
    assert set(values) <= set(VALUES)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["midimamba", "convert", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


@pytest.mark.slow
def test_every_format_is_written_and_what_can_be_read_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = piece(1)
    score.dump_midi(tmp_path / "a.mid")
    beginnings = {"rmi": b"RIFF", "kar": b"MThd", "abc": b"X:1", "musicxml": b"<?xml", "mxl": b"PK", "svg": b"<svg"}
    beginnings |= {"png": b"\x89PNG", "wav": b"RIFF"}
    for suffix, beginning in beginnings.items():
        assert run(monkeypatch, tmp_path / "a.mid", tmp_path / f"b.{suffix}") == 0
        assert (tmp_path / f"b.{suffix}").read_bytes().startswith(beginning)
    assert "ABC has no velocities" in capsys.readouterr().err
    for suffix in ("rmi", "kar", "abc", "mxl"):
        assert run(monkeypatch, tmp_path / f"b.{suffix}", tmp_path / f"{suffix}.mid") == 0
        again, _ = read_unordered(tmp_path / f"{suffix}.mid")
        kept = suffix != "abc"
        assert contents(again, velocities=kept) == contents(score, velocities=kept), suffix


@pytest.mark.skipif(find_library("cairo") is None, reason="the system has no library cairo, which PDF needs")
def test_pages_are_written_as_pdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece(1).dump_midi(tmp_path / "a.mid")
    assert run(monkeypatch, tmp_path / "a.mid", tmp_path / "b.pdf") == 0
    assert (tmp_path / "b.pdf").read_bytes().startswith(b"%PDF")


def test_a_missing_library_of_the_system_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piece(1).dump_midi(tmp_path / "a.mid")

    def without_cairo(name: str) -> Any:
        if name == "cairosvg":
            raise OSError('no library called "cairo" was found')
        return import_module(name)

    monkeypatch.setattr("midimamba.evaluation.rendering.import_module", without_cairo)
    assert run(monkeypatch, tmp_path / "a.mid", tmp_path / "b.pdf") == 2
    assert "cairosvg lacks a library of the system" in capsys.readouterr().err


def test_times_that_notation_cannot_say_are_told() -> None:
    score = Score(480)
    score.tracks.append(Track())
    score.tracks[0].notes.extend([Note(7, 480, 60, 80), Note(480, 480, 62, 80), Note(240, 480, 64, 80)])
    score.tracks[0].notes.append(Note(240, 480, 64, 70))
    score.tracks[0].pedals.append(Pedal(0, 480))
    score.tracks[0].lyrics.append(TextMeta(0, "la"))
    page = write_down(score)
    assert page.changes == [
        "1 notes were moved to the nearest 24th of a quarter note",
        "1 notes are left out that another of their track and pitch covers exactly",
        "pedals, controllers and pitch bends are left out",
        "lyrics and markers are left out",
    ]
    assert len(page.staves[0].voices) == 2
    assert any("2 voices" in line for line in write_abc(page, "x")[1])


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("a.mid", "b.foo", r"are not written: name one of .*\.pdf"),
        ("a.foo", "b.mid", "are not read: name one of"),
        ("gone.mid", "b.abc", "cannot be read"),
        ("a.mid", "a.mid", "already exists"),
        ("broken.mxl", "b.mid", "cannot be read as MusicXML"),
        ("broken.abc", "b.mid", "no ABC tune"),
    ],
)
def test_bad_requests_end_in_one_line(
    source: str, target: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    piece(1).dump_midi(tmp_path / "a.mid")
    (tmp_path / "broken.mxl").write_bytes(b"PK, or not")
    (tmp_path / "broken.abc").write_bytes(b"T: nothing\n")
    before = sorted(tmp_path.iterdir())
    assert run(monkeypatch, tmp_path / source, tmp_path / target) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(reason, message)
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    piece(1).dump_midi(tmp_path / "a.mid")

    def without_verovio(name: str) -> Any:
        if name == "verovio":
            raise ModuleNotFoundError(name)
        return import_module(name)

    monkeypatch.setattr("midimamba.evaluation.rendering.import_module", without_verovio)
    assert run(monkeypatch, tmp_path / "a.mid", tmp_path / "b.pdf") == 2
    assert 'pip install "midimamba[notation]"' in capsys.readouterr().err
