"""The tab "Train": a generator from the user's own music."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from midimamba.app.curve import draw_curve
from midimamba.app.telling import told
from midimamba.app.training_run import State, TrainingRun, check_name, collect
from midimamba.corpus.sources import CHORALES
from midimamba.errors import InputError
from midimamba.text import for_markdown, shortened
from midimamba.tokenization.ingest import MUSIC_SUFFIXES

_ARCHIVES = (".zip", ".tar", ".gz", ".bz2", ".xz")
_SECONDS = 1.0  # between two looks at the run
_LONGEST_LINE = 300
_SHORTEST, _LONGEST = 0.2, 24 * 60.0
_CONTROLS = ("key", "tempo", "instruments", "density")
_FIRST = "bach"
"""The name of the generator for those who have no music at hand."""
_FIRST_FLAGS = ("--limit", "60", "--steps", "200", "--eval_steps", "50", "--save_steps", "50")
"""Music21 takes minutes to read all chorales, seconds for these. Steps: a slow machine has to learn as much."""
_FIRST_MINUTES = 2.0


class TrainTab:
    """
    The tab. Making it draws it. There is one run at a time, whoever looks at it.

    Args:
        out (`Path`): the folder for the generators.
    """

    def __init__(self, out: Path):
        self._out = out
        self._run: TrainingRun | None = None
        self._minutes = 10.0
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                self._draw_asked()
            with gr.Column(scale=2, min_width=480):
                with gr.Row():
                    self._start = gr.Button("Train", variant="primary", elem_id="train-start")
                    self._stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="train-stop")
                self._status = gr.Markdown(
                    "Drop music and press Train.", elem_id="train-status", elem_classes="status"
                )
                self._curve = gr.HTML(draw_curve([], [], self._minutes), elem_id="train-curve")
                self.play = gr.Button("Play with it", variant="primary", visible=False, elem_id="train-play")
        self.timer = gr.Timer(_SECONDS, active=False)
        self.outputs = [self._status, self._curve, self._start, self._stop, self.play, self.timer]
        self._start.click(
            self._begin,
            [self._files, self._folder, self._name, self._time, self._infill, self._controls],
            self.outputs,
            show_progress="hidden",
        )
        self._stop.click(self._end, None, None, queue=False)
        self.timer.tick(self.look, None, self.outputs, show_progress="hidden")

    def _draw_asked(self) -> None:
        self._files = gr.File(
            label="MIDI or ABC files, or a zip of them",
            file_count="multiple",
            file_types=[*MUSIC_SUFFIXES, *_ARCHIVES],
            height=160,
            elem_id="train-files",
        )
        with gr.Accordion("Or a whole folder", open=False):
            self._folder = gr.File(label="A folder", file_count="directory", height=160, elem_id="train-folder")
        with gr.Group():
            self._name = gr.Textbox("my music", label="Name of the generator", elem_id="train-name")
            self._time = gr.Number(10, label="Minutes", info="for everything, from now on", elem_id="train-minutes")
            self._infill = gr.Checkbox(True, label="Learn to write bars again", info="for infilling under Compose")
            self._controls = gr.CheckboxGroup(
                [(name.capitalize(), name) for name in _CONTROLS],
                label="Learn to be asked for",
                info="under Compose, for a key such as C-major",
                elem_id="train-controls",
            )

    @property
    def trained(self) -> str:
        """The folder of the generator that was trained last."""
        return "" if self._run is None else str(self._run.folder)

    def close(self) -> None:
        """Stop the run."""
        if self._run is not None:
            self._run.close()

    def _begin(
        self,
        files: list[str] | None,
        folder: list[str] | None,
        name: str,
        minutes: float,
        infill: bool,
        controls: list[str],
    ) -> list[Any]:
        with told():
            self._check_free()
            if not _SHORTEST <= minutes <= _LONGEST:
                raise InputError(f"minutes is {minutes:g}: give a number from {_SHORTEST:g} to {_LONGEST:g}")
            target = check_name(name, self._out)
            dropped = [Path(file) for file in [*(files or ()), *(folder or ())]]
            music = collect([file for file in dropped if _is_music(file)], target)
            flags = [
                "--minutes",
                str(minutes),
                *(["--infill"] if infill else []),
                *(["--controls", *controls] if controls else []),
            ]
            self._train(music, target, minutes, flags)
        return self.look()

    def begin_first(self) -> list[Any]:
        """Train on some of Bach's chorales for a minute, for those who have no music at hand; what the tab shows."""
        with told():
            self._check_free()
            target = check_name(_FIRST, self._out)
            self._train(CHORALES, target, _FIRST_MINUTES, _FIRST_FLAGS)
        return self.look()

    def _check_free(self) -> None:
        if self._run is not None and self._run.state().code is None:
            raise InputError("a generator is being trained: wait for it, or stop it")

    def _train(self, music: Path | str, target: Path, minutes: float, flags: Sequence[str]) -> None:
        self._minutes = minutes  # the width of the picture, which grows if they take longer
        self._run = TrainingRun(music, target, flags)

    def _end(self) -> None:
        if self._run is not None:
            self._run.stop()

    def look(self) -> list[Any]:
        """What the tab shows of the run."""
        if self._run is None:
            return [gr.skip()] * len(self.outputs)
        state = self._run.state()
        at_work = state.code is None
        return [
            _line(state, self._run.folder),
            draw_curve(state.training, state.held_out, self._minutes),
            gr.update(interactive=not at_work),
            gr.update(interactive=at_work),
            gr.update(visible=state.code == 0),
            gr.Timer(active=at_work),
        ]


def _is_music(file: Path) -> bool:
    return file.suffix.lower() in {*MUSIC_SUFFIXES, *_ARCHIVES}


def _line(state: State, folder: Path) -> str:
    """Where a run stands, in one line."""
    said = for_markdown(shortened(state.line, _LONGEST_LINE))
    if state.code is None:
        steps = f"step {state.progress}, " if state.progress and state.training else ""
        return f"Training … {steps}{said}"
    if state.code == 0:
        return f"**Done.** The generator is in {for_markdown(str(folder))}."
    if state.was_stopped:
        return "**Stopped.** Train with the same name and music to go on."
    return f"**This did not work.** {said}"
