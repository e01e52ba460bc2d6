"""Every snippet of the README, run in order in an empty folder as a user would."""

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
from midimamba.cli import build_parser
from midimamba.training.adversarial import AdversarialArguments
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.pretrain import PretrainArguments
from support import make_score

ROOT = Path(__file__).parents[1]
README, TOUR = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
# Training commands are run as they stand, but stop after a step on short blocks.
SHORT = "--max_steps 1 --sequence_length 32 --eval_steps 1 --save_steps 1 --use_cpu"
SHORTER = (
    "--rollout_positions 2 --num_rollouts 2 --d_warmup_steps 1 --num_eval_samples 4 --per_device_train_batch_size 4"
)


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with music in it, where the README's shell commands have run."""
    here = tmp_path_factory.mktemp("user")
    (here / "my-midi-folder").mkdir()
    for seed in range(160):
        make_score(seed, bars=8).dump_midi(here / "my-midi-folder" / f"{seed}.mid")
    for name in ("prompt.mid", "opening.mid"):
        make_score(99, bars=2).dump_midi(here / name)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    for line in "".join(snippets("bash")).splitlines():
        command = line
        if "train " in line:
            command += " --steps 1 --sequence_length 32 --hidden_size 16 --num_hidden_layers 1 --temperatures 1.0"
        if "tune " in line:
            command += f" {SHORT} {SHORTER}"
        if "generate" in line:
            command += " --max-new-tokens 64"
        if "evaluate" in line:
            command += " --max-new-tokens 128 --num 8 --length 32 --bars 8"
        done = subprocess.run(command, shell=True, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    (here / "runs" / "demo").mkdir(parents=True)
    shutil.copytree(here / "tuned", here / "runs" / "demo" / "generator")
    return here


@pytest.mark.slow
def test_shell_commands_leave_what_the_readme_says(folder: Path) -> None:
    assert len(snippets("bash")) == 1
    for name in (
        *("data/quarantine.jsonl", "model/config.json", "tuned/config.json", "tuned-discriminator/config.json"),
        *("evaluation/tuned.json", "evaluation/tuned.md"),
    ):
        assert (folder / name).exists(), name
    assert len(list((folder / "blind-test").glob("*.wav"))) == 8
    for suffix in (".mid", ".png", ".wav"):
        assert len(list((folder / "samples").glob(f"*{suffix}"))) == 4
    assert len(list((folder / "continued").glob("*.mid"))) == 4


def test_the_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README + TOUR)) <= targets
    published = re.search(r"^midimamba (publish .*)$", README, re.MULTILINE)
    assert published
    assert build_parser().parse_args(published[1].split()).repo == "you/my-music"


def test_the_scripts_of_the_readme_take_what_it_gives_them() -> None:
    scripts = {
        "pretrain": (PretrainArguments, TrainingArguments),
        "adversarial": (AdversarialArguments, AdversarialConfig),
    }
    lines = re.findall(r"^accelerate launch training/(\w+)\.py (.*)$", README, re.MULTILINE)
    assert {script for script, _ in lines} == scripts.keys()
    for script, options in lines:
        known = {field.name for kind in scripts[script] for field in dataclasses.fields(kind)}
        assert set(re.findall(r"--(\w+)", options)) <= known | {"config"}
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
@pytest.mark.parametrize("snippet", snippets("python"), ids=lambda snippet: snippet.strip().splitlines()[-1][:40])
def test_python_snippets_run(snippet: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(snippet, "README.md", "exec"), {})
    if "continuation.mid" in snippet:
        from symusic import Score

        assert Score(folder / "continuation.mid").note_num() > 0
