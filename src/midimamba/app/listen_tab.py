"""The tab "Listen": a blind test of the user's music and the generator's."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from symusic.core import ScoreTick

from midimamba.app.growing import Wish
from midimamba.app.studio import Studio
from midimamba.app.telling import told
from midimamba.app.workshop import Workshop
from midimamba.errors import InputError
from midimamba.evaluation import listening
from midimamba.text import for_html
from midimamba.tokenization.ingest import MUSIC_SUFFIXES

ADDRESS = "/listening"
_MOST_PIECES, _MOST_BARS = 16, 32
_ARMS = ("your music", "the generator")


class ListenTab:
    """
    The tab. Making it draws it.

    Args:
        studio (`Callable[[], Studio]`): the generator that is loaded.
        workshop ([`~midimamba.app.workshop.Workshop`]): writes the test.
        tests (`Path`): the folder of tests, which the page serves at [`ADDRESS`].
    """

    def __init__(self, studio: Callable[[], Studio], workshop: Workshop, tests: Path):
        self._studio, self._workshop, self._tests = studio, workshop, tests
        self._test = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                files = gr.File(
                    label="Music by people (MIDI or ABC)",
                    file_count="multiple",
                    file_types=[*MUSIC_SUFFIXES],
                    height=150,
                    elem_id="listen-files",
                )
                with gr.Group():
                    num = gr.Slider(1, _MOST_PIECES, 4, step=1, label="Pieces of each", elem_id="listen-num")
                    bars = gr.Slider(1, _MOST_BARS, 8, step=1, label="Bars of each piece", elem_id="listen-bars")
                    seed = gr.Number(0, label="Seed", precision=0)
                start = gr.Button("Make the test", variant="primary", elem_id="listen-start")
                answers = gr.File(
                    label="Answers of listeners (answers.json)",
                    file_count="multiple",
                    file_types=[".json"],
                    height=160,
                    elem_id="listen-answers",
                )
            with gr.Column(scale=2, min_width=480):
                status = gr.Markdown(
                    "Can you tell the generator's music from yours? Drop some pieces and press Make the test. Then "
                    "rate what you hear, download your answers at the end, and drop them here.",
                    elem_id="listen-status",
                    elem_classes="status",
                )
                test = gr.HTML("", elem_id="listen-test")
                scores = gr.Markdown("", elem_id="listen-scores")
        start.click(
            self._make,
            [files, num, bars, seed],
            [status, test, scores, self._test],
            concurrency_limit=None,
            show_progress="hidden",
        )
        answers.change(self._score, [answers, self._test], [scores], show_progress="hidden")

    def _make(
        self, files: list[str] | None, num: int, bars: int, seed: int, request: gr.Request
    ) -> Iterator[list[Any]]:
        with told():
            if not files or len(files) < num:
                raise InputError(f"there are {len(files or ())} pieces by people, but {num} are asked for: drop more")
            studio = self._studio()
            people = [studio.read(Path(file)).score for file in files[:num]]
            machine: list[ScoreTick] = []
            for number in range(num):
                yield [f"Composing piece {number + 1} of {num} …", "", "", None]
                *_, picture = studio.compose(Wish(bars=bars, seed=seed + number), f"{request.session_hash}-listen")
                assert picture.score is not None
                machine.append(picture.score)
            yield ["Playing the pieces into files …", "", "", None]
            folder = self._write(dict(zip(_ARMS, (people, machine), strict=True)), seed, bars)
        address = f"{ADDRESS}/{for_html(folder.name)}/index.html"
        yield [
            f"{2 * num} pieces in random order. The test alone, for other listeners of this machine: "
            f'<a href="{address}" target="_blank">{address}</a>',
            f'<iframe src="{address}" title="listening test" class="listening-test"></iframe>',
            "",
            str(folder),
        ]

    def _write(self, arms: dict[str, list[ScoreTick]], seed: int, bars: int) -> Path:
        count = sum(1 for _ in self._tests.iterdir())
        folder = self._tests / f"test-{count + 1}"
        self._workshop.run(listening.write_listening_test, folder, arms, seed, bars)
        return folder

    def _score(self, files: Sequence[str] | None, test: str | None) -> str:
        """A table of the answers."""
        if not files:
            return ""
        with told():
            if test is None:
                raise InputError("there is no test yet: press Make the test first")
            key = listening.read_key(Path(test))
            answers = [listening.read_answers(Path(file), key) for file in files]
            return listening.scores_table(listening.score_answers(key, answers))


STYLE = """
.listening-test { width: 100%; height: 700px; border: 1px solid var(--border-color-primary); border-radius: 6px; }
"""
