"""What the user gave cannot be used. This folder is published with a model, and has to load without midimamba."""

try:
    from midimamba.errors import InputError
except ImportError:

    class InputError(ValueError):  # type: ignore[no-redef]
        """Something the user gave cannot be used. The message says what, where and what to do, in one line."""


__all__ = ["InputError"]
