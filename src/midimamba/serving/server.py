"""Starting and ending the server."""

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

import uvicorn

from midimamba.errors import InputError
from midimamba.generation import load_pair
from midimamba.modeling.judging import Ensemble, Judge
from midimamba.runtime import silenced
from midimamba.serving.application import make_application
from midimamba.serving.connections import Connection
from midimamba.serving.options import ServeOptions
from midimamba.serving.service import Service
from midimamba.serving.uploads import UploadReader
from midimamba.text import show
from midimamba.tokenization.processor import MidiProcessor

_END_SECONDS = 5


class _Server(uvicorn.Server):
    """Says where it is when it is there, and ends all requests before it ends."""

    def __init__(self, config: uvicorn.Config, service: Service, address: str):
        super().__init__(config)
        self._service, self._address = service, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        show(f"{self._service.limits.model} is at {self._address}, described at {self._address}/docs; Ctrl-C ends it")
        sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.sampler.close()  # uvicorn waits for open requests
        await super().shutdown(sockets)


def serve(options: ServeOptions) -> None:
    """Serve until Ctrl-C.

    Raises:
        InputError: if the address is taken or is no address of this machine, or the model cannot be loaded.
    """
    with silent_about_limits(), listen(options.host, options.port) as listener, _reader(options) as reader:
        model, processor = load_pair(options.model)
        judge = load_judge(options.discriminator, processor)
        reader.wait_until_ready()
        service = Service(model, processor, options, reader, judge)
        config = uvicorn.Config(
            make_application(service),
            http=Connection,
            ws="none",
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        with suppress(KeyboardInterrupt):  # uvicorn passes on what has ended it
            _Server(config, service, address_of(listener)).run([listener])


def silent_about_limits() -> AbstractContextManager[None]:
    """Say nothing of pieces that are cut off by `max_new_tokens`: who asked for them is told otherwise."""
    return silenced("midimamba.tokenization.composing")


def load_judge(discriminators: Sequence[str], processor: MidiProcessor) -> Judge | None:
    """What discriminators say together; `None` without any."""
    if not discriminators:
        return None
    from midimamba.evaluation.judges import load_judges

    return Ensemble(load_judges(discriminators, processor))


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise InputError(
            f"the server cannot listen at {host}:{port} ({reason}): choose another --port or --host"
        ) from error


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


@contextmanager
def _reader(options: ServeOptions) -> Iterator[UploadReader]:
    """The process that reads uploads, which starts while the model is loaded."""
    reader = UploadReader(options.model, options.max_prompt_tokens)
    try:
        yield reader
    finally:
        reader.close()
