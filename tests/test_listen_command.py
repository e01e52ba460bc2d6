"""`midimamba listen`: a test that is whole or not there, and its answers as tables or one line."""

import json
from pathlib import Path

import pytest

import support
from midimamba.evaluation import listening
from midimamba.evaluation.features import opening
from midimamba.evaluation.sound import load_soundfont, render_sounds
from midimamba.tokenization.ingest import read_score
from support import make_score


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two arms, one of which has an unreadable file, and a second folder of one of their names."""
    folder = tmp_path_factory.mktemp("music")
    for number, arm in enumerate(("composer", "machine", "other/composer")):
        (folder / arm).mkdir(parents=True)
        for seed in range(3):
            make_score(10 * number + seed, bars=2).dump_midi(folder / arm / f"{seed}.mid")
    (folder / "empty").mkdir()
    (folder / "machine" / "broken.mid").write_bytes(b"MThd")
    return folder


@pytest.fixture(scope="module")
def made(music: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "test"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, music / "composer", music / "machine", "--out", folder, "--num", 3, "--bars", 1) == 0
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return support.command(monkeypatch, "listen", *arguments)


def test_a_test_is_made_of_two_folders(made: Path, music: Path, tmp_path: Path) -> None:
    pieces = json.loads((made / "key.json").read_text())["pieces"]
    assert {file.name for file in made.iterdir()} == {*pieces, "key.json", "index.html"}
    sources = {piece["source"] for piece in pieces.values()}
    assert sources == {str(music / arm / f"{seed}.mid") for arm in ("composer", "machine") for seed in range(3)}
    assert all(Path(piece["source"]).parent.name == piece["arm"] for piece in pieces.values())
    openings = {tmp_path / name: opening(read_score(piece["source"]), 1) for name, piece in pieces.items()}
    render_sounds(openings, load_soundfont())
    for name in pieces:
        assert (made / name).read_bytes() == (tmp_path / name).read_bytes()


def test_files_that_are_passed_over_are_reported(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "test"
    folders = (music / "composer", music / "machine")
    seed = next(seed for seed in range(99) if listening.draw_arms(folders, 1, 1, seed)["machine"].passed_over)
    assert command(monkeypatch, *folders, "--out", out, "--num", 1, "--bars", 1, "--seed", seed) == 0
    assert capsys.readouterr().out.splitlines() == [
        "machine: passed over 1 files that cannot be read or heard",
        f"2 pieces in {out}: give listeners everything in it except key.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("composer", "--out", "out"), "at least two folders"),
        (("composer", "other/composer", "--out", "out"), "two folders are named 'composer'"),
        (("composer", "nowhere", "--out", "out"), "nowhere is not a folder"),
        (
            ("composer", "machine", "--out", "out", "--num", "4"),
            "composer has 3 pieces to listen to in 3 MIDI files",
        ),
        (("composer", "machine", "--out", "out", "--num", "0"), "num is 0: give at least 1"),
        (("composer", "machine", "--out", "out", "--bars", "0"), "bars is 0: give at least 1"),
        (("empty", "composer", "--out", "out"), "empty has 0 pieces to listen to in 0 MIDI files"),
        (("composer", "machine"), "name a folder with --out"),
        (("composer", "machine", "--out", "machine"), "machine already exists"),
        (
            ("composer", "machine", "--out", "out", "--num", "1", "--soundfont", "machine/broken.mid"),
            "machine/broken.mid cannot be used as a sound font",
        ),
        (("--score", "machine", "answers.json"), "machine/key.json cannot be read: No such file"),
        (("--score", "machine", "answers.json", "--out", "out"), "leave out --out"),
        (("--score", "machine", "answers.json", "--num", "4"), "makes no test: leave out --num"),
        (("--score", "machine", "answers.json", "./answers.json"), "named twice"),
    ],
)
def test_bad_input_is_refused_in_a_line_and_nothing_is_written(
    arguments: tuple[str, ...],
    reason: str,
    music: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(music)
    before = sorted(music.rglob("*"))
    assert command(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert sorted(music.rglob("*")) == before


def test_a_failure_while_rendering_leaves_nothing(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(scores: dict[Path, object], _: object) -> None:
        next(iter(scores)).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(listening, "render_sounds", fail)
    with pytest.raises(OSError, match="disk full"):
        command(monkeypatch, music / "composer", music / "machine", "--out", tmp_path / "test", "--num", 1)
    assert not list(tmp_path.iterdir())


def test_answers_become_tables(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = listening.read_key(made)
    likes = {"composer": {"rating": 5, "person": True}, "machine": {"rating": 2, "person": False}}
    complete = {name: likes[arm] for name, arm in key.arms.items()}
    left_out = next(name for name, arm in key.arms.items() if arm == "machine")
    for name, answers in (
        ("answers", complete),
        ("more", {name: given for name, given in complete.items() if name != left_out}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"test": key.test, "answers": answers}))
    assert command(monkeypatch, "--score", made, tmp_path / "answers.json", tmp_path / "more.json") == 0
    printed = capsys.readouterr().out
    assert "| composer | 6 of 6 | 5.00 | 5.00 … 5.00 | 100% | 100% … 100% |" in printed
    assert "| machine | 5 of 6 | 2.00 | 2.00 … 2.00 | 0% | 0% … 0% |" in printed
    assert "| composer minus machine | +3.00 | +3.00 … +3.00 |" in printed
    assert "bootstrapped over pieces" in printed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "is not JSON that can be read"),
        ("[1]", "holds list, not a JSON object"),
        ('{"test": "TEST"}', "has no answers"),
        ('{"test": "0123", "answers": {}}', "answers another test: its id is '0123' and not 'TEST'"),
        ('{"answers": {}}', "answers another test: its id is None"),
        (
            '{"test": "TEST", "answers": {"x.wav": {"rating": 3, "person": true}}}',
            "'x.wav' is not a piece of this test",
        ),
        ('{"test": "TEST", "answers": {"FILE": {"person": true}}}', "'FILE' needs a whole `rating` from 1 to 5"),
        ('{"test": "TEST", "answers": {"FILE": {"rating": 6, "person": true}}}', "'FILE' needs a whole `rating`"),
        ('{"test": "TEST", "answers": {"FILE": {"rating": 0, "person": true}}}', "but has 0"),
        ('{"test": "TEST", "answers": {"FILE": {"rating": 2.5, "person": true}}}', "but has 2.5"),
        ('{"test": "TEST", "answers": {"FILE": {"rating": true, "person": true}}}', "but has True"),
        ('{"test": "TEST", "answers": {"FILE": {"rating": 3}}}', "'FILE' needs a `person` that is true or false"),
        ('{"test": "TEST", "answers": {"FILE": {"rating": 3, "person": 1}}}', "but has 1"),
        ('{"test": "TEST", "answers": {"FILE": 3}}', "'FILE' needs a whole `rating`"),
    ],
)
def test_answers_that_cannot_be_used_are_refused_in_a_line(
    content: str | None,
    reason: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = listening.read_key(made)
    path = tmp_path / "answers.json"

    def fill(text: str) -> str:
        return text.replace("TEST", key.test).replace("FILE", next(iter(key.arms)))

    if content is not None:
        path.write_text(fill(content))
    assert command(monkeypatch, "--score", made, path) == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert str(path) in line
    assert fill(reason) in line


@pytest.mark.parametrize("content", ["[]", "{}", '{"test": "x", "pieces": [1]}', '{"test": "x", "pieces": {"a": 1}}'])
def test_a_changed_key_is_refused_in_a_line(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.json").write_text(content)
    assert command(monkeypatch, "--score", tmp_path, "answers.json") == 2
    reason = "holds list, not a JSON object" if content == "[]" else "is not the key of a listening test"
    assert f"key.json {reason}" in capsys.readouterr().err


def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--help") == 0
    assert "example: midimamba listen" in capsys.readouterr().out
