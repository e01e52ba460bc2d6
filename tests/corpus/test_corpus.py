import hashlib
import json
import os
import signal
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import pytest
from symusic import Score
from symusic.core import ScoreSecond

from midimamba.corpus import assembly, reading, store
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import SPLITS, load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.store import PieceStore
from midimamba.errors import InputError
from midimamba.tokenization.controls import describe
from midimamba.tokenization.ingest import MAX_FILE_BYTES, parse_midi, read_score
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from midimamba.tokenization.voices import most_voices
from support import command, make_score

MidiFolder = Callable[[int], Path]


def splits_of(out: Path) -> dict[str, str]:
    """The split of every piece by name."""
    dataset, _ = load_corpus(out)
    return {name: split for split in SPLITS for name in dataset[split]["name"]}


def test_every_piece_is_saved_whole_with_its_facts(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(12)
    report = tokenize_corpus(str(folder), tmp_path / "out", CorpusOptions(vocab_size=800, num_workers=2))
    dataset, processor = load_corpus(tmp_path / "out")
    rows = [row for split in SPLITS for row in dataset[split]]
    assert len(rows) == 12
    for row in rows:
        score = read_score(folder / row["name"])
        assert row["input_ids"] == [*processor.encode(folder / row["name"]), processor.eos_token_id]
        assert row["num_notes"] == score.note_num()
        assert row["seconds"] == pytest.approx(cast(ScoreSecond, score.to("second")).end(), rel=1e-5)
    assert json.loads((tmp_path / "out" / "corpus.json").read_text()) == report
    for count, values in {"pieces": [1] * 12, "tokens": [len(row["input_ids"]) for row in rows]}.items():
        assert sum(report["splits"][split][count] for split in SPLITS) == sum(values)
    assert sum(report["splits"][split]["notes"] for split in SPLITS) == sum(row["num_notes"] for row in rows)


def test_merges_are_learned_from_the_train_split_alone(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(12)
    tokenize_corpus(str(folder), tmp_path / "out", CorpusOptions(vocab_size=800, num_workers=1))
    train = [name for name, split in splits_of(tmp_path / "out").items() if split == "train"]
    expected = build_tokenizer()
    train_tokenizer(expected, [read_score(folder / name) for name in sorted(train)], 800)
    _, processor = load_corpus(tmp_path / "out")
    assert processor.midi_tokenizer._model.to_str() == expected._model.to_str()


def test_the_result_does_not_depend_on_the_number_of_workers(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(10)
    for workers in (1, 3):
        tokenize_corpus(str(folder), tmp_path / str(workers), CorpusOptions(vocab_size=800, num_workers=workers))
    (one, first), (three, second) = load_corpus(tmp_path / "1"), load_corpus(tmp_path / "3")
    assert {split: one[split].to_dict() for split in SPLITS} == {split: three[split].to_dict() for split in SPLITS}
    assert first.midi_tokenizer == second.midi_tokenizer
    for name in ("corpus.json", "quarantine.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_adding_files_moves_no_piece(midi_folder: MidiFolder, tmp_path: Path) -> None:
    tokenize_corpus(str(midi_folder(25)), tmp_path / "before", CorpusOptions(vocab_size=None))
    tokenize_corpus(str(midi_folder(40)), tmp_path / "after", CorpusOptions(vocab_size=None))
    before, after = splits_of(tmp_path / "before"), splits_of(tmp_path / "after")
    assert len(before) == 25
    assert before == {name: after[name] for name in before}
    tokenize_corpus(str(midi_folder(40)), tmp_path / "other", CorpusOptions(vocab_size=None, seed=1))
    assert splits_of(tmp_path / "other") != after


def test_bad_files_are_quarantined_and_the_run_continues(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(5)
    (folder / "empty.mid").touch()
    (folder / "archive.tgz").write_bytes(b"no archive")
    Score(480).dump_midi(str(folder / "silent.mid"))
    (folder / "large.mid").write_bytes(bytes(MAX_FILE_BYTES + 1))
    (folder / "more" / "broken.mid").write_bytes((folder / "000.mid").read_bytes()[:40])
    report = tokenize_corpus(str(folder), tmp_path / "out", CorpusOptions(vocab_size=None))
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["archive.tgz", "empty.mid", "large.mid", "more/broken.mid", "silent.mid"]
    assert [row["stage"] for row in rows] == ["read", "read", "read", "read", "check"]
    assert [list(row) for row in rows] == [["path", "sha256", "stage", "reason"]] * 5
    assert rows[1]["reason"] == "the file is empty"
    assert rows[4]["reason"] == "it holds no notes"
    for row in rows:
        digest = hashlib.sha256((folder / row["path"]).read_bytes()).hexdigest()
        assert row["sha256"] == (None if row["path"] == "large.mid" else digest)  # it was not even opened
    assert report["refused"] == 5
    assert len(splits_of(tmp_path / "out")) == 5


def stop_at(stage: str, name: str, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker do something at a stage of the file that has `name` as its only track's name."""
    function = {"read": "parse_midi", "check": "check_score", "tokenize": "_tokenize"}[stage]
    original = getattr(reading, function)

    def misbehave(*arguments: object) -> object:
        if any(name in str(argument) or name.encode() in bytes_of(argument) for argument in arguments):
            action()
        return original(*arguments)

    def bytes_of(argument: object) -> bytes:
        return argument if isinstance(argument, bytes) else getattr(argument, "dumps_midi", bytes)()

    monkeypatch.setattr(reading, function, misbehave)


@pytest.mark.skipif(sys.platform != "linux", reason="workers must inherit the patched reader")
@pytest.mark.parametrize("stage", ["read", "check", "tokenize"])
@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (lambda: os._exit(1), "the process died of it (exit code 1)"),
        (lambda: time.sleep(60), "it took longer than 1 seconds"),
        (lambda: bytearray(2**31), "it took more than 1 GB of memory"),
        (lambda: [][1], "IndexError: list index out of range"),
    ],
)
def test_a_file_on_which_reading_fails_is_quarantined_with_the_stage(
    action: Callable[[], object],
    reason: str,
    stage: str,
    midi_folder: MidiFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = midi_folder(6)
    marked = Score.from_file(str(folder / "002.mid"))
    marked.tracks[0].name = "the culprit"
    marked.dump_midi(str(folder / "002.mid"))
    monkeypatch.setattr(reading, "MAX_SECONDS", 1.0)
    stop_at(stage, "the culprit", action, monkeypatch)
    reports = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        reports.append(tokenize_corpus(str(folder), out, CorpusOptions(vocab_size=None, num_workers=workers)))
        (row,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
        digest = hashlib.sha256((folder / "002.mid").read_bytes()).hexdigest()
        assert row == {"path": "002.mid", "sha256": digest, "stage": stage, "reason": reason}
        assert len(splits_of(out)) == 5
    assert reports[0] == reports[1]


def test_a_file_that_was_read_leniently_is_counted(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(3)
    sound = (folder / "000.mid").read_bytes()
    at = sound.index(b"\xff\x2f\x00\x4d\x54\x72\x6b")  # behind it a note's velocity can be found
    note = next(i for i in range(at, len(sound)) if sound[i] & 0xF0 == 0x90 and sound[i + 1] < 128 > sound[i + 2])
    (folder / "000.mid").write_bytes(sound[: note + 2] + b"\xc8" + sound[note + 3 :])
    report = tokenize_corpus(str(folder), tmp_path / "out", CorpusOptions(vocab_size=None))
    assert (report["sanitized"], report["refused"]) == (1, 0)
    assert len(splits_of(tmp_path / "out")) == 3


def pack(folder: Path, archive: Path) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in files:
                file.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz") as file:
            for path in reversed(files):
                file.add(path, path.relative_to(folder))
    return archive


@pytest.mark.parametrize("name", ["music.zip", "music.tar.gz"])
def test_an_archive_is_the_same_corpus_as_its_folder(name: str, midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(8)
    (folder / "broken.mid").write_bytes(b"broken")
    archive = pack(folder, tmp_path / name)
    corpora = {}
    for source, prefix in ((folder, ""), (archive, f"{name}/")):
        out = tmp_path / f"out-{source.name}"
        tokenize_corpus(str(source), out, CorpusOptions(vocab_size=None, limit=7))
        dataset, _ = load_corpus(out)
        rows = {
            row["name"].removeprefix(prefix): (row["input_ids"], row["num_notes"], row["seconds"])
            for split in SPLITS
            for row in dataset[split]
        }
        assert all(piece.startswith(prefix) for piece in splits_of(out))
        quarantine = (out / "quarantine.jsonl").read_text().replace(prefix, "")
        assert json.loads(quarantine)["path"] == "broken.mid"
        corpora[prefix] = (rows, quarantine)
    assert len(rows) == 6
    assert corpora[""] == corpora[f"{name}/"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["music", name, "out-music", f"out-{name}"]
    )  # nothing was unpacked


def test_a_manifest_decides_the_splits_and_the_rest_falls_to_the_hash(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(30)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    given = {name: ("test", "validation", "train")[i % 3] for i, name in enumerate(names[:12])}
    tokenize_corpus(str(folder), tmp_path / "hashed", CorpusOptions(vocab_size=None))
    table = "".join(f"{name},{split.replace('validation', 'valid')}\n" for name, split in given.items())
    (folder / "manifest.csv").write_text("file,split\n" + table)
    report = tokenize_corpus(str(folder), tmp_path / "given", CorpusOptions(vocab_size=None))
    assert report["split_by"] == {"given": 12, "hash": 18}
    splits, hashed = splits_of(tmp_path / "given"), splits_of(tmp_path / "hashed")
    assert {name: splits[name] for name in given} == given
    assert {name: splits[name] for name in names[12:]} == {name: hashed[name] for name in names[12:]}


def test_pieces_with_the_same_notes_are_kept_once(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(5)
    (folder / "zz-copy.mid").write_bytes((folder / "002.mid").read_bytes())
    slower = read_score(folder / "004.mid")
    for tempo in slower.tempos:
        tempo.mspq *= 2
    slower.dump_midi(str(folder / "zz-slower.mid"))
    report = tokenize_corpus(str(folder), tmp_path / "out", CorpusOptions(vocab_size=None))
    assert report["duplicates"] == 2
    assert not any(name.startswith("zz") for name in splits_of(tmp_path / "out"))


def test_limit_takes_the_first_files_by_name(midi_folder: MidiFolder, tmp_path: Path) -> None:
    tokenize_corpus(str(midi_folder(8)), tmp_path / "out", CorpusOptions(vocab_size=None, limit=3))
    assert sorted(splits_of(tmp_path / "out")) == ["000.mid", "002.mid", "004.mid"]


@pytest.mark.parametrize("content", [None, {}, {"bad.mid": b"no music"}])
def test_nothing_usable_is_an_input_error_and_leaves_nothing(content: dict[str, bytes] | None, tmp_path: Path) -> None:
    folder = tmp_path / "music"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(InputError, match="music"):
        tokenize_corpus(str(folder), tmp_path / "results" / "out")
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize(
    "options", [{"vocab_size": 100}, {"valid_fraction": 0.6, "test_fraction": 0.4}, {"tokenization": "ABC"}]
)
def test_senseless_arguments_are_refused_before_any_work(
    options: dict[str, Any], midi_folder: MidiFolder, tmp_path: Path
) -> None:
    with pytest.raises(InputError):
        tokenize_corpus(str(midi_folder(1)), tmp_path / "out", CorpusOptions(**options))
    assert not (tmp_path / "out").exists()


def test_a_finished_corpus_is_kept_and_another_one_refused(
    midi_folder: MidiFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = midi_folder(4), tmp_path / "out"
    report = tokenize_corpus(str(folder), out, CorpusOptions(vocab_size=None))
    stamp = (out / "corpus.json").stat().st_mtime_ns
    assert tokenize_corpus(str(folder), out, CorpusOptions(vocab_size=None)) == report
    assert "already there" in capsys.readouterr().err
    with pytest.raises(InputError, match="delete it"):
        tokenize_corpus(str(folder), out, CorpusOptions(vocab_size=None, seed=1))
    assert (out / "corpus.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["music", "out"]


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a corpus but the store and what names the run."""
    keep = (path for path in folder.rglob("*") if path.is_file() and path.suffix in (".arrow", ".jsonl"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in keep} | {
        "miditok.json": (folder / "tokenizer" / "miditok.json").read_bytes(),
        "corpus.json": (folder / "corpus.json").read_bytes(),
    }


def count_reads(monkeypatch: pytest.MonkeyPatch, log: Path) -> Callable[[], int]:
    """How many files workers parsed since the last call."""
    original = parse_midi

    def logged(content: bytes) -> object:
        with log.open("a") as file:
            file.write("x")
        return original(content)

    monkeypatch.setattr(reading, "parse_midi", logged)

    def count() -> int:
        reads = log.stat().st_size if log.exists() else 0
        log.unlink(missing_ok=True)
        return reads

    return count


@pytest.mark.skipif(sys.platform != "linux", reason="workers must inherit the patched reader")
def test_a_rerun_reads_what_is_new_and_gives_what_a_fresh_run_gives(
    midi_folder: MidiFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = count_reads(monkeypatch, tmp_path / "log")
    folder, out = midi_folder(6), tmp_path / "out"
    (folder / "broken.mid").write_bytes(b"broken")
    tokenize_corpus(str(folder), out, CorpusOptions(vocab_size=800))
    assert reads() == 7
    midi_folder(9)  # three more
    make_score(99).dump_midi(str(folder / "002.mid"))  # another content
    (folder / "000.mid").unlink()
    (folder / "more" / "001.MID").rename(folder / "renamed.mid")
    tokenize_corpus(str(folder), out, CorpusOptions(vocab_size=800))
    assert "5 of 9 files are as they were read before" in capsys.readouterr().err
    assert reads() == 4  # one changed, three are new
    tokenize_corpus(str(folder), tmp_path / "fresh", CorpusOptions(vocab_size=800))
    assert files_of(out) == files_of(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "log", "music", "out"]


@pytest.mark.skipif(sys.platform != "linux", reason="workers must inherit the patched reader")
def test_an_interrupted_run_continues_where_it_stopped(
    midi_folder: MidiFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_COMMIT_EVERY", 1)
    reads = count_reads(monkeypatch, tmp_path / "log")
    folder, out = midi_folder(8), tmp_path / "out"
    process = os.fork()
    if process == 0:  # this one is killed when it has read five files
        adding = PieceStore.add_outcome

        def add(*arguments: Any) -> None:
            adding(*arguments)
            if (tmp_path / "log").stat().st_size >= 5:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(PieceStore, "add_outcome", add)
        tokenize_corpus(str(folder), out, CorpusOptions(vocab_size=800, num_workers=1))
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert not out.exists()
    assert reads() in (5, 6)  # the worker is one file ahead
    tokenize_corpus(str(folder), out, CorpusOptions(vocab_size=800, num_workers=1))
    assert reads() in (2, 3, 4)
    tokenize_corpus(str(folder), tmp_path / "fresh", CorpusOptions(vocab_size=800))
    assert files_of(out) == files_of(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "log", "music", "out"]


@pytest.mark.parametrize(
    "options", [{"tokenization": "TSD"}, {"vocab_size": 300}, {"tokenizer_options": {"use_velocities": False}}]
)
def test_what_an_existing_tokenizer_decides_cannot_be_chosen(
    options: dict[str, Any], midi_folder: MidiFolder, tmp_path: Path
) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"^{name} is decided by the tokenizer of there: leave it out"):
        tokenize_corpus(str(midi_folder(1)), tmp_path / "out", CorpusOptions(tokenizer="there", **options))


def test_a_corpus_for_an_existing_model_has_its_tokenizer(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(6)
    tokenize_corpus(
        str(folder), tmp_path / "first", CorpusOptions(vocab_size=800, controls=["meter"], tokenization="TSD")
    )
    midi_folder(9)
    tokenizer = str(tmp_path / "first" / "tokenizer")
    report = tokenize_corpus(
        str(folder), tmp_path / "second", CorpusOptions(tokenizer=tokenizer, controls=["meter", "key"])
    )
    _, processor = load_corpus(tmp_path / "first")
    dataset, same = load_corpus(tmp_path / "second")
    assert same.midi_tokenizer.to_dict() == processor.midi_tokenizer.to_dict()
    assert list(same.controls) == ["meter"]  # this model knows no keys
    rows = [row for split in SPLITS for row in dataset[split]]
    assert len(rows) == 9
    for row in rows:
        music = processor.encode(folder / row["name"], add_bos=False)
        assert row["input_ids"][-len(music) - 1 :] == [*music, processor.eos_token_id]
    assert report["vocab_size"] == processor.vocab_size


def test_training_tokens_bound_what_the_subword_model_sees(
    midi_folder: MidiFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def train(_: object, pieces: Any, *__: object) -> None:
        seen.append(sum(map(len, pieces)))

    monkeypatch.setattr(assembly, "train_on_ids", train)
    folder = midi_folder(20)
    for bound in (1, 1000, 10**9):
        tokenize_corpus(str(folder), tmp_path / str(bound), CorpusOptions(training_tokens=bound))
    dataset, _ = load_corpus(tmp_path / "1")
    lengths = [len(ids) - 2 for ids in dataset["train"]["input_ids"]]
    assert seen[0] in lengths  # a single piece
    assert 1000 <= seen[1] < 1000 + max(lengths)
    assert seen[2] == sum(lengths)


def test_controls_precede_the_music_as_it_is(midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(8)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    table = "".join(f"{name},Composer {i % 2}\n" for i, name in enumerate(names))
    (folder / "manifest.csv").write_text("file,composer\n" + table)
    tokenize_corpus(
        str(folder), tmp_path / "out", CorpusOptions(vocab_size=800, controls=["meter", "bars"], labels=["composer"])
    )
    dataset, processor = load_corpus(tmp_path / "out")
    assert list(processor.controls) == ["meter", "bars", "composer"]
    assert processor.controls["composer"] == ["Composer-0", "Composer-1"]
    for row in dataset["train"]:
        score = read_score(folder / row["name"])
        values = {name: described for name, described in describe(score).items() if name in ("meter", "bars")}
        expected = processor.encode(score, controls={**values, "composer": f"Composer {names.index(row['name']) % 2}"})
        assert row["input_ids"] == [*expected, processor.eos_token_id]


@pytest.mark.parametrize("options", [{"controls": ["mood"]}, {"labels": ["composer"]}, {"tokenizer": "nowhere"}])
def test_what_is_not_there_is_refused(options: dict[str, Any], midi_folder: MidiFolder, tmp_path: Path) -> None:
    folder = midi_folder(2)
    with pytest.raises(InputError, match=r"mood|composer|nowhere"):
        tokenize_corpus(str(folder), tmp_path / "out", CorpusOptions(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["music"]


def test_a_folder_that_is_not_a_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a tokenized corpus"):
        load_corpus(tmp_path)


def test_bundled_chorales_are_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("music21")
    report = tokenize_corpus("chorales", tmp_path / "out", CorpusOptions(limit=4, num_workers=2))
    dataset, processor = load_corpus(tmp_path / "out")
    assert report["refused"] == 0
    assert set(splits_of(tmp_path / "out")) == {"bach/bwv1.6", "bach/bwv10.7", "bach/bwv101.7", "bach/bwv102.7"}
    for split in SPLITS:
        for row in dataset[split]:
            score = processor.decode(row["input_ids"])
            assert score.note_num() == row["num_notes"] > 100
            assert [(track.program, track.is_drum) for track in score.tracks] == [(19, False)]
            assert most_voices(score) == 4
    assert "music21" not in capfd.readouterr().err


def music21_is_not_installed(package: str) -> str:
    if package == "music21":
        raise PackageNotFoundError(package)
    return version(package)


@pytest.mark.parametrize("broken", [True, False], ids=["broken", "not-installed"])
def test_chorales_without_music21_name_the_extra(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "music21", None)  # an import now raises
    if not broken:
        monkeypatch.setattr(assembly, "version", music21_is_not_installed)
    assert command(monkeypatch, "tokenize", "chorales", "--out", tmp_path / "out") == 2
    assert 'pip install "midimamba[demo]"' in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "tells"), [(12, True), (40, False)])
def test_too_few_test_pieces_for_an_evaluation_are_told_at_once(
    count: int,
    tells: bool,
    midi_folder: MidiFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--out", tmp_path / "out", "--vocab-size", "none", "--test-fraction", 0.5)
    assert command(monkeypatch, "tokenize", midi_folder(count), *options) == 0
    assert ("`midimamba evaluate` needs 10 pieces in the test split" in capsys.readouterr().out) == tells
