"""What `midimamba serve` can be told. Light to import."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from midimamba.errors import InputError
from midimamba.tokenization.sampling_limits import MAX_SIZE, MIN_NEW_TOKENS, check_whole

_MAX_PORT = 65535


@dataclass(frozen=True)
class ServeOptions:
    """
    What `midimamba serve` loads, where it listens, and what one request may ask for.

    Args:
        model (`str`): a generator, in a folder or on the Hub.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): address to listen at. Anybody who can reach it can use the
            server: there is no password.
        port (`int`, *optional*, defaults to 8000): port to listen at; 0 for any that is free.
        discriminator (`Sequence[str]`, *optional*): discriminators, of which requests with `best_of` make use.
        max_num (`int`, *optional*, defaults to 16): the most pieces that a request may draw, `num` times `best_of`.
        max_bars (`int`, *optional*, defaults to 64): the most new bars per piece.
        max_new_tokens (`int`, *optional*, defaults to 4096): the most new tokens per piece; at least 16.
        max_prompt_tokens (`int`, *optional*, defaults to 4096): the longest upload to continue, in tokens.
        max_seconds (`float`, *optional*, defaults to 120): the time after which a request is ended, in seconds from
            its arrival.
        max_waiting (`int`, *optional*, defaults to 16): the most requests that wait while another one is sampled; and
            as many with uploads.

    Raises:
        InputError: if a value makes no sense.
    """

    model: str = field(metadata={"positional": True, "help": "a folder or a repository on the Hub"})
    host: str = field(
        default="127.0.0.1",
        metadata={
            "group": "address",
            "help": "listen at this address; there is no password, so choose another only in a network that you trust",
        },
    )
    port: int = field(default=8000, metadata={"group": "address", "help": "listen at this port; 0 for a free one"})
    discriminator: Sequence[str] = field(
        default=(),
        metadata={
            "metavar": "D",
            "help": "one or more discriminators, each in a folder or on the Hub, for requests with best_of",
        },
    )
    max_num: int = field(
        default=16,
        metadata={"group": "limits", "help": "most pieces that a request may draw, num times best_of"},
    )
    max_bars: int = field(default=64, metadata={"group": "limits", "help": "most new bars per piece"})
    max_new_tokens: int = field(default=4096, metadata={"group": "limits", "help": "most new tokens per piece"})
    max_prompt_tokens: int = field(
        default=4096, metadata={"group": "limits", "help": "longest upload to continue, in tokens"}
    )
    max_seconds: float = field(
        default=120.0, metadata={"group": "limits", "help": "end a request this many seconds after its arrival"}
    )
    max_waiting: int = field(
        default=16,
        metadata={
            "group": "limits",
            "help": "most requests that wait while another one is sampled; as many again with uploads",
        },
    )

    def __post_init__(self) -> None:
        check_whole("port", self.port, 0, _MAX_PORT)
        check_whole("max_new_tokens", self.max_new_tokens, MIN_NEW_TOKENS, MAX_SIZE)
        for name, least in (("max_num", 1), ("max_bars", 1), ("max_prompt_tokens", 1), ("max_waiting", 0)):
            check_whole(name, getattr(self, name), least, MAX_SIZE)
        if not 0 < self.max_seconds < math.inf:
            raise InputError(f"max_seconds is {self.max_seconds}: give a number above 0")
