"""The page as an application that uvicorn runs."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from midimamba.app.options import AppOptions
from midimamba.app.page import LOOK, Shelf, make_page
from midimamba.app.workshop import Workshop

_MAX_FILE = "500mb"


@contextmanager
def application(options: AppOptions, folder: Path) -> Iterator[FastAPI]:
    """The application. What it has started ends with the context.

    Args:
        options ([`AppOptions`]): of the command.
        folder (`Path`): for files that nobody needs afterwards.

    Raises:
        InputError: if the model cannot be loaded.
    """
    pieces = folder / "pieces"
    pieces.mkdir()
    with closing(Workshop(pieces)) as workshop, closing(Shelf(options.out, options.model)) as shelf:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        page = make_page(shelf, workshop)
        yield gr.mount_gradio_app(
            app,
            page,
            path="/",
            server_name=options.host,
            server_port=options.port,
            allowed_paths=[str(pieces)],
            max_file_size=_MAX_FILE,
            ssr_mode=False,
            show_error=False,
            **LOOK,
        )
