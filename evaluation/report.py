"""The report of a run: what adversarial tuning did to the generator, in numbers, curves, pictures and sound.

    python -m midimamba.evaluation.report runs/demo

Everything is measured on the test split, which neither training phase has used.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from symusic.core import ScoreTick
from torch import Tensor

from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import BlockCollator, PackedBlocks, stack_blocks
from midimamba.errors import InputError, exit_on_input_error
from midimamba.evaluation.judges import Ensemble, auc, load_judges
from midimamba.evaluation.metrics import distinct_n, self_bleu
from midimamba.evaluation.report_curves import draw_curves
from midimamba.evaluation.report_music import (
    BARS,
    chosen_pieces,
    draw_real,
    likelihood,
    music_figures,
    openings,
    sampled_pieces,
)
from midimamba.evaluation.report_page import (
    BOTH_DISCRIMINATORS,
    MUSICAL_DISCRIMINATOR,
    ORDERS,
    Report,
    report_page,
    training_settings,
)
from midimamba.evaluation.samples import fresh_samples
from midimamba.files import write_whole
from midimamba.loading import load_generator
from midimamba.modeling.judging import Judge
from midimamba.text import for_json
from midimamba.tokenization.processor import MidiProcessor

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
        `dict`: `before`, `after` and `real` with their measures, those of the music under `music`; `chosen`, the same
        for the music that the run's discriminators choose among samples; `settings` of the measurement, and the
        options of `training`.

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
    report: Report = {}
    for phase, folder in (("before", "pretrained"), ("after", "generator")):
        model = load_generator(run / folder, device_map=device)
        samples = fresh_samples(model, real[:, :prompt_length], length, seed)
        report[phase] = {
            **likelihood(model, splits["test"], collator),
            **_diversity(samples),
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


def _measure_music(run: Path, report: Report, num_pieces: int, seed: int) -> None:
    """Add what the music is like to a report, and what the run's discriminators say of it; draw real music."""
    splits, processor = load_corpus(run / "data")
    real = openings(processor, splits["test"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampled = {}
    for phase, folder in (("before", "pretrained"), ("after", "generator")):
        model = load_generator(run / folder, device_map=device)
        sampled[phase] = sampled_pieces(model, processor, num_pieces, seed)
        report[phase]["music"] = music_figures(sampled[phase])
    report["real"]["music"] = music_figures(real)
    report["settings"] |= {"sampled_pieces": num_pieces, "real_pieces": len(real), "bars_per_piece": BARS}
    some = np.random.default_rng(seed).permutation(len(splits["train"]))[: len(real)]
    known = openings(processor, splits["train"].select(some.tolist()))
    judges = _judges(run, processor)
    _measure_discriminators(judges, report, processor, {**sampled, "real": real, "known": known})
    together = list(judges.values())[-1]
    report["chosen"] = {"music": music_figures(chosen_pieces(model, processor, together, num_pieces, seed))}
    if samples := len(list((run / "samples").glob("*.png"))):
        draw_real(real, run / "real", samples, seed)


def _judges(run: Path, processor: MidiProcessor) -> dict[str, Judge]:
    """The run's discriminators, by their kind, and last, if there are two, both together."""
    kinds = [kind for kind in ("discriminator", MUSICAL_DISCRIMINATOR) if (run / f"generator-{kind}").exists()]
    found: list[Judge] = [*load_judges([run / f"generator-{kind}" for kind in kinds], processor)]
    judges = dict(zip(kinds, found, strict=True))
    return judges if len(found) == 1 else judges | {BOTH_DISCRIMINATORS: Ensemble(found)}


def _measure_discriminators(
    judges: Mapping[str, Judge], report: Report, processor: MidiProcessor, pieces: Mapping[str, Sequence[ScoreTick]]
) -> None:
    """Add how well the run's discriminators tell samples from real music, each and both together.

    Args:
        judges (`Mapping[str, Judge]`), report (`Report`), processor (`MidiProcessor`): of the run.
        pieces (`Mapping[str, Sequence[symusic.Score]]`): samples `before` and `after` tuning, `real` music that they
            have not seen, and music that is `known` from their training.
    """
    length = report["settings"]["tokens_per_sequence"]
    tokens = {name: [processor.encode(score)[:length] for score in scores] for name, scores in pieces.items()}
    for kind, judge in judges.items():
        log_odds = {name: judge.log_odds(rows) for name, rows in tokens.items()}
        for phase in ("before", "after"):
            figures = _right(log_odds["real"], log_odds[phase])
            report[phase] |= figures if kind == "discriminator" else {kind: figures}
        # The last one is all of them together.
        report["real"]["judged_real_in_training"] = float((log_odds["known"] > 0).double().mean())
        report["real"]["auc_in_training"] = auc(log_odds["known"], log_odds["after"])


def _right(real: Tensor, fake: Tensor) -> dict[str, float]:
    """How often log-odds are right of real music and of samples, and their AUC."""
    of_real, of_fake = (right.double().mean().item() for right in (real > 0, fake <= 0))
    return {
        "accuracy": (of_real + of_fake) / 2,
        "accuracy_real": of_real,
        "accuracy_fake": of_fake,
        "auc": auc(real, fake),
    }


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
