"""One way to refuse bad input: one clear line on stderr and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InputError", "exit_on_input_error", "loading_generator"]


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where and what to do, in one line."""


@contextmanager
def loading_generator(name: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises for a missing, foreign or broken checkpoint into an [`InputError`]."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"no generator can be loaded from {name!r}: {str(error).splitlines()[0]}") from error
    except StrictDataclassError as error:  # names on a second line which field of the configuration is wrong
        raise InputError(f"no generator can be loaded from {name!r}: {' '.join(str(error).split())}") from error


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an [`InputError`] into one line on stderr and exit code 2. Anything else is a bug and shows where."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
