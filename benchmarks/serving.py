"""`midimamba serve` under load: well-behaved clients alone, then together with every kind of bad company.

A tiny untrained model is served by the command itself. First only well-behaved clients ask for pieces, continuations
and streams; then others join them, 64 in all: some cancel or hang up at random, some never read, some send bodies that
are too large, malformed, or hostile MIDI. Beside them, a probe asks for /health. Memory, threads, file descriptors and
processes of the server are read every half second. The last line is JSON: `ratio` is what well-behaved clients got per
second in bad company over what they got alone, and `leaks` is what is left a while after the load. The benchmark fails
if the server ends, answers what it should not, or leaves a thread, a descriptor or a process.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import psutil
import torch
from symusic import Note, Score, Track

from measure import finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer

Client = Callable[["Load"], Awaitable[None]]
_SHORT = {"bars": 1, "max_new_tokens": 32}
_LONG = {"num": 16, "bars": 64, "max_new_tokens": 2048}
# Connections on which nothing moves are closed within this time.
_SETTLE_SECONDS = 45


class Load:
    """What all clients share: where the server is, and what it answered.

    Args:
        address (`str`): of the server.
        song (`bytes`): a MIDI file to continue.
    """

    def __init__(self, address: str, song: bytes):
        self.http = httpx2.AsyncClient(
            base_url=address, timeout=60, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        )
        self.address, self.song = address.removeprefix("http://").partition(":")[::2], song
        self.answers: Counter[str] = Counter()
        self.served = 0
        self.rng = random.Random(0)

    async def ask(self, kind: str, path: str, **request: Any) -> httpx2.Response:
        """Ask, count the answer, and wait if the server is busy, as it says."""
        answer = await self.http.post(path, **request)
        self.answers[f"{kind}: {answer.status_code}"] += 1
        if answer.status_code == 503:
            await asyncio.sleep(min(float(answer.headers["retry-after"]), 2) * self.rng.random())
        elif answer.status_code >= 400:
            assert "\n" not in answer.json()["detail"]
        return answer


async def generates(load: Load) -> None:
    answer = await load.ask("generate", "/generate", json=_SHORT | {"num": 1, "seed": load.rng.randrange(1000)})
    load.served += answer.content[:4] == b"MThd"


async def continues(load: Load) -> None:
    answer = await load.ask("continue", "/continue", data=_SHORT | {"num": 1}, files={"midi": load.song})
    load.served += answer.content[:4] == b"MThd"


async def streams(load: Load) -> None:
    answer = await load.ask("stream", "/generate/stream", json=_SHORT)
    load.served += answer.text.endswith("}\n") and '"done": true' in answer.text


async def cancels(load: Load) -> None:
    name = uuid4().hex
    asked = asyncio.create_task(load.ask("cancelled", "/generate", json=_LONG, headers={"X-Request-ID": name}))
    await asyncio.sleep(load.rng.random())
    await load.http.delete(f"/requests/{name}")
    await asked


async def hangs_up(load: Load) -> None:
    path = load.rng.choice(["/generate", "/generate/stream"])
    options = _LONG if path == "/generate" else {"bars": 64}
    with suppress(TimeoutError):
        await asyncio.wait_for(load.ask("hung up", path, json=options), load.rng.random())


async def never_reads(load: Load) -> None:
    body = json.dumps({"bars": 64, "max_new_tokens": 4096}).encode()
    head = (
        "POST /generate/stream HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    )
    _, writer = await asyncio.open_connection(load.address[0], int(load.address[1]), limit=1)
    writer.write(head.encode() + b"\r\n\r\n" + body)
    load.answers["never reads"] += 1
    try:
        await asyncio.sleep(20 * load.rng.random())
    finally:
        writer.transport.abort()


async def sends_too_much(load: Load) -> None:
    with suppress(httpx2.TransportError):  # a server may close the connection while we send
        path, kind = load.rng.choice([("/generate", "application/json"), ("/continue", "multipart/form-data")])
        headers = {"Content-Type": f"{kind}; boundary=x"}
        await load.ask("too large", path, content=bytes(load.rng.choice([5, 40]) * 2**20), headers=headers)
    await asyncio.sleep(0.5)


async def sends_rubbish(load: Load) -> None:
    path = load.rng.choice(["/generate", "/infill", "/generate/stream"])
    content = load.rng.choice([b"", b"[" * 9999, load.rng.randbytes(999), b'{"num": -1}', b'{"bars": 1e999}'])
    kind = load.rng.choice(["application/json", "multipart/form-data; boundary=x", "text/plain"])
    await load.ask("malformed", path, content=content, headers={"Content-Type": kind})
    await asyncio.sleep(0.1)


async def sends_hostile_midi(load: Load) -> None:
    content = load.rng.choice([load.rng.randbytes(9999), load.song[: len(load.song) // 2], _crowd(), b""])
    await load.ask("hostile MIDI", "/continue", data=_SHORT, files={"midi": content})


@cache
def _crowd() -> bytes:
    """As many notes as a file may hold, which take long to encode."""
    score = Score(480)
    score.tracks.append(Track())
    for index in range(99_999):
        score.tracks[0].notes.append(Note(index * 60, 60, 30 + index % 60, 64))
    return score.dumps_midi()


GOOD: dict[Client, int] = {generates: 20, continues: 10, streams: 10}
BAD: dict[Client, int] = {
    cancels: 6,
    hangs_up: 6,
    never_reads: 4,
    sends_too_much: 3,
    sends_rubbish: 3,
    sends_hostile_midi: 2,
}


class Watch:
    """Reads every half second what the server holds, and how long /health takes.

    Args:
        server (`psutil.Process`): the process of the server.
        load ([`Load`]): whose client asks.
    """

    def __init__(self, server: psutil.Process, load: Load):
        self.server, self.load = server, load
        self.rows: list[dict[str, float]] = []

    def holds(self) -> dict[str, float]:
        """What the server holds now. Its reader of uploads and the worker of that are other processes."""
        family = self.server.children(recursive=True)
        sizes = [process.memory_info().rss for process in family if process.is_running()]
        return {
            "mb": round(self.server.memory_info().rss / 2**20, 1),
            "mb_of_readers": round(sum(sizes) / 2**20, 1),
            "threads": self.server.num_threads(),
            "descriptors": self.server.num_fds(),
            "processes": len(family),
        }

    async def run(self) -> None:
        while True:
            start = time.perf_counter()
            (await self.load.http.get("/health")).raise_for_status()
            seconds = time.perf_counter() - start
            with suppress(psutil.NoSuchProcess):  # a worker has just ended
                self.rows.append({**self.holds(), "health_seconds": seconds})
            await asyncio.sleep(0.5)


async def press(load: Load, clients: dict[Client, int], seconds: float) -> float:
    """Let clients ask again and again for a time; return what well-behaved ones got per second."""
    end = time.monotonic() + seconds
    load.served = 0

    async def repeat(client: Client) -> None:
        while time.monotonic() < end:
            await client(load)

    await asyncio.gather(*(repeat(client) for client, count in clients.items() for _ in range(count)))
    return load.served / (time.monotonic() - end + seconds)


async def measure(process: subprocess.Popen[str], load: Load, seconds: float, settle: float) -> dict[str, Any]:
    watch = Watch(psutil.Process(process.pid), load)
    await press(load, GOOD, seconds / 6)  # what is loaded at first use is loaded now
    before = watch.holds()
    alone = await press(load, GOOD, seconds / 2)
    load.answers.clear()
    watching = asyncio.create_task(watch.run())
    together = await press(load, GOOD | BAD, seconds)
    watching.cancel()
    rows = watch.rows
    await asyncio.sleep(settle)
    after = watch.holds()
    await press(load, GOOD, 1)  # it still serves
    assert process.poll() is None
    assert load.served
    third = len(rows) // 3
    health = sorted(row["health_seconds"] for row in rows)
    memory = [statistics.mean(row["mb"] for row in part) for part in (rows[:third], rows[-third:])]
    leaks = {name: round(after[name] - before[name], 1) for name in before if "mb" not in name}
    assert settle < _SETTLE_SECONDS or not any(value > 0 for value in leaks.values()), leaks
    failures = {answer: count for answer, count in load.answers.items() if answer.endswith(": 500")}
    assert not failures, failures
    return {
        "ratio": round(together / alone, 3),
        "served_per_second": {"alone": round(alone, 2), "in bad company": round(together, 2)},
        "answers": dict(sorted(load.answers.items())),
        "health_ms": {
            "median": round(1e3 * statistics.median(health), 1),
            "95 %": round(1e3 * health[int(0.95 * len(health))], 1),
            "worst": round(1e3 * health[-1], 1),
        },
        "mb_first_third": round(memory[0], 1),
        "mb_last_third": round(memory[1], 1),
        "peak": {name: max(row[name] for row in rows) for name in before},
        "before": before,
        "after": after,
        "leaks": leaks,
    }


def serve(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start the command; return it and its address."""
    processor = MidiProcessor(build_tokenizer("REMI"))
    torch.manual_seed(0)
    config = MidiMambaConfig(vocab_size=len(processor.midi_tokenizer), hidden_size=32, num_hidden_layers=2)
    MidiMambaForCausalLM(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    line = [sys.executable, "-m", "midimamba.cli", "serve", str(folder), "--port", "0", "--max-seconds", "40"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, next(word for word in process.stdout.readline().split() if word.startswith("http")).rstrip(",")


def make_song() -> bytes:
    score = Score(480)
    score.tracks.append(Track())
    for index in range(32):
        score.tracks[0].notes.append(Note(index * 240, 240, 60 + index % 12, 80))
    return score.dumps_midi()


def main() -> None:
    parser = make_parser(__doc__, "serving.py --seconds 60")
    parser.add_argument("--seconds", type=float, default=60, help="time in bad company (default: %(default)s)")
    parser.add_argument(
        "--settle",
        type=float,
        default=_SETTLE_SECONDS,
        help="seconds between the load and the search for leaks; with fewer than the default, nothing is asserted "
        "(default: %(default)s)",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, address = serve(Path(folder))
        try:
            figures = asyncio.run(measure(process, Load(address, make_song()), args.seconds, args.settle))
        finally:
            process.terminate()
            process.wait()
    finish(
        {
            "benchmark": "serving",
            "compared": "pieces and streams per second for 40 well-behaved clients: beside 24 bad ones over alone",
            **figures,
            "clients": {client.__name__: count for client, count in (GOOD | BAD).items()},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
