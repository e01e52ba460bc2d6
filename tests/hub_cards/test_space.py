"""A Space: the page of the app for a model of the Hub."""

import runpy
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

from midimamba import cli
from support import command

from .fake_hub import FakeHub


def test_a_folder_for_a_space_is_written_and_its_app_starts_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "space"
    assert command(monkeypatch, "publish", "--space", "you/bach", "--out", out) == 0
    assert f"hf upload OWNER/NAME {out} . --repo-type space" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"README.md", "app.py", "requirements.txt"}
    card = SpaceCard.load(out / "README.md")
    front = card.data.to_dict()
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", ["you/bach"])
    assert front["sdk_version"].startswith("6.")
    assert "https://huggingface.co/you/bach" in card.text
    assert (out / "requirements.txt").read_text().startswith("midimamba[app] @ ")
    called: list[list[str]] = []
    monkeypatch.setattr(cli, "main", called.append)
    runpy.run_path(str(out / "app.py"), run_name="__main__")
    assert called == [["app", "you/bach", "--host", "0.0.0.0", "--port", "7860", "--no-browser"]]


def test_a_space_is_published_and_brought_up_to_date(
    online: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in ("you/bach", "you/tuned"):
        line = ("--space", model, "--to", "you/bach-page", "--private")
        assert command(monkeypatch, "publish", *line) == 0
        assert f"space: {online.url}/spaces/you/bach-page" in capsys.readouterr().out
        assert f'"{model}"' in online.repositories["spaces/you/bach-page"]["app.py"].decode()
    assert online.created == ["spaces/you/bach-page"]
    assert online.private == {"spaces/you/bach-page"}
    assert online.commits == ["spaces/you/bach-page"] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--space", "you/bach"], "--space needs either --to OWNER/NAME or --out FOLDER"),
        (["--space", "you/bach", "--to", "you/a", "--out", "b"], "give one of them"),
        (["folder", "--space", "you/bach", "--out", "b"], "a Space has only a model"),
        (["--space", "bach", "--out", "b"], "is not the name of a model on the Hub: write it as owner/name"),
        (["--space", 'you/x", "y', "--out", "b"], "is not the name of a model"),
        (["--space", "model", "--out", "b"], "is a folder of this machine, which a Space cannot read"),
        (["--space", "you/bach", "--out", "model"], "model"),
        (["folder"], "--repo is missing"),
        (["--repo", "you/bach"], "FOLDER is missing"),
        (["folder", "--repo", "you/bach", "--out", "b"], "--out is for --space"),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_line(
    line: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert command(monkeypatch, "publish", *line) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not (tmp_path / "b").exists()


def test_a_hub_out_of_reach_is_one_line(
    online: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    online.faults["commit"] = None
    assert command(monkeypatch, "publish", "--space", "you/bach", "--to", "you/bach-page") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "nothing was uploaded to you/bach-page, which was created and is empty" in error
