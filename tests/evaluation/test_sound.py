"""Sound is there when the notes are, drums included; what cannot be played is one line and leaves no file."""

import faulthandler
import logging
import os
import struct
import sys
import wave
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from symusic import ControlChange, Note, Score, Tempo, Track
from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.evaluation import sound
from midimamba.evaluation.sound import SAMPLE_RATE, check_encoder, load_soundfont, render_sounds

CLICK = 37  # a rim shot: of all drums the one with the clearest beginning


def make_score(*notes: tuple[int, int, int, int], program: int = 0, is_drum: bool = False) -> ScoreTick:
    """One track of (start, duration, pitch, velocity) at 480 ticks per quarter and 120 quarters per minute."""
    score, track = Score(480), Track(program=program, is_drum=is_drum)
    for note in notes:
        track.notes.append(Note(*note))
    score.tracks.append(track)
    return score


@pytest.fixture(scope="module")
def soundfont() -> bytes:
    return load_soundfont()


@pytest.fixture
def no_traces() -> Iterator[None]:
    """pytest's traces of workers that abort would fill the screen."""
    faulthandler.disable()
    yield
    faulthandler.enable(sys.__stderr__ or 2)


def heard(score: ScoreTick, soundfont: bytes, folder: Path) -> Any:
    """The samples of a score's WAV file, from -1 to 1."""
    path = folder / "sound.wav"
    render_sounds({path: score}, soundfont)
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    path.unlink()
    return samples


def test_drums_alone_are_heard(soundfont: bytes, tmp_path: Path) -> None:
    score = make_score(
        *((quarter * 480, 240, (36, 42, 38, 42)[quarter % 4], 100) for quarter in range(8)), is_drum=True
    )
    samples = heard(score, soundfont, tmp_path)
    assert np.abs(samples).max() == pytest.approx(0.9, abs=1e-4)
    for quarter in range(8):
        start = quarter * SAMPLE_RATE // 2
        assert np.abs(samples[start : start + SAMPLE_RATE // 10]).max() > 0.05
    # The kit, and not an instrument that plays these pitches: none of them is the loudest frequency.
    piano = make_score((0, 240, 36, 100))
    assert np.corrcoef(samples[:4000], heard(piano, soundfont, tmp_path)[:4000])[0, 1] < 0.5


def test_a_score_without_notes_is_a_second_of_silence(soundfont: bytes, tmp_path: Path) -> None:
    for score in (Score(480), make_score()):
        samples = heard(score, soundfont, tmp_path)
        assert len(samples) == SAMPLE_RATE
        assert not samples.any()


def test_sound_has_the_pitch_of_the_note(soundfont: bytes, tmp_path: Path) -> None:
    samples = heard(make_score((0, 3840, 69, 100), program=73), soundfont, tmp_path)  # a flute
    loudest = np.abs(np.fft.rfft(samples)).argmax() * SAMPLE_RATE / len(samples)
    assert loudest == pytest.approx(440, abs=8)  # a semitone is 26 Hz, and vibrato spreads a tone


@given(
    gaps=st.lists(st.integers(2, 12), min_size=2, max_size=6),
    tempos=st.lists(st.sampled_from((40.0, 60.0, 97.0, 120.0, 240.0)), min_size=3, max_size=3),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_notes_begin_where_the_score_says_whatever_the_tempos(
    gaps: list[int], tempos: list[float], soundfont: bytes, tmp_path: Path
) -> None:
    """Onsets in sixteenths; the tempo changes at every second quarter note."""
    places = np.cumsum(gaps)
    score = make_score(*((int(place) * 120, 60, CLICK, 110) for place in places), is_drum=True)
    for index, tempo in enumerate(tempos):
        score.tempos.append(Tempo(index * 960, tempo))
    samples = np.abs(heard(score, soundfont, tmp_path))
    for place in places:
        lengths = [min(max(place - 8 * index, 0), 8) if index < 2 else max(place - 16, 0) for index in range(3)]
        seconds = sum(length / 4 * 60 / tempo for length, tempo in zip(lengths, tempos, strict=True))
        onset = round(seconds * SAMPLE_RATE)
        width = SAMPLE_RATE // 50
        assert samples[onset : onset + width].max() > 10 * samples[onset - width : onset - 24].max() + 0.05


def test_sound_ends_when_the_last_note_has_faded(soundfont: bytes, tmp_path: Path) -> None:
    seconds = {
        name: len(heard(score, soundfont, tmp_path)) / SAMPLE_RATE
        for name, score in {
            "piano": make_score((0, 480, 60, 100)),
            "cymbal": make_score((0, 480, 49, 100), is_drum=True),
            "strings": make_score((0, 9600, 60, 100), program=48),
            "held piano": make_score((0, 57600, 84, 100)),
        }.items()
    }
    assert 0.5 < seconds["piano"] < 1.5
    assert 3 < seconds["cymbal"] < 6
    assert 10 < seconds["strings"] < 12
    assert seconds["held piano"] < 20  # a string fades, however long its key is held


def test_every_one_of_many_instruments_is_heard(soundfont: bytes, tmp_path: Path) -> None:
    """MIDI has 15 channels for them."""
    score = Score(480)
    for index in range(17):
        track = Track(program=7 * index)
        track.notes.append(Note(index * 960, 240, 60, 100))
        score.tracks.append(track)
    for kit in range(2):
        track = Track(is_drum=True, program=25 * kit)  # the second kit is electronic
        track.notes.append(Note((17 + kit) * 960, 240, 38, 100))
        score.tracks.append(track)
    samples = heard(score, soundfont, tmp_path)
    for index in (0, 14, 15, 17, 18):
        alone = Score(480)
        alone.tracks.append(score.tracks[index])
        start = index * SAMPLE_RATE
        expected = heard(alone, soundfont, tmp_path)[start : start + SAMPLE_RATE // 4]
        assert np.corrcoef(samples[start : start + SAMPLE_RATE // 4], expected)[0, 1] > 0.98, index


def test_loud_music_does_not_clip(soundfont: bytes, tmp_path: Path) -> None:
    """A chord of many instruments is more than the synthesizer's full scale."""
    score = Score(480)
    for program in range(56, 70):
        track = Track(program=program)
        for pitch in (48, 55, 60, 64):
            track.notes.append(Note(0, 1920, pitch, 127))
        score.tracks.append(track)
    samples = np.abs(heard(score, soundfont, tmp_path))
    assert samples.max() == pytest.approx(0.9, abs=1e-4)
    assert (samples > 0.89).sum() < 20  # clipped sound is flat at the top


def test_soft_music_loses_nothing(soundfont: bytes, tmp_path: Path) -> None:
    """The synthesizer's 16 bits would leave a third of the sound of velocity 10 out."""
    soft, firm = (make_score((0, 960, 60, loud), (480, 960, 72, loud // 2)) for loud in (10, 64))
    np.testing.assert_array_equal(heard(soft, soundfont, tmp_path), heard(firm, soundfont, tmp_path))


def test_the_mix_of_the_source_is_not_played(soundfont: bytes, tmp_path: Path) -> None:
    plain, mixed = (make_score((0, 960, 60, 100), (960, 960, 62, 100)) for _ in range(2))
    for time, number, value in ((0, 7, 20), (960, 7, 127), (0, 10, 0), (0, 91, 127)):
        mixed.tracks[0].controls.append(ControlChange(time, number, value))
    np.testing.assert_array_equal(heard(plain, soundfont, tmp_path), heard(mixed, soundfont, tmp_path))


def test_the_same_scores_give_the_same_bytes_in_files_of_their_own(soundfont: bytes, tmp_path: Path) -> None:
    scores = [make_score((0, 480, pitch, 100)) for pitch in (50, 60, 70)]
    render_sounds({tmp_path / f"{index}.wav": score for index, score in enumerate(scores)}, soundfont)
    render_sounds({tmp_path / f"again-{index}.wav": score for index, score in enumerate(scores)}, soundfont)
    files = [(tmp_path / f"{index}.wav").read_bytes() for index in range(3)]
    assert files == [(tmp_path / f"again-{index}.wav").read_bytes() for index in range(3)]
    assert len(set(files)) == 3


def test_an_mp3_is_the_same_sound_in_a_fraction_of_the_bytes(soundfont: bytes, tmp_path: Path) -> None:
    score = make_score(*((480 * index, 480, 48 + 5 * index, 100) for index in range(8)))
    render_sounds({tmp_path / "x.wav": score, tmp_path / "x.mp3": score}, soundfont)
    (plain, rate), (lossy, lossy_rate) = (soundfile.read(tmp_path / f"x.{suffix}") for suffix in ("wav", "mp3"))
    assert rate == lossy_rate == SAMPLE_RATE
    assert (tmp_path / "x.mp3").stat().st_size < (tmp_path / "x.wav").stat().st_size / 4
    length = min(len(plain), len(lossy))
    assert length > 0.99 * len(plain)
    assert np.corrcoef(plain[:length], lossy[:length])[0, 1] > 0.99
    assert np.abs(lossy).max() < 1


@pytest.mark.parametrize(
    ("notes", "options"),
    [
        ([(0, 0, 60, 100)], {}),
        ([(-100, 480, 60, 100)], {}),
        ([(0, 480, 0, 127), (0, 480, 127, 127)], {"program": 127}),
        ([(0, 480, 38, 100)], {"program": 127, "is_drum": True}),
        ([(0, 480, pitch, 127) for pitch in range(128)], {}),
    ],
    ids=["no length", "before the start", "outermost pitches", "no such kit", "all keys"],
)
def test_extreme_notes_are_heard(
    notes: list[tuple[int, int, int, int]], options: dict[str, Any], soundfont: bytes, tmp_path: Path
) -> None:
    assert np.abs(heard(make_score(*notes, **options), soundfont, tmp_path)).max() > 0.89


@pytest.mark.parametrize("tempo", [1e-3, 4.0, 1e5, 1e9])
def test_extreme_tempos_are_played(
    tempo: float, soundfont: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sound, "LONGEST", 5.0)
    score = make_score((0, 480, 60, 100), (960, 480, 64, 100))
    score.tempos.append(Tempo(0, tempo))
    assert np.abs(heard(score, soundfont, tmp_path)).max() > 0.89


def test_a_piece_without_end_is_cut_and_a_line_says_so(
    soundfont: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sound, "LONGEST", 60.0)
    score = make_score((0, 2**30, 60, 100), (57600, 960, 72, 100), (2**30, 480, 60, 100), program=19)
    with caplog.at_level(logging.WARNING):
        samples = heard(score, soundfont, tmp_path)
    assert caplog.messages == ["sound.wav holds only the first 1 minutes of its piece"]
    assert 60 < len(samples) / SAMPLE_RATE < 60 + 6


def put(content: bytes, place: int, value: bytes) -> bytes:
    return content[:place] + value + content[place + len(value) :]


def damaged(soundfont: bytes) -> dict[str, bytes]:
    """Damaged sound fonts by what is wrong with them."""
    samples, headers = soundfont.index(b"smpl"), soundfont.index(b"shdr")
    size = struct.unpack("<I", soundfont[samples + 4 : samples + 8])[0]
    huge = b"\xff" * 4
    few = soundfont[: samples - 8] + struct.pack("<I4s4sI", 1012, b"sdta", b"smpl", 1000)
    return {
        "empty": b"",
        "text": b"a sound font\n" * 1000,
        "header only": soundfont[:12],
        "first half": soundfont[: len(soundfont) // 2],
        "end missing": soundfont[:-5000],
        "huge chunk": put(soundfont, samples + 4, huge),
        "huge list": put(soundfont, headers + 4, huge),
        # Of these two the synthesizer reads beyond the samples, and panics.
        "few samples": few + soundfont[samples + 8 : samples + 1008] + soundfont[samples + 8 + size :],
        "samples beyond the end": put(soundfont, headers + 28, b"\xff" * 4600),
        "silent": put(soundfont, samples + 8, bytes(size)),
    }


KINDS = list(damaged(b"smpl\0\0\0\0shdr"))


@pytest.mark.usefixtures("no_traces")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_sound_font_is_one_line(
    kind: str, soundfont: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.sf2"
    path.write_bytes(damaged(soundfont)[kind])
    with pytest.raises(InputError) as caught:
        load_soundfont(path)
    assert str(caught.value).startswith(f"{path} cannot be used as a sound font: ")
    assert str(caught.value).count("\n") == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("place", ["nowhere.sf2", "."])
def test_a_missing_sound_font_is_one_line(place: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the sound font .* cannot be read: .*: name an \.sf2 file"):
        load_soundfont(tmp_path / place)


def test_another_sound_font_plays(soundfont: bytes, tmp_path: Path) -> None:
    samples = soundfont.index(b"smpl") + 8
    (tmp_path / "x.sf2").write_bytes(put(soundfont, samples + 1_000_000, bytes(1_000_000)))
    assert load_soundfont(tmp_path / "x.sf2") != soundfont


@pytest.mark.usefixtures("no_traces")
@pytest.mark.parametrize("end", ["panic", "abort"])
def test_a_synthesizer_that_dies_is_one_line_and_leaves_no_file(
    end: str, soundfont: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def abort(*_: object) -> None:
        os.abort()

    if end == "panic":
        soundfont = damaged(soundfont)["few samples"]
    else:
        monkeypatch.setattr(sound, "_mix", abort)
    with pytest.raises(InputError, match=r"x\.wav cannot be rendered: .*: try another sound font"):
        render_sounds({tmp_path / "x.wav": make_score((0, 480, 60, 100))}, soundfont)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("package", ["midirenderer", "pretty_midi"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed.*midimamba\[demo\]"):
        load_soundfont()


def test_mp3_is_refused_where_no_encoder_is_and_wav_never(monkeypatch: pytest.MonkeyPatch) -> None:
    check_encoder("mp3")
    monkeypatch.setattr(soundfile, "available_formats", dict)
    with pytest.raises(InputError, match=r"cannot write mp3 here: install libsndfile 1\.1"):
        check_encoder("mp3")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(InputError, match=r"soundfile is not installed.*midimamba\[demo\]"):
        check_encoder("mp3")
    check_encoder("wav")


def test_the_sound_font_is_found_without_importing_its_package() -> None:
    assert find_spec("pretty_midi") is not None
    assert "pretty_midi" not in sys.modules


@pytest.mark.parametrize(
    ("frequency", "gain"), [(100, 1), (1000, 1), (9000, 1), (10_500, 1), (14_000, 0), (20_000, 0)]
)
def test_halving_the_rate_keeps_what_fits_and_folds_nothing_back(frequency: int, gain: int) -> None:
    tone = np.sin(2 * np.pi * frequency * np.arange(48_000) / 48_000).astype(np.float32)
    np.testing.assert_allclose(sound._halved(tone)[50:-50], gain * tone[::2][50:-50], atol=3e-3)
