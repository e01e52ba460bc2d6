"""The command `midimamba`."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midimamba.errors import InputError, exit_on_input_error

# The options of `tokenize_corpus` that are plain flags.
_TOKENIZE_OPTIONS = (
    "tokenization",
    "tokenizer",
    "subword_model",
    "vocab_size",
    "training_tokens",
    "controls",
    "labels",
    "valid_fraction",
    "test_fraction",
    "seed",
    "limit",
    "midi_column",
    "streaming",
    "num_workers",
)
_SAMPLING_OPTIONS = ("num", "bars", "max_new_tokens", "temperature", "top_p", "seed")


def tokenize(args: argparse.Namespace) -> None:
    """`midimamba tokenize`: MIDI files to a corpus."""
    from midimamba.corpus.build import tokenize_corpus

    try:
        report = tokenize_corpus(
            args.source,
            args.out,
            tokenizer_options=_read_yaml(args.tokenizer_config) if args.tokenizer_config else None,
            **_chosen(args, _TOKENIZE_OPTIONS),
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on from here\n")
        sys.exit(130)
    for split, counts in report["splits"].items():
        print(f"{split:>10}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
    print(f"{report['vocab_size']:,} tokens in the vocabulary, {report['duplicates']:,} duplicates dropped")
    if report["refused"]:
        print(f"{report['refused']:,} files refused: {args.out / 'quarantine.jsonl'} says why")


def _chosen(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """These options, by name."""
    return {name: getattr(args, name) for name in names}


def _check_new_folder(out: Path | None, content: str) -> None:
    """Refuse early where nothing could be written at the end."""
    from midimamba.files import is_taken

    if out is None:
        raise InputError(f"nowhere to write {content}: name a folder with --out")
    if is_taken(out):
        raise InputError(f"{out} is there already; choose another --out or delete it")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise InputError(f"{path} holds no options: write lines such as `num_velocities: 16`")
    return options


def generate(args: argparse.Namespace) -> None:
    """`midimamba generate`: a model to MIDI files."""
    from midimamba.evaluation.rendering import draw_piano_roll, render_wave
    from midimamba.files import whole_folder
    from midimamba.generation import generate_scores, load_pair
    from midimamba.tokenization.ingest import MidiRefusedError

    if args.list_controls:
        _list_controls(args.model)
        return
    controls = _read_controls(args.control)
    _check_new_folder(args.out, "the pieces")
    model, processor = load_pair(args.model)
    try:
        scores = generate_scores(
            model, processor, prompt=args.prompt, controls=controls, **_chosen(args, _SAMPLING_OPTIONS)
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


def _list_controls(model: str) -> None:
    """Print one control a line, with its values."""
    from midimamba import MidiProcessor
    from midimamba.tokenization.controls import NO_CONTROLS

    controls = MidiProcessor.from_pretrained(model).controls
    if not controls:
        raise InputError(NO_CONTROLS)
    for name, values in controls.items():
        print(f"{name}: {' '.join(values)}")


def _read_controls(pairs: Sequence[str]) -> dict[str, list[str]]:
    """`["instruments=violin", "instruments=drums"]` as `{"instruments": ["violin", "drums"]}`."""
    controls: dict[str, list[str]] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not (name and value):
            raise InputError(f"--control {pair!r} is no request: write --control NAME=VALUE, such as key=C-major")
        controls.setdefault(name, []).append(value)
    return controls


def evaluate(args: argparse.Namespace) -> None:
    """`midimamba evaluate`: generated music beside held-out music."""
    from midimamba.evaluation.comparison import compare, model_figures, read_reference
    from midimamba.evaluation.comparison_page import check_target, figures_table, write_comparison
    from midimamba.evaluation.samples import Samples, read_folder
    from midimamba.generation import generate_scores, load_pair

    check_target(args.out)
    if min(args.bars, args.num) < 1 or args.temperature <= 0:
        raise InputError("--bars, --num and --temperature must be positive")
    if args.length < 4:
        raise InputError("--length must be at least 4 tokens, of which distinct-4 takes four")
    settings = _chosen(args, ("music", "reference", "split", "seed"))
    reference = read_reference(args.reference, args.split, args.bars)
    figures = {}
    folder = Path(args.music)
    if folder.is_dir() and not (folder / "config.json").is_file():
        samples = read_folder(folder)
    else:
        settings |= _chosen(args, ("temperature", "top_p", "max_new_tokens"))
        model, processor = load_pair(args.music)
        samples = Samples.of(generate_scores(model, processor, **_chosen(args, _SAMPLING_OPTIONS)))
        figures = model_figures(model, processor, reference, args.num, args.length, args.temperature, args.seed)
    found = compare(samples, reference, args.length, args.seed)
    found.figures.update(figures)
    write_comparison(args.out, f"{args.music} beside {args.reference}", found, reference, settings)
    print(figures_table(found.figures))
    print(f"\nthe whole report is in {args.out.with_suffix('.md')}")


def listen(args: argparse.Namespace) -> None:
    """`midimamba listen`: a blind listening test of several sources of music, and what came out of it."""
    from midimamba.evaluation import listening

    if args.score is not None:
        if args.out is not None:
            raise InputError("--score prints its tables and writes nothing: leave out --out")
        if len({path.resolve() for path in args.paths}) < len(args.paths):
            raise InputError("a file of answers is named twice, so its listener would count twice")
        key = listening.read_key(args.score)
        answers = [listening.read_answers(path, key) for path in args.paths]
        print(listening.scores_table(listening.score_answers(key, answers)))
        return
    _check_new_folder(args.out, "the test")
    if min(args.num, args.bars) < 1:
        raise InputError("--num and --bars must be positive")
    drawn = listening.draw_arms(args.paths, args.num, args.bars, args.seed)
    listening.write_listening_test(
        args.out,
        {arm: list(draw.pieces.values()) for arm, draw in drawn.items()},
        args.seed,
        args.bars,
        sources={arm: list(draw.pieces) for arm, draw in drawn.items()},
    )
    for arm, draw in drawn.items():
        if draw.passed_over:
            print(f"{arm}: passed over {len(draw.passed_over)} files that cannot be read or heard")
    print(f"{args.num * len(drawn)} pieces in {args.out}: give listeners all of it but key.json")


def publish(args: argparse.Namespace) -> None:
    """`midimamba publish`: a run or a corpus to the Hub."""
    from midimamba.hub_cards.publish import publish as publish_run

    urls = publish_run(
        args.folder,
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

    from midimamba.modeling.selective_scan import available_backends, choose_backend

    print(f"python {sys.version.split()[0]}")
    for package in ("midimamba", "torch", "transformers", "miditok", "symusic", "datasets", "accelerate", "trl"):
        print(f"{package} {importlib.metadata.version(package)}")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda ({torch.cuda.get_device_name()})" if kind == "cuda" else kind
    print(f"device: {device}, {torch.get_num_threads()} threads of {os.cpu_count()} processors")
    try:
        scan = choose_backend(kind)
    except ValueError as error:
        raise InputError(str(error)) from error
    print(f"scan: {scan} (of {', '.join(available_backends(kind))})")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
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

    _add_tokenize_options(
        add(
            "tokenize",
            tokenize,
            "Turn MIDI files into a tokenized corpus.",
            "midimamba tokenize my-midi-folder --out data --vocab-size 1000",
        )
    )

    _add_generate_options(
        add(
            "generate",
            generate,
            "Sample music from a generator, or let it continue a MIDI file.",
            "midimamba generate runs/demo/generator --prompt opening.mid --bars 8 --out continued",
        )
    )

    _add_evaluate_options(
        add(
            "evaluate",
            evaluate,
            "Compare generated music with held-out music: features, copies, classifiers; intervals and floors.",
            "midimamba evaluate runs/demo/generator --reference runs/demo/data --out evaluation.json",
        )
    )

    _add_listen_options(
        add(
            "listen",
            listen,
            "Make a blind listening test of folders of MIDI files, one an arm; --score reads what listeners answered.",
            "midimamba listen runs/demo/samples my-midi-folder --out test, then "
            "midimamba listen --score test answers.json",
        )
    )

    _add_publish_options(
        add(
            "publish",
            publish,
            "Upload to the Hub a generator with its tokenizer, card and discriminator; or a corpus, as a data set.",
            "midimamba publish runs/demo/generator --repo you/bach --discriminator runs/demo/generator-discriminator",
        )
    )

    add("info", info, "Show versions, device and scan backend.", "midimamba info")
    return parser


def _add_tokenize_options(command: argparse.ArgumentParser) -> None:
    from midimamba.tokenization.controls import CONTROLS
    from midimamba.tokenization.tokenizations import TOKENIZATIONS
    from midimamba.tokenization.tokenizer import SUBWORD_MODELS

    add = command.add_argument
    add(
        "source",
        help="a folder of MIDI files and archives of them, searched recursively; a .zip or .tar archive; a data set "
        "with a column of MIDI bytes, in a folder or on the Hub (owner/name); or `chorales`, Bach's from music21",
    )
    add("--out", type=Path, required=True, help="folder to make, or to bring up to date")
    add("--tokenization", default="REMI", choices=TOKENIZATIONS, help="MidiTok's tokenization")
    add("--tokenizer-config", type=Path, help="YAML file of MidiTok's options, such as `num_velocities: 16`")
    add("--tokenizer", help="use the tokenizer of this folder or repository, to make a corpus for an existing model")
    add("--subword-model", default="BPE", choices=SUBWORD_MODELS, help="how frequent successions become one id")
    add("--vocab-size", type=_vocab_size, default=1000, help="token ids after that; `none` for no subword model")
    add(
        "--training-tokens",
        type=int,
        default=10_000_000,
        help="train the subword model on pieces of so many base tokens at most, which bounds its memory",
    )
    add("--controls", nargs="+", default=[], choices=CONTROLS, help="prefix pieces with computed control tokens")
    add("--labels", nargs="+", default=[], metavar="COLUMN", help="... with these columns of the manifest or data set")
    add("--valid-fraction", type=float, default=0.1, help="share of the pieces for validation")
    add("--test-fraction", type=float, default=0.1, help="share of the pieces for the final test")
    add("--seed", type=int, default=0, help="decides which piece is in which split")
    add("--limit", type=int, help="use only so many files, the first by name")
    add("--midi-column", help="the data set's column of MIDI bytes; by default the only one with bytes")
    add("--streaming", action="store_true", help="read the data set row by row, without downloading it first")
    add("--num-workers", type=int, help="processes that read files; one a processor by default")


def _add_generate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", help="a folder or a repository on the Hub")
    add("--out", type=Path, help="folder to make")
    add("--prompt", type=Path, help="a MIDI file to continue")
    add(
        "--control",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the music should be like, such as key=C-major; again for more controls or more instruments",
    )
    add("--list-controls", action="store_true", help="print the model's controls and their values")
    add("--num", type=int, default=4, help="pieces")
    add("--bars", type=int, default=16, help="new bars a piece, at most")
    add("--max-new-tokens", type=int, default=2048, help="new tokens a piece, at most")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder")
    add("--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this probability")
    add("--seed", type=int, default=0, help="the same seed gives the same pieces")
    add("--render", action="store_true", help="write a piano roll and a WAV file beside each piece")


def _add_evaluate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("music", help="a generator, in a folder or on the Hub; or a folder of MIDI files")
    add("--reference", required=True, help="a corpus made by `midimamba tokenize`, or such a data set on the Hub")
    add("--out", type=Path, required=True, help="report.json to write; report.md and pictures go beside it")
    add("--split", default="test", choices=("test", "validation"), help="the held-out music; copies are of `train`")
    add("--bars", type=int, default=32, help="compare so many bars from the begin of every piece")
    add("--length", type=int, default=128, help="tokens, where sequences of equal length are compared")
    add("--num", type=int, default=64, help="pieces to sample from a generator")
    add("--max-new-tokens", type=int, default=2048, help="tokens a sampled piece, at most")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--top-p", type=float, default=1.0, help="of sampling; 1 is the model's own distribution")
    add("--seed", type=int, default=0, help="the same seed gives the same report")


def _add_listen_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("paths", nargs="+", type=Path, help="folders of MIDI files; with --score, the listeners' answers.json files")
    add(
        "--out", type=Path, help="folder to make: sounds, the page index.html, and key.json, which listeners don't get"
    )
    add("--score", type=Path, metavar="DIR", help="a test made before: print what its listeners thought of each arm")
    add("--num", type=int, default=8, help="pieces an arm")
    add("--bars", type=int, default=16, help="play so many bars from the begin of every piece")
    add("--seed", type=int, default=0, help="the same seed gives the same test")


def _add_publish_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("folder", type=Path, help="of a generator, or of a corpus made by `midimamba tokenize`")
    add("--repo", required=True, help="repository, as owner/name; the discriminator's is <repo>-discriminator")
    add("--discriminator", type=Path, help="folder of the generator's discriminator")
    add(
        "--report",
        type=Path,
        help="for the card: report.json of the generator's run, or what `midimamba evaluate` wrote",
    )
    add("--license", help="the Hub's name of a licence, such as cc-by-4.0")
    add("--private", action="store_true", help="make new repositories private")


def _vocab_size(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def main() -> None:
    """Entry point of the command line."""
    args = build_parser().parse_args()
    with exit_on_input_error():
        args.function(args)


if __name__ == "__main__":
    main()
