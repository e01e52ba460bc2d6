"""Whether token sequences keep the rules: midimamba's grammar, and MidiTok's own syntax check."""

from collections.abc import Sequence

import torch
from miditok import TokSequence
from torch import Tensor
from tqdm.auto import tqdm

from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import expand_ids


def grammar_errors(processor: MidiProcessor, sequences: Sequence[Sequence[int]]) -> list[float]:
    """
    The share of the tokens of every sequence that the grammar does not allow after the tokens before them.

    It is like MidiTok's token syntax error (arXiv 2301.11975), but applies all rules of
    [`~midimamba.tokenization.grammar.MidiGrammar`]: a position before the last one, or a long silence, is an error as
    well.

    Args:
        processor (`MidiProcessor`): the processor to whose tokenizer the ids belong.
        sequences (`Sequence[Sequence[int]]`): with or without begin-of-sequence, controls and padding, which are not
            checked.

    Returns:
        `list[float]`: NaN for a sequence without music.

    Raises:
        InputError: if there are no rules for the tokenization.
    """
    grammar = processor.grammar()
    vocab = processor.midi_tokenizer.vocab_size
    shares = []
    for ids in tqdm(sequences, desc="grammar", leave=False, disable=None):
        sequence = torch.tensor(ids, dtype=torch.long)
        special = len(processor.tokenizer.all_special_ids)
        checked = ((sequence >= special) | (sequence == processor.eos_token_id)).nonzero().flatten()
        if not len(checked):
            shares.append(float("nan"))
            continue
        shares.append(_count_forbidden(grammar, sequence, checked, vocab) / len(checked))
    return shares


def _count_forbidden(grammar: MidiGrammar, sequence: Tensor, steps: Tensor, vocab: int) -> int:
    """The number of tokens at these ascending steps that the grammar forbids after the tokens before them."""
    scores = torch.zeros(1, vocab)
    # From one prefix to the next, the grammar reads only what is new.
    judged = (grammar(sequence[None, :step], scores)[0, sequence[step]] for step in steps.tolist())
    return sum(bool(score.isneginf()) for score in judged)


def syntax_errors(processor: MidiProcessor, ids: Sequence[int]) -> float:
    """
    MidiTok's own share of base tokens that may not follow the token before, or that repeat a note.

    MidiTok is given base tokens, because it returns shares above 1 for subwords, and a copy, because it rewrites its
    argument.

    Returns:
        `float`: NaN for a sequence without music.
    """
    tokenizer = processor.midi_tokenizer
    first = len(tokenizer.special_tokens)
    music = [token for token in ids if first <= token]
    base = expand_ids(tokenizer, music)
    return float(tokenizer.tokens_errors(TokSequence(ids=list(base)))) if base else float("nan")
