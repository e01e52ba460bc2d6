"""Which generator remembers best in equal time? Mamba, hybrids and transformers, with and without look-back.

All arms of one size have the same number of active parameters within 3 %; `parameters` says how many there are. They
are trained for the same processor time with one thread: the steps of an arm follow from the processor time of one of
its steps, which is measured for all arms in turn before the first run. Pieces are transposed anew by at most five
semitones in every epoch.

Each generator is sampled at the temperature that was closest to real music on the validation split. Everything else is
measured on the test split, once: likelihood per token and per note, how alike bars four and eight apart are (with the
real value), and how many runs of 12 notes stem from the training music (with the share of held-out music). The last
line is JSON. `ratio` is the likelihood per token of `mamba` over that of `mamba, look-back`, in nats.

Every run is a separate process with one thread. Finished runs are kept, and a second start continues from them.
"""

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from measure import add_temperatures, finish, make_parser
from repetition_runs import ARMS, Training, costs, run
from resumable import Row, complete, difference, mean_and_deviation

MEASURES = (
    *("held_out_nll_per_token", "held_out_nll_per_note", "bar_self_similarity_4", "bar_self_similarity_8"),
    *("copied_runs_12", "mean_overlapping_area"),
)


def summary(rows: Sequence[Row], plain: Mapping[int, Row]) -> dict[str, Any]:
    """Summarize the runs of one arm: mean and deviation over seeds, real music, and the difference from `mamba`."""
    result: dict[str, Any] = {
        "steps": rows[0]["steps"],
        "runs": len(rows),
        "temperatures": [row["temperature"] for row in rows],
    }
    for name in MEASURES:
        values = [row["test"][name] for row in rows]
        result[name] = {"value": mean_and_deviation(values)}
        if name in rows[0]["real"]:
            result[name]["real"] = round(rows[0]["real"][name], 4)
        if rows[0]["arm"] != "mamba" and all(row["seed"] in plain for row in rows):
            theirs = [plain[row["seed"]]["test"][name] for row in rows]
            result[name]["minus_mamba"] = difference(values, theirs)
    return result


def measured_costs(training: Training, file: Path) -> dict[str, dict[str, float]]:
    """The cost of steps and tokens of all arms: measured once, and kept beside the rows."""
    if not file.exists():
        torch.set_num_threads(1)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(costs(training)))
    kept: dict[str, dict[str, float]] = json.loads(file.read_text())
    return kept


def parse() -> argparse.Namespace:
    own = Training("")
    parser = make_parser(__doc__, "repetition.py --data data --rows repetition.jsonl")
    add = parser.add_argument
    add("--data", required=True, help="corpus made by `midimamba tokenize`")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms (default: all)")
    add("--seeds", type=int, default=3, help="runs per arm (default: %(default)s)")
    add("--size", default=own.size, help="size of every generator (default: %(default)s)")
    add("--length", type=int, default=own.length, help="tokens per block (default: %(default)s)")
    add("--batch-size", type=int, default=own.batch_size, help="blocks per step (default: %(default)s)")
    add("--learning-rate", type=float, default=own.learning_rate, help="the highest (default: %(default)s)")
    add("--seconds", type=float, default=own.seconds, help="processor time per run (default: %(default)s)")
    add("--num", type=int, default=own.num, help="pieces that are sampled for every figure (default: %(default)s)")
    add("--bars", type=int, default=own.bars, help="bars per piece that are compared (default: %(default)s)")
    add_temperatures(parser, own.temperatures, "; without any, samples are drawn at 1")
    add("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    add("--rows", type=Path, required=True, help="file with one line per run, from which a second start continues")
    return parser.parse_args()


def described(row: Row) -> str:
    measured = {name: row["test"][name] for name in MEASURES}
    return f"{row['arm']} {row['seed']} {measured}"


def main() -> None:
    args = parse()
    names = ("data", "size", "length", "batch_size", "learning_rate", "seconds", "num", "bars", "temperatures")
    training = Training(**{name: getattr(args, name) for name in names})
    cost = measured_costs(training, args.rows.with_suffix(".costs.json"))
    arms = ["mamba", *(arm for arm in args.arms if arm != "mamba")]
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in arms]
    steps = {arm: max(1, round(args.seconds / cost[arm]["step_seconds"])) for arm in ARMS}
    folder = args.rows.with_suffix("")
    make = functools.partial(run, training=training, steps=steps, folder=folder)
    done = complete(jobs, make, asdict(training), args.rows, args.workers, described)
    by_arm = {arm: [done[arm, seed] for seed in range(args.seeds)] for arm in arms}
    plain = {row["seed"]: row for row in by_arm["mamba"]}
    results = {arm: cost[arm] | summary(rows, plain) for arm, rows in by_arm.items()}
    nats = {arm: result["held_out_nll_per_token"]["value"][0] for arm, result in results.items()}
    ours = nats.get("mamba, look-back")
    finish(
        {
            "benchmark": "repetition",
            "compared": "held-out NLL per token of mamba over that of mamba with look-back, in equal processor time",
            "ratio": round(nats["mamba"] / ours, 4) if ours else None,
            "arms": results,
            "settings": asdict(training),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
