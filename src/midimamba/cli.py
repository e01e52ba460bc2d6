"""The command `midimamba`: its parser. What each command does is in [`midimamba.commands`]."""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from midimamba.command_options import (
    EvaluateOptions,
    GenerateOptions,
    ListenOptions,
    PublishOptions,
    SamplingOptions,
    TokenizeFiles,
)
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import exit_on_input_error
from midimamba.options import add_options, read_options
from midimamba.runtime import limit_spinning


class Command(NamedTuple):
    """A command: the function of [`midimamba.commands`] with its name gets one object of each options class."""

    options: tuple[type, ...]
    description: str
    example: str


COMMANDS = {
    "tokenize": Command(
        (TokenizeFiles, CorpusOptions),
        "Turn MIDI files into a tokenized corpus.",
        "midimamba tokenize my-midi-folder --out data --vocab-size 1000",
    ),
    "generate": Command(
        (GenerateOptions, SamplingOptions),
        "Sample music from a generator, or let it continue a MIDI file.",
        "midimamba generate runs/demo/generator --prompt opening.mid --bars 8 --out continued",
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
    "publish": Command(
        (PublishOptions,),
        "Upload to the Hub a generator with its tokenizer, card and discriminator; or a corpus, as a data set.",
        "midimamba publish runs/demo/generator --repo you/bach --discriminator runs/demo/generator-discriminator",
    ),
    "info": Command((), "Show versions, device and scan backend.", "midimamba info"),
}


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="midimamba",
        description="Mamba language models for MIDI.",
        epilog="Training: accelerate launch training/pretrain.py --help, training/adversarial.py --help",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (classes, description, example) in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description, epilog=f"example: {example}")
        add_options(command, *classes)
    return parser


def main() -> None:
    """Entry point of the command line."""
    limit_spinning()
    args = build_parser().parse_args()
    with exit_on_input_error():
        run: Callable[..., Any] = getattr(import_module("midimamba.commands"), args.command)
        run(*(read_options(options, args) for options in COMMANDS[args.command].options))


if __name__ == "__main__":
    main()
