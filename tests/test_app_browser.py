"""`midimamba app` in a real browser: the command is started, and its page is used as a musician uses it."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from app_support import Visit, chromium, make_song, save_model, started, visit
from symusic import Score

from support import make_score

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    chromium()
    folder = tmp_path_factory.mktemp("app")
    save_model(folder / "tiny")
    save_model(folder / "midimamba-app" / "slow", max_new_tokens=4096, temperature=1.25)
    with started(folder, "tiny") as address, visit(address) as visited:
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
    page.click("#compose-controls button")
    # The model knows keys, and nothing else is asked.
    assert page.locator("#compose-controls [data-testid=block-info]").all_inner_texts() == ["Key"]
    page.click("#compose-constraints button")
    visited.choose("Scale", "C-major")
    visited.choose("Lowest pitch", "C3 (48)")
    visited.choose("Highest pitch", "C6 (84)")
    visited.choose("Rhythm", "eighth notes")
    visited.choose("Only these instruments", "violin")
    visited.choose("Only these instruments", "cello")
    page.click("#compose-start")
    page.wait_for_selector("#compose-roll .roll-note")
    page.wait_for_selector("#compose-midi")
    shown = page.locator("#compose-roll .roll-note").count()
    score = Score(str(downloaded(visited, "#compose-midi", tmp_path)))
    assert score.note_num() == shown > 0
    pitches = {note.pitch for track in score.tracks if not track.is_drum for note in track.notes}
    assert {track.program for track in score.tracks} <= {40, 42}
    assert {pitch % 12 for pitch in pitches} <= {0, 2, 4, 5, 7, 9, 11}
    assert pitches <= set(range(48, 85))
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
    visited.choose("Generator", "midimamba-app/slow")
    page.wait_for_function("() => document.querySelector('#compose-temperature input').value === '1.25'")
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
    make_song().dump_midi(song)
    visited.drop("#compose-file", song)
    page.wait_for_selector("#compose-roll .roll-note")
    page.click("#compose-mode >> text=Write some bars again")
    page.wait_for_selector("#compose-roll .roll-chosen")  # bars 1 and 2
    page.click("#compose-roll [data-bar='4']")
    page.wait_for_function("() => document.querySelector('#compose-last input').value === '4'")
    page.click("#compose-start")
    page.wait_for_selector("#compose-midi")
    before, after = Score(str(song)), Score(str(downloaded(visited, "#compose-midi", tmp_path)))
    end = 4 * 4 * before.ticks_per_quarter  # four bars
    kept = [{(n.time, n.pitch) for t in one.tracks for n in t.notes if n.time >= end} for one in (before, after)]
    assert kept[0] == kept[1]
    assert before != after
    visited.photograph("infill")


def test_a_blind_test_is_made_answered_and_scored(visited: Visit, tmp_path: Path) -> None:
    page = visited.page
    page.click("role=tab[name=Listen]")
    page.wait_for_selector("#listen-start")
    song = tmp_path / "song.mid"
    make_score(3, bars=4).dump_midi(song)
    visited.drop("#listen-files", song)
    page.wait_for_selector("#listen-files a[download='song.mid']")
    page.fill("#listen-num input[type=number]", "1")
    page.fill("#listen-bars input[type=number]", "2")
    page.click("#listen-start")
    inside = page.frame_locator("#listen-test iframe")
    inside.locator("audio").first.wait_for(state="attached")
    visited.photograph("listen")
    address = str(page.get_attribute("#listen-test iframe", "src"))
    key = page.request.get(f"{visited.address}{address.replace('index.html', 'key.json')}")
    assert (key.status, page.request.get(f"{visited.address}{address}").status) == (404, 200)
    for _ in range(2):
        inside.locator("label:visible:has-text('4')").check()
        inside.locator("label:visible:has-text('a person')").check()
        inside.locator("#next").click()
    with page.expect_download() as download:
        inside.locator("#download").click()
    download.value.save_as(tmp_path / "answers.json")
    visited.drop("#listen-answers", tmp_path / "answers.json")
    page.wait_for_selector("#listen-scores >> text=1 listener.")
    table = page.inner_text("#listen-scores table >> nth=0")
    assert table.count("4.00") == 2
    assert "the generator" in table
    assert "your music" in table


def test_a_generator_is_trained_and_played_with(visited: Visit, tmp_path: Path) -> None:
    page = visited.page
    page.click("role=tab[name=Train]")
    page.click("#train-start")
    assert "there is no music to train on: drop MIDI files, a folder or a zip first" in visited.messages()
    with zipfile.ZipFile(tmp_path / "music.zip", "w") as archive:
        for seed in range(12):
            archive.writestr(f"{seed}.mid", make_score(seed).dumps_midi())
    visited.drop("#train-files", tmp_path / "music.zip")
    page.wait_for_selector("#train-files a[download='music.zip']")
    page.fill("#train-minutes input", "1")
    page.click("#train-start")
    page.wait_for_selector("#train-play", timeout=180_000)
    assert page.locator("#train-curve circle").count() > 1
    visited.photograph("train")
    page.click("#train-play")
    page.wait_for_selector("#compose-start:visible")
    assert page.input_value("#compose-model input").endswith("my music")
    page.wait_for_function("() => !document.querySelector('#compose-controls')")  # it was trained without controls


def test_who_has_no_music_trains_a_first_generator_on_chorales(visited: Visit, tmp_path: Path) -> None:
    pytest.importorskip("music21", reason="music21 is not installed: pip install -e '.[demo]'")
    with started(tmp_path) as address:
        page = Visit(address, visited.page.context.browser, "#compose-first-generator").page
        page.click("#compose-first-generator")
        page.wait_for_selector("#train-status >> text=Training …")
        page.click("#train-stop")
        page.wait_for_selector("#train-status >> text=Stopped.")
        page.close()
