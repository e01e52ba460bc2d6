"""A blind listening test: music of several arms under random file names, and the listeners' answers.

An arm is a source of music, such as a model or a human composer. The pieces of all arms are cut to the same number of
bars and played with the same sound font at the same loudness.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from symusic.core import ScoreTick
from tqdm.auto import tqdm

from midimamba.corpus.sources import midi_files
from midimamba.errors import InputError
from midimamba.evaluation.estimates import UNDEFINED, Estimate, Vector, bootstrap
from midimamba.evaluation.features import opening
from midimamba.evaluation.listening_page import listening_page
from midimamba.evaluation.sound import load_soundfont, render_sounds
from midimamba.files import read_json, whole_folder
from midimamba.text import for_json, for_markdown, printable
from midimamba.tokenization.ingest import MidiRefusedError, read_score

WORST, BEST = 1, 5
EXPLANATION = (
    "Figures are means over pieces, and intervals are bootstrapped over pieces. The answers to a piece are averaged "
    "first, so that more listeners do not count as more music. The intervals do not cover what other listeners would "
    "say."
)


class Answer(NamedTuple):
    """A listener's answer about a piece: a rating from 1 to 5, and whether a person wrote it."""

    rating: int
    person: bool


class Key(NamedTuple):
    """The id of a test, and the arm of each of its files."""

    test: str
    arms: dict[str, str]


class Draw(NamedTuple):
    """The pieces of an arm by file, and the files that could not be drawn: unreadable, or with nothing to play."""

    pieces: dict[str, ScoreTick]
    passed_over: list[str]


class ArmScore(NamedTuple):
    """Answers given and asked for, mean rating from 1 to 5, share judged to be by a person."""

    answers: int
    asked: int
    rating: Estimate
    person: Estimate


class ListeningScores(NamedTuple):
    """The number of listeners, arms by name, and the mean rating of the first minus that of the second of two arms."""

    listeners: int
    arms: dict[str, ArmScore]
    differences: dict[tuple[str, str], Estimate]


def draw_arms(folders: Sequence[Path], num: int, bars: int, seed: int = 0) -> dict[str, Draw]:
    """
    Draw pieces from every folder of MIDI files.

    Args:
        folders (`Sequence[Path]`): one folder per arm, which is named after it; searched recursively.
        num (`int`): pieces per arm.
        bars (`int`): the number of bars to play. A piece is drawn only if a note starts in them.
        seed (`int`, *optional*, defaults to 0): the same seed draws the same pieces.

    Raises:
        InputError: if there are fewer than two folders, if two have the same name, or if one is missing or has too few
            pieces.
    """
    if len(folders) < 2:
        raise InputError("a listening test compares at least two folders of MIDI files, one per arm; name another one")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"{missing[0]} is not a folder; name folders of MIDI files")
    names = [folder.name or folder.resolve().name for folder in folders]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two folders are named {repeated[0]!r}, and arms are named after folders; rename one")
    return {name: _draw(folder, num, bars, seed) for name, folder in zip(names, folders, strict=True)}


def write_listening_test(
    folder: Path,
    arms: Mapping[str, Sequence[ScoreTick]],
    seed: int = 0,
    bars: int = 16,
    sources: Mapping[str, Sequence[str]] | None = None,
    soundfont: Path | None = None,
) -> None:
    """
    Write WAV files, the page `index.html` that asks about them, and `key.json`, which names the arm of each.

    Args:
        folder (`Path`): the folder to write, as a whole or not at all.
        arms (`Mapping[str, Sequence[symusic.Score]]`): the pieces of every arm; times in ticks.
        seed (`int`, *optional*, defaults to 0): for the names and the order of the files. The same seed gives the
            same test.
        bars (`int`, *optional*, defaults to 16): pieces are cut to this many bars.
        sources (`Mapping[str, Sequence[str]]`, *optional*): where each piece comes from, for the key; by default
            its index in its arm.
        soundfont (`Path`, *optional*): a SoundFont 2 file that plays all pieces; by default the one that pretty_midi
            ships.

    Raises:
        FileExistsError: if the folder exists and is not empty.
        InputError: if the sound font cannot be used, or a package of the `demo` extra is not installed.
    """
    font = load_soundfont(soundfont)
    chance = random.Random(seed)
    pieces = [(arm, index) for arm, scores in arms.items() for index in range(len(scores))]
    chance.shuffle(pieces)  # files are also written in this order, so that their times do not group them by arm
    names = [f"{number:06x}.wav" for number in chance.sample(range(16**6), len(pieces))]
    found = dict(zip(names, pieces, strict=True))
    digest = hashlib.sha256()
    with whole_folder(folder) as scratch:
        render_sounds({scratch / name: opening(arms[arm][index], bars) for name, (arm, index) in found.items()}, font)
        for name in names:
            digest.update(name.encode() + (scratch / name).read_bytes())
        test = digest.hexdigest()[:16]  # of the audio: two tests with the same seed are still two tests
        key = {
            name: {"arm": arm, "source": sources[arm][index] if sources else str(index)}
            for name, (arm, index) in found.items()
        }
        content = {"test": test, "seed": seed, "bars": bars, "pieces": key}
        (scratch / "key.json").write_text(for_json(content, indent=2) + "\n", encoding="utf-8")
        (scratch / "index.html").write_text(listening_page(test, names), encoding="utf-8")


def read_key(folder: Path) -> Key:
    """
    Read the key of a test.

    Raises:
        InputError: if the folder has no key, or a broken one.
    """
    path = folder / "key.json"
    content = read_json(path)
    try:
        return Key(str(content["test"]), {name: str(piece["arm"]) for name, piece in content["pieces"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not the key of a listening test; name the folder of a test, with its key unchanged"
        ) from error


def read_answers(path: Path, key: Key) -> dict[str, Answer]:
    """
    Read the answers of a listener, by file. Pieces may be left out.

    Raises:
        InputError: if the file has no answers, or if they belong to another test or to a piece that is not in it.
    """
    content = read_json(path)
    if not isinstance(content.get("answers"), dict):
        raise InputError(
            f"{path} has no answers; give the file that the page of the test offers for download at its end"
        )
    if content.get("test") != key.test:
        raise InputError(
            f"{path} answers another test: its id is {content.get('test')!r} and not {key.test!r}; name the folder of "
            "that test"
        )
    answers = {}
    for name, answer in content["answers"].items():
        if name not in key.arms:
            raise InputError(f"{path}: {name!r} is not a piece of this test; give the file as the page has written it")
        rating, person = (answer.get(field) if isinstance(answer, dict) else None for field in Answer._fields)
        if type(rating) is not int or not WORST <= rating <= BEST:  # `true` is an int as well
            raise InputError(f"{path}: {name!r} needs a whole `rating` from {WORST} to {BEST}, but has {rating!r}")
        if not isinstance(person, bool):
            raise InputError(f"{path}: {name!r} needs a `person` that is true or false, but has {person!r}")
        answers[name] = Answer(rating, person)
    return answers


def score_answers(key: Key, answers: Sequence[Mapping[str, Answer]], seed: int = 0) -> ListeningScores:
    """
    The scores of every arm, and the difference of the mean ratings of every two arms.

    The answers to a piece are averaged over its listeners first, and the bootstrap draws pieces: two listeners who
    agree about a piece do not count as two pieces. With a single piece there is no interval; without answers all
    figures are NaN.

    Args:
        key (`Key`): the key of the test.
        answers (`Sequence[Mapping[str, Answer]]`): the answers of every listener, by file.
        seed (`int`, *optional*, defaults to 0): for the intervals.
    """
    ratings: dict[str, Vector] = {}
    arms = {}
    for arm in sorted(set(key.arms.values())):
        pieces = [[given[file] for given in answers if file in given] for file in key.arms if key.arms[file] == arm]
        means = np.array([np.mean(piece, axis=0) for piece in pieces if piece]).reshape(-1, len(Answer._fields))
        ratings[arm] = means[:, 0]
        arms[arm] = ArmScore(
            answers=sum(map(len, pieces)),
            asked=len(pieces) * len(answers),
            rating=_mean_difference([means[:, 0]], (WORST, BEST), seed),
            person=_mean_difference([means[:, 1]], (0, 1), seed),
        )
    differences = {
        pair: _mean_difference([ratings[arm] for arm in pair], (WORST - BEST, BEST - WORST), seed)
        for pair in combinations(arms, 2)
    }
    return ListeningScores(len(answers), arms, differences)


def scores_table(scores: ListeningScores) -> str:
    """The scores as Markdown: a table of the arms, a table of their differences, and how to read them."""
    rows = [
        f"| arm | answers | mean rating, {WORST} to {BEST} ↑ | 95 % interval | judged human | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm, score in scores.arms.items():
        figures = f"{_cells(score.rating, '.2f')} | {_cells(score.person, '.0%')}"
        rows.append(f"| {for_markdown(arm)} | {score.answers} of {score.asked} | {figures} |")
    rows += ["", "| difference of mean ratings | value | 95 % interval |", "|---|---:|---:|"]
    for (first, second), difference in scores.differences.items():
        rows.append(f"| {for_markdown(first)} minus {for_markdown(second)} | {_cells(difference, '+.2f')} |")
    listeners = f"{scores.listeners} listener{'s' * (scores.listeners != 1)}."
    return "\n".join([*rows, "", f"{listeners} {EXPLANATION}"])


def _draw(folder: Path, num: int, bars: int, seed: int) -> Draw:
    files = midi_files(folder)
    random.Random(seed).shuffle(files)
    draw = Draw({}, [])
    for file in tqdm(files, desc=f"reading {printable(folder.name)}", leave=False, disable=None):
        if len(draw.pieces) == num:
            break
        with suppress(MidiRefusedError):
            score = read_score(file)
            if opening(score, bars).note_num():
                draw.pieces[str(file)] = score
                continue
        draw.passed_over.append(str(file))
    if len(draw.pieces) < num:
        raise InputError(
            f"{folder} has {len(draw.pieces)} pieces to listen to in {len(files)} MIDI files, but --num asks for "
            f"{num}; give a smaller --num or more files, and unpack archives"
        )
    return draw


def _mean_difference(sets: Sequence[Vector], bounds: tuple[float, float], seed: int) -> Estimate:
    """The mean of the first set of pieces, minus that of the second if there is one, with its interval."""
    if not all(map(len, sets)):
        return UNDEFINED

    def statistic(weights: list[Vector]) -> float:
        means = [float(weight @ values / weight.sum()) for weight, values in zip(weights, sets, strict=True)]
        return means[0] - sum(means[1:])

    estimate = bootstrap(statistic, [len(values) for values in sets], seed, bounds=bounds)
    # All resamples of a single piece are the same, which would look like certainty.
    return replace(estimate, low=np.nan, high=np.nan) if min(map(len, sets)) < 2 else estimate


def _cells(estimate: Estimate, form: str) -> str:
    value = "–" if np.isnan(estimate.value) else f"{estimate.value:{form}}"  # noqa: RUF001
    interval = "–" if np.isnan(estimate.low) else f"{estimate.low:{form}} … {estimate.high:{form}}"  # noqa: RUF001
    return f"{value} | {interval}"
