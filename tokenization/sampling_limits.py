"""What sampling can be told, and what it does when it is told nothing: for the command line, the pipeline and Python
alike. Light to import.
"""

import math
from collections.abc import Mapping
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

PICKS = ("resample", "best")
"""How one of several draws is chosen: at random by the odds that it is real music, or the one with the best odds."""
BEST_OF = 8  # draws for each piece, where a discriminator chooses

SAMPLING_DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 0,  # else transformers draws from the 50 most likely tokens
    "max_new_tokens": 2048,
}
"""How music is sampled where neither the user nor the model's generation config says it. Training saves them."""

_RANGES = {
    "num": (1, MAX_SIZE),
    "num_return_sequences": (1, MAX_SIZE),
    "bars": (1, MAX_SIZE),
    "max_new_tokens": (MIN_NEW_TOKENS, MAX_SIZE),
    "top_k": (0, MAX_SIZE),
    "seed": (0, MAX_SEED),
    "best_of": (2, MAX_SIZE),
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
        top_k (`int`, *optional*):
            At least 0, which stands for all tokens.
        best_of (`int`, *optional*):
            At least 2 draws for each piece.
        pick (`str`, *optional*):
            One of [`PICKS`].
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
    if (pick := options.get("pick")) is not None and pick not in PICKS:
        raise InputError(f"pick is {pick!r}: give {' or '.join(PICKS)}")


def complete_sampling(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate`, with a value for each of [`SAMPLING_DEFAULTS`].

    What is not given, or `None`, is the model's own; where the model has none, it is the default. Music is sampled
    unless `do_sample=False` is given. `max_length`, where it is given, replaces `max_new_tokens`.

    Args:
        config (`GenerationConfig`, *optional*):
            The model's.
        options (`Mapping[str, Any]`):
            As for `generate`.

    Raises:
        InputError: if a value of the model makes no sense and none is given instead.
    """
    given = {name: value for name, value in options.items() if value is not None or name not in SAMPLING_DEFAULTS}
    found = {name: getattr(config, name, None) for name in SAMPLING_DEFAULTS if name not in {"do_sample", *given}}
    own = {name: value for name, value in found.items() if value is not None}
    try:
        check_sampling(**own)
    except InputError as error:
        raise InputError(f"the model's generation_config.json: {error}, or remove the line") from error
    complete = SAMPLING_DEFAULTS | own | given
    if not complete["do_sample"]:  # transformers warns of options without effect
        complete = {name: complete[name] for name in complete if name in {"max_new_tokens", *given}}
    if given.get("max_length") is not None and "max_new_tokens" not in given:
        complete["max_new_tokens"] = None
    return complete


def give_sampling_defaults(config: Any) -> None:
    """Add to a model's generation config what it lacks, so that plain `generate` samples music. Its own values stay.

    Args:
        config (`GenerationConfig`):
            The model's; changed in place.
    """
    config.do_sample = True  # first: without it, transformers warns of the others and does not save them
    config.update(**SAMPLING_DEFAULTS, defaults_only=True)


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
