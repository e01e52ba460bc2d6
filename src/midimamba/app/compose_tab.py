"""The tab "Compose": music from nothing, the continuation of a file, or other music for some of its bars."""

import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.exceptions import HTTPException

from midimamba.app.growing import Picture, Wish
from midimamba.app.roll import Marks, Span, bars_shown, draw_roll, track_name
from midimamba.app.studio import MAX_BARS, Studio
from midimamba.app.telling import problem, told
from midimamba.app.workshop import SUFFIXES, Workshop
from midimamba.evaluation.rendering import pitch_name
from midimamba.text import for_markdown
from midimamba.tokenization.constraints import MODES
from midimamba.tokenization.controls import DRUMS, INSTRUMENTS
from midimamba.tokenization.ingest import MUSIC_SUFFIXES
from midimamba.tokenization.sampling_limits import BEST_OF

CONTINUE, INFILL = "Continue it", "Write some bars again"
_TONICS = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
_GRIDS = {
    "quarter notes": "1/4",
    "eighth notes": "1/8",
    "sixteenth notes": "1/16",
    "triplets of eighth notes": "1/12",
}
_PITCHES = [(f"{pitch_name(pitch)} ({pitch})", pitch) for pitch in range(21, 109)]
_MAX_SEED = 10**6
_CANCELLED = 409
_PLAYING = "Playing it into a file …"
# A click on a bar of the roll.
_CLICKS = """element.addEventListener('click', (event) => {
  const bar = event.target.closest('[data-bar]');
  if (bar) trigger('click', {bar: Number(bar.dataset.bar)});
});"""

Values = dict[Any, Any]


class ComposeTab:
    """
    The tab for one generator. Making it draws it.

    Args:
        studio ([`~midimamba.app.studio.Studio`]): the generator.
        workshop ([`~midimamba.app.workshop.Workshop`]): writes the files.
    """

    def __init__(self, studio: Studio, workshop: Workshop):
        self._studio, self._workshop = studio, workshop
        self._asked: dict[str, Any] = {}  # what the user can set, by name
        self._controls: dict[str, Any] = {}
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                self._draw_beginning()
                self._draw_sampling()
                self._draw_controls()
                self._draw_constraints()
            with gr.Column(scale=3, min_width=480):
                self._draw_result()
        self._connect()

    def _draw_beginning(self) -> None:
        self._asked["file"] = gr.File(
            label="Begin with (MIDI or ABC, optional)",
            file_types=[*MUSIC_SUFFIXES],
            height=160,
            elem_id="compose-file",
        )
        can_infill = self._studio.information.can_infill
        with gr.Group(visible=False) as self._about_file:
            # A model that has not learned to fill gaps is not asked to.
            self._asked["mode"] = gr.Radio(
                [CONTINUE, INFILL],
                value=CONTINUE,
                label="What to do with it",
                visible=can_infill,
                elem_id="compose-mode",
            )
            with gr.Row(visible=False) as self._gap:
                self._asked["first"] = gr.Number(
                    1, label="First bar", precision=0, min_width=90, elem_id="compose-first"
                )
                self._asked["last"] = gr.Number(1, label="Last bar", precision=0, min_width=90, elem_id="compose-last")
            self._asked["tracks"] = gr.CheckboxGroup(
                [], label="Tracks to write again; none stands for all", visible=False
            )

    def _draw_sampling(self) -> None:
        with gr.Group():
            self._asked["bars"] = gr.Slider(1, MAX_BARS, 8, step=1, label="New bars", elem_id="compose-bars")
            own = float(self._studio.information.sampling["temperature"])
            self._asked["temperature"] = gr.Slider(
                0.1,
                2.0,
                own,
                step=0.05,
                label="Temperature",
                info="lower is safer, higher is wilder",
                elem_id="compose-temperature",
            )
            self._asked["choose"] = gr.Checkbox(
                True,
                label=f"Draw {BEST_OF} pieces and let the discriminators choose",
                info="they were trained with this generator",
                visible=bool(self._studio.information.discriminators),
                elem_id="compose-choose",
            )
            with gr.Row():
                self._asked["seed"] = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="compose-seed")
                self._asked["other_seed"] = gr.Checkbox(True, label="Another seed every time", min_width=140)

    def _draw_controls(self) -> None:
        """Only the controls that the model knows."""
        known = self._studio.information.controls
        if not known:
            return
        with gr.Accordion("What the music should be like", open=False, elem_id="compose-controls"):
            for name, values in known.items():
                self._controls[name] = gr.Dropdown(
                    values,
                    value=[] if name == "instruments" else None,
                    label=name.capitalize(),
                    multiselect=name == "instruments",
                )

    def _draw_constraints(self) -> None:
        with gr.Accordion("What no new note may break", open=False, elem_id="compose-constraints"):
            scales = [f"{tonic}-{mode}" for tonic in _TONICS for mode in MODES]
            self._asked["scale"] = gr.Dropdown(
                scales,
                value=None,
                label="Scale",
                info="or pitch classes such as C,E,G",
                allow_custom_value=True,
                elem_id="compose-scale",
            )
            with gr.Row():
                self._asked["low"] = gr.Dropdown(_PITCHES, value=None, label="Lowest pitch", min_width=120)
                self._asked["high"] = gr.Dropdown(_PITCHES, value=None, label="Highest pitch", min_width=120)
            with gr.Row():
                self._asked["polyphony"] = gr.Dropdown(
                    list(range(1, 17)), value=None, label="Notes at once", info="at most", min_width=120
                )
                self._asked["grid"] = gr.Dropdown(
                    list(_GRIDS.items()), value=None, label="Rhythm", info="notes begin on", min_width=120
                )
            self._asked["instruments"] = gr.Dropdown(
                [*INSTRUMENTS, DRUMS], value=[], label="Only these instruments", multiselect=True
            )

    def _draw_result(self) -> None:
        with gr.Row():
            self._start = gr.Button("Compose", variant="primary", elem_id="compose-start")
            self._cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="compose-cancel")
        self._status = gr.Markdown("Press Compose.", elem_id="compose-status", elem_classes="status")
        self._roll = gr.HTML(draw_roll(None, Marks(least=8)), js_on_load=_CLICKS, elem_id="compose-roll")
        self._sound = gr.Audio(
            label="Listen", interactive=False, visible=False, buttons=[], elem_id="compose-sound", type="filepath"
        )
        self._downloads: dict[str, Any] = {}
        with gr.Row():
            for suffix in SUFFIXES:
                kind = {".mid": "MIDI", ".wav": "WAV", ".abc": "ABC"}[suffix]
                self._downloads[suffix] = gr.DownloadButton(
                    f"Download {kind}", visible=False, elem_id=f"compose-{kind.lower()}"
                )

        self._changes = gr.Markdown("", elem_id="compose-changes", elem_classes="small")

    def _connect(self) -> None:
        asked = self._asked
        for component in [*asked.values(), *self._controls.values()]:
            component.interactive = True  # Gradio would take what events also change for results, and lock them
        shown = [self._about_file, self._gap]
        shown += [asked[name] for name in ("tracks", "bars", "instruments", "choose")]
        places = [asked["first"], asked["last"]]
        bars = {asked["file"], asked["mode"], *places}
        asked["file"].change(
            self._take_file, {asked["file"]}, [self._roll, asked["tracks"], *places], show_progress="hidden"
        ).then(self._show, {asked["file"], asked["mode"]}, shown, show_progress="hidden")
        asked["mode"].change(self._show, {asked["file"], asked["mode"]}, shown, show_progress="hidden").then(
            self._mark, bars, [self._roll], show_progress="hidden"
        )
        gr.on([place.input for place in places], self._mark, bars, [self._roll], show_progress="hidden")
        self._roll.click(self._choose, bars, [*places, self._roll], show_progress="hidden")
        downloads = self._downloads.values()
        results = [self._roll, self._status, self._sound, *downloads, self._changes, self._start, self._cancel]
        self._start.click(
            self._compose,
            {*asked.values(), *self._controls.values()},
            [*results, asked["seed"]],
            concurrency_limit=None,
            show_progress="hidden",
        )
        self._cancel.click(self._stop, None, None, queue=False)

    def _show(self, values: Values) -> list[Any]:
        """Show what there is to ask for."""
        has_file = values[self._asked["file"]] is not None
        fills = has_file and self._fills(values)
        about = self._studio.information
        chooses = bool(about.discriminators) and not fills
        visible = (has_file and about.can_infill, fills, fills, not fills, not fills, chooses)
        return [gr.update(visible=one) for one in visible]

    def _fills(self, values: Values) -> bool:
        return self._studio.information.can_infill and values[self._asked["mode"]] == INFILL

    def _take_file(self, values: Values) -> list[Any]:
        """Read a dropped file and draw it."""
        file = values[self._asked["file"]]
        if file is None:
            return [draw_roll(None, Marks(least=8)), gr.update(choices=[], value=[]), 1, 1]
        with told():
            score = self._studio.read(Path(file)).score
        bars = bars_shown(score)
        tracks = [(f"{number} {track_name(track)}", number) for number, track in enumerate(score.tracks, 1)]
        return [
            draw_roll(score),
            gr.update(choices=tracks, value=[]),
            1,
            min(2, bars),
        ]

    def _mark(self, values: Values) -> str:
        """The roll of the file with the chosen bars."""
        file = values[self._asked["file"]]
        if file is None:
            return draw_roll(None, Marks(least=8))
        with told():
            score = self._studio.read(Path(file)).score
        return draw_roll(score, Marks(chosen=self._span(values) if self._fills(values) else None))

    def _span(self, values: Values) -> Span:
        first, last = (int(values[self._asked[name]] or 1) for name in ("first", "last"))
        return min(first, last), max(first, last)

    def _choose(self, values: Values, event: gr.EventData) -> list[Any]:
        """A click on a bar outside of the chosen ones extends them to it; on one of them, it alone is chosen."""
        first, last = self._span(values)
        bar = int(event.bar)
        if values[self._asked["file"]] is None or not self._fills(values):
            return [gr.skip(), gr.skip(), gr.skip()]
        span = (bar, bar) if first <= bar <= last else (min(first, bar), max(last, bar))
        chosen = values | dict(zip((self._asked["first"], self._asked["last"]), span, strict=True))
        return [*span, self._mark(chosen)]

    def _compose(self, values: Values, request: gr.Request) -> Iterator[Values]:
        """Compose, and show what there is. However it ends, the next piece can be composed."""
        try:
            yield self._buttons(True) | {self._status: "Composing …", self._changes: ""} | self._files({})
            yield from self._pictures(self._wish(values), str(request.session_hash))
            yield self._buttons(False)
        except Exception as error:
            was_stopped = isinstance(error, HTTPException) and error.status_code == _CANCELLED
            line = "Cancelled." if was_stopped else "There is no new piece."
            yield self._buttons(False) | {self._status: line}
            if not was_stopped:
                raise problem(error) from None

    def _pictures(self, wish: Wish, session: str) -> Iterator[Values]:
        """What the page shows of a piece while it is composed, and then of its files."""
        picture: Picture | None = None
        for picture in self._studio.compose(wish, session):
            yield {
                self._roll: draw_roll(picture.score, picture.marks),
                self._status: _PLAYING if picture.is_whole else _composing(picture),
            }
        assert picture is not None
        assert picture.score is not None
        written = self._workshop.write(picture.score, f"piece-{wish.seed}")
        yield {
            self._status: f"{picture.new_notes} new notes, seed {wish.seed}.",
            self._changes: "\n".join(f"- {for_markdown(change)}" for change in written.changes),
            self._asked["seed"]: wish.seed,
        } | self._files(written.files)

    def _files(self, files: Mapping[str, Path]) -> Values:
        """The player and the buttons for files that there are."""
        places = [(self._sound, ".wav"), *((button, suffix) for suffix, button in self._downloads.items())]
        return {place: gr.update(visible=suffix in files, value=files.get(suffix)) for place, suffix in places}

    def _buttons(self, composing: bool) -> Values:
        return {self._start: gr.update(interactive=not composing), self._cancel: gr.update(interactive=composing)}

    def _wish(self, values: Values) -> Wish:
        def given(name: str) -> Any:
            return values[self._asked[name]]

        fills = self._fills(values) and given("file") is not None
        controls = {name: values[component] for name, component in self._controls.items() if values[component]}
        return Wish(
            file=None if given("file") is None else Path(given("file")),
            span=self._span(values) if fills else None,
            tracks=given("tracks") or None,
            bars=int(given("bars")),
            temperature=float(given("temperature")),
            choose=bool(given("choose")),
            seed=secrets.randbelow(_MAX_SEED) if given("other_seed") else int(given("seed") or 0),
            controls=controls,
            constraints=_constraints({name: given(name) for name in _CONSTRAINTS}, fills),
        )

    def _stop(self, request: gr.Request) -> None:
        self._studio.cancel(str(request.session_hash))


def _composing(picture: Picture) -> str:
    return f"Composing … {picture.new_notes} notes" if picture.new_notes else "Composing …"


_CONSTRAINTS = ("scale", "low", "high", "polyphony", "grid", "instruments")


def _constraints(given: Mapping[str, Any], fills: bool) -> dict[str, Any]:
    """Constraints in the words of the command line."""
    found = {name: given[name] for name in ("scale", "grid") if given[name]}
    if given["low"] is not None or given["high"] is not None:
        low = 0 if given["low"] is None else given["low"]
        high = 127 if given["high"] is None else given["high"]
        found["pitch_range"] = (f"{low}-{high}",)
    if given["polyphony"]:
        found["polyphony"] = int(given["polyphony"])
    if given["instruments"] and not fills:  # the tracks of a gap decide its instruments
        found["instruments"] = tuple(given["instruments"])
    return found
