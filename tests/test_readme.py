"""Every snippet of the README and of the documentation, run in order in an empty folder as a user would."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

import midimamba
from midimamba.cli import COMMANDS, build_parser
from midimamba.options import read_options, split_flags
from midimamba.training.adversarial import AdversarialArguments
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.pretrain import PretrainArguments
from support import make_score

ROOT = Path(__file__).parents[1]
README, TOUR = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
# A shell command that stands on several pages runs once.
PAGES = {"README.md": README} | {
    str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))
}
SCRIPTS: dict[str, tuple[type, ...]] = {
    "pretrain": (PretrainArguments, TrainingArguments),
    "adversarial": (AdversarialArguments, AdversarialConfig),
}
# Training commands are run as they stand, but stop after a step on short blocks.
SHORT = "--max_steps 1 --sequence_length 32 --eval_steps 1 --save_steps 1 --use_cpu"
SHORTER = "--num_eval_samples 4 --per_device_train_batch_size 160"


def snippets(language: str) -> list[tuple[str, str]]:
    """Pages and what stands there as this language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page, snippet) for page, text in PAGES.items() for snippet in pattern.findall(text)]


def lines(language: str, beginning: str) -> list[str]:
    """The different lines of such snippets that begin like this, in the order in which they first stand."""
    found = (line for _, snippet in snippets(language) for line in snippet.splitlines())
    return list(dict.fromkeys(line for line in found if line.startswith(beginning)))


def options_of(script: str) -> set[str]:
    return {field.name for kind in SCRIPTS[script] for field in dataclasses.fields(kind)} | {"config"}


def shortened(line: str) -> str:
    """A command that does the same in seconds."""
    command = line.split()[1]
    if command == "train":
        return line + " --steps 1 --sequence_length 32 --hidden_size 16 --num_hidden_layers 1 --temperatures 1.0"
    if command == "tune":
        return f"{line} {SHORT} {SHORTER}" + (" --max_steps 0" if "--max_steps 0" in line else "")
    if command == "evaluate":
        return line + " --max-new-tokens 128 --num 8 --length 32 --bars 8"
    return line + " --max-new-tokens 64" if command in ("generate", "infill") else line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with music in it, where the shell commands of all pages have run."""
    here = tmp_path_factory.mktemp("user")
    (here / "my-midi-folder").mkdir()
    for seed in range(160):
        make_score(seed, bars=8).dump_midi(here / "my-midi-folder" / f"{seed}.mid")
    for name in ("prompt.mid", "opening.mid"):
        make_score(99, bars=2).dump_midi(here / name)
    make_score(98, bars=10).dump_midi(here / "song.mid")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    for line in lines("bash", "midimamba "):
        command = shortened(line)
        done = subprocess.run(command, shell=True, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    (here / "runs" / "demo").mkdir(parents=True)
    shutil.copytree(here / "tuned", here / "runs" / "demo" / "generator")
    return here


@pytest.mark.slow
def test_shell_commands_leave_what_the_readme_says(folder: Path) -> None:
    assert len([page for page, _ in snippets("bash") if page == "README.md"]) == 1
    for name in (
        *("data/quarantine.jsonl", "model/config.json", "tuned/config.json", "tuned-discriminator/config.json"),
        *("evaluation/tuned.json", "evaluation/tuned.md", "chosen/sample-01.mid"),
        *("filled/song-00.mid", "filled/song-01.mid"),
    ):
        assert (folder / name).exists(), name
    assert len(list((folder / "blind-test").glob("*.wav"))) == 8
    for suffix in (".mid", ".png", ".wav"):
        assert len(list((folder / "samples").glob(f"*{suffix}"))) == 4
    assert len(list((folder / "continued").glob("*.mid"))) == 4


def test_the_targets_of_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README + TOUR)) <= targets
    assert set(re.findall(r"`make ([a-z-]+)", "".join(PAGES.values()))) <= targets


def test_commands_that_are_only_shown_could_run() -> None:
    shown = lines("text", "midimamba ")
    assert any(line.startswith("midimamba publish ") for line in shown)
    for line in shown:
        words = line.split()[1:]
        passed: tuple[str, ...] = ()
        command = COMMANDS[words[0]]
        if command.passes_on:
            words, passed = split_flags(words, *command.options)
        namespace = build_parser().parse_args(words)  # ends the test if there is no such option
        for options in command.options:
            read_options(options, namespace)
        known = options_of(command.passes_on) if command.passes_on else set()
        assert {word.removeprefix("--") for word in passed if word.startswith("--")} <= known, line


def test_the_scripts_of_the_pages_take_what_they_are_given() -> None:
    pattern = re.compile(r"accelerate launch (?:--config_file (\S+) )?(?:--\w+ \S+ )*training/(\w+)\.py (.*)")
    found = [pattern.fullmatch(line) for line in lines("text", "accelerate launch ")]
    assert {match[2] for match in found if match} == SCRIPTS.keys()
    for match in found:
        assert match
        settings, script, options = match.groups()
        assert settings is None or (ROOT / settings).exists()
        assert set(re.findall(r"--(\w+)", options)) <= options_of(script)
        assert all((ROOT / recipe).exists() for recipe in re.findall(r"--config (\S+)", options))


def test_links_of_the_readme_and_of_the_tour_lead_somewhere() -> None:
    for page in (README, TOUR):
        links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
        assert not [link for link in links if not (ROOT / link).exists()]


def test_the_tour_names_every_folder() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    for folder in folders | {"benchmarks", "tests"}:
        assert f"\n{folder}/" in TOUR, folder


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert midimamba.__version__ == version


def test_pictures_of_the_readme_are_there() -> None:
    pictures = re.findall(r"!\[[^]]*]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).exists() for picture in pictures)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "snippet"), snippets("python"), ids=lambda text: text.strip().splitlines()[-1][:40])
def test_python_snippets_run(page: str, snippet: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(snippet, page, "exec"), {})
    if "continuation.mid" in snippet:
        from symusic import Score

        assert Score(folder / "continuation.mid").note_num() > 0
