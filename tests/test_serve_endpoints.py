"""`midimamba serve`, its endpoints: what they give is what the commands give, and what they refuse, and how."""

import io
import json
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from serving_support import make_pair, sample_without_end, served
from symusic.core import ScoreTick
from torch import Tensor

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import DrawingOptions, SamplingOptions
from midimamba.errors import InputError
from midimamba.generation import choose_scores, generate_scores, infill_scores
from midimamba.serving import responses, service
from midimamba.serving.connections import MAX_BODY_BYTES
from midimamba.streaming import stream
from midimamba.tokenization.constraints import Constraints
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_generator, make_score

Pair = tuple[MidiMambaForCausalLM, MidiProcessor]
SHORT: dict[str, Any] = {"bars": 2, "max_new_tokens": 80, "seed": 5}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[TestClient]:
    with served(pair) as client:
        yield client


@pytest.fixture
def midi() -> bytes:
    return make_score(3, bars=4).dumps_midi()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Sampling that goes on until it is stopped; the event is set while it goes on."""
    at_work = threading.Event()

    monkeypatch.setattr(service, "generate_scores", lambda *arguments, **options: sample_without_end(at_work))
    return at_work


def unpacked(content: bytes) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == [f"sample-{index:02d}.mid" for index in range(len(archive.namelist()))]
        return [archive.read(name) for name in archive.namelist()]


def written(scores: list[ScoreTick]) -> list[bytes]:
    return [score.dumps_midi() for score in scores]


def test_pieces_are_those_of_the_command(client: TestClient, pair: Pair) -> None:
    for num, kind in ((1, "audio/midi"), (3, "application/zip")):
        controls = {"key": "C-major"}
        answer = client.post("/generate", json={**SHORT, "num": num, "temperature": 0.8, "controls": controls})
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        expected = generate_scores(*pair, SamplingOptions(**SHORT, num=num, temperature=0.8), controls=controls)
        assert (unpacked(answer.content) if num > 1 else [answer.content]) == written(expected)


def test_continuations_and_fillings_are_those_of_the_commands(client: TestClient, pair: Pair, midi: bytes) -> None:
    form: dict[str, Any] = {**SHORT, "num": 2, "controls": json.dumps({"key": ["C-major"]})}
    answer = client.post("/continue", data=form, files={"midi": midi})
    options = SamplingOptions(**SHORT, num=2)
    assert unpacked(answer.content) == written(
        generate_scores(*pair, options, prompt=midi, controls={"key": "C-major"})
    )
    form |= {"bars": "2-3", "tracks": "2,3", "constraints": json.dumps({"scale": "C-major"})}
    answer = client.post("/infill", data=form, files={"midi": midi})
    drawing = DrawingOptions(num=2, max_new_tokens=80, seed=5, constraints=Constraints(scale="C-major"))
    expected = infill_scores(*pair, midi, (2, 3), [1, 2], drawing, {"key": "C-major"})
    assert unpacked(answer.content) == written(expected)


def test_no_new_note_breaks_a_constraint(client: TestClient) -> None:
    wanted = {"scale": "C,E,G", "instruments": ["violin"]}
    answer = client.post("/generate", json={**SHORT, "num": 1, "constraints": wanted})
    notes = [
        (track.program, note.pitch % 12)
        for track in ScoreTick.from_midi(answer.content).tracks
        for note in track.notes
    ]
    assert notes
    assert set(notes) <= {(40, 0), (40, 4), (40, 7)}


@pytest.mark.parametrize("prompted", [False, True])
def test_streamed_notes_are_those_of_python(client: TestClient, pair: Pair, midi: bytes, prompted: bool) -> None:
    if prompted:
        answer = client.post("/continue/stream", data=SHORT, files={"midi": midi})
    else:
        answer = client.post("/generate/stream", json=SHORT)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    *notes, last = map(json.loads, answer.text.splitlines())
    expected = [note._asdict() for note in stream(*pair, midi if prompted else None, SamplingOptions(**SHORT))]
    assert notes == expected
    assert last == {"done": True, "notes": len(expected)}
    assert expected


class _LikesShort:
    """A judge that prefers short pieces."""

    def log_odds(self, sequences: Any) -> Tensor:
        return torch.tensor([-float(len(sequence)) for sequence in sequences], dtype=torch.float64)


def test_discriminators_choose_where_a_request_asks_for_it(pair: Pair) -> None:
    request: dict[str, Any] = {**SHORT, "num": 1, "best_of": 4, "pick": "best"}
    with served(pair, _LikesShort()) as client:
        answer = client.post("/generate", json=request)
        assert (
            client.post("/generate", json=SHORT | {"num": 9, "best_of": 2})
            .json()["detail"]
            .startswith("num times best_of is 18: this server gives at most 16")
        )
    assert [answer.content] == written(choose_scores(*pair, _LikesShort(), SamplingOptions(**request)).scores)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num", value) for value in (0, -1, 1.5, "x", True, 2**40)),
        *(("bars", value) for value in (0, "", 1e99)),
        ("max_new_tokens", 15),
        *(("temperature", value) for value in (0, -1, "hot", 1e9, float("nan"))),
        *(("top_p", value) for value in (0, 1.1, "all")),
        ("seed", -1),
        ("best_of", 1),
        ("pick", "worst"),
    ],
)
def test_values_are_refused_in_the_words_of_the_command_line(client: TestClient, name: str, value: Any) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(InputError) as refusal:
        SamplingOptions(**options)
    answer = client.post("/generate", content=json.dumps(options), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()) == (422, {"detail": str(refusal.value)})


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        ("/generate", {"tempersture": 1}, "there is no option 'tempersture': see /docs"),
        ("/generate", {"bars": 65}, "bars is 65: this server gives at most 64"),
        ("/generate", {"num": 17}, "num is 17: this server gives at most 16"),
        ("/generate", {"max_new_tokens": 5000}, "max_new_tokens is 5000: this server gives at most 4096"),
        ("/generate", {"best_of": 2}, "best_of and pick choose by a discriminator, and this server has none"),
        ("/generate", {"controls": {"key": "H"}}, "control 'key' has no value 'H': choose one of C-major"),
        ("/generate", {"controls": 3}, "controls is 3: input should be a valid dictionary"),
        ("/generate", {"constraints": {"scale": "H"}}, "scale is 'H', but 'H' is not a pitch class"),
        ("/generate", {"constraints": {"instruments": [None]}}, "instruments is None: give text"),
        ("/generate", {"constraints": {"scales": 1}}, "there is no constraint 'scales': choose from scale, "),
        ("/generate", {"constraints": {"scale": "C", "pitch_range": "61-62"}}, "scale C and pitch_range 61-62 leave"),
        ("/generate", [], "the body is not a JSON object"),
        ("/generate/stream", {"num": 2}, "there is no option 'num': see /docs"),
        ("/infill", {}, "midi is missing: see /docs"),
        ("/nowhere", {}, "there is no such address: see /docs"),
        ("/health", {}, "this address does not answer POST: see /docs"),
    ],
)
def test_other_refusals_are_one_line_too(client: TestClient, path: str, body: Any, detail: str) -> None:
    answer = client.post(path, json=body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["detail"].startswith(detail)


def test_a_tokenization_whose_notes_come_out_of_order_cannot_stream() -> None:
    processor = MidiProcessor(build_tokenizer("MMM"))
    with served((make_generator(vocab_size=processor.vocab_size), processor)) as client:
        answer = client.post("/generate/stream", json=SHORT)
        assert (answer.status_code, answer.json()["detail"]) == (
            422,
            "streaming needs REMI, TSD, Structured, not MMM: sample whole pieces",
        )
        told = client.get("/model").json()
        assert told["always_music"]
        assert not told["can_stream"]


def test_an_upload_that_cannot_be_used_is_refused_with_the_reason(pair: Pair, midi: bytes) -> None:
    with served(pair, max_prompt_tokens=40) as client:
        for form, content, detail in (
            ({"bars": "2-99"}, midi, "bars is 98: this server gives at most 64"),
            ({"bars": "2-40"}, midi, "bars 2 to 40 are not all there: the piece has bars 1 to "),
            ({"bars": "two"}, midi, "bars is 'two': write the first bar and the last, such as 5-8"),
            ({"bars": "2", "tracks": "9"}, midi, "there is no track 9: tracks can name 1 ''"),
            ({"bars": "2", "controls": "["}, midi, "controls is '[': write JSON"),
            ({"bars": "2"}, b"not MIDI", "the file cannot be used: not a well-formed MIDI file"),
            ({"bars": "2"}, midi, "the file has "),
        ):
            answer = client.post("/infill", data=form, files={"midi": content})
            assert answer.status_code == 422
            assert answer.json()["detail"].startswith(detail)
        answer = client.post("/continue", data={}, files={"midi": midi})
        assert re.fullmatch(
            r"the file has \d+ tokens, and this server reads at most 40 tokens: .*", answer.json()["detail"]
        )


@pytest.mark.parametrize("path", ["/generate", "/continue"])
def test_a_large_body_is_refused_before_the_rest_is_read(client: TestClient, path: str) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 2**20
            yield b" " * 2**20

    kind = "application/json" if path == "/generate" else "multipart/form-data; boundary=x"
    for content in (b" " * (MAX_BODY_BYTES + 1), parts()):
        answer = client.post(path, content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.json()) == (
            413,
            {"detail": "the body is larger than 4 MB: send a smaller file"},
        )


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b'{"num":', b"\xff\xfe", b'{"num": 1' + b"0" * 10_000 + b"}", b"\x00"]
)
@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/x"]
)
@pytest.mark.parametrize("path", ["/generate", "/continue/stream"])
def test_malformed_bodies_are_refused_in_one_line(client: TestClient, path: str, kind: str, content: bytes) -> None:
    answer = client.post(path, content=content, headers={"content-type": kind})
    assert answer.status_code in (400, 422)
    assert "\n" not in answer.json()["detail"]
    assert len(answer.json()["detail"]) <= 500


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "elsewhere.example:8000", "Origin": "http://elsewhere.example:8000"}, 421),
        ({"Host": "127.0.0.1.elsewhere.example"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "[::1"}, 400),
        ({"Origin": "http://["}, 400),
    ],
)
def test_pages_of_other_sites_are_refused(client: TestClient, headers: dict[str, str], status: int) -> None:
    answer = client.get("/health", headers=headers)
    assert answer.status_code == status
    assert status == 200 or "\n" not in answer.json()["detail"]


def test_a_server_for_a_network_has_any_name_but_no_foreign_pages(pair: Pair) -> None:
    with served(pair, host="0.0.0.0") as client:
        assert client.get("/health", headers={"Host": "studio:8000", "Origin": "http://studio:8000"}).is_success
        assert client.get("/health", headers={"Host": "studio:8000", "Origin": "http://other:8000"}).status_code == 403


def test_a_request_is_cancelled_by_its_id(client: TestClient, endless: threading.Event) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/generate", json={}, headers={"X-Request-ID": "mine"})
        assert endless.wait(5)
        second = pool.submit(client.post, "/generate", json={}, headers={"X-Request-ID": "waits"})
        while client.get("/health").json()["requests"] < 2:
            time.sleep(0.01)
        twin = client.post("/generate", json={}, headers={"X-Request-ID": "mine"})
        assert (twin.status_code, "choose another id" in twin.json()["detail"]) == (409, True)
        for name, asked in (("waits", second), ("mine", first)):
            assert client.delete(f"/requests/{name}").status_code == 204
            answer = asked.result(5)
            assert (answer.status_code, answer.json()) == (409, {"detail": "the request was cancelled"})
    assert not endless.is_set()
    assert client.get("/health").json()["requests"] == 0
    assert client.delete("/requests/mine").status_code == 404
    assert client.delete("/requests/so%20wrong").status_code == 422


def test_the_line_is_bounded_and_so_is_the_time(pair: Pair, endless: threading.Event) -> None:
    with served(pair, max_waiting=1, max_seconds=0.5) as client, ThreadPoolExecutor() as pool:
        asked = [pool.submit(client.post, "/generate", json={}) for _ in range(2)]
        while client.get("/health").json()["requests"] < 2:
            time.sleep(0.01)
        refused = client.post("/generate", json={})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        for answer in (one.result(5) for one in asked):
            assert answer.status_code == 504
            assert answer.json()["detail"].startswith("the request took longer than 0.5 seconds")


def test_a_failure_costs_one_request(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, detail in (
        (InputError("the model computes NaN"), "the model computes NaN"),
        (MemoryError(), "the server has not enough memory for this: ask for fewer pieces, bars or tokens"),
        (RuntimeError("a bug"), responses.BUG),
    ):

        def fail(*arguments: Any, error: Exception = error, **options: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(service, "generate_scores", fail)
            answer = client.post("/generate", json={})
            assert (answer.status_code, answer.json()) == (500, {"detail": detail})
    assert client.post("/generate", json=SHORT).status_code == 200


def test_a_stream_that_nobody_reads_ends(client: TestClient, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test client reads nothing before the end, so that all notes pile up."""
    monkeypatch.setattr(responses, "_MAX_NOTES_BEHIND", 0)
    answer = client.post("/generate/stream", json=SHORT)
    assert (answer.status_code, "read faster" in answer.json()["detail"]) == (409, True)
    assert client.get("/health").json()["requests"] == 0


def test_the_model_describes_itself(client: TestClient, pair: Pair) -> None:
    told = client.get("/model").json()
    assert told["controls"] == {"key": ["C-major"]}
    assert told["can_infill"]
    assert told["always_music"]
    assert told["can_stream"]
    assert told["limits"]["bars"] == 64
    assert told["sampling"] == {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 2048}


def test_the_page_shows_every_endpoint_and_needs_no_network(client: TestClient) -> None:
    page = client.get("/docs").text
    api = client.get("/openapi.json").json()
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            assert f"<code>{method.upper()} {path}</code>" in page
            assert operation["summary"] in page
            assert operation["description"]
    for name in ("GenerateRequest", "InfillRequest"):
        for option, field in api["components"]["schemas"][name]["properties"].items():
            assert field["description"], option
            assert f"<code>{option}</code>" in page
    assert not re.search(r"<script|<link|src=|@import|url\(", page)
