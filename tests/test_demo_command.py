"""`midimamba demo` makes what is not there, in order, and asks for its packages before any work."""

import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from midimamba import cli, demo, launching
from midimamba.command_options import GenerateOptions, SamplingOptions, TokenizeFiles
from midimamba.constraint_options import ConstraintOptions
from midimamba.corpus.options import CorpusOptions

MADE = ("data/corpus.json", "pretrained/config.json", "generator/config.json", "samples", "report.md")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The scripts and commands that a demo starts; each leaves what the real one does, but no more than its name."""
    lines: list[list[str]] = []

    def leave(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def script(name: str, arguments: list[str], started: float) -> int:
        lines.append([name, *arguments])
        out = Path(arguments[arguments.index("--output_dir") + 1])
        kinds = ("", "-discriminator", "-musical-discriminator") if name == "adversarial" else ("",)
        for kind in kinds:
            leave(out.with_name(out.name + kind) / "config.json")
        return 0

    def tokenize(given: TokenizeFiles, options: CorpusOptions) -> None:
        lines.append(["tokenize", given.source, str(options.vocab_size)])
        leave(Path(given.out) / "corpus.json")

    def generate(options: GenerateOptions, sampling: SamplingOptions, wanted: ConstraintOptions) -> None:
        lines.append(["generate", options.model, str(sampling.num), str(options.render), *options.discriminator])
        assert options.out is not None
        leave(options.out)

    def report(run: Path) -> None:
        lines.append(["report", str(run)])
        leave(run / "report.md")

    monkeypatch.setattr(launching, "run_script", script)
    monkeypatch.setattr(
        launching, "distilling", lambda model: ["--temperature", "0.8"]
    )  # what it trained is not there
    monkeypatch.setattr("midimamba.commands.tokenize", tokenize)
    monkeypatch.setattr("midimamba.commands.generate", generate)
    monkeypatch.setattr("midimamba.evaluation.report.write_report", report)
    return lines


def test_a_demo_goes_through_all_stages_with_packaged_recipes(begun: list[list[str]], tmp_path: Path) -> None:
    demo.run(tmp_path / "run")
    assert [line[0] for line in begun] == ["tokenize", "pretrain", "adversarial", "generate", "report"]
    assert begun[0] == ["tokenize", "chorales", "800"]
    for line in begun[1:3]:
        recipe = Path(line[line.index("--config") + 1])
        assert recipe.parent == Path(str(files("midimamba.training.recipes")))
        read = yaml.safe_load(recipe.read_text())
        # The recipe is for `runs/demo`; its folders are replaced by those of the user.
        for name in {"model", "data"} & read.keys():
            given = Path(line[line.index(f"--{name}") + 1])
            assert given.relative_to(tmp_path / "run") == Path(read[name]).relative_to("runs/demo")
        out = line[line.index("--output_dir") + 1]
        assert out == str(tmp_path / "run" / ("pretrained" if line[0] == "pretrain" else "generator"))
    assert begun[2][begun[2].index("--temperature") + 1] == "0.8"
    generator = str(tmp_path / "run" / "generator")
    judges = [f"{generator}-discriminator", f"{generator}-musical-discriminator"]
    assert begun[3] == ["generate", generator, "8", "True", *judges]


@pytest.mark.parametrize("done", range(len(MADE) + 1))
def test_a_second_start_goes_on_where_the_first_one_stopped(
    done: int, begun: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in MADE[:done]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    demo.run(tmp_path)
    assert len(begun) == len(MADE) - done
    assert capsys.readouterr().out.count("already there") == done


def test_a_script_that_fails_ends_the_demo_with_its_code(
    begun: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "run_script", lambda *arguments: -2)
    with pytest.raises(SystemExit) as stopped:
        demo.run(tmp_path / "run")
    assert stopped.value.code == 130
    assert [line[0] for line in begun] == ["tokenize"]


def test_missing_packages_are_told_before_any_work(
    begun: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "midirenderer", None)
    monkeypatch.setattr(sys, "argv", ["midimamba", "demo", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert 'pip install "midimamba[demo]"' in capsys.readouterr().err
    assert not begun
    assert not (tmp_path / "run").exists()
