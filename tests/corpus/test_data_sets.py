import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.data_sets import DataSetFiles, is_data_set
from midimamba.corpus.load import SPLITS, load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from midimamba.tokenization.ingest import MAX_FILE_BYTES, MidiRefusedError
from support import make_score


def midi(seed: int) -> bytes:
    content = make_score(seed, bars=2).dumps_midi()
    assert isinstance(content, bytes)
    return content


def rows(count: int, first: int = 0) -> dict[str, list[Any]]:
    return {
        "title": [f"No. {i}" for i in range(first, first + count)],
        "midi": [midi(i) for i in range(first, first + count)],
    }


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Dataset | DatasetDict, str], str]:
    """A data set on the disk, saved by `datasets` or as Parquet files."""

    def save(data: Dataset | DatasetDict, form: str) -> str:
        folder = tmp_path / f"data-{form}"
        if form == "arrow":
            data.save_to_disk(str(folder))
        else:
            folder.mkdir()
            for split, part in (data if isinstance(data, DatasetDict) else {"train": data}).items():
                part.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        return str(folder)

    return save


@pytest.mark.parametrize(("form", "streaming"), [("arrow", False), ("parquet", False), ("parquet", True)])
def test_a_column_of_bytes_is_a_corpus(form: str, streaming: bool, saved: Any, tmp_path: Path) -> None:
    source = saved(Dataset.from_dict(rows(8)), form)
    assert is_data_set(source)
    report = tokenize_corpus(source, tmp_path / "out", CorpusOptions(vocab_size=None, streaming=streaming))
    assert report["split_by"] == {"given": 0, "hash": 8}
    dataset, processor = load_corpus(tmp_path / "out")
    found = {row["name"]: row["input_ids"] for split in SPLITS for row in dataset[split]}
    assert found == {f"train/{i:08}": [*processor.encode(midi(i)), processor.eos_token_id] for i in range(8)}


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_splits_of_a_data_set_are_honoured(form: str, saved: Any, tmp_path: Path) -> None:
    parts = {"train": rows(3), "validation": rows(2, 3), "test": rows(1, 5)}
    source = saved(DatasetDict({split: Dataset.from_dict(part) for split, part in parts.items()}), form)
    report = tokenize_corpus(source, tmp_path / "out", CorpusOptions(vocab_size=None))
    assert {split: counts["pieces"] for split, counts in report["splits"].items()} == {
        "train": 3,
        "validation": 2,
        "test": 1,
    }
    assert report["split_by"] == {"given": 6, "hash": 0}


def test_a_column_split_is_honoured(saved: Any, tmp_path: Path) -> None:
    table = rows(6) | {"split": ["train", "valid", "TEST", "train", None, "train"]}
    tokenize_corpus(saved(Dataset.from_dict(table), "arrow"), tmp_path / "out", CorpusOptions(vocab_size=None))
    dataset, _ = load_corpus(tmp_path / "out")
    assert "train/00000001" in dataset["validation"]["name"]
    assert "train/00000002" in dataset["test"]["name"]


@pytest.mark.parametrize("form", ["arrow", "parquet"])
@pytest.mark.parametrize("name", ["val", "dev", "Eval", "valid"])
def test_held_out_splits_are_known_by_their_usual_names(name: str, form: str, saved: Any) -> None:
    parts = {"training": rows(1), name: rows(1, 1), "testing": rows(1, 2)}
    if form == "parquet" and name == "Eval":
        pytest.skip("`datasets` finds splits of Parquet files by names in lower case")
    if form == "parquet":
        parts = {{"training": "train", "testing": "test"}.get(split, split): part for split, part in parts.items()}
    source = saved(DatasetDict({split: Dataset.from_dict(part) for split, part in parts.items()}), form)
    splits = [label.split for _, label, _ in DataSetFiles(source)]
    assert sorted(map(str, splits)) == ["test", "train", "validation"]


def test_a_column_split_knows_the_same_names_in_classes_as_well(saved: Any) -> None:
    names = ["train", "val", "test"]
    table = rows(4) | {"Split": [0, 1, 2, None], "genre": [2, 1, 0, 0]}
    classes = ClassLabel(names=names), ClassLabel(names=["march", "folk", "waltz"])
    data = Dataset.from_dict(table).cast_column("Split", classes[0]).cast_column("genre", classes[1])
    labels = [label for _, label, _ in DataSetFiles(saved(data, "arrow"), columns=["genre"])]
    assert [label.split for label in labels] == ["train", "validation", "test", None]
    assert [label.labels["genre"] for label in labels] == ["waltz", "folk", "march", "march"]


@pytest.mark.parametrize(
    ("parts", "column", "message"),
    [
        (
            ["train", "fold3"],
            None,
            "has a split 'fold3', which may be held out: rename it to train, validation or test",
        ),
        (["train[:80]"], None, r"has a split 'train\[:80\]'"),
        (["piano", "guitar"], None, "has a split 'piano'"),
        (["train"], "fold3", "row train/00000000: split 'fold3' is unknown: write train, test, or validation"),
        (["train"], 3, "split '3' is unknown"),
        (["train", "test"], "train", "row test/00000000: the column 'split' says train, but .* split 'test'"),
    ],
)
def test_an_unknown_split_is_refused_by_name(
    parts: list[str], column: str | int | None, message: str, saved: Any, tmp_path: Path
) -> None:
    column_of = {"split": [column] * 2} if column is not None else {}
    tables = {part: Dataset.from_dict(rows(2, 2 * i) | column_of) for i, part in enumerate(parts)}
    folder = tmp_path / "data"
    for part, table in tables.items():
        table.save_to_disk(str(folder / part if len(parts) > 1 else folder))
        if len(parts) == 1:  # what `load_dataset(..., split="train[:80]").save_to_disk` writes
            state = json.loads((folder / "state.json").read_text()) | {"_split": part}
            (folder / "state.json").write_text(json.dumps(state))
    if len(parts) > 1:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": parts}))
    with pytest.raises(InputError, match=message):
        tokenize_corpus(str(folder), tmp_path / "out", CorpusOptions(vocab_size=None))
    assert not (tmp_path / "out").exists()


def test_an_undivided_data_set_is_split_by_the_hash_and_a_lone_test_split_is_not(saved: Any, tmp_path: Path) -> None:
    for name, expected in (("default", {None}), ("train", {None}), ("test", {"test"}), ("dev", {"validation"})):
        folder = tmp_path / name
        DatasetDict({name: Dataset.from_dict(rows(2))}).save_to_disk(str(folder))
        assert {label.split for _, label, _ in DataSetFiles(str(folder))} == expected
    with pytest.raises(InputError, match="leave no usable piece to train on"):
        tokenize_corpus(str(tmp_path / "test"), tmp_path / "out", CorpusOptions(vocab_size=None))


def test_files_are_taken_from_structs_and_bad_rows_are_quarantined(saved: Any, tmp_path: Path) -> None:
    contents = [midi(0), midi(1), None, b"no music", bytes(MAX_FILE_BYTES + 1), midi(2)]
    files = [{"bytes": content, "path": "x.mid"} for content in contents]
    source = saved(Dataset.from_dict({"music": files}), "parquet")
    report = tokenize_corpus(source, tmp_path / "out", CorpusOptions(vocab_size=None))
    assert report["refused"] == 3
    quarantine = (tmp_path / "out" / "quarantine.jsonl").read_text()
    for row, reason in ((2, "the row holds no bytes"), (3, "not a well-formed MIDI file"), (4, "larger than 16 MB")):
        assert f'"train/{row:08}"' in quarantine
        assert reason in quarantine


def test_columns_are_labels(saved: Any, tmp_path: Path) -> None:
    table = rows(4) | {"genre": ["folk tune", "march", None, "march"], "split": ["train"] * 4}
    tokenize_corpus(
        saved(Dataset.from_dict(table), "arrow"), tmp_path / "out", CorpusOptions(vocab_size=None, labels=["genre"])
    )
    dataset, processor = load_corpus(tmp_path / "out")
    assert processor.controls == {"genre": ["folk-tune", "march"]}
    starts = [processor.tokenizer.decode(ids[1:2]) for ids in dataset["train"]["input_ids"]]
    assert starts == ["Control-genre_folk-tune", "Control-genre_march", "Bar_None", "Control-genre_march"]


def test_limit_takes_the_first_rows(saved: Any, tmp_path: Path) -> None:
    report = tokenize_corpus(
        saved(Dataset.from_dict(rows(6)), "arrow"), tmp_path / "out", CorpusOptions(vocab_size=None, limit=4)
    )
    assert sum(counts["pieces"] for counts in report["splits"].values()) == 4


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": [b"x"], "b": [b"y"]}, {}, "which column .* Found a, b: name it with --midi-column"),
        ({"a": ["x"]}, {}, "Found none"),
        ({"a": [b"x"]}, {"midi_column": "b"}, "has no column 'b'; its columns are a"),
        ({"a": [b"x"]}, {"columns": ["genre"]}, "has no column 'genre'; its columns are a"),
    ],
)
def test_a_column_that_is_not_there_is_named(
    columns: dict[str, list[Any]], options: dict[str, Any], message: str, saved: Any
) -> None:
    with pytest.raises(InputError, match=message):
        DataSetFiles(saved(Dataset.from_dict(columns), "arrow"), **options)


def test_the_column_can_be_named(saved: Any) -> None:
    source = saved(Dataset.from_dict({"a": [b"x"], "b": [b"y"]}), "arrow")
    ((_, _, content),) = DataSetFiles(source, midi_column="b")
    assert content == b"y"


def test_a_data_set_is_told_from_other_sources(tmp_path: Path) -> None:
    assert not is_data_set("chorales")
    assert not is_data_set(str(tmp_path))
    (tmp_path / "a.mid").touch()
    (tmp_path / "meta.parquet").touch()
    assert not is_data_set(str(tmp_path))  # MIDI files count more
    assert is_data_set("owner/name")


def test_a_source_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="nobody/nothing cannot be read as a folder, an archive, or a data set"
    ) as caught:
        tokenize_corpus("nobody/nothing", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_broken_data_set_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(io.BytesIO(b"nothing").read())
    with pytest.raises(InputError, match="cannot be read as a data set"):
        tokenize_corpus(str(tmp_path / "data"), tmp_path / "out")


def test_content_of_a_row_is_bytes_or_a_reason(saved: Any) -> None:
    source = saved(Dataset.from_dict({"a": [b"x", None]}), "arrow")
    contents = [content for _, _, content in DataSetFiles(source)]
    assert contents[0] == b"x"
    assert isinstance(contents[1], MidiRefusedError)


@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_the_column_is_found_although_the_first_row_is_empty(form: str, saved: Any, tmp_path: Path) -> None:
    source = saved(Dataset.from_dict({"midi": [None, midi(0), midi(1)], "composer": ["a", "b", "c"]}), form)
    report = tokenize_corpus(source, tmp_path / "out", CorpusOptions(vocab_size=None, num_workers=1))
    used = sum(split["pieces"] for split in report["splits"].values())
    assert (used, report["refused"], report["found"]) == (2, 1, 3)
