"""What a repository lets transformers do where midimamba is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import pipeline

from midimamba import MidiGenerationPipeline, MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.hub_cards.remote_code import GENERATE, PIPELINE_CODE, add_remote_code
from midimamba.tokenization import custom_generate
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_generator, make_score

ABROAD = """
import sys
sys.modules["midimamba"] = None
from pathlib import Path
import torch
from symusic import Score
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

folder = sys.argv[1]
compose = pipeline("music-generation", model=folder, trust_remote_code=True, device="cpu")
assert type(compose).__module__.startswith("transformers_modules."), type(compose)
prompt = str(Path(folder) / "prompt.mid")
for scores in compose([prompt, None], num=2, bars=2, seed=1, controls={"key": "C-major"}):
    assert len(scores) == 2
    assert all(score.note_num() for score in scores)
before = Score(prompt)
(after,) = compose(prompt, bars=1, seed=2)
assert after.note_num() > before.note_num()

processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(prompt, return_tensors="pt")
def check(ids):
    start = inputs["input_ids"].shape[1]
    assert ids.shape[1] > start
    grammar = processor.grammar(ids[:, :start])
    for place in range(start, ids.shape[1]):
        allowed = grammar(ids[:, :place], torch.zeros(1, processor.vocab_size))
        assert allowed[0, ids[0, place]] == 0, place
for trust in (False, True):  # True puts it in the place of `generate`
    if not trust and sys.argv[2] == "own code":
        continue
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    options = dict(max_new_tokens=24, do_sample=True)
    torch.manual_seed(0)
    check(model.generate(**inputs, **options, custom_generate=folder, trust_remote_code=True))
    given = model.generate(**inputs, **options, processor=processor, custom_generate=folder, trust_remote_code=True)
    check(given)
    if trust:
        check(model.generate(inputs["input_ids"], **options))
        result = model.generate(inputs["input_ids"], bars=1, max_new_tokens=200, return_dict_in_generate=True)
        check(result.sequences)
        assert result.sequences[0, -1] == processor.eos_token_id
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mamba", "moe-mamba"])
def test_music_is_made_without_midimamba(layout: str, tmp_path: Path) -> None:
    processor = MidiProcessor(build_tokenizer(controls=[control_token("key", "C-major")]))
    folder = tmp_path / "bach"
    make_generator(vocab_size=processor.vocab_size, layout=layout).save_pretrained(folder)
    processor.save_pretrained(folder)
    add_remote_code(folder, processor)
    make_score(1, bars=1).dump_midi(folder / "prompt.mid")
    run = subprocess.run(
        [sys.executable, "-c", ABROAD, str(folder), "stock" if layout == "mamba" else "own code"],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture
def folder(processor: MidiProcessor, tmp_path: Path) -> Path:
    make_generator(vocab_size=processor.vocab_size).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_where_midimamba_is_installed_everything_stays(processor: MidiProcessor, folder: Path) -> None:
    before = json.loads((folder / "config.json").read_text())
    add_remote_code(folder, processor)
    after = json.loads((folder / "config.json").read_text())
    assert {name: value for name, value in after.items() if name != "custom_pipelines"} == before
    for name in (*PIPELINE_CODE, GENERATE):
        (folder / name).write_text("raise AssertionError('remote code was run')")
    compose = pipeline("midi-generation", model=str(folder), device="cpu")  # type: ignore[call-overload]
    assert type(compose) is MidiGenerationPipeline
    assert type(compose.model) is MidiMambaForCausalLM
    compose.model.save_pretrained(folder / "again")
    assert "custom_pipelines" not in (folder / "again" / "config.json").read_text()
    assert MidiMambaConfig.from_pretrained(folder).custom_pipelines == after["custom_pipelines"]


def test_what_the_owner_has_stays(processor: MidiProcessor, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = json.dumps(config | {"custom_pipelines": {"my-task": {"impl": "mine.Pipeline", "pt": []}}})
    (folder / "config.json").write_text(own)
    (folder / GENERATE).parent.mkdir()
    (folder / GENERATE).write_text("mine = True\n")
    add_remote_code(folder, processor)
    assert (folder / "config.json").read_text() == own
    assert (folder / GENERATE).read_text() == "mine = True\n"
    assert not (folder / PIPELINE_CODE[0]).exists()


def test_nothing_is_added_that_could_not_work(tmp_path: Path) -> None:
    processor = MidiProcessor(build_tokenizer("PerTok", use_chords=True))  # no grammar
    make_generator(vocab_size=processor.vocab_size).save_pretrained(tmp_path)
    add_remote_code(tmp_path, processor)
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    processor.save_pretrained(tmp_path)
    add_remote_code(tmp_path, processor)
    assert (tmp_path / PIPELINE_CODE[0]).exists()
    assert not (tmp_path / GENERATE).exists()


def test_without_the_packages_of_the_processor_tokens_are_sampled_and_a_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str, **options: Any) -> None:
        raise ImportError("run\n`pip install miditok symusic`")

    monkeypatch.setattr(custom_generate, "AutoProcessor", SimpleNamespace(from_pretrained=missing))
    custom_generate._processor_of.cache_clear()
    model = MidiMambaForCausalLM.from_pretrained(folder)
    start = torch.tensor([[1]])
    ids = custom_generate.generate(start, model=model, max_new_tokens=4, do_sample=False)
    assert ids.tolist() == torch.as_tensor(model.generate(start, max_new_tokens=4, do_sample=False)).tolist()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "sampled without the grammar, so music is not guaranteed: run `pip install miditok symusic`"
