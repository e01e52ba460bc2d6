"""A listening test is blind, its key leads back to its music, and it is scored over pieces."""

import gzip
import json
import re
import wave
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from symusic import Note, Score, Track
from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.evaluation import listening
from midimamba.evaluation.features import opening
from midimamba.evaluation.listening import (
    Answer,
    Key,
    draw_arms,
    read_answers,
    read_key,
    score_answers,
    scores_table,
    write_listening_test,
)
from midimamba.evaluation.sound import load_soundfont, render_sounds


def make_piece(pitch: int, bars: int = 3, velocity: int = 64, is_drum: bool = False) -> ScoreTick:
    """Two notes per bar of 4/4, the second at its end: pieces of the same number of bars have the same length."""
    score, track = Score(480), Track(is_drum=is_drum)
    for bar in range(bars):
        for start in (bar * 1920, bar * 1920 + 1440):
            track.notes.append(Note(start, 480, pitch + bar, velocity))
    score.tracks.append(track)
    return score


PIECES = 6  # per arm: it is next to impossible that chance groups six and six
# Arms that differ in everything a file could reveal: loudness, length and register.
ARMS = {
    "quietsource": [make_piece(40 + index, bars=3, velocity=20) for index in range(PIECES)],
    "loudsource": [make_piece(60 + index, bars=9, velocity=120) for index in range(PIECES)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("listening") / "test"
    write_listening_test(target, ARMS, seed=3, bars=2)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Page(HTMLParser):
    """The parts of a page that matter here: its files with their players, questions and choices."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.players: list[str] = []
        self.choices: dict[str, dict[str, list[str]]] = {}
        self.labelled = False
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "section" and given.get("class") == "piece":
            self.file = given["data-file"] or ""
            self.choices[self.file] = {}
        elif tag == "audio":
            assert "controls" in given
            assert given["src"] == self.file
            self.players.append(self.file)
        elif tag == "label":
            self.labelled = True
        elif tag == "input":
            assert self.labelled
            assert given["type"] == "radio"
            self.choices[self.file].setdefault(given["name"] or "", []).append(given["value"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "label":
            self.labelled = False


def test_every_piece_of_every_arm_occurs_once(folder: Path) -> None:
    key = json.loads((folder / "key.json").read_text())
    assert set(contents(folder)) == {*key["pieces"], "key.json", "index.html"}
    assert (key["seed"], key["bars"]) == (3, 2)
    found = sorted((piece["arm"], piece["source"]) for piece in key["pieces"].values())
    assert found == sorted((arm, str(index)) for arm in ARMS for index in range(PIECES))


def test_the_key_leads_back_to_the_music(folder: Path, tmp_path: Path) -> None:
    pieces = json.loads((folder / "key.json").read_text())["pieces"]
    sources = {name: opening(ARMS[piece["arm"]][int(piece["source"])], 2) for name, piece in pieces.items()}
    render_sounds({tmp_path / name: source for name, source in sources.items()}, load_soundfont())
    for name in pieces:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    assert len({content for name, content in contents(folder).items() if name.endswith(".wav")}) == 2 * PIECES


def test_listeners_see_no_trace_of_the_arms(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    for arm in ARMS:
        assert arm not in page
    sounds = list(folder.glob("*.wav"))
    assert all(re.fullmatch(r"[0-9a-f]{6}\.wav", sound.name) for sound in sounds)
    arms = read_key(folder).arms
    in_page = sorted(arms, key=page.index)
    written = sorted(arms, key=lambda name: (folder / name).stat().st_mtime_ns)
    for order in (sorted(arms), in_page, written):
        changes = sum(arms[one] != arms[other] for one, other in pairwise(order))
        assert 1 < changes < len(order) - 1  # neither grouped nor in turn


def test_neither_loudness_nor_length_distinguishes_the_arms(folder: Path) -> None:
    seconds, peaks = set(), set()
    for sound in folder.glob("*.wav"):
        with wave.open(str(sound)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)
        seconds.add(len(samples) / 24_000)
        peaks.add(int(np.abs(samples).max()))
    assert max(seconds) - min(seconds) < 0.4  # some pitches fade more slowly than others
    assert max(peaks) - min(peaks) <= 1
    assert min(peaks) > 29000


def test_the_seed_determines_the_test(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 3), ("other", 4)):
        write_listening_test(tmp_path / name, ARMS, seed=seed, bars=2)
    assert contents(tmp_path / "same") == contents(folder)
    assert not set(read_key(tmp_path / "other").arms) & set(read_key(folder).arms)


def test_other_music_under_the_same_names_is_another_test(folder: Path, tmp_path: Path) -> None:
    raised = {arm: [piece.shift_pitch(1) for piece in pieces] for arm, pieces in ARMS.items()}
    write_listening_test(tmp_path / "raised", raised, seed=3, bars=2)
    first, second = read_key(folder), read_key(tmp_path / "raised")
    assert first.arms == second.arms
    assert first.test != second.test


def test_the_page_asks_two_questions_about_every_file(folder: Path) -> None:
    page = Page((folder / "index.html").read_text())
    files = {file.name for file in folder.glob("*.wav")}
    assert set(page.players) == files == set(page.choices)
    assert len(page.players) == 2 * PIECES
    groups = [group for choices in page.choices.values() for group in choices]
    assert (
        len(groups) == len(set(groups)) == 4 * PIECES
    )  # radio buttons with the same name would switch each other off
    for choices in page.choices.values():
        assert list(choices.values()) == [["1", "2", "3", "4", "5"], ["true", "false"]]
        assert [group.split("-")[0] for group in choices] == list(Answer._fields)
    assert page.tags["fieldset"] == page.tags["legend"] == 4 * PIECES
    assert page.tags["progress"] == 1
    assert read_key(folder).test in {value for name, value in page.attributes if name == "data-test"}


def test_the_page_needs_no_external_resources(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    page = Page(text)
    references = {value for name, value in page.attributes if name in {"src", "href", "action", "srcset"}}
    assert references == {file.name for file in folder.glob("*.wav")} | {"data:,"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|@[A-Z]+@", text)
    assert "key.json" not in text
    for used in re.findall(r'element\("(\w+)"\)', text):
        assert f'id="{used}"' in text


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(listening, "listening_page", fail)
    with pytest.raises(OSError, match="disk full"):
        write_listening_test(tmp_path / "test", ARMS, bars=1)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_replaced(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(FileExistsError):
        write_listening_test(folder, ARMS)
    assert contents(folder) == before


def test_compressed_files_are_drawn(tmp_path: Path) -> None:
    for arm, seed in (("one", 1), ("two", 2)):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "a.mid.gz").write_bytes(gzip.compress(make_piece(60 + seed).dumps_midi()))
    drawn = draw_arms([tmp_path / "one", tmp_path / "two"], 1, 2, 0)
    assert [len(draw.pieces) for draw in drawn.values()] == [1, 1]


def test_only_pieces_with_something_to_play_are_drawn(tmp_path: Path) -> None:
    for arm in ("one", "two"):
        (tmp_path / arm / "deep").mkdir(parents=True)
        for index in range(3):
            make_piece(50 + index).dump_midi(tmp_path / arm / "deep" / f"{index}.mid")
    make_piece(40, is_drum=True).dump_midi(tmp_path / "one" / "drums.mid")
    (tmp_path / "one" / "broken.mid").write_bytes(b"MThd")
    late = make_piece(50).shift_time(2 * 1920)
    late.dump_midi(tmp_path / "one" / "late.mid")
    folders = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(InputError, match="two has 3 pieces to listen to in 3 MIDI files, but --num asks for 4"):
        draw_arms(folders, num=4, bars=2)
    make_piece(60).dump_midi(tmp_path / "two" / "more.mid")
    drawn = draw_arms(folders, num=4, bars=2)
    assert {Path(file).name for file in drawn["one"].pieces} == {"0.mid", "1.mid", "2.mid", "drums.mid"}
    assert drawn["two"].passed_over == []
    with pytest.raises(InputError, match="one has 4 pieces to listen to in 6 MIDI files, but --num asks for 5"):
        draw_arms(folders, num=5, bars=2)
    assert len(draw_arms([tmp_path / "one", tmp_path / "one" / "deep"], num=3, bars=3)) == 2
    for seed in range(9):  # sooner or later, another seed draws another piece
        if set(draw_arms(folders, 1, 2, seed)["two"].pieces) != set(draw_arms(folders, 1, 2)["two"].pieces):
            return
    pytest.fail("the seed does not matter")


KEY = Key("id", {"a": "mle", "b": "mle", "c": "real", "d": "real", "e": "real"})


def test_scores_are_means_over_pieces() -> None:
    first = {"a": Answer(1, False), "b": Answer(2, False), "c": Answer(5, True), "d": Answer(4, True)}
    second = {"a": Answer(2, True), "c": Answer(3, True), "d": Answer(4, False)}
    scores = score_answers(KEY, [first, second])
    mle, real = scores.arms["mle"], scores.arms["real"]
    assert (mle.answers, mle.asked, real.answers, real.asked) == (3, 4, 4, 6)
    assert mle.rating.value == pytest.approx((1.5 + 2) / 2)  # and not 5 / 3, the mean of the answers
    assert mle.person.value == pytest.approx((0.5 + 0) / 2)
    assert real.rating.value == pytest.approx(4)  # nobody answered about piece e
    assert real.person.value == pytest.approx((1 + 0.5) / 2)
    assert {pair: found.value for pair, found in scores.differences.items()} == {("mle", "real"): 1.75 - 4}
    table = scores_table(scores)
    assert re.search(r"\| mle \| 3 of 4 \| 1.75 \| 1\.[45]\d … [12]\.[09]\d \| 25% \| \d% … [45]\d% \|", table)
    assert "| mle minus real | -2.25 |" in table
    assert "2 listeners. Figures are means over pieces, and intervals are bootstrapped over pieces" in table


def test_more_listeners_are_not_more_pieces() -> None:
    listener = {file: Answer(rating, rating > 3) for file, rating in zip(KEY.arms, (1, 4, 3, 5, 2), strict=True)}
    one, many = score_answers(KEY, [listener]), score_answers(KEY, [listener] * 20)
    assert many.differences == one.differences
    assert many.arms["real"].rating == one.arms["real"].rating
    assert many.arms["real"].answers == 60


def test_intervals_agree_with_all_resamples() -> None:
    """Of the pieces 1 and 5, a quarter of the resamples are 1 and 1 and a quarter 5 and 5; 3 and 3 do not vary."""
    key = Key("id", {"a": "wide", "b": "wide", "c": "flat", "d": "flat"})
    ratings = {"a": Answer(1, False), "b": Answer(5, True), "c": Answer(3, False), "d": Answer(3, False)}
    scores = score_answers(key, [ratings])
    difference = scores.differences["flat", "wide"]
    assert difference.value == 0
    assert (difference.low, difference.high) == pytest.approx((-2, 2), abs=0.3)
    wide = scores.arms["wide"]
    assert (wide.rating.low, wide.rating.high) == pytest.approx((1, 5), abs=0.3)
    assert 1 <= wide.rating.low < wide.rating.high <= 5
    assert 0 <= wide.person.low < 0.1 < 0.9 < wide.person.high <= 1


def test_a_single_piece_has_no_interval_and_missing_answers_have_no_mean() -> None:
    scores = score_answers(Key("id", {"a": "one", "b": "two", "c": "two"}), [{"a": Answer(4, True)}])
    assert scores.arms["one"].rating.value == 4
    assert np.isnan(scores.arms["one"].rating.low)
    assert np.isnan(scores.arms["two"].rating.value)
    table = scores_table(scores)
    assert "| one | 1 of 1 | 4.00 | – | 100% | – |" in table  # noqa: RUF001
    assert "| two | 0 of 2 | – | – | – | – |" in table  # noqa: RUF001
    assert "| one minus two | – | – |" in table  # noqa: RUF001


def test_answers_are_read_as_the_page_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text('{"test": "id", "answers": {"c": {"rating": 5, "person": true}}}')
    assert read_answers(path, KEY) == {"c": Answer(5, True)}
