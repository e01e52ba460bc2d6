"""Synthetic scores and folders of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from symusic.core import ScoreTick

from support import make_score


@pytest.fixture(scope="session")
def scores() -> list[ScoreTick]:
    return [make_score(seed) for seed in range(40)]


@pytest.fixture
def midi_folder(tmp_path: Path) -> Callable[[int], Path]:
    """Write so many MIDI files, half of them in a folder below."""

    def write(count: int) -> Path:
        folder = tmp_path / "music"
        (folder / "more").mkdir(parents=True, exist_ok=True)
        for seed in range(count):
            name = f"more/{seed:03}.MID" if seed % 2 else f"{seed:03}.mid"
            make_score(seed, bars=3).dump_midi(str(folder / name))
        return folder

    return write


def notes_of(score: ScoreTick) -> list[tuple[int, bool, int, int, int]]:
    """Sorted (program, drums, pitch, onset, duration), times in twelfths of a quarter note."""
    scale = score.ticks_per_quarter / 12
    return sorted(
        (
            0 if track.is_drum else track.program,
            track.is_drum,
            note.pitch,
            round(note.time / scale),
            round(note.duration / scale),
        )
        for track in score.tracks
        for note in track.notes
    )


@pytest.fixture(scope="session")
def notes() -> Callable[[ScoreTick], list[tuple[int, bool, int, int, int]]]:
    return notes_of


@pytest.fixture(scope="session")
def random_score() -> Callable[..., ScoreTick]:
    return make_score
