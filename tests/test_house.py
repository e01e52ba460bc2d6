"""The house: what is in the wheel, which folder imports which, and that recipes hold only real options."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from midimamba.hub_cards.publish import PUBLISHED
from midimamba.hub_cards.remote_code import PIPELINE_CODE

ROOT = Path(__file__).parents[1]
FOLDERS = ("modeling", "tokenization", "corpus", "evaluation", "hub_cards", "training")
# What each folder may import from midimamba.
MAY_IMPORT = {
    "modeling": set(),
    "tokenization": {"errors"},
    "corpus": {"errors", "files", "text", "tokenization"},
    "evaluation": {"errors", "files", "text", "loading", "modeling", "tokenization", "corpus"},
    "hub_cards": {"errors", "files", "text", "modeling", "tokenization", "corpus", "evaluation"},
    "training": {
        "errors",
        "files",
        "text",
        "loading",
        "runtime",
        "modeling",
        "tokenization",
        "corpus",
        "evaluation",
        "hub_cards",
    },
}


def imports_of(file: Path) -> set[str]:
    """The second part of every `midimamba.x…` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if "." in node.module else [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {[*name.split("."), ""][1] for name in names if name.split(".")[0] == "midimamba"}
        assert not any(name.split(".")[0] in FOLDERS for name in names), f"{file} imports {names} by its bare name"
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    for file in files:
        assert imports_of(file) <= MAY_IMPORT[folder] | {folder}, file


def test_what_is_exported_to_the_hub_imports_by_single_dots_only() -> None:
    for file in (ROOT / "modeling").glob("*.py"):
        assert not imports_of(file), file
        levels = [node.level for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        assert max(levels, default=0) <= 1, file


def exported_with(module: Path) -> set[Path]:
    """A module and all that it imports by a dot, as transformers follows it when it copies code."""
    found, queue = {module}, [module]
    while queue:
        for node in ast.walk(ast.parse(queue.pop().read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{module} imports from above its folder"
                assert node.module, f"{module}: write `from .x import y`, transformers follows nothing else"
                assert "." not in node.module, f"{module} imports from below its folder"
                needed = module.with_name(f"{node.module}.py")
                queue += {needed} - found
                found.add(needed)
    return found


def test_what_the_processor_is_exported_with_needs_no_midimamba() -> None:
    closure = exported_with(ROOT / "tokenization" / "processor.py")
    assert {"processor", "grammar", "tokenizer", "ingest", "controls"} <= {file.stem for file in closure}
    for file in closure:
        # The class of errors is midimamba's where there is one, and else the file's own.
        assert imports_of(file) <= ({"errors"} if file.stem == "errors" else set()), file
    # What a user of a published generator has to have.
    assert {file.name for file in closure} <= set(PUBLISHED)


def test_the_pipeline_is_published_with_all_that_it_imports_and_none_of_the_networks() -> None:
    closure = exported_with(ROOT / "modeling" / "pipeline_midi_generation.py")
    assert {file.name for file in closure} == set(PIPELINE_CODE) <= set(PUBLISHED)
    assert exported_with(ROOT / "tokenization" / "custom_generate.py") == {
        ROOT / "tokenization" / "custom_generate.py"
    }


def test_no_script_is_named_like_a_dependency() -> None:
    dependencies = {"datasets", "trl", "tokenizers", "accelerate", "transformers", "torch", "miditok", "symusic"}
    assert not dependencies & {file.stem for folder in FOLDERS for file in (ROOT / folder).glob("*.py")}


def test_the_wheel_holds_every_module_recipe_and_card(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = ROOT / "src"
    expected = {str(file.relative_to(sources)) for file in sources.glob("midimamba/**/*.py")} | {"midimamba/py.typed"}
    for folder in FOLDERS:
        for pattern in ("*.py", "*.md", "recipes/*.yaml", "recipes/*.py", "accelerate_configs/*.*"):
            expected |= {f"midimamba/{file.relative_to(ROOT)}" for file in (ROOT / folder).glob(pattern)}
    assert {name for name in packed if ".dist-info" not in name} == expected


def test_a_plain_install_asks_for_nothing_that_compiles() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any(name in line for line in project["dependencies"] for name in ("mamba-ssm", "causal-conv1d"))
    assert {"cuda", "demo", "test", "dev"} <= set(project["optional-dependencies"])
