"""The server on a real port: what connections can do to it, how it starts and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from serving_support import make_pair, make_service, sample_without_end

from midimamba.serving import connections, service
from midimamba.serving.application import make_application
from midimamba.serving.options import ServeOptions
from midimamba.serving.service import Service
from support import command


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Service, tuple[str, int]]]:
    """A server that checks its connections often."""
    monkeypatch.setattr(connections, "_CHECK_SECONDS", 0.1)
    behind = make_service(make_pair())
    config = uvicorn.Config(make_application(behind), http=connections.Connection, ws="none", log_level="error")
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield behind, listener.getsockname()
    running.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def is_closed(client: socket.socket, seconds: float = 5) -> bool:
    """Whether the server ends a connection in time; what it sends is read only then."""
    client.settimeout(seconds)
    try:
        while client.recv(2**16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /generate HT",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    ],
)
def test_a_client_that_sends_no_whole_request_is_disconnected(
    server: tuple[Service, tuple[str, int]], sent: bytes
) -> None:
    with closing(socket.create_connection(server[1])) as client:
        client.sendall(sent)
        assert is_closed(client)
    assert len(server[0].sampler) == 0


def test_a_client_that_never_reads_is_disconnected(
    server: tuple[Service, tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Score:
        def dumps_midi(self) -> bytes:
            return bytes(32 * 2**20)  # more than the system keeps for a client

    monkeypatch.setattr(service, "generate_scores", lambda *arguments, **options: [Score()])
    with closing(socket.create_connection(server[1])) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 2\r\n\r\n{}"
        )
        time.sleep(1.0)
        received = 0
        client.settimeout(5)
        with pytest.raises(ConnectionError):  # noqa: PT012
            while part := client.recv(2**20):
                received += len(part)
            raise ConnectionError("ended early")
        assert received < 32 * 2**20


def test_a_client_that_goes_ends_its_request(
    server: tuple[Service, tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = threading.Event()

    def endless(*arguments: Any, **options: Any) -> Iterator[Any]:
        sample_without_end(at_work)
        yield

    monkeypatch.setattr(service, "generate_scores", lambda *arguments, **options: list(endless()))
    monkeypatch.setattr(service, "stream", endless)
    for path in (b"/generate", b"/generate/stream"):
        with closing(socket.create_connection(server[1])) as client:
            client.sendall(
                b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 2\r\n\r\n{}"
            )
            assert at_work.wait(5)
            assert len(server[0].sampler) == 1
        end = time.monotonic() + 5
        while (at_work.is_set() or len(server[0].sampler)) and time.monotonic() < end:
            time.sleep(0.01)
        assert not at_work.is_set()
        assert len(server[0].sampler) == 0


def test_a_large_body_is_refused_while_it_is_being_sent(server: tuple[Service, tuple[str, int]]) -> None:
    with closing(socket.create_connection(server[1])) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999999999\r\n\r\n" + b" " * 1000
        )
        client.settimeout(5)
        assert client.recv(1000).startswith(b"HTTP/1.1 413")
        with pytest.raises(ConnectionError):  # noqa: PT012
            for _ in range(64):
                client.sendall(bytes(2**20))


@contextmanager
def started(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`midimamba serve`, and its address."""
    line = [sys.executable, "-m", "midimamba.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        yield process, next(word for word in said.split() if word.startswith("http")).rstrip(",")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    model, processor = make_pair()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with started(tmp_path) as (process, address):
        answer = httpx2.post(f"{address}/generate", json={"num": 1, "bars": 1, "max_new_tokens": 40}, timeout=20)
        assert answer.content.startswith(b"MThd")
        song = {"midi": ("song.mid", answer.content)}
        assert httpx2.post(f"{address}/continue", data={"num": "1", "bars": "1"}, files=song, timeout=20).is_success
        with httpx2.stream("POST", f"{address}/generate/stream", json={"bars": 64}, timeout=20) as notes:
            lines = notes.iter_lines()
            assert "pitch" in json.loads(next(lines))
            process.send_signal(signal.SIGINT)
            list(lines)
        said, complained = process.communicate(timeout=15)
        assert process.returncode == 0
        assert said == ""
        assert "Traceback" not in complained


def test_what_cannot_be_served_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert command(monkeypatch, "serve", tmp_path, "--port", port) == 2
    message = f"error: the server cannot listen at 127.0.0.1:{port} (Address already in use): choose another --port"
    assert capsys.readouterr().err.startswith(message)
    assert command(monkeypatch, "serve", tmp_path, "--port", 99999) == 2
    assert capsys.readouterr().err == "error: port is 99999: give at most 65535\n"
    assert command(monkeypatch, "serve", tmp_path, "--max-seconds", 0) == 2
    assert capsys.readouterr().err == "error: max_seconds is 0.0: give a number above 0\n"


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command(monkeypatch, "serve", "model") == 2
    assert capsys.readouterr().err == 'error: fastapi is not installed; run: pip install "midimamba[serve]"\n'


def test_a_model_that_cannot_be_loaded_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from midimamba.serving import server as module

    ended = []

    class Reader:
        def __init__(self, *arguments: Any):
            pass

        def close(self) -> None:
            ended.append(True)

    monkeypatch.setattr(module, "UploadReader", Reader)
    assert command(monkeypatch, "serve", tmp_path / "nothing", "--port", 0) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert ended == [True]
    assert ServeOptions("x").host == "127.0.0.1"
