"""Text from outside is shown as text, wherever it is shown."""

import html
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from midimamba.text import for_html, for_markdown, printable

HOSTILE = "a\x1b[2Jb\x7f\u2028c\u202ed\n<script>|[x](y)`\udcff"


def test_a_hostile_name_is_one_visible_line() -> None:
    assert printable(HOSTILE) == r"a\x1b[2Jb\x7f\u2028c\u202ed\n<script>|[x](y)`\udcff"


@given(st.text())
def test_nothing_unprintable_is_left(text: str) -> None:
    for shown in (printable(text), for_html(text), for_markdown(text)):
        assert not any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in shown)
        assert len(shown.splitlines()) <= 1
        shown.encode()


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)))
def test_plain_text_stays(text: str) -> None:
    assert printable(text) == text
    assert html.unescape(for_html(text)) == text


def test_markdown_shows_signs_and_keeps_no_html() -> None:
    shown = for_markdown("<b>|[x](y)`*_")
    assert "<" not in shown
    assert all(f"\\{sign}" in shown for sign in "|[]()`*_")
