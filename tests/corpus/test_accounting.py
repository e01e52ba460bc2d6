"""Every file of a source is used, a duplicate, refused or skipped with a reason, however odd the folder is."""

import gzip
import io
import json
import lzma
import os
import random
import socket
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from midimamba.corpus import folders
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.data_sets import is_data_set
from midimamba.corpus.options import CorpusOptions
from midimamba.tokenization.ingest import read_score
from support import make_score

OPTIONS = CorpusOptions(vocab_size=None, num_workers=1, valid_fraction=0, test_fraction=0)


def midi(seed: int) -> bytes:
    return bytes(make_score(seed, bars=1).dumps_midi())


def riff(content: bytes) -> bytes:
    info = b"LIST" + (5).to_bytes(4, "little") + b"INFO\0\0"
    data = b"data" + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)
    return b"RIFF" + (4 + len(info) + len(data)).to_bytes(4, "little") + b"RMID" + info + data


@dataclass
class Expected:
    """What a run has to say of the folder that was built."""

    root: Path
    used: Counter[int] = field(default_factory=Counter)  # how often a piece, by its seed, is there
    refused: int = 0
    skipped: int = 0
    next_seed: int = 0

    def music(self, rng: random.Random) -> bytes:
        """A piece, sometimes one that was there before."""
        if self.next_seed and rng.random() < 0.2:
            seed = rng.randrange(self.next_seed)
        else:
            seed, self.next_seed = self.next_seed, self.next_seed + 1
        self.used[seed] += 1
        return midi(seed)

    def refuse(self, count: int = 1) -> None:
        self.refused += count


def tar_bytes(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_bytes(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


PACKERS: dict[str, Callable[[list[tuple[str, bytes]]], bytes]] = {
    ".zip": zip_bytes,
    ".ZIP": lambda members: zip_bytes(members, zipfile.ZIP_BZIP2),
    ".Zip": lambda members: zip_bytes(members, zipfile.ZIP_LZMA),
    ".tar": tar_bytes,
    ".tar.gz": lambda members: tar_bytes(members, "w:gz"),
    ".tgz": lambda members: gzip.compress(tar_bytes(members)),
    ".tar.bz2": lambda members: tar_bytes(members, "w:bz2"),
    ".tar.xz": lambda members: lzma.compress(tar_bytes(members)),
}


def odd_members(rng: random.Random, expected: Expected, depth: int = 0) -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    for index in range(rng.randrange(1, 5)):
        kind = rng.choice(["music", "music", "text", "junk", "fork", "nested", "broken", "riff"])
        if kind == "music":
            members.append((rng.choice(["", "../", "/", "./a/"]) + f"{index}.mid", expected.music(rng)))
        elif kind == "riff":
            members.append((f"{index}.rmi", riff(expected.music(rng))))
        elif kind == "text":
            members.append((f"{index}.txt", b"text"))
            expected.skipped += 1
        elif kind == "fork":
            members.append((f"__MACOSX/._{index}.mid", b"\0\5\x16\7"))
            expected.skipped += 1
        elif kind == "junk":
            members.append((f"{index}.mid", rng.randbytes(40)))
            expected.refuse()
        elif kind == "broken":
            members.append((f"{index}.zip", b"no archive"))
            expected.refuse()
        elif depth == 0:
            suffix = rng.choice(sorted(PACKERS))
            members.append((f"{index}{suffix}", PACKERS[suffix](odd_members(rng, expected, depth=1))))
        else:
            members.append((f"{index}.zip", zip_bytes([("deep.mid", midi(0))])))
            expected.refuse()
    return members or odd_members(rng, expected, depth)


def add_file(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    (folder / rng.choice(["a{}.mid", "b{}.MIDI", ".{}.mid", "c {}.kar", "\udcff{}.mid"]).format(name)).write_bytes(
        expected.music(rng)
    )


def add_other_file(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    path = folder / rng.choice(["a{}.txt", "b{}", "c{}.mid.bak", "._{}.mid", "d{}.parquet", "e{}.png"]).format(name)
    path.write_bytes(rng.choice([b"", b"text", midi(0)]))
    expected.skipped += 1


def add_junk(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    (folder / f"{name}.mid").write_bytes(rng.choice([b"", b"MThd", rng.randbytes(100), midi(0)[:60], b"RIFF....RMID"]))
    expected.refuse()


def add_compressed(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    (folder / f"{name}.mid.gz").write_bytes(gzip.compress(expected.music(rng)))


def add_pipe(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    path = folder / (name + rng.choice(["", ".mid", ".zip", ".tar.gz", ".txt"]))
    os.mkfifo(path)
    expected.refuse()
    if rng.random() < 0.5:
        (folder / f"link-{name}.mid").symlink_to(path)
        expected.refuse()


def add_socket(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    place = os.open(folder, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(f"/proc/self/fd/{place}/{name}.mid")  # the path of a socket is short
    finally:
        os.close(place)
    expected.refuse()


def add_device(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    (folder / f"{name}.mid").symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/random", "/dev/tty"]))
    expected.refuse()


def add_broken_link(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    path = folder / (name + rng.choice(["", ".mid", ".zip"]))
    path.symlink_to(rng.choice(["nowhere", path.name, "/nowhere/at/all"]))
    expected.refuse()


def add_loop(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    (folder / name).symlink_to(rng.choice([".", "..", "/", str(folder)]), target_is_directory=True)
    expected.refuse()


def add_endless_file(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    (folder / f"{name}.mid").symlink_to("/proc/self/status")  # 0 bytes, it says
    expected.refuse()


def add_sparse(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    with (folder / (name + rng.choice([".mid", ".zip"]))).open("wb") as file:
        file.truncate(5 * 2**30)
    expected.refuse()


def add_linked_folder(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    outside = expected.root.parent / f"outside-{name}"
    outside.mkdir()
    (outside / "linked.mid").write_bytes(expected.music(rng))
    (outside / "back").symlink_to(folder, target_is_directory=True)
    (folder / name).symlink_to(outside, target_is_directory=True)
    expected.refuse()


def add_archive(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    suffix = rng.choice(sorted(PACKERS))
    (folder / f"{name}{suffix}").write_bytes(PACKERS[suffix](odd_members(rng, expected)))


def add_broken_archive(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    suffix = rng.choice(sorted(PACKERS))
    content = PACKERS[suffix]([("a.mid", midi(0)), ("b.mid", rng.randbytes(30_000))])
    (folder / f"{name}{suffix}").write_bytes(rng.choice([b"", content[: len(content) // 2], b"x" * 1000]))
    expected.refuse()


def add_odd_tar(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    """Twice one name, links, devices, and a name that occurs as text and as bytes."""
    old, new = midi(999), expected.music(rng)
    members = [
        ("a.mid", old),
        ("a.mid", new),
        ("\udcff.mid", expected.music(rng)),
        ("\\udcff.mid", expected.music(rng)),
    ]
    with tarfile.open(folder / f"{name}.tar", "w") as archive:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.mid")
            info.type, info.linkname = kind, "a.mid"
            archive.addfile(info)
    expected.skipped += 1
    expected.refuse(4)


def add_colliding_names(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    for odd in ("\udcff", "\\udcff", "\\\udcff", "\\\\udcff"):
        (folder / f"{name}{odd}.mid").write_bytes(expected.music(rng))


def add_hard_link(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    seed = expected.next_seed
    (folder / f"{name}.mid").write_bytes(expected.music(random.Random(1)))
    if expected.next_seed == seed:  # it was there before
        seed = next(seed for seed in expected.used if midi(seed) == (folder / f"{name}.mid").read_bytes())
    (folder / f"{name}-hard.mid").hardlink_to(folder / f"{name}.mid")
    (folder / f"{name}-soft.mid").symlink_to(folder / f"{name}.mid")
    expected.used[seed] += 2


def add_other_archive(folder: Path, name: str, rng: random.Random, expected: Expected) -> None:
    (folder / (name + rng.choice([".7z", ".rar", ".tar.zst"]))).write_bytes(b"7z")
    expected.refuse()


KINDS = [value for name, value in sorted(globals().items()) if name.startswith("add_")]


def build(root: Path, rng: random.Random) -> Expected:
    expected = Expected(root)
    places = [root]
    for index in range(5):
        folder = rng.choice(places) / rng.choice(["sub{}", ".hidden{}", "x{}.mid", "y{}.zip", "\udcfe{}"]).format(
            index
        )
        folder.mkdir(parents=True)
        places.append(folder)
    add_file(root, "first", rng, expected)
    for index in range(25):
        rng.choice(KINDS)(rng.choice(places), f"n{index}", rng, expected)
    return expected


def sums(report: dict[str, Any]) -> tuple[int, int]:
    """What is found, and what became of it."""
    used = sum(split["pieces"] for split in report["splits"].values())
    return report["found"], used + report["duplicates"] + report["refused"] + sum(report["skipped"].values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_every_file_of_an_odd_folder_is_accounted_for(
    seed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = build(tmp_path / "source", random.Random(seed))
    report = tokenize_corpus(str(tmp_path / "source"), tmp_path / "out", OPTIONS)
    found, accounted = sums(report)
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert found == accounted == expected.used.total() + expected.refused + expected.skipped
    assert report["refused"] == len(rows) == expected.refused, rows
    assert sum(report["skipped"].values()) == expected.skipped
    assert report["duplicates"] == expected.used.total() - len(expected.used)
    notes = sorted(read_score(midi(seed)).note_num() for seed in expected.used)
    assert sorted(load_from_disk(str(tmp_path / "out"))["train"]["num_notes"]) == notes
    assert f"{found:,} files found: {len(expected.used):,} used, " in capfd.readouterr().err


def test_a_folder_or_file_that_cannot_be_read_has_a_row(
    midi_folder: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not keep root from reading, so the calls that would fail are replaced."""
    source = midi_folder(4)
    (source / "locked").mkdir()
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folders, "scandir", guarded)
    report = tokenize_corpus(str(source), tmp_path / "out", OPTIONS)
    (row,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert row["path"] == "locked"
    assert row["reason"] == "the folder cannot be read (Permission denied)"
    assert sums(report) == (5, 5)


def test_the_limit_is_a_reason(midi_folder: Callable[[int], Path], tmp_path: Path) -> None:
    report = tokenize_corpus(str(midi_folder(5)), tmp_path / "out", CorpusOptions(limit=2, num_workers=1))
    assert report["skipped"] == {"beyond the limit": 3}
    assert sums(report) == (5, 5)


@pytest.mark.parametrize("order", [1, -1])
def test_midi_wins_over_the_files_of_a_data_set_in_any_order(
    order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is a data set only if neither it nor its archives hold MIDI."""
    scandir = os.scandir

    class Ordered(list[Any]):
        def __enter__(self) -> "Ordered":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(folders, "scandir", lambda path: Ordered(sorted(scandir(path), key=lambda e: e.name)[::order]))
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.parquet", "z.parquet", "data.arrow", "dataset_info.json"):
        (source / name).write_bytes(b"")
    assert is_data_set(str(source))
    (source / "words.zip").write_bytes(zip_bytes([("a.txt", b"text")]))
    assert is_data_set(str(source))
    (source / "k.zip").write_bytes(zip_bytes([("b.zip", zip_bytes([("a.mid", midi(0))]))]))
    assert not is_data_set(str(source))
    (source / "k.zip").unlink()
    (source / "m.mid").write_bytes(midi(0))
    assert not is_data_set(str(source))
    report = tokenize_corpus(str(source), tmp_path / "out", OPTIONS)
    assert report["skipped"] == {
        "a data set's file beside MIDI files (.parquet)": 2,
        "a data set's file beside MIDI files (.arrow)": 1,
        "not MIDI (.json)": 1,
        "not MIDI (.txt)": 1,
    }
    assert sums(report) == (6, 6)


def test_links_make_neither_circles_nor_towers(tmp_path: Path) -> None:
    """Folders that each link twice to the next one are read once, not a million times; names stay those of folders."""
    source = tmp_path / "source"
    for index in range(20):
        folder = source / f"{index:02}"
        folder.mkdir(parents=True)
        (folder / "a.mid").write_bytes(midi(index))
        for name in ("0", "1"):
            (folder / name).symlink_to(source / f"{(index + 1) % 20:02}", target_is_directory=True)
    report = tokenize_corpus(str(source), tmp_path / "out", OPTIONS)
    assert sorted(load_from_disk(str(tmp_path / "out"))["train"]["name"]) == [f"{i:02}/a.mid" for i in range(20)]
    assert report["refused"] == 40
    assert sums(report) == (60, 60)
