"""Files and folders that are whole or not there, locks, and recovery after a kill."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from midimamba.errors import InputError
from midimamba.files import locked, read_json, recover, whole_file, whole_folder, write_whole


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_folder_appears_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert not hidden(tmp_path)


def test_an_error_keeps_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "out" / "a", "old")

    def fail() -> None:
        with whole_folder(tmp_path / "out", replace=True) as folder:
            (folder / "a").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert not hidden(tmp_path)


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    write_whole(tmp_path / "out" / "a", "old")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    write_whole(tmp_path / ".out.replaced" / "a", "old")
    write_whole(tmp_path / ".out.unfinished" / "a", "new")
    recover(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert not hidden(tmp_path)


def test_a_kill_after_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    write_whole(tmp_path / ".out.replaced" / "a", "old")
    write_whole(tmp_path / "out" / "a", "new")
    recover(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert not hidden(tmp_path)


def _hold(target: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with locked(target):
        ready.set()
        time.sleep(60)


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", ready))
    process.start()
    assert ready.wait(30)
    with (
        pytest.raises(InputError, match=f"written by another run .process {process.pid} on "),
        locked(tmp_path / "out"),
    ):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(tmp_path / "out"), locked(tmp_path / "out"):  # what runs under a lock may take it again
        assert hidden(tmp_path) == [".out.lock"]
    assert not hidden(tmp_path)


def test_a_killed_writer_of_a_file_leaves_nothing_for_ever(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-a[1]-dead").write_text("half")
    with whole_file(tmp_path / "a[1]") as mine, whole_file(tmp_path / "a[1]") as other:
        assert mine.exists()
        assert other.exists()  # a writer at work keeps its file
        mine.write_text("mine")
        other.write_text("other")
    assert (tmp_path / "a[1]").read_text() == "mine"
    assert not hidden(tmp_path)


@pytest.mark.parametrize("content", ["null", "[]", "{", "\xff", "[" * 100_000, "1"])
def test_json_that_is_no_object_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "state.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"state\.json"):
        read_json(file)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder that refuses every file")
def test_an_owner_is_named_who_writes_a_moment_after_taking_the_lock(tmp_path: Path) -> None:
    file = tmp_path / ".out.lock"
    with FileLock(file):
        file.write_text("")
        writer = threading.Timer(0.1, file.write_text, ["process 7 on studio"])
        writer.start()
        with pytest.raises(InputError, match="another run \\(process 7 on studio\\)"), locked(tmp_path / "out"):
            pass
        writer.join()


def test_a_place_where_no_lock_can_be_made_is_refused() -> None:
    with pytest.raises((InputError, OSError)) as refusal, locked(Path("/proc/out")):
        pass
    assert "another run" not in str(refusal.value)
