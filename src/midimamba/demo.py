"""`midimamba demo`: the whole path on Bach's chorales, from MIDI to samples and a report."""

import time
from collections.abc import Callable
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

from midimamba import launching
from midimamba.command_options import GenerateOptions, SamplingOptions, TokenizeFiles
from midimamba.constraint_options import ConstraintOptions
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.sources import CHORALES
from midimamba.files import check_can_be_made
from midimamba.text import show

VOCAB_SIZE = 800
PIECES = 8
SMALLER = ("--per_device_train_batch_size", "768")
"""A quarter of the draws of the recipe `distill`: three minutes instead of ten."""


def run(out: Path) -> None:
    """
    Make what is not there yet: `data`, `pretrained`, `generator` with its discriminators, `samples`, `report.md`.

    Args:
        out (`Path`): the folder. An interrupted run is continued.

    Raises:
        InputError: if the packages of the extra `demo` are not installed, or the folder cannot be made.
    """
    from midimamba.evaluation.rendering import import_demo

    check_can_be_made(out)
    for package in ("music21", "matplotlib", "midirenderer", "pretty_midi"):  # before minutes of work
        import_demo(package)
    pretrained, generator, samples = out / "pretrained", out / "generator", out / "samples"
    stages: list[tuple[Path, Callable[[], None]]] = [
        (out / "data" / "corpus.json", partial(_tokenize, out / "data")),
        (pretrained / "config.json", partial(_train, "pretrain", "chorales-cpu", out / "data", pretrained)),
        (
            generator / "config.json",
            partial(_train, "adversarial", "distill-adversarial", out / "data", generator, pretrained),
        ),
        (samples, partial(_sample, generator, samples)),
        (out / "report.md", partial(_report, out)),
    ]
    for made, stage in stages:
        if made.exists():
            show(f"already there: {made}")
        else:
            show(f"==> {made}")
            stage()
    show(f"read {out / 'report.md'}, listen to {samples}; delete {out} to start over")


def _tokenize(data: Path) -> None:
    from midimamba.commands import tokenize

    tokenize(TokenizeFiles(CHORALES, str(data)), CorpusOptions(vocab_size=VOCAB_SIZE))


def _train(script: str, recipe: str, data: Path, out: Path, model: Path | None = None) -> None:
    with as_file(files("midimamba.training.recipes") / f"{recipe}.yaml") as path:
        arguments = ["--config", str(path), "--data", str(data), "--output_dir", str(out)]
        if model is not None:
            arguments += ["--model", str(model), *launching.distilling(str(model)), *SMALLER]
        launching.leave_with(launching.run_script(script, [*arguments, *launching.RESUME], time.time()))


def _sample(generator: Path, samples: Path) -> None:
    from midimamba.commands import generate

    judges = [str(folder) for folder in launching.discriminators_of(generator)]
    options = GenerateOptions(str(generator), samples, discriminator=judges, render=True)
    generate(options, SamplingOptions(PIECES), ConstraintOptions())


def _report(out: Path) -> None:
    from midimamba.evaluation.report import write_report

    write_report(out)
