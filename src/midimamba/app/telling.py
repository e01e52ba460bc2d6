"""What the page tells its user when something goes wrong: one line, never a traceback."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from midimamba.serving.responses import BUG, describe
from midimamba.text import for_html, shortened

logger = logging.getLogger(__name__)

_SECONDS = 30.0
_LONGEST = 400


def problem(error: BaseException) -> gr.Error:
    """An error as the page shows it."""
    line = describe(error)
    if line == BUG:
        logger.error("a bug, please report it", exc_info=error)
    return gr.Error(for_html(shortened(line, _LONGEST)), duration=_SECONDS, print_exception=False)


@contextmanager
def told() -> Iterator[None]:
    """Show what goes wrong within as one line, and go on."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise problem(error) from None
