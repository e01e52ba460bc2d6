"""The command `midimamba`: its parser. What each command does is in [`midimamba.commands`]."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from midimamba import __version__
from midimamba.app.options import AppOptions
from midimamba.command_options import (
    ConvertOptions,
    DemoOptions,
    DrawingOptions,
    ExportOptions,
    GenerateOptions,
    InfillOptions,
    PlayOptions,
    SamplingOptions,
    TokenizeFiles,
    TrainOptions,
    TuneOptions,
)
from midimamba.constraint_options import ConstraintOptions, GapConstraintOptions
from midimamba.corpus.options import ClusterOptions, CorpusOptions
from midimamba.errors import exit_on_input_error
from midimamba.options import add_options, read_options, split_flags
from midimamba.result_options import EvaluateOptions, ListenOptions, PublishOptions
from midimamba.runtime import hide_short_bars, limit_spinning
from midimamba.serving.options import ServeOptions


class Command(NamedTuple):
    """A command: the function of [`midimamba.commands`] with its name gets one object of each options class."""

    options: tuple[type, ...]
    description: str
    example: str
    passes_on: str = ""  # the training script that gets the flags which the command does not know


COMMANDS = {
    "demo": Command(
        (DemoOptions,),
        "Do everything once, in about ten minutes on two processors: from Bach's chorales to a corpus, a generator, "
        "samples to listen to, and a report. A second start goes on where the first one stopped.",
        "midimamba demo --out runs/demo",
    ),
    "tokenize": Command(
        (TokenizeFiles, CorpusOptions, ClusterOptions),
        "Turn MIDI files into a tokenized corpus, on this machine or in the tasks of a cluster.",
        "midimamba tokenize my-midi-folder --out data --vocab-size 1000, or "
        "midimamba tokenize /shared/midi --out /shared/data --executor slurm --tasks 200 --slurm partition=cpu",
    ),
    "train": Command(
        (TrainOptions,),
        "Train a generator: size, steps, batch, rates and context follow from the corpus, the machine and the time.",
        "midimamba train my-midi-folder --out model --minutes 10",
        passes_on="pretrain",
    ),
    "tune": Command(
        (TuneOptions,),
        "Tune a generator adversarially (SeqGAN), by a packaged recipe.",
        "midimamba tune model --data model-data --out tuned",
        passes_on="adversarial",
    ),
    "generate": Command(
        (GenerateOptions, SamplingOptions, ConstraintOptions),
        "Sample music from a generator, or let it continue a MIDI file.",
        "midimamba generate runs/demo/generator --prompt opening.mid --bars 8 --out continued",
    ),
    "infill": Command(
        (InfillOptions, DrawingOptions, GapConstraintOptions),
        "Write some bars of a MIDI file again, in all tracks or in some. Everything else stays as it is.",
        "midimamba infill model song.mid --bars 5-8 --tracks 1,2 --num 4 --out filled",
    ),
    "serve": Command(
        (ServeOptions,),
        "Serve a generator over HTTP: new pieces, continuations, infilling, and notes while they are sampled.",
        "midimamba serve runs/demo/generator --port 8000",
    ),
    "app": Command(
        (AppOptions,),
        "Open a page in the browser: compose, train, and make a blind listening test. It needs no network.",
        "midimamba app runs/demo/generator",
    ),
    "play": Command(
        (PlayOptions,),
        "Play music to a MIDI port while it is being sampled, without end or for some bars. Ctrl-C stops it.",
        "midimamba play runs/demo/generator --port FluidSynth --temperature 0.9",
    ),
    "evaluate": Command(
        (EvaluateOptions,),
        "Compare generated music with held-out music: features, copies, classifiers; with intervals and floors.",
        "midimamba evaluate runs/demo/generator --reference runs/demo/data --out evaluation.json",
    ),
    "listen": Command(
        (ListenOptions,),
        "Make a blind listening test of two or more folders of MIDI files, or score what its listeners answered.",
        "midimamba listen runs/demo/samples my-midi-folder --out test, then "
        "midimamba listen --score test answers.json",
    ),
    "convert": Command(
        (ConvertOptions,),
        "Turn a file of music into another, as the suffixes say: MIDI, ABC, MusicXML, an engraved page, a piano roll, "
        "sound. What a format cannot say is told.",
        "midimamba convert song.mid song.pdf",
    ),
    "export": Command(
        (ExportOptions,),
        "Write a generator as a file for programs without torch: GGUF for llama.cpp, or ONNX.",
        "midimamba export model --gguf model.gguf --quantize Q8_0",
    ),
    "publish": Command(
        (PublishOptions,),
        "Upload to the Hub a generator with its tokenizer, card and discriminators; or a corpus, as a data set; or a "
        "page that makes music with a published model, as a Space.",
        "midimamba publish runs/demo/generator --repo you/bach --discriminator runs/demo/generator-discriminator",
    ),
    "info": Command((), "Show versions, device and scan backend.", "midimamba info"),
}


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="midimamba",
        description="Mamba language models for MIDI.",
        epilog="On several GPUs: accelerate launch -m midimamba.training.pretrain --help, or training.adversarial",
    )
    parser.add_argument("--version", action="version", version=f"midimamba {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (classes, description, example, script) in COMMANDS.items():
        epilog = f"example: {example}"
        if script:
            epilog += f"""

Other flags go to the training script, which checks them. They come last:
midimamba {name} … --seed 1 --learning_rate 1e-3
They are listed by: python -m midimamba.training.{script} --help"""
        layout = argparse.RawDescriptionHelpFormatter if script else argparse.HelpFormatter
        command = commands.add_parser(
            name, help=description, description=description, epilog=epilog, formatter_class=layout
        )
        add_options(command, *classes)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Entry point of the command line.

    Args:
        words (`Sequence[str]`, *optional*): a command and its options; by default those of the process.
    """
    limit_spinning()
    hide_short_bars()
    line = list(sys.argv[1:] if words is None else words) or ["--help"]
    passed: tuple[str, ...] = ()
    command = COMMANDS.get(line[0])
    if command is not None and command.passes_on:
        line, passed = split_flags(line, *command.options)
    args = build_parser().parse_args(line)
    others = {"passed": passed} if COMMANDS[args.command].passes_on else {}
    with exit_on_input_error():
        run: Callable[..., Any] = getattr(import_module("midimamba.commands"), args.command)
        run(*(read_options(options, args, **others) for options in COMMANDS[args.command].options))


if __name__ == "__main__":
    main()
