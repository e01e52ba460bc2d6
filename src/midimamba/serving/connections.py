"""What guards the server: against clients that send too much, or nothing, or never read, and against other sites."""

import asyncio
from ipaddress import ip_address
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

# A whole opera as MIDI is under 2 MB.
MAX_BODY_BYTES = 4 * 2**20
# Of a body that is too large, this much is read and thrown away, so that its sender sees the answer.
_MAX_SURPLUS_BYTES = 4 * MAX_BODY_BYTES
_MAX_CONNECTIONS = 512
_CHECK_SECONDS = 10.0
# A connection on which nothing moves at three checks is closed.
_CHECKS = 3


class BodyLimit:
    """Middleware that refuses a request whose body is larger than [`MAX_BODY_BYTES`], before the rest is read."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = int(Headers(scope=scope).get("content-length", "0"))
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive() if declared <= MAX_BODY_BYTES else {}
            received += len(message.get("body", b""))
            if max(declared, received) > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MB: send a smaller file")
            return message

        await self.app(scope, bounded, send)


class OwnPages:
    """
    Middleware that refuses what a page of another site asks for, through the browser of somebody who visits it.

    Such a page names itself in `Origin`, or, where its own name leads to this machine, in `Host`.

    Args:
        app (`ASGIApp`): what answers all other requests.
        host (`str`): where the server listens. If only this machine reaches it, `Host` must name this machine.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app, self._is_local = app, is_this_machine(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (answer or self.app)(scope, receive, send)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, page = urlsplit(f"//{host}").hostname, None if origin is None else urlsplit(origin).netloc
        except ValueError:
            return JSONResponse({"detail": "Host or Origin is no address"}, 400)
        if self._is_local and not is_this_machine(name):
            detail = f"this server is not {host!r}: it can only be reached as 127.0.0.1 or localhost; see --host"
            return JSONResponse({"detail": detail}, 421)
        if page is not None and page != host:
            return JSONResponse({"detail": f"pages of {origin!r} may not use this server"}, 403)
        return None


def is_this_machine(host: str | None) -> bool:
    """Whether an address is that at which only this machine reaches itself."""
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False


class Connection(H11Protocol):
    """
    One connection. It is closed when its client stops reading or sending for half a minute.

    uvicorn alone waits forever for a client that does not read its answer, or sends half a request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unsent = self._surplus = self._stuck = 0
        self._timer = self.loop.call_later(_CHECK_SECONDS, self._check)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_answered() and self.conn.their_state is h11.SEND_BODY:
            self._surplus += len(data)
            if self._surplus > _MAX_SURPLUS_BYTES:
                self.transport.abort()
                return
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._stuck = 0
        super().on_response_complete()

    def _is_answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _check(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        owes_request = self.cycle is None or self.cycle.more_body or self.cycle.response_complete
        moves = unsent < self._unsent if unsent else not owes_request
        self._stuck = 0 if moves else self._stuck + 1
        self._unsent = unsent
        if self._stuck >= _CHECKS:
            self.transport.abort()
        self._timer = self.loop.call_later(_CHECK_SECONDS, self._check)
