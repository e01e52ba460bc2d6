"""Flags come from dataclasses: names, types, defaults, groups and help are written once."""

import argparse
import ast
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from midimamba import cli
from midimamba.cli import COMMANDS, build_parser
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from midimamba.options import add_options, read_options


@dataclass(frozen=True)
class Example:
    files: Sequence[Path] = field(metadata={"positional": True, "help": "what to read"})
    target: Path = field(metadata={"help": "where to write"})
    size: int | None = field(default=3, metadata={"help": "100% of it", "group": "numbers"})
    share: float = field(default=0.0, metadata={"help": "a share", "group": "numbers"})
    kinds: Sequence[str] = field(default=(), metadata={"help": "kinds", "choices": ("a", "b")})
    pairs: Sequence[str] = field(default=(), metadata={"help": "pairs", "repeated": True, "metavar": "K=V"})
    fast: bool = field(default=False, metadata={"help": "be quick"})
    inner: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class More:
    other_size: float | None = field(default=None, metadata={"help": "another", "group": "numbers"})


def parse(*arguments: str) -> Example:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Example, More)
    return read_options(Example, parser.parse_args(arguments), inner={"x": 1})


def test_flags_have_the_types_and_defaults_of_the_fields() -> None:
    assert parse("x", "--target", "y") == Example((Path("x"),), Path("y"), inner={"x": 1})
    flags = "x z --target y --size 4 --share 0.5 --kinds b a --pairs k=1 --pairs k=2 --fast"
    assert parse(*flags.split()) == Example(
        (Path("x"), Path("z")), Path("y"), 4, 0.5, ("b", "a"), ("k=1", "k=2"), True, {"x": 1}
    )


@pytest.mark.parametrize("arguments", ["--target y", "x", "x --target y --kinds c", "x --target y --size much"])
def test_missing_and_impossible_values_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse(*arguments.split())


@pytest.mark.parametrize(
    ("line", "given"), [("a", "a"), ("--model b", "b"), ("--name b", "b"), ("a --name a", "a"), ("a --model b", None)]
)
def test_what_may_be_named_in_two_ways_is_not_named_differently(line: str, given: str | None) -> None:
    @dataclass(frozen=True)
    class Named:
        model: str = field(metadata={"positional": True, "aliases": ("--model", "--name"), "help": "a folder"})

    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Named)
    assert "--model MODEL, --name MODEL" in parser.format_help()
    if given is not None:
        assert read_options(Named, parser.parse_args(line.split())) == Named(given)
        return
    with pytest.raises(InputError, match="MODEL is a, and --model is b: give one of them"):
        read_options(Named, parser.parse_args(line.split()))


def test_help_is_grouped_and_says_every_default_once() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Example, More)
    text = parser.format_help()
    assert text.count("numbers:") == 1
    assert text.index("numbers:") < text.index("--other-size", text.index("numbers:"))
    assert "100% of it (default: 3)" in text
    assert "a share (default: 0.0)" in text
    assert "None" not in text
    assert "inner" not in text


def test_every_command_has_help_with_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit):
            build_parser().parse_args([name, "--help"])
        assert "example: midimamba" in capsys.readouterr().out
        for example in re.split(", (?:then|or) ", command.example):
            args = build_parser().parse_args(example.split()[1:])
            assert args.command == name
            for options in command.options:
                read_options(options, args)


def test_the_vocabulary_may_be_none() -> None:
    for text, value in (("none", None), ("None", None), ("12", 12)):
        args = build_parser().parse_args(["tokenize", "x", "--out", "y", "--vocab-size", text])
        assert read_options(CorpusOptions, args) == CorpusOptions(vocab_size=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("valid_fraction", value) for value in (float("nan"), -0.1, 1.0, 2.0, float("inf"))),
        *(("test_fraction", value) for value in (float("nan"), 0.95)),
        *((name, value) for name in ("limit", "num_workers", "training_tokens", "vocab_size") for value in (0, -1)),
        *(("vocab_size", 10**20), ("limit", 1.5)),
    ],
)
def test_numbers_of_a_corpus_that_make_no_sense_are_refused(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(InputError, match=f"{name} is |leave nothing to train on"):
        CorpusOptions(**options)


def test_a_positional_with_a_default_may_be_left_out() -> None:
    @dataclass(frozen=True)
    class Maybe:
        folder: Path | None = field(default=None, metadata={"positional": True, "help": "a folder"})

    parser = argparse.ArgumentParser()
    add_options(parser, Maybe)
    assert read_options(Maybe, parser.parse_args([])).folder is None
    assert read_options(Maybe, parser.parse_args(["x"])).folder == Path("x")


def test_what_several_commands_say_of_an_option_is_written_once() -> None:
    package = Path(cli.__file__).parent
    written: Counter[str] = Counter()
    for file in package.glob("*options.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                written.update(
                    ast.unparse(value)
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant) and key.value == "help" and not isinstance(value, ast.Name)
                )
    assert len(written) > 50
    assert {text for text, count in written.items() if count > 1} <= {"'number of pieces'", "'folder to make'"}


def test_a_command_line_without_a_command_shows_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
