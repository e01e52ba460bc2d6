"""Settings of the process. Only commands and scripts make those that last."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def limit_spinning() -> None:
    """Let torch's idle threads sleep sooner. Call it before torch is imported; a value the user set stays.

    Between two operations they spin, and hold a core that another process, or a kernel of ours, could use. Small
    operations took up to 50 times as long on a busy machine, and our scan twice as long on an idle one. Sleeping after
    fewer turns costs nothing measurable.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def hide_short_bars() -> None:
    """Let progress bars appear after two seconds. Call it before tqdm is imported; a value the user set stays.

    Libraries draw bars for what is done at once, such as reading the weights of a small model.
    """
    os.environ.setdefault("TQDM_DELAY", "2")


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Let a logger report nothing but errors, and afterwards as before."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
