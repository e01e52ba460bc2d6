"""Folders with very many files, and what a command uses that reads them."""

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from symusic import Note, Score, Track

from midimamba.corpus.entries import Entry
from midimamba.corpus.sources import list_source, read_entries


def unpack(source: str, folder: Path, limit: int | None) -> list[Path]:
    """Write the MIDI files of a source as separate files, which MidiTok can read."""
    paths = []
    entries = [item for item in list_source(source) if isinstance(item, Entry)][:limit]
    for index, (_, content) in enumerate(read_entries(entries)):
        if isinstance(content, bytes):
            paths.append(folder / f"{index:06}.mid")
            paths[-1].write_bytes(content)
    return paths


def simulate(folder: Path, count: int, originals: list[Path]) -> None:
    """Write `count` files, a thousand per folder: links to real ones, or small pieces that all differ."""
    for index in range(count):
        thousand = folder / f"{index // 1000:04}"
        if index % 1000 == 0:
            thousand.mkdir(parents=True)
        target = thousand / f"{index:07}.mid"
        if originals:
            os.link(originals[index % len(originals)], target)
        else:
            digits = [index // 50**digit % 50 for digit in range(4)]
            score = Score(24)
            track = Track()
            for place, digit in enumerate(digits):
                track.notes.append(Note(24 * place, 24, 40 + digit, 64))
            score.tracks.append(track)
            score.dump_midi(target)


class Use(NamedTuple):
    """What a command and its workers used: time, time of processors, and peak memory in MB."""

    seconds: float
    processor_seconds: float
    peak_mb: float


def watch(command: list[str], processors: int | None = None) -> Use:
    """Run a command, if need be on so many processors; return what it used.

    The memory is what it and its workers wrote to. Pages of files that are only read do not count, because the system
    may drop them.
    """
    allowed = sorted(os.sched_getaffinity(0))[:processors]
    start, before = time.perf_counter(), os.times()
    process = psutil.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    peak, done = 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.2):
            try:
                family = [process, *process.children(recursive=True)]
                peak = max(peak, sum(member.memory_full_info().uss for member in family))
            except psutil.Error:
                continue  # one of the processes has just ended

    thread = threading.Thread(target=look)
    thread.start()
    code = process.wait()
    done.set()
    thread.join()
    if code != 0:
        raise RuntimeError(f"{command} ended with {code}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Use(time.perf_counter() - start, used, peak / 2**20)
