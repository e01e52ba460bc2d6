"""What the endpoints share: the model, the thread that samples, and the limits of a request."""

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from symusic.core import ScoreTick

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import DrawingOptions, SamplingOptions
from midimamba.errors import InputError
from midimamba.generation import choose_scores, generate_scores, infill_scores, watched
from midimamba.modeling.judging import Judge
from midimamba.serving.answers import Limits, ModelInformation
from midimamba.serving.connections import MAX_BODY_BYTES
from midimamba.serving.options import ServeOptions
from midimamba.serving.requests import Asked, ContinueRequest, GenerateRequest, InfillRequest
from midimamba.serving.sampler import Job, Sampler
from midimamba.serving.uploads import Upload, UploadReader
from midimamba.tokenization.grammar_tables import check_supported
from midimamba.tokenization.sampling_limits import PICKS, SAMPLING_DEFAULTS, complete_sampling
from midimamba.tokenization.tokenizations import GAP

Options = TypeVar("Options", bound=DrawingOptions)
Work = Callable[[], list[bytes]]

_END_SECONDS = 5.0


class Service:
    """
    A generator for all requests.

    Args:
        model (`MidiMambaForCausalLM`), processor (`MidiProcessor`): the generator.
        limits ([`ServeOptions`]): what a request may ask for.
        reader ([`UploadReader`]): reads uploads. The service closes it.
        judge ([`~midimamba.modeling.judging.Judge`], *optional*): chooses where a request has `best_of`.
    """

    def __init__(
        self,
        model: MidiMambaForCausalLM,
        processor: MidiProcessor,
        limits: ServeOptions,
        reader: UploadReader,
        judge: Judge | None = None,
    ):
        self.model, self.processor, self.limits, self.judge = model, processor, limits, judge
        self.reader = reader
        self.sampler = Sampler(limits.max_waiting, limits.max_seconds)
        own = complete_sampling(model.generation_config, {"do_sample": True})
        self._new_tokens = min(own["max_new_tokens"], limits.max_new_tokens)
        self.information = self._describe(own)

    def close(self) -> None:
        """End all requests, the thread and the process."""
        self.sampler.close()
        self.sampler.join(_END_SECONDS)
        self.reader.close()

    async def prepare_generation(self, job: Job, asked: GenerateRequest) -> Work:
        """What samples new pieces.

        Raises:
            HTTPException: if the request is beyond the limits, or asks for what there is not.
        """
        return self._sampling(job, asked, None)

    async def prepare_continuation(self, job: Job, asked: ContinueRequest) -> Work:
        """What continues an upload. Raises as [`prepare_generation`], and if the upload cannot be used."""
        work = self._sampling(job, asked, None)  # before the upload is read
        del work
        song = await self.reader.read(Upload(await asked.midi.read()))
        return self._sampling(job, asked, song.score)

    async def prepare_infilling(self, job: Job, asked: InfillRequest) -> Work:
        """What writes bars of an upload again. Raises as [`prepare_continuation`]."""
        options = self._bounded(asked.options, asked.span[1] - asked.span[0] + 1)
        self._check_controls(asked.controls)
        song = await self.reader.read(Upload(await asked.midi.read(), asked.span, asked.numbers))

        def sample() -> list[ScoreTick]:
            return infill_scores(
                self.model, self.processor, song.score, asked.span, song.tracks, options, asked.controls
            )

        return _written(job, sample)

    def _sampling(self, job: Job, asked: Asked[SamplingOptions], prompt: ScoreTick | None) -> Work:
        options = self._bounded(asked.options, asked.options.bars)
        self._check_controls(asked.controls)
        request: dict[str, Any] = {"prompt": prompt, "controls": asked.controls}

        def sample() -> list[ScoreTick]:
            if self.judge is None or options.best_of is None:
                return generate_scores(self.model, self.processor, options, **request)
            return choose_scores(self.model, self.processor, self.judge, options, **request).scores

        return _written(job, sample)
