"""Does a discriminator teach? Tunes with a form from a process whose likelihood is exact: see form_process.py.

A generator sees few tunes, in all keys, by maximum likelihood (`mle`). The divergence KL(real ‖ generator) that
remains is known exactly, since both sides of it are. All other arms start from `mle` with the same seed, and take the
same processor time:

- `more`: maximum likelihood goes on, and keeps the weights that were best on validation tunes.
- `unlimited`: the same on tunes that never come twice. It shows what this network can reach in this time.
- `exact`: distillation by rounds with the exact log-ratio of the process and the generator as the reward. If it does
  not close the gap that `more` leaves, no discriminator could: distillation itself is at fault.
- `distilled`: the reward is that of two discriminators which have seen the same few tunes: one of tokens, which looks
  back, and one of how sections repeat and how many pitches there are.
- `informed`: the likelihood of a sample under the generator itself is calibrated with these two, as if it were one.
- `likelihood`: that likelihood alone, without any discriminator.
- `constant`, `random`, `shuffled`: distillation with weights that know nothing: equal; normal, as wide as the exact
  ones; and the exact ones in another order.
- `exact-trainer`: the exact reward, and `estimator: distill` of the package's own trainer.
- `exact-gradient`, `gradient`: policy gradient by that trainer, with the exact reward and with a discriminator.

`exact`, `distilled` and the controls have a loop of their own, since samples of so few tokens cost much less than an
optimizer step on them: it draws many, and learns only from those that the weights choose, of all rounds so far. The
trainer learns from each sample of a round once, with its weight.

There are two bases, neither of which looks back: `plain` can hold a section, `small` cannot. KL(real ‖ generator) of a
base that is too small for the process is bounded from below, which `unlimited` shows, and there no reward can close
the gap.

Reported for every arm: KL(real ‖ generator) and KL(generator ‖ real) in nats per tune, the share of samples with one
of the forms, NLL of fresh tunes, and the share of the gap of `more` that is closed, paired by seed. `ratio` is the gap
of `more` over that of `exact` with the base `plain`.

A run is one arm with one seed, kept as a line of JSON; a second start continues from these lines. Seed 0 is not among
them by default: the sizes of the process and of the networks were chosen on it.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from form_arms import (
    BASES,
    QUICK,
    LearnedReward,
    Problem,
    Rewarding,
    Settings,
    distill,
    draw,
    fit,
    log_ratio,
    make_discriminator,
    make_generator,
    make_process,
    pick,
    score,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl, set_seed

from measure import finish, make_parser
from midimamba import MidiMambaForCausalLM
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from resumable import Job, Row, difference, make_runs, mean_and_deviation, rows_done

CONTROLS = ("constant", "random", "shuffled")
# Which judges have learned.
LEARNED: dict[str, dict[str, bool]] = {
    "distilled": {},
    "informed": {"likelihood": True},
    "likelihood": {"discriminators": False, "likelihood": True},
}
DISTILLED = ("exact", *LEARNED, *CONTROLS)
# What the arms of the package's own trainer have in common. Nothing but the reward may move the generator.
COMMON: dict[str, Any] = {
    **{"prompt_length": 1, "reward": "constant", "temperature": 1.0, "rollout_momentum": 0.0, "max_steps": 10_000},
    **{"learning_rate": 2e-3, "weight_decay": 0.0, "ppo_epochs": 1, "kl_coef": 0.0, "kl_target": None},
    **{"entropy_coef": 0.0, "mle_weight": 0.0, "ema_decay": 0.9, "d_steps": 0, "d_warmup_steps": 0},
    **{"d_max_accuracy": None, "label_smoothing": 0.0, "r1_weight": 0.0, "replay_fraction": 0.0},
    **{"max_nll_drift": None, "max_self_bleu_increase": None, "eval_on_start": False, "eval_strategy": "no"},
    **{"save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none"},
}
# Without an anchor a policy gradient drops tunes: it follows KL(generator ‖ real).
GRADIENT: dict[str, Any] = {"estimator": "terminal", "kl_coef": 0.3}
TRAINED: dict[str, dict[str, Any]] = {
    "exact-trainer": {"estimator": "distill"},
    "exact-gradient": GRADIENT,
    "gradient": {**GRADIENT, "reward": "log-odds", "d_steps": 1, "d_epochs": 1, "d_warmup_steps": 60}
    | {"d_learning_rate": 5e-3},
}
ARMS = ("mle", "more", "unlimited", *DISTILLED, *TRAINED)


def reward_of(arm: str, problem: Problem, settings: Settings) -> Rewarding:
    """What an arm of distillation rewards."""

    def exact(model: nn.Module, fake: Tensor) -> Tensor:
        return log_ratio(problem.process, model, fake)

    rewards: dict[str, Rewarding] = {
        "exact": exact,
        "constant": lambda _, fake: torch.zeros(len(fake)),
        "random": lambda model, fake: torch.randn(len(fake)) * exact(model, fake).std().item(),
        "shuffled": lambda model, fake: exact(model, fake)[torch.randperm(len(fake))],
    }
    return LearnedReward(problem, settings, **LEARNED[arm]) if arm in LEARNED else rewards[arm]


class Deadline(TrainerCallback):
    """Ends adversarial training after some processor time, in seconds."""

    def __init__(self, seconds: float):
        self.end = time.process_time() + seconds

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= time.process_time() >= self.end


def tune(
    model: MidiMambaForCausalLM, arm: str, problem: Problem, settings: Settings, folder: Path
) -> tuple[PreTrainedModel, list[float]]:
    """Adversarial training with the package's own trainer, in which a round is a step. `folder` stays empty.

    Returns the generator, and the reward of every round.
    """
    process = problem.process
    args = AdversarialConfig(
        output_dir=str(folder),
        seed=int(torch.randint(2**31, ())),
        sequence_length=process.length,
        mini_batch_size=settings.trainer_batch,
        micro_batch_size=settings.trainer_batch,
        per_device_train_batch_size=settings.trainer_pool,
        **(COMMON | TRAINED[arm]),
    )
    train, valid = (Dataset.from_dict({"input_ids": rows.tolist()}) for rows in (problem.train, problem.valid))
    deadline = Deadline(settings.seconds)
    trainer = AdversarialTrainer(model, make_discriminator(process), args, train, valid, callbacks=[deadline])
    trainer.remove_callback(PrinterCallback)
    if args.d_steps == 0:
        trainer.action_values.reward.control = lambda ids: log_ratio(process, trainer.generator, ids).float()
    trainer.train()
    return trainer.generator_for_saving, [row["reward"] for row in trainer.state.log_history if "reward" in row]


def run(arm: str, seed: int, settings: Settings, folder: Path) -> Row:
    """One run. `arm` is a base and the name of the arm, such as `plain/exact`; `folder` keeps what it starts
    from."""
    base, name = arm.split("/")
    problem = Problem.of(settings, seed)
    start = time.process_time()
    set_seed(seed)
    row: Row = {"arm": arm, "seed": seed, "settings": asdict(settings)}
    model: PreTrainedModel
    if name == "mle":
        model = make_generator(base, problem.process)
        model = fit(model, problem.valid, settings, lambda: pick(problem.train, settings.batch))
        model.save_pretrained(folder / f"{base}-{seed}")
    else:
        model = MidiMambaForCausalLM.from_pretrained(folder / f"{base}-{seed}")
        if name in DISTILLED:
            model, row["effective"] = distill(model, reward_of(name, problem, settings), problem, settings)
        elif name in TRAINED:
            model, row["reward"] = tune(model, name, problem, settings, folder / f"{base}-{name}-{seed}")
        else:
            numbers = torch.Generator().manual_seed(2000 + seed)
            batches: dict[str, Callable[[], Tensor]] = {
                "more": lambda: pick(problem.train, settings.batch),
                "unlimited": lambda: problem.process.sample(settings.batch, numbers),
            }
            model = fit(model, problem.valid, settings, batches[name], settings.seconds)
    row["training_seconds"] = round(time.process_time() - start, 1)
    torch.manual_seed(seed)
    return {**row, **figures(model, problem)}


def figures(model: nn.Module, problem: Problem) -> dict[str, float]:
    """The measures of a generator, in nats per tune."""
    process, real = problem.process, score(model, problem.test)
    fake = draw(model, len(problem.test), process)
    return {
        "kl_real": (process.log_likelihood(problem.test) - real).mean().item(),
        "kl_generator": (score(model, fake) - process.log_likelihood(fake)).mean().item(),
        "form": process.has_form(fake).double().mean().item(),
        "nll": -real.mean().item(),
    }


def measure(settings: Settings, arms: Sequence[str], seeds: Sequence[int], workers: int, rows: Path) -> dict[Job, Row]:
    """Make the runs that are missing, what they start from first. Returns all kept runs of these settings."""
    folder = rows.with_suffix("") / settings.key
    folder.mkdir(parents=True, exist_ok=True)
    done = rows_done(rows, asdict(settings))
    jobs = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]
    origins = {(f"{arm.split('/')[0]}/mle", seed) for arm, seed in jobs}
    first = [job for job in sorted(origins) if job not in done or not (folder / _folder_of(job)).exists()]
    for phase in (first, [job for job in jobs if not job[0].endswith("/mle")]):
        for row in make_runs(phase, functools.partial(run, settings=settings, folder=folder), rows, workers):
            print(f"{row['arm']} {row['seed']}: KL(real ‖ generator) {row['kl_real']:.3f}", flush=True)
    return rows_done(rows, asdict(settings))


def _folder_of(job: Job) -> str:
    return f"{job[0].split('/')[0]}-{job[1]}"


def summary(arm: str, done: Mapping[Job, Row]) -> dict[str, Any]:
    """Of the runs of one arm: means and deviations, and what it closes of the gaps that `more` leaves, by seed."""
    runs = {seed: row for (name, seed), row in sorted(done.items()) if name == arm}
    names = ("kl_real", "kl_generator", "form", "nll", "training_seconds")
    result: dict[str, Any] = {"runs": len(runs)}
    result |= {name: mean_and_deviation([row[name] for row in runs.values()]) for name in names}
    more = {seed: done.get((f"{arm.split('/')[0]}/more", seed)) for seed in runs}
    pairs = [(row, other) for row, other in zip(runs.values(), more.values(), strict=True) if other]
    if pairs and not arm.endswith("/more"):
        for name in ("kl_real", "kl_generator"):
            closed = [1 - row[name] / other[name] for row, other in pairs]
            result[f"{name}_closed"] = difference(closed, [0.0] * len(closed))
    return result


def parse() -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__, "form_oracle.py --rows form.jsonl")
    choices = [f"{base}/{arm}" for base in BASES for arm in ARMS]
    own = Settings()
    parser.add_argument("--arms", nargs="+", choices=choices, default=choices, help="arms (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm (default: %(default)s); 0: only report")
    parser.add_argument("--first-seed", type=int, default=1, help="the first of them (default: %(default)s)")
    parser.add_argument("--tunes", type=int, default=own.tunes, help="tunes to learn from (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=own.seconds, help="processor time of an arm (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few tunes and short runs; figures mean nothing")
    parser.add_argument(
        "--rows", type=Path, required=True, help="file with one line per run, from which a second start continues"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    settings = QUICK if args.quick else Settings(tunes=args.tunes, seconds=args.seconds)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    done = measure(settings, args.arms, seeds, args.workers, args.rows)
    arms = {arm: summary(arm, done) for arm in args.arms if any(job[0] == arm for job in done)}
    for arm, result in arms.items():
        print(f"{arm:24s} {result}")
    gaps = [arms.get(f"plain/{arm}", {}).get("kl_real", [None])[0] for arm in ("more", "exact")]
    test = Problem.of(settings, 0).test
    finish(
        {
            "benchmark": "form oracle",
            "compared": "KL(real ‖ generator) of more maximum likelihood, and of distillation with the exact "
            "log-ratio as the reward, in equal processor time",
            "ratio": round(gaps[0] / gaps[1], 4) if all(gaps) else None,
            "arms": arms,
            "entropy": round(-statistics.mean(make_process().log_likelihood(test).tolist()), 4),
            "settings": asdict(settings),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
