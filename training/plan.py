"""The recipe of `midimamba train`: what suits a corpus, a machine and a time, by a rule.

| what | the rule |
|---|---|
| tokens that are read | as many as the time allows, but no piece more than 60 times if its key changes, 20 if not |
| size | the largest that reads at least 2 tokens per parameter; `tiny` at the least |
| context | a typical piece, from 256 to 1,024 tokens; less where a batch has not two of them, or a split is small |
| batch | 1,024 tokens; more where that would be over 2,000 steps, up to 65,536 |
| learning rate | 6e-3 at width 128, falling as the width grows; cosine, to 0 |
| weight decay | 0.1; 0.3 where pieces are read more than 8 times |
| keys | transposed by up to 5 semitones if the tokens tell drums from other notes, and if new keys for an epoch take \
at most a quarter of its training or there is time for two such epochs |
| look-back | 1, 2, 4, 8 and 16 bars, if the tokenization has bars |
| temperature | of 0.7, 0.8, 0.9 and 1.0 the one whose music is closest to the validation split; see \
[`~midimamba.training.temperature`] |
| end | when the last five of 16 evaluations were no better than one before, or the time or the steps end |

A parameter is one through which every token passes, so embeddings do not count. Speeds are measured by training steps
on this machine: see [`~midimamba.training.calibration`].

Measured is this much, on Nottingham tunes, chorales and 200 files of POP909, with one seed and 90 seconds of processor
time on one core for every run; the runs stand in benchmarks/results/recipe.json, and benchmarks/recipe.py repeats
them. Held-out loss per note, compared with width 128, 3e-3 and steps of four contexts of 256 tokens:

| | Nottingham | chorales | POP909 |
|---|---|---|---|
| 6e-3 | -2.6 % | +0.8 % | -1.6 % |
| two contexts of 512 | -6.8 % | +0.6 % | +0.4 % |
| 2,048 tokens a step | +11 % | +10 % | +3.4 % |
| width 64, about 8 tokens per parameter instead of 1.3 | +0.5 % | +3.9 % | -2.9 % |
| width 192, about 0.4 | +6.7 % | +5.6 % | +4.4 % |

Everything else in the table is a choice that is not measured, and so is how far the figures hold for larger models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SIZES = ("tiny", "small", "medium", "large")
TOKENS_PER_PARAMETER = 2
EPOCHS = {True: 60.0, False: 20.0}
"""The most epochs, with changing keys and without."""
TRANSPOSE = 5
LEARNING_RATE = 6e-3
"""At width 128."""
TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
LAGS = (1, 2, 4, 8, 16)
SHORTEST, SHORT, LONGEST = 32, 256, 1024
"""Tokens of a context: the fewest, those of a short run, the most."""
STEP_TOKENS, MOST_STEP_TOKENS, MANY_STEPS = 1024, 65_536, 2000
MICRO_TOKENS = 16_384
"""Tokens that are in memory at once; a larger batch is accumulated."""
EVALUATIONS, PATIENCE = 16, 5
TRAINING_SHARE = 0.9
"""Of the time; the rest goes to evaluations and checkpoints."""
DECIDED = (
    *("size", "hidden_size", "num_hidden_layers", "sequence_length", "lookback_bars", "transpose", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "weight_decay", "max_grad_norm", "max_eval_blocks"),
)
"""What a run that goes on takes over from the interrupted one."""
_SLACK = 3  # the machine may become faster than it was when it was measured: the deadline ends the run


@dataclass(frozen=True)
class Facts:
    """
    What the rule knows of a corpus.

    Args:
        pieces, tokens (`int`): to train on.
        held_out (`int`): tokens of the validation split.
        typical (`int`): tokens of a typical piece: their median.
        has_bars (`bool`): whether tokens open bars, so that a model can look back.
        tells_drums (`bool`): whether tokens tell drums from other notes, and there are others, to transpose.
    """

    pieces: int
    tokens: int
    held_out: int
    typical: int
    has_bars: bool
    tells_drums: bool

    @property
    def can_evaluate(self) -> bool:
        """Whether there is music to measure a model on."""
        return self.held_out >= SHORTEST


@dataclass(frozen=True)
class Limits:
    """
    What bounds a run.

    Args:
        seconds (`float`, *optional*): of training.
        steps (`int`, *optional*): of the optimizer.
        epochs (`float`, *optional*): what the user gave, in place of the rule's.
        new_keys (`float`, *optional*, defaults to 0.0): seconds that transposing all pieces once takes.
    """

    seconds: float | None = None
    steps: int | None = None
    epochs: float | None = None
    new_keys: float = 0.0


class Speed(NamedTuple):
    """
    What a size costs.

    Attributes:
        parameters (`int`): through which every token passes.
        seconds (`float`): of training, per token.
        rows (`int`): sequences that fit into memory at once.
    """

    parameters: int
    seconds: float
    rows: int = 1_000_000


@dataclass(frozen=True)
class Plan:
    """
    What was decided for a run.

    Args:
        size (`str`, *optional*): the named size; `None` if the user gave a shape or a model.
        length (`int`): tokens of a context.
        batch (`int`): contexts of a step.
        rows (`int`): contexts that are in memory at once.
        steps (`int`): of the optimizer, at the speed that was measured.
        most_steps (`int`): what ends a run on a machine that becomes faster.
        epochs (`float`): how often a piece is read.
        transposes (`bool`): whether keys change.
        evaluates (`bool`): whether there is music to evaluate on.
    """

    size: str | None
    length: int
    batch: int
    rows: int
    steps: int
    most_steps: int
    epochs: float
    transposes: bool
    evaluates: bool


def context_of(facts: Facts) -> int:
    """Tokens of a training block: a power of two of which both splits hold some."""
    wanted = min(max(facts.typical, SHORT), LONGEST)
    most = min(facts.tokens // 8, facts.held_out if facts.can_evaluate else facts.tokens)
    return max(SHORTEST, 2 ** min(round(math.log2(wanted)), int(math.log2(max(most, 1)))))


def transposes(facts: Facts, limits: Limits, speed: Speed) -> bool:
    """Whether it is worth its time to give every piece a new key in every epoch."""
    if not facts.tells_drums or limits.seconds is None:
        return facts.tells_drums
    training = facts.tokens * speed.seconds
    return limits.new_keys <= min(training, limits.seconds) / 4 or limits.seconds >= 2 * (training + limits.new_keys)


def tokens_read(facts: Facts, limits: Limits, speed: Speed) -> float:
    """Tokens that a run trains on, repetitions included."""
    changes = transposes(facts, limits, speed)
    if limits.steps is not None and limits.seconds is None:
        return float(limits.steps * STEP_TOKENS)
    most = facts.tokens * (EPOCHS[changes] if limits.epochs is None else limits.epochs)
    if limits.seconds is not None:
        new_keys = limits.new_keys if changes else 0.0  # all pieces get theirs when an epoch begins
        seconds = max(TRAINING_SHARE * limits.seconds - new_keys, 0.0)
        most = min(most, seconds / (speed.seconds + new_keys / facts.tokens))
    return most if limits.steps is None else min(most, limits.steps * STEP_TOKENS)


def choose_size(
    sizes: Sequence[str], facts: Facts, limits: Limits, speed_of: Callable[[str], Speed]
) -> tuple[str, Speed]:
    """The largest size that reads enough tokens for its parameters, and its speed.

    Args:
        sizes (`Sequence[str]`): from the smallest on.
        facts (`Facts`), limits (`Limits`): of the run.
        speed_of (`Callable[[str], Speed]`): measures a size. One that is far too large is not measured.
    """
    size, speed = sizes[0], speed_of(sizes[0])
    for larger in sizes[1:]:
        if tokens_read(facts, limits, speed) < 4 * TOKENS_PER_PARAMETER * speed.parameters:
            break  # a size has at least five times the parameters of the one before
        their_speed = speed_of(larger)
        if tokens_read(facts, limits, their_speed) < TOKENS_PER_PARAMETER * their_speed.parameters:
            break
        size, speed = larger, their_speed
    return size, speed


def make_plan(
    size: str | None, length: int, facts: Facts, limits: Limits, speed: Speed, shortest: int = SHORT
) -> Plan:
    """
    The rest of the rule.

    Args:
        size (`str`, *optional*), speed (`Speed`): of the model.
        length (`int`): tokens of a context, at the most.
        facts (`Facts`), limits (`Limits`): of the run.
        shortest (`int`, *optional*, defaults to 256): the context is not made shorter than this.
    """
    tokens = max(tokens_read(facts, limits, speed), 1.0)
    step_tokens = STEP_TOKENS
    while limits.steps is None and tokens / step_tokens > MANY_STEPS and step_tokens < MOST_STEP_TOKENS:
        step_tokens *= 2
    while length > shortest and length * 2 > step_tokens:
        length //= 2
    batch = max(1, min(step_tokens // length, facts.tokens // length))
    rows = max(1, min(batch, speed.rows, MICRO_TOKENS // length))
    batch = batch // rows * rows
    steps = max(1, round(tokens / (batch * length))) if limits.steps is None else limits.steps
    changes = transposes(facts, limits, speed)
    most = facts.tokens * (EPOCHS[changes] if limits.epochs is None else limits.epochs) / (batch * length)
    has_slack = limits.seconds is not None and limits.steps is None
    return Plan(
        size=size,
        length=length,
        batch=batch,
        rows=rows,
        steps=steps,
        most_steps=max(steps, min(_SLACK * steps, round(most))) if has_slack else steps,
        epochs=steps * batch * length / facts.tokens,
        transposes=changes,
        evaluates=facts.can_evaluate,
    )


def options_of(plan: Plan, facts: Facts, width: int) -> dict[str, Any]:
    """A plan as options of `training/pretrain.py`, those aside that [`pace_of`] makes.

    Args:
        plan (`Plan`), facts (`Facts`): of the run.
        width (`int`): the model's hidden size.
    """
    # An evaluation reads a token three times as fast as training does.
    held_out = round(3 * (1 - TRAINING_SHARE) * plan.steps * plan.batch / EVALUATIONS)
    return {
        "size": plan.size,
        "sequence_length": plan.length,
        "lookback_bars": list(LAGS) if facts.has_bars else [],
        "transpose": TRANSPOSE if plan.transposes else 0,
        "max_steps": plan.most_steps,
        "per_device_train_batch_size": plan.rows,
        "gradient_accumulation_steps": plan.batch // plan.rows,
        "learning_rate": float(f"{LEARNING_RATE * 128 / width:.2g}"),
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, min(100, plan.steps // 20)),
        "weight_decay": 0.3 if plan.epochs > 8 else 0.1,
        "max_grad_norm": 1.0,
        "max_eval_blocks": max(plan.rows, held_out),
    }


def pace_of(steps: int, rows: int, evaluates: bool, deadline: bool) -> dict[str, Any]:
    """When a run logs, evaluates and saves, and which weights it keeps.

    Args:
        steps (`int`): of the run.
        rows (`int`): sequences that are in memory at once.
        evaluates (`bool`): whether there is music to evaluate on.
        deadline (`bool`): whether there is a [`~midimamba.training.deadline.Deadline`], which evaluates and saves by
            itself, in equal parts of the time.
    """
    often = max(1, math.ceil(steps / EVALUATIONS))
    options: dict[str, Any] = {
        "logging_steps": max(1, often // 4),
        "save_strategy": "steps",
        "save_steps": steps if deadline else often,
        "save_total_limit": 2,
        "eval_strategy": "no",
    }
    if evaluates:
        options |= {
            "eval_strategy": "steps",
            "eval_steps": options["save_steps"],
            "per_device_eval_batch_size": rows,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return options
