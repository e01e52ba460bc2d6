"""Does adversarial training help music? Against the same model by maximum likelihood, at its best temperature, too.

From one pre-trained generator go on `stable`, the adversarial recipe; `more`, maximum likelihood for as long as that
took, with the weights that were best on the validation split; and the controls `constant` and `random`, whose rewards
know nothing. `mle` is the generator itself. Seeds are of training and of everything that is measured, so that arms are
compared seed by seed.

Every arm is sampled at every temperature and compared with the validation split, as `midimamba evaluate` does. The
temperature that is nearest to real music there, by overlapping areas and by the better one of two fresh classifiers,
is the one at which it meets the test split, once. The last line is JSON: of every arm the mean and the standard
deviation over seeds, the floor, which is what real music gets, its difference to `mle` with an interval of 95 %, and
which of the targets are reached. `ratio` is the classifier's distance from chance for `mle` over that for `stable`.

`--trial` looks for a better recipe: it runs `stable` with other options (`--set`) on the validation split alone, and
adds hypothesis, change and result to a file.

A run is a process of its own on one thread. What is done is kept, and a second start goes on from there.
"""

import argparse
import functools
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from symusic import Score
from symusic.core import ScoreTick

from measure import finish
from midimamba.evaluation.comparison import read_reference
from midimamba.evaluation.listening import write_listening_test
from music_runs import REPETITION, Settings, run
from resumable import Job, Row, difference, make_runs, mean_and_deviation, rows_done
from tuning import RECIPES

ARMS = ("mle", "more", "stable", "constant", "random")
# What the summary shows, of all that a row has.
MEASURES = (
    *("classifier", "classifier_features", "classifier_tokens", "mean_overlapping_area", "frechet_distance"),
    *REPETITION,
    *("held_out_nll_per_token", "copied_runs_8", "copied_runs_12", "longest_copy", "distinct_4", "self_bleu_4"),
)
LISTENED = 8  # pieces of every arm


def summary(rows: Sequence[Row], origins: Mapping[int, Row], split: str) -> dict[str, Any]:
    """Of the runs of one arm, by measure: mean and deviation over seeds, the floor, and the difference to `mle`."""
    result: dict[str, Any] = {
        "runs": len(rows),
        "temperatures": [row["temperature"] for row in rows],
        "cpu_seconds": round(statistics.median(row["cpu_seconds"] for row in rows)),
    }
    # Where too few sequences were long enough, a figure is missing.
    known = [name for name in MEASURES if all(row[split][name] is not None for row in (*rows, *origins.values()))]
    for name in known:
        values = [row[split][name] for row in rows]
        result[name] = {"value": mean_and_deviation(values)}
        if name in rows[0][f"{split}_floor"]:
            result[name]["floor"] = round(statistics.mean(row[f"{split}_floor"][name] for row in rows), 4)
        if all(row["seed"] in origins for row in rows) and rows[0]["arm"] != "mle":
            theirs = [origins[row["seed"]][split][name] for row in rows]
            result[name]["minus_mle"] = difference(values, theirs)
    return result


def targets(ours: Mapping[str, Any], mle: Mapping[str, Any]) -> dict[str, bool]:
    """Which of the aims an arm reaches against `mle`: means over seeds, to be read beside their intervals."""

    def mean(arm: Mapping[str, Any], name: str) -> float:
        value: float = arm[name]["value"][0]
        return value

    nearer = abs(mean(mle, "classifier") - 0.5) - abs(mean(ours, "classifier") - 0.5)
    return {
        "classifier at least 5 points nearer to chance": nearer >= 0.05,
        "mean overlapping area at least 0.02 higher": ours["mean_overlapping_area"]["minus_mle"]["mean"] >= 0.02,
        "no more copied than in real music": mean(ours, "copied_runs_12") <= ours["copied_runs_12"]["floor"],
        "held-out NLL at most 3 % higher": mean(ours, "held_out_nll_per_token")
        <= 1.03 * mean(mle, "held_out_nll_per_token"),
    }


def measure(settings: Settings, arms: Sequence[str], seeds: int, workers: int, rows: Path) -> dict[Job, Row]:
    """Make the runs that are missing; all kept runs of these settings, by arm and seed."""
    folder = rows.with_suffix("") / settings.key
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [*arms, *(["stable"] if "more" in arms and "stable" not in arms else [])]
    # Seed by seed, so that an interrupted benchmark has all arms at some of the seeds.
    jobs = [(arm, seed) for seed in range(seeds) for arm in wanted]
    jobs = [job for job in jobs if job not in rows_done(rows, asdict(settings))]
    # How long `more` may take is known when `stable` is done.
    for phase in ([job for job in jobs if job[0] != "more"], [job for job in jobs if job[0] == "more"]):
        done = rows_done(rows, asdict(settings))
        budgets = {seed: row["cpu_seconds"] for (arm, seed), row in done.items() if arm == "stable"}
        make = functools.partial(run, settings=settings, folder=folder, budgets=budgets)
        for row in make_runs(phase, make, rows, workers):
            shown = {name: row["validation"][name] for name in ("classifier", "mean_overlapping_area")}
            print(f"{row['arm']} {row['seed']}: temperature {row['temperature']}, {shown}", flush=True)
    return rows_done(rows, asdict(settings))


def listening_test(folder: Path, rows: Path, settings: Settings, arms: Sequence[str]) -> None:
    """A blind test of the first seed's samples of each arm, among real pieces of the test split."""
    samples = rows.with_suffix("") / settings.key
    groups: dict[str, list[ScoreTick]] = {
        arm: [Score(file) for file in sorted((samples / f"{arm}-0").glob("*.mid"))[:LISTENED]] for arm in arms
    }
    pieces = read_reference(settings.data, "test", settings.bars).pieces
    groups["real"] = [piece.score for piece in random.Random(0).sample(pieces, min(LISTENED, len(pieces)))]
    write_listening_test(folder, groups, bars=settings.bars)


def add_trial(file: Path, hypothesis: str, arm: str, arms: Mapping[str, Any], settings: Settings) -> None:
    """Append what was tried and what came out, so that nothing is tried twice and nothing is forgotten."""
    names = ("temperatures", "classifier", "mean_overlapping_area", "held_out_nll_per_token", "self_bleu_4")
    trial, mle = ({name: result[name] for name in names if name in result} for result in (arms[arm], arms["mle"]))
    entry = {"hypothesis": hypothesis, "change": json.loads(arm.removeprefix("trial ")), "split": "validation"}
    with file.open("a") as lines:
        lines.write(json.dumps({**entry, "trial": trial, "mle": mle, "settings": asdict(settings)}) + "\n")


def option(text: str) -> Any:
    """The value that an option's text stands for. YAML takes `2e-4` for a word."""
    try:
        return float(text) if "e" in text else json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def parse() -> argparse.Namespace:
    own = Settings("", "")
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/music.py --model pretrained --data data --rows music.jsonl --listen test",
    )
    add = parser.add_argument
    add("--model", required=True, help="pre-trained generator")
    add("--data", required=True, help="its corpus")
    add("--recipe", default=own.recipe, choices=sorted(file.stem for file in RECIPES.glob("*adversarial.yaml")))
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms (default: all)")
    add("--seeds", type=int, default=3, help="runs of each (default: %(default)s)")
    add("--length", type=int, default=own.length, help="tokens a training sequence (default: %(default)s)")
    add("--steps", type=int, help="generator steps (default: the recipe's)")
    add("--num", type=int, default=own.num, help="pieces sampled for every figure (default: %(default)s)")
    add("--bars", type=int, default=own.bars, help="bars of each that are compared (default: %(default)s)")
    add("--temperatures", type=float, nargs="+", default=own.temperatures, help="tried (default: %(default)s)")
    add("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    add("--rows", type=Path, required=True, help="file that keeps a line a run, and is gone on from")
    add("--listen", type=Path, help="folder to make: a blind listening test of the samples")
    add("--trial", metavar="HYPOTHESIS", help="try options on the validation split alone; say what you expect")
    add("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="of the trial, such as ppo_epochs=4")
    add("--trials", type=Path, default=Path("benchmarks/results/trials.jsonl"), help="file (default: %(default)s)")
    add("--out", type=Path, help="also write the JSON line to this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    settings = Settings(
        **{name: getattr(args, name) for name in ("model", "data", "recipe", "length", "steps", "num", "bars")},
        temperatures=args.temperatures,
    )
    split, arms = "test", ["mle", *(arm for arm in args.arms if arm != "mle")]
    if args.trial:
        options = {key: option(value) for key, _, value in (pair.partition("=") for pair in args.set)}
        split, arms = "validation", ["mle", f"trial {json.dumps(options, sort_keys=True)}"]
    done = measure(settings, arms, args.seeds, args.workers, args.rows)
    by_arm = {arm: [done[arm, seed] for seed in range(args.seeds)] for arm in arms}
    origins = {row["seed"]: row for row in by_arm["mle"]}
    results = {arm: summary(rows, origins, split) for arm, rows in by_arm.items()}
    for arm, result in results.items():
        print(f"{arm:10s} {result}")
    if args.trial:
        add_trial(args.trials, args.trial, arms[1], results, settings)
    if args.listen:
        listening_test(args.listen, args.rows, settings, arms)
    ours = arms[1] if args.trial else "stable"
    compared = results.get(ours)
    distances = [abs(results[arm]["classifier"]["value"][0] - 0.5) for arm in ("mle", ours) if arm in results]
    finish(
        {
            "benchmark": "music",
            "compared": "the better of two fresh classifiers' distance from chance: maximum likelihood at its best "
            f"temperature over {ours} at its own",
            "ratio": round(distances[0] / distances[1], 4) if compared and distances[1] else None,
            "split": split,
            "arms": results,
            "targets": targets(compared, results["mle"]) if compared else None,
            "settings": asdict(settings),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
