"""`midimamba train` and `midimamba tune`: the packaged training scripts, started through accelerate."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from midimamba.command_options import TrainOptions, TuneOptions
from midimamba.corpus.options import INFILL_SHARE, CorpusOptions
from midimamba.errors import InputError, check_hub, reaching_hub
from midimamba.files import check_can_be_made, read_json
from midimamba.text import show
from midimamba.training.adversarial import discriminator_folder, musical_folder
from midimamba.training.advice import listening
from midimamba.training.process import on_signals

_FORWARDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
RESUME = ("--resume_from_checkpoint", "true")  # if there is nothing to resume, a run starts from the beginning
_LONGEST_TUNED = 256
"""Tokens of a sequence in tuning: sampling and roll-outs cost more than training on blocks."""


def train(options: TrainOptions) -> None:
    """Tokenize if need be, then train a generator by the rule of [`~midimamba.training.plan`]."""
    started = time.time()
    if _is_finished(options.out, options.data):
        return
    check_can_be_made(options.out)
    made = CorpusOptions(infill=options.infill, controls=options.controls, limit=options.limit)
    data = _corpus_of(options.data, options.out, made)
    arguments = ["--plan", "true", "--data", data, "--output_dir", str(options.out)]
    share = INFILL_SHARE if options.infill else None
    named = (("minutes", options.time), ("max_steps", options.steps), ("size", options.size), ("infill_share", share))
    for name, value in named:
        arguments += [] if value is None else [f"--{name}", str(value)]
    leave_with(run_script("pretrain", [*arguments, *RESUME, *options.passed], started))


def tune(options: TuneOptions) -> None:
    """Tokenize if need be, then tune a generator adversarially by a packaged recipe."""
    started = time.time()
    if _is_finished(options.out, options.data, options.model):
        return
    check_can_be_made(options.out)
    data = _corpus_of(options.data, options.out, CorpusOptions(tokenizer=options.model))
    recipe = files("midimamba.training.recipes") / f"{options.recipe}-adversarial.yaml"
    with as_file(recipe) as path:
        arguments = ["--model", options.model, "--data", data, "--output_dir", str(options.out)]
        if not any(word.partition("=")[0] == "--config" for word in options.passed):
            arguments += ["--config", str(path)]
            if options.recipe == "distill":
                arguments += distilling(options.model)
            else:
                arguments += ["--sequence_length", str(_length_of(options.model))]
        code = run_script("adversarial", [*arguments, *RESUME, *options.passed], started)
    if code == 0:
        show(f"listen: {listening(options.out, discriminators_of(options.out))}", file=sys.stderr)
    leave_with(code)


def _is_finished(out: Path, data: str, tuned: str | None = None) -> bool:
    """Whether the run was made before. Then the user is told.

    Args:
        out (`Path`): of the generator.
        data (`str`): what it learns from.
        tuned (`str`, *optional*): the generator that it is made of, if it is tuned.

    Raises:
        InputError: if another run was.
    """
    if not (out / "config.json").is_file():
        return False
    if (out / "training_args.json").is_file():
        arguments = read_json(out / "training_args.json")
        trained_on, origin = (Path(str(arguments.get(name))).name for name in ("data", "model"))
        made = f"{out} is a generator that was"
        if trained_on not in (Path(data).name, _own_corpus(out).name):
            raise InputError(f"{made} trained on {trained_on}: choose another --out")
        if (was_tuned := "estimator" in arguments) != (tuned is not None):
            raise InputError(f"{made} {'tuned' if was_tuned else 'trained, not tuned'}: choose another --out")
        if tuned is not None and origin != Path(tuned).name:
            raise InputError(f"{made} tuned from {origin}: choose another --out")
    show(f"{out} is already there; for another run, choose another --out or delete it", file=sys.stderr)
    show(f"listen: {listening(out, discriminators_of(out))}", file=sys.stderr)
    return True


def discriminators_of(generator: Path) -> list[Path]:
    """The discriminators that tuning has left beside a generator."""
    return [folder for folder in (discriminator_folder(generator), musical_folder(generator)) if folder.exists()]


def _own_corpus(out: Path) -> Path:
    """Where music is tokenized to that is no corpus yet."""
    return out.with_name(f"{out.name}-data")


def _corpus_of(data: str, out: Path, options: CorpusOptions) -> str:
    """The corpus that `data` is, or that is made of it and kept.

    Args:
        data (`str`): a corpus, or anything that `midimamba tokenize` takes.
        out (`Path`): of the generator. The corpus is made beside it.
        options (`CorpusOptions`): how it is made.

    Raises:
        InputError: if `options` choose from music, but `data` is a corpus.
    """
    if _is_corpus(data):
        if options.controls or options.limit is not None:
            raise InputError(f"{data} is a corpus already: give --controls and --limit to `midimamba tokenize`")
        return data
    from midimamba.command_options import TokenizeFiles
    from midimamba.commands import tokenize

    tokenize(TokenizeFiles(data, str(_own_corpus(out))), options)
    return str(_own_corpus(out))


def _is_corpus(data: str) -> bool:
    """Whether it is tokenized. For a name that is no file here, the Hub is asked."""
    from midimamba.corpus.addresses import Folder, is_address
    from midimamba.corpus.data_sets import is_data_set

    if is_address(data):
        return Folder(data).has("corpus.json")
    if Path(data).exists() or not is_data_set(data):
        return (Path(data) / "corpus.json").is_file()
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(data, "corpus.json", repo_type="dataset"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    check_hub(data, "dataset")
    with reaching_hub(f"no corpus can be loaded from {data!r}"):
        return HfApi().file_exists(data, "corpus.json", repo_type="dataset")


def _length_of(model: str) -> int:
    """Tokens of a sequence for tuning a model: as many as it was trained on, up to a limit."""
    arguments = Path(model) / "training_args.json"
    length = read_json(arguments).get("sequence_length") if arguments.is_file() else None
    return min(length, _LONGEST_TUNED) if isinstance(length, int) else _LONGEST_TUNED // 2


def distilling(model: str) -> list[str]:
    """What the recipe `distill` has to know of a model: the temperature at which it is sampled, and whether its
    tokenization has bars."""
    from midimamba.loading import load_processor
    from midimamba.tokenization.tokenizer import time_ids

    config = Path(model) / "generation_config.json"
    temperature = read_json(config).get("temperature") if config.is_file() else None
    arguments = ["--temperature", str(temperature if isinstance(temperature, int | float) else 1.0)]
    has_bars = bool(time_ids(load_processor(model).midi_tokenizer)[0])
    return arguments + ([] if has_bars else ["--bars", "none", "--d_lookback_bars", "none"])


def run_script(script: str, arguments: Sequence[str], started: float) -> int:
    """Run a packaged script through accelerate, in a process of its own; its exit code."""
    command, environment = _launch_of(script, arguments)
    from midimamba.training.deadline import STARTED

    environment |= {STARTED: str(started), "PYTHONSAFEPATH": "1"}  # files of the current folder are no modules
    # A group of its own: else the terminal's Ctrl-C would reach the script twice, and not let it tidy up.
    group = 0 if os.name == "posix" else None
    with (
        subprocess.Popen(command, env=environment, process_group=group) as process,
        on_signals(_FORWARDED, lambda number, _: process.send_signal(number)),
    ):
        return process.wait()


def _launch_of(script: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What `accelerate launch -m midimamba.training.SCRIPT` starts on this machine, and in which environment.

    The launcher itself would turn every exit code but 0 into a traceback.
    """
    import torch
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import prepare_simple_launcher_cmd_env

    on_gpu = torch.cuda.is_available()
    precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
    flags = ["--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", precision]
    if not on_gpu:
        flags += ["--cpu", "--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", str(_processors()))]
    parsed = launch_command_parser().parse_args([*flags, "-m", f"midimamba.training.{script}", *arguments])
    command: list[str]
    environment: dict[str, str]
    command, environment = prepare_simple_launcher_cmd_env(parsed)
    return command, environment


def _processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_with(code: int) -> None:
    """End with the exit code of a script; a negative one names the signal that killed it."""
    if code:
        sys.exit(128 - code if code < 0 else code)
