"""Read one file of MIDI or ABC safely: a score that is fit to tokenise, or a reason in plain words why it is not.

MidiTok trusts its input. Measured with MidiTok 3.1 and symusic 0.6 on malformed files: a time division of 0 ends in a
ZeroDivisionError, ticks beyond 2³¹ turn negative and end in a KeyError, and 60 bytes that hold one enormous pause
take gigabytes and minutes, because every empty bar becomes tokens. So all of it is checked before tokenising.
"""

import os
import zlib
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import IO, cast

import numpy as np
from symusic import Score
from symusic.core import ScoreQuarter, ScoreSecond, ScoreTick

from .abc_notation import AbcError, conductor_of, is_abc, midi_of, settled
from .open_notes import close_notes

# Of files that are read as music. What a file holds is told by its content, MIDI or ABC notation.
MUSIC_SUFFIXES = frozenset({".mid", ".midi", ".kar", ".rmi", ".abc"})

# A whole opera as MIDI is under 2 MB; beyond this it is not music, and reading it may exhaust the memory.
MAX_FILE_BYTES = 16 * 2**20
NOT_REGULAR = "it is not a regular file"
TOO_LARGE = f"the file is larger than {MAX_FILE_BYTES // 2**20} MB"
# The longest piano performances have some 30,000 notes. "Black MIDI" has millions, of which no model learns anything.
MAX_NOTES = 100_000
# 10,000 bars of 4/4, over five hours at 120 beats a minute. It also keeps every tick below 2³¹ at any time division.
MAX_QUARTERS = 40_000
# MidiTok removes repeated tempo changes one by one from an array, which is quadratic: 100,000 of them take seconds.
MAX_GLOBAL_EVENTS = 20_000
# General MIDI has 16 channels; some sequencers write a track for every voice or drum. 2¹⁶ empty tracks are an attack.
MAX_TRACKS = 1_024


class MidiRefusedError(ValueError):
    """A piece of MIDI cannot be used.

    Args:
        reason (`str`):
            What is wrong with it, in plain words.
        source (`str`, *optional*):
            The file it came from; precedes the reason in the message.
    """

    def __init__(self, reason: str, source: str | None = None) -> None:
        super().__init__(reason, source)
        self.reason = reason
        self.source = source

    def __str__(self) -> str:
        return self.reason if self.source is None else f"{self.source}: {self.reason}"


def read_score(source: str | Path | bytes | ScoreTick | ScoreQuarter | ScoreSecond) -> ScoreTick:
    """Read MIDI and check that it can be tokenized in reasonable time and memory.

    Args:
        source (`str`, `Path`, `bytes` or `symusic.Score`):
            A file, the content of a file, or a score, which is left as it is.

    Returns:
        `symusic.Score`: the score with its times in ticks and its events in order.

    Raises:
        MidiRefusedError: if the file cannot be read, is malformed, holds no note, or is beyond this module's limits.
    """
    return _in_order(read_unordered(source)[0])


def read_unordered(source: str | Path | bytes | ScoreTick | ScoreQuarter | ScoreSecond) -> tuple[ScoreTick, list[str]]:
    """[`read_score`] with the tracks in the order of the source, and in plain English what was changed to read it."""
    if isinstance(source, ScoreTick):
        return _checked(source), []
    if isinstance(source, ScoreQuarter | ScoreSecond):
        return _checked(cast(ScoreTick, source.to("tick"))), []
    if isinstance(source, bytes):
        score, _, changes = _parse_leniently(source)
        return _checked(score), changes
    try:
        return read_unordered(read_content(Path(source)))
    except MidiRefusedError as error:
        raise MidiRefusedError(error.reason, str(source)) from error


def is_midi(name: str) -> bool:
    """Whether a file of this name is a MIDI file or ABC notation, perhaps compressed (`.mid.gz`)."""
    return name.lower().removesuffix(".gz").endswith(tuple(MUSIC_SUFFIXES))


def read_content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        MidiRefusedError: if it cannot be read, is not a regular file, or is larger than `MAX_FILE_BYTES`.
    """
    with open_regular(path) as file:
        try:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise MidiRefusedError(TOO_LARGE)
            # Files of /proc have more bytes than they say. The log of the kernel has none, for now, which is None.
            content = cast(bytes | None, file.read(MAX_FILE_BYTES + 1))
        except OSError as error:
            raise MidiRefusedError(f"the file cannot be read ({error.strerror})") from error
    if content is None:
        raise MidiRefusedError("the file cannot be read (it keeps the reader waiting)")
    if len(content) > MAX_FILE_BYTES:
        raise MidiRefusedError(TOO_LARGE)
    return content


def open_regular(path: Path) -> IO[bytes]:
    """Open a file to read bytes. Pipes, sockets and devices are refused unopened: reading them may never end.

    Raises:
        MidiRefusedError: if it cannot be opened, or is not a regular file.
    """
    try:
        if not S_ISREG(path.stat().st_mode):
            raise MidiRefusedError(NOT_REGULAR)
        # Another process may have put a pipe in its place since.
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
        if S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    except MidiRefusedError:
        raise
    except (OSError, ValueError) as error:  # a ValueError for a path that holds a null byte
        raise MidiRefusedError(f"the file cannot be read ({getattr(error, 'strerror', None) or error})") from error
    raise MidiRefusedError(NOT_REGULAR)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_midi(content: bytes) -> tuple[ScoreTick, bool]:
    """Parse the content of a MIDI file, leniently if necessary.

    Some old sequencers wrote data bytes above 127, which the standard forbids. Such a file is read with these bytes
    clamped: of 385 malformed files that symusic refuses, 96 have no other defect. A file compressed by gzip, or
    wrapped in RIFF as Windows does (`.rmi`), is unwrapped, whatever its name. Notes that the file never ends are
    ended, see [`~midimamba.tokenization.open_notes.close_notes`]. A tune in ABC notation is read as well, see
    [`~midimamba.tokenization.abc_notation`].

    Returns:
        `tuple[symusic.Score, bool]`: the unchecked score, and whether bytes were clamped to read it.

    Raises:
        MidiRefusedError: if it is malformed, has no beats, or isn't a single piece.
    """
    score, clamped, _ = _parse_leniently(content)
    return score, clamped


def _parse_leniently(content: bytes) -> tuple[ScoreTick, bool, list[str]]:
    """[`parse_midi`], and in plain English what was changed."""
    content = _unwrap(content)
    if not content:
        raise MidiRefusedError("the file is empty")
    if is_abc(content):
        return _parse_abc(content)
    _check_header(content)
    try:
        score, changes = _parse(content, sanitize=False)
        return score, False, changes
    except MidiRefusedError as refusal:
        try:
            score, changes = _parse(content, sanitize=True)
            return score, True, ["data bytes above 127 read as 127", *changes]
        except MidiRefusedError:
            raise refusal from None  # the file's own defect, not what is left of it after clamping


def _parse_abc(content: bytes) -> tuple[ScoreTick, bool, list[str]]:
    try:
        midi, changes = midi_of(content)
    except AbcError as error:
        raise MidiRefusedError(str(error)) from error
    score, conductor = (_parse(part, sanitize=False)[0] for part in (midi, conductor_of(midi)))
    return settled(score, conductor), False, changes


def _unwrap(content: bytes) -> bytes:
    """The MIDI file in a gzip or RIFF file; other content as it is."""
    if content[:2] == b"\x1f\x8b":
        try:
            decoder = zlib.decompressobj(wbits=31)
            content = decoder.decompress(content, MAX_FILE_BYTES + 1)
        except zlib.error as error:
            raise MidiRefusedError(f"it is compressed, and damaged ({error})") from error
        if len(content) > MAX_FILE_BYTES:
            raise MidiRefusedError(TOO_LARGE)
        if not decoder.eof:
            raise MidiRefusedError("it is compressed, and its end is missing")
    if content[:4] != b"RIFF" or content[8:12] != b"RMID":
        return content
    place = 12
    while place + 8 <= len(content):
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        if content[place : place + 4] == b"data":
            return content[place + 8 : place + 8 + size]
        place += 8 + size + size % 2  # chunks are padded to even lengths
    raise MidiRefusedError("it is a RIFF file without MIDI data")


def _check_header(content: bytes) -> None:
    """symusic reads format 2 as if its patterns sounded together, and calls a SMPTE division malformed."""
    magic, kind, division = content[:4], content[8:10], content[12:14]
    if magic != b"MThd" or len(division) < 2:
        return  # malformed in a way that the parser describes
    if division[0] & 0x80:
        raise MidiRefusedError("its times are SMPTE frames, not fractions of a beat, so it has no bars")
    if kind == b"\x00\x02":
        raise MidiRefusedError("it is of MIDI format 2: independent patterns, not one piece")


def _parse(content: bytes, sanitize: bool) -> tuple[ScoreTick, list[str]]:
    try:
        parse = partial(Score.from_midi, sanitize_data=sanitize)
        score, opened = close_notes(content, parse(content), parse)
        notes = f"{opened:,} notes that never end" if opened > 1 else "1 note that never ends"
        return score, [f"{notes}, ended with another of its pitch or with the track"] if opened else []
    except (RuntimeError, ValueError, IndexError, OverflowError) as error:
        detail = " ".join(str(error).split()).removeprefix("MiniMidi: ")
        raise MidiRefusedError(f"not a well-formed MIDI file ({detail})") from error


def check_score(score: ScoreTick) -> ScoreTick:
    """A copy of a score with its events in order, after a check that it can be tokenized.

    Raises:
        MidiRefusedError: if it holds no note, impossible times, or more than this module's limits allow.
    """
    return _in_order(_checked(score))


def _checked(score: ScoreTick) -> ScoreTick:
    _check_size(score)
    _check_notes(score)
    _check_global_events(score)
    return score


def _in_order(score: ScoreTick) -> ScoreTick:
    # Files keep tracks and simultaneous notes in any order. In a fixed order (by instrument, duration, pitch) equal
    # music has equal tokens, and a decoded score has the tokens it came from.
    ordered = score.sort(inplace=False)
    ordered.tracks.sort(lambda track: (track.is_drum, track.program), inplace=True)
    return ordered


def _check_size(score: ScoreTick) -> None:
    if score.ticks_per_quarter <= 0:
        raise MidiRefusedError("its time division is 0 ticks per quarter note, so times mean nothing")
    if len(score.tracks) > MAX_TRACKS:
        raise MidiRefusedError(f"it has {len(score.tracks):,} tracks; the limit is {MAX_TRACKS:,}")
    global_events = len(score.tempos) + len(score.time_signatures)
    if global_events > MAX_GLOBAL_EVENTS:
        raise MidiRefusedError(
            f"it has {global_events:,} tempo and time signature changes; the limit is {MAX_GLOBAL_EVENTS:,}"
        )


def _check_notes(score: ScoreTick) -> None:
    count = score.note_num()
    if count == 0:
        raise MidiRefusedError("it holds no notes")
    if count > MAX_NOTES:
        raise MidiRefusedError(f"it holds {count:,} notes; the limit is {MAX_NOTES:,}")
    notes = [track.notes.numpy() for track in score.tracks]
    starts = np.concatenate([track["time"] for track in notes]).astype(np.int64)
    durations = np.concatenate([track["duration"] for track in notes]).astype(np.int64)
    if durations.min() < 0:
        raise MidiRefusedError("a note ends before it starts")
    _check_times(np.concatenate([starts, starts + durations]), score.ticks_per_quarter)


def _check_global_events(score: ScoreTick) -> None:
    if any(tempo.mspq <= 0 for tempo in score.tempos):
        raise MidiRefusedError("a tempo of 0 microseconds per quarter note")
    if meter := next((m for m in score.time_signatures if m.numerator <= 0 or m.denominator <= 0), None):
        raise MidiRefusedError(f"a time signature of {meter.numerator}/{meter.denominator}")
    times = [event.time for events in (score.tempos, score.time_signatures) for event in events]
    _check_times(np.array([0, *times], dtype=np.int64), score.ticks_per_quarter)


def _check_times(ticks: np.ndarray, ticks_per_quarter: int) -> None:
    if ticks.min() < 0:
        raise MidiRefusedError("times beyond 2³¹ ticks, which wrap around to negative ones")
    quarters = int(ticks.max()) // ticks_per_quarter
    if quarters > MAX_QUARTERS:
        raise MidiRefusedError(f"it lasts {quarters:,} quarter notes; the limit is {MAX_QUARTERS:,}")
