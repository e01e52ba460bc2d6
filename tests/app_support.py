"""The page of `midimamba app` in a real browser, for tests.

It is also a program, which photographs what a trained generator composes: `python tests/app_support.py MODEL FOLDER`
writes the picture `app-compose.png` of the docs, and `app-infill.png` if the generator can fill gaps. Pictures of
untrained ones look random.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving_support import make_pair
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba import MidiProcessor
from midimamba.tokenization.tokenizations import GAP

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 60_000  # milliseconds


def chromium() -> str:
    """The browser of this machine; without one, the test is skipped."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[app]'")
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[test]'")
    found = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    return found


def save_model(folder: Path, max_new_tokens: int = 240, temperature: float = 1.0) -> Path:
    """A tiny generator that knows a key and can fill gaps, and writes short pieces unless it may write long ones."""
    model, processor = make_pair()
    model.generation_config.update(max_new_tokens=max_new_tokens, temperature=temperature, do_sample=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_song() -> ScoreTick:
    """Eight bars of a melody and its chords."""
    song = Score(480)
    song.tempos.append(Tempo(0, 100.0))
    song.time_signatures.append(TimeSignature(0, 4, 4))
    melody, chords = Track(program=73), Track(program=0)
    for bar, root in enumerate((0, 5, 7, 0, 9, 5, 7, 0)):
        for beat, step in enumerate((0, 4, 7, 4)):
            melody.notes.append(Note(480 * (4 * bar + beat), 480, 72 + (root + step) % 12, 90))
        for step in (0, 4 - (root == 9), 7):
            chords.notes.append(Note(480 * 4 * bar, 480 * 4, 48 + (root + step) % 12, 60))
    song.tracks.append(melody)
    song.tracks.append(chords)
    return song


@contextmanager
def started(folder: Path, *arguments: object) -> Iterator[str]:
    """The address of a page that the real command shows, started in a folder. It has to end with Ctrl-C."""
    command = [sys.executable, "-m", "midimamba.cli", "app", *map(str, arguments), "--port", "0", "--no-browser"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert "the page is at http://127.0.0.1:" in line, line
            yield line.split()[4].rstrip(";")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()


class Visit:
    """
    A browser with the page.

    Args:
        address (`str`): of the page.
        browser (`Browser`): of Playwright.
        first (`str`): what is there when the page is.
    """

    def __init__(self, address: str, browser: Any, first: str = "#compose-start"):
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        self.page.set_default_timeout(_PATIENCE)
        self.address = address
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector(first)

    def hosts(self) -> set[str]:
        """The hosts that the browser asked."""
        asked = {urlsplit(url) for url in self.requests}
        return {url.netloc for url in asked if url.scheme not in ("data", "blob")}

    def drop(self, where: str, *files: Path) -> None:
        """Give files to a place for them."""
        self.page.set_input_files(f"{where} input[type=file]", [str(file) for file in files])

    def choose(self, label: str, value: str) -> None:
        """Choose a value in a list."""
        field = self.page.get_by_label(label, exact=True)
        field.fill(value)
        self.page.get_by_role("option", name=value, exact=True).click()
        field.blur()
        self.page.wait_for_function("() => !document.querySelector('[role=option]')")

    def messages(self) -> list[str]:
        """What the page complains of."""
        self.page.wait_for_selector("[data-testid=toast-text]")
        return [text.strip() for text in self.page.locator("[data-testid=toast-text]").all_inner_texts()]

    def photograph(self, name: str) -> None:
        """Write a picture of the page, if MIDIMAMBA_SCREENSHOTS names a folder for them."""
        if folder := os.environ.get("MIDIMAMBA_SCREENSHOTS"):
            for button in self.page.locator("[data-testid=toast-close]").all():
                button.click()
            self.page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
            self.page.mouse.move(0, 0)
            self.page.wait_for_timeout(1000)  # until what moves has come to rest
            self.page.screenshot(path=Path(folder) / f"app-{name}.png")


@contextmanager
def visit(address: str) -> Iterator[Visit]:
    """A browser with the page at an address."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield Visit(address, browser)
        finally:
            browser.close()


def photograph_trained(model: Path, folder: Path) -> None:
    """Compose 16 bars with a trained generator, fill some again, and write pictures of them."""
    os.environ["MIDIMAMBA_SCREENSHOTS"] = str(folder)
    with TemporaryDirectory() as scratch:
        for kind in ("", "-discriminator", "-musical-discriminator"):
            (Path(scratch) / f"bach{kind}").symlink_to(model.with_name(f"{model.name}{kind}").resolve())
        with started(Path(scratch), "bach") as address, visit(address) as visited:
            visited.page.fill("#compose-bars input[type=number]", "16")
            visited.page.get_by_label("Another seed every time").uncheck()
            visited.page.click("#compose-start")
            visited.page.wait_for_selector("#compose-abc")
            visited.photograph("compose")
            if GAP in MidiProcessor.from_pretrained(model).midi_tokenizer.special_tokens:
                _photograph_filling(visited, Path(scratch) / "song.mid")


def _photograph_filling(visited: Visit, song: Path) -> None:
    """Write bars 5 to 8 of what was composed again, and write a picture of them."""
    page = visited.page
    with page.expect_download() as download:
        page.click("#compose-midi")
    download.value.save_as(song)
    visited.drop("#compose-file", song)
    page.wait_for_selector("#compose-roll .roll-note")
    page.click("#compose-mode >> text=Write some bars again")
    page.wait_for_selector("#compose-roll .roll-chosen")
    page.click("#compose-roll [data-bar='5']")
    page.wait_for_function("() => document.querySelector('#compose-last input').value === '5'")
    page.fill("#compose-first input", "5")
    page.fill("#compose-last input", "8")
    page.locator("#compose-last input").blur()
    page.click("#compose-start")
    page.wait_for_selector("#compose-midi")
    visited.photograph("infill")


if __name__ == "__main__":
    photograph_trained(Path(sys.argv[1]), Path(sys.argv[2]))
