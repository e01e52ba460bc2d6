"""What the tables of [`benchmark_tables`] are made with: results, figures and Markdown."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TIMES = "\u00d7"
ADDRESS = "https://github.com/midimamba/midimamba/blob/main/benchmarks/results"

Result = Mapping[str, Any]
Row = Sequence[str]


class ResultError(ValueError):
    """A result is missing, cannot be read or lacks a figure."""


class Table:
    """
    A table and the results that it shows.

    Args:
        make (`Callable`): takes the results in the order of `names` and returns Markdown.
        names (`Sequence[str]`): files in benchmarks/results, without `.json`.
    """

    def __init__(self, make: Callable[..., str], names: Sequence[str]):
        self.make = make
        self.names = names

    def render(self, folder: Path) -> str:
        """
        Raises:
            ResultError: if a result is missing, cannot be read or lacks a figure.
        """
        results = [read_result(folder / f"{name}.json") for name in self.names]
        try:
            table, machines = self.make(*results), [_machine(result) for result in results]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            files = ", ".join(f"benchmarks/results/{name}.json" for name in self.names)
            reason = f"{type(error).__name__}: {error}"
            raise ResultError(
                f"{files}: a figure is missing or malformed ({reason}); run the benchmark again"
            ) from error
        links = {name: f"[{name}.json]({ADDRESS}/{name}.json)" for name in self.names}
        if len(set(machines)) == 1:
            sources = f"{', '.join(links.values())}: {machines[0]}"
        else:
            sources = "; ".join(f"{link}: {machine}" for link, machine in zip(links.values(), machines, strict=True))
        return f"{table}\n\n<small>{sources}</small>\n"


TABLES: dict[str, Table] = {}


def table(*names: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register a function as the table of its name, with underscores as hyphens."""

    def register(make: Callable[..., str]) -> Callable[..., str]:
        TABLES[make.__name__.replace("_", "-")] = Table(make, names)
        return make

    return register


def read_result(path: Path) -> Result:
    """
    Read a result.

    Raises:
        ResultError: if it is missing or not a JSON object.
    """
    where = f"benchmarks/results/{path.name}"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultError(f"{where} is missing: run its benchmark, or restore it from the history") from error
    except (OSError, ValueError) as error:
        raise ResultError(f"{where} cannot be read ({error}): run its benchmark again") from error
    if not isinstance(result, dict):
        raise ResultError(f"{where} is not a JSON object: run its benchmark again")
    return result


def markdown(header: Sequence[str], rows: Sequence[Row], words: int = 1) -> str:
    """A table. Its first `words` columns hold words, and are aligned to the left; the others hold figures."""
    marks = ["---" if column < words else "---:" for column in range(len(header))]
    lines = [header, marks, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: Any, digits: int = 2, sign: bool = False) -> str:
    """
    Raises:
        TypeError: if the value is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return f"{value:{'+' if sign else ''},.{digits}f}"


def times(value: Any, digits: int = 0) -> str:
    """A ratio."""
    return f"{number(value, digits)} {TIMES}"


def spread(pair: Sequence[Any], digits: int = 3, sign: bool = False) -> str:
    """A mean and its deviation over seeds."""
    mean, deviation = pair
    return f"{number(mean, digits, sign)} ± {number(deviation, digits)}"


def interval(difference: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A difference with its 95 % interval, which is `null` for a single seed; nothing for the arm itself."""
    if difference is None:
        return ""
    if difference["interval"] is None:
        return number(difference["mean"], digits, sign=True)
    low, high = (number(end, digits, sign=True) for end in difference["interval"])
    return f"{number(difference['mean'], digits, sign=True)} ({low} … {high})"


def _machine(result: Result) -> str:
    threads = number(result["threads"], 0)
    device = result["gpu"] or f"{threads} CPU thread{'s' if threads != '1' else ''}"
    return f"{device}, torch {result['torch']}, commit {result['commit']}"
