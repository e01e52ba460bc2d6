"""What `midimamba app` can be told. Light to import."""

from dataclasses import dataclass, field
from pathlib import Path

from midimamba.tokenization.sampling_limits import check_whole

_MAX_PORT = 65535


@dataclass(frozen=True)
class AppOptions:
    """
    What `midimamba app` loads, and where it listens.

    Args:
        model (`str`, *optional*): a generator, in a folder or on the Hub. Without one, those in `out` can be chosen.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): address to listen at. Anybody who can reach it can use the
            page: there is no password.
        port (`int`, *optional*, defaults to 7860): port to listen at; 0 for any that is free.
        out (`Path`, *optional*, defaults to `"midimamba-app"`): folder for the generators that are trained on the
            page.
        no_browser (`bool`, *optional*, defaults to `False`): whether no browser is opened.

    Raises:
        InputError: if the port makes no sense.
    """

    model: str | None = field(
        default=None,
        metadata={"positional": True, "aliases": ("--model",), "help": "a folder or a repository on the Hub"},
    )
    host: str = field(
        default="127.0.0.1",
        metadata={
            "group": "address",
            "help": "listen at this address; there is no password, so choose another only in a network that you trust",
        },
    )
    port: int = field(default=7860, metadata={"group": "address", "help": "listen at this port; 0 for a free one"})
    out: Path = field(
        default=Path("midimamba-app"), metadata={"help": "folder for the generators that you train on the page"}
    )
    no_browser: bool = field(default=False, metadata={"help": "open no browser, only say where the page is"})

    def __post_init__(self) -> None:
        check_whole("port", self.port, 0, _MAX_PORT)
