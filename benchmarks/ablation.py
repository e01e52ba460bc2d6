"""What every stabiliser does: the recipe `stable`, the same without one of its parts, and the controls, over seeds.

The controls are a constant and a random reward: what they change was not learned from a discriminator. With a
baseline, a constant reward leaves only the likelihood term, so it is also the control of maximum likelihood with the
same number of steps.

Every run is a separate process with one thread. It is kept as a line of JSON, and a second start continues from these
lines. The last line is JSON: for every arm, the mean and the standard deviation over its seeds of what tuning changed
on held-out music. `ratio` is the held-out negative log-likelihood after the recipe over that before it.
"""

import functools
import json
import statistics
from pathlib import Path
from typing import Any

from measure import finish, make_parser
from resumable import Row, complete, mean_and_deviation
from tuning import CONSTANT, RANDOM, forget, read_recipe, train

# What such a reward does by itself, without anything else that moves the policy.
ALONE = {"mle_weight": 0.0, "entropy_coef": 0.0}
# The options of an arm; None unsets one.
ARMS: dict[str, dict[str, Any]] = {
    "stable": {},
    "constant": CONSTANT,
    "random": RANDOM,
    "constant alone": CONSTANT | ALONE,
    "random alone": RANDOM | ALONE,
    "no baseline": {"baseline": "none"},
    "running baseline": {"baseline": "running"},
    "group baseline": {"group_size": 4},
    "no normalisation": {"normalize_advantages": False, "advantage_clip": None},
    "one pass": {"ppo_epochs": 1, "ppo_clip": None},
    "no KL": {"kl_coef": 0.0},
    "no entropy bonus": {"entropy_coef": 0.0},
    "no likelihood": {"mle_weight": 0.0},
    "no average": {"ema_decay": 0.0},
    "no replay": {"replay_fraction": 0.0},
    "no smoothing": {"label_smoothing": 0.0},
    "no R1": {"r1_weight": 0.0},
    "spectral norm": {"d_spectral_norm": True},
    "D never waits": {"d_max_accuracy": None},
    "no warm-up": {"d_warmup_steps": 0},
    "dense": {"estimator": "dense", "discriminator": "mamba", "r1_weight": 0.0},
    "terminal": {"estimator": "terminal"},
    "nothing but REINFORCE": {
        **{"baseline": "none", "normalize_advantages": False, "advantage_clip": None, "ppo_epochs": 1},
        **{"ppo_clip": None, "kl_coef": 0.0, "entropy_coef": 0.0, "mle_weight": 0.0, "ema_decay": 0.0},
        **{"replay_fraction": 0.0, "label_smoothing": 0.0, "r1_weight": 0.0, "d_max_accuracy": None},
    },
}
# The figures of the evaluations of a run that are compared before and after it.
MEASURES = ("eval_loss", "eval_self_bleu_4", "eval_distinct_4", "eval_d_accuracy")


def run(arm: str, seed: int, settings: dict[str, Any], folder: Path, keep: bool) -> Row:
    """One run of an arm: its evaluations, or the end of what it printed. `keep` keeps the networks that it wrote."""
    output = folder / f"{arm.replace(' ', '-')}-{seed}"
    given = {"model": settings["model"], "data": settings["data"], "seed": seed, "sequence_length": settings["length"]}
    chosen = {"max_steps": settings["steps"], "learning_rate": settings["learning_rate"]}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    trained = train({**read_recipe(settings["recipe"]), **given, **ARMS[arm], **chosen}, output)
    row: Row = {"arm": arm, "seed": seed, "settings": settings, "seconds": round(trained.seconds, 1)}
    state = output / "trainer_state.json"
    if trained.failed or not state.exists():
        return {**row, "finished": False, "error": trained.printed}
    history = json.loads(state.read_text())["log_history"]
    for measure in MEASURES:
        values = [entry[measure] for entry in history if measure in entry]
        row[measure] = [values[0], values[-1]]
    row["rollbacks"] = max((entry.get("rollbacks", 0) for entry in history), default=0)
    row["losses_finite"] = all(abs(entry["loss"]) < float("inf") for entry in history if "loss" in entry)
    if not keep:
        forget(output)
    return {**row, "finished": True}


def summary(rows: list[Row]) -> dict[str, Any]:
    """For the runs of one arm: mean and standard deviation of what changed, and the worst likelihood and diversity."""
    finished = [row for row in rows if row["finished"]]
    result: dict[str, Any] = {"runs": len(rows), "finished": len(finished)}
    if not finished:
        return result
    changes = {
        "nll_percent": [100 * (row["eval_loss"][1] / row["eval_loss"][0] - 1) for row in finished],
        **{
            name: [row[f"eval_{name}"][1] - row[f"eval_{name}"][0] for row in finished]
            for name in ("self_bleu_4", "distinct_4", "d_accuracy")
        },
    }
    result |= {name: mean_and_deviation(values) for name, values in changes.items()}
    result["worst"] = {name: round(max(changes[name]), 4) for name in ("nll_percent", "self_bleu_4")}
    result["rollbacks"] = sum(row["rollbacks"] for row in finished)
    result["all_finite"] = all(row["losses_finite"] for row in finished)
    result["seconds"] = round(statistics.median(row["seconds"] for row in finished), 1)
    return result


def described(row: Row) -> str:
    return str({name: value for name, value in row.items() if name != "settings"})


def main() -> None:
    example = "--model runs/demo/pretrained --data runs/demo/data --arms stable constant random --rows ablation.jsonl"
    parser = make_parser(__doc__, f"ablation.py {example}")
    parser.add_argument("--model", required=True, help="pre-trained generator")
    parser.add_argument("--data", required=True, help="its corpus")
    parser.add_argument("--recipe", default="stable-adversarial", help="recipe (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="arms (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="generator steps (default: those of the recipe)")
    parser.add_argument("--learning-rate", type=float, help="of the generator (default: that of the recipe)")
    parser.add_argument("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    parser.add_argument(
        "--rows", type=Path, required=True, help="file with one line per run, from which a second start continues"
    )
    parser.add_argument("--keep", action="store_true", help="keep the networks of all runs, beside the rows")
    args = parser.parse_args()

    settings = {name: getattr(args, name) for name in ("model", "data", "recipe", "length", "steps", "learning_rate")}
    # Seed by seed, so that an interrupted benchmark has all arms for some of the seeds.
    wanted = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]
    folder = args.rows.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    make = functools.partial(run, settings=settings, folder=folder, keep=args.keep)
    done = complete(wanted, make, settings, args.rows, args.workers, described)
    arms = {arm: summary([done[arm, seed] for seed in range(args.seeds)]) for arm in args.arms}
    for arm, result in arms.items():
        print(f"{arm:30s} {result}")
    nll = arms.get("stable", {}).get("nll_percent")
    finish(
        {
            "benchmark": "ablation",
            "compared": "held-out negative log-likelihood after and before the recipe",
            "ratio": round(1 + nll[0] / 100, 4) if nll else None,
            "arms": arms,
            "settings": settings,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
