"""From what samples to what a client gets: pieces at the end, or notes as they come."""

import asyncio
import io
import json
import zipfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from midimamba.errors import InputError
from midimamba.generation import watched
from midimamba.serving.sampler import Job, Sampler
from midimamba.serving.service import Notes, Pieces
from midimamba.tokenization.constraints import ConflictError

Result = TypeVar("Result")

BUG = "the server failed, and its log says why: this is a bug, please report it"
ID_HEADER = "X-Request-ID"
# A client that is this many notes behind does not read.
_MAX_NOTES_BEHIND = 1024
_BEHIND = f"the client is {_MAX_NOTES_BEHIND} notes behind, so the request has ended: read faster"


async def answer_with_pieces(
    place: AbstractContextManager[Job], sampler: Sampler, request: Request, prepare: Callable[[], Awaitable[Pieces]]
) -> Response:
    """Sample pieces and answer with all of them. If the client goes, the sampling ends.

    Args:
        place (context manager of a [`Job`]): the place of the request.
        sampler ([`Sampler`]): where to sample.
        request (`Request`): what is answered.
        prepare (`Callable`): returns what samples.
    """
    with place as job:
        sample = await prepare()
        future = asyncio.wrap_future(sampler.run(job, lambda: _written(job, sample)))
        try:
            files = await _unless_gone(request, future)
        except Exception as error:
            raise _explained(error) from None
    return _packed(files, {ID_HEADER: job.name})


def _written(job: Job, sample: Pieces) -> list[bytes]:
    """MIDI files; runs in the thread of the sampler."""
    with watched(job.check):
        return [score.dumps_midi() for score in sample()]


def _packed(files: Sequence[bytes], headers: dict[str, str]) -> Response:
    if len(files) == 1:
        headers["Content-Disposition"] = 'attachment; filename="sample-00.mid"'
        return Response(files[0], media_type="audio/midi", headers=headers)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, content in enumerate(files):
            archive.writestr(zipfile.ZipInfo(f"sample-{index:02d}.mid"), content, zipfile.ZIP_DEFLATED)
    headers["Content-Disposition"] = 'attachment; filename="samples.zip"'
    return Response(buffer.getvalue(), media_type="application/zip", headers=headers)


async def answer_with_notes(
    place: AbstractContextManager[Job], sampler: Sampler, request: Request, prepare: Callable[[], Awaitable[Notes]]
) -> Response:
    """Answer with the notes of one piece, a line of JSON each, while it is sampled.

    The status is that of the first note: what is wrong before it is an error as any other. The place in the line is
    free when the sampling ends, even if the client has not read everything.

    Args:
        place, sampler, request: as for [`answer_with_pieces`].
        prepare (`Callable`): returns what samples notes.
    """
    with ExitStack() as stack:
        job = stack.enter_context(place)
        sample = await prepare()
        buffer = _Buffer()
        future = sampler.run(job, lambda: buffer.fill(job, sample))
        kept = stack.pop_all()
    future.add_done_callback(lambda _: kept.close())
    future.add_done_callback(lambda _: buffer.wake())
    try:
        await _unless_gone(request, asyncio.ensure_future(buffer.wait(future)))
        if future.done() and not buffer.lines:
            future.result()
    except BaseException as error:
        sampler.end(job)
        raise _explained(error) from None
    return _NoteStream(sampler, job, buffer)


class _Buffer:
    """Notes between the thread that samples them and the event loop that sends them."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque()
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def fill(self, job: Job, sample: Notes) -> int:
        """Sample all notes, in the thread of the sampler; return their number.

        Raises:
            HTTPException: if the client does not read them.
        """
        count = 0
        with watched(job.check):
            for note in sample():
                if len(self.lines) >= _MAX_NOTES_BEHIND:
                    raise HTTPException(409, _BEHIND)
                self.lines.append(json.dumps(note._asdict()) + "\n")
                self.wake()
                count += 1
        return count

    def wake(self) -> None:
        """Tell the event loop that there is something new, from any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, future: "Future[int]") -> None:
        """Wait until there are lines or the sampling has ended."""
        while not (self.lines or future.done()):
            await self._event.wait()
            self._event.clear()

    async def read(self, future: "Future[int]") -> AsyncIterator[str]:
        """All lines, the last of which says how it ended."""
        while self.lines or not future.done():
            await self.wait(future)
            some = [self.lines.popleft() for _ in range(len(self.lines))]
            if some:
                yield "".join(some)
        error = future.exception()
        if error is None:
            yield json.dumps({"done": True, "notes": future.result()}) + "\n"
        else:
            yield json.dumps({"detail": describe(error)}) + "\n"


class _NoteStream(StreamingResponse):
    """Sends the notes of a job, which ends when the client goes."""

    media_type = "application/x-ndjson"

    def __init__(self, sampler: Sampler, job: Job, buffer: _Buffer):
        super().__init__(buffer.read(job.future), headers={ID_HEADER: job.name})
        self._end = partial(sampler.end, job)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _unless_gone(request: Request, awaited: "asyncio.Future[Result]") -> Result:
    """Wait for something while the client does.

    Raises:
        HTTPException: if the client goes first. Nobody reads the answer.
    """
    gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnection(request))
    either: list[asyncio.Future[Any]] = [gone, awaited]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if awaited.done():
            return awaited.result()
        raise HTTPException(409, "the client has gone")
    finally:
        gone.cancel()
        awaited.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def describe(error: BaseException) -> str:
    """What a client is told of an error, in one line."""
    if isinstance(error, HTTPException):
        return error.detail
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "the server has not enough memory for this: ask for fewer pieces, bars or tokens"
    return BUG


def _explained(error: BaseException) -> BaseException:
    """An error of the sampling as an answer. A bug stays as it is, so that the log shows where it comes from."""
    known = isinstance(error, (InputError, MemoryError, torch.OutOfMemoryError))
    # Other input errors are about the model, which is not the client's.
    status = 422 if isinstance(error, ConflictError) else 500
    return HTTPException(status, describe(error)) if known else error
