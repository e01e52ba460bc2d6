"""Uploads are read in a process of its own, which no file takes down for long."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest
from serving_support import make_pair
from starlette.exceptions import HTTPException
from symusic import Note, Score, Track

from midimamba.serving.uploads import Song, Upload, UploadReader
from support import make_score

pytestmark = pytest.mark.slow  # the process takes seconds to start


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UploadReader]:
    folder = tmp_path_factory.mktemp("model")
    make_pair()[1].save_pretrained(folder)
    reader = UploadReader(str(folder), 2000)
    reader.wait_until_ready()
    yield reader
    family = psutil.Process(reader._process.pid).children(recursive=True)
    reader.close()
    assert not psutil.wait_procs(family, timeout=5)[1]


def read(reader: UploadReader, content: bytes) -> Song | str:
    try:
        return asyncio.run(reader.read(Upload(content)))
    except HTTPException as refusal:
        return refusal.detail


def hostile() -> dict[str, bytes]:
    """Files, by what is wrong with them."""
    crowd = Score(480)
    crowd.tracks.append(Track())
    for index in range(100_001):
        crowd.tracks[0].notes.append(Note(index, 1, 60, 64))
    pause = b"\xff\xff\xff\x7f\x90\x3c\x40\x10\x80\x3c\x40" * 2 + b"\x00\xff\x2f\x00"
    return {
        "the file is empty": b"",
        "not a well-formed MIDI file": os.urandom(5000),
        "it holds 100,001 notes; the limit is 100,000": crowd.dumps_midi(),
        "it lasts": b"MThd\0\0\0\x06\0\0\0\x01\0\x01MTrk" + len(pause).to_bytes(4, "big") + pause,
        "it is compressed, and damaged": b"\x1f\x8b\x08" + b"\xff" * 100,
    }


def test_a_hostile_file_is_refused_and_the_next_one_is_read(reader: UploadReader) -> None:
    score = make_score(1, bars=2)
    for reason, content in hostile().items():
        start = time.monotonic()
        found = read(reader, content)
        assert isinstance(found, str)
        assert found.startswith(f"the file cannot be used: {reason}")
        assert time.monotonic() - start < 7
        song = read(reader, score.dumps_midi())
        assert isinstance(song, Song)
        assert song.score.note_num() == score.note_num()


def test_it_recovers_from_the_death_of_the_worker_and_of_the_process(reader: UploadReader) -> None:
    content = make_score(1, bars=2).dumps_midi()
    assert isinstance(read(reader, content), Song)
    process = psutil.Process(reader._process.pid)
    (worker,) = process.children()
    worker.send_signal(signal.SIGKILL)
    while not isinstance(read(reader, content), Song):
        pass
    process.kill()
    assert read(reader, content) == "the file cannot be used: the process that read it has died"
    assert isinstance(read(reader, content), Song)
