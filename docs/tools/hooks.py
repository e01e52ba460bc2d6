"""What mkdocs does for this site beside rendering Markdown: tables from results, notebooks as pages, pictures."""

import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from benchmark_tables import render
from notebooks import to_ipynb, to_page
from result_tables import ResultError

ROOT = Path(__file__).parents[2]
# The folders of the repository, linked together as they are installed: where mkdocstrings reads the package.
TREE = ROOT / "build" / "docs"
# Pictures and sound of the pages that stand elsewhere in the repository.
PICTURES = (
    *("hub_cards/sample.png", "hub_cards/sample.mp3"),
    *(f"benchmarks/results/{name}.png" for name in ("music-nottingham", "oracle", "stable-nottingham")),
)
_RESULTS = re.compile(r"<!-- results: ([\w-]+) -->")


@event_priority(100)  # before mkdocstrings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the package together."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    top = ROOT / folders.pop("midimamba")
    tree = TREE / "midimamba"
    tree.mkdir(parents=True, exist_ok=True)
    links = {file.name: file for file in top.glob("*.py")}
    links |= {name.split(".")[1]: ROOT / folder for name, folder in folders.items() if name.count(".") == 1}
    for old in tree.iterdir():
        if old.name not in links:
            old.unlink()
    for name, target in links.items():
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(target)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and downloads of notebooks, and the pictures from elsewhere."""
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        try:
            page, notebook = to_page(text, path.stem), to_ipynb(text)
        except ValueError as error:
            raise PluginError(f"{path.relative_to(ROOT)}: {error}") from error
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        files.append(File.generated(config, f"notebooks/{path.stem}.ipynb", content=notebook))
    for picture in PICTURES:
        name = f"pictures/{Path(picture).name}"
        files.append(File.generated(config, name, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables of results where a page asks for them."""

    def table(match: re.Match[str]) -> str:
        try:
            return render(match[1])
        except ResultError as error:
            raise PluginError(f"docs/{page.file.src_uri}: {error}") from error

    return _RESULTS.sub(table, markdown)
