"""CPWord, Octuple and MuMIDI, which write a row of ids per step: from a file to a corpus and back."""

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
from miditok import MusicTokenizer, Octuple, TokSequence
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import NoteTickList, ScoreTick, TempoTickList, TimeSignatureTickList
from transformers import AutoProcessor

from midimamba.cli import main
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import SPLITS, load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from midimamba.tokenization.choices import MULTI_VOCABULARY, ONE_STREAM, TOKENIZATIONS
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.ingest import MidiRefusedError, read_score
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import (
    base_ids,
    build_tokenizer,
    expand_ids,
    fast_tokenizer,
    merge_ids,
    normalize_score,
    train_on_ids,
    train_tokenizer,
)
from support import Notes, make_score

PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(params=MULTI_VOCABULARY)
def processor(request: pytest.FixtureRequest) -> MidiProcessor:
    return MidiProcessor(build_tokenizer(request.param))


def width(processor: MidiProcessor) -> int:
    return len(processor.midi_tokenizer.vocab)


def bars_of(count: int) -> ScoreTick:
    """A note at the start of every bar of 4/4."""
    score = Score(480)
    score.tracks.append(Track(notes=[Note(bar * 1920, 480, 60, 64) for bar in range(count)]))
    return score


def tempos_at_notes(score: ScoreTick) -> list[float]:
    """The tempo in force at every onset, in order."""
    onsets = sorted(note.time for track in score.tracks for note in track.notes)
    return [[tempo.qpm for tempo in score.tempos if tempo.time <= onset][-1] for onset in onsets]


def velocities(score: ScoreTick) -> list[tuple[float, int, int]]:
    return sorted(
        (note.time / score.ticks_per_quarter, note.pitch, note.velocity)
        for track in score.tracks
        for note in track.notes
    )


def test_every_tokenization_writes_one_id_or_a_row_per_step() -> None:
    assert set(ONE_STREAM) | set(MULTI_VOCABULARY) == set(TOKENIZATIONS)
    for name in TOKENIZATIONS:
        assert build_tokenizer(name).is_multi_voc == (name in MULTI_VOCABULARY)


def test_special_tokens_come_first_in_every_vocabulary(processor: MidiProcessor) -> None:
    for vocab in processor.midi_tokenizer.vocab:
        assert list(vocab)[:3] == ["PAD_None", "BOS_None", "EOS_None"]
    assert (processor.pad_token_id, processor.bos_token_id, processor.eos_token_id) == (PAD, BOS, EOS)
    assert processor.vocab_size == [len(vocab) for vocab in processor.midi_tokenizer.vocab]


def test_ids_are_miditoks_in_rows_of_equal_length(processor: MidiProcessor, scores: list[ScoreTick]) -> None:
    tokenizer = processor.midi_tokenizer
    for score in scores[:10]:
        theirs = tokenizer.encode(normalize_score(tokenizer, read_score(score))).ids
        rows = processor.encode(score)
        assert rows[0] == [BOS] * width(processor)
        assert rows[1:] == [row + [PAD] * (width(processor) - len(row)) for row in theirs]
        assert base_ids(tokenizer, read_score(score)) == rows[1:]
        assert merge_ids(tokenizer, rows) == expand_ids(tokenizer, rows) == rows
        assert processor.encode(score, add_bos=False) == rows[1:]
    assert processor.encode(None) == [[BOS] * width(processor)]


def test_a_round_trip_keeps_all_that_the_grid_keeps(
    processor: MidiProcessor, scores: list[ScoreTick], notes: Notes
) -> None:
    tokenizer = processor.midi_tokenizer
    for score in scores:
        ids = processor.encode(score)
        decoded = processor.decode(ids)
        assert notes(decoded) == notes(score)
        kept = tokenizer.preprocess_score(normalize_score(tokenizer, read_score(score)))
        assert velocities(decoded) == velocities(kept)
        assert tempos_at_notes(decoded) == pytest.approx(tempos_at_notes(kept), abs=0.01)
        assert processor.encode(decoded) == ids


def test_only_cpword_keeps_meters(scores: list[ScoreTick]) -> None:
    for name in MULTI_VOCABULARY:
        processor = MidiProcessor(build_tokenizer(name))
        for score in scores[:10]:
            meters = [(m.numerator, m.denominator) for m in processor.decode(processor.encode(score)).time_signatures]
            given = [(m.numerator, m.denominator) for m in score.time_signatures]
            assert meters == (given if name == "CPWord" else [(4, 4)])


def test_meters_that_start_in_empty_bars_shift_nothing(processor: MidiProcessor, notes: Notes) -> None:
    score = bars_of(1)
    meters = [TimeSignature(0, 4, 4), TimeSignature(1920, 3, 4), TimeSignature(4800, 6, 8)]
    score.time_signatures.extend(TimeSignatureTickList(meters))
    score.tempos.extend(TempoTickList([Tempo(0, 120.0), Tempo(1920, 60.0)]))
    score.tracks[0].notes.extend(NoteTickList([Note(time, 240, 60, 64) for time in (3840, 9120, 11280)]))
    assert notes(processor.decode(processor.encode(score))) == notes(score)


def test_lowest_and_highest_notes_and_all_instruments_are_kept(processor: MidiProcessor, notes: Notes) -> None:
    score = Score(480)
    extremes = [Note(0, 480, pitch, 64) for pitch in (0, 1, 126, 127)]
    score.tracks.extend(Track(program=program, notes=extremes) for program in (0, 5, 127))
    score.tracks.append(Track(is_drum=True, notes=extremes))
    assert notes(processor.decode(processor.encode(score))) == notes(score)


@pytest.mark.parametrize("tokenization", ["Octuple", "MuMIDI"])
def test_a_piece_of_more_bars_than_are_numbered_is_refused(tokenization: str, notes: Notes) -> None:
    processor = MidiProcessor(build_tokenizer(tokenization))
    for count, numbered in ((1024, processor), (9, MidiProcessor(build_tokenizer(tokenization, max_bar_embedding=9)))):
        score = bars_of(count)
        score.time_signatures.append(TimeSignature(0, 2, 4))  # twice as many bars, but they are not numbered
        assert notes(numbered.decode(numbered.encode(score))) == notes(score)
        late = bars_of(count + 1)
        late.tracks[0].notes[-1].time -= 1  # on the grid it is in the next bar
        with pytest.raises(MidiRefusedError, match=rf"{count + 1:,} bars of 4/4.* {count:,}: .*max_bar_embedding"):
            numbered.encode(late)


def test_cpword_has_no_last_bar(notes: Notes) -> None:
    processor = MidiProcessor(build_tokenizer("CPWord"))
    assert notes(processor.decode(processor.encode(bars_of(1100)))) == notes(bars_of(1100))


def test_rows_that_hold_a_special_or_unknown_id_are_dropped(
    processor: MidiProcessor, scores: list[ScoreTick], notes: Notes
) -> None:
    rows = processor.encode(scores[0])
    expected = notes(scores[0])
    sizes = np.array(processor.vocab_size)
    note = next(row for row in rows[1:] if PAD not in row)
    for column in range(width(processor)):
        for index in (PAD, BOS, EOS, int(sizes[column]), -1):
            wrong = [*note[:column], index, *note[column + 1 :]]
            ids = [*rows[:7], wrong, *rows[7:], [EOS] * width(processor), [PAD] * width(processor)]
            assert notes(processor.decode(ids)) == expected, (column, index)
    assert processor.decode([]).note_num() == processor.decode([[BOS] * width(processor)]).note_num() == 0


def test_lists_arrays_and_tensors_of_one_sequence_are_decoded(
    processor: MidiProcessor, scores: list[ScoreTick], notes: Notes
) -> None:
    rows = processor.encode(scores[3])
    for given in (rows, np.array(rows), torch.tensor(rows), torch.tensor([rows])):
        assert notes(processor.decode(given)) == notes(scores[3])
    for given in (torch.tensor([rows, rows]), torch.tensor(rows)[:, :-1], torch.tensor(rows)[:, 0]):
        with pytest.raises(ValueError, match="batch_decode"):
            processor.decode(given)


def test_rows_that_are_not_music_are_refused(processor: MidiProcessor) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(processor.vocab_size)
    refused = 0
    for _ in range(20):
        ids = 3 + (torch.rand(60, len(sizes), generator=generator) * (sizes - 3)).long()
        try:
            processor.decode(ids)
        except ValueError as error:
            refused += "not music" in str(error)
    # The rows of Octuple are notes, each whole.
    assert bool(refused) == (type(processor.midi_tokenizer) is not Octuple)


def test_a_list_is_padded_with_rows_on_the_left(
    processor: MidiProcessor, random_score: Callable[..., ScoreTick], notes: Notes
) -> None:
    pieces = [random_score(1, bars=2), random_score(2, bars=5)]
    short, long = (processor.encode(piece) for piece in pieces)
    pads = len(long) - len(short)
    assert pads > 0
    expected = [[[PAD] * width(processor)] * pads + short, long]
    mask = [[0] * pads + [1] * len(short), [1] * len(long)]
    inputs = processor(pieces, return_tensors="pt")
    assert inputs["input_ids"].tolist() == processor(pieces)["input_ids"] == expected
    assert inputs["attention_mask"].tolist() == processor(pieces)["attention_mask"] == mask
    assert processor(pieces, padding=False)["input_ids"] == [short, long]
    assert [notes(score) for score in processor.batch_decode(inputs["input_ids"])] == [notes(p) for p in pieces]
    one = processor(pieces[0], return_tensors="pt")
    assert one["input_ids"].tolist() == [processor(pieces[0])["input_ids"]] == [short]
    assert one["attention_mask"].tolist() == [processor(pieces[0])["attention_mask"]] == [[1] * len(short)]


def test_anything_that_needs_one_stream_is_refused_in_a_line(
    processor: MidiProcessor, scores: list[ScoreTick], tmp_path: Path
) -> None:
    tokenizer, name = processor.midi_tokenizer, type(processor.midi_tokenizer).__name__
    with pytest.raises(InputError, match=f"{name} cannot have a subword model"):
        train_tokenizer(tokenizer, scores, 5000)
    with pytest.raises(InputError, match=f"{name} cannot have a subword model"):
        train_on_ids(tokenizer, [], 5000)
    with pytest.raises(InputError, match=f"{name} has no text form"):
        fast_tokenizer(tokenizer)
    with pytest.raises(InputError, match=f"{name} cannot have control tokens: choose one of REMI"):
        build_tokenizer(name, controls=[control_token("key", "C-major")])
    with pytest.raises(InputError, match="no control tokens"):
        processor.encode(scores[0], controls={"key": "C-major"})
    with pytest.raises(InputError, match=f"not {name}"):
        processor.grammar()
    requests: list[dict[str, Any]] = [{"controls": ["key"]}, {"labels": ["composer"]}]
    for request in requests:
        with pytest.raises(InputError, match=f"{name} cannot have control tokens"):
            tokenize_corpus(str(tmp_path), tmp_path / "out", CorpusOptions(tokenization=name, **request))


@pytest.mark.parametrize(
    ("tokenization", "options", "reason"),
    [
        ("CPWord", {"use_rests": True}, "'use_time_signatures: false' for CPWord"),
        ("CPWord", {"use_sustain_pedals": True}, "MidiTok keeps it at False"),
        ("CPWord", {"program_changes": True}, "MidiTok keeps it at False"),
        ("CPWord", {"max_bar_embedding": 60}, "CPWord has no option 'max_bar_embedding'"),
        ("Octuple", {"use_time_signatures": True}, "empty bar"),
        ("Octuple", {"use_chords": True}, "MidiTok keeps it at False"),
        ("Octuple", {"use_key_signatures": True}, "MidiTok keeps it at False"),
        ("Octuple", {"delete_equal_successive_tempo_changes": False}, "MidiTok keeps it at True"),
        ("MuMIDI", {"use_time_signatures": True}, "MidiTok keeps it at False"),
        ("MuMIDI", {"use_tempos": False}, "without a tempo"),
        ("MuMIDI", {"use_pitchdrum_tokens": False}, "uses them anyway"),
        ("MuMIDI", {"use_pitch_intervals": True}, "another pitch"),
        ("Octuple", {"special_tokens": ["PAD"]}, "ids 0, 1 and 2"),
        ("Octuple", {"use_programs": False}, "one sequence"),
        ("Octuple", {"encode_ids_split": "bar"}, "no tokens to split at"),
    ],
)
def test_options_that_miditok_cannot_honour_are_refused(
    tokenization: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        build_tokenizer(tokenization, **options)


@pytest.mark.parametrize(
    ("tokenization", "options"),
    [
        ("CPWord", {"use_time_signatures": False, "use_rests": True}),
        ("CPWord", {"use_chords": True, "use_tempos": False}),
        ("CPWord", {"use_velocities": False, "use_pitchdrum_tokens": False}),
        ("Octuple", {"use_tempos": False, "use_pitchdrum_tokens": False}),
        ("Octuple", {"use_velocities": False, "max_bar_embedding": 16}),
        ("MuMIDI", {"use_chords": True}),
        ("MuMIDI", {"use_velocities": False, "beat_res": {"0_12": 12}}),
    ],
)
def test_options_that_miditok_honours_keep_all_notes(
    tokenization: str, options: dict[str, Any], scores: list[ScoreTick], notes: Notes, tmp_path: Path
) -> None:
    processor = MidiProcessor(build_tokenizer(tokenization, **options))
    processor.save_pretrained(tmp_path)
    loaded = MidiProcessor.from_pretrained(tmp_path)
    for score in scores[:10]:
        ids = processor.encode(score)
        assert loaded.encode(score) == ids
        assert notes(loaded.decode(ids)) == notes(score)


def test_a_saved_processor_is_the_same(processor: MidiProcessor, scores: list[ScoreTick], tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    assert {"miditok.json", "processor_config.json"} == {path.name for path in tmp_path.glob("*.json")}
    alone = MusicTokenizer.from_pretrained(tmp_path, filename="miditok.json")
    assert alone.vocab == processor.midi_tokenizer.vocab
    for loaded in (MidiProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is MidiProcessor
        assert loaded.tokenizer is None
        assert loaded.midi_tokenizer == processor.midi_tokenizer
        assert loaded.encode(scores[0]) == processor.encode(scores[0])
    assert "MidiProcessor" in repr(processor)


# What a process does in which midimamba is not installed.
ABROAD = """
import json, sys
sys.modules["midimamba"] = None
from pathlib import Path
from transformers import AutoProcessor

encoded = []
for folder in map(Path, sys.argv[1:]):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    ids = processor.encode(folder / "music.mid")
    processor.save_pretrained(folder / "again")
    again = AutoProcessor.from_pretrained(folder / "again", trust_remote_code=True)
    assert again.encode(folder / "music.mid") == ids
    again.decode(ids).dump_midi(folder / "decoded.mid")
    encoded.append(ids)
print(json.dumps(encoded))
"""


@pytest.mark.slow
def test_auto_processor_needs_no_midimamba(scores: list[ScoreTick], notes: Notes, tmp_path: Path) -> None:
    processors = {tmp_path / name: MidiProcessor(build_tokenizer(name)) for name in MULTI_VOCABULARY}
    for folder, processor in processors.items():
        processor.save_pretrained(folder)
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
        assert ids == processor.encode(folder / "music.mid")
        assert notes(read_score(folder / "decoded.mid")) == notes(scores[0])


@pytest.mark.parametrize("tokenization", MULTI_VOCABULARY)
def test_the_command_makes_a_corpus_that_decodes_to_its_files(
    tokenization: str, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "music", tmp_path / "corpus"
    folder.mkdir()
    for seed in range(5):
        make_score(seed).dump_midi(folder / f"{seed}.mid")
    command = ["midimamba", "tokenize", folder, "--tokenization", tokenization, "--out", out, "--num-workers", "1"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    main()
    dataset, processor = load_corpus(out)
    report = json.loads((out / "corpus.json").read_text())
    assert report["vocab_size"] == sum(len(vocab) for vocab in processor.midi_tokenizer.vocab)
    assert report["arguments"]["vocab_size"] is None
    rows = {row["name"]: row["input_ids"] for split in SPLITS for row in dataset[split]}
    assert len(rows) == 5
    for name, ids in rows.items():
        assert ids == [*processor.encode(folder / name), [EOS] * width(processor)]
        assert notes(processor.decode(ids)) == notes(read_score(folder / name))
    for split in SPLITS:
        assert report["splits"][split]["tokens"] == sum(len(rows[name]) for name in dataset[split]["name"])


@pytest.mark.parametrize("tokenization", MULTI_VOCABULARY)
def test_a_corpus_may_use_the_tokenizer_of_another(
    tokenization: str, midi_folder: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = midi_folder(4)
    tokenize_corpus(str(folder), tmp_path / "first", CorpusOptions(tokenization=tokenization, num_workers=1))
    tokenizer = str(tmp_path / "first" / "tokenizer")
    tokenize_corpus(str(folder), tmp_path / "second", CorpusOptions(tokenizer=tokenizer, num_workers=1))
    first, second = (load_corpus(tmp_path / name)[0] for name in ("first", "second"))
    assert {split: first[split].to_dict() for split in SPLITS} == {split: second[split].to_dict() for split in SPLITS}


@pytest.mark.parametrize("tokenization", ["Octuple", "MuMIDI"])
def test_a_piece_that_is_too_long_is_quarantined(
    tokenization: str, midi_folder: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = midi_folder(3)
    bars_of(1025).dump_midi(str(folder / "long.mid"))
    report = tokenize_corpus(str(folder), tmp_path / "out", CorpusOptions(tokenization=tokenization, num_workers=1))
    assert report["refused"] == 1
    row = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert row["path"] == "long.mid"
    assert "1,025 bars of 4/4" in row["reason"]


def test_miditok_loses_what_is_refused_here(notes: Notes) -> None:
    """Why meters of Octuple, rests of CPWord and long pieces are refused: should this fail, MidiTok has learned it."""
    gap = bars_of(1)
    gap.time_signatures.extend(TimeSignatureTickList([TimeSignature(0, 4, 4), TimeSignature(1920, 3, 4)]))
    gap.tracks[0].notes.append(Note(1920 + 2 * 1440, 480, 60, 64))
    for name, option in (("Octuple", "use_time_signatures"), ("CPWord", "use_rests")):
        config = build_tokenizer(name).config.copy()
        setattr(config, option, True)
        tokenizer = type(build_tokenizer(name))(config)
        assert notes(tokenizer.decode(TokSequence(ids=tokenizer.encode(gap).ids))) != notes(gap)
    tokenizer = build_tokenizer("Octuple", max_bar_embedding=4)
    with pytest.warns(UserWarning, match="clipped"):
        assert len(tokenizer.encode(bars_of(6)).ids) == 4
