"""What every stabiliser does: the recipe `stable`, the same without one of its parts, and the controls, over seeds.

The controls are a constant and a random reward: what they change was not learned from a discriminator. With the
baseline on, a constant reward leaves the likelihood term alone, so it is also the control by maximum likelihood of
equal compute.

A run is a process of its own on one thread. What is done is kept in a file of one JSON object a run, and a second
start goes on from there. The last line is JSON: of every arm the mean and the standard deviation over its seeds of
what tuning changed on held-out music. `ratio` is the held-out negative log-likelihood after the recipe over that
before it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from measure import finish

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
# What an arm sets; None leaves the recipe's key out.
ARMS: dict[str, dict[str, Any]] = {
    "stable": {},
    "constant": {"reward": "constant"},
    "random": {"reward": "random"},
    "no baseline": {"baseline": "none"},
    "running baseline": {"baseline": "running"},
    "group baseline": {"baseline": "group", "group_size": 4},
    "no normalisation": {"normalize_advantages": False, "advantage_clip": None},
    "one pass": {"ppo_epochs": 1, "ppo_clip": None},
    "no KL": {"kl_coef": 0.0, "kl_target": None},
    "no entropy bonus": {"entropy_coef": 0.0},
    "no likelihood": {"mle_weight": 0.0, "mle_weight_final": None},
    "likelihood not annealed": {"mle_weight_final": None},
    "no average": {"ema_decay": 0.0},
    "no replay": {"replay_size": 0, "replay_fraction": 0.0},
    "no smoothing": {"label_smoothing": 0.0},
    "no R1": {"r1_weight": 0.0},
    "spectral norm": {"d_spectral_norm": True},
    "D never waits": {"d_max_accuracy": None},
    "no warm-up": {"d_warmup_steps": 0, "d_warmup_accuracy": None},
    "roll-outs at even distances": {"rollout_at": "strided"},
    "dense": {"estimator": "dense", "discriminator": "mamba", "r1_weight": 0.0},
    "terminal": {"estimator": "terminal"},
    "nothing but REINFORCE": {
        **{"baseline": "none", "normalize_advantages": False, "advantage_clip": None, "ppo_epochs": 1},
        **{"ppo_clip": None, "kl_coef": 0.0, "kl_target": None, "entropy_coef": 0.0, "mle_weight": 0.0},
        **{"mle_weight_final": None, "ema_decay": 0.0, "replay_size": 0, "replay_fraction": 0.0},
        **{"label_smoothing": 0.0, "r1_weight": 0.0, "d_max_accuracy": None},
    },
}
# What is compared, before and after, of the evaluations of a run.
MEASURES = ("eval_loss", "eval_self_bleu_4", "eval_distinct_4", "eval_d_accuracy")


def run(arm: str, seed: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of an arm: its evaluations, or the end of what it printed."""
    output = folder / f"{arm.replace(' ', '-')}-{seed}"
    recipe = yaml.safe_load((RECIPES / f"{args.recipe}.yaml").read_text())
    recipe |= {"model": args.model, "data": args.data, "output_dir": str(output), "seed": seed}
    recipe |= {"sequence_length": args.length, "disable_tqdm": True, **ARMS[arm]}
    if args.steps:
        recipe["max_steps"] = args.steps
    config = folder / f"{output.name}.yaml"
    config.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "midimamba.training.adversarial", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    row: dict[str, Any] = {"arm": arm, "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
    state = output / "trainer_state.json"
    if process.returncode or not state.exists():
        return {**row, "finished": False, "error": process.stderr[-2000:]}
    history = json.loads(state.read_text())["log_history"]
    for measure in MEASURES:
        values = [entry[measure] for entry in history if measure in entry]
        row[measure] = [values[0], values[-1]]
    row["rollbacks"] = max((entry.get("rollbacks", 0) for entry in history), default=0)
    row["losses_finite"] = all(abs(entry["loss"]) < float("inf") for entry in history if "loss" in entry)
    if not args.keep:
        shutil.rmtree(output)
        shutil.rmtree(f"{output}-discriminator")
    return {**row, "finished": True}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of one arm: mean and standard deviation of what changed, and the worst likelihood and diversity."""
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
    for name, values in changes.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        result[name] = [round(statistics.mean(values), 4), round(spread, 4)]
    result["worst"] = {name: round(max(changes[name]), 4) for name in ("nll_percent", "self_bleu_4")}
    result["rollbacks"] = sum(row["rollbacks"] for row in finished)
    result["all_finite"] = all(row["losses_finite"] for row in finished)
    result["seconds"] = round(statistics.median(row["seconds"] for row in finished), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/ablation.py --model runs/demo/pretrained --data runs/demo/data "
        "--arms stable constant random --seeds 10 --rows ablation.jsonl",
    )
    parser.add_argument("--model", required=True, help="pre-trained generator")
    parser.add_argument("--data", required=True, help="its corpus")
    parser.add_argument("--recipe", default="stable-adversarial", help="recipe (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="arms (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="generator steps (default: the recipe's)")
    parser.add_argument("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    parser.add_argument("--rows", type=Path, required=True, help="file that keeps a line a run, and is gone on from")
    parser.add_argument("--keep", action="store_true", help="keep what the runs wrote, beside the rows")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    # Seed by seed, so that an interrupted run has all arms at some of the seeds.
    todo = [(arm, seed) for seed in range(args.seeds) for arm in args.arms if (arm, seed) not in done]
    folder = args.rows.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.workers) as pool, args.rows.open("a") as file:
        for done_run in as_completed([pool.submit(run, arm, seed, args, folder) for arm, seed in todo]):
            rows.append(done_run.result())
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(rows[-1], flush=True)
    arms = {arm: summary([r for r in rows if r["arm"] == arm and r["seed"] < args.seeds]) for arm in args.arms}
    for arm, result in arms.items():
        print(f"{arm:30s} {result}")
    nll = arms.get("stable", {}).get("nll_percent")
    finish(
        {
            "benchmark": "ablation",
            "compared": "held-out negative log-likelihood after and before the recipe",
            "ratio": round(1 + nll[0] / 100, 4) if nll else None,
            "arms": arms,
            "sizes": {"model": args.model, "data": args.data, "length": args.length, "steps": args.steps},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
