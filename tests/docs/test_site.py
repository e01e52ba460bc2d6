"""The documentation: it builds without warnings, its links lead somewhere, and it loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/midimamba/midimamba/blob/main/"
# Tags that make a browser load something, and the attribute that says what.
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "audio": "src",
    "video": "src",
    "object": "data",
}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values["href"])
        if tag in LOADS and LOADS[tag] in values:
            self.loads.append(values[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def target_of(link: str, page: Path, site: Path) -> Path:
    """The file that an internal link names."""
    path = unquote(urlsplit(link).path)
    if not path:
        return page
    target = site / path.lstrip("/") if path.startswith("/") else page.parent / path
    return (target / "index.html" if path.endswith(("/", ".")) else target).resolve()


@pytest.mark.slow
def test_every_page_of_the_navigation_is_built(site: Path) -> None:
    navigation = re.findall(r": ([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(navigation) >= 14
    assert not [name for name in navigation if not (site / f"{name}.html").is_file()]
    written = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert {str(name) for name in written} <= set(navigation)


@pytest.mark.slow
def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme:
                continue
            target = target_of(link, path, site)
            assert target.is_file(), f"{path.name} links to {link}"
            anchor = unquote(urlsplit(link).fragment)
            assert not anchor or target not in pages or anchor in pages[target].anchors, f"{path.name}: {link}"
            checked += 1
    assert checked > 500


@pytest.mark.slow
def test_links_to_files_of_the_repository_name_files(pages: dict[Path, Page]) -> None:
    named = {link.split("#")[0] for page in pages.values() for link in page.links if link.startswith(REPOSITORY)}
    assert named
    assert not [link for link in named if not (ROOT / link.removeprefix(REPOSITORY)).exists()]


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.loads
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
            assert address.startswith("data:") or target_of(address, path, site).is_file(), f"{path.name}: {address}"
    for style in site.rglob("*.css"):
        addresses = re.findall(r"url\(\s*['\"]?([^)'\"]+)|@import\s+['\"]([^'\"]+)", style.read_text(encoding="utf-8"))
        assert not [found for found in addresses if "//" in "".join(found).removeprefix("data:")[:8]], style.name


@pytest.mark.slow
def test_the_search_finds_words_without_a_server(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index")
    assert "leave-one-out" in index


@pytest.mark.slow
def test_docstrings_are_readable(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for raw in ("[`", "*optional*", "Args:\n", "Raises:\n"):
        assert raw not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL), raw
    # A parameter with its type and default, a shape, an error, and a reference from one class to another.
    for part in (
        "<strong><code>num_rollouts</code></strong> (<code>int</code>, <em>optional</em>, defaults to 4)",
        "<code>LongTensor</code> of shape <code>(n, time)</code>",
        "<strong><code>CacheMismatchError</code></strong>: if",
        "<code>RecurrentCache.for_model</code></a>",
    ):
        assert part in page, part


@pytest.mark.slow
def test_tables_stand_where_pages_ask_for_them(site: Path, pages: dict[Path, Page]) -> None:
    for path in pages:
        assert "<!-- results" not in path.read_text(encoding="utf-8"), path.name
    assert (site / "benchmarks.html").read_text(encoding="utf-8").count("<table>") > 25
