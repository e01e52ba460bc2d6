"""The page as an application that uvicorn runs."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePath

import gradio as gr
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from midimamba.app.listen_tab import ADDRESS
from midimamba.app.options import AppOptions
from midimamba.app.page import LOOK, Page, Shelf
from midimamba.app.workshop import Workshop
from midimamba.serving.connections import OwnPages, is_this_machine

_MAX_FILE = "500mb"
_KEY = "key.json"


class _Tests(StaticFiles):
    """Listening tests, without what tells listeners who wrote a piece."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        return ("", None) if PurePath(path).name == _KEY else super().lookup_path(path)


@contextmanager
def application(options: AppOptions, folder: Path) -> Iterator[FastAPI]:
    """The application. What it has started ends with the context.

    Args:
        options ([`AppOptions`]): of the command.
        folder (`Path`): for files that nobody needs afterwards.

    Raises:
        InputError: if the model cannot be loaded.
    """
    pieces, tests = folder / "pieces", folder / "tests"
    pieces.mkdir()
    tests.mkdir()
    with (
        closing(Workshop(pieces)) as workshop,
        closing(Shelf(options.out, options.model)) as shelf,
        closing(Page(shelf, workshop, options.out, tests)) as page,
    ):
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.mount(ADDRESS, _Tests(directory=tests))
        if is_this_machine(options.host):  # elsewhere, such as in a Space, a proxy may change the names of hosts
            app.add_middleware(OwnPages, host=options.host)
        yield gr.mount_gradio_app(
            app,
            page.blocks,
            path="/",
            server_name=options.host,
            server_port=options.port,
            allowed_paths=[str(pieces)],
            max_file_size=_MAX_FILE,
            ssr_mode=False,
            show_error=False,
            **LOOK,
        )
