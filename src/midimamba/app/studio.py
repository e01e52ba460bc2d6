"""What composes for the page: a generator, and pieces that grow while they are sampled."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from midimamba.app.growing import Continuing, Filling, Picture, Wish
from midimamba.app.roll import Span
from midimamba.command_options import SamplingOptions
from midimamba.errors import InputError
from midimamba.generation import load_pair
from midimamba.launching import discriminators_of
from midimamba.serving.options import ServeOptions
from midimamba.serving.server import load_judge
from midimamba.serving.service import Service
from midimamba.serving.uploads import Song, Upload, UploadReader
from midimamba.tokenization.constraints import Constraints
from midimamba.tokenization.ingest import MidiRefusedError, read_content

MAX_BARS = 64
_MAX_SECONDS = 1800.0


class Studio:
    """
    A generator that composes for the page, one piece at a time. Discriminators that tuning has left beside its folder
    can choose among draws.

    Args:
        name (`str`): of the generator, a folder or a repository on the Hub.

    Raises:
        InputError: if it cannot be loaded.
    """

    def __init__(self, name: str):
        self.name = name
        judges = [str(folder) for folder in discriminators_of(Path(name))]
        limits = ServeOptions(name, max_bars=MAX_BARS, max_seconds=_MAX_SECONDS, discriminator=judges)
        self._reader = UploadReader(name, limits.max_prompt_tokens)
        try:
            model, processor = load_pair(name)
            self._reader.wait_until_ready()
            self._service = Service(model, processor, limits, self._reader, load_judge(judges, processor))
        except BaseException:
            self._reader.close()
            raise
        self.information = self._service.information

    def close(self) -> None:
        """End what is being composed."""
        self._service.close()
        self._reader.close()

    def cancel(self, session: str) -> bool:
        """End what a session composes; whether it did."""
        return self._service.sampler.cancel(session)

    def read(self, file: Path, span: Span | None = None, tracks: Sequence[int] | None = None) -> Song:
        """Read a user's file, in a process of its own, as `midimamba serve` reads uploads.

        Raises:
            HTTPException, InputError: if it cannot be used; in one line, why.
        """
        try:
            content = read_content(file)
        except MidiRefusedError as error:
            raise InputError(f"the file cannot be used: {error.reason}") from error
        return asyncio.run(self._reader.read(Upload(content, span, tracks)))

    def compose(self, wish: Wish, session: str) -> Iterator[Picture]:
        """
        Compose one piece.

        Args:
            wish ([`Wish`]): what is asked for.
            session (`str`): who asks. One session composes one piece at a time, and can cancel it.

        Yields:
            [`Picture`]: what there is of the piece, a few times per second; the last one is the whole piece.

        Raises:
            HTTPException, InputError: if it cannot be; in one line, why.
        """
        options = self._options(wish)
        sampler = self._service.sampler
        self._service.processor.control_ids(wish.controls)
        with sampler.place(session, has_upload=wish.file is not None) as job:
            song = None if wish.file is None else self.read(wish.file, wish.span, wish.tracks)
            kind = Filling if wish.span is not None and song is not None else Continuing
            growing = kind(self._service, wish, song, options)
            future = sampler.run(job, lambda: growing.sample(job))
            yield from growing.watch(future)
            yield growing.finished(future.result())

    def _options(self, wish: Wish) -> SamplingOptions:
        """The options of a wish, which are checked."""
        if wish.span is not None and wish.file is None:
            raise InputError("there are no bars to write again: drop a MIDI file first")
        options = SamplingOptions(
            num=1,
            bars=wish.bars,
            temperature=wish.temperature,
            seed=wish.seed,
            constraints=Constraints.of(wish.constraints),
        )
        return replace(options, max_new_tokens=int(self.information.sampling["max_new_tokens"]))
