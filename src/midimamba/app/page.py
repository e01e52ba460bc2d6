"""The page: its tabs, its look, and which generator is loaded."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

from midimamba.app.compose_tab import ComposeTab
from midimamba.app.roll import STYLE
from midimamba.app.studio import Studio
from midimamba.app.telling import told
from midimamba.app.workshop import Workshop

_FONTS = ["system-ui", "sans-serif"]
_CODE_FONTS = ["ui-monospace", "monospace"]
LOOK: dict[str, Any] = {
    # Fonts of the system: nothing is loaded from elsewhere.
    "theme": gr.themes.Soft(primary_hue="blue", font=_FONTS, font_mono=_CODE_FONTS),
    "css": STYLE + ".status { min-height: 1.6rem; }",
    "footer_links": [],
}
_NO_MODEL = """### There is no generator yet
Train one under **Train**, or start the page with one: `midimamba app MODEL`."""


class Shelf:
    """
    The generators that can be chosen, one of which is loaded.

    Args:
        out (`Path`): the folder of those that are trained on the page.
        model (`str`, *optional*): another one, which is loaded at once.

    Raises:
        InputError: if it cannot be loaded.
    """

    def __init__(self, out: Path, model: str | None = None):
        self._out, self._named = out, model
        self._lock = Lock()
        self._studio: Studio | None = None
        if model is not None:
            self.open(model)

    def names(self) -> Sequence[str]:
        """What can be chosen, the newest first of those that were trained on the page."""
        trained = sorted(self._out.glob("*/config.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        named = [] if self._named is None else [self._named]
        return [*named, *(str(file.parent) for file in trained)]

    def open(self, name: str) -> Studio:
        """Load a generator, unless it is. The one that was loaded ends.

        Raises:
            InputError: if it cannot be loaded.
        """
        with self._lock:
            if self._studio is None or self._studio.name != name:
                studio = Studio(name)
                self.close()
                self._studio = studio
            return self._studio

    def cancel(self, session: str) -> None:
        """End what a session composes."""
        if self._studio is not None:
            self._studio.cancel(session)

    def close(self) -> None:
        """End the loaded generator."""
        if self._studio is not None:
            self._studio.close()


def make_page(shelf: Shelf, workshop: Workshop) -> gr.Blocks:
    """The page as Gradio's blocks."""

    def leave(request: gr.Request) -> None:
        shelf.cancel(str(request.session_hash))

    with gr.Blocks(title="midimamba", analytics_enabled=False) as page:
        names = shelf.names()
        with gr.Tabs(), gr.Tab("Compose", id="compose"):
            model = gr.Dropdown(names, value=names[0] if names else None, label="Generator", elem_id="compose-model")

            @gr.render(inputs=[model], triggers=[page.load, model.change])
            def compose(name: str | None) -> None:
                if not name:
                    gr.Markdown(_NO_MODEL)
                    return
                with told():
                    studio = shelf.open(name)
                ComposeTab(studio, workshop)

        page.unload(leave)
    return page
