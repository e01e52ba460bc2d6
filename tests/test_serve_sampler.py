"""The line before the sampler: bounded, in order, and free again whatever happens."""

import threading
import time
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from midimamba.serving.sampler import Job, Sampler


def closed(sampler: Sampler) -> None:
    sampler.close()
    sampler.join(5)
    assert not sampler._thread.is_alive()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["fine", "fails", "cancelled"]), max_size=12))
def test_jobs_run_in_order_and_each_ends_as_it_must(fates: list[str]) -> None:
    sampler = Sampler(max_waiting=20, max_seconds=60)
    gate, done = threading.Event(), []
    with sampler.place("gate") as first:
        sampler.run(first, gate.wait)
        places = [sampler.place(str(index)) for index in range(len(fates))]
        futures = []
        for index, (fate, place) in enumerate(zip(fates, places, strict=True)):

            def work(index: int = index, fate: str = fate) -> int:
                done.append(index)
                return 1 // (fate == "fine")

            futures.append(sampler.run(place.__enter__(), work))
        for index, fate in enumerate(fates):
            if fate == "cancelled":
                assert sampler.cancel(str(index))
        gate.set()
        for fate, future in zip(fates, futures, strict=True):
            error = future.exception(5)
            assert type(error) is {"fine": type(None), "fails": ZeroDivisionError, "cancelled": HTTPException}[fate]
        for place in places:
            place.__exit__(None, None, None)
    assert done == [index for index, fate in enumerate(fates) if fate != "cancelled"]
    assert len(sampler) == 0
    assert not sampler._line
    closed(sampler)


def test_there_is_no_place_beyond_the_limit_and_none_is_lost() -> None:
    sampler = Sampler(max_waiting=2, max_seconds=60)
    for _ in range(3):
        with sampler.place(None), sampler.place(None), sampler.place("last"):
            with pytest.raises(HTTPException) as refusal, sampler.place(None):
                pass
            assert refusal.value.status_code == 503
            assert refusal.value.headers is not None
            assert int(refusal.value.headers["Retry-After"]) >= 1
            with sampler.place(None, has_upload=True):  # has places of its own
                pass
        with pytest.raises(ZeroDivisionError), sampler.place("last"):
            _ = 1 // 0
        assert len(sampler) == 0
    closed(sampler)


def test_a_job_stops_when_it_is_cancelled_when_its_time_is_over_and_when_all_ends() -> None:
    def endless(job: Job) -> Any:
        while True:
            job.check()
            time.sleep(0.001)

    sampler = Sampler(max_waiting=2, max_seconds=0.2)
    for end, status in ((lambda: sampler.cancel("job"), 409), (lambda: True, 504), (sampler.close, 503)):
        with sampler.place("job") as job:
            future = sampler.run(job, partial(endless, job))
            end()
            error = future.exception(5)
            assert isinstance(error, HTTPException)
            assert error.status_code == status
    with pytest.raises(HTTPException, match="shutting down"), sampler.place(None):
        pass
    closed(sampler)


def test_whoever_leaves_while_waiting_leaves_nothing_in_the_line() -> None:
    sampler = Sampler(max_waiting=1, max_seconds=60)
    gate = threading.Event()
    with sampler.place("busy") as busy:
        sampler.run(busy, gate.wait)
        for _ in range(50):
            with sampler.place(None) as job:
                sampler.run(job, lambda: None)
        assert len(sampler._line) <= 1
        gate.set()
    closed(sampler)
