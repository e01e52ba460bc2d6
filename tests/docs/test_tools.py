"""What the site is built with: tables from results, docstrings as Markdown, notebooks that run."""

import copy
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark_tables import render
from notebooks import read_cells, to_ipynb, to_page
from result_tables import RESULTS, TABLES, ResultError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the results, to damage."""
    return shutil.copytree(RESULTS, tmp_path / "results")


@pytest.mark.parametrize("name", [*TABLES, "all"])
def test_a_table_has_rows_of_one_width(name: str) -> None:
    rows = [line for line in render(name).splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_a_table_shows_the_figures_of_its_result(results: Path) -> None:
    path = results / "stability-chorales.json"
    result = json.loads(path.read_text())
    result["arms"]["stable"]["nll_percent"] = [12.345, 0.678]
    path.write_text(json.dumps(result))
    assert "+12.35 ± 0.68" in render("stability-chorales", results)
    assert "+12.35 ± 0.68" not in render("stability-chorales")


def without_figures(value: Any) -> Any:
    """A result whose figures are words."""
    if isinstance(value, dict):
        return {key: without_figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_figures(item) for item in value]
    return "many" if isinstance(value, int | float) else value


@pytest.mark.parametrize("damage", ["gone", "cut off", "a list", "empty", "words"])
@pytest.mark.parametrize("name", TABLES)
def test_a_result_that_cannot_be_shown_ends_in_one_line_that_names_it(name: str, damage: str, results: Path) -> None:
    path = results / f"{TABLES[name].names[0]}.json"
    text = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        words = json.dumps(without_figures(json.loads(text)))
        path.write_text({"cut off": text[: len(text) // 2], "a list": "[]", "empty": "{}", "words": words}[damage])
    with pytest.raises(ResultError, match=path.name) as caught:
        render(name, results)
    assert "\n" not in str(caught.value)


def test_no_figure_of_a_table_can_be_missing_unnoticed(results: Path) -> None:
    path = results / "scan-512.json"
    whole = json.loads(path.read_text())
    for figure in ("our_seconds", "their_seconds", "ratio", "sizes", "threads", "commit"):
        part = copy.deepcopy(whole)
        del part[figure]
        path.write_text(json.dumps(part))
        with pytest.raises(ResultError, match=figure):
            render("speed", results)


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ResultError, match="there is no table 'sped'"):
        render("sped")


def test_a_page_that_asks_for_what_is_not_there_ends_the_build_with_its_name() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

    from hooks import on_page_markdown

    config, file = MkDocsConfig(), File("some.md", "docs", "site", False)
    page = Page(None, file, config)
    with pytest.raises(PluginError, match=r"^docs/some\.md: there is no table 'nothing'"):
        on_page_markdown("Words.\n\n<!-- results: nothing -->\n", page, config, Files([file]))
    shown = on_page_markdown("Words.\n\n<!-- results: packing -->\n", page, config, Files([file]))
    assert shown.startswith("Words.\n\n|")


def test_every_result_is_listed() -> None:
    listed = render("all")
    for path in RESULTS.glob("*.json"):
        assert f"/{path.name})" in listed


def test_docstrings_become_markdown() -> None:
    docstrings = pytest.importorskip("docstrings", reason="griffe is not installed: pip install -e '.[docs]'")
    text = """\
Read tokens.

Args:
    tokens (`LongTensor` of shape `(n, time)`): what comes
        next.
    num (`int`, *optional*, defaults to 4):
        Pieces.
    model, options: as for `load`.

Returns:
    `Tensor` of shape `(n,)`.

Raises:
    InputError: if there are none.

The end."""
    assert docstrings.to_markdown(text).split("\n") == [
        *("Read tokens.", "", "", "**Args**", ""),
        "- **`tokens`** (`LongTensor` of shape `(n, time)`): what comes",
        *("    next.", "- **`num`** (`int`, *optional*, defaults to 4):", "    Pieces."),
        *("- **`model`, `options`**: as for `load`.", ""),
        *("", "**Returns**", "", "`Tensor` of shape `(n,)`.", ""),
        *("", "**Raises**", "", "- **`InputError`**: if there are none.", ""),
        *("", "The end."),
    ]


def test_references_of_docstrings_lead_to_what_they_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    griffe = pytest.importorskip("griffe", reason="griffe is not installed: pip install -e '.[docs]'")
    package = tmp_path / "midimamba"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "a.py").write_text(
        'class Thing:\n    """See [`place`] and [`~Thing.place`]."""\n\n    def place(self): ...\n'
    )
    (package / "b.py").write_text(
        "from midimamba.a import Thing\n\n\ndef use():\n"
        '    """Of [`Thing`], [`~midimamba.a.Thing.place`], [`~midimamba.b.Thing`],\n'
        '    [`~transformers.X`], [`gone`]."""\n'
    )
    with caplog.at_level(logging.WARNING):
        loaded = griffe.load(
            "midimamba",
            search_paths=[tmp_path],
            extensions=griffe.load_extensions(ROOT / "docs" / "tools" / "docstrings.py"),
            try_relative_path=False,
        )

    def link(path: str, shown: str) -> str:
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    place, thing = "midimamba.a.Thing.place", "midimamba.a.Thing"
    assert loaded["a.Thing"].docstring.value == f"See {link(place, 'place')} and {link(place, 'place')}."
    assert loaded["b.use"].docstring.value == (
        f"Of {link(thing, 'Thing')}, {link(place, 'place')}, {link(thing, 'Thing')},\n`X`, `gone`."
    )
    assert [record.getMessage() for record in caplog.records] == [
        "midimamba.b.use: its docstring refers to `gone`, which does not exist"
    ]


def test_the_three_notebooks_are_there() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_under_20_seconds_of_a_core(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    start = time.process_time()
    for cell in read_cells(path.read_text()):
        if not cell.is_text:
            exec(compile("\n" * cell.line + cell.source, str(path), "exec"), names)
    assert time.process_time() - start < 20
    assert capsys.readouterr().out


def test_a_notebook_becomes_a_page_and_an_ipynb() -> None:
    text = "# %% [markdown]\n# # A title\n#\n# Words.\n\n# %%\nprint(1)\n\n\n# %% [markdown]\n# The end.\n"
    page = to_page(text, "name")
    assert page.startswith("# A title\n\nWords.\n\n")
    assert page.endswith("```python\nprint(1)\n```\n\nThe end.\n")
    assert "(name.ipynb)" in page
    notebook = json.loads(to_ipynb(text))
    assert [(cell["cell_type"], cell["source"]) for cell in notebook["cells"]] == [
        ("markdown", "# A title\n\nWords."),
        ("code", "print(1)"),
        ("markdown", "The end."),
    ]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4)
    with pytest.raises(ValueError, match="begins with a cell"):
        read_cells("import midimamba\n# %%\n")
