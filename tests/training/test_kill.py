"""A run that is killed at any moment, and resumed, is the run that was never killed: the same bytes, and no litter.

To kill each script at N moments: `python tests/training/test_kill.py N`.
"""

import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from midimamba import MidiProcessor
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from support import make_generator, make_score, teach

Moment = tuple[str, int, bool]
"""A function, its how-manieth call, and whether the process is killed before it or in its middle, or after it."""

SAME_BYTES = {".safetensors", ".pt", ".pth", ".mid"}
COMMON: dict[str, object] = {
    **{"sequence_length": 32, "max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True},
    **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
    **{"disable_tqdm": True, "resume_from_checkpoint": "true"},
}
OPTIONS: dict[str, dict[str, object]] = {
    "pretrain": {"hidden_size": 16, "num_hidden_layers": 1},
    "adversarial": {
        **{"num_rollouts": 2, "rollout_positions": 3, "d_warmup_steps": 1, "num_eval_samples": 4},
        **{"max_nll_drift": 100, "max_self_bleu_increase": 100},
    },
    # The same script with everything that distillation and judges of musical features add.
    "distillation": {
        **{"estimator": "distill", "reward": "log-odds", "openings": True, "musical_discriminator": True},
        **{"sequence_length": 48, "transpose": 3, "bars": 2, "temperature": 0.9, "d_lookback_bars": 1},
        **{"per_device_train_batch_size": 12, "mini_batch_size": 4, "d_steps": 1, "d_warmup_steps": 1},
        **{"d_filter_sizes": 2, "d_num_filters": 8, "d_hidden_size": 16, "d_epochs": 2},
        **{"num_eval_samples": 4, "max_nll_drift": 100, "max_self_bleu_increase": 100},
    },
}


class NotReachedError(Exception):
    """The run ended before its moment: how often it flushes and deletes depends a little on the machine."""


def functions() -> dict[str, tuple[Any, str]]:
    """What a run is killed in: computing, writing each kind of file, flushing, renaming, deleting."""
    import torch
    from transformers import PreTrainedModel, Trainer

    from midimamba.training import whole_checkpoints
    from midimamba.training.adversarial_trainer import AdversarialTrainer

    return {
        "step": (Trainer, "training_step"),
        "round": (AdversarialTrainer, "training_step"),
        "model": (PreTrainedModel, "save_pretrained"),
        "pickle": (torch, "save"),
        "random numbers": (Trainer, "_save_rng_state"),
        "seal": (whole_checkpoints, "close_seal"),
        "rotation": (whole_checkpoints, "rotate"),
        "flush": (os, "fsync"),
        "rename": (os, "rename"),
        "replace": (os, "replace"),
        "unlink": (os, "unlink"),
    }


def run(script: str, arguments: list[str], moment: Moment | None, counts: Path | None) -> None:
    """Run a script in this process, which kills itself at a moment; or count the calls."""
    import torch

    torch.set_num_threads(1)
    calls: Counter[str] = Counter()
    for name, (owner, attribute) in functions().items():
        setattr(owner, attribute, watched(name, getattr(owner, attribute), calls, moment))
    sys.argv = [f"{script}.py", *arguments]
    from midimamba.training import adversarial, monitoring, pretrain
    from midimamba.training.process import training_process

    vars(monitoring)["draw_piano_roll"] = lambda *_: None  # drawing takes most of the time
    with training_process():
        (pretrain if script == "pretrain" else adversarial).main()
    if counts is not None:
        counts.write_text("\n".join(f"{name}:{count}" for name, count in calls.items()))


def watched(name: str, function: Any, calls: Counter[str], moment: Moment | None) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        is_fatal = moment is not None and moment[:2] == (name, calls[name])
        if is_fatal and moment is not None and not moment[2]:
            if name == "pickle":  # in the middle of a file
                Path(args[1]).write_bytes(b"PK half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if is_fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def start(target: Callable[..., None], *arguments: object) -> ForkServerProcess:
    # The server imports torch and transformers once; every run is forked from it, before anything has been computed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["midimamba.training.adversarial_trainer", "midimamba.training.resume"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def arguments_of(script: str, data: Path, model: Path, out: Path) -> list[str]:
    options = COMMON | OPTIONS[script] | {"data": data, "output_dir": out}
    if script != "pretrain":
        options["model"] = model
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def contents(folder: Path) -> dict[str, bytes]:
    """All files, and the bytes of those in which nothing depends on the time or on their folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.suffix in SAME_BYTES else b""
        for path in folder.rglob("*")
    }


def finish(script: str, data: Path, model: Path, folder: Path, moment: Moment | None = None) -> dict[str, bytes]:
    """What a run leaves that is killed at a moment and then resumed."""
    folder.mkdir()
    arguments = arguments_of(script, data, model, folder / "run")
    if moment is not None:
        killed = start(run, script, arguments, moment, None)
        killed.join(120)
        if killed.exitcode == 0:
            raise NotReachedError(str(moment))
        assert killed.exitcode == -signal.SIGKILL, moment
    last = start(run, script, arguments, None, folder.with_suffix(".counts"))
    last.join(120)
    assert last.exitcode == 0, moment
    return contents(folder)


def spread(counts: Path, number: int) -> list[Moment]:
    """Moments of all kinds, spread over the calls that a run makes."""
    lines = dict(line.split(":") for line in counts.read_text().splitlines())
    moments = []
    for turn in range(number):
        name = list(lines)[turn % len(lines)]
        nth = turn // len(lines) + 1
        rounds = -(-number // len(lines)) + 1
        moments.append((name, max(1, int(lines[name]) * nth // rounds), turn % 2 == 1))
    return moments


# For each script the moments in which most could go wrong; those of one differ from those of the other.
MOMENTS: dict[str, list[Moment]] = {
    "pretrain": [("model", 1, True), ("pickle", 4, False), ("rename", 1, True), ("seal", 3, False)],
    "adversarial": [("round", 2, False), ("random numbers", 1, True), ("seal", 2, True), ("model", 4, True)],
    "distillation": [("round", 3, False)],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", OPTIONS)
def test_killed_runs_end_bitwise_as_the_others_and_leave_no_litter(
    script: str, corpus: Path, pretrained: Path, tmp_path: Path
) -> None:
    model = teach(pretrained, corpus, tmp_path / "taught") if script == "distillation" else pretrained
    straight = finish(script, corpus, model, tmp_path / "straight")
    expected = {"run/model.safetensors", "run/checkpoint-2", "run/checkpoint-3/checkpoint.json"}
    if script == "distillation":
        expected |= {f"run-{kind}/model.safetensors" for kind in ("discriminator", "musical-discriminator")}
        expected |= {"run/checkpoint-3/musical_discriminator/model.safetensors"}
    assert expected <= straight.keys()
    for number, moment in enumerate(MOMENTS[script]):
        assert finish(script, corpus, model, tmp_path / str(number), moment) == straight, moment


def measure(number: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "midi").mkdir()
        for seed in range(12):
            make_score(seed).dump_midi(folder / "midi" / f"{seed}.mid")
        tokenize_corpus(str(folder / "midi"), folder / "data", CorpusOptions(vocab_size=720, num_workers=1))
        processor = MidiProcessor.from_pretrained(folder / "data" / "tokenizer")
        make_generator(vocab_size=processor.vocab_size).save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        teach(folder / "model", folder / "data", folder / "taught")
        for script in OPTIONS:
            model = folder / ("taught" if script == "distillation" else "model")
            begin = time.monotonic()
            place = folder / script
            place.mkdir()
            straight = finish(script, folder / "data", model, place / "straight")
            wrong, kills = [], 0
            for index, moment in enumerate(spread(place / "straight.counts", number)):
                try:
                    found = finish(script, folder / "data", model, place / str(index), moment)
                except NotReachedError:
                    continue
                kills += 1
                names = {name for name, _ in set(found.items()) ^ set(straight.items())}
                if names:
                    wrong.append((moment, sorted(names)[:9]))
            sys.stdout.write(f"{script}: {kills} kills, {len(wrong)} ends differ; {time.monotonic() - begin:.0f} s\n")
            sys.stdout.writelines(f"  {moment}: {names}\n" for moment, names in wrong)


def test_the_generator_is_saved_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from midimamba.training import adversarial

    saved: list[str] = []
    monkeypatch.setattr("midimamba.training.scripts.save_model", lambda folder, *_, **__: saved.append(folder.name))
    trainer: Any = MagicMock()
    trainer.args.output_dir = str(tmp_path / "tuned")
    adversarial.save(trainer, MagicMock(), MagicMock(), (), push=False)
    assert saved == ["tuned-discriminator", "tuned-musical-discriminator", "tuned"]


if __name__ == "__main__":
    measure(int(sys.argv[1]))
