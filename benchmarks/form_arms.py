"""What the arms of the benchmark of forms learn from, and how: likelihood, and distillation by rounds."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from form_process import BAR, BOS, FIRST_NOTE, FormProcess
from torch import Tensor, nn

from midimamba import MidiMambaConfig, MidiMambaForCausalLM
from midimamba.evaluation.logistic import Matrix, balanced, logistic_regression, with_constant
from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import sample

ROWS = 1024  # sequences drawn or read at once
HELD_OUT = 8  # one in this many samples calibrates the discriminator, and says when it has learned enough
RIDGE = 0.01  # against a mean over pieces: as much as one tune in a hundred
LAGS = (1, 2)  # bars between a section of one bar and its repeat
# The width, the layers, and the size of the state.
BASES = {"plain": (32, 2, 8), "small": (12, 1, 2)}

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
        batch (`int`), learning_rate (`float`): of likelihood and distillation.
        dropout, weight_decay (`float`): of likelihood on tunes, which are few.
        ema_decay (`float`): of the moving average of the weights, which is what is measured.
        every (`int`): steps between evaluations on validation tunes.
        trainer_pool, trainer_batch (`int`): samples of a round and of a step, in the package's own trainer.
    """

    tunes: int = 100
    valid: int = 100
    test: int = 4000
    patience: int = 6
    seconds: float = 120.0
    pool: int = 32768
    steps: int = 300
    rounds_kept: int = 40
    batch: int = 64
    learning_rate: float = 3e-3
    dropout: float = 0.1
    weight_decay: float = 0.1
    ema_decay: float = 0.99
    every: int = 50
    trainer_pool: int = 512
    trainer_batch: int = 128

    @property
    def key(self) -> str:
        """A short name of these settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


# It shows that everything runs; its figures mean nothing.
QUICK = Settings(
    tunes=64,
    valid=32,
    test=64,
    patience=1,
    seconds=0.5,
    pool=64,
    steps=2,
    rounds_kept=2,
    every=2,
    trainer_pool=16,
    trainer_batch=8,
)


def make_process() -> FormProcess:
    """The process of this benchmark: four sections of a bar of two notes. The notes of a new section are almost
    independent, so that there is little to learn but the form."""
    return FormProcess(
        section_bars=1, bar_notes=2, pitches=5, scale=(0, 1, 2, 3), change=0.05, noise=0.01, spread=100.0
    )


@dataclass(frozen=True)
class Problem:
    """The process with its tunes, `(n, length)` each."""

    process: FormProcess
    train: Tensor
    valid: Tensor
    test: Tensor

    @classmethod
    def of(cls, settings: Settings, seed: int) -> "Problem":
        """The tunes of a seed, in all keys. Test tunes are the same for all, and only in theirs."""
        process = make_process()
        numbers = torch.Generator().manual_seed(1000 + seed)
        drawn = [process.sample(count, numbers) for count in (settings.tunes, settings.valid)]
        train, valid = (
            torch.cat([process.transpose(tunes, steps) for steps in range(process.pitches)]) for tunes in drawn
        )
        return cls(process, train, valid, process.sample(settings.test, torch.Generator().manual_seed(0)))


def make_generator(base: str, process: FormProcess) -> MidiMambaForCausalLM:
    """A new generator of one of the bases."""
    hidden_size, layers, state_size = BASES[base]
    return MidiMambaForCausalLM(
        MidiMambaConfig(
            vocab_size=process.vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            state_size=state_size,
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
        settings (`Settings`): the learning rate, and the memory of the average.
        dropout, weight_decay (`float`): of the training.

    Attributes:
        average (`MidiMambaForCausalLM`): what is sampled from and measured.
    """

    def __init__(self, model: MidiMambaForCausalLM, settings: Settings, dropout: float, weight_decay: float):
        self.model, self.average, self.settings = model, copy.deepcopy(model), settings
        model.get_input_embeddings().register_forward_hook(
            lambda module, _, output: F.dropout(output, dropout, module.training)
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=weight_decay)
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
    learner = Learner(model, settings, settings.dropout, settings.weight_decay)
    best, best_model, worse = math.inf, copy.deepcopy(learner.average), 0
    while (learner.seconds < seconds) if seconds is not None else (worse < settings.patience):
        if learner.taken % settings.every == 0:
            nll = -score(learner.average, valid).mean().item()
            worse = worse + 1 if nll >= best else 0
            if nll < best:
                best, best_model = nll, copy.deepcopy(learner.average)
        learner.step(next_batch(), seconds)
    return best_model


def make_discriminator(process: FormProcess) -> MidiDiscriminator:
    """A new discriminator, which looks back."""
    return MidiDiscriminator(
        MidiDiscriminatorConfig(
            kind="mamba",
            vocab_size=process.vocab_size,
            hidden_size=24,
            num_hidden_layers=1,
            state_size=4,
            lookback_bars=list(LAGS),
            bar_token_ids=[BAR],
            bos_token_id=BOS,
        )
    )


def log_ratio(process: FormProcess, model: nn.Module, fake: Tensor) -> Tensor:
    """The exact log-odds `(n,)` that samples of a generator are tunes."""
    return process.log_likelihood(fake) - score(model, fake)


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

    Returns the weights that were best on validation tunes after a round, as [`fit`] does, and the share of the
    effective sample size in every round.
    """
    learner = Learner(model, settings, 0.0, 0.0)  # there are always more samples
    pools: list[Tensor] = []
    weights: list[Tensor] = []
    sizes: list[float] = []
    best, best_model = score(model, problem.valid).mean().item(), copy.deepcopy(model)
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
            chosen = torch.multinomial(shares, settings.batch, replacement=True)
            learner.step(samples[chosen], settings.seconds)
        likelihood = score(learner.average, problem.valid).mean().item()
        if likelihood > best:
            best, best_model = likelihood, copy.deepcopy(learner.average)
    return best_model, sizes


def heard(tunes: Tensor, process: FormProcess) -> Tensor:
    """
    What a musician would listen for in tunes: features `(n, features)`, in double precision.

    They are the share of tokens in which each pair of sections agrees, all products of two of these, and how many
    different pitches there are, one column for each number.
    """
    sections = tunes[:, 1:].unflatten(1, (-1, process.section_tokens))
    first, second = torch.triu_indices(sections.shape[1], sections.shape[1], 1)
    alike = (sections[:, first] == sections[:, second]).double().mean(-1)
    one, other = torch.triu_indices(alike.shape[1], alike.shape[1])
    pitches = torch.stack([(tunes == FIRST_NOTE + pitch).any(1) for pitch in range(process.pitches)]).sum(0)
    return torch.cat([alike, alike[:, one] * alike[:, other], F.one_hot(pitches, process.pitches + 1).double()], dim=1)


class LearnedReward:
    """
    The summed log-odds of two discriminators that learn from the same few tunes in every round: one of tokens, which
    looks back, and logistic regression on what is [`heard`]. They are calibrated together on validation tunes and on
    samples that neither has seen.

    The odds of being real are p_real / p_generator, and half of that is known: the likelihood of a sample under the
    generator. It can be calibrated with the discriminators as if it were a third, as in noise-contrastive estimation
    (Gutmann and Hyvärinen 2010), which leaves them to learn what real tunes are like (Finn et al., arXiv 1611.03852).

    Args:
        problem (`Problem`): the tunes.
        settings (`Settings`): the batch.
        discriminators (`bool`, *optional*, defaults to `True`): whether there are any.
        likelihood (`bool`, *optional*, defaults to `False`): whether the generator's own likelihood has a say.
        learning_rate (`float`, *optional*): of the discriminator of tokens.
        patience (`int`, *optional*, defaults to 150): steps without a better one after which a round's training ends.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        discriminators: bool = True,
        likelihood: bool = False,
        learning_rate: float = 5e-3,
        patience: int = 150,
    ):
        self.problem, self.settings, self.patience = problem, settings, patience
        self.discriminators, self.likelihood = discriminators, likelihood
        self.discriminator = make_discriminator(problem.process)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), learning_rate, weight_decay=0.1)

    def __call__(self, model: nn.Module, fake: Tensor) -> Tensor:
        """Log-odds `(n,)` of samples of `model`, most of which the discriminators learn from."""
        learned, held_out = fake.tensor_split([len(fake) - len(fake) // HELD_OUT])
        judges: list[Callable[[Tensor], Matrix]] = []
        if self.discriminators:
            self._train(learned, held_out)
            judges += [lambda tunes: self._logits(tunes).numpy(), self._fit_musical(learned)]
        if self.likelihood:
            judges.append(lambda tunes: score(model, tunes).numpy())
        valid, drawn, rewarded = (
            np.stack([judge(tunes) for judge in judges], axis=1) for tunes in (self.problem.valid, held_out, fake)
        )
        weights = _regression(valid, drawn)[0]
        return torch.from_numpy(with_constant(rewarded) @ weights)

    def _train(self, learned: Tensor, held_out: Tensor) -> None:
        """Steps until held-out samples and validation tunes have not become easier to tell apart for a while. The
        weights that were best on these stay."""
        labels = torch.cat([torch.ones(self.settings.batch), torch.zeros(self.settings.batch)])
        best, kept, step, best_step = self._loss(held_out), copy.deepcopy(self.discriminator.state_dict()), 0, 0
        while step - best_step < self.patience:
            self.discriminator.train()
            tunes = torch.cat([pick(rows, self.settings.batch) for rows in (self.problem.train, learned)])
            self.optimizer.zero_grad()
            self.discriminator(tunes, labels=labels).loss.backward()
            self.optimizer.step()
            step += 1
            if step % self.settings.every == 0 and (loss := self._loss(held_out)) < best:
                best, kept, best_step = loss, copy.deepcopy(self.discriminator.state_dict()), step
        self.discriminator.load_state_dict(kept)

    def _loss(self, fake: Tensor) -> float:
        """The cross-entropy on validation tunes and on samples, once calibrated."""
        return _regression(
            self._logits(self.problem.valid)[:, None].numpy(), self._logits(fake)[:, None].numpy(), 0.0
        )[1]

    def _logits(self, tunes: Tensor) -> Tensor:
        with inference(self.discriminator):
            return torch.cat([self.discriminator(rows).logits[:, 0].double() for rows in tunes.split(ROWS)])

    def _fit_musical(self, learned: Tensor) -> Callable[[Tensor], Matrix]:
        """Log-odds by what is heard."""
        process = self.problem.process
        real, fake = (heard(tunes, process).numpy() for tunes in (self.problem.train, learned))
        weights = _regression(real, fake, RIDGE)[0]
        return lambda tunes: with_constant(heard(tunes, process).numpy()) @ weights


def _regression(real: Matrix, fake: Matrix, ridge: float = 1e-6) -> tuple[Matrix, float]:
    """Weights by logistic regression on columns, and the cross-entropy, where both kinds have a weight of one half."""
    labels = np.repeat([1.0, 0.0], [len(real), len(fake)])
    points, counts = with_constant(np.concatenate([real, fake])), balanced(labels) / len(labels)
    weights = logistic_regression(points, labels, ridge, counts)
    log_odds = points @ weights
    return weights, float(counts @ (np.logaddexp(0, log_odds) - labels * log_odds))
