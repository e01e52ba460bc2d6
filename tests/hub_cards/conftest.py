"""What all tests of publishing share."""

from collections.abc import Iterator

import pytest

from .fake_hub import FakeHub, serving


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serving() as hub:
        yield hub
