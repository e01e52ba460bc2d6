import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midimamba.corpus.entries import Entry, Refusal
from midimamba.corpus.manifests import Label
from midimamba.corpus.store import Piece, PieceStore, Refused, pack_ids
from midimamba.errors import InputError

SPLITS = ("train", "validation", "test")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PieceStore]:
    with PieceStore(tmp_path / "store", "reader") as made:
        yield made


def fill(store: PieceStore, names: list[str], given: dict[str, str] | None = None) -> None:
    for name in names:
        store.add_file(Entry(name, Path("folder", name), 1), sha256=name)
        store.add_outcome(name, Piece(pack_ids([1, 2, 3]), content=name, num_notes=1, seconds=1.0))
    for name, split in (given or {}).items():
        store.add_label(Label(name, split, {}))
    store.finish_reading()


def splits_of(store: PieceStore) -> dict[str, list[str]]:
    return {split: [piece.name for piece in store.pieces(split)] for split in SPLITS}


@pytest.mark.parametrize("pieces", [3, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_no_split_of_a_small_corpus_is_empty(pieces: int, seed: int, store: PieceStore) -> None:
    names = [f"{i}.mid" for i in range(pieces)]
    fill(store, names)
    store.assign_splits(valid_fraction=0.1, test_fraction=0.1, seed=seed)
    splits = splits_of(store)
    assert all(splits.values())
    assert sorted(name for split in splits.values() for name in split) == names


def test_an_unwanted_split_stays_empty(store: PieceStore) -> None:
    fill(store, [f"{i}.mid" for i in range(5)])
    store.assign_splits(valid_fraction=0.1, test_fraction=0.0, seed=0)
    assert splits_of(store)["test"] == []
    assert splits_of(store)["validation"]


def test_splits_have_about_the_requested_sizes(store: PieceStore) -> None:
    fill(store, [f"{i}.mid" for i in range(4000)])
    store.assign_splits(valid_fraction=0.2, test_fraction=0.1, seed=0)
    splits = splits_of(store)
    assert len(splits["validation"]) == pytest.approx(800, abs=100)
    assert len(splits["test"]) == pytest.approx(400, abs=75)


def test_a_given_split_is_never_overruled_to_fill_another(store: PieceStore) -> None:
    given = {f"{i}.mid": "train" for i in range(5)}
    fill(store, [f"{i}.mid" for i in range(6)], given)
    store.assign_splits(valid_fraction=0.1, test_fraction=0.1, seed=0)
    splits = splits_of(store)
    assert set(splits["train"]) >= set(given)
    assert sum(map(len, splits.values())) == 6
    assert store.counts()["given"] == 5


def test_given_splits_may_leave_nothing_to_train_on(store: PieceStore) -> None:
    fill(store, ["a", "b"], dict.fromkeys("ab", "test"))
    store.assign_splits(valid_fraction=0.1, test_fraction=0.1, seed=0)
    assert store.counts()["train"] == 0


def test_pieces_come_by_name_or_at_random(store: PieceStore) -> None:
    names = [f"{i:02}.mid" for i in range(30)]
    fill(store, names[::-1])
    store.assign_splits(valid_fraction=0.0, test_fraction=0.0, seed=0)
    assert [piece.name for piece in store.pieces("train")] == names
    shuffled = [piece.name for piece in store.pieces("train", order="place")]
    assert shuffled != names
    assert sorted(shuffled) == names


def test_pieces_may_be_drawn_from_another_thread(store: PieceStore) -> None:
    """As the trainers of `tokenizers` do with many pieces."""
    fill(store, ["a", "b"])
    store.assign_splits(valid_fraction=0.0, test_fraction=0.0, seed=0)
    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(lambda: [piece.name for piece in store.pieces("train")]).result()
    assert drawn == ["a", "b"]


@pytest.mark.parametrize(("vocabularies", "ids"), [(1, [5, 6, 7]), (3, [[1, 2, 3], [4, 5, 6]])])
def test_what_was_read_comes_back(vocabularies: int, ids: list[int], tmp_path: Path) -> None:
    with PieceStore(tmp_path / "store", "reader", vocabularies) as store:
        store.add_file(Entry("a", Path("a"), 1), "1")
        store.add_outcome("1", Piece(pack_ids(ids), "x", 12, 3.5, controls={"key": ["C-major"]}))
        store.add_label(Label("a", None, {"composer": "Bach", "genre": "_"}))
        store.assign_splits(0.0, 0.0, 0)
        (piece,) = store.pieces("train")
        assert np.array_equal(piece.ids, ids)
        assert (piece.num_notes, piece.seconds) == (12, 3.5)
        assert piece.control_tokens == ["Control-key_C-major", "Control-composer_Bach"]
        assert store.control_values(["composer", "tempo"]) == {"composer": ["Bach"], "tempo": []}


def test_an_entry_comes_back_as_it_was_wherever_it_lies(store: PieceStore) -> None:
    entries = [Entry(f"{i:04}", Path("folder", f"{i:04}"), i) for i in range(2500)]
    entries += [Entry("a.zip/x", Path("a.zip"), 3, "x"), Entry("b.tar/y", Path("b.tar"), 4, 512)]
    for entry in reversed(entries):
        store.add_file(entry)
    assert sorted(store.entries(), key=lambda entry: entry.name) == entries
    seen = []
    for entry in store.entries():
        store.add_file(entry, "changed while it is read")
        seen.append(entry)
    assert len(seen) == len(entries)


def test_members_of_an_archive_come_in_their_order(store: PieceStore) -> None:
    for name, offset in (("a", 512), ("b", 9), ("c", 100)):
        store.add_file(Entry(name, Path("x.tar"), 1, offset))
    assert [entry.name for entry in store.entries()] == ["b", "c", "a"]


def test_every_refusal_is_listed_with_its_stage(store: PieceStore) -> None:
    store.add_refusal(Refusal("z.zip", "2", "read", "broken"))
    for name in ("b", "a"):
        store.add_file(Entry(name, Path(name), 1), "1")
    store.add_outcome("1", Refused("no notes", "check"))
    store.assign_splits(0.1, 0.1, 0)
    assert list(store.refusals()) == [
        Refusal("a", "1", "check", "no notes"),
        Refusal("b", "1", "check", "no notes"),
        Refusal("z.zip", "2", "read", "broken"),
    ]
    assert store.counts()["refused"] == 3
    assert store.num_files() == 2


def test_a_later_run_knows_what_was_read_but_what_was_lost(tmp_path: Path) -> None:
    with PieceStore(tmp_path / "store", "reader") as store:
        fill(store, ["a"])
        for name, lost in (("bad", False), ("lost", True)):
            store.add_file(Entry(name, Path(name), 1), name)
            store.add_outcome(name, Refused("why", "read", lost))
        store.finish_reading()
        assert store.num_reused() == 0
    with PieceStore(tmp_path / "store", "reader") as store:
        assert [store.knows(sha) for sha in ("a", "bad", "lost", "new")] == [True, True, False, False]
        store.add_file(Entry("a", Path("a"), 1), "a")
        assert store.num_reused() == 1
        store.finish_reading()  # "bad" is gone
        assert not store.knows("bad")
    with PieceStore(tmp_path / "store", "another reader") as store:
        assert not store.knows("a")


def test_two_runs_cannot_share_a_store(tmp_path: Path) -> None:
    with (
        PieceStore(tmp_path / "store", "reader"),
        pytest.raises(InputError, match="is in use by another program"),
    ):
        PieceStore(tmp_path / "store", "reader")


def test_the_same_outcomes_are_the_same_bytes_whatever_their_order(tmp_path: Path) -> None:
    pieces = [(str(seed), a_piece(seed)) for seed in range(30)]
    for name, order in (("a", pieces), ("b", pieces[::-1])):
        with PieceStore(tmp_path / name, "reader") as store:
            for sha256, piece in order:
                store.add_outcome(sha256, piece)
            store.copy_to(tmp_path / f"{name}-copy")
    assert (tmp_path / "a-copy").read_bytes() == (tmp_path / "b-copy").read_bytes()


def a_piece(seed: int) -> Piece:
    ids = np.random.default_rng(seed).integers(0, 300, 200).tolist()
    return Piece(pack_ids(ids), f"{seed}", seed, seed / 7, bool(seed % 2), {"meter": [f"{seed}/4"]}, seed)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store with thirty outcomes."""
    path = tmp_path_factory.mktemp("sound") / "store"
    with PieceStore(path, "reader") as store:
        for seed in range(30):
            store.add_outcome(str(seed), a_piece(seed))
        store.add_outcome("bad", Refused("why", "read"))
    return path.read_bytes()


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE outcomes (a)")


def unlike(path: Path) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.executescript("ALTER TABLE outcomes RENAME COLUMN ids TO a")


def change_a_row(path: Path) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.execute("UPDATE outcomes SET ids = zeroblob(9) WHERE sha256 = '3'")
        file.commit()


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), 0),
        (lambda path: path.write_bytes(b"something else " * 100), 0),
        (foreign, 0),
        (unlike, 0),
        (change_a_row, 30),
    ],
    ids=["cut off", "garbage", "another database", "another table", "a row"],
)
def test_a_damaged_store_loses_what_is_damaged_and_says_so(
    harm: Callable[[Path], object], kept: int, sound: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    path.write_bytes(sound)
    harm(path)
    with PieceStore(path, "reader") as store:
        assert store.damage
        assert sum(store.knows(str(seed)) for seed in (*range(30), "bad")) == kept
        store.add_outcome("3", a_piece(3))
    with PieceStore(path, "reader") as store:
        assert not store.damage
        assert store.knows("3")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(harm=st.lists(st.tuples(st.integers(0, 2**17), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_damaged_byte_changes_a_result(
    harm: list[tuple[int, int]], sound: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "harmed"
    content = bytearray(sound)
    for place, value in harm:
        content[place % len(content)] = value
    path.write_bytes(content)
    with PieceStore(path, "reader") as store:
        for seed in range(30):
            sha256 = str(seed)
            store.add_file(Entry(sha256, Path(sha256), 1), sha256)
            if not store.knows(sha256):
                store.add_outcome(sha256, a_piece(seed))
        store.finish_reading()
        store.assign_splits(0.0, 0.0, 0)
        for piece in store.pieces("train"):
            expected = a_piece(int(piece.name))
            assert pack_ids(piece.ids.tolist()) == expected.ids
            assert (piece.num_notes, piece.seconds) == (expected.num_notes, expected.seconds)
            assert piece.controls == expected.controls
        assert store.counts()["pieces"] == 30
        assert store.counts()["sanitized"] == 15


def test_the_digest_changes_with_files_bytes_splits_and_labels(tmp_path: Path) -> None:
    digests: list[str] = []
    for name, sha, split, labels in (
        ("a", "1", None, {}),
        ("b", "1", None, {}),
        ("a", "2", None, {}),
        ("a", "1", "test", {}),
        ("a", "1", None, {"composer": "x"}),
    ):
        with PieceStore(tmp_path / f"{len(digests)}", "reader") as store:
            store.add_file(Entry(name, Path(name), 1), sha)
            store.add_label(Label(name, split, labels))
            digests.append(store.digest())
    assert len(set(digests)) == 5
