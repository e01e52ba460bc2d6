"""`midimamba app` in a real browser: the command is started, and its page is used as a musician uses it."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from app_support import Visit, chromium, save_model, started, visit
from symusic import Score

from support import make_score

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    chromium()
    folder = tmp_path_factory.mktemp("app")
    with started(save_model(folder / "tiny"), "--out", folder / "trained") as address, visit(address) as visited:
        yield visited
        assert visited.hosts() == {urlsplit(visited.address).netloc}


def downloaded(visited: Visit, button: str, folder: Path) -> Path:
    with visited.page.expect_download() as download:
        visited.page.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_music_from_nothing_is_seen_heard_and_downloaded(visited: Visit, tmp_path: Path) -> None:
    page = visited.page
    page.click("#compose-start")
    page.wait_for_selector("#compose-roll .roll-note")
    page.wait_for_selector("#compose-midi")
    shown = page.locator("#compose-roll .roll-note").count()
    score = Score(str(downloaded(visited, "#compose-midi", tmp_path)))
    assert score.note_num() == shown > 0
    assert f"{shown} new notes" in page.inner_text("#compose-status")
    assert downloaded(visited, "#compose-wav", tmp_path).read_bytes()[:4] == b"RIFF"
    assert downloaded(visited, "#compose-abc", tmp_path).read_text().startswith("X:1")
    page.click("#compose-sound button[aria-label='Play']")
    page.wait_for_function(
        """() => [...document.querySelectorAll('audio')].some((audio) => audio.src && audio.currentTime > 0.1)
        || document.querySelector('#compose-sound #time')?.textContent !== '0:00'"""
    )


def test_a_bad_file_is_refused_in_one_line_and_the_page_goes_on(visited: Visit, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mid"
    bad.write_bytes(b"MThd, but nothing else")
    visited.drop("#compose-file", bad)
    (line,) = visited.messages()
    assert line.startswith("the file cannot be used: ")
    assert "\n" not in line
    assert "Traceback" not in visited.page.content()


def test_what_is_composed_can_be_cancelled(visited: Visit) -> None:
    page = visited.page
    page.reload()
    page.wait_for_selector("#compose-start")
    assert not page.locator("[role=tabpanel] :is(input, textarea):disabled").count()
    page.fill("#compose-bars input[type=number]", "64")
    page.click("#compose-start")
    page.click("#compose-cancel")
    page.wait_for_selector("#compose-status >> text=Cancelled")
    page.wait_for_selector("#compose-start:enabled")
    assert not page.locator("#compose-midi").is_visible()


def test_bars_of_a_file_are_marked_and_written_again(visited: Visit, tmp_path: Path) -> None:
    page = visited.page
    page.reload()
    song = tmp_path / "song.mid"
    make_score(3, bars=4).dump_midi(song)
    visited.drop("#compose-file", song)
    page.wait_for_selector("#compose-roll .roll-note")
    page.click("#compose-mode >> text=Write some bars again")
    page.wait_for_selector("#compose-roll .roll-chosen")
    page.click("#compose-start")
    page.wait_for_selector("#compose-midi")
    before, after = Score(str(song)), Score(str(downloaded(visited, "#compose-midi", tmp_path)))
    end = 2 * 5 * before.ticks_per_quarter  # two bars of at most five quarters
    kept = [{(n.time, n.pitch) for t in one.tracks for n in t.notes if n.time >= end} for one in (before, after)]
    assert kept[0] == kept[1]
    assert before != after
