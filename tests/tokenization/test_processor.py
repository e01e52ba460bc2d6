import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor, PretrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from midimamba.errors import InputError
from midimamba.tokenization.ingest import MidiRefusedError, read_score
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import SUBWORD_MODELS, TOKENIZATIONS, build_tokenizer, train_tokenizer


@pytest.fixture(scope="module", params=["untrained", "trained"])
def processor(request: pytest.FixtureRequest, scores) -> MidiProcessor:
    tokenizer = build_tokenizer()
    if request.param == "trained":
        train_tokenizer(tokenizer, scores[:20], 900)
    return MidiProcessor(tokenizer)


def test_path_bytes_and_score_are_encoded_alike(processor: MidiProcessor, scores, tmp_path: Path) -> None:
    content = scores[0].dumps_midi()
    (tmp_path / "a.mid").write_bytes(content)
    score = read_score(content)
    expected = [processor.bos_token_id, *processor.midi_tokenizer.encode(score).ids]
    shuffled = score.copy()
    for track in shuffled.tracks:
        track.notes = list(track.notes)[::-1]
    for midi in (tmp_path / "a.mid", str(tmp_path / "a.mid"), content, shuffled):
        assert processor.encode(midi) == expected
        assert processor(midi)["input_ids"] == expected
    assert processor(content, add_bos=False)["input_ids"] == expected[1:]
    inputs = processor(content, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["attention_mask"].tolist() == [[1] * len(expected)]


def test_a_list_is_padded_on_the_left(processor: MidiProcessor, random_score) -> None:
    pieces = [random_score(1, bars=2), random_score(2, bars=5)]
    short, long = (processor.encode(piece) for piece in pieces)
    inputs = processor(pieces, return_tensors="pt")
    pads = len(long) - len(short)
    assert pads > 0
    assert inputs["input_ids"].tolist() == [[processor.pad_token_id] * pads + short, long]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [len(short), len(long)]


def test_decode_undoes_encode_for_lists_arrays_and_tensors(processor: MidiProcessor, scores, notes) -> None:
    ids = [*processor.encode(scores[3]), processor.eos_token_id, processor.pad_token_id]
    for given in (ids, np.array(ids), torch.tensor(ids), torch.tensor([ids])):
        assert notes(processor.decode(given)) == notes(scores[3])


def test_batch_decode_drops_special_tokens_and_padding(processor: MidiProcessor, scores, notes) -> None:
    batch = processor(scores[:3], return_tensors="pt")["input_ids"]
    assert [notes(score) for score in processor.batch_decode(batch)] == [notes(score) for score in scores[:3]]
    with pytest.raises(ValueError, match="batch_decode"):
        processor.decode(batch)


def test_ids_beyond_the_vocabulary_and_nothing_at_all_decode(processor: MidiProcessor) -> None:
    assert processor.decode([processor.vocab_size, processor.vocab_size + 7]).note_num() == 0
    assert processor.decode([]).note_num() == 0


def test_an_unusable_file_is_refused(processor: MidiProcessor, tmp_path: Path) -> None:
    with pytest.raises(MidiRefusedError, match=r"none\.mid"):
        processor(tmp_path / "none.mid")


def test_save_and_load_give_the_same_processor(processor: MidiProcessor, scores, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"miditok.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "processor_config.json").read_text()) == {"processor_class": "MidiProcessor"}
    loaded = MidiProcessor.from_pretrained(tmp_path)
    assert loaded.vocab_size == processor.vocab_size
    assert loaded.encode(scores[0]) == processor.encode(scores[0])


@pytest.mark.parametrize("tokenization", TOKENIZATIONS)
@pytest.mark.parametrize("model", SUBWORD_MODELS)
def test_every_tokenization_and_model_is_saved_loaded_and_decoded(
    tokenization: str, model: str, scores, notes, tmp_path: Path
) -> None:
    tokenizer = build_tokenizer(tokenization, num_velocities=16)
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


@pytest.mark.parametrize("tokenization", TOKENIZATIONS)
def test_whatever_a_model_samples_decodes(tokenization: str) -> None:
    processor = MidiProcessor(build_tokenizer(tokenization))
    ids = torch.randint(processor.vocab_size, (50, 200), generator=torch.Generator().manual_seed(0))
    assert len(processor.batch_decode(ids)) == 50


def test_auto_processor_finds_it_by_name(
    processor: MidiProcessor, scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_push_to_hub_uploads_all_files(
    processor: MidiProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, list[str]] = {}

    def upload(self: MidiProcessor, repo_id: str, **options: object) -> None:
        self.save_pretrained(tmp_path / "pushed", max_shard_size="50GB")  # as transformers' push_to_hub does
        uploaded[repo_id] = sorted(path.name for path in (tmp_path / "pushed").iterdir())

    monkeypatch.setattr(MidiProcessor, "push_to_hub", upload)
    processor.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/bach")
    assert uploaded == {
        "me/bach": ["miditok.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    }


def test_a_repository_on_the_hub_is_read_through_its_cache(processor: MidiProcessor, scores, tmp_path: Path) -> None:
    commit = "0" * 40
    repo = tmp_path / "models--me--bach"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text(commit)
    processor.save_pretrained(repo / "snapshots" / commit)
    loaded = MidiProcessor.from_pretrained("me/bach", cache_dir=tmp_path, revision="v1", local_files_only=True)
    assert loaded.encode(scores[0]) == processor.encode(scores[0])


def test_a_folder_that_is_no_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no MIDI model"):
        MidiProcessor.from_pretrained(tmp_path)
