"""A file of ABC notation is a book: every tune of it is a piece, wherever the file lies."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from midimamba.corpus.archives import Budget, TuneBook
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.entries import Entry, Refusal
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.sources import list_source, read_entries
from midimamba.errors import InputError
from midimamba.tokenization.abc_notation import midi_of
from midimamba.tokenization.ingest import MidiRefusedError

ALONE = b"X:1\nL:1/4\nK:C\nCDEF|GABc|\n"


def book(tunes: int, first: int = 0) -> bytes:
    """Tunes that differ in pitch, all with the number 1, as careless collections have them."""
    shared = "A collection of tunes\nM:3/4\nL:1/4\n\n"
    return (
        shared + "\n".join(f"X:1\nT:{n}\nK:C\n{'CDEFGABcdefgab'[n]}2 E|" for n in range(first, first + tunes))
    ).encode()


def nested(content: bytes) -> bytes:
    """A zip file in a tar file."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep/book.abc", content)
    with tarfile.open(fileobj=outer, mode="w:xz") as archive:
        info = tarfile.TarInfo("inner.zip")
        info.size = inner.tell()
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    return outer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "music"
    folder.mkdir()
    (folder / "alone.abc").write_bytes(ALONE)
    (folder / "BOOK.ABC").write_bytes(book(3))
    (folder / "none.abc").write_bytes(b"only words\n")
    (folder / "more.tar.xz").write_bytes(nested(book(2, first=5)))
    return folder


def test_every_tune_is_an_entry_with_what_is_meant_for_all_tunes(folder: Path) -> None:
    items = list(list_source(str(folder)))
    entries = [item for item in items if isinstance(item, Entry)]
    content = {entry.name: content for entry, content in read_entries(entries)}
    inner = "more.tar.xz/inner.zip/deep/book.abc"
    assert set(content) == {"alone.abc", "BOOK.ABC/1", "BOOK.ABC/2", "BOOK.ABC/3", f"{inner}/1", f"{inner}/2"}
    assert content["BOOK.ABC/2"] == b"M:3/4\nL:1/4\nX:1\nT:1\nK:C\nD2 E|\n"
    for name, tune in content.items():
        assert isinstance(tune, bytes)
        assert midi_of(tune)
        assert (b"M:3/4" in tune) == (name != "alone.abc")
    assert [(item.name, item.reason) for item in items if isinstance(item, Refusal)] == [
        ("none.abc", "it holds no ABC tune: each begins with a line such as X:1")
    ]


def test_tunes_become_pieces_of_a_corpus(folder: Path, tmp_path: Path) -> None:
    report = tokenize_corpus(str(folder), tmp_path / "data", CorpusOptions(num_workers=1, vocab_size=None))
    assert sum(split["pieces"] for split in report["splits"].values()) == 6
    assert report["refused"] == 1
    report = tokenize_corpus(
        str(folder / "BOOK.ABC"), tmp_path / "book", CorpusOptions(num_workers=1, vocab_size=None)
    )
    assert sum(split["pieces"] for split in report["splits"].values()) == 3


def test_a_single_file_without_a_tune_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"none\.abc: it holds no ABC tune"):
        list(list_source(str(folder / "none.abc")))


def test_a_long_head_for_very_many_tunes_is_a_bomb() -> None:
    content = b"%%" + b"x" * 2**20 + b"\n" + b"X:1\nK:C\nC\n" * 300
    budget = Budget(len(content))
    shelf = TuneBook(io.BytesIO(content), budget)
    members = list(shelf.members())
    assert len(members) == 300
    with pytest.raises(MidiRefusedError, match="bomb"):
        _ = [shelf.read(member.place, member.size) for member in members]
