"""Starting and ending `midimamba app`."""

import os
import socket
import sys
import tempfile
import webbrowser
from contextlib import suppress
from pathlib import Path
from threading import Thread

import uvicorn

from midimamba.app.options import AppOptions
from midimamba.playing import stopped_by_signals
from midimamba.serving.server import address_of, listen, silent_about_limits
from midimamba.text import show

_END_SECONDS = 3


class _Server(uvicorn.Server):
    """Says where it is when it is there."""

    def __init__(self, config: uvicorn.Config, address: str, opens_browser: bool):
        super().__init__(config)
        self._address, self._opens_browser = address, opens_browser

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        show(f"the page is at {self._address}; Ctrl-C ends it")
        sys.stdout.flush()
        if self._opens_browser:  # which can take its time
            Thread(target=webbrowser.open, args=(self._address,), daemon=True).start()


def run(options: AppOptions) -> None:
    """Show the page until Ctrl-C.

    Raises:
        InputError: if the address is taken or is no address of this machine, or the model cannot be loaded.
    """
    with (
        silent_about_limits(),
        listen(options.host, options.port) as listener,
        tempfile.TemporaryDirectory(prefix="midimamba-app-") as folder,
    ):
        # Gradio reads them when it is imported: it tells nobody of its use, and its files go with the page.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "gradio")
        from midimamba.app.application import application

        # uvicorn passes on the signal that has ended it.
        with application(options, Path(folder)) as app, stopped_by_signals(), suppress(KeyboardInterrupt):
            config = uvicorn.Config(
                app, log_level="error", access_log=False, timeout_graceful_shutdown=_END_SECONDS, ws="none"
            )
            _Server(config, address_of(listener), not options.no_browser).run([listener])
