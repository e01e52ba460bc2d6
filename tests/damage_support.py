"""What tests of damaged files share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midimamba.errors import InputError

Damage = Callable[[Path], None]
TOO_DEEP = '{"a":' + "[" * 100_000
# Files that are not a JSON object, and what is said of them.
NOT_AN_OBJECT = {
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "empty": b"",
    "cut off": b'{"a": ',
    "too deep": TOO_DEEP.encode(),
    "not UTF-8": b'{"a": "\xff"}',
}


def refusal(load: Callable[[str], Any], folder: Path | str, error: type[Exception] = InputError) -> str:
    """What `load` says when it refuses; one line."""
    with pytest.raises(error) as caught:
        load(str(folder))
    said = str(caught.value)
    assert "\n" not in said
    return said


def content(file: str, text: bytes | str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage
