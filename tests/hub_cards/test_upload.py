"""Publishing checks everything before it creates anything, and sends only what may leave the machine."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from midimamba import MidiProcessor
from midimamba.errors import InputError
from midimamba.hub_cards import upload
from midimamba.hub_cards.publish import publish
from midimamba.tokenization.tokenizer import build_tokenizer
from support import command, make_discriminator, make_generator

from .fake_hub import FakeHub

TOKEN = "hf_ofTheUserWhoPublishes"  # of the fixture `online`
OTHER = "hf_" + "abcDEF123" * 4
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    processor = MidiProcessor(build_tokenizer())
    make_generator(vocab_size=processor.vocab_size).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    make_discriminator(vocab_size=processor.vocab_size).save_pretrained(folder / "judge")
    return folder


@pytest.fixture
def run(release: Path, tmp_path: Path) -> Path:
    """A copy that a test may break: `model`, `judge`, and a report with a sample."""
    folder = tmp_path / "run"
    shutil.copytree(release, folder)
    diversity = {f"distinct_{n}": 0.125 for n in (1, 2, 3, 4)} | {"self_bleu_4": 0.25}
    measures = diversity | {"held_out_nll": 2.0, "accuracy": 0.75, "accuracy_real": 0.91, "accuracy_fake": 0.59}
    settings = {"fresh_samples": 9, "tokens_per_sequence": 77}
    report = {"before": measures, "after": measures, "real": diversity, "settings": settings}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "samples").mkdir()
    (folder / "samples" / "a.png").write_bytes(b"picture")
    return folder


def send(run: Path, **options: Any) -> dict[str, str]:
    given: dict[str, Any] = {"discriminators": [run / "judge"], "report": run / "report.json"}
    options = given | options
    return publish(run / "model", "bach", **options).urls


def refused(hub: FakeHub, run: Path, **options: Any) -> str:
    """The one line with which publishing is refused, after which nothing is on the Hub and nothing beside the run."""
    with pytest.raises(InputError) as refusal:
        send(run, **options)
    assert hub.created == hub.commits == []
    assert not list(run.glob(".*"))
    message = str(refusal.value)
    assert len(message.splitlines()) == 1
    assert ".publish" not in message
    return message


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change(file: Path, *keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(content))


BROKEN: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda run: truncate(run / "model/model.safetensors"),
    "weights a pickle": lambda run: (run / "model/model.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n."),
    "weights empty": lambda run: (run / "model/model.safetensors").write_bytes(b""),
    "another vocabulary": lambda run: make_generator(vocab_size=13).save_pretrained(run / "model"),
    "another kind of model": lambda run: change(run / "model/config.json", "model_type", value="bert"),
    "an impossible size": lambda run: change(run / "model/config.json", "hidden_size", value="wide"),
    "an index that leaves the folder": lambda run: (run / "model/model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "../judge/model.safetensors"}})
    ),
    "an unreadable evaluation beside the model": lambda run: (run / "model/evaluation.json").write_text("{}"),
    "a card without YAML": lambda run: (run / "model/README.md").write_text("---\n[\n---\nText\n"),
    "a card of bytes": lambda run: (run / "model/README.md").write_bytes(b"---\ntags: [a]\n---\n\xff"),
    "a card that the Hub refuses": lambda run: (run / "model/README.md").write_text("---\nlicense: mit\n---\n"),
    "a broken discriminator": lambda run: truncate(run / "judge/model.safetensors"),
    "a discriminator of nothing": lambda run: (run / "judge/config.json").write_text("null"),
    "a report with words for figures": lambda run: change(run / "report.json", "after", "accuracy", value="<b>"),
    "a report without a part": lambda run: change(run / "report.json", "real", value=None),
    "a report with a list": lambda run: change(run / "report.json", "settings", value=[]),
    "a report that divides by zero": lambda run: change(run / "report.json", "before", "held_out_nll", value=0),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_creates_nothing(name: str, online: FakeHub, run: Path) -> None:
    BROKEN[name](run)
    refused(online, run, report=None if "beside" in name else run / "report.json")


@pytest.mark.parametrize("file", ["config.json", "miditok.json", "training_args.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"null", b"[]", DEEP.encode(), b'{"a": "\xff"}'], ids=["null", "[]", "deep", "ff"]
)
def test_json_of_another_kind_creates_nothing(file: str, content: bytes, online: FakeHub, run: Path) -> None:
    (run / "model" / file).write_bytes(content)
    assert file in refused(online, run)


@pytest.mark.parametrize("content", [b"null", b"[]", DEEP.encode(), b"\xff"], ids=["null", "[]", "deep", "ff"])
def test_a_report_of_another_kind_creates_nothing(content: bytes, online: FakeHub, run: Path) -> None:
    (run / "report.json").write_bytes(content)
    assert "report.json" in refused(online, run)


@pytest.mark.parametrize("license", ["", "CC BY 4.0", "mit\n---\n<script>", "x" * 300])
def test_an_impossible_licence_creates_nothing(license: str, online: FakeHub, run: Path) -> None:
    assert "licence" in refused(online, run, license=license)
    assert "licence" in refused(online, run, data_license=license)


@pytest.mark.parametrize("name", ["", "a/b/c", "a--b", "../x", "x" * 97, "x" * 90, "a b", "<b>", "x.git", "\u202e"])
def test_an_impossible_name_creates_nothing(name: str, online: FakeHub, run: Path) -> None:
    with pytest.raises(InputError, match="cannot be the name of a repository"):
        publish(run / "model", name, discriminators=[run / "judge"])  # whose name is 14 characters longer
    assert not online.created


def test_tokens_that_cannot_write_create_nothing(online: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online.role = "read"
    assert "only read" in refused(online, run)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("midimamba.hub_cards.upload.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    assert "there is no token" in refused(online, run)


def test_private_music_does_not_go_to_a_public_repository(online: FakeHub, run: Path) -> None:
    online.repositories["you/bach"] = {}
    assert "is public" in refused(online, run, private=True)
    online.private.add("you/bach")
    send(run, private=True)
    assert online.created == ["you/bach-discriminator"]
    assert online.private == {"you/bach", "you/bach-discriminator"}


def test_a_full_disk_creates_nothing(
    online: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(reader: Any, writer: Any) -> None:
        writer.write(reader.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fill)
    assert command(monkeypatch, "publish", run / "model", "--repo", "you/bach") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: No space left on device")
    assert not online.created
    assert not list(run.glob(".*"))


def test_what_a_killed_run_left_is_removed(online: FakeHub, run: Path) -> None:
    (run / ".model.publish" / "generator").mkdir(parents=True)
    (run / ".model.publish" / "generator" / "errors.py").write_text("half")
    send(run)
    assert not list(run.glob(".*"))
    assert b"half" not in online.repositories["you/bach"]["errors.py"]


# ---- links ----


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("of this machine")
    return file


@pytest.mark.parametrize("place", ["model/errors.py", "model/README.md", "judge/config.json", "samples/b.png"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_link_among_the_files_is_refused(place: str, inside: bool, online: FakeHub, run: Path, secret: Path) -> None:
    target = run / "model" / "config.json" if inside else secret
    (run / place).unlink(missing_ok=True)
    (run / place).symlink_to(os.path.relpath(target, (run / place).parent) if inside else target)
    assert f"{Path(place).name} is a link" in refused(online, run)


def test_a_folder_that_is_a_link_is_refused(online: FakeHub, run: Path, tmp_path: Path) -> None:
    (run / "samples").rename(tmp_path / "elsewhere")
    (run / "samples").symlink_to(tmp_path / "elsewhere")
    assert "samples is a link" in refused(online, run)


def test_what_is_not_a_file_is_refused_without_waiting(online: FakeHub, run: Path) -> None:
    os.mkfifo(run / "model" / "README.md")
    assert "README.md is not a file" in refused(online, run)


def test_a_name_that_repaints_the_terminal_is_refused(online: FakeHub, run: Path) -> None:
    (run / "samples" / "b\x1b[2J.png").write_bytes(b"picture")
    assert "signs in its name" in refused(online, run)


def test_only_known_files_go_up_and_the_rest_is_listed(
    online: FakeHub, run: Path, secret: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("training_args.bin", "weights.pkl", ".env", "no\x1btes.md"):
        (run / "model" / name).write_text("x")
    (run / "model" / "link").symlink_to(secret)
    (run / "model" / "checkpoint-5").mkdir()
    licences = ("--license", "mit", "--data-license", "cc0-1.0")
    assert command(monkeypatch, "publish", run / "model", "--repo", "you/bach", *licences) == 0
    shown = capsys.readouterr()
    assert shown.out == f"generator: {online.url}/you/bach\n"
    names = r".env, checkpoint-5/, link, no\x1btes.md, training_args.bin, weights.pkl"
    assert shown.err == f"not uploaded, because only files with known names are: {names}\n"
    assert not {"training_args.bin", "weights.pkl", ".env", "link"} & set(online.repositories["you/bach"])


# ---- secrets ----


def test_secrets_are_removed_from_everything(online: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "feedfacefeedfacefeed")
    arguments = {
        "hub_token": "s3cr3t",
        "nested": [{"api_key": "k", "env": f"HF_TOKEN={OTHER}"}],
        "run_name": "feedfacefeedfacefeed",
        "learning_rate": 0.5,
        "remote": "https://me:passw0rd@example.org/x",
        "text": '{"hub_token": "quoted-secret"}',
        "nested_path": [str(run / "model")],
    }
    (run / "model" / "training_args.json").write_text(json.dumps(arguments))
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in OTHER)
    config = json.loads((run / "model" / "config.json").read_text()) | {"note": "NOTE"}
    (run / "model" / "config.json").write_text(json.dumps(config).replace("NOTE", escaped))
    twice = '{"hub_token": "first-secret", "hub_token": null, "sequence_length": 5}'
    (run / "judge" / "training_args.json").write_text(twice)
    (run / "model" / "README.md").write_text(f"---\ntags: [a]\n---\nlog in with {TOKEN}, {OTHER}\n")
    (run / "model" / "grammar.py").write_text(f'token = "{OTHER}"\n')
    send(run)
    everything = b"".join(content for files in online.repositories.values() for content in files.values())
    for secret in (TOKEN, OTHER, escaped, "s3cr3t", "feedface", "passw0rd", "quoted-secret", "first-secret"):
        assert secret.encode() not in everything, secret
    published = json.loads(online.repositories["you/bach"]["training_args.json"])
    assert published["learning_rate"] == 0.5
    assert published["hub_token"] == published["nested"][0]["api_key"] == "[removed]"
    assert published["nested"][0]["env"] == "HF_TOKEN=[removed]"
    assert published["nested_path"] == ["model"]
    assert str(run).encode() not in everything
    # The vocabulary is full of names that end in `token`, and stays as it is.
    for name in ("tokenizer_config.json", "tokenizer.json", "miditok.json", "processor.py", "model.safetensors"):
        assert online.repositories["you/bach"][name] == (run / "model" / name).read_bytes()
    assert OTHER in (run / "model" / "grammar.py").read_text()  # the user's own file stays


@pytest.mark.parametrize("folder", ["tokenization", "modeling"])
def test_the_code_that_is_published_holds_nothing_that_looks_like_a_secret(folder: str, tmp_path: Path) -> None:
    from midimamba.hub_cards.redaction import remove_secrets

    shutil.copytree(Path(__file__).parents[2] / folder, tmp_path / folder)
    assert remove_secrets(tmp_path) == []


def test_secrets_in_sounds_and_weights_are_refused(online: FakeHub, run: Path) -> None:
    from safetensors.numpy import load_file, save_file

    (run / "samples" / "a.wav").write_bytes(b"RIFF\xff" + OTHER.encode())
    assert "samples/a.wav holds what looks like" in refused(online, run)
    (run / "samples" / "a.wav").unlink()
    weights = load_file(run / "judge" / "model.safetensors")
    save_file(weights, run / "judge" / "model.safetensors", metadata={"format": "pt", "by": OTHER})
    assert "model.safetensors holds what looks like" in refused(online, run)


# ---- a Hub that refuses, or cannot be reached ----

# The requests in their order, and which repositories are there if one fails.
STEPS = {
    "GET /api/whoami": [],
    "POST /api/validate-yaml": [],
    "GET /api/models/you/bach$": [],
    "GET /api/models/you/bach-disc": [],
    "POST /api/repos/create": [],
    "POST /api/models/you/bach/preupload": ["you/bach"],
    "POST /api/models/you/bach/commit": ["you/bach"],
    "POST /api/models/you/bach-discriminator/commit": ["you/bach", "you/bach-discriminator"],
}
FAULTS = [
    *(("GET /api/whoami", status) for status in (401, 403, 404, 429, 500, 0)),
    *(("POST /api/repos/create", status) for status in (401, 402, 403, 404, 409, 500)),
    *((step, status) for step in STEPS for status in (503, None)),
]


@pytest.mark.parametrize(("step", "status"), FAULTS)
def test_a_refusal_is_one_line_and_nothing_is_created_before_all_is_checked(
    step: str, status: int | None, online: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "PATIENCE", 0.2)
    online.faults[step] = status
    with pytest.raises(InputError) as refusal:
        send(run)
    assert online.created == STEPS[step]
    message = str(refusal.value)
    assert len(message.splitlines()) == 1
    assert (f"answers {status} " if status else "cannot be reached") in message
    if STEPS[step]:
        assert "was created and is empty" in message
    published = f"published before that: {online.url}/you/bach"
    assert (published in message) == step.startswith("POST /api/models/you/bach-disc")


def test_a_second_repository_that_cannot_be_created_says_what_was_done(
    online: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commits = online.commits

    class OnceCommitted(dict[str, int | None]):
        def items(self) -> Any:
            return {"repos/create": 403}.items() if commits else {}.items()

    online.faults = OnceCommitted()
    options = ["--repo", "bach", "--discriminator", run / "judge"]
    assert command(monkeypatch, "publish", run / "model", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "you/bach-discriminator cannot be created: the Hub answers 403" in line
    assert line.endswith(f"published before that: {online.url}/you/bach")
    assert "model.safetensors" in online.repositories["you/bach"]
    online.faults = {}
    assert command(monkeypatch, "publish", run / "model", *options) == 0  # the same command completes it


def test_a_closed_port_is_one_line(online: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert "the Hub cannot be reached" in refused(online, run)


def test_being_offline_is_one_line(online: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the Hub cannot be reached" in refused(online, run)
