"""A piece that grows: what of it is there while it is being sampled."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

from symusic.core import ScoreTick
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from midimamba import NoteStreamer
from midimamba.app.roll import Marks, Span, with_notes
from midimamba.command_options import DrawingOptions, SamplingOptions
from midimamba.generation import generate_scores, infill_scores, streamed_to, watched
from midimamba.note_decoding import Note
from midimamba.serving.sampler import Job
from midimamba.serving.service import Service
from midimamba.serving.uploads import Song
from midimamba.tokenization.gaps import find_gap, with_gap
from midimamba.tokenization.musical_time import count_bars

# Between two pictures of a piece that grows.
_PICTURE_SECONDS = 0.4


@dataclass(frozen=True)
class Wish:
    """
    What the user asks for.

    Args:
        file (`Path`, *optional*): a MIDI or ABC file to begin with.
        span (`tuple[int, int]`, *optional*): the bars of it to write again, counted from 1; `None` to continue it.
        tracks (`Sequence[int]`, *optional*): the tracks to write again, counted from 1.
        bars (`int`): how many new bars, if the file is continued or there is none.
        temperature (`float`), seed (`int`): as for `midimamba generate`.
        choose (`bool`): whether the generator's discriminators choose one of several draws.
        controls (`Mapping[str, str | Sequence[str]]`): what the music should be like.
        constraints (`Mapping[str, Any]`): what no new note may break.
    """

    file: Path | None = None
    span: Span | None = None
    tracks: Sequence[int] | None = None
    bars: int = 8
    temperature: float | None = None
    seed: int = 0
    choose: bool = False
    controls: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    constraints: Mapping[str, Any] = field(default_factory=dict)


class Picture(NamedTuple):
    """
    A piece, while it is sampled or afterwards.

    Args:
        score (`symusic.Score`, *optional*): what there is of it.
        marks ([`~midimamba.app.roll.Marks`]): of its bars.
        new_notes (`int`): how many notes are new.
        is_whole (`bool`, *optional*, defaults to `False`): whether this is the piece itself.
    """

    score: ScoreTick | None
    marks: Marks
    new_notes: int
    is_whole: bool = False


class Growing(ABC):
    """A piece that a thread samples while others look at it."""

    _streamer: BaseStreamer | None

    def sample(self, job: Job) -> ScoreTick:
        """Sample the piece; runs in the thread of the sampler.

        Raises:
            HTTPException, InputError: if it is cancelled, or cannot be.
        """
        with watched(job.check), nullcontext() if self._streamer is None else streamed_to(self._streamer):
            return self._sample()

    def watch(self, future: "Future[ScoreTick]") -> Iterator[Picture]:
        """Pictures of what there is, until there is the piece or it has failed."""
        while not future.done():
            yield self.picture()
            with suppress(NotYet):
                future.exception(_PICTURE_SECONDS)

    @abstractmethod
    def _sample(self) -> ScoreTick: ...

    @abstractmethod
    def picture(self) -> Picture:
        """What there is so far."""

    @abstractmethod
    def finished(self, score: ScoreTick) -> Picture:
        """The piece itself."""


class Continuing(Growing):
    """New music, or the continuation of a song, note by note; if it is chosen, all at once."""

    def __init__(self, service: Service, wish: Wish, song: Song | None, options: SamplingOptions):
        self._service, self._wish, self._options = service, wish, options
        self._prompt = None if song is None else song.score
        self._notes: list[Note] = []
        given = 0 if self._prompt is None else _bars_of(self._prompt)
        self._marks = Marks(given=given, least=given + wish.bars)
        self._judge = service.judge if wish.choose else None
        # Where notes do not come in the order of time, only the whole piece is seen.
        streams = service.information.can_stream and self._judge is None
        self._streamer = NoteStreamer(service.processor, self._prompt, timeout=0.001) if streams else None

    def _sample(self) -> ScoreTick:
        request: dict[str, Any] = {"prompt": self._prompt, "controls": self._wish.controls, "judge": self._judge}
        return generate_scores(self._service.model, self._service.processor, self._options, **request)[0]

    def picture(self) -> Picture:
        if isinstance(self._streamer, NoteStreamer):
            end = time.monotonic() + _PICTURE_SECONDS
            with suppress(Empty):
                for note in self._streamer:
                    self._notes.append(note)
                    if time.monotonic() > end:
                        break
        return Picture(with_notes(self._prompt, self._notes), self._marks, len(self._notes))

    def finished(self, score: ScoreTick) -> Picture:
        before = 0 if self._prompt is None else self._prompt.note_num()
        return Picture(score, Marks(given=self._marks.given), score.note_num() - before, is_whole=True)


def _bars_of(prompt: ScoreTick) -> int:
    """The bars of a prompt up to its last onset: new music follows it, also where a note sounds on."""
    return count_bars(prompt, max(note.time for track in prompt.tracks for note in track.notes) + 1)


class Filling(Growing):
    """A song with other music in some bars."""

    def __init__(self, service: Service, wish: Wish, song: Song | None, options: SamplingOptions):
        assert wish.span is not None
        assert song is not None
        self._service, self._wish, self._song, self._span = service, wish, song, wish.span
        self._options = DrawingOptions(**{one.name: getattr(options, one.name) for one in fields(DrawingOptions)})
        self._streamer = self._ids = _Ids()
        self._marks = Marks(chosen=wish.span)
        self._kept = with_gap(song.score, find_gap(song.score, wish.span, song.tracks))

    def _sample(self) -> ScoreTick:
        request: dict[str, Any] = {"bars": self._span, "tracks": self._song.tracks, "controls": self._wish.controls}
        service, song = self._service, self._song.score
        return infill_scores(service.model, service.processor, song, options=self._options, **request)[0]

    def picture(self) -> Picture:
        score = self._kept
        with suppress(ValueError):  # what has been sampled breaks off within a note
            place = self._service.processor.place
            score = place(self._song.score, self._ids.sampled(), self._span, self._song.tracks)
        return Picture(score, self._marks, self._new(score))

    def finished(self, score: ScoreTick) -> Picture:
        return Picture(score, self._marks, self._new(score), is_whole=True)

    def _new(self, score: ScoreTick) -> int:
        return max(score.note_num() - self._kept.note_num(), 0)


class _Ids(BaseStreamer):
    """Keeps the ids of one sequence, prompt included."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self._parts.append(value.flatten())

    def end(self) -> None:
        pass

    def sampled(self) -> list[int]:
        """What there is so far."""
        return [index for part in tuple(self._parts) for index in part.tolist()]
