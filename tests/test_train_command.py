"""`midimamba train` and `midimamba tune`: from a folder of MIDI to a model, in time, also after an interruption."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from midimamba import MidiProcessor, launching
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from midimamba.training.whole_checkpoints import checkpoints_in, choose_checkpoint
from support import command, make_score

SCRIPTS = Path(__file__).parents[1] / "training"
SMALL = ("--hidden_size", 16, "--num_hidden_layers", 1, "--state_size", 4)


def started(*arguments: object, cwd: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "midimamba.cli", *map(str, arguments)]
    return subprocess.Popen(
        line, cwd=cwd, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the training script in this process; its exit code and what it said."""

    def call(name: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--use_cpu", "--disable_tqdm", "true"])
        code = 0
        try:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capfd.readouterr().err

    return call


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The scripts that the commands would start, with their options."""
    found: list[tuple[str, list[str]]] = []

    def run(script: str, arguments: list[str], started: float) -> int:
        found.append((script, list(arguments)))
        return 0

    monkeypatch.setattr(launching, "run_script", run)
    return found


@pytest.mark.slow
def test_a_folder_of_music_becomes_a_model_in_time_and_a_second_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "midi").mkdir()
    for seed in range(12):
        make_score(seed, bars=3).dump_midi(tmp_path / "midi" / f"{seed}.mid")
    line = ("train", "midi", "--output_dir", "model", "--minutes", 1, *SMALL)
    process = started(*line, cwd=tmp_path)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "corpus: " in said
    assert "the run ends at" in said
    assert "listen: midimamba generate model --render --out model-samples" in said
    assert (tmp_path / "model-data" / "corpus.json").exists()
    history = json.loads((tmp_path / "model" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in row for row in history)  # how many depends on the machine
    process = started(*line, cwd=tmp_path)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0
    assert "model is already there" in said
    process = started("train", "midi", "--out", "other", "--data", "midi", "--minutes", 1, "--depth", 3, cwd=tmp_path)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2  # of the script, through accelerate
    assert said.splitlines()[-1].startswith("error: ")
    assert "--depth" in said


@pytest.mark.slow
def test_an_interrupted_run_tidies_up_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    line = ("train", corpus, "--out", "model", "--steps", 100_000, "--save_steps", 5, "--logging_steps", 5)
    endless = ("--eval_strategy", "no", "--load_best_model_at_end", "false", *SMALL)  # else it may end early by itself
    process = started(*line, *endless, cwd=tmp_path)
    model = tmp_path / "model"
    limit = time.monotonic() + 300
    while choose_checkpoint(model).checkpoint is None and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "interrupted" in said
    steps = int(checkpoints_in(model)[-1].name.split("-")[1])
    assert steps >= 5
    process = started(*line[:5], steps + 7, *line[6:], *endless, cwd=tmp_path)
    assert process.wait(300) == 0
    state = json.loads((model / "trainer_state.json").read_text())
    assert state["global_step"] == steps + 7
    assert state["log_history"][0]["step"] <= 5  # the history of the interrupted run is there


def test_a_planned_run_resumes_with_the_recipe_of_the_interrupted_one(
    corpus: Path, tmp_path: Path, script: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MIDIMAMBA_STARTED", raising=False)
    out = tmp_path / "model"
    line = ["--plan", "true", "--dataset_name", corpus, "--output_dir", out, *SMALL, "--max_steps", 6]
    code, said = script("pretrain", *line, "--save_steps", 2, "--eval_steps", 2)
    assert code == 0, said
    planned = json.loads((out / "training_args.json").read_text())
    assert planned["hidden_size"] == 16
    assert planned["transpose"] == 5
    assert planned["lookback_bars"] == [1, 2, 4, 8, 16]
    assert planned["load_best_model_at_end"]
    (out / "config.json").unlink()  # as if it had been killed before it was saved
    resume = ["--resume_from_checkpoint", "true", "--save_steps", 2, "--eval_steps", 2]
    line[-1] = 8
    code, said = script("pretrain", *line, *resume)
    assert code == 0, said
    assert "tokens per second" not in said  # nothing is measured again
    again = json.loads((out / "training_args.json").read_text())
    for name in ("learning_rate", "sequence_length", "per_device_train_batch_size", "weight_decay", "transpose"):
        assert again[name] == planned[name]


@pytest.mark.slow
def test_a_planned_run_can_do_without_look_back(
    corpus: Path, tmp_path: Path, script: Callable[..., tuple[int, str]]
) -> None:
    line = ("--plan", "true", "--data", corpus, "--output_dir", tmp_path / "model", *SMALL, "--max_steps", 2)
    code, said = script("pretrain", *line, "--lookback_bars", "none")
    assert code == 0, said
    assert "looks back" not in said
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "mamba"


@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_a_corpus_of_a_few_bars_is_trained_on_with_short_contexts(
    held_out: float, tmp_path: Path, script: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "midi").mkdir()
    for seed in range(2 if held_out == 0 else 4):
        make_score(seed, bars=2, programs=(), drums=True).dump_midi(tmp_path / "midi" / f"{seed}.mid")
    options = CorpusOptions(vocab_size=None, valid_fraction=held_out, test_fraction=0.0, num_workers=1)
    tokenize_corpus(str(tmp_path / "midi"), tmp_path / "data", options)
    out = tmp_path / "model"
    code, said = script(
        "pretrain", "--plan", "true", "--data", tmp_path / "data", "--output_dir", out, *SMALL, "--max_steps", 3
    )
    assert code == 0, said
    arguments = json.loads((out / "training_args.json").read_text())
    assert arguments["sequence_length"] <= 64
    assert arguments["transpose"] == 0  # nothing but drums
    assert load_file(out / "model.safetensors")
    assert ("no music is held out" in said) == (arguments["eval_strategy"] == "no")


def test_flags_have_their_names_in_trl_and_unknown_ones_are_passed_on(
    corpus: Path,
    pretrained: Path,
    launched: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    for line in (
        ("train", corpus, "--out", out, "--lookback_bars", 1, 2),
        ("train", "--lookback_bars", 1, 2, "--data", corpus, "--out", out),
        ("train", "--dataset_name", corpus, "--output_dir", out, "--lookback_bars", 1, 2),
    ):
        assert command(monkeypatch, *line) == 0
    scripts = {script for script, _ in launched}
    assert scripts == {"pretrain"}
    for _, arguments in launched:
        assert arguments[-3:] == ["--lookback_bars", "1", "2"]
        assert arguments[arguments.index("--data") + 1] == str(corpus)
        assert arguments[arguments.index("--minutes") + 1] == "10.0"
    launched.clear()
    for tuning in (
        ("tune", pretrained, "--data", corpus, "--out", out, "--recipe", "paper"),
        (
            "tune",
            "--model_name_or_path",
            pretrained,
            "--dataset_name",
            corpus,
            "--output_dir",
            out,
            "--recipe",
            "paper",
        ),
    ):
        assert command(monkeypatch, *tuning) == 0
    assert launched[0] == launched[1]
    script, arguments = launched[0]
    assert script == "adversarial"
    assert arguments[arguments.index("--config") + 1].endswith("paper-adversarial.yaml")


def test_tuning_distils_at_the_temperature_of_the_model(
    launched: list[tuple[str, list[str]]],
    corpus: Path,
    pretrained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    shutil.copytree(pretrained, tmp_path / "model")
    judges = [tmp_path / f"tuned-{kind}" for kind in ("discriminator", "musical-discriminator")]
    for judge in judges:
        judge.mkdir()  # as the script leaves them
    defaults = tmp_path / "model" / "generation_config.json"
    defaults.write_text(json.dumps(json.loads(defaults.read_text()) | {"temperature": 0.75}))
    assert command(monkeypatch, "tune", tmp_path / "model", "--data", corpus, "--out", tmp_path / "tuned") == 0
    arguments = launched[0][1]
    assert arguments[arguments.index("--config") + 1].endswith("distill-adversarial.yaml")
    assert arguments[arguments.index("--temperature") + 1] == "0.75"
    assert "--bars" not in arguments  # the recipe's own: REMI has them
    assert f"--discriminator {judges[0]} {judges[1]} --render" in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text("temperature: 0.9\n")
    line = (
        "tune",
        tmp_path / "model",
        "--data",
        corpus,
        "--out",
        tmp_path / "other",
        "--config",
        tmp_path / "own.yaml",
    )
    assert command(monkeypatch, *line) == 0
    assert not {"--temperature", "--sequence_length"} & set(launched[1][1])  # a recipe of the user's own decides


def test_a_command_without_music_or_with_an_impossible_time_is_refused(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for line, message in (
        (("train", "--out", tmp_path / "m"), "DATA is missing: name it first, or with --data"),
        (("train", corpus, "--out", tmp_path / "m", "--minutes", 0), "--minutes is 0.0, but must be greater than 0"),
        (("train", tmp_path / "none", "--out", tmp_path / "m"), "is not a folder"),
        (("train", corpus, "--out", tmp_path / "m", "--limit", 5), "is a corpus already"),
        (("train", corpus, "--out", tmp_path / "m", "--controls", "key"), "is a corpus already"),
        (("tune", "--data", corpus, "--out", tmp_path / "m"), "MODEL is missing"),
    ):
        assert command(monkeypatch, *line) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_music_is_tokenized_as_the_flags_say(
    launched: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "midi").mkdir()
    for seed in range(5):
        make_score(seed, bars=2).dump_midi(tmp_path / "midi" / f"{seed}.mid")
    line = ("train", tmp_path / "midi", "--out", tmp_path / "m", "--limit", 3, "--controls", "key", "tempo")
    assert command(monkeypatch, *line) == 0
    report = json.loads((tmp_path / "m-data" / "corpus.json").read_text())
    assert sum(split["pieces"] for split in report["splits"].values()) == 3
    assert {"key", "tempo"} == set(MidiProcessor.from_pretrained(tmp_path / "m-data" / "tokenizer").controls)
    assert len(launched) == 1


def test_a_run_without_time_to_train_makes_no_model(
    corpus: Path, tmp_path: Path, script: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIDIMAMBA_STARTED", str(time.time() - 90))
    line = ["--plan", "true", "--data", corpus, "--output_dir", tmp_path / "model", *SMALL]
    code, said = script("pretrain", *line, "--minutes", 1)
    assert (code, said.splitlines()[-1][:35]) == (2, "error: no time is left to train: re")
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("was", "tuned", "message"),
    [
        ({"data": "jazz"}, None, "trained on jazz"),
        ({"data": "blues", "model": None}, "model", "trained, not tuned"),
        ({"data": "blues", "model": "model", "estimator": "distill"}, None, "tuned"),
        ({"data": "blues", "model": "model", "estimator": "distill"}, "runs/other", "tuned from model"),
        ({"data": "blues", "model": None}, None, None),
        ({"data": "blues", "model": "model", "estimator": "distill"}, "runs/model", None),
    ],
)
def test_another_run_in_the_folder_is_not_taken_for_this_one(
    tmp_path: Path, was: dict[str, Any], tuned: str | None, message: str | None
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.json").write_text(json.dumps(was))
    if message is None:
        assert launching._is_finished(tmp_path, "music/blues", tuned)
        return
    with pytest.raises(InputError, match=f"is a generator that was {message}: choose another --out"):
        launching._is_finished(tmp_path, "music/blues", tuned)
