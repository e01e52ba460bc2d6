"""A small server for tests: a tiny generator, and uploads that are read in the process of the test."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.generation import tell_watcher
from midimamba.modeling.judging import Judge
from midimamba.serving import uploads
from midimamba.serving.application import make_application
from midimamba.serving.options import ServeOptions
from midimamba.serving.service import Service
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_generator


def sample_without_end(at_work: threading.Event) -> None:
    """What sampling does that goes on until it is stopped; the event is set while it goes on."""
    at_work.set()
    try:
        while True:
            tell_watcher()
            time.sleep(0.002)
    finally:
        at_work.clear()


class DirectReader:
    """Does what the process for uploads does, without a process."""

    def __init__(self, processor: MidiProcessor, max_tokens: int):
        self._processor, self._max_tokens = processor, max_tokens

    async def read(self, upload: uploads.Upload) -> uploads.Song:
        found = uploads.read_upload(self._processor, self._max_tokens, upload, lambda stage: None)
        if isinstance(found, uploads.Song):
            return found
        raise HTTPException(422, found)


def make_pair() -> tuple[MidiMambaForCausalLM, MidiProcessor]:
    """A tiny generator that knows a key and can fill gaps."""
    tokenizer = build_tokenizer(infill=True, controls=[control_token("key", "C-major")])
    processor = MidiProcessor(tokenizer)
    return make_generator(vocab_size=processor.vocab_size), processor


def make_service(
    pair: tuple[MidiMambaForCausalLM, MidiProcessor], judge: Judge | None = None, **limits: Any
) -> Service:
    model, processor = pair
    options = ServeOptions("tiny", **limits)
    reader = DirectReader(processor, options.max_prompt_tokens)
    return Service(model, processor, options, cast(uploads.UploadReader, reader), judge)


@contextmanager
def served(*arguments: Any, **options: Any) -> Iterator[TestClient]:
    """A client of [`make_service`]."""
    application = make_application(make_service(*arguments, **options))
    with TestClient(application, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client
