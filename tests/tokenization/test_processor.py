import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from symusic.core import NoteTickList, ScoreTick
from transformers import AutoConfig, AutoProcessor, MambaConfig, MambaForCausalLM, PretrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from midimamba.errors import InputError
from midimamba.tokenization.choices import ONE_STREAM, SUBWORD_MODELS
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.ingest import MidiRefusedError, read_score
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from support import Notes

SAVED = {"miditok.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
# The module of the processor, and what it imports.
CODE = {
    *("processor.py", "grammar.py", "tokenizer.py", "hf_tokenizer.py", "tokenizations.py"),
    *("choices.py", "controls.py", "musical_time.py", "ingest.py", "abc_notation.py", "errors.py"),
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
}


@pytest.fixture(scope="module", params=["untrained", "trained"])
def processor(request: pytest.FixtureRequest, scores: list[ScoreTick]) -> MidiProcessor:
    tokenizer = build_tokenizer()
    if request.param == "trained":
        train_tokenizer(tokenizer, scores[:20], 900)
    return MidiProcessor(tokenizer)


def test_path_bytes_and_score_are_encoded_alike(
    processor: MidiProcessor, scores: list[ScoreTick], tmp_path: Path
) -> None:
    content = scores[0].dumps_midi()
    (tmp_path / "a.mid").write_bytes(content)
    score = read_score(content)
    expected = [processor.bos_token_id, *processor.midi_tokenizer.encode(score).ids]
    shuffled = score.copy()
    for track in shuffled.tracks:
        track.notes = NoteTickList(list(track.notes)[::-1])
    for midi in (tmp_path / "a.mid", str(tmp_path / "a.mid"), content, shuffled):
        assert processor.encode(midi) == expected
        assert processor(midi)["input_ids"] == expected
    assert processor(content, add_bos=False)["input_ids"] == expected[1:]
    inputs = processor(content, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["attention_mask"].tolist() == [[1] * len(expected)]


def test_a_list_is_padded_on_the_left(processor: MidiProcessor, random_score: Callable[..., ScoreTick]) -> None:
    pieces = [random_score(1, bars=2), random_score(2, bars=5)]
    short, long = (processor.encode(piece) for piece in pieces)
    inputs = processor(pieces, return_tensors="pt")
    pads = len(long) - len(short)
    assert pads > 0
    assert inputs["input_ids"].tolist() == [[processor.pad_token_id] * pads + short, long]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [len(short), len(long)]


def test_decode_undoes_encode_for_lists_arrays_and_tensors(
    processor: MidiProcessor, scores: list[ScoreTick], notes: Notes
) -> None:
    ids = [*processor.encode(scores[3]), processor.eos_token_id, processor.pad_token_id]
    for given in (ids, np.array(ids), torch.tensor(ids), torch.tensor([ids])):
        assert notes(processor.decode(given)) == notes(scores[3])


def test_batch_decode_drops_special_tokens_and_padding(
    processor: MidiProcessor, scores: list[ScoreTick], notes: Notes
) -> None:
    batch = processor(scores[:3], return_tensors="pt")["input_ids"]
    assert [notes(score) for score in processor.batch_decode(batch)] == [notes(score) for score in scores[:3]]
    with pytest.raises(ValueError, match="batch_decode"):
        processor.decode(batch)


@pytest.fixture(scope="module", params=[None, *SUBWORD_MODELS])
def controlled(request: pytest.FixtureRequest, scores: list[ScoreTick]) -> MidiProcessor:
    pairs = [("instruments", "violin"), ("instruments", "drums"), ("key", "C-major"), ("composer", "Bach, J. S.")]
    tokenizer = build_tokenizer(controls=[control_token(*pair) for pair in pairs])
    if request.param:
        train_tokenizer(tokenizer, scores[:20], 900, request.param)
    return MidiProcessor(tokenizer)


def test_controls_come_between_bos_and_music_in_the_order_of_the_vocabulary(
    controlled: MidiProcessor, scores: list[ScoreTick]
) -> None:
    assert controlled.controls == {
        "instruments": ["violin", "drums"],
        "key": ["C-major"],
        "composer": ["Bach,-J.-S."],
    }
    asked = {"composer": "Bach, J. S.", "key": "C-major", "instruments": ["drums", "violin"]}
    music = controlled.encode(scores[0])
    assert controlled.control_ids(asked) == controlled.control_ids(dict(reversed(asked.items()))) == [3, 4, 5, 6]
    assert controlled.encode(scores[0], controls=asked) == [1, 3, 4, 5, 6, *music[1:]]
    assert controlled(scores[0], controls={"key": ["C-major"]})["input_ids"] == [1, 5, *music[1:]]
    assert controlled(scores[0], add_bos=False, controls={"key": "C-major"})["input_ids"] == [5, *music[1:]]
    batch = controlled(scores[:2], controls={"key": "C-major"}, return_tensors="pt")
    assert [row[row != 0][:2].tolist() for row in batch["input_ids"]] == [[1, 5], [1, 5]]


def test_music_may_be_requested_from_scratch(controlled: MidiProcessor) -> None:
    assert controlled()["input_ids"] == controlled.encode(None) == [1]
    inputs = controlled(controls={"instruments": "drums"}, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[1, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1]]


def test_decode_drops_controls_wherever_they_are(
    controlled: MidiProcessor, scores: list[ScoreTick], notes: Notes
) -> None:
    ids = controlled.encode(scores[3], controls={"key": "C-major", "instruments": "violin"})
    assert notes(controlled.decode(ids)) == notes(controlled.decode([*ids, 4, 6, 2])) == notes(scores[3])
    assert controlled.decode([1, 3, 4, 5, 6]).note_num() == 0


def test_controls_that_are_not_there_are_refused(
    controlled: MidiProcessor, processor: MidiProcessor, scores: list[ScoreTick]
) -> None:
    with pytest.raises(InputError, match="no control 'tempo': choose one of instruments, key, composer"):
        controlled.encode(scores[0], controls={"tempo": "60-90"})
    with pytest.raises(InputError, match="'instruments' has no value 'viola': choose one of violin, drums"):
        controlled(controls={"instruments": ["drums", "viola"]})
    assert processor.controls == {}
    with pytest.raises(InputError, match=r"no control tokens: .*midimamba tokenize SOURCE --controls"):
        processor(scores[0], controls={"key": "C-major"})


def test_ids_beyond_the_vocabulary_and_nothing_at_all_decode(processor: MidiProcessor) -> None:
    size = processor.midi_tokenizer.vocab_size
    assert processor.decode([size, size + 7]).note_num() == 0
    assert processor.decode([]).note_num() == 0


def test_an_unusable_file_is_refused(processor: MidiProcessor, tmp_path: Path) -> None:
    with pytest.raises(MidiRefusedError, match=r"none\.mid"):
        processor(tmp_path / "none.mid")


def test_save_and_load_give_the_same_processor(
    processor: MidiProcessor, scores: list[ScoreTick], tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == SAVED | CODE
    assert json.loads((tmp_path / "processor_config.json").read_text()) == {
        "auto_map": {"AutoProcessor": "processor.MidiProcessor"},
        "processor_class": "MidiProcessor",
    }
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()
    loaded = MidiProcessor.from_pretrained(tmp_path)
    assert loaded.vocab_size == processor.vocab_size
    assert loaded.encode(scores[0]) == processor.encode(scores[0])


def test_programs_of_the_training_data_are_kept_and_bound_the_grammar(tmp_path: Path) -> None:
    processor = MidiProcessor(build_tokenizer(), programs=[40, -1])
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["programs"] == [-1, 40]
    loaded = MidiProcessor.from_pretrained(tmp_path)
    assert loaded.programs == [-1, 40]
    vocab = loaded.midi_tokenizer.vocab
    start = [loaded.bos_token_id, *(vocab[token] for token in ("Bar_None", "TimeSig_4/4", "Position_0"))]
    judged = loaded.grammar()(torch.tensor([start]), torch.zeros(1, len(vocab)))[0]
    assert {token for token in vocab if token.startswith("Program_") and judged[vocab[token]] == 0} == {
        "Program_-1",
        "Program_40",
    }
    assert loaded.voices is None
    (tmp_path / "processor_config.json").unlink()  # as in folders of earlier versions
    assert MidiProcessor.from_pretrained(tmp_path).programs is None


def test_voices_of_the_training_data_are_kept_and_bound_the_grammar(tmp_path: Path) -> None:
    MidiProcessor(build_tokenizer(), voices=2).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["voices"] == 2
    loaded = MidiProcessor.from_pretrained(tmp_path)
    assert (loaded.voices, loaded.programs) == (2, None)
    vocab = loaded.midi_tokenizer.vocab
    note = [next(vocab[token] for token in vocab if token.startswith(kind)) for kind in ("Velocity_", "Duration_")]
    start = [vocab[token] for token in ("Bar_None", "TimeSig_4/4", "Position_0")]
    ids = torch.tensor([[loaded.bos_token_id, *start, vocab["Pitch_60"], *note, vocab["Pitch_64"], *note]])
    judged = loaded.grammar()(ids, torch.zeros(1, len(vocab)))[0]
    allowed = {token.split("_")[0] for token in vocab if judged[vocab[token]] == 0}
    assert allowed == {"Bar", "Position", "Program", "EOS"}
    assert [token for token in vocab if token.startswith("Program_") and judged[vocab[token]] == 0] == ["Program_-1"]
    (tmp_path / "processor_config.json").unlink()  # as in folders of earlier versions
    assert MidiProcessor.from_pretrained(tmp_path).voices is None


@pytest.mark.parametrize(
    "content",
    [
        *("null", "[]", '{"programs": 3}', '{"programs": [200]}', '{"programs": ["a"]}', "{"),
        *(f'{{"voices": {value}}}' for value in ("0", "-1", "true", "2.0", '"4"', "[4]")),
    ],
)
def test_facts_that_cannot_be_are_refused(content: str, tmp_path: Path) -> None:
    MidiProcessor(build_tokenizer()).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(InputError, match="processor_config"):
        MidiProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("tokenization", ONE_STREAM)
@pytest.mark.parametrize("model", SUBWORD_MODELS)
def test_every_tokenization_and_model_is_saved_loaded_and_decoded(
    tokenization: str, model: str, scores: list[ScoreTick], notes: Notes, tmp_path: Path
) -> None:
    tokenizer = build_tokenizer(tokenization, controls=[control_token("key", "C-major")], num_velocities=16)
    train_tokenizer(tokenizer, scores[:20], len(tokenizer.vocab) + 100, model)
    processor = MidiProcessor(tokenizer)
    processor.save_pretrained(tmp_path)
    loaded = MidiProcessor.from_pretrained(tmp_path)
    assert loaded.vocab_size == processor.vocab_size == len(tokenizer.vocab) + 100
    for score in scores[20:25]:
        ids = processor.encode(score)
        assert loaded.encode(score) == ids
        decoded = loaded.decode([*ids, loaded.eos_token_id])
        assert notes(decoded) == notes(processor.decode(ids))
        # BEAT writes one note for those of one pitch that begin in the same quarter of a beat.
        assert decoded.note_num() >= 0.95 * score.note_num()


@pytest.mark.parametrize("tokenization", ONE_STREAM)
def test_whatever_a_model_samples_decodes(tokenization: str) -> None:
    processor = MidiProcessor(build_tokenizer(tokenization))
    ids = torch.randint(processor.midi_tokenizer.vocab_size, (50, 200), generator=torch.Generator().manual_seed(0))
    assert len(processor.batch_decode(ids)) == 50


def test_auto_processor_finds_it_by_name(
    processor: MidiProcessor, scores: list[ScoreTick], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DummyConfig(PretrainedConfig):
        model_type = "dummy-of-this-test"

    monkeypatch.setattr(PROCESSOR_MAPPING, "_extra_content", dict(PROCESSOR_MAPPING._extra_content))
    AutoConfig.register(DummyConfig.model_type, DummyConfig, exist_ok=True)
    AutoProcessor.register(DummyConfig, MidiProcessor, exist_ok=True)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MidiProcessor
    assert loaded.encode(scores[0]) == processor.encode(scores[0])


# What a process does in which midimamba is not installed.
ABROAD = """
import json, sys
sys.modules["midimamba"] = None
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

folders = [Path(folder) for folder in sys.argv[1:]]
models, tokenizers = [], []
for folder in folders:
    models.append(AutoModelForCausalLM.from_pretrained(folder))
    tokenizers.append(AutoTokenizer.from_pretrained(folder))
assert not any(name.startswith(("miditok", "transformers_modules")) for name in sys.modules)
assert all(type(model).__module__.startswith("transformers.") for model in models)

encoded = []
for folder, model, tokenizer in zip(folders, models, tokenizers, strict=True):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    assert processor.voices == 2
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    ids = processor.encode(folder / "music.mid", controls={"key": "C-major"})
    inputs = processor(controls={"key": "C-major"}, return_tensors="pt")
    torch.manual_seed(0)
    options = dict(max_new_tokens=20, do_sample=True, logits_processor=[processor.grammar(max_bars=2)])
    new = processor.continue_score(None, model.generate(**inputs, **options)[0])
    assert new.note_num() > 0
    notes = [note for track in new.tracks if not track.is_drum for note in track.notes]
    assert all(sum(other.start <= note.start < other.end for other in notes) <= 2 for note in notes)
    processor.save_pretrained(folder / "again")
    again = AutoProcessor.from_pretrained(folder / "again", trust_remote_code=True)
    assert again.encode(folder / "music.mid", controls={"key": "C-major"}) == ids
    assert (folder / "again/tokenizer_config.json").read_text() == (folder / "tokenizer_config.json").read_text()
    processor.decode(ids).dump_midi(folder / "decoded.mid")
    encoded.append(ids)
print(json.dumps(encoded))
"""


@pytest.mark.slow
def test_auto_processor_needs_no_midimamba(scores: list[ScoreTick], notes: Notes, tmp_path: Path) -> None:
    processors = {}
    for model in ("none", "BPE"):
        tokenizer = build_tokenizer(controls=[control_token("key", "C-major")])
        if model != "none":
            train_tokenizer(tokenizer, scores[:20], 900, model)
        folder = tmp_path / model
        processors[folder] = processor = MidiProcessor(tokenizer, voices=2)
        processor.save_pretrained(folder)
        config = MambaConfig(vocab_size=tokenizer.vocab_size, hidden_size=8, num_hidden_layers=1, state_size=4)
        MambaForCausalLM(config).save_pretrained(folder)
        scores[0].dump_midi(folder / "music.mid")
    run = subprocess.run(
        [sys.executable, "-c", ABROAD, *map(str, processors)],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for ids, (folder, processor) in zip(json.loads(run.stdout.splitlines()[-1]), processors.items(), strict=True):
        assert ids == processor.encode(folder / "music.mid", controls={"key": "C-major"})
        assert notes(read_score(folder / "decoded.mid")) == notes(scores[0])


def test_no_remote_code_runs_where_midimamba_is_installed(processor: MidiProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for module in CODE:
        (tmp_path / module).write_text("raise AssertionError('remote code was run')")
    for trust in (None, False, True):
        assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=trust)) is MidiProcessor


def test_push_to_hub_uploads_all_files(
    processor: MidiProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, list[str]] = {}

    def upload(self: MidiProcessor, repo_id: str, **options: Any) -> None:
        self.save_pretrained(tmp_path / "pushed", max_shard_size="50GB")  # as transformers' push_to_hub does
        uploaded[repo_id] = sorted(path.name for path in (tmp_path / "pushed").iterdir())

    monkeypatch.setattr(MidiProcessor, "push_to_hub", upload)
    processor.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/bach")
    assert uploaded == {"me/bach": sorted(SAVED | CODE)}


def test_a_repository_on_the_hub_is_read_through_its_cache(
    processor: MidiProcessor, scores: list[ScoreTick], tmp_path: Path
) -> None:
    commit = "0" * 40
    repo = tmp_path / "models--me--bach"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text(commit)
    processor.save_pretrained(repo / "snapshots" / commit)
    loaded = MidiProcessor.from_pretrained("me/bach", cache_dir=tmp_path, revision="v1", local_files_only=True)
    assert loaded.encode(scores[0]) == processor.encode(scores[0])


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a MIDI model"):
        MidiProcessor.from_pretrained(tmp_path)
