"""The scripts as a user runs them: the main job end to end, and one clear line for bad input."""

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from midimamba import MidiProcessor
from midimamba.cli import main
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.packing import BlockCollator
from midimamba.launching import distilling
from midimamba.tokenization.sampling_limits import SAMPLING_DEFAULTS
from support import make_discriminator, make_generator, make_score

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
LENGTH = 32


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a script of `training/`, or the command `midimamba`, in this process; its exit code and standard error."""

    def call(script: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            if script == "midimamba":
                main()
            else:
                runpy.run_path(str(ROOT / "training" / script), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capfd.readouterr().err

    return call


def tiny(recipe: str, **options: object) -> list[object]:
    """Arguments that make a recipe a matter of seconds."""
    common = {"sequence_length": LENGTH, "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    arguments: list[object] = ["--config", RECIPES / recipe]
    for name, value in (common | {"eval_steps": 1, "save_steps": 1, "logging_steps": 1} | options).items():
        arguments += [f"--{name}", value]
    return arguments


def adversarial(model: Path, data: Path, out: Path, **options: object) -> list[object]:
    small = {"num_rollouts": 2, "rollout_positions": 3, "d_warmup_steps": 1, "num_eval_samples": 4}
    return tiny("paper-adversarial.yaml", model=model, data=data, output_dir=out, **small, **options)


def test_pretraining_writes_a_whole_generator_without_pickles(corpus: Path, run: Run, tmp_path: Path) -> None:
    options = {"data": corpus, "output_dir": tmp_path / "model", "hidden_size": 16, "num_hidden_layers": 1}
    code, errors = run("pretrain.py", *tiny("chorales-cpu.yaml", **options))
    assert code == 0, errors
    written = {file.name for file in (tmp_path / "model").iterdir() if file.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "miditok.json", "training_args.json"} <= written
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in written)
    arguments = json.loads((tmp_path / "model" / "training_args.json").read_text())
    assert arguments["hidden_size"] == 16
    assert json.loads((tmp_path / "model" / "config.json").read_text())["use_cache"]
    for folder in (tmp_path / "model", tmp_path / "model" / "checkpoint-2"):
        defaults = json.loads((folder / "generation_config.json").read_text())
        assert {name: defaults[name] for name in SAMPLING_DEFAULTS} == SAMPLING_DEFAULTS
    assert not any(str(tmp_path) in str(value) for value in arguments.values())


def test_pretraining_separates_pieces_unless_the_state_is_carried(
    corpus: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = []
    separate = BlockCollator.separate

    def watched(collator: BlockCollator, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = separate(collator, input_ids)
        carried.append("seq_idx" not in batch)
        return batch

    monkeypatch.setattr(BlockCollator, "separate", watched)
    for carry in ("false", "true"):
        options = {"data": corpus, "output_dir": tmp_path / carry, "hidden_size": 16, "num_hidden_layers": 1}
        code, errors = run("pretrain.py", *tiny("chorales-cpu.yaml", **options, carry_state=carry))
        assert code == 0, errors
        assert set(carried) == {carry == "true"}
        carried.clear()


def test_resuming_finishes_an_interrupted_run(corpus: Path, run: Run, tmp_path: Path) -> None:
    options = {"data": corpus, "hidden_size": 16, "num_hidden_layers": 1, "lr_scheduler_type": "constant"}
    finished = []
    for name, stops in (("straight", [3]), ("interrupted", [1, 3])):
        for stop in stops:
            steps = {"output_dir": tmp_path / name, "max_steps": stop, "resume_from_checkpoint": "true"}
            if len(stops) > 1:  # a killed run leaves checkpoints, but no finished model
                (tmp_path / name / "config.json").unlink(missing_ok=True)
            code, errors = run("pretrain.py", *tiny("chorales-cpu.yaml", **options, **steps))
            assert code == 0, errors
        finished.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(finished[0][key], finished[1][key]) for key in finished[0])


def test_a_checkpoint_of_other_networks_is_refused(corpus: Path, pretrained: Path, run: Run, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "true"}
    options = {"data": corpus, "output_dir": tmp_path / "model", "num_hidden_layers": 1, **saves}
    assert run("pretrain.py", *tiny("chorales-cpu.yaml", hidden_size=16, **options))[0] == 0
    (tmp_path / "model" / "config.json").unlink()  # as if it had been killed
    code, errors = run("pretrain.py", *tiny("chorales-cpu.yaml", hidden_size=24, **options))
    assert code == 2
    assert "model.safetensors is of another network: backbone.embeddings.weight has shape [720, 16]" in errors

    tuned = tmp_path / "tuned"
    assert run("adversarial.py", *adversarial(pretrained, corpus, tuned, **saves))[0] == 0
    (tuned / "config.json").unlink()
    code, errors = run("adversarial.py", *adversarial(pretrained, corpus, tuned, **saves, discriminator="mamba"))
    assert code == 2
    assert "discriminator.safetensors is of another network" in errors
    assert "here is no such tensor" in errors


def test_adversarial_tuning_writes_both_networks(corpus: Path, pretrained: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    code, errors = run("adversarial.py", *adversarial(pretrained, corpus, out))
    assert code == 0, errors
    assert (out / "config.json").exists()
    assert (tmp_path / "tuned-discriminator" / "model.safetensors").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, out))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert {"eval_loss", "eval_d_accuracy", "eval_distinct_4", "d_loss", "reward"} <= {
        k for row in history for k in row
    }
    code, errors = run(
        "midimamba", "generate", out, "--num", 2, "--bars", 2, "--out", tmp_path / "samples", "--render"
    )
    assert code == 0, errors
    assert len(list((tmp_path / "samples").iterdir())) == 6


def test_a_discriminator_may_begin_as_the_generator(corpus: Path, pretrained: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    options = {"discriminator": "generator", "estimator": "dense", "r1_weight": 0.0, "d_learning_rate": 0.0}
    code, errors = run("adversarial.py", *adversarial(pretrained, corpus, out, **options))
    assert code == 0, errors
    generator = load_file(pretrained / "model.safetensors")
    discriminator = load_file(tmp_path / "tuned-discriminator" / "model.safetensors")
    assert {key for key in discriminator if key.startswith("encoder.")} == {
        key.replace("backbone.", "encoder.") for key in generator if key.startswith("backbone.")
    }
    for key, tensor in discriminator.items():
        if key.startswith("encoder."):
            assert torch.equal(tensor, generator[key.replace("encoder.", "backbone.")]), key


@pytest.mark.slow
def test_filters_that_do_not_fit_are_left_out_with_a_warning(
    corpus: Path, pretrained: Path, run: Run, tmp_path: Path
) -> None:
    options = {"data": corpus, "model": pretrained, "output_dir": tmp_path / "tuned", "sequence_length": 12}
    code, errors = run("adversarial.py", *tiny("paper-adversarial.yaml", **options))
    assert code == 0, errors
    assert "warning: filters of width 15, 20 do not fit 12 tokens and are left out" in errors
    config = json.loads((tmp_path / "tuned-discriminator" / "config.json").read_text())
    assert config["filter_sizes"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert len(config["num_filters"]) == 10


@pytest.mark.slow
def test_two_processes_train_together(corpus: Path, pretrained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(ROOT / "training" / "adversarial.py")]
    options = adversarial(pretrained, corpus, tmp_path / "tuned", micro_batch_size=2)
    with socket.socket() as probe:  # a port that no other worker uses
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else it asks the network for this machine's name
    command += map(str, options)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    except subprocess.TimeoutExpired as slow:
        pytest.fail(f"no end in sight: {(slow.stderr or b'')[-3000:]!r}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "tuned" / "config.json").exists()
    assert (tmp_path / "tuned-discriminator" / "config.json").exists()
    checkpoint = tmp_path / "tuned" / "checkpoint-2"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in checkpoint.iterdir()}


def test_a_process_that_the_launcher_lost_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # what `accelerate launch --num_processes 2 --cpu` leaves
    assert "starts a single process on a CPU" in run("pretrain.py", *tiny("chorales-cpu.yaml", data="nowhere"))[1]
    monkeypatch.delenv("MASTER_ADDR")
    assert "single process" not in run("pretrain.py", *tiny("chorales-cpu.yaml", data="nowhere"))[1]


BAD_INPUT: dict[str, tuple[str, dict[str, object], str]] = {
    "missing corpus": ("pretrain.py", {"data": "nowhere"}, "nowhere is not a tokenized corpus: make one with"),
    "unknown flag": ("pretrain.py", {"depth": 3}, "--depth"),
    "wrong type": ("pretrain.py", {"hidden_size": "big"}, "invalid int value: 'big'"),
    "blocks too long": ("pretrain.py", {"sequence_length": 999_999}, "fewer than one block of 999999"),
    "no such model": ("adversarial.py", {"model": "nowhere"}, "no generator can be loaded from 'nowhere'"),
    "sequences too long": ("adversarial.py", {"sequence_length": 999_999}, "fewer than one block of 999999"),
    "estimator without values": ("adversarial.py", {"estimator": "dense"}, "needs a discriminator of kind 'mamba'"),
    "no roll-outs": ("adversarial.py", {"num_rollouts": 0}, "num_rollouts is 0, but must be at least 1"),
    "uneven filters": ("adversarial.py", {"d_num_filters": 3}, "12 filter_sizes need as many num_filters, not 1"),
    "unknown discriminator": (
        "adversarial.py",
        {"discriminator": "forest"},
        "'forest' is neither cnn nor mamba nor generator",
    ),
    "spectral norm of a generator": (
        "adversarial.py",
        {"discriminator": "generator", "d_spectral_norm": "true"},
        "d_spectral_norm is True, but a discriminator from 'generator' is not a new one",
    ),
    "distillation of probabilities": (
        "adversarial.py",
        {"estimator": "distill", "reward": "discriminator"},
        "set reward to log-odds, or to a control",
    ),
    "shuffled values of prefixes": (
        "adversarial.py",
        {"estimator": "monte-carlo", "reward": "shuffled"},
        "set estimator to terminal or distill",
    ),
    "musical judge of blocks": (
        "adversarial.py",
        {"musical_discriminator": "true", "estimator": "distill", "reward": "log-odds"},
        "set openings to true, reward to log-odds or shuffled, and estimator to terminal or distill",
    ),
    "musical judge of prefixes": (
        "adversarial.py",
        {"musical_discriminator": "true", "openings": "true", "reward": "log-odds"},
        "set openings to true, reward to log-odds or shuffled, and estimator to terminal or distill",
    ),
    "steps with old samples": (
        "adversarial.py",
        {"mini_batch_size": 2},
        "which needs ppo_clip or estimator 'distill'",
    ),
    "no bars": ("adversarial.py", {"bars": 0}, "bars is 0, but must be at least 1"),
    "a temperature of nothing": ("adversarial.py", {"temperature": 0}, "temperature is 0.0, but must be greater than"),
    "bars to look back by": ("adversarial.py", {"d_lookback_bars": 0}, "lookback_bars"),
    "resume from nothing": ("adversarial.py", {"resume_from_checkpoint": "nowhere"}, "nowhere is no checkpoint"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(case: str, corpus: Path, pretrained: Path, run: Run, tmp_path: Path) -> None:
    script, options, message = BAD_INPUT[case]
    out = tmp_path / "out"
    usual: dict[str, object] = {"data": corpus, "output_dir": out}
    if script == "pretrain.py":
        arguments = tiny("chorales-cpu.yaml", **usual | options)
    else:
        arguments = tiny("paper-adversarial.yaml", **usual | {"model": pretrained} | options)
    code, errors = run(script, *arguments)
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in errors
    assert not out.exists()


@pytest.fixture(scope="module")
def without_bars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus and a generator of a tokenization that knows no bars."""
    folder = tmp_path_factory.mktemp("tsd")
    (folder / "midi").mkdir()
    for seed in range(9):
        make_score(seed).dump_midi(folder / "midi" / f"{seed}.mid")
    options = CorpusOptions(tokenization="TSD", vocab_size=None, num_workers=1)
    tokenize_corpus(str(folder / "midi"), folder / "data", options)
    processor = MidiProcessor.from_pretrained(folder / "data" / "tokenizer")
    make_generator(vocab_size=processor.vocab_size).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "data", folder / "model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bars": 4}, "bars is 4, but the tokenization has no bars; leave it unset"),
        ({"d_lookback_bars": 1}, "d_lookback_bars needs a tokenization with bars, such as REMI; TSD has none"),
    ],
)
def test_bars_that_a_tokenization_lacks_are_refused(
    without_bars: tuple[Path, Path], run: Run, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    data, model = without_bars
    arguments = tiny("paper-adversarial.yaml", data=data, model=model, output_dir=tmp_path / "out", **options)
    code, errors = run("adversarial.py", *arguments)
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_distillation_does_without_bars(without_bars: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    data, model = without_bars
    out = tmp_path / "tuned"
    sizes = {"per_device_train_batch_size": 96, "mini_batch_size": 8, "max_steps": 1, "num_eval_samples": 4}
    arguments = tiny("distill-adversarial.yaml", data=data, model=model, output_dir=out, sequence_length=64, **sizes)
    code, errors = run("adversarial.py", *arguments[:2], *distilling(str(model)), *arguments[2:])
    assert code == 0, errors
    for kind in ("", "-discriminator", "-musical-discriminator"):
        assert (tmp_path / f"tuned{kind}" / "model.safetensors").exists()


@pytest.mark.parametrize("resume", [(), ("--resume_from_checkpoint", "true")])  # the commands always resume
@pytest.mark.parametrize("kind", ["discriminator", "musical-discriminator"])
def test_the_discriminators_of_another_run_are_not_overwritten(
    corpus: Path, pretrained: Path, run: Run, tmp_path: Path, kind: str, resume: tuple[str, ...]
) -> None:
    other = tmp_path / f"tuned-{kind}"
    other.mkdir()
    (other / "config.json").write_text("{}")
    code, errors = run("adversarial.py", *adversarial(pretrained, corpus, tmp_path / "tuned"), *resume)
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"tuned-{kind} holds the discriminator of another run" in line
    assert (other / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_the_files_of_others_are_not_replaced(corpus: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "train.log").touch()  # as a shell may make it
    (out / "errors.py").write_text("precious")
    arguments = tiny("chorales-cpu.yaml", data=corpus, output_dir=out, resume_from_checkpoint=True)
    code, errors = run("pretrain.py", *arguments)
    assert code == 2
    assert errors.splitlines()[-1] == (
        f"error: {out / 'errors.py'} is of no run that was begun here; choose another --output_dir or delete it"
    )
    assert sorted(path.name for path in out.iterdir()) == ["errors.py", "train.log"]
    code, errors = run("pretrain.py", *tiny("chorales-cpu.yaml", data=corpus, output_dir=corpus))
    assert code == 2
    assert "corpus.json is of no run that was begun here" in errors.splitlines()[-1]


def test_an_unknown_recipe_key_is_named(corpus: Path, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {corpus}\noutput_dir: {tmp_path / 'out'}\nlearning_rat: 0.1\n")
    code, errors = run("pretrain.py", "--config", recipe)
    assert code == 2
    assert "learning_rat" in errors.splitlines()[-1]
    recipe.write_text("data: [\n")
    assert run("pretrain.py", "--config", recipe)[0] == 2
    assert run("pretrain.py", "--config", tmp_path / "none.yaml")[0] == 2
    assert run("pretrain.py", "--config")[0] == 2


@pytest.mark.parametrize(
    ("script", "text", "message"),
    [
        ("pretrain.py", "seed: null", "seed is empty in the recipe: give a value, or leave it out"),
        ("pretrain.py", "max_steps:", "max_steps is empty in the recipe"),
        ("pretrain.py", "transpose: [1, 2]", "transpose is [1, 2] in the recipe: give one value"),
        ("pretrain.py", "learning_rate: {a: 1}", "learning_rate is {'a': 1} in the recipe"),
        ("pretrain.py", "lookback_bars: much", "invalid literal for int() with base 10: 'much'"),
        ("pretrain.py", "temperatures: -0.7", "temperature is -0.7"),  # one value is a list of one
        ("pretrain.py", "temperatures: '-0.7'", "temperature is -0.7"),
        ("adversarial.py", "bar_s: 3", "the recipe has bar_s, which is no option"),
    ],
)
def test_a_value_that_no_option_can_have_is_refused(
    run: Run, tmp_path: Path, script: str, text: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: nowhere\nmodel: nothing\noutput_dir: {tmp_path / 'out'}\n{text}\n")
    code, errors = run(script, f"--config={recipe}")
    assert code == 2
    assert errors.splitlines()[-1].startswith(f"error: {message}")


def test_a_corpus_of_several_ids_a_step_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "midi").mkdir()
    for seed in range(3):
        make_score(seed).dump_midi(tmp_path / "midi" / f"{seed}.mid")
    tokenize_corpus(str(tmp_path / "midi"), tmp_path / "data", CorpusOptions(tokenization="Octuple", num_workers=1))
    out = tmp_path / "out"
    for script, arguments in (
        ("pretrain.py", tiny("chorales-cpu.yaml", data=tmp_path / "data", output_dir=out)),
        ("adversarial.py", adversarial(tmp_path / "model", tmp_path / "data", out)),
    ):
        code, errors = run(script, *arguments)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 2, (script, errors)
        assert len(lines) == 1, errors
        assert "Octuple, which writes several ids a step" in lines[0]
        assert "tokenize it again with REMI" in lines[0]
        assert not out.exists()


def test_a_vocabulary_mismatch_is_refused(corpus: Path, run: Run, tmp_path: Path) -> None:
    make_generator(vocab_size=33).save_pretrained(tmp_path / "other")
    code, errors = run("adversarial.py", *adversarial(tmp_path / "other", corpus, tmp_path / "out"))
    assert code == 2
    assert "knows 33 tokens, the corpus has 720" in errors
    make_discriminator(vocab_size=44).save_pretrained(tmp_path / "judge")
    make_generator(vocab_size=720).save_pretrained(tmp_path / "model")
    options = adversarial(tmp_path / "model", corpus, tmp_path / "out", discriminator=tmp_path / "judge")
    code, errors = run("adversarial.py", *options)
    assert code == 2
    assert "the discriminator knows 44 tokens, the generator 720" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("discriminator", ["generator", "judge"])
def test_bars_to_look_back_by_are_refused_where_they_would_be_ignored(
    discriminator: str, corpus: Path, pretrained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe gives them; what the message says to do helps."""
    monkeypatch.chdir(tmp_path)
    make_discriminator(vocab_size=44).save_pretrained("judge")
    options = tiny("distill-adversarial.yaml", model=pretrained, data=corpus, output_dir="out", d_dropout=0.0)
    options += ["--discriminator", discriminator, "--draws_per_sample", 1]  # a batch of 4 is a single mini-batch
    code, errors = run("adversarial.py", *options)
    assert code == 2
    assert errors.splitlines()[-1] == (
        f"error: d_lookback_bars is [1, 2, 4, 8, 16], but a discriminator from '{discriminator}' is not a new one: "
        "set d_lookback_bars to none, or discriminator to cnn or mamba"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["judge"]
    if discriminator == "judge":
        code, errors = run("adversarial.py", *options, "--d_lookback_bars", "none")
        assert (code, "the discriminator knows 44 tokens, the generator 720" in errors) == (2, True)


def test_an_earlier_run_is_never_overwritten(corpus: Path, pretrained: Path, run: Run, tmp_path: Path) -> None:
    before = (pretrained / "model.safetensors").read_bytes()
    code, errors = run("pretrain.py", *tiny("chorales-cpu.yaml", data=corpus, output_dir=pretrained))
    assert code == 2
    assert "holds a finished run" in errors
    assert (pretrained / "model.safetensors").read_bytes() == before
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    code, errors = run("pretrain.py", *tiny("chorales-cpu.yaml", data=corpus, output_dir=tmp_path / "run"))
    assert code == 2
    assert "add --resume_from_checkpoint true" in errors


def test_the_command_refuses_with_one_line(pretrained: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.mid").write_bytes(b"MThd nonsense")
    out = tmp_path / "out"
    cases = [
        (["tokenize", tmp_path / "nowhere"], "is not a folder"),
        (["tokenize", tmp_path / "empty"], "holds no MIDI files"),
        (["tokenize", tmp_path], "no file of"),
        (["generate", tmp_path / "nowhere"], "nowhere"),
        (["generate", pretrained, "--prompt", tmp_path / "bad.mid"], "bad.mid cannot be continued: not a well-"),
        (["publish", tmp_path / "empty", "--repo", "you/bach"], str(tmp_path / "empty")),
    ]
    for arguments, message in cases:
        extra = [] if arguments[0] == "publish" else ["--out", out]
        code, errors = run("midimamba", *arguments, *extra)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 2, (arguments, errors)
        assert len(lines) == 1, errors
        assert message in lines[0], errors
        assert not out.exists()


def test_generating_never_overwrites(pretrained: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.mid").write_text("mine")
    code, errors = run("midimamba", "generate", pretrained, "--out", tmp_path)
    assert code == 2
    assert "already exists" in errors
    assert (tmp_path / "mine.mid").read_text() == "mine"
