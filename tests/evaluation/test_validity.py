"""Errors are counted where they are, and music has none."""

import math
import random
from pathlib import Path

import pytest
import torch
from symusic import Score

from midimamba import MidiProcessor
from midimamba.errors import InputError
from midimamba.evaluation.validity import Samples, decode_all, grammar_errors, read_folder, syntax_errors, until_end
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_score


def test_encoded_music_keeps_the_grammar(processor: MidiProcessor) -> None:
    sequences = [processor.encode(make_score(seed)) for seed in range(4)]
    assert grammar_errors(processor, sequences) == [0, 0, 0, 0]
    assert all(syntax_errors(processor, ids) == 0 for ids in sequences)


def test_errors_are_those_of_asking_the_grammar_token_by_token(processor: MidiProcessor) -> None:
    chance = random.Random(0)
    ids = processor.encode(make_score(1))
    for _ in range(12):
        ids[chance.randrange(1, len(ids))] = chance.randrange(4, processor.vocab_size)
    grammar, wrong = processor.grammar(), 0
    for step in range(1, len(ids)):
        scores = grammar(torch.tensor([ids[:step]]), torch.zeros(1, processor.vocab_size))
        wrong += bool(scores[0, ids[step]].isneginf())
    assert 0 < wrong < len(ids)
    assert grammar_errors(processor, [ids]) == [pytest.approx(wrong / (len(ids) - 1))]
    # Neither padding nor what begins a sequence is judged.
    padded = [processor.pad_token_id] * 70 + ids
    assert grammar_errors(processor, [padded]) == grammar_errors(processor, [ids])
    assert math.isnan(grammar_errors(processor, [[processor.bos_token_id]])[0])


def test_an_end_is_an_error_but_after_a_note() -> None:
    processor = MidiProcessor(build_tokenizer("REMI"))
    vocab = processor.midi_tokenizer.vocab
    bar = [processor.bos_token_id, vocab["Bar_None"]]
    assert grammar_errors(processor, [[*bar, processor.eos_token_id]]) == [1 / 2]
    music = processor.encode(make_score(0))
    assert grammar_errors(processor, [[*music, processor.eos_token_id]]) == [0]


def test_noise_has_errors_and_the_input_stays_as_it_is(processor: MidiProcessor) -> None:
    ids = torch.randint(4, processor.vocab_size, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    before = list(ids)
    assert grammar_errors(processor, [ids])[0] > 0.3
    assert 0.3 < syntax_errors(processor, ids) <= 1
    assert ids == before
    assert math.isnan(syntax_errors(processor, [processor.bos_token_id]))


def test_a_sequence_ends_with_its_end() -> None:
    assert until_end([1, 5, 6, 2, 0, 0], 2) == [1, 5, 6, 2]
    assert until_end([1, 5, 6], 2) == [1, 5, 6]


def test_what_decodes_to_nothing_is_counted_as_empty(processor: MidiProcessor) -> None:
    samples = decode_all(processor, [processor.encode(make_score(0)), [processor.bos_token_id], []])
    assert (len(samples.scores), samples.empty, samples.refused, samples.total) == (1, 2, {}, 3)


def test_rows_that_are_no_music_are_refused_with_a_reason() -> None:
    processor = MidiProcessor(build_tokenizer("Octuple"))
    samples = decode_all(processor, [[[7] * len(processor.midi_tokenizer.vocab)] * 3])
    assert list(samples.refused) == ["sequence 0"] or samples.total == 1


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    make_score(0).dump_midi(tmp_path / "deep" / "good.MID")
    Score(480).dump_midi(tmp_path / "silent.mid")
    (tmp_path / "broken.mid").write_bytes(b"MThd nonsense")
    (tmp_path / "notes.txt").write_text("no music")
    samples = read_folder(tmp_path)
    assert (len(samples.scores), samples.empty, samples.total) == (1, 1, 3)
    assert list(samples.refused) == ["broken.mid"]


def test_a_folder_without_midi_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a generator"):
        read_folder(tmp_path)


def test_impossible_times_are_refused_not_raised() -> None:
    score = make_score(0)
    score.ticks_per_quarter = 0
    samples = Samples()
    samples.add("x", score)
    assert "division" in samples.refused["x"]
