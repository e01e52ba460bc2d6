"""The sound of a score, drums included: a synthesizer plays it with a sound font into a WAV or MP3 file.

midirenderer is written in Rust and panics on some damaged sound fonts. So it runs in worker processes, which may die
without the command.
"""

import io
import logging
import os
import wave
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from symusic import ControlChange, Note, Pedal, PitchBend, Score, Track
from symusic.core import ScoreTick
from tqdm.auto import tqdm

from midimamba.corpus.workers import Lost, Mark, run_bounded
from midimamba.errors import InputError
from midimamba.evaluation.rendering import import_demo, not_installed
from midimamba.files import write_whole
from midimamba.text import shortened

logger = logging.getLogger(__name__)

Audio = NDArray[np.float32]

# In hertz, mono: a quarter of the bytes of the synthesizer's stereo at 48 kHz, since pages and model cards carry the
# files. What is lost is faint: above 12 kHz lies 0.3 % of the energy of drums and less of other instruments, and the
# difference of the two channels is 15 dB below their mean.
SAMPLE_RATE = 24_000
PEAK = 0.9  # of full scale: a resampler or lossy encoder overshoots a little, and would clip at 1
LONGEST = 900.0  # seconds of a score; the synthesizer takes a gigabyte for them
# Velocity that the loudest note has at least. All others are raised with it, which changes no balance since gain goes
# with the square: where the loudest had 20, the synthesizer's 16 bits would lose reverb and fading notes.
_LOUDEST_AT_LEAST = 64
_SYNTHESIZED = 2 * SAMPLE_RATE  # the synthesizer's own rate, which cannot be chosen
_TAIL = 6.0  # seconds after the score in which it can fade; a cymbal takes 4
_INAUDIBLE = 1e-3  # of the peak: sound ends where nothing louder follows
_FADE = SAMPLE_RATE // 100  # samples over which a sound that is cut off ends without a click
_WAV_HEADER = 44  # bytes
_MAX_SECONDS = 300.0  # for one score; dense music of 15 minutes takes 40
_MAX_EXTRA_BYTES = 2**31


def load_soundfont(path: Path | None = None) -> bytes:
    """
    Read a sound font and play a few notes with it, so that a damaged one is found before any work.

    Args:
        path (`Path`, *optional*): a SoundFont 2 file (`.sf2`); by default `TimGM6mb.sf2`, which pretty_midi ships.

    Raises:
        InputError: if it is missing or cannot be played, or if midirenderer or pretty_midi is not installed.
    """
    import_demo("midirenderer")
    if path is None:
        package = find_spec("pretty_midi")  # found without an import, since only its sound font is used
        if package is None or package.origin is None:
            raise not_installed("pretty_midi")
        path = Path(package.origin).with_name("TimGM6mb.sf2")
    try:
        soundfont = path.read_bytes()
    except OSError as error:
        raise InputError(f"the sound font {path} cannot be read: {error.strerror}: name an .sf2 file") from error
    ((_, sound),) = _in_workers({path.with_suffix(".wav"): _trial()}, soundfont)
    if isinstance(sound, Lost):
        raise InputError(f"{path} cannot be used as a sound font: {sound.reason}: name a SoundFont 2 file (.sf2)")
    if not any(sound[_WAV_HEADER:]):
        raise InputError(f"{path} cannot be used as a sound font: it plays nothing: name another .sf2 file")
    return soundfont


def check_encoder(format: str) -> None:
    """
    Check that files of a format can be written here.

    Args:
        format (`str`): `"wav"`, which always can, or `"mp3"`.

    Raises:
        InputError: if soundfile is not installed, or its library is missing or cannot write MP3.
    """
    if format == "wav":
        return
    with suppress(OSError):  # soundfile's, if it finds no library
        if format.upper() in import_demo("soundfile").available_formats():
            return
    raise InputError(f"libsndfile cannot write {format} here: install libsndfile 1.1 or newer, or choose wav")


def render_sounds(scores: Mapping[Path, ScoreTick], soundfont: bytes) -> None:
    """
    Play scores into mono files of 24 kHz whose loudest sample is at 90 % of full scale.

    Notes, programs, tempos, pedals and pitch bends are played. Other controllers, such as volume and pan, are not: no
    model writes them, so in a blind test they would tell real music apart. Sound ends when the last note has faded. A
    score without notes becomes a second of silence. The same score gives the same bytes.

    Args:
        scores (`Mapping[Path, symusic.Score]`): by the file to write, whose suffix is `.wav` (16-bit PCM) or `.mp3`.
            It is replaced atomically. Times are in ticks. Only the first 15 minutes of a score are played.
        soundfont (`bytes`): what [`load_soundfont`] returned.

    Raises:
        InputError: if the synthesizer fails at a score.
    """
    for path, score in scores.items():
        if _seconds(score) > LONGEST:
            logger.warning("%s holds only the first %d minutes of its piece", path.name, LONGEST // 60)
    sounds = _in_workers(scores, soundfont)
    for path, sound in tqdm(sounds, total=len(scores), desc="rendering", leave=False, disable=None):
        if isinstance(sound, Lost):
            raise InputError(f"{path.name} cannot be rendered: {sound.reason}: try another sound font")
        write_whole(path, sound)


def _in_workers(scores: Mapping[Path, ScoreTick], soundfont: bytes) -> Iterator[tuple[Path, bytes | Lost]]:
    outcomes = run_bounded(
        partial(_play, soundfont=soundfont),
        ((str(path), (score, path.suffix)) for path, score in scores.items()),
        min(len(scores), os.cpu_count() or 1),
        max_seconds=_MAX_SECONDS,
        max_extra_bytes=_MAX_EXTRA_BYTES + 2 * len(soundfont),
    )
    return ((Path(name), sound) for name, sound in outcomes)


def _play(task: tuple[ScoreTick, str], mark: Mark, soundfont: bytes) -> bytes | Lost:
    """The content of a sound file. Runs in a worker, whose stderr is closed: a panic writes a trace of the stack."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    score, suffix = task
    try:
        return _encode(_finish(_synthesize(score, soundfont)), suffix)
    except MemoryError:
        raise
    except BaseException as error:  # a panic is not an `Exception`
        return Lost(shortened(str(error), 200))


def _synthesize(score: ScoreTick, soundfont: bytes) -> Audio:
    """The sum of both channels at 48 kHz, with the tail; two samples of silence if the score has no notes."""
    if not score.note_num():
        return np.zeros(2, np.float32)
    volume = 127
    while (mixed := _mix(_parts(score, volume), soundfont)) is None:
        volume //= 2  # ends at the latest with silence
    return mixed


def _mix(parts: Iterator[bytes], soundfont: bytes) -> Audio | None:
    """The sum of both channels of all parts, or None if the synthesizer, whose samples have 16 bits, clips one."""
    midirenderer = import_demo("midirenderer")
    mixed = None
    for midi in parts:
        samples = np.frombuffer(midirenderer.render_wave_from(soundfont, midi), "<i2", offset=_WAV_HEADER)
        if samples.min() == -32768 or samples.max() == 32767:
            return None
        mono = samples.reshape(-1, 2).sum(axis=1, dtype=np.float32)
        mixed = mono if mixed is None else mixed[: len(mono)] + mono[: len(mixed)]  # rounding may cost a sample
    return mixed


def _parts(score: ScoreTick, volume: int) -> Iterator[bytes]:
    """MIDI files of one length that together are the score: the synthesizer has 15 channels, and one for drums."""
    timed: Any = score.to("second")
    tracks = [track for track in timed.tracks if len(track.notes)]
    seconds = min(_seconds(score), LONGEST)
    loudest = max(int(track.notes.numpy()["velocity"].max()) for track in tracks)
    lift = max(_LOUDEST_AT_LEAST / max(loudest, 1), 1.0)
    pitched = [track for track in tracks if not track.is_drum]
    drums = [track for track in tracks if track.is_drum]
    for part in range(max(-(-len(pitched) // 15), len(drums))):
        midi = Score(_SYNTHESIZED // 2)  # at the default of 120 quarter notes per minute, a tick is a sample
        for track in pitched[15 * part : 15 * part + 15] + drums[part : part + 1]:
            midi.tracks.append(_in_samples(track, seconds, lift, volume))
        yield midi.dumps_midi()


def _in_samples(track: Any, seconds: float, lift: float, volume: int) -> Any:
    """What of a track sounds within some seconds, timed in samples, with velocities times `lift`, at a volume from 0
    to 127."""

    def samples(times: Any) -> NDArray[np.int32]:
        return np.round(np.clip(times, 0, seconds) * _SYNTHESIZED).astype(np.int32)

    played = Track(program=track.program, is_drum=track.is_drum)
    notes = {name: values[track.notes.numpy()["time"] < seconds] for name, values in track.notes.numpy().items()}
    starts, ends = samples(notes["time"]), samples(notes["time"] + notes["duration"])
    velocities = np.rint(notes["velocity"] * lift).astype(np.int8)
    played.notes = Note.from_numpy(starts, np.maximum(ends - starts, 1), notes["pitch"], velocities)
    pedals = track.pedals.numpy()
    starts, ends = samples(pedals["time"]), samples(pedals["time"] + pedals["duration"])
    played.pedals = Pedal.from_numpy(starts, ends - starts)
    bends = track.pitch_bends.numpy()
    played.pitch_bends = PitchBend.from_numpy(samples(bends["time"]), bends["value"])
    end = round((seconds + _TAIL) * _SYNTHESIZED)
    played.controls.extend([ControlChange(0, 7, volume), ControlChange(end, 123, 0)])  # 123: all notes off
    return played


def _seconds(score: ScoreTick) -> float:
    timed: Any = score.to("second")
    return float(timed.end())


def _finish(audio: Audio) -> Audio:
    """Halve the rate, cut what nobody hears at the end, and scale to the peak."""
    audio = _halved(audio)
    loudness = np.abs(audio)
    audible = np.flatnonzero(loudness > _INAUDIBLE * loudness.max())
    if not len(audible):
        return np.zeros(SAMPLE_RATE, np.float32)
    audio = audio[: audible[-1] + 1]
    audio[-_FADE:] *= np.linspace(1, 0, _FADE, dtype=np.float32)[-len(audio) :]
    scaled: Audio = audio * np.float32(PEAK / np.abs(audio).max())
    return scaled


def _halved(audio: Audio) -> Audio:
    """Every other sample, after a half-band low-pass: a windowed sinc, of which every other coefficient is 0."""
    places = np.arange(-31, 32, 2)
    taps = (np.sin(np.pi / 2 * places) / (np.pi * places) * np.hamming(63)[::2]).astype(np.float32)
    even, odd = audio[::2], audio[1::2]
    halved: Audio = even * np.float32(0.5)
    if len(odd) > len(taps):
        halved[: len(odd)] += np.convolve(odd, taps, "same")
    return halved


def _encode(audio: Audio, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".wav":
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes(np.rint(audio * 32767).astype("<i2").tobytes())
    else:
        import_demo("soundfile").write(buffer, audio, SAMPLE_RATE, format=suffix[1:].upper())
    return buffer.getvalue()


def _trial() -> ScoreTick:
    """A bar of drums and of one instrument from each of 15 families."""
    score = Score(480)
    for program in range(0, 120, 8):
        score.tracks.append(Track(program=program))
    score.tracks.append(Track(is_drum=True))
    for track in score.tracks:
        for step, pitch in enumerate(range(30, 96, 5)):
            track.notes.append(Note(60 * step, 60, pitch, 100))
    return score
