"""`midimamba tokenize` under kills, full disks and a second run: the next run ends as a fresh one, bit by bit."""

import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from datasets import DatasetDict
from tqdm import tqdm

from midimamba import files
from midimamba.cli import main
from midimamba.corpus import assembly, build, upkeep
from midimamba.corpus.store import PieceStore
from midimamba.tokenization.processor import MidiProcessor
from support import make_score

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="runs are forked, so that they need not import anything"),
]

NOTES = {"README.md": "my corpus", "notes/today.txt": "listen to 3"}


class Run:
    """`midimamba tokenize music --out out` in a process of its own, after `prepare` was called there."""

    def __init__(self, folder: Path, prepare: Callable[[], object]) -> None:
        # A pipe has room for what a run says, also where a disk has none.
        self._said, theirs = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            _tokenize(folder, theirs, prepare)
        os.close(theirs)

    def end(self) -> tuple[int, str]:
        """The exit code, negative for a signal, and what the run said."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        with os.fdopen(self._said, errors="replace") as said:
            return code, said.read()


def _tokenize(folder: Path, said: int, prepare: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        # tqdm's own lock is shared with the other processes, and a killed run takes it along.
        tqdm.set_lock(threading.RLock())
        os.chdir(folder)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        prepare()
        sys.argv = ["midimamba", "tokenize", "music", "--out", "out", "--vocab-size", "720", "--num-workers", "2"]
        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def nothing() -> None:
    """What a run does that nothing disturbs."""


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder: the bytes of files, the aims of links."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Music, a corpus of a part of it to which its owner added notes, and the corpus of all of it."""
    folder = tmp_path_factory.mktemp("ground")
    (folder / "music").mkdir()
    for seed in range(6):
        make_score(seed, bars=2).dump_midi(folder / "music" / f"{seed}.mid")
    (folder / "music" / "5.mid").rename(folder / "later.mid")
    assert Run(folder, nothing).end()[0] == 0
    for name, text in NOTES.items():
        (folder / "out" / name).parent.mkdir(exist_ok=True)
        (folder / "out" / name).write_text(text)
    (folder / "out" / "link").symlink_to("README.md")
    (folder / "out").rename(folder / "former")
    (folder / "later.mid").rename(folder / "music" / "5.mid")
    begin = time.monotonic()
    assert Run(folder, nothing).end()[0] == 0
    (folder / "duration").write_text(str(time.monotonic() - begin))
    (folder / "out").rename(folder / "fresh")
    return folder


@pytest.fixture(params=["new", "update"])
def place(request: pytest.FixtureRequest, ground: Path, tmp_path: Path) -> Path:
    """A folder with music, and perhaps with a corpus to bring up to date."""
    folder = tmp_path / str(request.param)
    folder.mkdir()
    (folder / "music").symlink_to(ground / "music")
    if request.param == "update":
        shutil.copytree(ground / "former", folder / "out", symlinks=True)
    return folder


def check_next_run(place: Path, ground: Path) -> None:
    """Run again undisturbed. The result is that of a fresh run, with the owner's notes, and nothing else is left."""
    owned = {**NOTES, "link": "README.md"} if place.name == "update" else {}
    code, said = Run(place, nothing).end()
    assert code == 0, said
    expected = contents(ground / "fresh") | {
        name: text.encode() if name in NOTES else text for name, text in owned.items()
    }
    found = contents(place / "out")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert sorted(path.name for path in place.iterdir()) == ["music", "out"]


def kill_at(owner: Any, name: str, count: int) -> Callable[[], None]:
    """Make a process kill itself when it calls a function for the `count`-th time."""

    def prepare() -> None:
        function = getattr(owner, name)
        calls = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        setattr(owner, name, counted)

    prepare.__name__ = f"{getattr(owner, '__name__', owner)}.{name}-{count}".rpartition("/")[2]
    return prepare


KILLS = [
    # listing and reading
    *(kill_at(PieceStore, "add_file", count) for count in (1, 9)),
    kill_at(PieceStore, "add_outcome", 1),
    kill_at(PieceStore, "finish_reading", 1),
    kill_at(PieceStore, "digest", 1),
    # training the tokenizer
    kill_at(PieceStore, "control_values", 1),
    kill_at(assembly, "build_tokenizer", 1),
    kill_at(assembly, "train_on_ids", 1),
    # encoding and writing
    *(kill_at(assembly, "_with_ends", count) for count in (1, 3, 6)),
    kill_at(DatasetDict, "save_to_disk", 1),
    kill_at(MidiProcessor, "save_pretrained", 1),
    kill_at(PieceStore, "copy_to", 1),
    kill_at(build, "contents", 1),
    kill_at(build, "write_whole", 1),
    # flushing and renaming
    *(kill_at(os, "fsync", count) for count in (1, 4, 25)),
    kill_at(files, "_take_place", 1),
    kill_at(Path, "rename", 1),
    kill_at(files, "_remove", 5),
    kill_at(upkeep, "delete_store", 2),
]
UPDATE_KILLS = [
    kill_at(shutil, "copyfile", 1),
    kill_at(Path, "replace", 1),
    kill_at(build, "carry_over", 1),
    kill_at(upkeep, "link", 2),
    kill_at(Path, "rename", 2),  # between the two renames
]


@pytest.mark.parametrize("prepare", KILLS, ids=lambda prepare: prepare.__name__)
def test_after_a_kill_the_next_run_ends_as_a_fresh_one(prepare: Callable[[], None], place: Path, ground: Path) -> None:
    code, said = Run(place, prepare).end()
    assert code == -signal.SIGKILL, said
    check_next_run(place, ground)


@pytest.mark.parametrize("prepare", UPDATE_KILLS, ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("place", ["update"], indirect=True)
def test_a_killed_update_loses_nothing(prepare: Callable[[], None], place: Path, ground: Path) -> None:
    code, said = Run(place, prepare).end()
    assert code == -signal.SIGKILL, said
    check_next_run(place, ground)


def test_kills_at_any_time_and_one_after_another(place: Path, ground: Path) -> None:
    duration = float((ground / "duration").read_text())
    for part in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        run = Run(place, nothing)
        time.sleep(part * duration)
        os.kill(run.process, signal.SIGKILL)
        run.end()
    check_next_run(place, ground)


@pytest.mark.parametrize("size", [0, 300, 1_200, 2_300, 5_000, 9_000, 12_000, 40_000, 100_000, 200_000])
def test_after_a_full_disk_the_next_run_ends_as_a_fresh_one(size: int, place: Path, ground: Path) -> None:
    """No file can become larger than `size`. To those who write, this looks as a full disk does."""
    before = contents(place / "out")

    code, said = Run(place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))).end()
    assert code == 2, said
    assert said.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said
    assert contents(place / "out") == before
    check_next_run(place, ground)


def slowed() -> None:
    """Make a run last long enough that another meets it."""
    add = PieceStore.add_outcome

    def add_slowly(*arguments: Any) -> None:
        add(*arguments)
        time.sleep(0.05)

    PieceStore.add_outcome = add_slowly  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("rounds", [5] * 4)
@pytest.mark.parametrize("place", ["new"], indirect=True)
def test_of_two_runs_into_one_folder_one_is_refused_and_nothing_is_lost(
    rounds: int, place: Path, ground: Path
) -> None:
    for _ in range(rounds):
        ends = [run.end() for run in [Run(place, slowed) for _ in range(2)]]
        (won, said), (refused, why) = sorted(ends)
        assert (won, refused) == (0, 2), said + why
        assert len(why.splitlines()) == 1
        assert "is being written by another run (process " in why
        assert contents(place / "out") == contents(ground / "fresh")
        assert sorted(path.name for path in place.iterdir()) == ["music", "out"]
        shutil.rmtree(place / "out")
