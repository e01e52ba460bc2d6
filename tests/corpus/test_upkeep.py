"""What stays of a corpus and beside it: what its owner added, what a run read; and what does not."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from datasets import load_from_disk

from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.store import PieceStore
from midimamba.corpus.upkeep import showing_causes, tidy
from midimamba.errors import InputError
from support import command, make_score

OPTIONS = CorpusOptions(vocab_size=None, num_workers=1)
STORE = ".out.pieces.sqlite"


@pytest.fixture
def music(tmp_path: Path) -> Path:
    folder = tmp_path / "music"
    folder.mkdir()
    for seed in range(4):
        make_score(seed, bars=2).dump_midi(folder / f"{seed}.mid")
    return folder


def test_an_update_keeps_what_the_owner_added(music: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize_corpus(str(music), out, OPTIONS)
    load_from_disk(str(out))["train"].map(lambda row: {"length": len(row["input_ids"])})  # leaves a cache
    assert list(out.glob("train/cache-*"))
    (out / "README.md").write_text("card")
    (out / "README.md").chmod(0o640)
    (out / "tokenizer" / "why.txt").write_text("notes")
    (out / "train" / "mine").mkdir()
    (out / "train" / "mine" / "deep.txt").write_text("deep")
    (out / "runs" / "empty").mkdir(parents=True)
    (out / "link").symlink_to("runs")
    (out / "nowhere").symlink_to("gone")
    (out / "runs").chmod(0o555)
    out.chmod(0o2770)
    inode = (out / "README.md").stat().st_ino
    make_score(9, bars=2).dump_midi(music / "9.mid")
    assert tokenize_corpus(str(music), out, OPTIONS)["splits"]["train"]["pieces"] == 3
    assert (out / "README.md").read_text() == "card"
    assert (out / "README.md").stat().st_ino == inode  # it was not even copied
    assert (out / "README.md").stat().st_mode & 0o777 == 0o640
    assert (out / "tokenizer" / "why.txt").read_text() == "notes"
    assert (out / "train" / "mine" / "deep.txt").read_text() == "deep"
    assert (out / "runs" / "empty").is_dir()
    assert (out / "runs").stat().st_mode & 0o777 == 0o555
    assert out.stat().st_mode & 0o7777 == 0o2770
    assert [os.readlink(out / name) for name in ("link", "nowhere")] == ["runs", "gone"]  # noqa: PTH115
    assert not list(out.glob("train/cache-*"))
    fresh = tmp_path / "fresh"
    tokenize_corpus(str(music), fresh, OPTIONS)
    for path in fresh.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (out / path.relative_to(fresh)).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "music", "out"]


def test_a_corpus_behind_a_link_is_updated_where_it_is(music: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/corpus")
    tokenize_corpus(str(music), tmp_path / "out", OPTIONS)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "corpus" / "corpus.json").is_file()
    assert tokenize_corpus(str(music), tmp_path / "disk" / "corpus", OPTIONS)["duplicates"] == 0


def test_a_folder_that_cannot_be_replaced_is_refused_before_any_work(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    for out in (".", "..", "../deep"):
        assert command(monkeypatch, "tokenize", music, "--out", out) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is the current folder, or one around it" in line or "is a folder that is there already" in line
    assert command(monkeypatch, "tokenize", music, "--out", "/proc") == 2
    assert "is a disk of its own" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*") if path.suffix != ".mid") == ["deep", "music", "work"]


def half_read(music: Path, out: Path) -> bytes:
    """The store of a run that was interrupted after reading."""
    tokenize_corpus(str(music), out, OPTIONS)
    store = out.with_name(STORE)
    (out / "pieces.sqlite").rename(store)
    shutil.rmtree(out)
    return store.read_bytes()


def test_an_error_keeps_what_an_interrupted_run_read(music: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = half_read(music, out)
    (music / "manifest.csv").write_text("file,split\n0.mid,nonsense\n")
    for source, message in ((music, "nonsense"), (tmp_path / "gone", "is not a folder")):
        with pytest.raises(InputError, match=message):
            tokenize_corpus(str(source), out, OPTIONS)
    assert (tmp_path / STORE).exists()
    (music / "manifest.csv").unlink()
    with PieceStore(tmp_path / STORE, "reader of nobody"):  # it can still be opened
        pass
    (tmp_path / STORE).write_bytes(before)
    tokenize_corpus(str(music), out, OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["music", "out"]


def test_an_error_after_reading_keeps_what_was_read_and_one_before_leaves_nothing(
    music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (music / "manifest.csv").write_text("file,split\n" + "".join(f"{i}.mid,test\n" for i in range(4)))
    with pytest.raises(InputError, match="leave no usable piece to train on"):
        tokenize_corpus(str(music), tmp_path / "out", OPTIONS)
    assert (tmp_path / STORE).exists()
    (music / "manifest.csv").write_text("file,split\n0.mid,test\n1.mid,train\n2.mid,train\n3.mid,train\n")
    tokenize_corpus(str(music), tmp_path / "out", OPTIONS)
    assert "4 of 4 files are as they were read before" in capsys.readouterr().err
    (music / "manifest.csv").write_text("file,split\n0.mid,nonsense\n")
    for name in ("out", "other"):
        with pytest.raises(InputError, match="nonsense"):
            tokenize_corpus(str(music), tmp_path / name, OPTIONS)
    assert load_corpus(tmp_path / "out")[0]["test"]["name"] == ["0.mid"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["music", "out"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def overwrite(path: Path) -> None:
    path.write_bytes(b"no data base " * 1000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap_a_row(path: Path) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.execute("UPDATE outcomes SET ids = (SELECT max(ids) FROM outcomes)")
        file.commit()


def other_tables(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE outcomes (sha256 TEXT)")


@pytest.mark.parametrize("harm", [cut, overwrite, empty, swap_a_row, other_tables])
@pytest.mark.parametrize("interrupted", [True, False])
def test_a_damaged_store_is_named_and_read_again(
    harm: Callable[[Path], None],
    interrupted: bool,
    music: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    tokenize_corpus(str(music), tmp_path / "fresh", OPTIONS)
    if interrupted:
        half_read(music, out)
    else:
        shutil.copytree(tmp_path / "fresh", out)
    damaged = tmp_path / STORE if interrupted else out / "pieces.sqlite"
    harm(damaged)
    (tmp_path / f"{STORE}-journal").write_bytes(b"what another program left")
    capsys.readouterr()
    tokenize_corpus(str(music), out, OPTIONS)
    if harm is not empty:
        assert f"{damaged} is damaged" in capsys.readouterr().err
    for path in (tmp_path / "fresh").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (out / path.relative_to(tmp_path / "fresh")).read_bytes()
    tokenize_corpus(str(music), out, OPTIONS)
    assert "is damaged" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "music", "out"]


def test_a_corpus_that_lost_files_is_made_again(music: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize_corpus(str(music), out, OPTIONS)
    (out / "train" / "state.json").unlink()
    tokenize_corpus(str(music), out, OPTIONS)
    assert load_corpus(out)[0]["train"].num_rows == 2


def test_what_killed_runs_left_goes_and_what_may_be_a_copy_stays(tmp_path: Path) -> None:
    for name in (".out-abcd1234/train", ".out-copy2025", ".out-old-abcd1234/out", ".out-notes", ".out-precious/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".out-copy2025" / "corpus.json").touch()
    (tmp_path / f".unfinished-{STORE}-x").touch()
    (tmp_path / f"{STORE}.unfinished").touch()
    (tmp_path / ".out.unfinished").mkdir()
    tidy(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-copy2025", ".out-notes", ".out-precious", "out"]


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"arguments": []}', "[" * 100_000])
def test_a_folder_with_another_corpus_json_is_refused(content: str, music: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "corpus.json").write_text(content)
    with pytest.raises(InputError, match="holds something else: delete it or choose another folder"):
        tokenize_corpus(str(music), tmp_path / "out", OPTIONS)
    assert (tmp_path / "out" / "corpus.json").read_text() == content


def test_a_full_disk_is_one_line_whatever_library_finds_out() -> None:
    for error in ("Error (os error 28)", "Permission denied (os error 13)"):
        with pytest.raises(OSError, match=r"No space left|Permission denied"), showing_causes():
            raise Exception(error)
    with pytest.raises(Exception, match="something else"), showing_causes():
        raise Exception("something else")


@pytest.mark.parametrize(
    "harm",
    [
        lambda out: (out / "train" / "state.json").write_text("null"),
        lambda out: (out / "dataset_dict.json").write_text('{"splits": ["train"]}'),
        lambda out: (out / "dataset_dict.json").write_text("[" * 9),
        lambda out: next((out / "train").glob("*.arrow")).write_bytes(b"nothing"),
        lambda out: shutil.rmtree(out / "test"),
    ],
)
def test_a_damaged_corpus_is_one_line(harm: Callable[[Path], object], music: Path, tmp_path: Path) -> None:
    tokenize_corpus(str(music), tmp_path / "out", OPTIONS)
    harm(tmp_path / "out")
    with pytest.raises(
        InputError, match=r"out is damaged and cannot be read \(.+\): make or download it again"
    ) as caught:
        load_corpus(tmp_path / "out")
    assert "\n" not in str(caught.value)
