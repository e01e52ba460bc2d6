import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midimamba.corpus import archives
from midimamba.corpus.entries import Entry, Refusal, unique_name
from midimamba.corpus.manifests import Label
from midimamba.corpus.sources import list_source, midi_files, read_entries
from midimamba.errors import InputError
from midimamba.tokenization.ingest import MAX_FILE_BYTES, MidiRefusedError

CONTENT = {"a.mid": b"first", "more/b.MID": b"second", "more/deep/c.kar": b"third" * 1000, "notes.txt": b"no music"}
MIDI = {name: content for name, content in CONTENT.items() if name != "notes.txt"}


def write_zip(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, content: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.lower().endswith("gz") else "w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


WRITERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "music.zip": write_zip,
    "music.tar": write_tar,
    "music.tar.gz": write_tar,
    "MUSIC.TGZ": write_tar,
}


def entries_of(source: Path) -> list[Entry]:
    return sorted((item for item in list_source(str(source)) if isinstance(item, Entry)), key=lambda entry: entry.name)


def contents_of(source: Path) -> dict[str, bytes | MidiRefusedError]:
    by_name = {entry.name: entry for entry in entries_of(source)}
    return {entry.name: content for entry, content in read_entries(by_name.values())}


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_is_read_member_by_member(name: str, tmp_path: Path) -> None:
    archive = WRITERS[name](tmp_path / name, dict(reversed(CONTENT.items())))
    entries = entries_of(archive)
    assert [entry.name for entry in entries] == sorted(f"{name}/{member}" for member in MIDI)
    assert {entry.name: entry.size for entry in entries} == {f"{name}/{m}": len(c) for m, c in MIDI.items()}
    assert contents_of(archive) == {f"{name}/{member}": content for member, content in MIDI.items()}
    # A selection, as with `limit`, reads just that.
    assert [content for _, content in read_entries(entries[1:2])] == [b"second"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_holds_files_and_archives(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.mid").write_bytes(b"loose")
    expected = {"sub/x.mid": b"loose"}
    for name, write in WRITERS.items():
        write(tmp_path / "sub" / name, CONTENT)
        expected |= {f"sub/{name}/{member}": content for member, content in MIDI.items()}
    assert contents_of(tmp_path) == expected


def test_midi_files_are_found_in_any_case(tmp_path: Path) -> None:
    for name in ("b.MID", "a.midi", "sub/c.Kar", "sub/d.mid", "notes.txt", "e.mid.bak"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mid").mkdir()
    assert [entry.path.name for entry in entries_of(tmp_path)] == ["a.midi", "b.MID", "c.Kar", "d.mid"]


def test_who_reads_files_one_by_one_finds_those_of_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "music", target_is_directory=True)
    for name in ("b.MID", "a.mid.gz", "._a.mid", "music.zip", "linked/c.mid"):
        (tmp_path / "music" / name).touch()
    names = ["a.mid.gz", "b.MID", "linked/c.mid"]
    assert midi_files(tmp_path / "music") == sorted(tmp_path / "music" / name for name in names)
    assert sorted(entry.name for entry in entries_of(tmp_path / "music")) == sorted(names)


@pytest.mark.parametrize("name", ["music.zip", "music.tar.gz"])
def test_member_names_are_only_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    hostile = {"../../escape.mid": b"up", "/etc/absolute.mid": b"root", "a\nb.mid": b"line", "é/ü.mid": b"umlaut"}
    archive = WRITERS[name](tmp_path / "box" / name, hostile)
    assert contents_of(archive) == {f"{name}/{member}": content for member, content in hostile.items()}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["box", name]


def test_links_and_devices_in_a_tar_file_are_not_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "music.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.mid")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert entries_of(tmp_path / "music.tar") == []


def test_a_name_that_is_not_text_becomes_text(tmp_path: Path) -> None:
    write_tar(tmp_path / "music.tar", {"\udcff.mid": b"x"})
    (name,) = contents_of(tmp_path / "music.tar")
    assert name.encode() == b"music.tar/\\udcff.mid"


def test_of_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "music.tar", "w") as archive:
        for data in (b"old", b"new!"):
            info = tarfile.TarInfo("a.mid")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert contents_of(tmp_path / "music.tar") == {"music.tar/a.mid": b"new!"}


@pytest.mark.parametrize("name", ["music.zip", "music.tar.gz"])
def test_a_member_beyond_the_size_limit_is_refused_unread(name: str, tmp_path: Path) -> None:
    archive = WRITERS[name](tmp_path / name, {"a.mid": b"fine", "bomb.mid": bytes(8 * MAX_FILE_BYTES)})
    tracemalloc.start()
    contents = contents_of(archive)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents[f"{name}/a.mid"] == b"fine"
    refusal = contents[f"{name}/bomb.mid"]
    assert isinstance(refusal, MidiRefusedError)
    assert "larger than 16 MB" in refusal.reason
    assert peak < MAX_FILE_BYTES


def test_a_zip_member_that_lies_about_its_size_yields_no_more_than_it_said(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "music.zip", {"bomb.mid": bytes(8 * MAX_FILE_BYTES)})
    size, lie = struct.pack("<I", 8 * MAX_FILE_BYTES), struct.pack("<I", 100)
    archive.write_bytes(archive.read_bytes().replace(size, lie))
    tracemalloc.start()
    (refusal,) = contents_of(archive).values()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(refusal, MidiRefusedError)
    assert peak < MAX_FILE_BYTES


def test_a_tar_header_cannot_claim_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 2**32
    with gzip.open(tmp_path / "music.tar.gz", "wb") as file:
        file.write(info.tobuf())
    with pytest.raises(InputError, match=r"cannot be read \(a header of 4,294,967,296 bytes\)"):
        entries_of(tmp_path / "music.tar.gz")


def damaged(archive: Path) -> dict[str, bytes]:
    """Ways to break an archive so that it cannot be listed."""
    whole = archive.read_bytes()
    ways = {"empty": b"", "other": b"something else" * 100}
    if archive.suffix == ".tar":
        second = whole.index(b"more/b.MID")
        ways |= {"header": whole[:second] + b"\1" * 100 + whole[second + 100 :], "cut": whole[: second + 700]}
    else:
        ways["cut"] = whole[: len(whole) // 2]
    return ways


@pytest.mark.parametrize("name", ["music.zip", "music.tar", "music.tar.gz"])
def test_a_broken_archive_is_an_error_as_source_and_a_refusal_in_a_folder(name: str, tmp_path: Path) -> None:
    archive = WRITERS[name](tmp_path / name, CONTENT)
    write_zip(tmp_path / "sound.zip", {"a.mid": b"fine"})
    for way, content in damaged(archive).items():
        archive.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: the archive cannot be read") as caught:
            entries_of(archive)
        assert "\n" not in str(caught.value), way
        assert [entry.name for entry in entries_of(tmp_path)] == ["sound.zip/a.mid"]
        (refusal,) = (item for item in list_source(str(tmp_path)) if isinstance(item, Refusal))
        assert (refusal.name, refusal.stage) == (name, "read")
        assert refusal.sha256 is not None
        assert refusal.reason.startswith("the archive cannot be read (")


def test_a_broken_member_does_not_cost_the_others(tmp_path: Path) -> None:
    archive = tmp_path / "music.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        file.writestr("a.mid", b"sound music")
        file.writestr("b.mid", b"broken music")
    archive.write_bytes(archive.read_bytes().replace(b"broken music", b"brokem music"))
    contents = contents_of(archive)
    assert contents["music.zip/a.mid"] == b"sound music"
    assert "it cannot be read from the archive (Bad CRC-32" in str(contents["music.zip/b.mid"])


@pytest.mark.parametrize("name", ["nowhere", "file.txt"])
def test_what_is_neither_folder_nor_archive_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(InputError, match="is not a folder, an archive"):
        entries_of(tmp_path / name)


def test_what_a_manifest_says_is_listed_after_all_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.mid").touch()
    (tmp_path / "sub" / "manifest.csv").write_text("split,file\ntest,a.mid\n")
    write_zip(tmp_path / "z.zip", {"manifest.csv": b"file,split\nb.mid,train\n", "b.mid": b"b"})
    items = list(list_source(str(tmp_path)))
    labels = [item for item in items if isinstance(item, Label)]
    assert items[-len(labels) :] == labels
    assert {(label.place, label.split) for label in labels} == {
        ("sub/manifest.csv, line 2", "test"),
        ("z.zip/manifest.csv, line 2", "train"),
    }
    assert not any("manifest" in entry.name for entry in entries_of(tmp_path))


def test_nothing_larger_than_a_file_is_read_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 600)
    (refusal, *_) = contents_of(write_tar(tmp_path / "music.tar", {"a.mid": bytes(601)})).values()
    assert isinstance(refusal, MidiRefusedError)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    damage=st.lists(st.tuples(st.integers(0, 2**14), st.integers(0, 255)), min_size=1, max_size=5),
    kept=st.floats(0.5, 1.5),
)
def test_a_damaged_archive_yields_files_or_reasons(
    name: str, damage: list[tuple[int, int]], kept: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    content = bytearray(WRITERS[name](archive, CONTENT).read_bytes())
    for place, value in damage:
        content[place % len(content)] = value
    archive.write_bytes(content[: int(len(content) * kept)])
    try:
        contents = contents_of(archive)
    except InputError:
        return
    assert all(isinstance(content, bytes | MidiRefusedError) for content in contents.values())


@given(st.lists(st.text(alphabet="\\ud8cf0\ud800\udcff/a"), max_size=30))
def test_different_names_stay_different_as_text(names: list[str]) -> None:
    assert len({unique_name(name) for name in names}) == len(set(names))
    for name in names:
        unique_name(name).encode()


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_that_is_gone_or_another_when_it_is_read_is_a_reason(name: str, tmp_path: Path) -> None:
    archive = WRITERS[name](tmp_path / name, CONTENT)
    entries = entries_of(archive)
    for damage in (archive.unlink, lambda: archive.write_bytes(b"other"), lambda: archive.write_bytes(b"")):
        damage()
        contents = list(read_entries(entries))
        assert {entry.name for entry, _ in contents} == {entry.name for entry in entries}
        assert all(isinstance(content, MidiRefusedError) or name == "music.tar" for _, content in contents)
