"""Text from outside (names of files, archive members, labels) made safe for the place where it is shown.

A name can hold line breaks, escape sequences that repaint a terminal, signs that reverse the direction of writing,
HTML and Markdown. There is one function for each place; each takes any text and returns one line.
"""

import html
import json
import re
import sys
import unicodedata
from typing import Any, TextIO
from urllib.parse import quote

# Everything but plain text: controls, signs that format, line and paragraph separators, halves of surrogate pairs.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Of the signs that format text, those that are seen or that scripts and emoji need: joiners, and Arabic number signs.
# The others turn the direction of writing round or hide text.
_SHOWN = frozenset("\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")
# Signs of Markdown and its common extensions anywhere, and what makes a list or a rule at the start of a line.
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#!|~^$:@])|^(?=[-+=])")
_WORD = re.compile(r"\w+", re.ASCII)
_NUMBERED = re.compile(r"^(\d+)\.")


def printable(text: str) -> str:
    """One line for a terminal or a log: what would not show as itself is written as an escape such as `\\x1b`."""
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    hidden = unicodedata.category(character) in _UNPRINTABLE and character not in _SHOWN
    return character.encode("unicode_escape").decode() if hidden else character


def for_html(text: str) -> str:
    """One line of HTML, in an element or a quoted attribute, that shows `text`."""
    return html.escape(printable(text))


def for_markdown(text: str) -> str:
    """One line of Markdown, also inside a table, that shows `text`. Markdown keeps HTML, so that is escaped too."""
    escaped = _MARKDOWN.sub(r"\\\1", html.escape(printable(text).strip(), quote=False))
    return _NUMBERED.sub(r"\1\\.", escaped)


def as_code(name: str) -> str:
    """A name in Markdown: a plain word in backticks, and as text whatever backticks may not hold."""
    return f"`{name}`" if _WORD.fullmatch(name) else for_markdown(name)


def for_link(path: str) -> str:
    """The target of a link, in Markdown or HTML, to the file `path` beside the page; `/` separates folders."""
    return quote(path, safe="/", errors="surrogateescape")


def for_json(value: Any, indent: int | None = None) -> str:
    """JSON in ASCII without control characters: nothing in it acts in a terminal or ends a line early.

    Args:
        value (`Any`): what `json` can write.
        indent (`int`, *optional*): as in `json.dumps`.
    """
    return json.dumps(value, indent=indent).replace("\x7f", r"\u007f")


def shortened(text: str, length: int) -> str:
    """`text` with runs of white space as one space, cut to at most `length` signs. A cut ends in `…`."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def show(text: str, file: TextIO | None = None) -> None:
    """Print one line that may hold names from outside, to `file` or else to stdout."""
    print(printable(text), file=file or sys.stdout)
