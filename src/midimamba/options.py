"""Command-line flags from dataclasses: each option is written once, with its type, default and help.

transformers' `HfArgumentParser` does the same, but importing it takes seconds, and `--help` should not.
"""

import argparse
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from midimamba.errors import InputError

Options = TypeVar("Options")
_BY_FLAG = "{}_by_flag"


def add_options(parser: argparse.ArgumentParser, *classes: type) -> None:
    """
    Add the fields of dataclasses to a parser, as `--flag-names`.

    The type of a field decides how its value is read: `bool` is a switch, a `Sequence` takes several values,
    `X | None` is optional. Anything else that argparse needs is in the field's `metadata`:

    - `help` (`str`): what the option does. A field without it isn't a flag.
    - `group` (`str`, *optional*): the heading under which `--help` lists it.
    - `choices`, `metavar` (*optional*): as in argparse.
    - `parse` (`Callable[[str], Any]`, *optional*): reads a value, if the type alone does not say how.
    - `positional`, `repeated` (`bool`, *optional*): an argument without a flag; a flag to be given once per value.
    - `aliases` (`Sequence[str]`, *optional*): other flags for the same; one is enough for a positional argument too.

    Args:
        parser (`argparse.ArgumentParser`): the parser of a command.
        classes (`type`): dataclasses. Groups with the same name are one.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = {name: hint for options in classes for name, hint in get_type_hints(options).items()}
    for option in (option for options in classes for option in _flags(options)):
        title = option.metadata.get("group")
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        target = parser if title is None else groups[title]
        aliases = option.metadata.get("aliases", ())
        settings = _settings(option, hints[option.name])
        if option.metadata.get("positional"):
            if aliases:  # whether one of them is given shows when all are read
                settings["default"] = argparse.SUPPRESS
                by_flag = {"metavar": option.name.upper(), **settings}
                target.add_argument(*aliases, dest=_BY_FLAG.format(option.name), **by_flag)
                settings["nargs"] = "?"
            elif option.default is not MISSING:
                settings |= {"nargs": "?", "default": option.default}
            target.add_argument(option.name, **settings)
        else:
            target.add_argument(f"--{option.name.replace('_', '-')}", *aliases, dest=option.name, **settings)


def read_options(options: type[Options], namespace: argparse.Namespace, **others: Any) -> Options:
    """
    Build a dataclass from parsed flags.

    Args:
        options (`type`): a dataclass that [`add_options`] added to the parser.
        namespace (`argparse.Namespace`): what the parser returned.
        others: values of the fields that aren't flags.

    Raises:
        InputError: if a positional argument that is a flag as well was given in neither way, or differently in both.
    """
    given = {flag.name: getattr(namespace, flag.name) for flag in _flags(options) if hasattr(namespace, flag.name)}
    for option in _flags(options):
        if hasattr(namespace, by_flag := _BY_FLAG.format(option.name)):
            value, flag = getattr(namespace, by_flag), option.metadata["aliases"][0]
            if given.setdefault(option.name, value) != value:
                raise InputError(
                    f"{option.name.upper()} is {given[option.name]}, and {flag} is {value}: give one of them"
                )
        if option.default is MISSING and option.default_factory is MISSING and option.name not in given:
            flag = (option.metadata.get("aliases") or (f"--{option.name}",))[0]
            raise InputError(f"{option.name.upper()} is missing: name it first, or with {flag}; see --help")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return options(**values, **others)


def first_given(options: Any, names: Iterable[str]) -> str | None:
    """The first of these fields of a dataclass that has not its default, or `None`."""
    defaults = {option.name: option.default for option in fields(options)}
    return next((name for name in names if getattr(options, name) != defaults[name]), None)


def split_flags(line: Sequence[str], *classes: type) -> tuple[list[str], tuple[str, ...]]:
    """
    Part a command line into what dataclasses describe, and unknown flags with all that follows each of them.

    Args:
        line (`Sequence[str]`): its words.
        classes (`type`): dataclasses, as for [`add_options`].
    """
    known = {"--help"}
    for option in (option for options in classes for option in _flags(options)):
        known |= {f"--{option.name.replace('_', '-')}", *option.metadata.get("aliases", ())}
    own: list[str] = []
    passed: list[str] = []
    target = own
    for word in line:
        if word.startswith("--"):
            target = own if word.split("=")[0] in known else passed
        (own if word == "-h" else target).append(word)
    return own, tuple(passed)


def _flags(options: Any) -> Iterator["Field[Any]"]:
    return (option for option in fields(options) if "help" in option.metadata)


def _settings(option: "Field[Any]", hint: Any) -> dict[str, Any]:
    """What `add_argument` is told. A flag that was not given is left out, so that the dataclass has the last word."""
    metadata = option.metadata
    required = option.default is MISSING
    text = metadata["help"].replace("%", "%%")
    if not (required or option.default is None or option.default is False or option.default == ()):
        text += f" (default: {option.default})"
    settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if hint is bool:
        return settings | {"action": "store_true"}
    kind, several = _value_type(hint)
    settings["type"] = metadata.get("parse", kind)
    settings |= {name: metadata[name] for name in ("choices", "metavar") if name in metadata}
    if metadata.get("repeated"):
        settings["action"] = "append"
    elif several:
        settings["nargs"] = "+"
    if metadata.get("positional"):
        del settings["default"]
    elif required:
        settings["required"] = True
    return settings


def _value_type(hint: Any) -> tuple[Callable[[str], Any], bool]:
    """The type of a single value, and whether there may be several: `Sequence[str] | None` is `(str, True)`."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    if get_origin(hint) is Sequence:
        return get_args(hint)[0], True
    return hint, False
