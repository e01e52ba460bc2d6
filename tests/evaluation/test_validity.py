"""Errors are counted where they occur, and music has none."""

import math
import random

import pytest
import torch

from midimamba import MidiProcessor
from midimamba.evaluation.validity import grammar_errors, syntax_errors
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_score


def test_encoded_music_keeps_the_grammar(processor: MidiProcessor) -> None:
    sequences = [processor.encode(make_score(seed)) for seed in range(4)]
    assert grammar_errors(processor, sequences) == [0, 0, 0, 0]
    assert all(syntax_errors(processor, ids) == 0 for ids in sequences)


def test_errors_are_those_of_checking_the_grammar_token_by_token(processor: MidiProcessor) -> None:
    chance, vocab_size = random.Random(0), processor.midi_tokenizer.vocab_size
    ids = processor.encode(make_score(1))
    for _ in range(12):
        ids[chance.randrange(1, len(ids))] = chance.randrange(4, vocab_size)
    grammar, wrong = processor.grammar(), 0
    for step in range(1, len(ids)):
        scores = grammar(torch.tensor([ids[:step]]), torch.zeros(1, vocab_size))
        wrong += bool(scores[0, ids[step]].isneginf())
    assert 0 < wrong < len(ids)
    assert grammar_errors(processor, [ids]) == [pytest.approx(wrong / (len(ids) - 1))]
    # Neither padding nor the token that begins a sequence is checked.
    padded = [processor.pad_token_id] * 70 + ids
    assert grammar_errors(processor, [padded]) == grammar_errors(processor, [ids])
    assert math.isnan(grammar_errors(processor, [[processor.bos_token_id]])[0])


def test_an_end_is_an_error_unless_a_note_comes_before() -> None:
    processor = MidiProcessor(build_tokenizer("REMI"))
    vocab = processor.midi_tokenizer.vocab
    bar = [processor.bos_token_id, vocab["Bar_None"]]
    assert grammar_errors(processor, [[*bar, processor.eos_token_id]]) == [1 / 2]
    music = processor.encode(make_score(0))
    assert grammar_errors(processor, [[*music, processor.eos_token_id]]) == [0]


def test_noise_has_errors_and_the_input_is_left_as_it_was(processor: MidiProcessor) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, processor.midi_tokenizer.vocab_size, (60,), generator=generator).tolist()
    before = list(ids)
    assert grammar_errors(processor, [ids])[0] > 0.3
    assert 0.3 < syntax_errors(processor, ids) <= 1
    assert ids == before
    assert math.isnan(syntax_errors(processor, [processor.bos_token_id]))
