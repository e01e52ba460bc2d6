"""What the user gave cannot be used."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where and what to do, in one line."""
