"""A round trip through a Hub: publish, then load what was published."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from markdown_it import MarkdownIt
from symusic import Note, Score, Track

from midimamba import MidiProcessor
from midimamba.errors import InputError
from midimamba.hub_cards.evaluation import read_evaluation
from midimamba.hub_cards.publish import Licences, _generator_card, publish
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_discriminator, make_generator

from .fake_hub import FakeHub, client

# huggingface_hub reads its endpoint when it is imported, so each client is a separate process.
PUBLISH = """
import json, sys
from pathlib import Path
from midimamba.hub_cards.evaluation import read_evaluation
from midimamba.hub_cards.publish import publish

run = Path(sys.argv[1])
discriminator = run / "generator-discriminator"
urls = publish(run / "generator", "bach", discriminators=[discriminator], report=run / "report.json", private=True)
print(json.dumps(urls.urls))
"""

LOAD = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaForCausalLM

run = Path(sys.argv[1])
stock = AutoModelForCausalLM.from_pretrained("you/bach")
assert type(stock) is MambaForCausalLM and "midimamba" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained("you/bach")

import midimamba
from transformers import AutoModelForSequenceClassification, AutoProcessor

ids = torch.arange(3, 33).view(2, 15)
local = midimamba.load(run / "generator")
processors = [AutoProcessor.from_pretrained("you/bach"), midimamba.MidiProcessor.from_pretrained("you/bach")]
with torch.no_grad():
    assert torch.equal(midimamba.load("you/bach")(ids).logits, local(ids).logits)
    torch.testing.assert_close(stock(ids).logits, local(ids).logits)
    here = midimamba.MidiDiscriminator.from_pretrained(run / "generator-discriminator")
    there = AutoModelForSequenceClassification.from_pretrained("you/bach-discriminator")
    assert type(there) is midimamba.MidiDiscriminator
    assert torch.equal(here(ids).logits, there(ids).logits)
piece = midimamba.MidiProcessor.from_pretrained(run / "generator").encode("prompt.mid")
for processor in processors:
    assert type(processor) is midimamba.MidiProcessor
    assert processor.encode("prompt.mid") == piece
assert tokenizer.get_vocab() == processors[0].tokenizer.get_vocab()
"""

# Where midimamba is not installed.
ABROAD = """
import json, sys
sys.modules["midimamba"] = None
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

processor = AutoProcessor.from_pretrained("you/bach", trust_remote_code=True)
assert processor.decode(processor.encode("prompt.mid")).note_num() == 8
(piece,) = pipeline(model="you/bach", trust_remote_code=True, device="cpu")("prompt.mid", bars=1, seed=0)
assert piece.note_num() > 8
model = AutoModelForCausalLM.from_pretrained("you/bach")
inputs = processor("prompt.mid", return_tensors="pt")
options = dict(bars=1, max_new_tokens=60, do_sample=True, custom_generate="you/bach", trust_remote_code=True)
torch.manual_seed(0)
assert processor.decode(model.generate(**inputs, **options)[0]).note_num() > 8
print(json.dumps(processor.encode("prompt.mid")))
"""

AGAIN = """
import sys
from pathlib import Path
from midimamba.errors import exit_on_input_error
from midimamba.hub_cards.evaluation import read_evaluation
from midimamba.hub_cards.publish import publish

generator = Path(sys.argv[1])
publish(generator, "you/own")
publish(generator, "you/own")
with exit_on_input_error():
    publish(generator, "them/bach")
"""

NOT_FOR_THE_HUB = ("optimizer.pt", "training_args.bin", "trainer_state.json", "checkpoint-5/model.safetensors", ".env")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks, tokenizer, report and samples as a run leaves them, and files that must not be uploaded."""
    folder = tmp_path_factory.mktemp("run")
    processor = MidiProcessor(build_tokenizer())
    generator = make_generator(vocab_size=processor.vocab_size)
    generator.save_pretrained(folder / "generator")
    processor.save_pretrained(folder / "generator")
    make_discriminator(vocab_size=processor.vocab_size).save_pretrained(folder / "generator-discriminator")
    for part in ("generator", "generator-discriminator"):
        (folder / part / "training_args.json").write_text(json.dumps({"estimator": "dense", "sequence_length": 77}))
        for name in NOT_FOR_THE_HUB:
            (folder / part / name).parent.mkdir(exist_ok=True)
            (folder / part / name).write_bytes(b"pickle")
    (folder / "samples").mkdir()
    samples = [f"samples/sample-00.{suffix}" for suffix in ("mid", "png", "wav", "mp3")]
    for name in ("curves.png", *samples, "notes.txt"):
        (folder / name).write_bytes(name.encode())
    diversity = {f"distinct_{n}": 0.125 for n in (1, 2, 3, 4)} | {"self_bleu_4": 0.25}
    measures = diversity | {"held_out_nll": 2.0, "accuracy": 0.75, "accuracy_real": 0.91, "accuracy_fake": 0.59}
    settings = {"fresh_samples": 9, "tokens_per_sequence": 77}
    report = {"before": measures, "after": {**measures, "held_out_nll": 2.5}, "real": diversity, "settings": settings}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a piece in it."""
    folder = tmp_path_factory.mktemp("desk")
    score, track = Score(480), Track(program=0)
    for start in range(8):
        track.notes.append(Note(start * 480, 480, 60 + start, 80))
    score.tracks.append(track)
    score.dump_midi(folder / "prompt.mid")
    return folder


@pytest.fixture(scope="module")
def urls(hub: FakeHub, run: Path, desk: Path) -> dict[str, str]:
    """The addresses of what was published on `hub`."""
    done = client(hub, desk, PUBLISH, run)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_both_networks_get_a_repository(hub: FakeHub, urls: dict[str, str]) -> None:
    assert urls == {"generator": f"{hub.url}/you/bach", "discriminator": f"{hub.url}/you/bach-discriminator"}
    assert set(hub.repositories) == hub.private == {"you/bach", "you/bach-discriminator"}


@pytest.mark.usefixtures("urls")
def test_only_what_users_load_or_read_is_uploaded(hub: FakeHub, run: Path) -> None:
    common = {"config.json", "model.safetensors", "training_args.json", "README.md"}
    assert set(hub.repositories["you/bach-discriminator"]) == common
    assert set(hub.repositories["you/bach"]) == common | {
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "miditok.json"),
        *("processor_config.json", "evaluation.json", "curves.png"),
        *("processor.py", "grammar.py", "tokenizer.py", "hf_tokenizer.py", "tokenizations.py", "controls.py"),
        *(
            "grammar_types.py",
            "grammar_state.py",
            "grammar_torch.py",
            "grammar_numba.py",
            "grammar_tables.py",
            "grammar_midilike.py",
            "grammar_pertok.py",
            "grammar_rests.py",
            "grammar_mmm.py",
            "grammar_beat.py",
            "grammar_beat_tables.py",
            "grammars.py",
            "composing.py",
            "batching.py",
            "processor_loading.py",
            "sampling_limits.py",
            "constraints.py",
            "timed_rules.py",
            "walks.py",
            "voices.py",
        ),
        *("normalization.py", "bar_plan.py", "note_times.py", "open_notes.py", "continuation.py"),
        *("infilling.py", "gaps.py"),
        *("pipeline_midi_generation.py", "judging.py", "scoring.py", "policy.py", "resampling.py"),
        "custom_generate/generate.py",
        *("choices.py", "musical_time.py", "ingest.py", "abc_notation.py", "errors.py"),
        *("samples/sample-00.mid", "samples/sample-00.png", "samples/sample-00.wav", "samples/sample-00.mp3"),
    }
    weights = (run / "generator" / "model.safetensors").read_bytes()
    assert hub.repositories["you/bach"]["model.safetensors"] == weights
    assert hub.repositories["you/bach"]["evaluation.json"] == (run / "report.json").read_bytes()
    assert not (run / "generator" / "README.md").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("urls")
def test_what_was_published_loads_by_name(hub: FakeHub, run: Path, desk: Path) -> None:
    done = client(hub, desk, LOAD, run)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("urls")
def test_the_published_processor_comes_with_its_code(hub: FakeHub, run: Path, desk: Path) -> None:
    done = client(hub, desk, ABROAD)
    assert done.returncode == 0, done.stderr
    expected = MidiProcessor.from_pretrained(run / "generator").encode(desk / "prompt.mid")
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("urls")
def test_the_snippets_of_the_cards_run_unchanged(hub: FakeHub, desk: Path) -> None:
    cards = [hub.repositories[name]["README.md"].decode() for name in ("you/bach", "you/bach-discriminator")]
    snippets = [snippet for card in cards for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]
    assert len(snippets) == 4
    done = client(hub, desk, "\n".join(snippets).replace("max_new_tokens=512", "max_new_tokens=32"))
    assert done.returncode == 0, done.stderr
    scores = [Score(desk / name).to("quarter") for name in ("prompt.mid", "continuation.mid")]
    assert Score(desk / "continued.mid").note_num() > 0
    # Plain `generate` has no grammar: it may add a note to the last chord of the prompt.
    prompt, continuation = ({(note.time, note.pitch) for note in score.tracks[0].notes} for score in scores)
    assert prompt <= continuation


@pytest.mark.usefixtures("urls")
def test_cards_carry_metadata_and_measures(hub: FakeHub) -> None:
    cards = {name: files["README.md"].decode() for name, files in hub.repositories.items()}
    front = {name: yaml.safe_load(card.split("---")[1]) for name, card in cards.items()}
    for metadata in front.values():
        assert metadata["library_name"] == "transformers"
        assert metadata["tags"] == ["midi", "music", "symbolic-music", "music-generation", "mamba", "seqgan"]
        assert metadata["language"] == "en"
        assert "license" not in metadata
    assert front["you/bach"]["pipeline_tag"] == "text-generation"
    assert "| 2.000 | 2.500 |" in cards["you/bach"]
    assert "rose by 25.0%" in cards["you/bach"]
    assert "![Piano roll of sample-00](samples/sample-00.png)" in cards["you/bach"]
    assert "- `estimator`: dense" in cards["you/bach"]
    assert "91% of real sequences" in cards["you/bach-discriminator"]
    assert "77 tokens" in cards["you/bach-discriminator"]
    assert all("**No licence was stated for the weights.**" in card for card in cards.values())
    assert not {"datasets", "base_model", "model-index"} & set(front["you/bach"])  # nobody knows the music
    player = '<audio controls src="https://huggingface.co/you/bach/resolve/main/samples/sample-00.mp3"></audio>'
    assert player in cards["you/bach"]


@pytest.mark.parametrize(
    ("layout", "kind", "loads_as", "trust"),
    [
        ("mamba", "A Mamba language model", "a stock `MambaForCausalLM`, no remote code", False),
        ("transformer", "A Transformer language model", "a stock `LlamaForCausalLM`, no remote code", False),
        ("moe-mamba", "A moe-mamba language model", "with its own code", True),
    ],
)
def test_a_card_says_how_its_layout_loads(layout: str, kind: str, loads_as: str, trust: bool, tmp_path: Path) -> None:
    make_generator(layout=layout).save_pretrained(tmp_path)
    card = str(_generator_card(tmp_path, "you/bach", None, Licences(None, None)))
    assert kind in card
    assert f"With transformers alone ({loads_as};" in card
    assert ("trust_remote_code=True" in card) == trust


@pytest.mark.slow
def test_a_card_of_the_owner_is_kept_and_a_refusal_of_the_hub_is_one_line(
    hub: FakeHub, run: Path, desk: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "generator", tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("---\ntags: [mine]\n---\nMy own words.\n")
    done = client(hub, desk, AGAIN, tmp_path / "own")
    assert hub.repositories["you/own"]["README.md"].endswith(b"My own words.\n")
    assert "you/own" not in hub.private
    assert done.returncode == 2
    refusal = done.stderr.splitlines()[-1]
    assert refusal.startswith("error: them/bach cannot be created: the Hub answers 403")
    assert "403" in refusal


def test_an_impossible_name_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match="no/such/name"):
        publish(run / "generator", "no/such/name")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "miditok.json"])
def test_a_folder_that_is_not_a_generator_is_refused_before_anything_is_sent(
    run: Path, tmp_path: Path, missing: str
) -> None:
    for name in {"config.json", "model.safetensors", "miditok.json"} - {missing}:
        shutil.copyfile(run / "generator" / name, tmp_path / name)
    with pytest.raises(InputError, match="a checkpoint to publish"):
        publish(tmp_path, "you/bach")
    with pytest.raises(InputError, match="a checkpoint to publish"):
        publish(run / "generator", "you/bach", discriminators=[tmp_path / "nowhere"])


@pytest.mark.parametrize("content", ["", "[1]", "{}"])
def test_a_file_that_is_not_a_report_is_refused(run: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match="is not a report"):
        publish(run / "generator", "you/bach", report=tmp_path / "report.json")


def test_a_report_of_another_version_is_refused(run: Path, tmp_path: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    del report["settings"]["tokens_per_sequence"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="of another version, without 'tokens_per_sequence'"):
        publish(run / "generator", "you/bach", report=tmp_path / "report.json")


def test_the_report_of_evaluate_becomes_the_card(run: Path, tmp_path: Path) -> None:
    estimate = {"value": 0.512, "low": 0.4, "high": 0.6}
    unknown = dict.fromkeys(estimate)
    overlap = {"estimate": estimate, "floor": 0.987}
    feature = {"samples": unknown, "real": unknown}
    feature |= dict.fromkeys(("overlapping_area", "kl_divergence", "classifier"), overlap)
    report = {
        "figures": {"classifier_tokens": {"estimate": {**estimate, "value": 0.731}, "floor": None}},
        "features": {"pitch_class_histogram": feature},
        "settings": {"samples": 8, "reference_pieces": 30, "bars_per_piece": 16},
    }
    (tmp_path / "tuned.json").write_text(json.dumps(report))
    for name in ("tuned-features.png", "tuned-sample-0.png", "tuned-real-0.png", "other-features.png"):
        (tmp_path / name).write_bytes(name.encode())
    evaluation = read_evaluation(tmp_path / "tuned.json")
    card = str(_generator_card(run / "generator", "you/bach", evaluation, Licences(None, None)))
    assert "| 0.731 | 0.4 … 0.6 | – |" in card  # noqa: RUF001
    assert "| 0.512 | 0.4 … 0.6 | 0.987 |" in card
    assert "8 samples are compared with 30 pieces" in card
    pictures = {"tuned-features.png", "tuned-sample-0.png", "tuned-real-0.png"}
    assert evaluation.files == {name: tmp_path / name for name in pictures} | {
        "evaluation.json": tmp_path / "tuned.json"
    }
    assert all(f"({name})" in card for name in pictures - {"tuned-real-0.png"})


@pytest.fixture
def trained(run: Path, tmp_path: Path) -> Path:
    """A generator that was trained on a data set of the Hub, and samples that its owner has put beside it."""
    shutil.copytree(run / "generator", tmp_path / "bach")
    options = {"data": "you/chorales", "model": "them/large", "sequence_length": 77}
    (tmp_path / "bach" / "training_args.json").write_text(json.dumps(options))
    record = {
        **{"command": "accelerate launch -m midimamba.training.pretrain --data you/chorales", "steps": 1200},
        **{"hardware": "2 x NVIDIA H100", "seconds": 593, "versions": {"midimamba": "1.0", "torch": "2.13"}},
    }
    (tmp_path / "bach" / "training_run.json").write_text(json.dumps(record))
    (tmp_path / "bach" / "samples").mkdir()
    for name in ("a.mp3", "a.mid", "b.wav"):
        (tmp_path / "bach" / "samples" / name).write_bytes(b"music")
    return tmp_path / "bach"


def comparison(reference: str) -> dict[str, Any]:
    """What `midimamba evaluate` writes."""
    nll, none = {"value": 1.25, "low": 1.0, "high": 1.5}, {"value": None, "low": None, "high": None}
    figures = {"held_out_nll_per_token": nll, "classifier_tokens": none, "classifier_tokens_p_value": nll}
    return {
        "figures": {name: {"estimate": estimate, "floor": None} for name, estimate in figures.items()},
        "features": {},
        "settings": {
            **{"samples": 8, "reference_pieces": 30, "bars_per_piece": 16},
            **{"reference": reference, "split": "validation"},
        },
    }


def test_a_card_says_where_the_model_comes_from(online: FakeHub, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(comparison("them/held-out")))
    publish(trained, "you/bach", report=tmp_path / "report.json", license="cc-by-4.0")
    files = online.repositories["you/bach"]
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["datasets"], front["base_model"], front["license"]) == ("you/chorales", "them/large", "cc-by-4.0")
    (index,) = front["model-index"]
    assert index["name"] == "bach"
    (measured,) = index["results"]
    assert measured["dataset"] == {"name": "them/held-out", "type": "them/held-out", "split": "validation"}
    assert measured["metrics"] == [
        {
            **{"type": "held_out_nll_per_token", "name": "held-out NLL, nats per token", "value": 1.25},
            "args": {"95 % interval": [1.0, 1.5]},
        }
    ]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/midimamba.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("them/held-out", "held_out_nll_per_token", 1.25)
    assert entry.notes == "held-out NLL, nats per token, split validation, 95 % interval 1 to 1.5"
    assert "Trained for 1,200 steps in 10 minutes on 2 x NVIDIA H100, with midimamba 1.0, torch 2.13." in card
    assert "\n$ accelerate launch -m midimamba.training.pretrain --data you/chorales\n" in card
    assert "this licence for the weights: cc-by-4.0" in card
    assert "[you/chorales](https://huggingface.co/datasets/you/chorales), whose card states its licence" in card
    address = "https://huggingface.co/you/bach/resolve/main/samples"
    players = re.findall(r'<audio controls src="(.*?)"></audio>', card)
    assert players == [f"{address}/a.mp3", f"{address}/b.wav"]
    assert {"samples/a.mp3", "samples/a.mid", "samples/b.wav", "training_run.json"} <= set(files)
    assert "[MIDI](samples/a.mid)" in card


def test_a_card_of_discriminators_alone_claims_no_training(online: FakeHub, trained: Path) -> None:
    record = json.loads((trained / "training_run.json").read_text())
    (trained / "training_run.json").write_text(json.dumps(record | {"steps": 0}))
    publish(trained, "you/bach")
    card = online.repositories["you/bach"]["README.md"].decode()
    assert "The generator was not trained; discriminators were fitted to it in 10 minutes on 2 x NVIDIA H100" in card
    assert "0 steps" not in card


def test_music_of_this_machine_is_named_and_not_linked(
    online: FakeHub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "you" / "chorales").mkdir(parents=True)  # which looks like a repository, but is this
    (tmp_path / "held-out").mkdir()
    (tmp_path / "report.json").write_text(json.dumps(comparison(str(tmp_path / "held-out"))))
    monkeypatch.chdir(tmp_path)
    publish(trained, "you/bach", report=tmp_path / "report.json")
    files = online.repositories["you/bach"]
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert "datasets" not in front
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "held-out"
    assert "The licence of the training music is not recorded" in card
    publish(trained, "you/bach", license="cc-by-4.0", data_license="cc0-1.0")
    card = online.repositories["you/bach"]["README.md"].decode()
    assert "this licence for the weights: cc-by-4.0" in card
    assert "this licence for the training music: cc0-1.0" in card
    assert "The licence of the training music is not recorded" not in card
    assert ".eval_results/midimamba.yaml" not in files
    assert not any(str(tmp_path).encode() in content for content in files.values())


@pytest.mark.parametrize(
    "record",
    [
        *("[]", "{", '{"command": 3}', '{"steps": "many"}', '{"steps": 1, "seconds": "x"}'),
        '{"steps": 1, "versions": [1]}',
    ],
)
def test_a_damaged_record_of_a_run_is_refused(online: FakeHub, trained: Path, record: str) -> None:
    (trained / "training_run.json").write_text(record)
    with pytest.raises(InputError, match=r"training_run\.json"):
        publish(trained, "you/bach")
    assert not online.created


def test_what_a_record_says_stays_text(trained: Path) -> None:
    hostile = "a\n```\n<script>alert(1)</script>\n# x {{ jinja }}\u202e"
    record = {"command": hostile, "hardware": hostile, "steps": 1, "versions": {hostile: hostile}}
    (trained / "training_run.json").write_text(json.dumps(record))
    (trained / "training_args.json").write_text(json.dumps({"data": hostile, "model": hostile}))
    (trained / "samples" / "<script>.mp3").write_bytes(b"music")
    card = str(_generator_card(trained, "you/bach", None, Licences(None, None)))
    shown = MarkdownIt("commonmark", {"html": True}).render(card.split("---\n", 2)[2])
    assert "<script" not in shown
    assert "\u202e" not in card
    assert "samples/%3Cscript%3E.mp3" in shown
