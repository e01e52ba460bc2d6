"""The endpoints of `midimamba serve`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Form, Header, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from midimamba.serving.answers import CANCELLED, EXAMPLES, NOTES, PIECES, PROBLEMS, Health, ModelInformation
from midimamba.serving.connections import BodyLimit, OwnPages
from midimamba.serving.page import docs_page
from midimamba.serving.request_bodies import (
    ContinueRequest,
    ContinueStreamRequest,
    GenerateRequest,
    InfillRequest,
    StreamRequest,
    line_of,
)
from midimamba.serving.responses import BUG, ID_HEADER, answer_with_notes, answer_with_pieces
from midimamba.serving.service import Service

_DESCRIPTION = """Music from a generator of midimamba, over HTTP. Every option has the name, the default and the limits
that it has in `midimamba generate`. An answer with one piece is a MIDI file; with several, it is a zip archive of
MIDI files. An answer that is not music is JSON with one line, `detail`, which says what is wrong."""
_ID = r"^[A-Za-z0-9._-]{1,64}$"
_FORM = Form(media_type="multipart/form-data")

RequestId = Annotated[
    str | None,
    Header(
        alias=ID_HEADER,
        pattern=_ID,
        description="An id of your choice, by which DELETE /requests/{id} cancels the request. The answer repeats it.",
    ),
]


def make_application(service: Service) -> FastAPI:
    """The application, which closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="midimamba",
        version=version("midimamba"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere, and are empty without a network
        redoc_url=None,
    )
    app.add_middleware(BodyLimit)
    app.add_middleware(OwnPages, host=service.limits.host)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _explain)
    app.add_exception_handler(Exception, _apologize)
    _add_music(app, service)
    _add_streams(app, service)
    _add_rest(app, service)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": line_of(error)}, 422)


async def _explain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "there is no such address", 405: f"this address does not answer {request.method}"}
    plain = error.detail in ("Not Found", "Method Not Allowed")
    detail = f"{known[error.status_code]}: see /docs" if plain else error.detail
    return JSONResponse({"detail": detail}, error.status_code, error.headers)


async def _apologize(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": BUG}, 500)


def _add_music(app: FastAPI, service: Service) -> None:
    sampler = service.sampler
    described: dict[str, Any] = {"tags": ["music"], "response_class": Response, "responses": {**PIECES, **PROBLEMS}}

    @app.post("/generate", summary="New pieces", openapi_extra=EXAMPLES["generate"], **described)
    async def generate(asked: GenerateRequest, request: Request, request_id: RequestId = None) -> Response:
        """Sample pieces from scratch, as `midimamba generate` does."""
        return await answer_with_pieces(sampler.place(request_id), sampler, request, partial(service.generate, asked))

    @app.post("/continue", summary="Continue a MIDI file", openapi_extra=EXAMPLES["continue"], **described)
    async def continue_piece(
        asked: Annotated[ContinueRequest, _FORM], request: Request, request_id: RequestId = None
    ) -> Response:
        """Sample pieces that begin with a MIDI file, as `midimamba generate --prompt` does. Send a form."""
        return await answer_with_pieces(
            sampler.place(request_id, has_upload=True), sampler, request, partial(service.generate, asked, asked.midi)
        )

    @app.post("/infill", summary="Write some bars of a MIDI file again", openapi_extra=EXAMPLES["infill"], **described)
    async def infill(
        asked: Annotated[InfillRequest, _FORM], request: Request, request_id: RequestId = None
    ) -> Response:
        """Write some bars again, in all tracks or in some, as `midimamba infill` does. Send a form. The model must
        have learned it: `can_infill` of GET /model says so."""
        return await answer_with_pieces(
            sampler.place(request_id, has_upload=True), sampler, request, partial(service.infill, asked)
        )


def _add_streams(app: FastAPI, service: Service) -> None:
    sampler = service.sampler
    described: dict[str, Any] = {"tags": ["music"], "response_class": Response, "responses": {**NOTES, **PROBLEMS}}

    @app.post(
        "/generate/stream",
        summary="The notes of a new piece, while it is sampled",
        openapi_extra=EXAMPLES["generate/stream"],
        **described,
    )
    async def stream(asked: StreamRequest, request: Request, request_id: RequestId = None) -> Response:
        """Sample one piece. Each note is sent when it is complete, in the order of onsets, as a line of JSON: onset
        and duration in quarter notes and in seconds, pitch, velocity, General MIDI program, and whether it is a drum.
        A client that does not read is disconnected."""
        return await answer_with_notes(sampler.place(request_id), sampler, request, partial(service.stream, asked))

    @app.post(
        "/continue/stream",
        summary="The notes that continue a MIDI file, while they are sampled",
        openapi_extra=EXAMPLES["continue/stream"],
        **described,
    )
    async def continue_stream(
        asked: Annotated[ContinueStreamRequest, _FORM], request: Request, request_id: RequestId = None
    ) -> Response:
        """As /generate/stream. Onsets count from the start of the file, whose own notes are not sent. Send a form."""
        return await answer_with_notes(
            sampler.place(request_id, has_upload=True), sampler, request, partial(service.stream, asked, asked.midi)
        )


def _add_rest(app: FastAPI, service: Service) -> None:
    described: dict[str, Any] = {"tags": ["requests"], "responses": CANCELLED, "openapi_extra": EXAMPLES["cancel"]}

    @app.delete("/requests/{id}", summary="Cancel a request", status_code=204, **described)
    async def cancel(id: Annotated[str, Path(pattern=_ID, description="The X-Request-ID of the request.")]) -> None:
        """End a request that waits or is sampled; it stops at the next token, and is answered with status 409.
        Closing its connection does the same."""
        if not service.sampler.cancel(id):
            raise HTTPException(404, f"no request with the id {id!r} is waiting or at work")

    @app.get("/health", summary="Whether the server works", tags=["server"])
    async def health() -> Health:
        """Answers at once, whatever else the server does."""
        return Health(status="ok", requests=len(service.sampler))

    @app.get("/model", summary="What the model can do, and the limits", tags=["server"])
    async def model() -> ModelInformation:
        """The tokenization, the controls with their values, what the model's own sampling options are, and what one
        request may ask for."""
        return service.information

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))
