"""`import midimamba` is light, changes nothing, and still makes transformers' Auto classes know ours."""

import json
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

HEAVY = (
    "torch",
    "transformers",
    "miditok",
    "symusic",
    "datasets",
    "numpy",
    "huggingface_hub",
    "safetensors",
    "fastapi",
    "gradio",
)


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
        "for command in ('', 'tokenize', 'generate', 'evaluate', 'listen', 'publish', 'export', 'serve', 'app',\n"
        "    'info'):\n"
        "    sys.argv = ['midimamba', *command.split(), '--help']\n"
        "    try:\n        cli.main()\n"
        f"    except SystemExit:\n        print([name for name in {HEAVY} if name in sys.modules])\n"
        "import os; print(os.environ['GOMP_SPINCOUNT'])"
    )
    assert run(code).splitlines().count("[]") == 10


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


ORDERS = {
    "one-class": (["import midimamba"], ["processor"]),
    "pipeline-alone": (["import midimamba"], ["pipeline"]),
    "before": (["import midimamba", "import trl", "from transformers import Trainer"], list(NAMES)),
    "after": (
        ["import transformers.pipelines", "from transformers import AutoProcessor", "import midimamba"],
        list(NAMES),
    ),
    "between": (["from transformers import AutoConfig", "from midimamba import MidiMambaForCausalLM"], list(NAMES)),
    "by-a-module": (["import midimamba.tokenization.processor"], list(NAMES)),
}
# A process that imports what takes longest and knows neither transformers nor us, then forks for every order.
FORKING = """
import contextlib, json, os, sys, traceback
import symusic, torch, torch._dynamo
assert not {"transformers", "trl", "midimamba"} & set(sys.modules)
folder = sys.argv[1]
orders = json.loads(sys.argv[2])
for name, code in orders.items():
    if not os.fork():
        with open(f"{folder}/{name}.txt", "w") as file, contextlib.redirect_stdout(file):
            try:
                exec(code, {"folder": folder})
            except BaseException:
                traceback.print_exc(file=file)
        os._exit(0)
for _ in orders:
    os.wait()
"""


def code_of(imports: Sequence[str], used: Sequence[str]) -> str:
    """Import in this order, use some names, and say whose classes they gave and whether we still watch imports."""
    classes = {NAMES[name].partition(".")[0].partition("(")[0] for name in used}
    code = ["import sys", *imports, f"from transformers import {', '.join(classes)}"]
    code += [f"print('{name}', type({NAMES[name]}).__module__)" for name in used]
    code += ["print(any(type(finder).__module__.startswith('midimamba') for finder in sys.meta_path))"]
    return "\n".join(code)


@pytest.fixture(scope="module")
def printed(folders: Path) -> dict[str, str]:
    """What each of `ORDERS` prints in a process of its own."""
    run(FORKING, folders, json.dumps({name: code_of(*order) for name, order in ORDERS.items()}))
    return {name: (folders / f"{name}.txt").read_text() for name in ORDERS}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can fork")
@pytest.mark.parametrize("order", ORDERS)
def test_transformers_knows_our_classes_in_any_order_of_imports(order: str, printed: dict[str, str]) -> None:
    _, used = ORDERS[order]
    *found, watching = printed[order].splitlines()
    assert found[-len(used) :] == [f"{name} {OURS[name]}" for name in used], printed[order]
    assert watching == str("pipeline" not in used)  # the watcher leaves after the last registration


def test_public_names_are_there_and_others_are_not() -> None:
    for name in midimamba.__all__:
        assert getattr(midimamba, name).__name__ == name
        assert name in dir(midimamba)
    misspelt = "MidiMambaForCasualLM"
    with pytest.raises(AttributeError, match="has no attribute 'MidiMambaForCasualLM'"):
        getattr(midimamba, misspelt)
