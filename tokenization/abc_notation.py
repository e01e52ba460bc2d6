"""Read ABC notation, the text in which folk tunes are written down and exchanged (https://abcnotation.com/wiki/abc:standard).

abc2midi, a program that symusic ships, makes MIDI of it. symusic starts it without any bound and keeps what it says to
itself. Here it runs with bounds of time, memory and output, and what it does not understand is told. Three of its
habits are undone: it starts every note a tick late, it spreads the notes of a chord, and it misplaces changes of meter
and key in later voices. It also moves such a change to the start of the rests right before it, which stays.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from symusic import Note
from symusic.core import ScoreTick

# Of abc2midi: a tune takes 10 milliseconds, and a file of 16 MB that is one tune takes 3 seconds.
_MAX_SECONDS = 4
_MAX_BYTES = 2**29
_MAX_OUTPUT = 2**24
NO_TUNE = "it holds no ABC tune: each begins with a line such as X:1"
_FINEST = 5  # ticks: every time is a multiple, or one tick late
_BOM = b"\xef\xbb\xbf"
_TUNE = re.compile(rb"^X:[^\n]*\n", re.MULTILINE)
_FIELD_FIRST = re.compile(rb"\s*(?:%[^\n]*\n\s*)*[A-Za-z]:")
# What stands before the first tune and is meant for all of them; the rest of it is text for readers.
_SHARED = re.compile(rb"^(?:[A-Za-z]:|%%)[^\n]*$", re.MULTILINE)
_INCLUDE = re.compile(rb"^[ \t]*(?:%%|I:)[ \t]*abc-include", re.MULTILINE | re.IGNORECASE)
_ERROR = re.compile(r"^Error in line-char (\d+)-\d+ : *(.+)$", re.MULTILINE)
_ADDED = b"%%MIDI chordattack 0\n"  # after the first line, so that lines have a number one higher


class AbcError(ValueError):
    """ABC notation cannot be used. The message says why, in plain words."""


def is_abc(content: bytes) -> bool:
    """Whether the content of a file is ABC notation: text with a tune in it, or that begins with a field."""
    if b"\0" in content or content[:4] in (b"MThd", b"RIFF"):
        return False
    content = _as_lines(content)
    return _TUNE.search(content) is not None or _FIELD_FIRST.match(content) is not None


class Tunes:
    """
    The tunes of a file, each as a file of its own with the fields and directives that are meant for all of them.

    Args:
        content (`bytes`): of the file.
    """

    def __init__(self, content: bytes) -> None:
        self._content = _as_lines(content)
        first = _TUNE.search(self._content)
        head = self._content[: first.start()] if first else b""
        self._shared = b"".join(line + b"\n" for line in _SHARED.findall(head))

    def places(self) -> Iterator[tuple[int, int]]:
        """Where each tune begins, and how many bytes it has as a file of its own."""
        start = None
        for found in _TUNE.finditer(self._content):
            if start is not None:
                yield start, found.start() - start + len(self._shared)
            start = found.start()
        if start is not None:
            yield start, len(self._content) - start + len(self._shared)

    def read(self, start: int, size: int) -> bytes:
        """The tune at a place."""
        return self._shared + self._content[start : start + size - len(self._shared)]


def midi_of(content: bytes) -> tuple[bytes, list[str]]:
    """
    Make MIDI of one tune.

    Args:
        content (`bytes`): a file with one tune.

    Returns:
        `tuple[bytes, list[str]]`: the content of a MIDI file, for [`settled`], and in plain English what of the tune
        could not be read.

    Raises:
        AbcError: if there is no tune, or more than one, or abc2midi makes nothing of it.
    """
    tunes = Tunes(content)
    number = sum(1 for _ in tunes.places())
    if number == 0:
        raise AbcError(NO_TUNE)
    if number > 1:
        raise AbcError(f"it holds {number:,} ABC tunes: put the one that is meant into a file of its own")
    tune = tunes.read(*next(tunes.places()))
    if _INCLUDE.search(tune):
        raise AbcError("it includes another file of ABC notation: put that text into this file")
    text = _TUNE.sub(rb"\g<0>" + _ADDED, tune)
    with tempfile.TemporaryDirectory(prefix="midimamba-") as folder:
        source, target = Path(folder, "tune.abc"), Path(folder, "tune.mid")
        source.write_bytes(text)
        code, said = _run([_program(), source.name, "-o", target.name, "-quiet"], folder)
        errors = _ERROR.findall(said)
        first_error = f"{errors[0][1]}, line {max(int(errors[0][0]) - 1, 1)}" if errors else ""
        if code or not target.is_file():
            raise AbcError(f"abc2midi makes no music of it{f' ({first_error})' if first_error else ''}")
        midi = target.read_bytes()
    more = f", and {len(errors) - 1:,} more" if len(errors) > 1 else ""
    return midi, [f"ABC that abc2midi does not understand ({first_error}{more}), left out or guessed"] * bool(errors)


def settled(score: ScoreTick, conductor: ScoreTick) -> ScoreTick:
    """
    What abc2midi wrote, with notes on their beats, and with meters, keys and tempos of the first voice.

    Args:
        score (`symusic.Score`): of the whole MIDI file.
        conductor (`symusic.Score`): of its first tracks alone, see [`conductor_of`].
    """
    for track in score.tracks:
        notes = track.notes.numpy()
        late = (notes["time"] > 0).astype(np.int32)
        track.notes = Note.from_numpy(
            notes["time"] - late, notes["duration"] + late, notes["pitch"], notes["velocity"]
        )
    for events in (conductor.time_signatures, conductor.key_signatures, conductor.tempos):
        for event in events:
            event.time -= event.time % _FINEST == 1
    score.time_signatures = conductor.time_signatures
    score.key_signatures = conductor.key_signatures
    score.tempos = conductor.tempos
    return score


def conductor_of(midi: bytes) -> bytes:
    """The MIDI file with its first two tracks alone: the tempos and the first voice. There may be only one."""
    number, end = min(2, int.from_bytes(midi[10:12])), 14
    for _ in range(number):
        end += 8 + int.from_bytes(midi[end + 4 : end + 8])
    return midi[:10] + number.to_bytes(2) + midi[12:end]


def _as_lines(content: bytes) -> bytes:
    return content.removeprefix(_BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\n"


def _program() -> str:
    program = os.environ.get("SYMUSIC_ABC2MIDI")  # which symusic sets when it is imported
    if program is None:
        raise AbcError("abc2midi is missing, which reads ABC: install symusic 0.6 or newer")
    return program


def _run(command: list[str], folder: str) -> tuple[int, str]:
    """The exit code of a program and what it says, if it ends in time."""
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            _bound(process.pid)
            said, _ = process.communicate(timeout=_MAX_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise AbcError(f"reading it as ABC took longer than {_MAX_SECONDS} seconds") from error
    if process.returncode < 0:
        raise AbcError(f"abc2midi died of it (signal {-process.returncode})")
    return process.returncode, said.decode(errors="replace")


def _bound(process: int) -> None:
    """Bound what a process may take, where the system can. The bounds also hold if this process is killed."""
    if sys.platform != "linux":
        return
    import resource

    limits = {resource.RLIMIT_CPU: _MAX_SECONDS, resource.RLIMIT_AS: _MAX_BYTES, resource.RLIMIT_FSIZE: _MAX_OUTPUT}
    try:
        for kind, limit in limits.items():
            hard = resource.prlimit(process, kind)[1]
            lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.prlimit(process, kind, (lower, lower))
    except ProcessLookupError:  # it has ended already
        return


__all__ = ["NO_TUNE", "AbcError", "Tunes", "conductor_of", "is_abc", "midi_of", "settled"]
