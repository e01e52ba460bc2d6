"""The report of a run: what adversarial tuning did to the generator, in numbers, curves, pictures and sound.

    python -m midimamba.evaluation.report runs/demo

Everything is measured on the test split, which neither training phase has used.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import BlockCollator, PackedBlocks, stack_blocks
from midimamba.errors import InputError, exit_on_input_error
from midimamba.evaluation.judges import load_judges
from midimamba.evaluation.metrics import discriminator_accuracy, distinct_n, self_bleu
from midimamba.evaluation.report_curves import draw_curves
from midimamba.evaluation.report_music import BARS, draw_real, likelihood, music_figures, openings, sampled_pieces
from midimamba.evaluation.report_page import (
    MUSICAL_DISCRIMINATOR,
    ORDERS,
    Report,
    report_page,
    training_settings,
)
from midimamba.evaluation.samples import fresh_samples
from midimamba.files import write_whole
from midimamba.loading import load_discriminator, load_generator
from midimamba.modeling.judging import music_of
from midimamba.modeling.sampling import Ending
from midimamba.text import for_json

NEEDED = (
    "data",
    "pretrained/config.json",
    "pretrained/trainer_state.json",
    "generator/config.json",
    "generator/trainer_state.json",
    "generator/training_args.json",
    "generator-discriminator/config.json",
)


def write_report(
    run: Path, seed: int = 0, num_samples: int = 64, length: int | None = None, num_pieces: int = 32
) -> Report:
    """
    Measure a run before and after adversarial tuning; write `report.json`, `report.md` and `curves.png` into it. If it
    has samples, draw real music beside them, into the folder `real`.

    Args:
        run (`Path`): the folder of the run, with `data`, `pretrained`, `generator`, `generator-discriminator` and,
            if there are any, `generator-musical-discriminator` and `samples`.
        seed (`int`, *optional*, defaults to 0): for the fresh samples.
        num_samples (`int`, *optional*, defaults to 64): fresh samples per model. At most as many as the test split has
            blocks, so that samples and music are compared in sets of equal size.
        length (`int`, *optional*): tokens per block and per sample; the generator's `sequence_length` by default.
        num_pieces (`int`, *optional*, defaults to 32): pieces of 16 bars to sample from each model, to measure what
            the music is like.

    Returns:
        `dict`: `before`, `after` and `real` with their measures, those of the music under `music`; `settings` of the
        measurement, and the options of `training`.

    Raises:
        InputError: if a part of the run is missing, or its test split is too short.
    """
    for part in NEEDED:
        if not (run / part).exists():
            raise InputError(f"{run} is not a finished run: it has no {part}; train one, for example with `make demo`")
    training = training_settings(run / "generator")
    for name in ("sequence_length", "prompt_length"):
        if type(training.get(name)) is not int or training[name] < 0:
            raise InputError(
                f"{run / 'generator' / 'training_args.json'} has no whole number {name!r}, which the measures need: "
                "copy the file of the run again"
            )
    report = _measure(run, seed, num_samples, length or training["sequence_length"], training["prompt_length"])
    _measure_musical(run, report, seed, training["prompt_length"])
    _measure_music(run, report, num_pieces, seed)
    report["training"] = training
    draw_curves(run / "pretrained", run / "generator", run / "curves.png")
    write_whole(run / "report.json", for_json(report, indent=2) + "\n")
    write_whole(run / "report.md", report_page(run, report))
    return report


def _measure(run: Path, seed: int, num_samples: int, length: int, prompt_length: int) -> Report:
    if length <= max(prompt_length, max(ORDERS)) or num_samples < 2:
        raise InputError(
            f"{num_samples} samples of {length} tokens cannot be compared; give a larger --num-samples or --length"
        )
    splits, processor = load_corpus(run / "data")
    collator = BlockCollator.for_processor(processor)
    test = PackedBlocks(splits["test"], length)
    blocks = stack_blocks([test[index] for index in range(len(test))])
    if len(blocks) < 2:
        raise InputError(
            f"{run / 'data'}: the test split has {len(blocks)} blocks of {length} tokens, but two are needed; "
            "give a smaller --length"
        )
    count = min(num_samples, len(blocks))
    # Neighbouring blocks belong to one piece and repeat each other, so choose from the whole split.
    real = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    discriminator = load_discriminator(run / "generator-discriminator", device_map=device)
    report: Report = {}
    for phase, folder in (("before", "pretrained"), ("after", "generator")):
        model = load_generator(run / folder, device_map=device)
        samples = fresh_samples(model, real[:, :prompt_length], length, seed)
        report[phase] = {
            **likelihood(model, splits["test"], collator),
            **_diversity(samples),
            **discriminator_accuracy(discriminator, real, samples),
        }
    report["real"] = _diversity(real)
    report["settings"] = {
        "parameters": model.num_parameters(),
        "tokens_per_sequence": length,
        "test_blocks": len(blocks),
        "fresh_samples": count,
        "evaluation_seed": seed,
    }
    return report


def _measure_musical(run: Path, report: Report, seed: int, prompt_length: int) -> None:
    """Add the accuracy of the discriminator of musical features, if the run has one.

    It hears pieces of the test split from their beginnings on, cut to as many tokens as the sequences of the other
    one, and a sample for each.
    """
    folder = run / f"generator-{MUSICAL_DISCRIMINATOR}"
    if not (folder / "config.json").exists():
        return
    splits, processor = load_corpus(run / "data")
    (judge,) = load_judges([folder], processor)
    length, count = (report["settings"][name] for name in ("tokens_per_sequence", "fresh_samples"))
    pieces = [ids[:length] for ids in splits["test"]["input_ids"] if len(ids) > prompt_length][:count]
    if not pieces:
        return
    right = float((judge.log_odds(pieces) > 0).double().mean())
    prompts = torch.tensor([ids[:prompt_length] for ids in pieces])
    for phase, name in (("before", "pretrained"), ("after", "generator")):
        model = load_generator(run / name, device_map="cuda" if torch.cuda.is_available() else "cpu")
        ending = Ending.of(model.config)
        samples = fresh_samples(model, prompts, length, seed, ending)
        rows = [music_of(ids, ending.pad_token_id, ending.eos_token_id) for ids in samples]
        right_fake = float((judge.log_odds(rows) <= 0).double().mean())
        accuracy = (right + right_fake) / 2
        report[phase][MUSICAL_DISCRIMINATOR] = {
            "accuracy": accuracy,
            "accuracy_real": right,
            "accuracy_fake": right_fake,
        }
    report["settings"]["musical_pieces"] = len(pieces)


def _measure_music(run: Path, report: Report, num_pieces: int, seed: int) -> None:
    """Add what the music is like to a report, and draw real music."""
    splits, processor = load_corpus(run / "data")
    real = openings(processor, splits["test"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for phase, folder in (("before", "pretrained"), ("after", "generator")):
        model = load_generator(run / folder, device_map=device)
        report[phase]["music"] = music_figures(sampled_pieces(model, processor, num_pieces, seed))
    report["real"]["music"] = music_figures(real)
    report["settings"] |= {"sampled_pieces": num_pieces, "real_pieces": len(real), "bars_per_piece": BARS}
    if samples := len(list((run / "samples").glob("*.png"))):
        draw_real(real, run / "real", samples, seed)


def _diversity(sequences: Tensor) -> dict[str, float]:
    return {f"distinct_{n}": distinct_n(sequences, n) for n in ORDERS} | {"self_bleu_4": self_bleu(sequences)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m midimamba.evaluation.report",
        description="Measure a run on its test split and write report.md, report.json and curves.png into it.",
        epilog="example: python -m midimamba.evaluation.report runs/demo --num-samples 64",
    )
    parser.add_argument("run", type=Path, help="folder with data, pretrained, generator and generator-discriminator")
    parser.add_argument("--seed", type=int, default=0, help="for the fresh samples (default: 0)")
    parser.add_argument("--num-samples", type=int, default=64, help="fresh samples per model (default: 64)")
    parser.add_argument("--length", type=int, help="tokens per sample (default: the generator's sequence_length)")
    parser.add_argument("--num-pieces", type=int, default=32, help="pieces of 16 bars per model (default: 32)")
    arguments = parser.parse_args()
    with exit_on_input_error():
        write_report(**vars(arguments))


if __name__ == "__main__":
    main()
