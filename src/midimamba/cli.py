"""The command `midimamba`."""

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path

from midimamba.errors import InputError, exit_on_input_error


def tokenize(args: argparse.Namespace) -> None:
    """`midimamba tokenize`: MIDI files to a corpus."""
    from midimamba.tokenization.corpus import tokenize_corpus

    report = tokenize_corpus(
        args.source,
        args.out,
        tokenization=args.tokenization,
        vocab_size=args.vocab_size,
        valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction,
        seed=args.seed,
        limit=args.limit,
        num_workers=args.num_workers,
    )
    for split, counts in report["splits"].items():
        print(f"{split:>10}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
    print(f"{report['vocab_size']:,} tokens in the vocabulary, {report['duplicates']} duplicates dropped")
    if report["refused"]:
        print(f"{report['refused']} files refused: {args.out / 'quarantine.jsonl'} says why")


def generate(args: argparse.Namespace) -> None:
    """`midimamba generate`: a model to MIDI files."""
    from midimamba.evaluation.rendering import draw_piano_roll, render_wave
    from midimamba.files import is_taken, whole_folder
    from midimamba.generation import generate_scores, load_pair
    from midimamba.tokenization.ingest import MidiRefusedError

    if is_taken(args.out):
        raise InputError(f"{args.out} is there already; choose another --out or delete it")
    model, processor = load_pair(args.model)
    try:
        scores = generate_scores(
            model,
            processor,
            prompt=args.prompt,
            num=args.num,
            bars=args.bars,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )
    except MidiRefusedError as error:
        raise InputError(f"{args.prompt} cannot be continued: {error}") from error
    with whole_folder(args.out) as folder:
        for index, score in enumerate(scores):
            name = f"sample-{index:02d}"
            score.dump_midi(folder / f"{name}.mid")
            if args.render:
                draw_piano_roll(score, folder / f"{name}.png", title=name)
                render_wave(score, folder / f"{name}.wav")
    print(f"{len(scores)} pieces in {args.out}")


def publish(args: argparse.Namespace) -> None:
    """`midimamba publish`: a run to the Hub."""
    from midimamba.hub_cards.publish import publish as publish_run

    urls = publish_run(
        args.generator,
        args.repo,
        discriminator=args.discriminator,
        report=args.report,
        license=args.license,
        private=args.private,
    )
    for name, url in urls.items():
        print(f"{name}: {url}")


def info(args: argparse.Namespace) -> None:
    """`midimamba info`: what is installed, and what it will run on."""
    import torch

    print(f"python {sys.version.split()[0]}")
    for package in ("midimamba", "torch", "transformers", "miditok", "symusic", "datasets", "accelerate", "trl"):
        print(f"{package} {importlib.metadata.version(package)}")
    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
    print(f"device: {device}, {torch.get_num_threads()} threads of {os.cpu_count()} processors")
    print("scan: chunked, in plain torch")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from midimamba.tokenization.tokenizations import TOKENIZATIONS

    parser = argparse.ArgumentParser(
        prog="midimamba",
        description="Mamba language models for MIDI.",
        epilog="Training: accelerate launch training/pretrain.py --help, training/adversarial.py --help",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: object, description: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=description,
            description=description,
            epilog=f"example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(function=function)
        return command

    command = add(
        "tokenize",
        tokenize,
        "Turn a folder of MIDI files into a tokenized corpus.",
        "midimamba tokenize my-midi-folder --out data --vocab-size 1000",
    )
    command.add_argument(
        "source",
        help="a folder of MIDI files and archives of them, searched recursively; a .zip or .tar archive; "
        "or `chorales`, Bach's from music21",
    )
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument("--tokenization", default="REMI", choices=TOKENIZATIONS, help="MidiTok's tokenization")
    command.add_argument("--vocab-size", type=int, default=1000, help="token ids after byte-pair encoding")
    command.add_argument("--valid-fraction", type=float, default=0.1, help="share of the pieces for validation")
    command.add_argument("--test-fraction", type=float, default=0.1, help="share of the pieces for the final test")
    command.add_argument("--seed", type=int, default=0, help="decides which piece is in which split")
    command.add_argument("--limit", type=int, help="use only so many files, the first by name")
    command.add_argument("--num-workers", type=int, help="processes that read files; one a processor by default")

    command = add(
        "generate",
        generate,
        "Sample music from a generator, or let it continue a MIDI file.",
        "midimamba generate runs/demo/generator --prompt opening.mid --bars 8 --out continued",
    )
    command.add_argument("model", help="a folder or a repository on the Hub")
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument("--prompt", type=Path, help="a MIDI file to continue")
    command.add_argument("--num", type=int, default=4, help="pieces")
    command.add_argument("--bars", type=int, default=16, help="new bars a piece, at most")
    command.add_argument("--max-new-tokens", type=int, default=2048, help="new tokens a piece, at most")
    command.add_argument("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder")
    command.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this probability"
    )
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same pieces")
    command.add_argument("--render", action="store_true", help="write a piano roll and a WAV file beside each piece")

    command = add(
        "publish",
        publish,
        "Upload a generator with its tokenizer and card, and its discriminator, to the Hub.",
        "midimamba publish runs/demo/generator --repo you/bach --discriminator runs/demo/generator-discriminator",
    )
    command.add_argument("generator", type=Path, help="folder of the generator")
    command.add_argument(
        "--repo", required=True, help="repository, as owner/name; the discriminator's is <repo>-discriminator"
    )
    command.add_argument("--discriminator", type=Path, help="folder of the discriminator")
    command.add_argument("--report", type=Path, help="report.json of the run, for the card")
    command.add_argument("--license", help="the Hub's name of a licence, such as cc-by-4.0")
    command.add_argument("--private", action="store_true", help="make new repositories private")

    add("info", info, "Show versions, device and scan backend.", "midimamba info")
    return parser


def main() -> None:
    """Entry point of the command line."""
    args = build_parser().parse_args()
    with exit_on_input_error():
        args.function(args)


if __name__ == "__main__":
    main()
