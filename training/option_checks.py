"""What the numbers among the options may be: one line for an impossible one, before any work."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What some options may be. An option that is unset passes; NaN and infinity never do.

    Attributes:
        allowed (`str`): in words.
        holds (`Callable[[float], bool]`): as a test.
        names (`tuple[str, ...]`): the options.
    """

    allowed: str
    holds: Callable[[float], bool]
    names: tuple[str, ...]


TRAINER_RULES = (
    Rule(
        "at least 1",
        lambda value: value >= 1,
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("save_total_limit",),
        ),
    ),
    Rule(
        "at least 0",
        lambda value: value >= 0,
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"),
            *("dataloader_num_workers", "neftune_noise_alpha"),
        ),
    ),
    Rule("greater than 0", lambda value: value > 0, ("num_train_epochs", "adam_epsilon")),
    Rule(
        "greater than 0 and, from 1 on, a whole number",
        lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
        ("logging_steps", "eval_steps", "save_steps"),
    ),
    Rule("in [0, 1)", lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2", "label_smoothing_factor")),
    Rule("in [0, 4294967295]", lambda value: 0 <= value < 2**32, ("seed", "data_seed")),
)

# Of likelihood. Trainer would take 0 for any.
STEPS = Rule("-1, for any, or at least 1", lambda value: value == -1 or value >= 1, ("max_steps",))


def check_numbers(options: Any, rules: Iterable[Rule]) -> None:
    """Refuse the first impossible number.

    Raises:
        ValueError: with the option, its value, and what it may be.
    """
    for allowed, holds, names in rules:
        for name in names:
            value = getattr(options, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name} is {value}, but must be {allowed}")
