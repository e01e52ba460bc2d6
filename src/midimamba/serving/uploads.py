"""Uploads are files of strangers: they are read in a process of their own, with bounds of time and memory.

It starts before the model is loaded, without threads, so that it can fork a worker for each upload; see
[`~midimamba.corpus.workers`]. What could go wrong with an upload goes wrong there: it is read, checked and encoded
once, as the sampler will do it.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

from starlette.exceptions import HTTPException
from symusic.core import ScoreTick

from midimamba.commands import chosen_tracks
from midimamba.corpus.workers import Lost, Mark, run_bounded
from midimamba.errors import InputError
from midimamba.loading import load_processor
from midimamba.tokenization.ingest import MidiRefusedError, read_unordered
from midimamba.tokenization.processor import MidiProcessor

_START_SECONDS = 120.0
_END_SECONDS = 2.0
# Byte-pair encoding can write several notes as one token, but hardly more than these. More need not be encoded.
_MOST_NOTES_PER_TOKEN = 8


class Upload(NamedTuple):
    """
    A MIDI file from a client.

    Args:
        content (`bytes`): the file.
        bars (`tuple[int, int]`, *optional*): the bars to write again, counted from 1; `None` to continue the piece.
        tracks (`Sequence[int]`, *optional*): the tracks to write again, counted from 1.
    """

    content: bytes
    bars: tuple[int, int] | None = None
    tracks: Sequence[int] | None = None


class Song(NamedTuple):
    """
    An upload that has been read.

    Args:
        score (`symusic.Score`): the piece.
        tracks (`list[int]`, *optional*): indices of the tracks to write again.
    """

    score: ScoreTick
    tracks: list[int] | None


class UploadReader:
    """
    The process that reads uploads, one after the other. If it dies, the next upload starts another.

    Args:
        model (`str`): whose processor encodes them.
        max_prompt_tokens (`int`): uploads with more tokens are refused.
    """

    def __init__(self, model: str, max_prompt_tokens: int):
        self._arguments = (model, max_prompt_tokens)
        # Its one thread waits for the process, so that the event loop does not.
        self._waiting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="uploads")
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")  # a fork would keep the sockets of clients open
        self._connection, theirs = context.Pipe()
        # Not a daemon, because daemons may not have workers. It ends with the pipe.
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments))
        with _deaf_to_interrupts():
            self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait until the process has loaded what it needs.

        Raises:
            RuntimeError: if it cannot.
        """
        if not self._connection.poll(_START_SECONDS):
            raise RuntimeError("the process that reads uploads does not start")
        with suppress(EOFError, OSError):
            self._connection.recv()
            return
        raise RuntimeError("the process that reads uploads ended as it started")

    async def read(self, upload: Upload) -> Song:
        """Read an upload.

        Raises:
            HTTPException: if it cannot be used; in one line, why.
        """
        found = await asyncio.get_running_loop().run_in_executor(self._waiting, self._ask, upload)
        if isinstance(found, Song):
            return found
        raise HTTPException(422, found)

    def _ask(self, upload: Upload) -> Song | str:
        try:
            self._connection.send(upload)
            found: Song | str = self._connection.recv()
        except (EOFError, OSError):
            self._end()
            self._start()
            self.wait_until_ready()
            return "the file cannot be used: the process that read it has died"
        return found

    def close(self) -> None:
        """End the process."""
        self._waiting.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _end(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join(_END_SECONDS)
        self._process.kill()
        self._process.join()
        self._process.close()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal. One that starts within does not hear it: it ends with the pipe."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _serve(connection: Connection, model: str, max_prompt_tokens: int) -> None:
    """The life of the process: it ends when the pipe does, or when it is told to, and its worker with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # That a model cannot be loaded, the server says itself.
    with suppress(EOFError, OSError, InputError, SystemExit):
        read = partial(read_upload, load_processor(model), max_prompt_tokens)
        connection.send(None)
        for asked, found in run_bounded(read, _uploads(connection), workers=1):
            if asked:
                connection.send(f"the file cannot be used: {found.reason}" if isinstance(found, Lost) else found)
    os._exit(0)  # the interpreter would take seconds to end torch


def _uploads(connection: Connection) -> Iterator[tuple[str, Upload | None]]:
    """Uploads as they come. After each comes nothing, because a worker's next task is taken before its last result."""
    while True:
        yield "upload", connection.recv()
        yield "", None


def read_upload(processor: MidiProcessor, max_tokens: int, upload: Upload | None, mark: Mark) -> Song | str | None:
    """What becomes of an upload: the piece, or a line that says why it cannot be used."""
    if upload is None:
        return None
    try:
        score = read_unordered(upload.content)[0]
        tracks = chosen_tracks(upload.tracks, [track.name for track in score.tracks])
        if upload.bars is None and score.note_num() > max_tokens * _MOST_NOTES_PER_TOKEN:
            return _too_long(f"{score.note_num():,} notes", max_tokens)
        if upload.bars is None:
            ids = processor.encode(score)
        else:
            ids = processor.infill(score, upload.bars, tracks)["input_ids"]
    except MidiRefusedError as error:
        return f"the file cannot be used: {error}"
    except InputError as error:
        return str(error)
    if len(ids) > max_tokens:
        return _too_long(f"{len(ids):,} tokens", max_tokens)
    return Song(score, tracks)


def _too_long(length: str, max_tokens: int) -> str:
    return f"the file has {length}, and this server reads at most {max_tokens:,} tokens: send a shorter piece"
