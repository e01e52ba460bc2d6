"""Does a discriminator teach? Arms that use one against maximum likelihood, and controls that know nothing.

Every seed has a generator of its own, pre-trained with look-back, and a temperature that was best on the validation
split; all arms of the seed share both. `mle` is that generator. `best of 8` takes one of eight draws of it, in
proportion to the odds of two discriminators. `distilled` and `policy gradient` train it with them. `more` is as much
more maximum likelihood, `paper` Algorithm 1 with a few roll-outs. `distilled, more draws` learns from twice as many
pieces out of four times the draws. `distilled, best of 8` takes one of eight draws of `distilled`. Controls choose
or train by log-odds that were shuffled among the draws, by random weightings of the same spread, by likelihood, by a
constant or a random reward.

Discriminators learn from half of the training pieces. The judges that measure learn from the other half and from half
of an arm's samples, and are tested on the other half and on held-out music. An arm is compared with another one seed
by seed: the mean difference with a 95 % interval by the t distribution, and an exact permutation test of the signs,
with Holm's correction over the two judges. `ratio` is the classifier's distance from chance for `best of 8` over that
for `mle`.

The hypotheses and the rule of success are in benchmarks/README.md. They were committed before the test split was read.

Every run is a separate process with one thread. Finished runs are kept, and a second start continues from them.
"""

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from music_judging import halve

from measure import add_temperatures, finish, make_parser
from midimamba.evaluation.rendering import import_demo, save_figure
from music_runs import CHOSEN, MLE, NOT_REFITTED, TAUGHT_AND_CHOSEN, TRAINED, Settings, run
from resumable import Job, Row, complete, difference, mean_and_deviation
from tuning import option

JUDGES = ("classifier", "token_classifier")
"""The primary and the co-primary figure."""
RUNS = (CHOSEN, "more", *TRAINED, "paper", *TAUGHT_AND_CHOSEN, NOT_REFITTED)
OURS = ("best of 8", "distilled", "distilled, more draws", "policy gradient", *TAUGHT_AND_CHOSEN)
"""Arms that a discriminator teaches; the others are parts of them or controls."""
Figures = dict[str, dict[int, dict[str, float]]]
"""By arm, seed and name."""


def figures_by_arm(rows: Sequence[Row]) -> Figures:
    """The figures of every arm, those that share a run taken apart."""
    found: Figures = {}
    for row in rows:
        arms = row["arms"] if row["arm"] == CHOSEN else {row["arm"]: row["figures"]}
        for arm, figures in arms.items():
            found.setdefault(arm, {})[row["seed"]] = figures
    return found


def permutation_p_value(differences: Sequence[float]) -> float:
    """How often the mean of the differences is as far from 0 if their signs are drawn by chance, over all signs."""
    observed = abs(statistics.mean(differences))
    signs = itertools.product((1, -1), repeat=len(differences))
    means = [abs(statistics.mean(a * b for a, b in zip(each, differences, strict=True))) for each in signs]
    return statistics.mean(mean >= observed - 1e-12 for mean in means)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for having made several tests."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def compare(ours: Mapping[int, Mapping[str, float]], theirs: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Every figure of an arm minus that of another, paired by seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    names = [name for name in ours[seeds[0]] if name in theirs[seeds[0]]]
    pairs = {name: [ours[seed][name] - theirs[seed][name] for seed in seeds] for name in names}
    compared: dict[str, Any] = {name: difference(values, [0.0] * len(seeds)) for name, values in pairs.items()}
    for name, p_value in zip(JUDGES, holm([permutation_p_value(pairs[name]) for name in JUDGES]), strict=True):
        compared[name]["p_value"] = round(p_value, 4)
    return compared


def summary(arms: Figures) -> dict[str, Any]:
    """Of every arm, mean and deviation over seeds, and the difference from `mle`."""
    result: dict[str, Any] = {}
    for arm, seeds in arms.items():
        names = next(iter(seeds.values()))
        result[arm] = {name: mean_and_deviation([seeds[seed][name] for seed in sorted(seeds)]) for name in names}
        result[arm]["seeds"] = len(seeds)
        if arm != MLE:
            result[arm]["minus_mle"] = compare(seeds, arms[MLE])
    return result


def against_controls(arms: Figures, arm: str, controls: Sequence[str]) -> dict[str, Any]:
    """The primary figure of an arm minus that of each control."""
    return {control: compare(arms[arm], arms[control])["classifier"] for control in controls if control in arms}


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A picture: how much less often than on `mle` each judge is right, with 95 % intervals over seeds."""
    arms = [arm for arm in results if arm != MLE]
    figure = import_demo("matplotlib.figure").Figure(figsize=(9, 1.2 + 0.3 * len(arms)), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(JUDGES), sharey=True)
    for panel, judge in zip(panels, JUDGES, strict=True):
        gap = results[MLE][judge][0] - 0.5
        panel.axvline(0, color="0.6", linewidth=0.8)
        panel.axvline(-gap, color="0.6", linewidth=0.8, linestyle=":")
        for row, arm in enumerate(arms):
            found = results[arm]["minus_mle"][judge]
            low, high = found["interval"] or [found["mean"]] * 2
            colour = "C0" if arm in OURS else "0.45"
            panel.plot([low, high], [row, row], color=colour, linewidth=2)
            panel.plot(found["mean"], row, "o", color=colour, markersize=5)
        panel.set_title(judge.replace("_", " "))
        panel.set_xlabel("accuracy minus that on mle (dotted: chance)")
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    save_figure(figure, path)


def add_trial(file: Path, hypothesis: str, arm: str, arms: Figures, settings: Settings) -> None:
    """Append a trial and its result to the file, so that nothing is tried twice and nothing is forgotten."""
    entry = {"hypothesis": hypothesis, "change": json.loads(arm.removeprefix("trial ")), "split": settings.split}
    with file.open("a") as lines:
        lines.write(json.dumps({**entry, "trial": arms[arm], "mle": arms[MLE], "settings": asdict(settings)}) + "\n")


def parse() -> argparse.Namespace:
    own = Settings("")
    parser = make_parser(__doc__, "music.py --data data --rows music.jsonl")
    add = parser.add_argument
    add("--data", required=True, help="corpus made by `midimamba tokenize`")
    add("--split", choices=("validation", "test"), default=own.split, help="to measure on (default: %(default)s)")
    runs = f"runs to make (default: all): {'; '.join(RUNS)}"
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=runs)
    add("--seeds", type=int, default=8, help="generators (default: %(default)s)")
    add("--first-seed", type=int, default=0, help="the first of them (default: %(default)s)")
    add("--num", type=int, default=own.num, help="pieces per figure (default: %(default)s)")
    add("--bars", type=int, default=own.bars, help="bars per piece (default: %(default)s)")
    add("--steps", type=int, default=own.steps, help="of pre-training (default: %(default)s)")
    add("--draws", type=int, default=own.draws, help="for discriminators and for training (default: %(default)s)")
    add_temperatures(parser, own.temperatures)
    add("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    add("--rows", type=Path, required=True, help="file with one line per run, from which a second start continues")
    add("--plot", type=Path, help="draw the differences into this file")
    add("--trial", metavar="HYPOTHESIS", help="try another recipe, on the validation split only: what it should show")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of the trial")
    add("--trials", type=Path, default=Path("trials.jsonl"), help="where trials are kept (default: %(default)s)")
    args = parser.parse_args()
    if args.trial and args.split != "validation":
        parser.error("a trial is measured on the validation split")
    return args


def described(row: Row) -> str:
    """Without a figure: a test is read when all its seeds are there."""
    return f"{row['arm']}, seed {row['seed']}: {row['cpu_seconds']:.0f} s of processor time"


def main() -> None:
    args = parse()
    names = ("data", "split", "num", "bars", "temperatures", "steps", "draws")
    settings = Settings(**{name: getattr(args, name) for name in names})
    runs = [CHOSEN, *(name for name in args.runs if name != CHOSEN)]  # it makes the generator that all others need
    trial = ""
    if args.trial:
        changes = dict(pair.split("=", 1) for pair in args.set)
        trial = f"trial {json.dumps({name: option(value) for name, value in changes.items()})}"
        runs = [CHOSEN, trial]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    folder = args.rows.with_suffix("")
    halve(args.data, 0, folder / "half")  # before several runs would make it at once
    jobs = [(arm, seed) for seed in seeds for arm in runs]
    make = functools.partial(run, settings=settings, folder=folder)
    for phase in ([job for job in jobs if job[0] == CHOSEN], [job for job in jobs if job[0] != CHOSEN]):
        done = complete(phase, make, asdict(settings), args.rows, args.workers, described)
    kept = {job: row for job, row in done.items() if job[0] in (CHOSEN, trial, *(() if trial else RUNS))}
    arms = figures_by_arm(list(kept.values()))
    if trial:
        add_trial(args.trials, args.trial, trial, arms, settings)
    finish(report(kept, arms) | {"settings": asdict(settings)}, args.out)
    if args.plot:
        plot(summary(arms), args.plot)


def report(rows: Mapping[Job, Row], arms: Figures) -> dict[str, Any]:
    """What all kept runs show, those of earlier starts as well."""
    controls = {
        "best of 8": [name for name in arms if name.startswith("best of 8, ") and name not in USED],
        "distilled": ["distilled, constant", "distilled, shuffled", "more"],
        "distilled, more draws": [
            *("distilled", "distilled, more draws, constant", "distilled, more draws, shuffled", "more"),
        ],
        "policy gradient": ["policy gradient, random", "policy gradient, shuffled", "more"],
        **{arm: ["best of 8", origin] for arm, origin in TAUGHT_AND_CHOSEN.items()},
        NOT_REFITTED: ["best of 8", "distilled"],
    }
    results = summary(arms)
    cpu_seconds: dict[str, list[float]] = {}
    for (arm, _), row in rows.items():
        cpu_seconds.setdefault(arm, []).append(row["cpu_seconds"])
    names = ("temperature", "effective", "auc", "likelihood_gain")
    return {
        "benchmark": "music",
        "compared": "a fresh classifier's distance from chance for best of 8, over that for mle",
        "ratio": round((results["best of 8"]["classifier"][0] - 0.5) / (results[MLE]["classifier"][0] - 0.5), 4),
        "arms": results,
        "against_controls": {
            arm: against_controls(arms, arm, found) for arm, found in controls.items() if arm in arms
        },
        "seeds": {seed: {name: row[name] for name in names} for (arm, seed), row in rows.items() if arm == CHOSEN},
        "cpu_seconds": {arm: statistics.median(values) for arm, values in cpu_seconds.items()},
    }


USED = ("best of 8, tokens", "best of 8, music")
"""Parts of the ensemble, which are no controls."""

if __name__ == "__main__":
    main()
