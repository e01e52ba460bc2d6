"""What a terminal shows while a model trains."""

import runpy
import sys
from pathlib import Path

import pytest

from midimamba.training.progress import line_of_figures

SCRIPT = Path(__file__).parents[2] / "training" / "pretrain.py"


def test_figures_are_a_line_of_text() -> None:
    figures = {"loss": 0.95784, "learning_rate": 9.2083e-05, "rollbacks": 0, "num_tokens": 123456, "total_flos": 1e9}
    line = line_of_figures(120, figures)
    assert line == "step 120  loss 0.9578  learning_rate 9.208e-05  rollbacks 0  num_tokens 123456"


def test_a_run_prints_lines_and_no_dictionaries(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"data": corpus, "output_dir": tmp_path / "model", "hidden_size": 16, "num_hidden_layers": 1}
    options |= {"sequence_length": 32, "max_steps": 2, "logging_steps": 1, "use_cpu": True, "save_strategy": "no"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capfd.readouterr().out.replace("\r", "\n").splitlines()
    assert [line.split("  ")[0] for line in printed if line.startswith("step ")][:2] == ["step 1", "step 2"]
    assert not any("{" in line for line in printed)
