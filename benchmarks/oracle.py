"""SeqGAN's synthetic benchmark: generators learn an oracle, an LSTM with random weights that can score their samples.

NLL_oracle, the negative log-likelihood of a generator's samples under the oracle, measures quality alone, and **can be
gamed**: anything that sharpens a generator lowers it. The oracle itself scores 5.75 with the original parameters, and
3.3 at inverse temperature 2. A lower figure is not a better one, and a figure below that of the oracle proves that
diversity was lost. The literature compares NLL_oracle + NLL_test, where NLL_test is that of held-out samples of the
oracle under the generator, at the inverse temperature where the sum is lowest (Caccia et al., "Language GANs Falling
Short", arXiv 1811.02549). An inverse temperature multiplies the logits in sampling, and in scoring before they are
normalised again.

The sum can be gamed as well, though less: when a distribution is sharpened, the first term falls at once, while the
second rises only to second order. The sum of the oracle itself is 11.5, and 10.3 at inverse temperature 1.5, so
"perfect" is not a lower bound. This is why `divergence` is reported as well: the symmetric Kullback-Leibler
divergence, which is 0 only for the oracle.

`mle` (a Mamba), `mle-lstm` and `mle-lstm-paper` learn by maximum likelihood. The first two stop early on separate
samples that are not those of NLL_test. The LSTM of the paper runs through all its epochs and overfits, which lowers
its NLL_oracle and raises its NLL_test. The adversarial arms start from one of these with the same seed, with the
recipes of training/recipes: `paper` from the LSTM of the paper, with its learning rate, and `stable` from the Mamba.
`paper-10000` is `paper` with a discriminator that sees 10,000 samples in every round, as that of the original does.
`constant` and `random` are `paper` with a reward without information, and `stable-constant` and `stable-random` are
the same for `stable`: what they change was not learned from a discriminator. `oracle` is measured as a generator.

A run is one arm with one seed, in a process with one thread. It is kept as a line of JSON, and a second start
continues from these lines; lines of other settings are ignored. The last line is JSON: for every arm, the mean and the
standard deviation over seeds. `ratio` is the published best sum of tuned maximum likelihood over that of our best arm
of maximum likelihood, if the oracle is the original one.
"""

import argparse
import functools
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, set_seed

from measure import finish, make_parser
from midimamba import MidiMambaForCausalLM
from midimamba.evaluation.rendering import import_demo, save_figure
from midimamba.training.adversarial import AdversarialArguments
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.scripts import RecipeParser, load_discriminator
from oracle_models import Generator, LSTMLanguageModel, Oracle, Recipe, fit, sweep
from resumable import Job, Row, difference, make_runs, mean_and_deviation, rows_done
from tuning import CONSTANT, RANDOM, read_recipe

# The Mamba is as narrow as the oracle, and has weight decay: a Gaussian prior, like that of the oracle's parameters.
# The LSTMs are that of the paper and a wider one with dropout.
LIKELIHOOD = {
    "mle": Recipe("mamba", 32, 0.1, learning_rate=3e-3, weight_decay=1.0, batch_size=128),
    "mle-lstm": Recipe("lstm", 64, 0.5, learning_rate=2e-3, weight_decay=0.01, batch_size=128, units=128),
    "mle-lstm-paper": Recipe(
        "lstm", 32, 0.0, learning_rate=1e-2, weight_decay=0.0, batch_size=64, units=32, stops_early=False
    ),
}


@dataclass(frozen=True)
class Tuning:
    """
    An adversarial arm.

    Args:
        origin (`str`): the arm of maximum likelihood that it starts from.
        recipe (`str`): the name of a recipe in training/recipes.
        options (`dict[str, Any]`): options that override those of the recipe.
    """

    origin: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)


PAPER = functools.partial(Tuning, "mle-lstm-paper", "paper-adversarial")
STABLE = functools.partial(Tuning, "mle", "stable-adversarial")
# The learning rate of an LSTM with 32 units, and fewer steps than the 200 of the paper: each takes ten seconds.
PAPER_OPTIONS = {"learning_rate": 1e-2, "max_steps": 60}
# Batches of 64 samples: about 10,000 in a round, as in the original code, and ten times as many before the first.
LONG = {"d_steps": 157, "d_warmup_steps": 1570}
ADVERSARIAL = {
    "paper": PAPER(PAPER_OPTIONS),
    "paper-10000": PAPER(PAPER_OPTIONS | LONG),
    "constant": PAPER(PAPER_OPTIONS | CONSTANT),
    "random": PAPER(PAPER_OPTIONS | RANDOM),
    "stable": STABLE(),
    "stable-constant": STABLE(CONSTANT),
    "stable-random": STABLE(RANDOM),
}
ORIGINS: dict[str, type[MidiMambaForCausalLM] | type[LSTMLanguageModel]] = {
    "mle": MidiMambaForCausalLM,
    "mle-lstm-paper": LSTMLanguageModel,
}
ARMS = ("oracle", *LIKELIHOOD, *ADVERSARIAL)
TUNED_MLE = "tuned MLE"
# Best sums over temperature of Caccia et al., with the original parameters.
PUBLISHED = {
    "perfect": 11.5,
    TUNED_MLE: 15.26,
    "CoT": 15.52,
    "GAN + entropy": 15.72,
    "GAN + MLE": 15.83,
    "GAN": 16.15,
    "SeqGAN's code": 18.44,
}
TRAIN_SEED, VALID_SEED, TEST_SEED = 1, 2, 3


@dataclass(frozen=True)
class Settings:
    """
    What all runs have in common. Runs are only compared with runs of the same settings.

    Args:
        oracle (`str`, *optional*): name of the file with the original parameters; by default, an oracle is made.
        vocab_size, hidden_size (`int`): sizes of the oracle that is made.
        length (`int`): tokens per sequence, without the start token.
        samples (`int`): number of training sequences, of test sequences, and of samples for every NLL_oracle.
        epochs, patience (`int`): limits of maximum likelihood, see [`fit`].
        adversarial (`dict[str, Any]`): options that override those of the recipes.
        inverse_temperatures (`list[float]`): the inverse temperatures at which generators are measured.
    """

    oracle: str | None = None
    vocab_size: int = 5000
    hidden_size: int = 32
    length: int = 20
    samples: int = 10_000
    epochs: int = 120
    patience: int = 4
    adversarial: dict[str, Any] = field(default_factory=dict)
    inverse_temperatures: list[float] = field(
        default_factory=lambda: [0.8, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.25, 2.5]
    )

    @property
    def key(self) -> str:
        """A short name of these settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


# Two minutes on two cores. This shows that everything runs; its figures mean nothing.
QUICK = Settings(
    vocab_size=200,
    hidden_size=16,
    length=10,
    samples=1000,
    epochs=8,
    patience=1,
    adversarial={"max_steps": 3, "d_warmup_steps": 2, "num_rollouts": 2},
    inverse_temperatures=[1.0, 1.5, 2.0],
)


@dataclass(frozen=True)
class Problem:
    """The oracle and its samples: sequences `(samples, 1 + length)`."""

    oracle: Oracle
    train: Tensor
    valid: Tensor
    test: Tensor


@functools.cache
def problem_of(oracle: Path | None, vocab_size: int, hidden_size: int, length: int, samples: int) -> Problem:
    """The same problem at every call, drawn once per process. `oracle` is the file with the original parameters."""
    model = Oracle.load(oracle) if oracle else Oracle.seeded(vocab_size, hidden_size)
    train, test = (model.draw(samples, length, seed) for seed in (TRAIN_SEED, TEST_SEED))
    return Problem(model, train, model.draw(max(1, samples // 10), length, VALID_SEED), test)


def run(arm: str, seed: int, settings: Settings, folder: Path, oracle: Path | None) -> Row:
    """One run of an arm: its time, and its sweep over inverse temperatures.

    Args:
        arm (`str`), seed (`int`): which run.
        settings (`Settings`): the settings of all runs.
        folder (`Path`): folder of the generators that adversarial arms start from.
        oracle (`Path`, *optional*): the file that the settings name.
    """
    problem = problem_of(oracle, settings.vocab_size, settings.hidden_size, settings.length, settings.samples)
    start = time.perf_counter()
    set_seed(seed)
    row: Row = {"arm": arm, "seed": seed, "settings": asdict(settings)}
    model: Generator = problem.oracle
    if arm in LIKELIHOOD:
        recipe = LIKELIHOOD[arm]
        model = recipe.build(problem.oracle.lm_head.out_features)
        row["epochs"] = fit(model, recipe, problem.train, problem.valid, settings.epochs, settings.patience)
        if arm in ORIGINS:
            model.save_pretrained(folder / f"{arm}-{seed}")
    elif arm in ADVERSARIAL:
        origin = ADVERSARIAL[arm].origin
        generator = ORIGINS[origin].from_pretrained(folder / f"{origin}-{seed}")
        model, row["training"] = tune(generator, problem, arm, seed, settings, folder / f"{arm}-{seed}")
    row["training_seconds"] = round(time.perf_counter() - start, 1)
    # All arms of a seed use the same random numbers.
    torch.manual_seed(seed)
    row["sweep"] = sweep(model, problem.oracle, problem.test, settings.samples, settings.inverse_temperatures)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def tune(
    model: Generator, problem: Problem, arm: str, seed: int, settings: Settings, folder: Path
) -> tuple[Generator, dict[str, Any]]:
    """Adversarial training of a generator that has learned by maximum likelihood. `folder` is deleted afterwards."""
    # An interrupted run may have left checkpoints, and later ones outlive earlier ones.
    shutil.rmtree(folder, ignore_errors=True)
    tuning = ADVERSARIAL[arm]
    values = read_recipe(tuning.recipe) | tuning.options | settings.adversarial
    values |= {"output_dir": str(folder), "seed": seed, "sequence_length": 1 + settings.length, "prompt_length": 1}
    values |= {"per_device_eval_batch_size": 50, "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
    arguments, args = RecipeParser((AdversarialArguments, AdversarialConfig)).parse_dict(values)
    train, valid = (Dataset.from_dict({"input_ids": rows.tolist()}) for rows in (problem.train, problem.valid))
    discriminator = load_discriminator(arguments, model, args.sequence_length)
    trainer = AdversarialTrainer(model, discriminator, args, train, valid)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    history = trainer.state.log_history
    shutil.rmtree(folder)
    tuned = trainer.generator_for_saving
    assert isinstance(tuned, Generator)
    return tuned, {
        "steps": trainer.state.global_step,
        "rollbacks": max((entry.get("rollbacks", 0) for entry in history), default=0),
        "reward": [entry["reward"] for entry in history if "reward" in entry],
        "d_accuracy": [entry["eval_d_accuracy"] for entry in history if "eval_d_accuracy" in entry],
    }


def measure(
    settings: Settings, arms: Sequence[str], seeds: int, workers: int, rows: Path, oracle: Path | None = None
) -> dict[Job, Row]:
    """Make the runs that are missing. Returns all kept runs of these settings, by arm and seed.

    Args:
        settings (`Settings`): the settings of all runs.
        arms (`Sequence[str]`), seeds (`int`): the arms to run, and the number of runs per arm.
        workers (`int`): the number of runs at once.
        rows (`Path`): the file that keeps the runs.
        oracle (`Path`, *optional*): the file that the settings name.
    """
    folder = rows.with_suffix("") / settings.key
    folder.mkdir(parents=True, exist_ok=True)
    done = rows_done(rows, asdict(settings))
    # Seed by seed, so that an interrupted benchmark has all arms for some of the seeds.
    jobs = [("oracle", 0), *((arm, seed) for seed in range(seeds) for arm in arms if arm != "oracle")]
    jobs = [job for job in jobs if job not in done]
    tuned = [job for job in jobs if job[0] in ADVERSARIAL]
    fitted = [job for job in jobs if job[0] not in ADVERSARIAL]
    # The arms that they start from may not have been asked for, or their generators may be gone.
    origins = sorted({(ADVERSARIAL[arm].origin, seed) for arm, seed in tuned} - set(fitted))
    fitted += [job for job in origins if job not in done or not (folder / f"{job[0]}-{job[1]}").exists()]
    make = functools.partial(run, settings=settings, folder=folder, oracle=oracle)
    for phase in (fitted, tuned):
        for row in make_runs(phase, make, rows, workers):
            print(f"{row['arm']} {row['seed']}: best sum {total(best(row)):.3f}, {row['seconds']} s", flush=True)
    return rows_done(rows, asdict(settings))


def total(point: Mapping[str, float]) -> float:
    """NLL_oracle + NLL_test."""
    return point["nll_oracle"] + point["nll_test"]


def best(row: Row) -> dict[str, float]:
    """The point of a sweep with the lowest sum."""
    return min(row["sweep"], key=total)


def plain(row: Row) -> dict[str, float]:
    """The point of a sweep at inverse temperature 1, where the generator is as it was trained."""
    found: dict[str, float] = next(point for point in row["sweep"] if point["inverse_temperature"] == 1)
    return found


COMPARED: dict[str, Callable[[Row], float]] = {
    "nll_oracle": lambda row: plain(row)["nll_oracle"],
    "nll_test": lambda row: plain(row)["nll_test"],
    "best_sum": lambda row: total(best(row)),
}


def summary(rows: Sequence[Row], done: Mapping[Job, Row]) -> dict[str, Any]:
    """For the runs of one arm: means and deviations. For an adversarial arm, also the differences, seed by seed, from
    the arm of maximum likelihood that it started from, with 95 % intervals."""
    values = {name: [figure(row) for row in rows] for name, figure in COMPARED.items()}
    result: dict[str, Any] = {
        "runs": len(rows),
        **{name: mean_and_deviation(each) for name, each in values.items()},
        "best_at": [best(row)["inverse_temperature"] for row in rows],
        "least_divergence": mean_and_deviation([min(p["divergence"] for p in row["sweep"]) for row in rows]),
        "seconds": round(statistics.median(row["seconds"] for row in rows), 1),
    }
    if rows[0]["arm"] in ADVERSARIAL:
        origins = [done[ADVERSARIAL[row["arm"]].origin, row["seed"]] for row in rows]
        for name, figure in COMPARED.items():
            result[f"{name}_minus_origin"] = difference(values[name], [figure(row) for row in origins])
    return result


def plot(rows: dict[str, list[dict[str, Any]]], path: Path, published: bool) -> None:
    """Plot the frontier of every arm, a mean over seeds, and the published best sums as diagonals. Closer to the lower
    left corner is better. Along a frontier, further right and lower is sharper."""
    figure = import_demo("matplotlib.figure").Figure(figsize=(8, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for arm, runs in rows.items():
        points = [[(p["nll_test"], p["nll_oracle"]) for p in row["sweep"]] for row in runs]
        x, y = torch.tensor(points).mean(0).T.tolist()
        axes.plot(x, y, marker="o", markersize=3, label=f"{arm} ({len(runs)})")
    window = (*axes.get_xlim(), *axes.get_ylim())
    for index, (name, value) in enumerate(PUBLISHED.items() if published else ()):
        axes.axline((0, value), slope=-1, color="grey", linewidth=0.6, linestyle=":")
        # The labels are staggered, since four of the sums lie within 0.6.
        x = window[0] + (0.02 + 0.1 * index) * (window[1] - window[0])
        turned = {"rotation": -45, "rotation_mode": "anchor", "transform_rotates_text": True}
        axes.text(x, value - x, f"{name} {value}", fontsize=6, color="grey", clip_on=True, **turned)
    axes.axis(window)
    axes.set(xlabel="NLL_test, nats per token", ylabel="NLL_oracle, nats per token: can be gamed by sharpening")
    axes.legend(fontsize=7)
    save_figure(figure, path)


def parse() -> argparse.Namespace:
    """The options; `seeds` is set, and `oracle` is an existing file unless it is not read."""
    parser = make_parser(__doc__, "oracle.py --oracle seqgan-oracle.npz --rows oracle.jsonl --plot oracle.png")
    trained = [arm for arm in ARMS if arm != "oracle"]
    own = Settings()
    parser.add_argument("--oracle", type=Path, help="file with the original parameters (default: make an oracle)")
    parser.add_argument(
        "--vocab", type=int, default=own.vocab_size, help="of an oracle made here (default: %(default)s)"
    )
    parser.add_argument("--hidden", type=int, default=own.hidden_size, help="units of the same (default: %(default)s)")
    parser.add_argument("--length", type=int, default=own.length, help="tokens per sequence (default: %(default)s)")
    parser.add_argument(
        "--samples",
        type=int,
        default=own.samples,
        help="sequences to train on, to test on and to draw (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=own.epochs, help="at most, of MLE (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="adversarial steps (default: those of the recipes)")
    parser.add_argument("--quick", action="store_true", help="a small oracle and small models; figures mean nothing")
    parser.add_argument("--arms", nargs="+", choices=trained, default=trained, help="arms (default: all)")
    parser.add_argument("--seeds", type=int, help="runs per arm (default: 5, with --quick 2); 0: only report")
    parser.add_argument("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    parser.add_argument(
        "--rows", type=Path, required=True, help="file with one line per run, from which a second start continues"
    )
    parser.add_argument("--plot", type=Path, help="draw the frontiers to this PNG file")
    args = parser.parse_args()
    args.seeds = (2 if args.quick else 5) if args.seeds is None else args.seeds
    args.oracle = None if args.quick else args.oracle
    if args.oracle and args.seeds and not args.oracle.is_file():
        parser.error(f"{args.oracle}: no such file; name the file with the original parameters, or leave --oracle out")
    return args


def main() -> None:
    args = parse()
    settings, own = QUICK, Settings()
    if not args.quick:
        sizes = {"vocab_size": args.vocab, "hidden_size": args.hidden, "length": args.length, "samples": args.samples}
        steps = {"max_steps": args.steps} if args.steps else {}
        settings = replace(
            own, oracle=args.oracle.name if args.oracle else None, epochs=args.epochs, adversarial=steps, **sizes
        )
    done = measure(settings, args.arms, args.seeds, args.workers, args.rows, args.oracle)
    by_arm = {arm: [done[job] for job in sorted(done) if job[0] == arm] for arm in ("oracle", *args.arms)}
    by_arm = {arm: rows for arm, rows in by_arm.items() if rows}
    arms = {arm: summary(rows, done) for arm, rows in by_arm.items()}
    for arm, result in arms.items():
        print(f"{arm:16s} {result}")
    print("NLL_oracle alone can be gamed by sharpening: a figure below that of the oracle is not better. Compare best")
    print("sums and least divergences.")
    # The published sums are those of the original oracle.
    is_original = settings.oracle is not None and settings.length == own.length
    ours = [result["best_sum"][0] for arm, result in arms.items() if arm in LIKELIHOOD]
    if args.plot:
        plot(by_arm, args.plot, is_original)
    finish(
        {
            "benchmark": "oracle",
            "compared": "published best sum of NLL_oracle and NLL_test of tuned MLE, and ours; NLL_oracle alone can "
            "be gamed by sharpening",
            "ratio": round(PUBLISHED[TUNED_MLE] / min(ours), 4) if is_original and ours else None,
            "arms": arms,
            "oracle_sweep": by_arm["oracle"][0]["sweep"],
            "published_best_sums": PUBLISHED,
            "settings": asdict(settings),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
