"""`midimamba play`: every note at its time, no note that sounds on, and what is missing is told. No test waits."""

import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import mido
import pytest

import midi_backend
from midimamba import Note, playing, stream
from midimamba.command_options import SamplingOptions
from midimamba.generation import load_pair
from midimamba.playing import Ahead, Player
from support import command, make_score


class Clock:
    """Time passes when somebody waits."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds


class Script:
    """Notes that are there at given times."""

    def __init__(self, clock: Clock, notes: list[tuple[float, Note]]):
        self.clock, self.notes = clock, list(notes)

    def take(self, timeout: float | None) -> Note | None:
        if not self.notes:
            return None
        wait = max(0.0, self.notes[0][0] - self.clock.time)
        if timeout is not None and wait > max(0.0, timeout):
            self.clock.time += max(0.0, timeout)
            raise Empty
        self.clock.time += wait
        return self.notes.pop(0)[1]


class Recorder:
    """A port that writes down when a message came."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.messages: list[tuple[float, Any]] = []

    def send(self, message: Any) -> None:
        self.messages.append((round(self.clock.time - 100.0, 6), message))

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [(at, m.type, m.channel, m.note) for at, m in self.messages if m.type in kinds]


def a_note(seconds: float, duration: float, pitch: int = 60, program: int = 0, is_drum: bool = False) -> Note:
    return Note(2 * seconds, 2 * duration, seconds, duration, pitch, 90, program, is_drum)


def played(notes: list[tuple[float, Note]]) -> Recorder:
    clock = Clock()
    recorder = Recorder(clock)
    Player(recorder, clock.now, clock.sleep).play(Script(clock, notes))
    return recorder


def hanging(messages: list[Any]) -> Counter[tuple[int, int]]:
    """Notes that were begun and not ended, by channel and pitch."""
    sounding: Counter[tuple[int, int]] = Counter()
    for message in messages:
        if message.type == "note_on":
            sounding[message.channel, message.note] += 1
        elif message.type == "note_off":
            sounding[message.channel, message.note] -= 1
            assert sounding[message.channel, message.note] >= 0
    return +sounding


def test_every_note_begins_and_ends_at_its_time() -> None:
    notes = [a_note(8.0, 1.0), a_note(8.5, 0.25, 64, 40), a_note(9.0, 0.5, 38, is_drum=True), a_note(9.0, 0.5)]
    recorder = played([(0.0, note) for note in notes])
    lead = playing._LEAD  # the music begins with its first note, whatever precedes it
    assert recorder.of("note_on", "note_off") == [
        (lead, "note_on", 0, 60),
        (lead + 0.5, "note_on", 1, 64),
        (lead + 0.75, "note_off", 1, 64),
        (lead + 1.0, "note_off", 0, 60),
        (lead + 1.0, "note_on", 9, 38),
        (lead + 1.0, "note_on", 0, 60),
        (lead + 1.5, "note_off", 9, 38),
        (lead + 1.5, "note_off", 0, 60),
    ]
    assert [(m.channel, m.program) for _, m in recorder.messages if m.type == "program_change"] == [(0, 0), (1, 40)]


def test_slow_sampling_pauses_the_music_once_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    slow = [(100.0, a_note(0.0, 0.5)), (103.2, a_note(1.0, 0.5, 62)), (103.2, a_note(2.0, 0.5, 64))]
    recorder = played([*slow, (106.0, a_note(3.0, 0.5, 65))])
    assert recorder.of("note_on", "note_off") == [
        (0.2, "note_on", 0, 60),
        (0.7, "note_off", 0, 60),  # not when the next note is there
        (3.2, "note_on", 0, 62),
        (3.7, "note_off", 0, 62),
        (4.2, "note_on", 0, 64),
        (4.7, "note_off", 0, 64),
        (6.0, "note_on", 0, 65),
        (6.5, "note_off", 0, 65),
    ]
    assert capsys.readouterr().err.splitlines() == [
        "sampling is slower than the music, so it pauses: take a smaller generator"
    ]


def test_more_instruments_than_channels_share_them_and_leave_no_note() -> None:
    notes = [a_note(0.1 * index, 5.0, 60, program=index % 40) for index in range(80)]
    recorder = played([(0.0, note) for note in notes])
    messages = [message for _, message in recorder.messages]
    assert len([message for message in messages if message.type == "note_on"]) == 80
    assert all(message.channel != 9 for message in messages[:-16])
    assert not hanging(messages)


def test_an_interruption_ends_all_notes() -> None:
    clock = Clock()
    recorder = Recorder(clock)

    def interrupted(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.time > 101:
            raise KeyboardInterrupt

    notes = [(0.0, a_note(0.0, 60.0)), (0.0, a_note(0.0, 60.0, 64, 40)), (0.0, a_note(30.0, 1.0))]
    with pytest.raises(KeyboardInterrupt):
        Player(recorder, clock.now, interrupted).play(Script(clock, notes))
    messages = [message for _, message in recorder.messages]
    assert not hanging(messages)
    assert {(m.channel, m.control) for m in messages if m.type == "control_change"} == {(0, 123), (1, 123), (9, 123)}


def test_sampling_is_ahead_by_a_bounded_number_of_notes_and_stops_at_once() -> None:
    made: list[Note] = []

    def endless() -> Any:
        while True:
            made.append(a_note(float(len(made)), 1.0))
            yield made[-1]

    with Ahead(endless(), most=8) as ahead:
        for seconds in range(3):
            note = ahead.take(10)
            assert note is not None
            assert note.seconds == seconds
        limit = time.monotonic() + 10
        while len(made) < 12 and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == 3 + 8 + 1  # one waits for room
    assert not ahead._thread.is_alive()


def test_what_goes_wrong_in_sampling_is_raised_where_it_is_played() -> None:
    def broken() -> Any:
        yield a_note(0.0, 60.0)
        raise ValueError("broken")

    clock = Clock()
    recorder = Recorder(clock)
    with Ahead(broken()) as ahead, pytest.raises(ValueError, match="broken"):
        Player(recorder, clock.now, clock.sleep).play(ahead)
    assert not hanging([message for _, message in recorder.messages])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """mido with our ports, and a player that does not wait."""
    found = Clock()
    mido.set_backend("midi_backend")
    midi_backend.SENT.clear()
    monkeypatch.setattr(playing, "Player", partial(Player, now=found.now, sleep=found.sleep))
    return found


def test_the_command_plays_what_the_seed_decides(
    pretrained: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_score(1, bars=2).dump_midi(tmp_path / "opening.mid")
    arguments = ["--bars", "2", "--seed", "3", "--prompt", tmp_path / "opening.mid"]
    assert command(monkeypatch, "play", pretrained, *arguments) == 0
    assert "playing to Synth, seed 3: Ctrl-C stops" in capsys.readouterr().out
    model, processor = load_pair(str(pretrained))
    options = SamplingOptions(num=1, bars=2, seed=3)
    expected = [(n.pitch, n.velocity) for n in stream(model, processor, tmp_path / "opening.mid", options)]
    *messages, closed = midi_backend.SENT
    assert [(m.note, m.velocity) for m in messages if m.type == "note_on"] == expected
    assert expected
    assert not hanging(messages)
    assert closed == "closed Synth"


def test_ctrl_c_ends_music_without_end(
    pretrained: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.time > 103:
            raise KeyboardInterrupt

    monkeypatch.setattr(playing, "Player", partial(Player, now=clock.now, sleep=sleep))
    handler = signal.getsignal(signal.SIGTERM)
    assert command(monkeypatch, "play", pretrained, "--port", "Midi Through 0") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    *messages, closed = midi_backend.SENT
    assert any(message.type == "note_on" for message in messages)
    assert not hanging(messages)
    assert closed == "closed Midi Through 0"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_end_of_a_session_ends_all_notes() -> None:
    with pytest.raises(SystemExit) as end, playing.stopped_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM


def test_ports_are_listed_and_a_wrong_one_is_told(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "play", "--list-ports") == 0
    assert capsys.readouterr().out.splitlines() == midi_backend.NAMES
    assert command(monkeypatch, "play", "no-model", "--port", "Organ") == 2
    assert capsys.readouterr().err == (
        "error: there is no MIDI port 'Organ': --port can name 'Midi Through 0', 'Synth'\n"
    )
    assert command(monkeypatch, "play") == 2
    assert "MODEL is missing" in capsys.readouterr().err
    monkeypatch.setattr(midi_backend, "NAMES", [])
    assert command(monkeypatch, "play", "no-model") == 2
    assert capsys.readouterr().err.startswith("error: there is no MIDI port: connect")


@pytest.mark.parametrize("missing", ["mido", "rtmidi"])
def test_a_missing_extra_is_told(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mido.set_backend("mido.backends.rtmidi")
    for name in [name for name in sys.modules if name.startswith("mido.backends.rtmidi")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert command(monkeypatch, "play", "--list-ports") == 2
    assert capsys.readouterr().err == "error: playing needs mido and python-rtmidi: pip install 'midimamba[play]'\n"


def test_a_machine_without_midi_is_told(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        raise OSError("error creating\nALSA client")

    monkeypatch.setattr(midi_backend, "get_devices", fail)
    assert command(monkeypatch, "play", "--list-ports") == 2
    assert capsys.readouterr().err == (
        "error: this machine has no MIDI that can be played to (error creating ALSA client)\n"
    )
