"""What manifests mean, however they are written; and what is refused because its meaning is not clear."""

import json
import random
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.entries import Entry
from midimamba.corpus.load import SPLITS, load_corpus
from midimamba.corpus.manifests import Label, split_named
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.sources import list_source
from midimamba.corpus.store import PieceStore
from midimamba.errors import InputError
from support import make_score

FILES = ("00.mid", "more/01.MID", "more/Café, 2.kar")
Given = dict[str, tuple[str | None, dict[str, str]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "src"
    (made / "more").mkdir(parents=True)
    for name in FILES:
        (made / name).touch()
    return made


def given_of(source: Path, *columns: str) -> Given:
    """What the manifests of a source say about its files; raises as `tokenize` does."""
    with PieceStore(source.parent / "store", "reader") as store:
        for item in list_source(str(source), columns):
            if isinstance(item, Label):
                store.add_label(item)
            elif isinstance(item, Entry):
                store.add_file(item)
        store.check_labels()
        rows = store._db.execute("SELECT name, split, labels FROM labels ORDER BY name")
        return {name: (split, json.loads(labels)) for name, split, labels in rows}


EXPECTED = {"00.mid": ("test", {"composer": "x"}), "more/Café, 2.kar": ("validation", {})}
TABLE = 'file,split,composer\n00.mid,test,x\n"more/Café, 2.kar",valid,\n'


@pytest.mark.parametrize(
    "content",
    {
        "plain": TABLE.encode(),
        "titles in capitals": TABLE.replace("file,split", "File,SPLIT").encode(),
        "padded": 'file , split, composer\n 00.mid ,test , x\n "more/Café, 2.kar" , valid , \n'.encode(),
        "UTF-8 with a mark": TABLE.encode("utf-8-sig"),
        "UTF-16": TABLE.encode("utf-16"),
        "UTF-16 without a mark": TABLE.encode("utf-16-le"),
        "Windows": TABLE.replace("\n", "\r\n").encode("cp1252"),
        "old Macintosh": TABLE.replace("\n", "\r").encode(),
        "semicolons": TABLE.replace(",", ";").replace("Café;", "Café,").encode(),
        "tabs": TABLE.replace(",", "\t").replace("Café\t", "Café,").encode(),
        "empty lines": f"\n\n{TABLE}\n,,\n \n".encode(),
        "composed otherwise": unicodedata.normalize("NFD", TABLE).encode(),
        "backslashes": TABLE.replace("more/", "more\\").encode(),
        "below": TABLE.replace("more/", "./more/").replace("00.mid", "./more/../00.mid").encode(),
        "around": TABLE.replace("more/", "src/more/").replace("00.mid", "../src/00.mid").encode(),
        "another case": TABLE.replace("00.mid", "00.MID").replace("more/C", "More/c").encode(),
        "twice the same": f"{TABLE}./00.mid,,x\n".encode(),
        "other files": f"{TABLE}sound.wav,train,\n".encode(),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_manifest_is_understood_however_it_is_written(content: tuple[str, bytes], folder: Path) -> None:
    (folder / "manifest.csv").write_bytes(content[1])
    assert given_of(folder, "composer") == EXPECTED
    with zipfile.ZipFile(folder.parent / "src.zip", "w") as archive:
        for name in (*FILES, "manifest.csv"):
            archive.write(folder / name, f"src/{name}")
    assert given_of(folder.parent / "src.zip", "composer") == {
        f"src.zip/src/{name}": label for name, label in EXPECTED.items()
    }


def test_absolute_paths_and_those_from_the_current_folder_are_understood(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent.parent)
    inside = folder.relative_to(folder.parent.parent)
    (folder / "more" / "Manifest.CSV").write_text(
        f'file,split\n{folder}/00.mid,test\n{inside}/more/01.MID,dev\n"more/Café, 2.kar",train\n'
    )
    assert {name: split for name, (split, _) in given_of(folder).items()} == dict(
        zip(FILES, ("test", "validation", "train"), strict=True)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"file,split\n00.mid,train\nxx.mid,test\nyy.mid,test\n",
            r"2 of 3 rows .*: 'xx.mid' \(manifest.csv, line 3\), 'yy",
        ),
        (b"file,split\n00,test\n", "1 of 1 rows of manifests name no file"),
        (b"file,split\nmore,test\n", "name no file"),
        (b"file,split\n/elsewhere/00.mid,test\n", "name no file"),
        (b"file,split\n,test\n", "line 2: the column 'file' holds ''"),
        (b"file,split\n00.mid,tset\n", r"manifest\.csv, line 2: split 'tset' is unknown: write train, test, or valid"),
        (b"file,split\n00.mid,train[:80]\n", r"split 'train\[:80\]' is unknown"),
        (b'file,split\n"00.mid,test\nmore/01.MID,test\n', "line 2: .* quote that is not closed"),
        (b'file,split\n"00.mid,test\n"more/01.MID,test\n', "line 2: .* quote that is not closed"),
        (b"file,split,composer\n00.mid,test,Bach, J. S.\n", "line 2: 4 values for 3 columns: put values with ','"),
        (
            b"file,split\n00.mid,test\n./00.mid,train\n",
            "line 3: split 'train' for 00.mid, but manifest.csv, line 2 says",
        ),
        (b"file,composer\n00.mid,x\n00.MID,y\n", "line 3: composer 'y' for 00.mid, but manifest.csv, line 2 says 'x'"),
        (b"split,composer\ntrain,x\n", "manifest.csv has no column 'file', only 'split,composer'"),
        (b"path,kind\n00.mid,x\n", "has no column 'file'"),
        (b"file,set,composer\n00.mid,test,x\nmore/01.MID,train,x\n", "the column 'set' holds splits: call it 'split'"),
        (b"file,split,Split\n00.mid,test,train\n", "has 2 columns 'split'"),
        (b"\xff\xfef\x00i", "not text in UTF-16|no column"),
        (b"file,composr\n00.mid,x\n", "no manifest.csv has a column 'composer'; the columns are composr, file"),
        (b"", "no manifest.csv has a column 'composer'; no manifest names files"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_place(content: bytes, message: str, folder: Path) -> None:
    (folder / "manifest.csv").write_bytes(content)
    columns = ["composer"] if b"compos" in content or not content else []
    with pytest.raises(InputError, match=message) as caught:
        given_of(folder, *columns)
    assert "\n" not in str(caught.value)


def test_a_name_like_those_of_two_files_is_refused(folder: Path) -> None:
    (folder / "00.Mid").touch()
    (folder / "manifest.csv").write_text("file,split\n00.MID,test\n")
    with pytest.raises(InputError, match=r"name no file, or one of several: '00\.MID'"):
        given_of(folder)
    (folder / "manifest.csv").write_text("file,split\n00.Mid,test\n")
    assert given_of(folder) == {"00.Mid": ("test", {})}


def test_a_file_beside_the_manifest_counts_before_one_above(folder: Path) -> None:
    (folder / "more" / "00.mid").touch()
    (folder / "more" / "manifest.csv").write_text("file,split\n00.mid,test\n")
    assert given_of(folder) == {"more/00.mid": ("test", {})}


def test_two_manifests_add_to_each_other(folder: Path) -> None:
    (folder / "manifest.csv").write_text("file,split\nmore/01.MID,test\n")
    (folder / "more" / "manifest.csv").write_text("file,composer\n01.MID,x\n")
    assert given_of(folder, "composer") == {"more/01.MID": ("test", {"composer": "x"})}


def test_a_table_about_something_else_is_ignored_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "manifest.csv").write_text("id,url\n1,https://example.org\n")
    assert given_of(folder) == {}
    assert "manifest.csv has no column 'file': it is ignored" in capsys.readouterr().err


def test_members_whose_paths_begin_with_a_dot_are_found(tmp_path: Path) -> None:
    """As `zip` and `tar` write them when they are given `./`."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("./a.mid", b"x")
        archive.writestr("./manifest.csv", "file,split\na.mid,test\n")
    assert given_of(tmp_path / "a.zip") == {"a.zip/./a.mid": ("test", {})}


def disguised(name: str, root: Path, choose: random.Random) -> str:
    """A path that means the same file of `root`."""
    ways: list[Callable[[str], str]] = [
        lambda path: f"./{path}",
        lambda path: path.replace("/", "\\"),
        lambda path: f"../{root.name}/{path}",
        lambda path: f"{root}/{path}",
        lambda path: path.replace("/", "//"),
        lambda path: f" {path}  ",
        lambda path: unicodedata.normalize("NFD", path),
        lambda path: path.swapcase(),
        lambda path: path,
    ]
    return choose.choice(ways)(name)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    names=st.lists(
        # Names in `._` are resource forks of macOS.
        st.text(st.sampled_from('abö .-_&;,"#é日'), min_size=1, max_size=8).filter(
            lambda text: text.strip(" .") and not text.strip().startswith("._")
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda text: unicodedata.normalize("NFC", text.strip()).casefold(),
    ),
    seed=st.integers(0, 2**32),
    delimiter=st.sampled_from(",;\t"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_every_row_finds_its_file(
    names: list[str], seed: int, delimiter: str, encoding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("music") / "Music"
    choose = random.Random(seed)
    (root / "deep").mkdir(parents=True)
    files = [f"{choose.choice(['', 'deep/'])}{name.strip()}.mid" for name in names]
    splits = [choose.choice(SPLITS) for _ in files]
    for file in files:
        (root / file).touch()
    rows = [(disguised(file, root, choose), split) for file, split in zip(files, splits, strict=True)]
    lines = [f'"{name.replace(chr(34), chr(34) * 2)}"{delimiter}{split}' for name, split in rows]
    (root / "manifest.csv").write_bytes("\n".join([f"File{delimiter}Split", *lines]).encode(encoding))
    assert {name: split for name, (split, _) in given_of(root).items()} == dict(zip(files, splits, strict=True))


@pytest.mark.parametrize(
    ("split", "names"),
    {
        "train": ["train", "Training"],
        "validation": ["valid", "val", "DEV", " eval", "Validation"],
        "test": ["TEST ", "testing"],
    }.items(),
)
def test_splits_are_known_by_their_usual_names(split: str, names: list[str]) -> None:
    assert {split_named(name) for name in names} == {split}


def test_held_out_pieces_are_held_out_whatever_else_has_their_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy that is not in the manifest, or in another split, does not bring a test piece into training."""
    music = tmp_path / "music"
    music.mkdir()
    for seed in range(6):
        make_score(seed, bars=2).dump_midi(music / f"{seed}.mid")
    for name, source in (("z0", 0), ("z1", 1), ("z2", 2)):
        (music / f"{name}.mid").write_bytes((music / f"{source}.mid").read_bytes())
    (music / "manifest.csv").write_text("file,split\nz0.mid,test\n1.mid,train\nz1.mid,val\n3.mid,train\n4.mid,train\n")
    report = tokenize_corpus(str(music), tmp_path / "out", CorpusOptions(vocab_size=None, test_fraction=0.0))
    dataset, _ = load_corpus(tmp_path / "out")
    assert dataset["test"]["name"] == ["z0.mid"]
    assert "z1.mid" in dataset["validation"]["name"]
    assert not {"0.mid", "1.mid", "z1.mid"} & set(dataset["train"]["name"])
    assert report["split_by"] == {"given": 4, "hash": 2}
    said = capsys.readouterr().err
    assert "5 rows of manifests name files" in said
    assert "splits: 4 by manifest.csv, 2 by hash" in said
    assert "1 pieces are given to several splits" in said


def test_a_manifest_that_cannot_be_read_is_not_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.mid").touch()
    (tmp_path / "manifest.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(InputError, match=r"manifest\.csv: .*mend it or delete it"):
        list(list_source(str(tmp_path)))
