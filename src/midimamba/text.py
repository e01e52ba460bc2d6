"""Text from outside (names of files, archive members, labels) made safe for the place where it is shown.

A name can hold line breaks, escape sequences that repaint a terminal, signs that reverse the direction of writing,
HTML and Markdown. There is one function for each place; each takes any text and returns one line.
"""

import html
import re
import unicodedata

# Everything but plain text: controls, line and paragraph separators, halves of surrogate pairs.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Marks, embeddings, overrides and isolates of the bidirectional algorithm (Unicode annex 9), and invisible signs.
_INVISIBLE = frozenset("\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~^$:@-])")


def printable(text: str) -> str:
    """One line for a terminal or a log: what would not show as itself is written as an escape such as `\\x1b`."""
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    hidden = unicodedata.category(character) in _UNPRINTABLE or character in _INVISIBLE
    return character.encode("unicode_escape").decode() if hidden else character


def for_html(text: str) -> str:
    """One line of HTML, in an element or a quoted attribute, that shows `text`."""
    return html.escape(printable(text))


def for_markdown(text: str) -> str:
    """One line of Markdown, also inside a table, that shows `text`. Markdown keeps HTML, so that is escaped too."""
    return _MARKDOWN.sub(r"\\\1", for_html(text))
