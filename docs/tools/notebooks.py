"""Notebooks that are Python files: cells begin with `# %%`, and those of text with `# %% [markdown]`.

It is jupytext's percent format, which Jupyter with jupytext, VS Code and PyCharm open as notebooks. The site shows
each as a page and offers it as an .ipynb file.
"""

import json
import re
from typing import Any, NamedTuple

_CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


class Cell(NamedTuple):
    """
    A cell of a notebook.

    Args:
        is_text (`bool`): Markdown instead of code.
        source (`str`): without the comment marks of text.
        line (`int`): of the file, counted from 0, at which the source begins.
    """

    is_text: bool
    source: str
    line: int


def read_cells(text: str) -> list[Cell]:
    """
    The cells of a notebook.

    Raises:
        ValueError: if it has none, or something before the first.
    """
    starts = list(_CELL.finditer(text))
    if not starts or text[: starts[0].start()].strip():
        raise ValueError("a notebook begins with a cell: write `# %% [markdown]` above its title")
    cells = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        source = text[start.end() : following.start() if following else None].strip("\n")
        is_text = start[1] is not None
        if is_text:
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.splitlines())
        cells.append(Cell(is_text, source, text.count("\n", 0, start.end())))
    return cells


def to_page(text: str, name: str) -> str:
    """
    A notebook as a page.

    Args:
        text (`str`): of the notebook.
        name (`str`): of the file, without its ending: under it the page offers the notebook.
    """
    title, *cells = read_cells(text)
    offer = f"[Download this page as a notebook]({name}.ipynb){{ download }}."
    blocks = [
        title.source,
        offer,
        *(cell.source if cell.is_text else f"```python\n{cell.source}\n```" for cell in cells),
    ]
    return "\n\n".join(blocks) + "\n"


def to_ipynb(text: str) -> str:
    """A notebook in Jupyter's own format, without outputs."""
    cells: list[dict[str, Any]] = []
    for cell in read_cells(text):
        cells.append({"cell_type": "markdown" if cell.is_text else "code", "metadata": {}, "source": cell.source})
        if not cell.is_text:
            cells[-1] |= {"execution_count": None, "outputs": []}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps(
        {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}, indent=1
    )
