"""What sampling can be told: checked here for the command line, the pipeline and Python alike. Light to import."""

import math
from numbers import Integral, Real
from typing import Any

from .errors import InputError

# A first note is complete within this many base tokens.
MIN_NEW_TOKENS = 16
# Far below these, logits divided by the temperature leave the numbers of 32 bits.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 1000
MAX_SEED = 2**63 - 1  # of torch
MAX_NUMPY_SEED = 2**32 - 1
MAX_SIZE = 2**31 - 1  # of anything that is counted

_RANGES = {
    "num": (1, MAX_SIZE),
    "num_return_sequences": (1, MAX_SIZE),
    "bars": (1, MAX_SIZE),
    "max_new_tokens": (MIN_NEW_TOKENS, MAX_SIZE),
    "seed": (0, MAX_SEED),
}


def check_sampling(**options: Any) -> None:
    """Raise an [`InputError`] for the first option that makes no sense. `None` stands for an option's default.

    Args:
        num, num_return_sequences, bars, max_new_tokens, seed (`int`, *optional*):
            At least 1, and `max_new_tokens` at least 16, because a note needs that many; `seed` from 0 to 2^63 - 1.
        temperature (`float`, *optional*):
            From 0.001 to 1000.
        top_p (`float`, *optional*):
            Above 0 and at most 1.
        options:
            Others are not looked at.
    """
    for name, (least, most) in _RANGES.items():
        if (value := options.get(name)) is not None:
            check_whole(name, value, least, most)
    temperature, top_p = options.get("temperature"), options.get("top_p")
    if temperature is not None and not _lies_within(temperature, MIN_TEMPERATURE, MAX_TEMPERATURE):
        raise InputError(f"temperature is {temperature}: give a number from 0.001 to 1000")
    if top_p is not None and not (_lies_within(top_p, 0, 1) and top_p > 0):
        raise InputError(f"top_p is {top_p}: give a number above 0 and at most 1")


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Raise an [`InputError`] if an option is not a whole number from `least` to `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: give a whole number")
    if int(value) < least:
        raise InputError(f"{name} is {value}: give at least {least}")
    if int(value) > most:
        raise InputError(f"{name} is {value}: give at most {most}")


def check_fraction(name: str, value: Any) -> None:
    """Raise an [`InputError`] if an option is not a number from 0 to 1."""
    if not _lies_within(value, 0, 1):
        raise InputError(f"{name} is {value}: give a number from 0 to 1")


def _lies_within(value: Any, least: float, most: float) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and least <= float(value) <= most
