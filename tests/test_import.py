"""`import midimamba` is light, changes nothing, and still makes transformers' Auto classes know ours."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import midimamba
from midimamba import MidiProcessor
from midimamba.runtime import limit_spinning
from support import make_discriminator, make_generator

HEAVY = ("torch", "transformers", "miditok", "symusic", "datasets", "numpy", "huggingface_hub", "safetensors")


def run(code: str, *arguments: object) -> str:
    """What a new Python process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(processor: MidiProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that no stock class can load, with its processor, and a discriminator."""
    folder = tmp_path_factory.mktemp("models")
    make_generator(layout="moe-mamba", vocab_size=processor.vocab_size).save_pretrained(folder / "generator")
    processor.save_pretrained(folder / "generator")
    make_discriminator(vocab_size=processor.vocab_size).save_pretrained(folder / "discriminator")
    return folder


def test_import_is_light_and_sets_no_environment_variable() -> None:
    code = (
        "import os; before = dict(os.environ); import sys, midimamba, midimamba.errors, midimamba.files\n"
        # Their `main` limits spinning, which must come before torch.
        "import midimamba.cli, midimamba.training.pretrain, midimamba.training.adversarial\n"
        f"print([name for name in {HEAVY} if name in sys.modules], os.environ == before)"
    )
    assert run(code).split("\n")[0] == "[] True"


def test_spinning_is_limited_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from midimamba import cli\n"
        "for command in ('', 'tokenize', 'generate', 'evaluate', 'listen', 'publish', 'info'):\n"
        "    sys.argv = ['midimamba', *command.split(), '--help']\n"
        "    try:\n        cli.main()\n"
        f"    except SystemExit:\n        print([name for name in {HEAVY} if name in sys.modules])\n"
        "import os; print(os.environ['GOMP_SPINCOUNT'])"
    )
    assert run(code).splitlines().count("[]") == 7


NAMES = {
    "configuration": "AutoConfig.from_pretrained(folder + '/generator')",
    "generator": "AutoModelForCausalLM.from_pretrained(folder + '/generator')",
    "discriminator": "AutoModelForSequenceClassification.from_pretrained(folder + '/discriminator')",
    "processor": "AutoProcessor.from_pretrained(folder + '/generator')",
    "pipeline": "pipeline('midi-generation', model=folder + '/generator')",
}
OURS = {
    "configuration": "midimamba.modeling.configuration_midimamba",
    "generator": "midimamba.modeling.modeling_midimamba",
    "discriminator": "midimamba.modeling.modeling_discriminator",
    "processor": "midimamba.tokenization.processor",
    "pipeline": "midimamba.modeling.pipeline_midi_generation",
}


@pytest.mark.parametrize(
    ("imports", "used"),
    [
        (["import midimamba"], ["processor"]),
        (["import midimamba"], ["pipeline"]),
        (["import midimamba", "import trl", "from transformers import Trainer"], list(NAMES)),
        (["import transformers.pipelines", "from transformers import AutoProcessor", "import midimamba"], list(NAMES)),
        (["from transformers import AutoConfig", "from midimamba import MidiMambaForCausalLM"], list(NAMES)),
        (["import midimamba.tokenization.processor"], list(NAMES)),
    ],
    ids=["one-class", "pipeline-alone", "before", "after", "between", "by-a-module"],
)
def test_transformers_knows_our_classes_in_any_order_of_imports(
    imports: Sequence[str], used: Sequence[str], folders: Path
) -> None:
    classes = {NAMES[name].partition(".")[0].partition("(")[0] for name in used}
    code = ["import sys", *imports, f"from transformers import {', '.join(classes)}", "folder = sys.argv[1]"]
    code += [f"print('{name}', type({NAMES[name]}).__module__)" for name in used]
    code += ["print(any(type(finder).__module__.startswith('midimamba') for finder in sys.meta_path))"]
    *found, watching = run("\n".join(code), folders).splitlines()
    assert dict(line.split() for line in found[-len(used) :]) == {name: OURS[name] for name in used}
    assert watching == str("pipeline" not in used)  # the watcher leaves after the last registration


def test_public_names_are_there_and_others_are_not() -> None:
    for name in midimamba.__all__:
        assert getattr(midimamba, name).__name__ == name
        assert name in dir(midimamba)
    with pytest.raises(AttributeError, match="has no attribute 'MidiMambaForCasualLM'"):
        midimamba.MidiMambaForCasualLM  # noqa: B018
