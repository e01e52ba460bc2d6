"""The endpoints of `midimamba serve`."""

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Form, Header, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from midimamba.command_options import DrawingOptions
from midimamba.errors import InputError
from midimamba.serving.answers import CANCELLED, EXAMPLES, PIECES, PROBLEMS, Health, ModelInformation, Problem
from midimamba.serving.connections import BodyLimit
from midimamba.serving.page import docs_page
from midimamba.serving.requests import ContinueRequest, GenerateRequest, InfillRequest, line_of
from midimamba.serving.service import Service

_DESCRIPTION = """Music from a generator of midimamba, over HTTP. Every option has the name, the default and the limits
that it has in `midimamba generate`. An answer with one piece is a MIDI file; with several, it is a zip archive of
MIDI files. An answer that is not music is JSON with one line, `detail`, which says what is wrong."""
_ID = r"^[A-Za-z0-9._-]{1,64}$"
_WEIRD = 499  # the client has gone, so nobody reads it

RequestId = Annotated[
    str | None,
    Header(
        alias="X-Request-ID",
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
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _explain)
    app.add_exception_handler(Exception, _apologize)
    _add_music(app, service)
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
    return JSONResponse({"detail": "the server failed, and its log says why: this is a bug, please report it"}, 500)


def _add_music(app: FastAPI, service: Service) -> None:
    described: dict[str, Any] = {"tags": ["music"], "response_class": Response, "responses": {**PIECES, **PROBLEMS}}

    @app.post("/generate", summary="New pieces", openapi_extra=EXAMPLES["generate"], **described)
    async def generate(asked: GenerateRequest, request: Request, request_id: RequestId = None) -> Response:
        """Sample pieces from scratch, as `midimamba generate` does."""
        return await _answer(service, request, request_id, lambda job: service.generate(job, asked))

    @app.post("/continue", summary="Continue a MIDI file", openapi_extra=EXAMPLES["continue"], **described)
    async def continue_piece(
        asked: Annotated[ContinueRequest, Form(media_type="multipart/form-data")],
        request: Request,
        request_id: RequestId = None,
    ) -> Response:
        """Let pieces begin with a MIDI file, as `midimamba generate --prompt` does. Send a form."""
        return await _answer(service, request, request_id, lambda job: service.continue_piece(job, asked))

    @app.post("/infill", summary="Write some bars of a MIDI file again", openapi_extra=EXAMPLES["infill"], **described)
    async def infill(
        asked: Annotated[InfillRequest, Form(media_type="multipart/form-data")],
        request: Request,
        request_id: RequestId = None,
    ) -> Response:
        """Write some bars again, in all tracks or in some, as `midimamba infill` does. Send a form. The model must have
        learned it: `can_infill` of GET /model says so."""
        return await _answer(service, request, request_id, lambda job: service.infill(job, asked))


def _add_rest(app: FastAPI, service: Service) -> None:
    @app.delete("/requests/{id}", summary="Cancel a request", tags=["requests"], status_code=204, responses=CANCELLED)
    async def cancel(id: Annotated[str, Path(pattern=_ID, description="The X-Request-ID of the request.")]) -> None:
        """End a request that waits or is sampled; it stops at the next token, and is answered with status 409.
        Closing its connection does the same."""
        if not service.sampler.cancel(id):
            raise HTTPException(404, f"no request with the id {id!r} is waiting or at work")

    @app.get("/health", summary="Whether the server works", tags=["server"])
    async def health() -> Health:
        """Answers at once, whatever else the server does."""
        return Health(status="ok", requests=len(service.sampler), places=service.limits.max_waiting + 1)

    @app.get("/model", summary="What the model can do, and the limits", tags=["server"])
    async def model() -> ModelInformation:
        """The tokenization, the controls with their values, what the model's own sampling options are, and what one
        request may ask for."""
        return service.information

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))
