"""A round trip of a corpus through a Hub."""

import io
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from symusic import Score

from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import SPLITS, load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from midimamba.hub_cards.dataset_card import dataset_card, size_category
from midimamba.hub_cards.publish import publish
from midimamba.hub_cards.publish_corpus import without_paths
from support import make_score

from .fake_hub import FakeHub, client

# With shards so small that the train split has several, of several rows each.
PUBLISH = """
import sys
from midimamba import cli
from midimamba.hub_cards import publish_corpus

publish_corpus.MAX_SHARD_BYTES = 3_000
sys.argv = ["midimamba", "publish", *sys.argv[1:]]
cli.main()
"""

LOAD = """
import sys
from midimamba.corpus.load import load_corpus

(here, processor), (there, published) = load_corpus(sys.argv[1]), load_corpus(sys.argv[2])
assert list(there) == list(here) == ["train", "validation", "test"]
for split in here:
    assert there[split].features == here[split].features
    assert there[split].to_dict() == here[split].to_dict()
assert published.midi_tokenizer.to_dict() == processor.midi_tokenizer.to_dict()
assert published.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
"""

AGAIN = """
import sys
from pathlib import Path
from midimamba.errors import exit_on_input_error
from midimamba.hub_cards.publish import publish

smaller, described = map(Path, sys.argv[1:])
publish(smaller, "you/again")
publish(described, "you/own")
with exit_on_input_error():
    publish(smaller, "them/data")
"""

LOAD_ROWS = """
import json
from datasets import load_dataset

print(json.dumps({split: rows["name"][:] for split, rows in load_dataset("you/again").items()}), flush=True)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user, whose name must not be published."""
    return tmp_path_factory.mktemp("secret-home")


@pytest.fixture(scope="module")
def corpus(home: Path) -> Path:
    """A corpus of 30 pieces, with refused and dropped files, and with files beside it that must not be uploaded."""
    music = home / "my-music"
    music.mkdir()
    for seed in range(30):
        make_score(seed, bars=2).dump_midi(music / f"{seed:02}.mid")
    shutil.copyfile(music / "00.mid", music / "copy.mid")
    for name in ("silent", "quiet", "mute"):
        Score(480).dump_midi(music / f"{name}.mid")
    # Three reasons that differ only in their numbers.
    for size in (30, 40, 50):
        (music / f"cut-{size}.mid").write_bytes((music / "01.mid").read_bytes()[:size])
    folder = home / "corpus"
    tokenize_corpus(
        str(music),
        folder,
        CorpusOptions(vocab_size=760, controls=["key"], valid_fraction=0.2, test_fraction=0.2, num_workers=1),
    )
    for name in (".env", "tokenizer/weights.pkl", "tokenizer/notes.txt"):
        (folder / name).write_text(str(home))
    return folder


@pytest.fixture(scope="module")
def files(hub: FakeHub, home: Path, corpus: Path) -> dict[str, bytes]:
    """The files of the corpus that the command has published."""
    done = client(hub, home, PUBLISH, corpus, "--repo", "you/data", "--private", "--license", "cc0-1.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"corpus: {hub.url}/datasets/you/data\n"
    return hub.repositories["datasets/you/data"]


def shards(files: dict[str, bytes], split: str) -> list[str]:
    return sorted(name for name in files if name.startswith(f"data/{split}-"))


@pytest.mark.usefixtures("files")
def test_a_corpus_becomes_one_data_set_in_one_commit(hub: FakeHub) -> None:
    assert "datasets/you/data" in hub.private
    assert hub.commits.count("datasets/you/data") == 1
    assert "you/data" not in hub.repositories


def test_rows_tokenizer_and_reports_are_uploaded_and_nothing_else(files: dict[str, bytes], corpus: Path) -> None:
    rows = {name for split in SPLITS for name in shards(files, split)}
    for split in SPLITS:
        count = len(shards(files, split))
        assert shards(files, split) == [f"data/{split}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    assert 1 < len(shards(files, "train")) <= len(load_corpus(corpus)[0]["train"]) // 2
    tokenizer = {
        f"tokenizer/{path.name}" for path in (corpus / "tokenizer").iterdir() if path.suffix in (".json", ".py")
    }
    assert {"tokenizer/miditok.json", "tokenizer/tokenizer.json", "tokenizer/processor_config.json"} <= tokenizer
    assert set(files) == rows | tokenizer | {"README.md", "corpus.json", "quarantine.jsonl"}
    for name in tokenizer | {"quarantine.jsonl"}:
        assert files[name] == (corpus / name).read_bytes()
    assert not list(corpus.parent.glob(".*"))
    assert not (corpus / "README.md").exists()


def test_no_path_of_the_user_leaves_the_machine(files: dict[str, bytes], home: Path, corpus: Path) -> None:
    local = json.loads((corpus / "corpus.json").read_text())
    assert local["arguments"]["source"] == str(home / "my-music")
    local["arguments"]["source"] = "my-music"
    assert json.loads(files["corpus.json"]) == local
    for name, content in files.items():
        assert home.name.encode() not in content, name
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            assert home.name not in f"{table.schema.metadata} {table['name'].to_pylist()}"


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_a_published_corpus_loads_unchanged(hub: FakeHub, home: Path, corpus: Path) -> None:
    done = client(hub, home, LOAD, corpus, "you/data")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_snippets_of_the_card_run_unchanged(
    files: dict[str, bytes], hub: FakeHub, home: Path, corpus: Path
) -> None:
    snippets = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert len(snippets) == 2
    done = client(hub, home, "\n".join(snippets))
    assert done.returncode == 0, done.stderr
    first = load_corpus(corpus)[0]["train"][0]
    assert done.stdout.splitlines()[-1] == first["name"]
    assert Score(home / "piece.mid").note_num() == first["num_notes"]


def test_the_card_describes_the_content_and_how_it_was_made(files: dict[str, bytes], corpus: Path) -> None:
    card = files["README.md"].decode()
    report = json.loads((corpus / "corpus.json").read_text())
    assert yaml.safe_load(card.split("---")[1]) == {
        "license": "cc0-1.0",
        "tags": ["midi", "music", "midimamba", "symbolic-music"],
        "size_categories": "n<1K",
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in SPLITS],
            }
        ],
    }
    assert "cc0-1.0." in card
    assert "No licence" not in card
    for split, counts in report["splits"].items():
        assert f"| {split} | {counts['pieces']} | {counts['tokens']:,} | {counts['notes']:,} |" in card
    for line in ("`source`: my-music", "`tokenization`: REMI", "`controls`: key", "`seed`: 0", "`subword_model`: BPE"):
        assert f"\n- {line}\n" in card
    assert f"\n- `vocab_size`: {report['vocab_size']}\n" in card
    assert f"`fingerprint`: {report['fingerprint']}" in card
    assert f"miditok {report['versions']['miditok']}" in card
    assert "The splits of 30 pieces were chosen by a hash" in card
    assert "--data you/data" in card


def test_the_card_summarizes_what_was_left_out(files: dict[str, bytes]) -> None:
    card = files["README.md"].decode()
    assert "6 files were refused: " in card
    assert "3 at the stage `check`" in card
    assert "3 at the stage `read`" in card
    assert "| 3 | check | it holds no notes |" in card
    (broken,) = re.findall(r"^\| 3 \| read \| .*", card, re.MULTILINE)
    assert not re.search(r"\d", broken.removeprefix("| 3 |"))
    assert "1 files have the same notes as another file" in card


@pytest.mark.slow
def test_a_smaller_corpus_replaces_a_larger_one_and_a_card_of_the_owner_is_kept(
    files: dict[str, bytes], hub: FakeHub, home: Path, corpus: Path, tmp_path: Path
) -> None:
    hub.repositories["datasets/you/again"] = dict(files) | {"notes.md": b"mine"}
    shutil.copytree(corpus, tmp_path / "described")
    (tmp_path / "described" / "README.md").write_text("---\ntags: [mine]\n---\nMy own words.\n")
    source, own = home / "few", home / "few-corpus"
    source.mkdir()
    for seed in range(40, 44):
        make_score(seed).dump_midi(source / f"{seed}.mid")
    tokenize_corpus(
        str(source), own, CorpusOptions(tokenizer=str(corpus / "tokenizer"), test_fraction=0.0, num_workers=1)
    )
    done = client(hub, tmp_path, AGAIN, own, tmp_path / "described")
    assert done.returncode == 2
    assert hub.repositories["datasets/you/own"]["README.md"].endswith(b"My own words.\n")
    refusal = done.stderr.splitlines()[-1]
    assert refusal.startswith("error: them/data cannot be created: the Hub answers 403")
    assert "403" in refusal
    again = hub.repositories["datasets/you/again"]
    assert [shards(again, split) for split in SPLITS] == [[f"data/{split}-00000-of-00001.parquet"] for split in SPLITS]
    assert again["notes.md"] == b"mine"
    assert "datasets/you/again" not in hub.private
    arguments = json.loads(again["corpus.json"])["arguments"]
    assert (arguments["source"], arguments["tokenizer"]) == ("few", "tokenizer")
    assert not any(home.name.encode() in content for content in again.values())
    card = again["README.md"].decode()
    assert "No licence was stated" in card
    assert "license" not in yaml.safe_load(card.split("---")[1])
    # The options of a new tokenizer had no effect on the given one.
    assert "- `tokenizer`: tokenizer\n" in card
    assert "subword" not in card
    assert "No file was refused" in card

    # `datasets` cannot load a split without rows: the file exists, but the card does not point to it.
    test = pq.read_table(io.BytesIO(again["data/test-00000-of-00001.parquet"]))
    assert (test.num_rows, test.column_names) == (0, ["name", "input_ids", "num_notes", "seconds"])
    loaded = client(hub, tmp_path, LOAD_ROWS + LOAD, own, "you/again")
    assert loaded.returncode == 0, loaded.stderr
    dataset, _ = load_corpus(own)
    assert json.loads(loaded.stdout) == {split: dataset[split]["name"][:] for split in ("train", "validation")}


def test_a_card_lists_the_most_frequent_of_many_reasons(corpus: Path, tmp_path: Path) -> None:
    reasons = [letter * 3 for letter in "abcdefghijkl"]
    rows = [{"stage": "read", "reason": reason} for place, reason in enumerate(reasons) for _ in range(20 - place)]
    rows += [{"stage": "check", "reason": f"a | of 0x{n}f and {n},000 " + "long " * 100} for n in range(50)]
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = json.loads((corpus / "corpus.json").read_text())
    card = str(dataset_card("you/data", report, tmp_path / "quarantine.jsonl"))
    lines = re.findall(r"^\| (\d+) \| (?:read|check) \| (.*) \|$", card, re.MULTILINE)
    assert [int(count) for count, _ in lines] == [50, *range(20, 11, -1)]
    assert lines[0][1].startswith(r"a \| of N and N long")
    assert len(lines[0][1]) < 130
    assert [reason for _, reason in lines[1:]] == reasons[:9]
    assert f"Other reasons account for {11 + 10 + 9} refused files." in card


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("/home/me/songs.zip", "songs.zip"),
        ("C:\\Users\\me\\Music", "Music"),
        ("../me/old/songs", "songs"),
        ("you/songs", "you/songs"),
        ("chorales", "chorales"),
        ("kept/songs", "songs"),
        ("link", "link"),
        (".", "here"),
        ("kept/..", "here"),
        (None, None),
    ],
)
def test_only_the_last_part_of_a_path_is_published(
    name: str | None, published: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "kept" / "songs").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    assert without_paths({"source": name, "tokenizer": name, "seed": 1}) == {
        "source": published,
        "tokenizer": published,
        "seed": 1,
    }


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (100_000, "100K<n<1M"),
        (1_029_000, "1M<n<10M"),
        (999_999_999_999, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_sizes_have_the_names_of_the_hub(rows: int, name: str) -> None:
    assert size_category(rows) == name


def test_options_of_generators_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--discriminator"):
        publish(corpus, "you/data", discriminators=[tmp_path])
    with pytest.raises(InputError, match="--report"):
        publish(corpus, "you/data", report=tmp_path)
    with pytest.raises(InputError, match="--data-license"):
        publish(corpus, "you/data", data_license="cc0-1.0")


@pytest.mark.parametrize("missing", ["tokenizer", "train", "quarantine.jsonl", "dataset_dict.json"])
def test_an_incomplete_corpus_is_refused_before_anything_is_sent(corpus: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True, ignore=lambda _, names: {missing} & set(names))
    with pytest.raises(InputError, match="is not a complete corpus") as refusal:
        publish(tmp_path, "you/data")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"splits": {}}'])
def test_a_foreign_corpus_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(InputError, match="is not a complete corpus"):
        publish(tmp_path, "you/data")


BROKEN: dict[str, list[bytes | tuple[str, object]]] = {
    "corpus.json": [
        *(b"null", b"[]", b"[" * 100_000, b"\xff", b"{"),
        ("splits", []),
        ("splits", {"train": {}, "validation": {}, "test": {}}),
        ("split_by", {"given": "<b>", "hash": 0}),
        ("duplicates", "many"),
        ("vocab_size", None),
        ("arguments", {"source": 3}),
        ("versions", "new"),
    ],
    "quarantine.jsonl": [b"null\n", b"[]\n", b'"a"\n', b"[" * 100_000, b"\xff\n", b'{"stage": "read"}\n', b"{"],
    "tokenizer/miditok.json": [b"null", b"[]", b"[" * 100_000, b"\xff"],
    "dataset_dict.json": [b"null", b"[]", b"{}", b"\xff"],
    "train/dataset_info.json": [b"null", b"[]", b"\xff"],
    "train/state.json": [b"null", b"[]", b"{}", b"\xff"],
    "train/data-00000-of-00001.arrow": [b"none", b""],
    "README.md": [b"---\n[\n---\n", b"\xff", b""],
}


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, contents in BROKEN.items() for place in range(len(contents))]
)
def test_a_broken_corpus_is_one_line_and_creates_nothing(
    name: str, place: int, corpus: Path, tmp_path: Path, online: FakeHub
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    content = BROKEN[name][place]
    if isinstance(content, bytes):
        (broken / name).write_bytes(content)
    else:
        report = json.loads((corpus / name).read_text())
        (broken / name).write_text(json.dumps(report | {content[0]: content[1]}))
    with pytest.raises(InputError) as refusal:
        publish(broken, "you/data")
    assert len(str(refusal.value).splitlines()) == 1
    assert ".publish" not in str(refusal.value)
    assert online.created == online.commits == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize(
    "name", ["README.md", "quarantine.jsonl", "tokenizer/notes.json", "tokenizer", "train", "test/state.json"]
)
def test_links_in_a_corpus_are_refused(name: str, corpus: Path, tmp_path: Path, online: FakeHub) -> None:
    linked, elsewhere = tmp_path / "linked", tmp_path / "elsewhere"
    shutil.copytree(corpus, linked)
    if (linked / name).exists():
        (linked / name).rename(elsewhere)
    else:
        elsewhere.write_text("{}")
    (linked / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{Path(name).name} is a link"):
        publish(linked, "you/data")
    assert not online.created


def test_secrets_in_a_corpus_are_removed(corpus: Path, tmp_path: Path, online: FakeHub) -> None:
    token = "hf_" + "abcDEF123" * 4
    shutil.copytree(corpus, tmp_path / "data")
    report = json.loads((corpus / "corpus.json").read_text())
    report["arguments"] |= {"hub_token": "hushed", "source": f"https://me:{token}@example.org/songs"}
    (tmp_path / "data" / "corpus.json").write_text(json.dumps(report))
    row = json.dumps({"path": token, "sha256": None, "stage": "read", "reason": f"HF_TOKEN={token}"})
    (tmp_path / "data" / "quarantine.jsonl").write_text(f"{row}\n")
    publish(tmp_path / "data", "you/data")
    for name, content in online.repositories["datasets/you/data"].items():
        assert token.encode() not in content, name
        assert b"hushed" not in content, name


def test_a_folder_that_is_neither_generator_nor_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is neither a checkpoint to publish nor a corpus"):
        publish(tmp_path, "you/data")
    with pytest.raises(InputError, match="is neither a checkpoint to publish nor a corpus"):
        publish(tmp_path / "nowhere", "you/data")
