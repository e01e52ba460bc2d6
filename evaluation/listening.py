"""A blind listening test: music of several arms under names that say nothing, and what listeners thought of it.

An arm is a source of music, such as a model or a human composer. Pieces of all arms are cut to the same number of bars
and played by the same instrument, equally loud.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from symusic.core import ScoreTick
from tqdm.auto import tqdm

from midimamba.errors import InputError
from midimamba.evaluation.distances import UNDEFINED, Estimate, Vector, bootstrap
from midimamba.evaluation.features import opening
from midimamba.evaluation.listening_page import listening_page
from midimamba.evaluation.rendering import render_wave
from midimamba.evaluation.validity import midi_files
from midimamba.files import whole_folder
from midimamba.tokenization.ingest import MidiRefusedError, read_score

WORST, BEST = 1, 5
EXPLANATION = (
    "Figures are means over pieces, and intervals are bootstrapped over pieces: the answers to a piece are averaged "
    "first, so that more listeners do not pass for more music. What other listeners would say is not in them."
)


class Answer(NamedTuple):
    """What a listener thinks of a piece: how good it is, from 1 to 5, and whether a person wrote it."""

    rating: int
    person: bool


class Key(NamedTuple):
    """The id of a test, and the arm of each of its files."""

    test: str
    arms: dict[str, str]


class Draw(NamedTuple):
    """Pieces of an arm by their file, and the files that could not be drawn: unreadable, or nothing to hear."""

    pieces: dict[str, ScoreTick]
    passed_over: list[str]


class ArmScore(NamedTuple):
    """Answers given, answers asked for, mean rating from 1 to 5, share from 0 to 1 taken for a person's."""

    answers: int
    asked: int
    rating: Estimate
    person: Estimate


class ListeningScores(NamedTuple):
    """Listeners, arms by name, and for every two arms the mean rating of the first less that of the second."""

    listeners: int
    arms: dict[str, ArmScore]
    differences: dict[tuple[str, str], Estimate]


def draw_arms(folders: Sequence[Path], num: int, bars: int, seed: int = 0) -> dict[str, Draw]:
    """
    Draw pieces of every folder of MIDI files, of those that can be heard in their first bars.

    Args:
        folders (`Sequence[Path]`): one an arm, named like the folder; searched recursively.
        num (`int`): pieces of each.
        bars (`int`): the first bars of a piece, in which something but drums, which are not rendered, has to sound.
        seed (`int`, *optional*, defaults to 0): the same seed draws the same pieces.

    Raises:
        InputError: if there are fewer than two folders, two of one name, or one that is missing or has too few pieces.
    """
    if len(folders) < 2:
        raise InputError("a listening test compares at least two folders of MIDI files, one an arm")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"{missing[0]} is no folder")
    names = [folder.name or folder.resolve().name for folder in folders]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two folders are named {repeated[0]!r}, which is the name of their arm: rename one")
    return {name: _draw(folder, num, bars, seed) for name, folder in zip(names, folders, strict=True)}


def write_listening_test(
    folder: Path,
    arms: Mapping[str, Sequence[ScoreTick]],
    seed: int = 0,
    bars: int = 16,
    sources: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """
    Write WAV files, the page `index.html` that asks about them, and `key.json`, which says whose they are.

    Args:
        folder (`Path`): what to make, as a whole or not at all.
        arms (`Mapping[str, Sequence[symusic.Score]]`): the pieces of every arm; times in ticks.
        seed (`int`, *optional*, defaults to 0): of the files' names and order. The same seed gives the same test.
        bars (`int`, *optional*, defaults to 16): pieces are cut to their first so many.
        sources (`Mapping[str, Sequence[str]]`, *optional*): where each piece is from, for the key; by default its
            place in its arm.

    Raises:
        FileExistsError: if the folder is there already and not empty.
        InputError: if pretty_midi is not installed.
    """
    chance = random.Random(seed)
    pieces = [(arm, index) for arm, scores in arms.items() for index in range(len(scores))]
    chance.shuffle(pieces)  # files are written in this order too: that of their times groups no arms
    names = [f"{number:06x}.wav" for number in chance.sample(range(16**6), len(pieces))]
    found = dict(zip(names, pieces, strict=True))
    digest = hashlib.sha256()
    with whole_folder(folder) as scratch:
        for name, (arm, index) in tqdm(found.items(), desc="rendering", leave=False, disable=None):
            render_wave(opening(arms[arm][index], bars), scratch / name)
            digest.update(name.encode() + (scratch / name).read_bytes())
        test = digest.hexdigest()[:16]  # of what is heard: two tests of one seed are still two
        key = {
            name: {"arm": arm, "source": sources[arm][index] if sources else str(index)}
            for name, (arm, index) in found.items()
        }
        content = {"test": test, "seed": seed, "bars": bars, "pieces": key}
        (scratch / "key.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (scratch / "index.html").write_text(listening_page(test, names), encoding="utf-8")


def read_key(folder: Path) -> Key:
    """
    The key of a test.

    Raises:
        InputError: if there is none in the folder, or it is broken.
    """
    path = folder / "key.json"
    content = _read_json(path)
    try:
        return Key(str(content["test"]), {name: str(piece["arm"]) for name, piece in content["pieces"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no key of a listening test: {folder} is none, or the key was changed") from error


def read_answers(path: Path, key: Key) -> dict[str, Answer]:
    """
    A listener's answers, by file. Pieces may be left out.

    Raises:
        InputError: if the answers belong to another test, name a piece that is not in it, or are no answers.
    """
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("answers"), dict):
        raise InputError(f"{path} holds no answers: give the file that the test's page offers at its end")
    if content.get("test") != key.test:
        raise InputError(f"{path} answers another test: its id is {content.get('test')!r} and not {key.test!r}")
    answers = {}
    for name, answer in content["answers"].items():
        if name not in key.arms:
            raise InputError(f"{path}: {name!r} is no piece of this test")
        rating, person = (answer.get(field) if isinstance(answer, dict) else None for field in Answer._fields)
        if type(rating) is not int or not WORST <= rating <= BEST:  # `true` is an int as well
            raise InputError(f"{path}: {name!r} needs a whole `rating` from {WORST} to {BEST} and has {rating!r}")
        if not isinstance(person, bool):
            raise InputError(f"{path}: {name!r} needs a `person` that is true or false and has {person!r}")
        answers[name] = Answer(rating, person)
    return answers


def score_answers(key: Key, answers: Sequence[Mapping[str, Answer]], seed: int = 0) -> ListeningScores:
    """
    What listeners thought of every arm, and by how much more they liked one than another.

    A piece's answers are averaged over its listeners first, and the bootstrap draws pieces: two listeners who agree
    about a piece are no two pieces. With a single piece there is no interval; without answers all is NaN.

    Args:
        key (`Key`): of the test.
        answers (`Sequence[Mapping[str, Answer]]`): by file, one a listener.
        seed (`int`, *optional*, defaults to 0): of the intervals.
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
    """The outcome as Markdown: a table of the arms, one of their differences, and how to read them."""
    rows = [
        f"| arm | answers | mean rating, {WORST} to {BEST} ↑ | 95 % interval | taken for a person's | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm, score in scores.arms.items():
        figures = f"{_cells(score.rating, '.2f')} | {_cells(score.person, '.0%')}"
        rows.append(f"| {arm} | {score.answers} of {score.asked} | {figures} |")
    rows += ["", "| difference of mean ratings | value | 95 % interval |", "|---|---:|---:|"]
    for (first, second), difference in scores.differences.items():
        rows.append(f"| {first} minus {second} | {_cells(difference, '+.2f')} |")
    listeners = f"{scores.listeners} listener{'s' * (scores.listeners != 1)}."
    return "\n".join([*rows, "", f"{listeners} {EXPLANATION}"])


def _draw(folder: Path, num: int, bars: int, seed: int) -> Draw:
    files = midi_files(folder)
    random.Random(seed).shuffle(files)
    draw = Draw({}, [])
    for file in tqdm(files, desc=f"reading {folder.name}", leave=False, disable=None):
        if len(draw.pieces) == num:
            break
        with suppress(MidiRefusedError):
            score = read_score(file)
            if any(len(track.notes) for track in opening(score, bars).tracks if not track.is_drum):
                draw.pieces[str(file)] = score
                continue
        draw.passed_over.append(str(file))
    if len(draw.pieces) < num:
        raise InputError(
            f"{folder} holds {len(draw.pieces)} pieces to listen to, of {len(files)} MIDI files, and not the {num} "
            "that --num asks for"
        )
    return draw


def _mean_difference(sets: Sequence[Vector], bounds: tuple[float, float], seed: int) -> Estimate:
    """The mean of the first set of pieces, less that of the second where there is one, with its interval."""
    if not all(map(len, sets)):
        return UNDEFINED

    def statistic(weights: list[Vector]) -> float:
        means = [float(weight @ values / weight.sum()) for weight, values in zip(weights, sets, strict=True)]
        return means[0] - sum(means[1:])

    estimate = bootstrap(statistic, [len(values) for values in sets], seed, bounds=bounds)
    # Resamples of a single piece are all the same, which would pass for certainty.
    return replace(estimate, low=np.nan, high=np.nan) if min(map(len, sets)) < 2 else estimate


def _cells(estimate: Estimate, form: str) -> str:
    value = "–" if np.isnan(estimate.value) else f"{estimate.value:{form}}"  # noqa: RUF001
    interval = "–" if np.isnan(estimate.low) else f"{estimate.low:{form}} … {estimate.high:{form}}"  # noqa: RUF001
    return f"{value} | {interval}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from error
