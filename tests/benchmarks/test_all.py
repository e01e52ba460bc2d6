"""`make bench`: every benchmark is in the table, and scripts understand their commands, also the quick ones."""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ELSEWHERE = {"all.py", "gpu.py", "scan_gpu.py"}  # the table itself, and scripts that need a GPU
PAST = {f"monte-carlo-{corpus}" for corpus in ("nottingham", "chorales", "pop909")}
"""Results of a benchmark that is in the history alone."""


class ParsedError(Exception):
    """Raised instead of the work that a script would do next."""


def gpu_results() -> set[str]:
    """The names of the results of `gpu.sh`, which loops over lengths."""
    script = (BENCHMARKS / "gpu.sh").read_text()
    (lengths,) = re.findall(r"for length in ([\d ]+);", script)
    names = re.findall(r'--out "\$out/([^"]+)\.json"', script)
    return {name.replace("$length", length) for name in names for length in lengths.split()}


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return importlib.import_module("all")


def test_every_script_is_in_the_table(table: ModuleType) -> None:
    scripts = {file.name for file in BENCHMARKS.glob("*.py") if "def main(" in file.read_text()}
    run = {word.removeprefix("benchmarks/") for step in table.STEPS for word in step.command.split()}
    assert scripts - run == ELSEWHERE


def test_every_committed_result_belongs_to_the_table(table: ModuleType) -> None:
    names = {step.name for step in table.STEPS}
    assert {file.stem for file in (BENCHMARKS / "results").glob("*.json")} <= names | gpu_results() | PAST
    assert len(names) == len(table.STEPS)


def test_the_table_of_stabilisers_has_the_measured_figures() -> None:
    arms = json.loads((BENCHMARKS / "results" / "ablation-chorales.json").read_text())["arms"]
    page = (BENCHMARKS / "README.md").read_text()
    for arm, measured in arms.items():
        cells = [("nll_percent", "+.2f"), ("self_bleu_4", "+.3f"), ("d_accuracy", "+.2f")]
        shown = [f"{measured[name][0]:{form}} ± {measured[name][1]:{form[1:]}}" for name, form in cells]
        row = [arm, *shown, f"{measured['rollbacks']:.0f}", f"{measured['seconds']:.0f}"]
        assert f"| {' | '.join(row)} |" in page


@pytest.mark.parametrize("quick", [False, True])
def test_scripts_understand_their_commands(
    table: ModuleType, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser) -> None:
        raise ParsedError(parse(parser))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for step in table.STEPS:
        command = table.command_of(step, quick, tmp_path, tmp_path, tmp_path)
        if not step.command.startswith("benchmarks/"):
            continue
        monkeypatch.setattr(sys, "argv", command[1:])
        script = importlib.import_module(Path(command[1]).stem)
        with pytest.raises(ParsedError) as parsed:  # a SystemExit would say what is wrong
            script.main()
        assert parsed.value.args[0].out == tmp_path / f"{step.name}.json"


def test_a_step_without_its_files_is_skipped_and_named(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["all.py", "--only", "packing", "--corpora", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        table.main()
    assert end.value.code == 0
    assert "| packing | skipped | --corpora has no pop909.tar.gz |" in capsys.readouterr().out


def test_a_step_without_its_packages_is_skipped_and_named(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "STEPS", (table.Step("far", "-c 'print(1)'", packages=("no_such_module", "json")),))
    monkeypatch.setattr(sys, "argv", ["all.py"])
    with pytest.raises(SystemExit) as end:
        table.main()
    assert end.value.code == 0
    assert "| far | skipped | no_such_module is not installed |" in capsys.readouterr().out


def test_a_failure_is_reported_at_the_end(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (
        table.Step("good", "-c 'print(1)'"),
        table.Step("bad", "-c 'raise SystemExit(3)'"),
        table.Step("late", "-c 'print(2)'"),
    )
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["all.py", "--quick"])
    with pytest.raises(SystemExit) as end:
        table.main()
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "| good | done |" in printed
    assert "| late | done |" in printed
    assert f"| bad | failed: {tmp_path / 'runs' / 'bench' / 'quick' / 'bad.log'} |" in printed


def test_a_result_without_a_ratio_is_done(table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (step,) = (step for step in table.STEPS if step.name == "constraints")
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{}')"
    assert table.make(step, [sys.executable, "-c", write, "result.json"], Path())[:2] == ("constraints", "done")
