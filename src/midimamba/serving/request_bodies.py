"""What clients may ask for. Names, defaults, texts and limits are those of the command line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar, cast, get_type_hints

from fastapi import UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from midimamba.command_options import DrawingOptions, SamplingOptions, read_span, read_tracks
from midimamba.errors import InputError
from midimamba.text import printable, shortened
from midimamba.tokenization.constraints import Constraints
from midimamba.tokenization.sampling_limits import check_sampling

Options = TypeVar("Options", bound=DrawingOptions)

_LONGEST_LINE = 500
# Options of several pieces. A stream is one.
_OF_SEVERAL = ("num", "best_of", "pick")
_EXAMPLES: dict[str, list[Any]] = {"num": [1], "bars": [8], "temperature": [0.9], "top_p": [0.95], "seed": [7]}


def _read_json(value: Any, info: ValidationInfo) -> Any:
    """Forms have only text, so controls and constraints are JSON there."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        example = {"controls": '{"key": "C-major"}'}.get(str(info.field_name), '{"scale": "C-major"}')
        raise InputError(f"{info.field_name} is {shortened(value, 40)!r}: write JSON such as {example}") from error


class Asked(BaseModel, Generic[Options]):
    """How to sample, and what the music should be like. Raises an [`InputError`] for values that make no sense."""

    model_config = ConfigDict(extra="forbid")
    options_class: ClassVar[type[DrawingOptions]]

    controls: Annotated[dict[str, str | list[str]], BeforeValidator(_read_json)] = Field(
        default={},
        description='What the music should be like, such as {"key": "C-major"}. GET /model lists all names and '
        "values. In a form, write it as JSON.",
        examples=[{}],
    )
    constraints: Annotated[dict[str, Any], BeforeValidator(_read_json)] = Field(
        default={},
        description='What no new note may break, such as {"scale": "D-dorian", "polyphony": 4}: '
        f"{', '.join(option.name for option in fields(Constraints))}, with the values that the command line takes. "
        "In a form, write it as JSON.",
        examples=[{}],
    )

    @property
    def options(self) -> Options:
        """As the command line has them."""
        names = {option.name for option in fields(self.options_class)} & set(type(self).model_fields)
        given = {name: getattr(self, name) for name in names} | {"constraints": Constraints.of(self.constraints)}
        return cast(Options, self.options_class(**given))

    @field_validator("*", mode="before")
    @classmethod
    def _check_as_given(cls, value: Any, info: ValidationInfo) -> Any:
        """Before pydantic changes it: it takes true for 1. Forms have only text, which is checked later."""
        if not isinstance(value, str):
            check_sampling(**{str(info.field_name): value})
        return value

    @model_validator(mode="after")
    def _check(self) -> "Asked[Options]":
        _ = self.options
        return self


class _Sampled(Asked[SamplingOptions]):
    options_class = SamplingOptions


class _Continued(_Sampled):
    midi: UploadFile = Field(description="The MIDI file to continue. Every piece begins with it, as it is.")


class _Infilled(Asked[DrawingOptions]):
    options_class = DrawingOptions
    midi: UploadFile = Field(description="The MIDI file. What you do not ask for stays as it is.")
    bars: str = Field(
        description="The bars to write again, counted from 1: the first and the last, or a single one.",
        examples=["5-8"],
    )
    tracks: str | None = Field(
        default=None,
        description="The tracks to write again, counted from 1; the others stay. By default all tracks.",
        examples=["1,2"],
    )

    @property
    def span(self) -> tuple[int, int]:
        return read_span(self.bars)

    @property
    def numbers(self) -> list[int] | None:
        return read_tracks(self.tracks)

    @model_validator(mode="after")
    def _check_gap(self) -> "_Infilled":
        _ = self.span, self.numbers
        return self


def _with_options(name: str, base: type[Asked[Any]], without: Sequence[str] = ()) -> Any:
    """`base` with a field for each option of its class, some apart."""
    hints = get_type_hints(base.options_class)
    described: dict[str, Any] = {
        option.name: (
            hints[option.name],
            Field(
                default=option.default,
                description=option.metadata["help"],
                examples=_EXAMPLES.get(option.name),
                json_schema_extra={"enum": list(choices)} if (choices := option.metadata.get("choices")) else None,
            ),
        )
        for option in fields(base.options_class)
        if option.name not in {*without, *base.model_fields}
    }
    return create_model(name, __base__=base, **described)


if TYPE_CHECKING:  # a type checker cannot know the fields that are made
    GenerateRequest = _Sampled
    ContinueRequest = _Continued
    InfillRequest = _Infilled
    StreamRequest = _Sampled
    ContinueStreamRequest = _Continued
else:
    GenerateRequest = _with_options("GenerateRequest", _Sampled)
    ContinueRequest = _with_options("ContinueRequest", _Continued)
    InfillRequest = _with_options("InfillRequest", _Infilled)
    StreamRequest = _with_options("StreamRequest", _Sampled, _OF_SEVERAL)
    ContinueStreamRequest = _with_options("ContinueStreamRequest", _Continued, _OF_SEVERAL)


def line_of(error: RequestValidationError) -> str:
    """The first thing that is wrong with a request, in one line, in the words of the command line if it has some."""
    first = error.errors()[0]
    return shortened(printable(_describe(first)), _LONGEST_LINE)


def _describe(first: Mapping[str, Any]) -> str:
    kind, place = first["type"], [str(part) for part in first["loc"] if part not in ("body", "header", "path")]
    name = place[0] if place else "the request"
    value = first.get("input")
    if kind == "json_invalid":
        return f"the body is not JSON ({first.get('ctx', {}).get('error', 'malformed')})"
    if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
        return str(cause)
    if not place and kind != "missing":
        return (
            'the body is not a JSON object: send options such as {"bars": 8}, with the Content-Type application/json'
        )
    if name == "midi" and kind != "missing":
        return "midi is not a file: send it as a file of the form"
    if kind == "extra_forbidden":
        return f"there is no option {name!r}: see /docs"
    if kind == "missing":
        return f"{name} is missing: see /docs" if place else "the body is missing: send JSON, {} for the defaults"
    try:
        check_sampling(**{name: value})
    except InputError as reason:
        return str(reason)
    return f"{name} is {value!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
