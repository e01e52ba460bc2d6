"""What the server answers, and how /docs describes it."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class Problem(BaseModel):
    """Any answer that is not what was asked for."""

    detail: str = Field(
        description="What is wrong and what to do, in one line.", examples=["num is 0: give at least 1"]
    )


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok"]
    requests: int = Field(description="Requests that wait or are at work.")


class Limits(BaseModel):
    """What one request may ask for."""

    num: int = Field(description="Pieces to draw: `num` times `best_of`.")
    bars: int = Field(description="New bars per piece.")
    max_new_tokens: int = Field(description="New tokens per piece.")
    prompt_tokens: int = Field(description="Tokens of an upload.")
    seconds: float = Field(description="Time from the arrival of a request to its answer.")
    body_bytes: int = Field(description="Size of a request.")


class ModelInformation(BaseModel):
    """What the model can do."""

    model: str = Field(description="Its name, as the server was started with it.")
    tokenization: str = Field(examples=["REMI"])
    vocab_size: int | list[int]
    always_music: bool = Field(description="Whether a grammar makes every sample valid music.")
    can_stream: bool = Field(description="Whether notes can be sent while a piece is still being sampled.")
    can_infill: bool = Field(description="Whether POST /infill works.")
    controls: dict[str, list[str]] = Field(description="The names of the controls, and the values of each.")
    programs: list[int] | None = Field(description="General MIDI programs of new music, -1 for drums. null: all.")
    discriminators: list[str] = Field(description="What chooses where a request has `best_of`.")
    sampling: dict[str, int | float] = Field(description="Values of options that a request leaves out.")
    limits: Limits


_LINES = """{"onset": 0.0, "duration": 1.5, "seconds": 0.0, "duration_seconds": 0.75, "pitch": 60, "velocity": 80, \
"program": 0, "is_drum": false}
{"done": true, "notes": 1}
"""
_BINARY = {"schema": {"type": "string", "format": "binary"}}
PIECES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "With `num` 1 a MIDI file; otherwise a zip archive of `sample-00.mid`, `sample-01.mid` …",
        "content": {"audio/midi": _BINARY, "application/zip": _BINARY},
    }
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        409: "The request was cancelled, or its id is in use.",
        413: "The body is too large.",
        422: "An option or the file cannot be used.",
        503: "Too many requests are waiting. `Retry-After` says when to try again, in seconds.",
        504: "The request took too long.",
    }.items()
}
NOTES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": 'One line of JSON for each note. The last line is `{"done": true, "notes": 96}`, or `detail` '
        "says why the stream ended early.",
        "content": {"application/x-ndjson": {"schema": {"type": "string"}, "example": _LINES}},
    }
}
CANCELLED: dict[int | str, dict[str, Any]] = {
    204: {"description": "It is cancelled."},
    404: {"model": Problem, "description": "There is no such request: it may be done."},
    422: {"model": Problem, "description": "This cannot be an id."},
}

_HERE = "http://127.0.0.1:8000"


def _example(words: str) -> dict[str, Any]:
    return {"x-example": f"curl {words}"}


EXAMPLES = {
    "generate": _example(f"""{_HERE}/generate --json '{{"num": 1, "bars": 8, "seed": 7}}' --output piece.mid"""),
    "generate/stream": _example(f"""{_HERE}/generate/stream --no-buffer --json '{{"bars": 8}}'"""),
    "continue/stream": _example(f"{_HERE}/continue/stream --no-buffer -F midi=@opening.mid -F bars=8"),
    "continue": _example(f"{_HERE}/continue -F midi=@opening.mid -F num=4 -F bars=8 --output pieces.zip"),
    "infill": _example(f"{_HERE}/infill -F midi=@song.mid -F bars=5-8 -F tracks=1,2 -F num=1 --output filled.mid"),
    "cancel": _example(f"-X DELETE {_HERE}/requests/my-id"),
}
