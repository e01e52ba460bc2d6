"""What the endpoints share: the model, the thread that samples, and the limits of a request."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import UploadFile
from miditok import MusicTokenizer
from starlette.exceptions import HTTPException
from symusic.core import ScoreTick

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import DrawingOptions, SamplingOptions
from midimamba.errors import InputError
from midimamba.generation import choose_scores, generate_scores, infill_scores
from midimamba.modeling.judging import Judge
from midimamba.note_decoding import Note, check_streamed
from midimamba.serving.answers import Limits, ModelInformation
from midimamba.serving.connections import MAX_BODY_BYTES
from midimamba.serving.options import ServeOptions
from midimamba.serving.request_bodies import Asked, InfillRequest
from midimamba.serving.sampler import Sampler
from midimamba.serving.uploads import Upload, UploadReader
from midimamba.streaming import stream
from midimamba.tokenization.grammar_types import check_supported
from midimamba.tokenization.sampling_limits import PICKS, complete_sampling
from midimamba.tokenization.tokenizations import GAP

Options = TypeVar("Options", bound=DrawingOptions)
# Samples pieces, or notes one by one, when it is called in the thread of the sampler.
Pieces = Callable[[], list[ScoreTick]]
Notes = Callable[[], Iterator[Note]]

_END_SECONDS = 5.0


class Service:
    """
    A generator for all requests.

    Its methods check a request, read its upload, and return what samples. They raise an `HTTPException` if a request
    is beyond the limits, or asks for what cannot be.

    Args:
        model (`MidiMambaForCausalLM`), processor (`MidiProcessor`): the generator.
        limits ([`ServeOptions`]): what a request may ask for.
        reader ([`UploadReader`]): reads uploads.
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
        self.model, self.processor, self.limits = model, processor, limits
        self.sampler = Sampler(limits.max_waiting, limits.max_seconds)
        self.information = self._describe()
        self._reader, self.judge = reader, judge

    def close(self) -> None:
        """End all requests, and the thread."""
        self.sampler.close()
        self.sampler.join(_END_SECONDS)

    async def generate(self, asked: Asked[SamplingOptions], midi: UploadFile | None = None) -> Pieces:
        """New pieces, or continuations of an upload."""
        options = self._checked(asked, asked.options.bars)
        request: dict[str, Any] = {"prompt": await self._prompt(midi), "controls": asked.controls}
        judge = self.judge
        if judge is None or options.best_of is None:
            return lambda: generate_scores(self.model, self.processor, options, **request)
        return lambda: choose_scores(self.model, self.processor, judge, options, **request).scores

    async def infill(self, asked: InfillRequest) -> Pieces:
        """An upload with other music in some bars."""
        options = self._checked(asked, asked.span[1] - asked.span[0] + 1)
        song = await self._reader.read(Upload(await asked.midi.read(), asked.span, asked.numbers))
        request: dict[str, Any] = {"bars": asked.span, "tracks": song.tracks, "controls": asked.controls}
        return lambda: infill_scores(self.model, self.processor, song.score, options=options, **request)

    async def stream(self, asked: Asked[SamplingOptions], midi: UploadFile | None = None) -> Notes:
        """The notes of a new piece, or of one continuation of an upload."""
        options = self._checked(asked, asked.options.bars)
        try:
            check_streamed(self.processor.midi_tokenizer)
        except InputError as error:
            raise HTTPException(422, str(error)) from error
        prompt = await self._prompt(midi)
        return lambda: stream(self.model, self.processor, prompt, options, controls=asked.controls)

    async def _prompt(self, midi: UploadFile | None) -> ScoreTick | None:
        return None if midi is None else (await self._reader.read(Upload(await midi.read()))).score

    def _checked(self, asked: Asked[Options], bars: int) -> Options:
        """The options of a request that this server fulfils, with a bound of new tokens."""
        options = asked.options
        best_of = getattr(options, "best_of", None)
        if self.judge is None and (best_of is not None or getattr(options, "pick", PICKS[0]) != PICKS[0]):
            raise HTTPException(422, "best_of and pick choose by a discriminator, and this server has none")
        limits = self.limits
        several = "num times best_of" if best_of is not None else "num"
        for name, value, most in (
            (several, options.num * (best_of or 1), limits.max_num),
            ("bars", bars, limits.max_bars),
            ("max_new_tokens", options.max_new_tokens or 0, limits.max_new_tokens),
        ):
            if value > most:
                raise HTTPException(422, f"{name} is {value}: this server gives at most {most}")
        try:
            self.processor.control_ids(asked.controls)
        except InputError as error:
            raise HTTPException(422, str(error)) from error
        own = self.information.sampling["max_new_tokens"]
        return replace(options, max_new_tokens=options.max_new_tokens or int(own))

    def _describe(self) -> ModelInformation:
        processor, limits = self.processor, self.limits
        own = complete_sampling(self.model.generation_config, {"do_sample": True})
        own["max_new_tokens"] = min(own["max_new_tokens"], limits.max_new_tokens)
        return ModelInformation(
            model=limits.model,
            tokenization=type(processor.midi_tokenizer).__name__,
            vocab_size=processor.vocab_size,
            always_music=_passes(check_supported, processor),
            can_stream=_passes(check_streamed, processor),
            can_infill=GAP in processor.midi_tokenizer.special_tokens,
            controls=processor.controls,
            programs=processor.programs,
            discriminators=list(limits.discriminator),
            sampling={name: own[name] for name in ("temperature", "top_p", "max_new_tokens")},
            limits=Limits(
                num=limits.max_num,
                bars=limits.max_bars,
                max_new_tokens=limits.max_new_tokens,
                prompt_tokens=limits.max_prompt_tokens,
                seconds=limits.max_seconds,
                body_bytes=MAX_BODY_BYTES,
            ),
        )


def _passes(check: Callable[[MusicTokenizer], None], processor: MidiProcessor) -> bool:
    try:
        check(processor.midi_tokenizer)
    except InputError:
        return False
    return True
