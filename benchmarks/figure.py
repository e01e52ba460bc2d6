"""Figure 1 of MoE-Mamba (arXiv 2401.04081) on music: how soon does each layout reach the loss at which Mamba ends?

Generators of one active size are trained on the same blocks of real music, with a rate that stays the same after its
warm-up, so that losses at any step can be compared. Each layout first tries every rate, for a third of the steps and
with a seed that is not used again; the one with the lowest held-out loss is its own. Held-out loss is measured at
regular steps on the same blocks of the validation split.

The last line is JSON. `steps_ratio` is, for each layout, the steps of Mamba over those after which the layout's
held-out loss is as low as Mamba's last one, and `seconds_ratio` the same for processor time: means over seeds of the
logarithm, with a 95 % interval, as factors. A layout that never gets there has none. `ratio` is the `steps_ratio` of
`moe-mamba`; the paper has 2.35 on text.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset, Dataset
from transformers import set_seed

from measure import finish, make_parser
from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.corpus.augmentation import Augmentation
from midimamba.corpus.packing import BlockCollator, some_of
from midimamba.evaluation.rendering import import_demo, save_figure
from midimamba.modeling.policy import inference
from midimamba.training.plan import LAGS
from midimamba.training.pretrain import PretrainArguments, new_config
from midimamba.training.scripts import load_blocks
from resumable import Job, Row, complete, difference

LAYOUTS = ("mamba", "mamba-mlp", "moe-mamba", "transformer", "transformer-moe", "hybrid", "mamba, look-back")
BASE = "mamba"
TRIAL_SEED = 100
HELD_OUT_BLOCKS = 32  # of every corpus
Blocks = Dataset[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """
    What all runs have in common.

    Args:
        data (`list[str]`): corpora that share a tokenizer.
        size (`str`): the named size of every layout.
        steps, length, batch_size (`int`): steps of training, tokens per block, and blocks per step.
        evaluations (`int`): how often held-out loss is measured.
    """

    data: list[str]
    size: str = "tiny"
    steps: int = 1200
    length: int = 512
    batch_size: int = 8
    evaluations: int = 24


def read(training: Training) -> tuple[Blocks, Blocks, MidiProcessor]:
    """Training and held-out blocks of all corpora, and their processor.

    Raises:
        ValueError: if the corpora number their tokens differently.
    """
    found = [load_blocks(name, training.length, Augmentation(), 0) for name in training.data]
    processor = found[0][2]
    if any(other.tokenizer.get_vocab() != processor.tokenizer.get_vocab() for _, _, other in found[1:]):
        raise ValueError(f"{', '.join(training.data)} number their tokens differently: make them with one tokenizer")
    held_out = [some_of(blocks, HELD_OUT_BLOCKS) for _, blocks, _ in found]
    return ConcatDataset([blocks for blocks, _, _ in found]), ConcatDataset(held_out), processor


def run(arm: str, seed: int, training: Training) -> Row:
    """Train a layout, and follow its held-out loss.

    Args:
        arm (`str`): `"<layout> at <learning rate>"`.
        seed (`int`): for the weights and the order of the blocks.
        training (`Training`): the settings of all runs. A trial has a third of its steps.

    Returns:
        A row whose `curve` has steps, seconds of processor time, and held-out loss, and whose `parameters` count all
        experts, but no embeddings.
    """
    layout, rate = arm.split(" at ")
    steps = training.steps // 3 if seed == TRIAL_SEED else training.steps
    blocks, held_out, processor = read(training)
    collator = BlockCollator.for_processor(processor)
    set_seed(seed)
    name, _, looks_back = layout.partition(", ")
    arguments = PretrainArguments("", layout=name, size=training.size, lookback_bars=list(LAGS) if looks_back else [])
    model = MidiMambaForCausalLM(new_config(arguments, processor)).train()
    optimizer = torch.optim.AdamW(model.parameters(), float(rate), weight_decay=0.1)
    warmup = max(1, training.steps // 20)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    order = list[int]()
    curve, seconds = [], 0.0
    for step in range(1, steps + 1):
        if len(order) < training.batch_size:
            order = torch.randperm(len(blocks)).tolist()  # type: ignore[arg-type]  # a ConcatDataset has a length
        batch = collator([blocks[order.pop()] for _ in range(training.batch_size)])
        start = time.process_time()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
        if step % max(1, training.steps // training.evaluations) == 0 or step == steps:
            curve.append([step, round(seconds, 2), round(held_out_loss(model, held_out, collator), 5)])
    row: Row = {"arm": arm, "seed": seed, "settings": asdict(training), "curve": curve}
    embeddings = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    return row | {"parameters": model.num_parameters() - embeddings}


def held_out_loss(model: MidiMambaForCausalLM, blocks: Blocks, collator: BlockCollator) -> float:
    """Nats per token of blocks."""
    total, count = 0.0, 0
    with inference(model):
        for index in range(0, len(blocks), 8):  # type: ignore[arg-type]  # as above
            batch = collator([blocks[i] for i in range(index, min(index + 8, len(blocks)))])  # type: ignore[arg-type]
            targets = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch, use_cache=False).loss) * targets
            count += targets
    return total / count


def reached(curve: Sequence[Sequence[float]], loss: float, column: int) -> float | None:
    """The step (column 0) or second (1) at which a curve is first as low as a loss, between two points in a straight
    line; `None` if it never is."""
    before = None
    for point in curve:
        if point[2] <= loss:
            if before is None:
                return point[column]
            share = (before[2] - loss) / (before[2] - point[2])
            return before[column] + share * (point[column] - before[column])
        before = point
    return None


def factors(ours: Mapping[int, Row], base: Mapping[int, Row], column: int) -> dict[str, Any] | None:
    """What Mamba needs for its last loss, over what another layout needs for it: a factor with its interval."""
    logs = []
    for seed in sorted(ours.keys() & base.keys()):
        last = base[seed]["curve"][-1]
        needed = reached(ours[seed]["curve"], last[2], column)
        if needed is None:
            return None
        logs.append(math.log(last[column] / needed))
    found = difference(logs, [0.0] * len(logs))
    interval = found["interval"] and [round(math.exp(end), 3) for end in found["interval"]]
    return {"factor": round(math.exp(found["mean"]), 3), "interval": interval}


def best_rates(rows: Mapping[tuple[str, int], Row], layouts: Sequence[str]) -> dict[str, str]:
    """The rate of every layout whose trial ended lowest."""
    ends = {arm: row["curve"][-1][2] for (arm, seed), row in rows.items() if seed == TRIAL_SEED}
    return {
        layout: min((arm for arm in ends if arm.startswith(f"{layout} at ")), key=lambda arm: ends[arm])
        for layout in layouts
    }


def report(rows: Mapping[tuple[str, int], Row], chosen: Mapping[str, str], seeds: Sequence[int]) -> dict[str, Any]:
    """Curves, last losses and factors of every layout."""
    runs = {layout: {seed: rows[arm, seed] for seed in seeds} for layout, arm in chosen.items()}
    layouts = {
        layout: {
            "learning_rate": float(chosen[layout].split(" at ")[1]),
            "parameters": of_seed[seeds[0]]["parameters"],
            "last_loss": round(statistics.mean(row["curve"][-1][2] for row in of_seed.values()), 4),
            "seconds": round(statistics.mean(row["curve"][-1][1] for row in of_seed.values())),
            "minus_mamba": difference(
                *([found[seed]["curve"][-1][2] for seed in seeds] for found in (of_seed, runs[BASE]))
            ),
            "steps_ratio": factors(of_seed, runs[BASE], 0),
            "seconds_ratio": factors(of_seed, runs[BASE], 1),
        }
        for layout, of_seed in runs.items()
    }
    found = layouts.get("moe-mamba", {}).get("steps_ratio")
    return {
        "benchmark": "figure",
        "compared": "steps of mamba until its last held-out loss, over those of moe-mamba until that loss",
        "ratio": found and found["factor"],
        "layouts": layouts,
    }


def plot(rows: Mapping[tuple[str, int], Row], chosen: Mapping[str, str], seeds: Sequence[int], path: Path) -> None:
    """A picture of held-out loss against steps and against processor time: means over seeds."""
    figure = import_demo("matplotlib.figure").Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for layout, arm in chosen.items():
        curves = [rows[arm, seed]["curve"] for seed in seeds]
        means = [
            [statistics.mean(values) for values in zip(*points, strict=True)] for points in zip(*curves, strict=True)
        ]
        for column, panel in enumerate(panels):
            panel.plot([point[column] for point in means], [point[2] for point in means], label=layout, linewidth=1.4)
    for panel, label in zip(panels, ("steps", "seconds of processor time"), strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out nats per token")
    panels[1].legend(frameon=False)
    save_figure(figure, path)


def parse() -> argparse.Namespace:
    own = Training([])
    parser = make_parser(__doc__, "figure.py --data pop909 asap --rows figure.jsonl")
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="corpora made by `midimamba tokenize` with one tokenizer")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="(default: all)")
    add("--rates", nargs="+", default=["1e-3", "3e-3", "6e-3"], help="learning rates to try (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs per layout (default: %(default)s)")
    add("--size", default=own.size, help="named size (default: %(default)s)")
    add("--steps", type=int, default=own.steps, help="training steps (default: %(default)s)")
    add("--length", type=int, default=own.length, help="tokens per block (default: %(default)s)")
    add("--batch-size", type=int, default=own.batch_size, help="blocks per step (default: %(default)s)")
    add("--evaluations", type=int, default=own.evaluations, help="points of a curve (default: %(default)s)")
    add("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    add("--rows", type=Path, required=True, help="file with one line per run, from which a second start continues")
    add("--plot", type=Path, help="draw the curves into this file")
    args = parser.parse_args()
    if BASE not in args.layouts:
        parser.error(f"--layouts needs {BASE}, with which the others are compared")
    return args


def described(row: Row) -> str:
    return f"{row['arm']} {row['seed']} {row['curve'][-1]}"


def main() -> None:
    args = parse()
    names = ("data", "size", "steps", "length", "batch_size", "evaluations")
    training = Training(**{name: getattr(args, name) for name in names})
    make = functools.partial(run, training=training)

    def made(jobs: list[Job]) -> dict[Job, Row]:
        return complete(jobs, make, asdict(training), args.rows, args.workers, described)

    rows = made([(f"{layout} at {rate}", TRIAL_SEED) for layout in args.layouts for rate in args.rates])
    chosen = best_rates(rows, args.layouts)
    seeds = range(args.seeds)
    rows = made([(arm, seed) for seed in seeds for arm in chosen.values()])
    if args.plot:
        plot(rows, chosen, seeds, args.plot)
    finish(report(rows, chosen, seeds) | {"settings": asdict(training)}, args.out)


if __name__ == "__main__":
    main()
