"""The page: its tabs, its look, and which generator is loaded."""

from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

from midimamba.app import listen_tab, roll
from midimamba.app.compose_tab import ComposeTab
from midimamba.app.listen_tab import ListenTab
from midimamba.app.studio import Studio
from midimamba.app.telling import told
from midimamba.app.train_tab import TrainTab
from midimamba.app.workshop import Workshop
from midimamba.errors import InputError

_FONTS = ["system-ui", "sans-serif"]
_CODE_FONTS = ["ui-monospace", "monospace"]
_STYLE = ".status { min-height: 1.6rem; } .small { font-size: .85rem; opacity: .8; }"
LOOK: dict[str, Any] = {
    # Fonts of the system: nothing is loaded from elsewhere.
    "theme": gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=_CODE_FONTS),
    "css": roll.STYLE + listen_tab.STYLE + _STYLE,
    "footer_links": [],
}
_NO_MODEL = """### There is no generator yet
Train one on your music under **Train**, or start the page with one: `midimamba app MODEL`.

No music at hand? A first generator can learn from 60 of Bach's chorales, which takes about a minute. Then it knows
a little of how chorales sound, and not much more."""


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

    def names(self) -> list[str]:
        """What can be chosen, the newest first of those that were trained on the page."""
        trained = sorted(self._out.glob("*/config.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        named = [] if self._named is None else [self._named]
        return [*named, *(str(file.parent) for file in trained)]

    def open(self, name: str) -> Studio:
        """Load a generator, unless it is loaded. The one that was loaded ends.

        Raises:
            InputError: if it cannot be loaded.
        """
        with self._lock:
            if self._studio is None or self._studio.name != name:
                studio = Studio(name)
                self.close()
                self._studio = studio
            return self._studio

    def opened(self) -> Studio:
        """The generator that is loaded.

        Raises:
            InputError: if there is none.
        """
        if self._studio is None:
            raise InputError("there is no generator yet: train one, or start the page with one")
        return self._studio

    def cancel(self, session: str) -> None:
        """End what a session composes."""
        if self._studio is not None:
            for name in (session, f"{session}-listen"):
                self._studio.cancel(name)

    def close(self) -> None:
        """End the generator that is loaded."""
        if self._studio is not None:
            self._studio.close()


class Page:
    """
    The page. Making it draws it.

    Args:
        shelf ([`Shelf`]): the generators.
        workshop ([`~midimamba.app.workshop.Workshop`]): writes files.
        out (`Path`): the folder for what is trained.
        tests (`Path`): the folder for listening tests.
    """

    def __init__(self, shelf: Shelf, workshop: Workshop, out: Path, tests: Path):
        self._shelf, self._workshop = shelf, workshop
        with gr.Blocks(title="midimamba", analytics_enabled=False) as self.blocks:
            with gr.Tabs() as self._tabs:
                with gr.Tab("Compose", id="compose"):
                    self._draw_compose()
                with gr.Tab("Train", id="train"):
                    self.train = TrainTab(out)
                with gr.Tab("Listen", id="listen"):
                    ListenTab(shelf.opened, workshop, tests)
            self.train.play.click(self._play, None, [self._tabs, self._model], show_progress="hidden")
            self.blocks.load(self._names, None, [self._model], show_progress="hidden")
            self.blocks.load(self.train.look, None, self.train.outputs, show_progress="hidden")
            self.blocks.unload(self._leave)

    def close(self) -> None:
        """End what goes on behind the page."""
        self.train.close()

    def _draw_compose(self) -> None:
        names = self._shelf.names()
        self._model = gr.Dropdown(
            names,
            value=names[0] if names else None,
            label="Generator",
            visible=bool(names),
            interactive=True,
            elem_id="compose-model",
        )

        gr.render(inputs=[self._model], triggers=[self.blocks.load, self._model.change])(self._draw_tab)

    def _draw_tab(self, name: str | None) -> None:
        """The tab for a generator, which is loaded."""
        if not name:
            gr.Markdown(_NO_MODEL)
            first = gr.Button("Learn from Bach for a minute", variant="primary", elem_id="compose-first-generator")
            first.click(self._begin_first, None, [self._tabs, *self.train.outputs], show_progress="hidden")
            return
        with told():
            studio = self._shelf.open(name)
        ComposeTab(studio, self._workshop)

    def _names(self) -> Any:
        """What can be chosen, which may be more than when the page was made."""
        names = self._shelf.names()
        return gr.update(choices=names, visible=bool(names))

    def _play(self) -> list[Any]:
        """Go to Compose with what was trained last."""
        names = self._shelf.names()
        return [gr.Tabs(selected="compose"), gr.update(choices=names, value=self.train.trained, visible=True)]

    def _begin_first(self) -> list[Any]:
        """Train a first generator, and go where this is seen."""
        return [gr.Tabs(selected="train"), *self.train.begin_first()]

    def _leave(self, request: gr.Request) -> None:
        self._shelf.cancel(str(request.session_hash))
