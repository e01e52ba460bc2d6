"""Does adversarial training help music? Adversarial arms against maximum likelihood, each at its best temperature.

All arms start from one pre-trained generator. `mle` is the generator itself. `stable` is the adversarial recipe.
`more` is maximum likelihood for as long as `stable` took, with the weights that were best on the validation split.
`constant` and `random` are controls whose rewards carry no information. A seed sets both training and all
measurements, so that arms are compared seed by seed.

Every arm is sampled at every temperature and compared with the validation split, as `midimamba evaluate` does. The
temperature that is closest to real music there, by overlapping areas and by the better of two fresh classifiers, is
used once on the test split. The last line is JSON. For every arm it has the mean and the standard deviation over
seeds, the floor (the figure of real music), the difference from `mle` with a 95 % interval, and which of the targets
are reached. `ratio` is the classifier's distance from chance for `mle` over that for `stable`.

`--trial` searches for a better recipe: it runs `stable` with other options (`--set`) on the validation split only, and
adds the hypothesis, the change and the result to a file.

Every run is a separate process with one thread. Finished runs are kept, and a second start continues from them.
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

from measure import add_temperatures, finish, make_parser
from midimamba.evaluation.comparison import read_reference
from midimamba.evaluation.listening import write_listening_test
from music_runs import REPETITION, Settings, run
from resumable import Job, Row, difference, make_runs, mean_and_deviation, rows_done
from tuning import RECIPES

ARMS = ("mle", "more", "stable", "constant", "random")
# The figures of a row that the summary shows.
MEASURES = (
    *("classifier", "classifier_features", "classifier_tokens", "mean_overlapping_area", "frechet_distance"),
    *REPETITION,
    *("held_out_nll_per_token", "copied_runs_8", "copied_runs_12", "longest_copy", "distinct_4", "self_bleu_4"),
)
_RECIPE_NAMES = sorted(file.stem for file in RECIPES.glob("*adversarial.yaml"))
LISTENED = 8  # pieces per arm


def summary(rows: Sequence[Row], origins: Mapping[int, Row], split: str) -> dict[str, Any]:
    """Summarize the runs of one arm: mean and deviation over seeds, the floor, and the difference from `mle`."""
    result: dict[str, Any] = {
        "runs": len(rows),
        "temperatures": [row["temperature"] for row in rows],
        "cpu_seconds": round(statistics.median(row["cpu_seconds"] for row in rows)),
    }
    # A figure is missing if too few sequences were long enough.
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
    """The targets that an arm reaches compared with `mle`: means over seeds, to be read beside their intervals."""

    def mean(arm: Mapping[str, Any], name: str) -> float:
        value: float = arm[name]["value"][0]
        return value

    gain = abs(mean(mle, "classifier") - 0.5) - abs(mean(ours, "classifier") - 0.5)
    return {
        "classifier at least 5 points closer to chance": gain >= 0.05,
        "mean overlapping area at least 0.02 higher": ours["mean_overlapping_area"]["minus_mle"]["mean"] >= 0.02,
        "no more copies than in real music": mean(ours, "copied_runs_12") <= ours["copied_runs_12"]["floor"],
        "held-out NLL at most 3 % higher": mean(ours, "held_out_nll_per_token")
        <= 1.03 * mean(mle, "held_out_nll_per_token"),
    }


def measure(settings: Settings, arms: Sequence[str], seeds: int, workers: int, rows: Path) -> dict[Job, Row]:
    """Make the runs that are missing; return all runs with these settings, by arm and seed."""
    folder = rows.with_suffix("") / settings.key
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [*arms, *(["stable"] if "more" in arms and "stable" not in arms else [])]
    # Seed by seed, so that an interrupted benchmark has all arms for some of the seeds.
    jobs = [(arm, seed) for seed in range(seeds) for arm in wanted]
    jobs = [job for job in jobs if job not in rows_done(rows, asdict(settings))]
    # The time that `more` may take is known only when `stable` is done.
    for phase in ([job for job in jobs if job[0] != "more"], [job for job in jobs if job[0] == "more"]):
        done = rows_done(rows, asdict(settings))
        budgets = {seed: row["cpu_seconds"] for (arm, seed), row in done.items() if arm == "stable"}
        make = functools.partial(run, settings=settings, folder=folder, budgets=budgets)
        for row in make_runs(phase, make, rows, workers):
            shown = {name: row["validation"][name] for name in ("classifier", "mean_overlapping_area")}
            print(f"{row['arm']} {row['seed']}: temperature {row['temperature']}, {shown}", flush=True)
    return rows_done(rows, asdict(settings))


def listening_test(folder: Path, rows: Path, settings: Settings, arms: Sequence[str]) -> None:
    """Write a blind test: samples of every arm from the first seed, and real pieces of the test split."""
    samples = rows.with_suffix("") / settings.key
    groups: dict[str, list[ScoreTick]] = {
        arm: [Score(file) for file in sorted((samples / f"{arm}-0").glob("*.mid"))[:LISTENED]] for arm in arms
    }
    pieces = read_reference(settings.data, "test", settings.bars).pieces
    groups["real"] = [piece.score for piece in random.Random(0).sample(pieces, min(LISTENED, len(pieces)))]
    write_listening_test(folder, groups, bars=settings.bars)


def add_trial(file: Path, hypothesis: str, arm: str, arms: Mapping[str, Any], settings: Settings) -> None:
    """Append a trial and its result to the file, so that nothing is tried twice and nothing is forgotten."""
    names = ("temperatures", "classifier", "mean_overlapping_area", "held_out_nll_per_token", "self_bleu_4")
    trial, mle = ({name: result[name] for name in names if name in result} for result in (arms[arm], arms["mle"]))
    entry = {"hypothesis": hypothesis, "change": json.loads(arm.removeprefix("trial ")), "split": "validation"}
    with file.open("a") as lines:
        lines.write(json.dumps({**entry, "trial": trial, "mle": mle, "settings": asdict(settings)}) + "\n")


def option(text: str) -> Any:
    """The value that the text of an option stands for. YAML reads `2e-4` as a string."""
    try:
        return float(text) if "e" in text else json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def parse() -> argparse.Namespace:
    own = Settings("", "")
    parser = make_parser(__doc__, "music.py --model pretrained --data data --rows music.jsonl --listen test")
    add = parser.add_argument
    add("--model", required=True, help="pre-trained generator")
    add("--data", required=True, help="its corpus")
    add("--recipe", default=own.recipe, choices=_RECIPE_NAMES, help="(default: %(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms (default: all)")
    add("--seeds", type=int, default=3, help="runs per arm (default: %(default)s)")
    add("--length", type=int, default=own.length, help="tokens per training sequence (default: %(default)s)")
    add("--steps", type=int, help="generator steps (default: those of the recipe)")
    add("--num", type=int, default=own.num, help="pieces that are sampled for every figure (default: %(default)s)")
    add("--bars", type=int, default=own.bars, help="bars per piece that are compared (default: %(default)s)")
    add_temperatures(parser, own.temperatures)
    add("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    add("--rows", type=Path, required=True, help="file with one line per run, from which a second start continues")
    add("--listen", type=Path, help="write a blind listening test of the samples to this new folder")
    add("--trial", metavar="HYPOTHESIS", help="try options on the validation split only; say what you expect")
    add("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of the trial, such as ppo_epochs=4")
    add(
        "--trials",
        type=Path,
        default=Path("benchmarks/results/trials.jsonl"),
        help="file of all trials (default: %(default)s)",
    )
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
