"""Damaged corpora, reports and recipes, and a Hub out of reach, are refused in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from damage_support import NOT_AN_OBJECT, Damage, content, refusal

from midimamba.corpus.load import load_corpus
from midimamba.errors import InputError
from midimamba.evaluation.report import NEEDED, write_report
from midimamba.evaluation.report_curves import draw_curves
from midimamba.training import pretrain
from support import command, make_score


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("midimamba.cli", "generate", "you/none", "--out", "out"),
        ("midimamba.cli", "evaluate", "music", "--reference", "you/none", "--out", "out.json"),
        ("midimamba.cli", "tokenize", "you/none", "--out", "out"),
        ("midimamba.training.pretrain", "--data", "you/none", "--output_dir", "out", "--use_cpu"),
    ],
    ids=lambda words: words[1],
)
@pytest.mark.parametrize("offline", ["0", "1"], ids=["unreachable", "offline"])
def test_a_hub_out_of_reach_is_one_line_within_seconds(words: tuple[str, ...], offline: str, tmp_path: Path) -> None:
    (tmp_path / "music").mkdir()
    make_score(1).dump_midi(tmp_path / "music" / "a.mid")
    surroundings = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "home"}
    ended = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2, ended.stderr
    assert [line for line in ended.stderr.splitlines() if "error: " in line] == ended.stderr.splitlines()[-1:]
    assert "you/none" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [*NOT_AN_OBJECT.values(), b"[" * 5000], ids=[*NOT_AN_OBJECT, "too deep for YAML"])
def test_a_recipe_or_tokenizer_options_of_the_wrong_kind_are_refused(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_bytes(text)
    (tmp_path / "music").mkdir()
    arguments = ("tokenize", tmp_path / "music", "--out", tmp_path / "out", "--tokenizer-config", file)
    assert command(monkeypatch, *arguments) == 2
    assert "options.yaml" in capfd.readouterr().err
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(file)])
    with pytest.raises(InputError):
        pretrain.main()
    assert not (tmp_path / "out").exists()


CORPUS_FILES = ("corpus.json", "dataset_dict.json", "train/dataset_info.json", "train/state.json")


@pytest.mark.parametrize("text", NOT_AN_OBJECT)
@pytest.mark.parametrize("file", [*CORPUS_FILES, "tokenizer/miditok.json"])
def test_a_damaged_corpus_is_refused(file: str, text: str, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / file).write_bytes(NOT_AN_OBJECT[text])
    assert str(tmp_path / "corpus") in refusal(load_corpus, tmp_path / "corpus")


def lose(part: str) -> Damage:
    def damage(folder: Path) -> None:
        for path in folder.glob(part):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut_rows(folder: Path) -> None:
    for path in folder.glob("train/*.arrow"):
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "damage",
    [
        lose("train/*.arrow"),
        lose("validation"),
        lose("dataset_dict.json"),
        cut_rows,
        content("dataset_dict.json", '{"splits": ["train"]}'),
        content("dataset_dict.json", '{"splits": 5}'),
    ],
    ids=["no rows", "no split", "no list of splits", "cut off", "splits that are not named", "splits of a wrong type"],
)
def test_a_corpus_that_lacks_a_part_is_refused(damage: Damage, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    damage(tmp_path / "corpus")
    assert str(tmp_path / "corpus") in refusal(load_corpus, tmp_path / "corpus")


WRONG_LOGS = ("{}", '{"log_history": {}}', '{"log_history": [1]}', '{"log_history": [{"step": "x"}]}')


@pytest.mark.parametrize("text", [*NOT_AN_OBJECT.values(), *(log.encode() for log in WRONG_LOGS)])
def test_a_report_names_the_damaged_file_of_a_run(text: bytes, tmp_path: Path) -> None:
    for part in NEEDED:
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).write_text("{}")
    (tmp_path / "generator" / "training_args.json").write_bytes(text)
    assert "generator/training_args.json" in refusal(lambda run: write_report(Path(run)), tmp_path)
    (tmp_path / "pretrained" / "trainer_state.json").write_bytes(text)
    said = refusal(
        lambda run: draw_curves(Path(run, "pretrained"), Path(run, "generator"), Path(run, "x.png")), tmp_path
    )
    assert "pretrained/trainer_state.json" in said
    assert not (tmp_path / "x.png").exists()
