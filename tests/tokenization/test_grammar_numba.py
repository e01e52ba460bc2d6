"""The grammar's kernels give what torch gives, and leave the same state."""

from dataclasses import fields
from typing import Any
from unittest.mock import patch

import pytest
import torch
from grammar_support import BOS, prefer, sample
from symusic.core import ScoreTick

from midimamba.tokenization import grammar as grammar_module
from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.grammar_numba import NumbaRules
from midimamba.tokenization.grammar_torch import TorchRules
from midimamba.tokenization.grammar_types import SUPPORTED
from midimamba.tokenization.grammars import make_grammar
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, merge_ids, train_tokenizer

TIGHT: dict[str, Any] = {"max_notes": 3, "voices": 2, "programs": {-1, 40}, "max_empty_bars": 1}
OPTIONS: dict[str, Any] = {"use_sustain_pedals": True, "use_pitch_bends": True, "use_rests": True}


@pytest.mark.parametrize("kind", ["none", "Pitch", "PitchDrum", "Program"])
@pytest.mark.parametrize("rules", [{}, TIGHT], ids=["usual", "tight"])
@pytest.mark.parametrize("vocabulary", ["untrained", "BPE", "options"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_kernels_judge_as_torch_does(
    name: str, vocabulary: str, rules: dict[str, Any], kind: str, scores: list[ScoreTick]
) -> None:
    options = OPTIONS if vocabulary == "options" and name in ("TSD", "MIDILike") else {}
    tokenizer = build_tokenizer(name, **options)
    if vocabulary == "BPE":
        train_tokenizer(tokenizer, scores[:10], len(tokenizer.vocab) + 200)
    prompt = [BOS, *merge_ids(tokenizer, base_ids(tokenizer, scores[0]))][:40]
    for prefix in ([BOS], prompt):
        options = rules | {"prompt_length": len(prefix)}
        slow = in_torch(make_grammar(tokenizer, **options))
        fast = make_grammar(tokenizer, **options)
        assert isinstance(fast._common, NumbaRules)
        rows = sample(tokenizer, Both(fast, slow), prefer(tokenizer, kind), rows=6, steps=30, prefix=prefix)
        assert all(rows)


def test_kernels_keep_bars_as_torch_does(scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer()
    train_tokenizer(tokenizer, scores[:10], len(tokenizer.vocab) + 200)
    asked: list[dict[str, Any]] = [
        {"min_bars": 2, "max_bars": 3},
        {"meters": ["4/4", "3/4"]},
        {"constraints": {"scale": "D-dorian", "polyphony": 2, "notes_per_bar": "1-8"}},
    ]
    for options in asked:
        slow = in_torch(MidiGrammar(tokenizer, **options))
        assert sample(tokenizer, Both(MidiGrammar(tokenizer, **options), slow), prefer(tokenizer, "Bar"), 8, 50)


def in_torch(grammar: MidiGrammar) -> MidiGrammar:
    """The grammar as it is where there is no Numba."""
    with patch.object(grammar_module, "find_spec", return_value=None):
        grammar._common = grammar._make_common()
    assert isinstance(grammar._common, TorchRules)
    return grammar


class Both(MidiGrammar):
    """Two grammars that must agree, id by id and in all that they remember."""

    def __init__(self, fast: MidiGrammar, slow: MidiGrammar) -> None:
        self.fast, self.slow = fast, slow

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fast, slow = self.fast(input_ids, scores), self.slow(input_ids, scores)
        assert torch.equal(fast, slow)
        for part in fields(self.fast._state):
            assert torch.equal(getattr(self.fast._state, part.name), getattr(self.slow._state, part.name)), part.name
        return fast
