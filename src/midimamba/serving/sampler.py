"""One thread that samples for all requests, and the bounded line of requests before it."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any
from uuid import uuid4

from starlette.exceptions import HTTPException

# The share of the last request in the mean time per request, from which `Retry-After` follows.
_RECENT = 0.3


class Job:
    """
    One request, from its arrival to its answer.

    Args:
        name (`str`): its id, by which it can be cancelled.
        has_upload (`bool`): whether an upload is read first.
        seconds (`float`): after this time it is ended.
    """

    def __init__(self, name: str, has_upload: bool, seconds: float):
        self.name, self.has_upload = name, has_upload
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # so that nobody who waits for it can cancel it
        self.work: Callable[[], Any] | None = None
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._reason: tuple[int, str] | None = None

    def stop(self, status: int, reason: str) -> None:
        """End it at the next token, with this answer."""
        if self._reason is None:
            self._reason = (status, reason)

    def check(self) -> None:
        """Called after every token.

        Raises:
            HTTPException: if the request was cancelled, or its time is over.
        """
        if time.monotonic() > self._deadline:
            self.stop(504, f"the request took longer than {self._seconds:g} seconds: ask for fewer pieces or bars")
        if self._reason is not None:
            raise HTTPException(*self._reason)


class Sampler:
    """
    Runs one job after the other, in the order in which they come.

    Args:
        max_waiting (`int`): the most jobs beside the one that runs. There are as many places again for jobs with an
            upload, so that files which take long to read hold up nobody else.
        max_seconds (`float`): the time for each, waiting included.
    """

    def __init__(self, max_waiting: int, max_seconds: float):
        self._max_waiting, self._max_seconds = max_waiting, max_seconds
        self._jobs: dict[str, Job] = {}  # all requests that are not answered yet
        self._line: deque[Job] = deque()  # those of them that wait for the thread
        self._changed = Condition()
        self._closed = False
        self._mean = 1.0
        self._thread = Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._jobs)

    @contextmanager
    def place(self, name: str | None, has_upload: bool = False) -> Iterator[Job]:
        """A place for a request, which is free again at the end, whatever happens.

        Args:
            name (`str`, *optional*): the id that the client chose.
            has_upload (`bool`, *optional*, defaults to `False`): whether an upload is read first.

        Raises:
            HTTPException: if there is no place, or the id is in use.
        """
        job = Job(name or uuid4().hex, has_upload, self._max_seconds)
        with self._changed:
            if self._closed:
                raise HTTPException(503, "the server is shutting down")
            if job.name in self._jobs:
                raise HTTPException(409, f"a request with the id {job.name!r} is at work: choose another id")
            taken = sum(other.has_upload == has_upload for other in self._jobs.values())
            if taken > self._max_waiting:
                seconds = math.ceil(min(self._mean * len(self._jobs), self._max_seconds))
                raise HTTPException(
                    503,
                    f"{taken} requests wait or are at work, and there is no place for more: try again in {seconds} s",
                    {"Retry-After": str(seconds)},
                )
            self._jobs[job.name] = job
        try:
            yield job
        finally:
            job.stop(409, "the request has ended")
            with self._changed:
                del self._jobs[job.name]
                self._leave(job)

    def run(self, job: Job, work: Callable[[], Any]) -> "Future[Any]":
        """Put a job in the line.

        Args:
            job ([`Job`]): from [`place`].
            work (`Callable[[], Any]`): runs in the thread. It has to call `job.check` often.

        Returns:
            `concurrent.futures.Future` of what `work` returns.
        """
        job.work = work
        with self._changed:
            self._line.append(job)
            self._changed.notify()
        return job.future

    def cancel(self, name: str) -> bool:
        """Cancel a request by its id; whether there is one."""
        with self._changed:
            if (job := self._jobs.get(name)) is None:
                return False
            self._end(job, 409, "the request was cancelled")
            return True

    def end(self, job: Job) -> None:
        """End a request whose client has gone."""
        with self._changed:
            self._end(job, 409, "the client has gone")

    def close(self) -> None:
        """Cancel all requests, and take no more."""
        with self._changed:
            self._closed = True
            for job in list(self._jobs.values()):
                self._end(job, 503, "the server is shutting down")
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, after [`close`]."""
        self._thread.join(seconds)

    def _end(self, job: Job, status: int, reason: str) -> None:
        job.stop(status, reason)
        if self._leave(job):
            job.future.set_exception(HTTPException(status, reason))

    def _leave(self, job: Job) -> bool:
        """Take a job out of the line; whether it was there."""
        if job not in self._line:
            return False
        self._line.remove(job)
        return True

    def _run(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            try:
                job.check()
                assert job.work is not None
                job.future.set_result(job.work())
            except Exception as error:  # whatever it is, the next request must not suffer
                job.future.set_exception(error)
            self._mean += _RECENT * (time.monotonic() - start - self._mean)
            job.work = None  # the upload and the client's connection go with it
            del job

    def _next(self) -> Job | None:
        """The next job, or `None` after [`close`]."""
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._closed)
            return self._line.popleft() if self._line else None
