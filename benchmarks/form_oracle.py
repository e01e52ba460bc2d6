"""Does a discriminator teach? Tunes with a form from a process whose likelihood is exact: see form_process.py.

A generator sees few tunes, by maximum likelihood (`mle`). The divergence KL(real ‖ generator) that remains is known
exactly, since both sides of it are. All other arms start from `mle` with the same seed, and take the same processor
time:

- `more`: maximum likelihood goes on, and keeps the weights that were best on validation tunes.
- `unlimited`: the same on tunes that never come twice. It shows what this network can reach in this time.
- `exact`: distillation by rounds with the exact log-ratio of the process and the generator as the reward. If it does
  not close the gap that `more` leaves, no discriminator could: distillation itself is at fault.
- `distilled`: the reward is a discriminator that has seen the same few tunes, and looks back.
- `constant`, `random`, `shuffled`: distillation with weights that know nothing: equal; normal, as wide as the exact
  ones at the start; and the exact ones in another order.

There are two bases: `look-back` can hold a section, `small` cannot. KL(real ‖ generator) of a base that is too small
for the process is bounded from below, which `unlimited` shows, and there no reward can close the gap.

Reported for every arm: KL(real ‖ generator) and KL(generator ‖ real) in nats per tune, the share of samples with one
of the forms, NLL of fresh tunes, and the share of the gap of `more` that is closed, paired by seed. `ratio` is the gap
of `more` over that of `exact` with the base `look-back`.

A run is one arm with one seed, kept as a line of JSON; a second start continues from these lines.
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from form_process import BAR, BOS, FormProcess
from torch import Tensor, nn
from transformers import set_seed

from measure import finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM
from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.sampling import inference, sample
from resumable import Job, Row, difference, make_runs, mean_and_deviation, rows_done

ROWS = 1024  # sequences drawn or read at once
FORMS = ("AAB", "ABA", "ABB")
LAGS = (2, 4)  # bars between a section of two bars and its repeat

# The width, the layers, and how far it looks back.
BASES: dict[str, tuple[int, int, tuple[int, ...]]] = {"look-back": (48, 2, LAGS), "small": (16, 1, ())}
CONTROLS = ("constant", "random", "shuffled")
DISTILLED = ("exact", "distilled", *CONTROLS)
TUNED = ("more", "unlimited", *DISTILLED)
ARMS = ("mle", *TUNED)

Rewarding = Callable[[nn.Module, Tensor], Tensor]
"""Log-odds `(n,)` of samples `(n, length)` of a generator."""


@dataclass(frozen=True)
class Settings:
    """
    What all runs have in common.

    Args:
        tunes, valid, test (`int`): tunes that the generator learns from, that stop it early, and that measure it.
        patience (`int`): evaluations without a better one after which `mle` stops.
        seconds (`float`): processor time of every arm after `mle`.
        pool (`int`): samples of a round.
        steps (`int`): optimizer steps of a round.
        rounds_kept (`int`): how many rounds' samples are learned from.
        batch (`int`), learning_rate, dropout, weight_decay (`float`): of all arms.
        real (`float`): share of tunes in a batch of distillation.
        ema_decay (`float`): of the moving average of the weights, which is what is measured.
        every (`int`): steps between evaluations on validation tunes.
    """

    tunes: int = 300
    valid: int = 250
    test: int = 4000
    patience: int = 6
    seconds: float = 100.0
    pool: int = 8192
    steps: int = 100
    rounds_kept: int = 40
    batch: int = 64
    learning_rate: float = 3e-3
    dropout: float = 0.1
    weight_decay: float = 0.1
    real: float = 0.0
    ema_decay: float = 0.99
    every: int = 50

    @property
    def key(self) -> str:
        """A short name of these settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


# It shows that everything runs; its figures mean nothing.
QUICK = Settings(tunes=64, valid=32, test=64, patience=1, seconds=0.5, pool=64, steps=2, rounds_kept=2, every=2)


def make_process() -> FormProcess:
    """The process of this benchmark: three sections of two bars of two notes."""
    return FormProcess(forms=FORMS, section_bars=2, bar_notes=2, pitches=5, scale=(0, 1, 3), change=0.1, noise=0.01)


@dataclass(frozen=True)
class Problem:
    """The process with its tunes, `(n, length)` each."""

    process: FormProcess
    train: Tensor
    valid: Tensor
    test: Tensor

    @classmethod
    def of(cls, settings: Settings, seed: int) -> "Problem":
        """The tunes of a seed. Test tunes are the same for all."""
        process = make_process()
        numbers = torch.Generator().manual_seed(1000 + seed)
        train, valid = (process.sample(count, numbers) for count in (settings.tunes, settings.valid))
        return cls(process, train, valid, process.sample(settings.test, torch.Generator().manual_seed(0)))


def make_generator(base: str, process: FormProcess) -> MidiMambaForCausalLM:
    """A new generator of one of the bases."""
    hidden_size, layers, lags = BASES[base]
    return MidiMambaForCausalLM(
        MidiMambaConfig(
            vocab_size=process.vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            state_size=4,
            lookback_bars=list(lags),
            bar_token_ids=[BAR],
            bos_token_id=BOS,
            pad_token_id=None,
            eos_token_id=None,
        )
    )


def log_probabilities(model: nn.Module, tunes: Tensor) -> Tensor:
    """Log-probabilities `(n,)` of tunes, with a graph."""
    logits = model(tunes[:, :-1]).logits
    return -F.cross_entropy(logits.transpose(1, 2), tunes[:, 1:], reduction="none").sum(1)


def score(model: nn.Module, tunes: Tensor) -> Tensor:
    """Log-probabilities `(n,)` of tunes, in double precision."""
    with inference(model):
        return torch.cat([log_probabilities(model, rows).double() for rows in tunes.split(ROWS)])


def draw(model: nn.Module, count: int, process: FormProcess) -> Tensor:
    """Samples `(count, length)` of a generator."""
    starts = torch.full((count, 1), BOS).split(ROWS)
    return torch.cat([sample(model, rows, process.length) for rows in starts])


class Learner:
    """
    Steps of likelihood on batches, and the moving average of the weights.

    Args:
        model (`MidiMambaForCausalLM`): is trained.
        settings (`Settings`): those of the optimizer.

    Attributes:
        average (`MidiMambaForCausalLM`): what is sampled from and measured.
    """

    def __init__(self, model: MidiMambaForCausalLM, settings: Settings):
        self.model, self.average, self.settings = model, copy.deepcopy(model), settings
        model.get_input_embeddings().register_forward_hook(
            lambda module, _, output: F.dropout(output, settings.dropout, module.training)
        )
        self.optimizer = torch.optim.AdamW(
            model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.taken, self.start = 0, time.process_time()

    @property
    def seconds(self) -> float:
        """Processor time since the start."""
        return time.process_time() - self.start

    def step(self, tunes: Tensor, seconds: float | None = None) -> None:
        """One step; the learning rate falls to a tenth over `seconds`."""
        if seconds is not None:
            falling = max(0.1, 1 - self.seconds / seconds)
            self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * falling
        self.model.train()
        loss = -log_probabilities(self.model, tunes).mean() / (tunes.shape[1] - 1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.taken += 1
        # At first the average follows faster, or the initial weights would stay in it for long.
        decay = min(self.settings.ema_decay, self.taken / (self.taken + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)


def pick(tunes: Tensor, count: int) -> Tensor:
    """Random tunes, any of them more than once."""
    return tunes[torch.randint(len(tunes), (count,))]


def fit(
    model: MidiMambaForCausalLM,
    valid: Tensor,
    settings: Settings,
    next_batch: Callable[[], Tensor],
    seconds: float | None = None,
) -> MidiMambaForCausalLM:
    """Maximum likelihood, for some processor time or until validation tunes have not become likelier for a while.

    Returns the weights that were best on validation tunes; those at the start count as well.
    """
    learner = Learner(model, settings)
    best, best_model, worse = math.inf, copy.deepcopy(learner.average), 0
    while (learner.seconds < seconds) if seconds is not None else (worse < settings.patience):
        if learner.taken % settings.every == 0:
            nll = -score(learner.average, valid).mean().item()
            worse = worse + 1 if nll >= best else 0
            if nll < best:
                best, best_model = nll, copy.deepcopy(learner.average)
        learner.step(next_batch(), seconds)
    return best_model


def truncated(log_odds: Tensor) -> Tensor:
    """Weights `(n,)` that sum to one, in proportion to the exponential of log-odds, of which none counts for more than
    the square root of their number times the mean (Ionides, "Truncated importance sampling", 2008).

    At first a generator has hardly any samples of some tunes, and one of those would outweigh all others.
    """
    weights = log_odds.softmax(0)
    weights = weights.clamp(max=len(weights) ** -0.5)
    return weights / weights.sum()


def distill(
    model: MidiMambaForCausalLM, reward: Rewarding, problem: Problem, settings: Settings
) -> tuple[MidiMambaForCausalLM, list[float]]:
    """Distillation by rounds: sample, weight samples by the exponential of their log-odds, and learn from them.

    The weights make samples of every round look like real tunes, so that those of earlier rounds remain of use: each
    round counts by its effective sample size.

    Returns the generator, and the share of the effective sample size in every round.
    """
    learner = Learner(model, settings)
    pools: list[Tensor] = []
    weights: list[Tensor] = []
    sizes: list[float] = []
    of_real = int(settings.real * settings.batch)
    while learner.seconds < settings.seconds:
        fake = draw(learner.average, settings.pool, problem.process)
        weight = truncated(reward(learner.average, fake).double())
        effective = 1 / weight.square().sum()
        pools, weights = [*pools, fake][-settings.rounds_kept :], [*weights, weight * effective]
        weights = weights[-settings.rounds_kept :]
        sizes.append(round(effective.item() / len(fake), 4))
        samples, shares = torch.cat(pools), torch.cat(weights)
        for _ in range(settings.steps):
            if learner.seconds >= settings.seconds:
                break
            chosen = torch.multinomial(shares, settings.batch - of_real, replacement=True)
            learner.step(torch.cat([samples[chosen], pick(problem.train, of_real)]), settings.seconds)
    return learner.average, sizes


class LearnedReward:
    """
    The log-odds of a discriminator that is trained a little in every round on the same few tunes, and calibrated on
    the validation tunes and samples that it was not trained on.

    Args:
        problem (`Problem`): the tunes.
        settings (`Settings`): the batch.
        lags (`tuple[int, ...]`, *optional*): how far it looks back.
        hidden_size (`int`, *optional*), learning_rate (`float`, *optional*), steps (`int`, *optional*): of the
            discriminator; the steps are those of a round.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        lags: tuple[int, ...] = LAGS,
        hidden_size: int = 24,
        learning_rate: float = 2e-3,
        steps: int = 150,
    ):
        self.problem, self.settings, self.steps = problem, settings, steps
        config = MidiDiscriminatorConfig(
            kind="mamba",
            vocab_size=problem.process.vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=1,
            state_size=4,
            lookback_bars=list(lags),
            bar_token_ids=[BAR],
            bos_token_id=BOS,
        )
        self.discriminator = MidiDiscriminator(config)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), learning_rate, weight_decay=0.1)

    def __call__(self, _: nn.Module, fake: Tensor) -> Tensor:
        """Train on half of the samples, calibrate on the other, and keep the weights that were best on it."""
        learned, held_out = fake.chunk(2)
        labels = torch.cat([torch.ones(self.settings.batch), torch.zeros(self.settings.batch)])
        best, kept = self._calibrate(held_out), copy.deepcopy(self.discriminator.state_dict())
        for step in range(1, self.steps + 1):
            self.discriminator.train()
            self.discriminator.calibration.set(1, 0)
            tunes = torch.cat([pick(rows, self.settings.batch) for rows in (self.problem.train, learned)])
            self.optimizer.zero_grad()
            self.discriminator(tunes, labels=labels).loss.backward()
            self.optimizer.step()
            if step % self.settings.every == 0 and (loss := self._calibrate(held_out)) < best:
                best, kept = loss, copy.deepcopy(self.discriminator.state_dict())
        self.discriminator.load_state_dict(kept)
        return self._logits(fake)

    def _logits(self, tunes: Tensor) -> Tensor:
        with inference(self.discriminator):
            return torch.cat([self.discriminator(rows).logits[:, 0].double() for rows in tunes.split(ROWS)])

    def _calibrate(self, fake: Tensor) -> float:
        """Fit scale and offset on held-out tunes and samples of equal total weight; their cross-entropy."""
        self.discriminator.calibration.set(1, 0)
        real, fake = self._logits(self.problem.valid), self._logits(fake)
        numbers = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([numbers], max_iter=30, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            of_real, of_fake = (logits * numbers[0] + numbers[1] for logits in (real, fake))
            value: Tensor = F.softplus(-of_real).mean() + F.softplus(of_fake).mean()
            value.backward()
            return value

        optimizer.step(loss)
        scale, offset = numbers.tolist()
        self.discriminator.calibration.set(max(scale, 0.0), offset)
        return loss().item()


def reward_of(arm: str, problem: Problem, settings: Settings) -> Rewarding:
    """What an arm of distillation rewards."""

    def exact(model: nn.Module, fake: Tensor) -> Tensor:
        return problem.process.log_likelihood(fake) - score(model, fake)

    rewards: dict[str, Rewarding] = {
        "exact": exact,
        "constant": lambda _, fake: torch.zeros(len(fake)),
        "random": lambda model, fake: torch.randn(len(fake)) * exact(model, fake).std().item(),
        "shuffled": lambda model, fake: exact(model, fake)[torch.randperm(len(fake))],
    }
    return LearnedReward(problem, settings) if arm == "distilled" else rewards[arm]


def run(arm: str, seed: int, settings: Settings, folder: Path) -> Row:
    """One run. `arm` is a base and the name of the arm, such as `look-back/exact`; `folder` keeps what it starts
    from."""
    base, name = arm.split("/")
    problem = Problem.of(settings, seed)
    start = time.process_time()
    set_seed(seed)
    row: Row = {"arm": arm, "seed": seed, "settings": asdict(settings)}
    if name == "mle":
        model = make_generator(base, problem.process)
        model = fit(model, problem.valid, settings, lambda: pick(problem.train, settings.batch))
        model.save_pretrained(folder / f"{base}-{seed}")
    else:
        model = MidiMambaForCausalLM.from_pretrained(folder / f"{base}-{seed}")
        if name in DISTILLED:
            model, row["effective"] = distill(model, reward_of(name, problem, settings), problem, settings)
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


def measure(settings: Settings, arms: Sequence[str], seeds: int, workers: int, rows: Path) -> dict[Job, Row]:
    """Make the runs that are missing, what they start from first. Returns all kept runs of these settings."""
    folder = rows.with_suffix("") / settings.key
    folder.mkdir(parents=True, exist_ok=True)
    done = rows_done(rows, asdict(settings))
    jobs = [(arm, seed) for seed in range(seeds) for arm in arms if (arm, seed) not in done]
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
    done = measure(settings, args.arms, args.seeds, args.workers, args.rows)
    arms = {arm: summary(arm, done) for arm in args.arms if any(job[0] == arm for job in done)}
    for arm, result in arms.items():
        print(f"{arm:24s} {result}")
    gaps = [arms.get(f"look-back/{arm}", {}).get("kl_real", [None])[0] for arm in ("more", "exact")]
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
