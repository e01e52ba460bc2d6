"""The grammar of PerTok: shifts inside bars of 4/4, and microtiming."""

import copy
from typing import Any

import pytest
import torch
from grammar_support import BOS, EOS, assert_allowed, assert_music, expand, prefer, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from miditok import MusicTokenizer
from symusic.core import ScoreTick

from midimamba.tokenization.grammar import MAX_SILENT_TOKENS
from midimamba.tokenization.grammar_pertok import PerTokGrammar
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer

PROGRAMS = {-1, 40}
KINDS = ["none", "Bar", "TimeShift", "Tempo", "Program", "MicroTiming", "Pitch", "PitchDrum", "Velocity", "EOS"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_microtiming": False},
    {"program_changes": False, "use_velocities": False},
    {"use_pitchdrum_tokens": False, "use_tempos": False},
]
_CACHE: dict[tuple[bool, int], MusicTokenizer] = {}


def cached(trained: bool, number: int, scores: list[ScoreTick]) -> MusicTokenizer:
    if (trained, number) not in _CACHE:
        tokenizer = build_tokenizer("PerTok", **OPTIONS[number])
        if trained:
            train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 300)
        _CACHE[trained, number] = tokenizer
    return _CACHE[trained, number]


class Clock:
    """The rules about time once more, read token by token."""

    def __init__(self) -> None:
        self.bar, self.place = 0, 0
        self.last = "BOS"

    def read(self, tokens: list[str]) -> bool:
        return all(self._read(*token.split("_")) for token in tokens)

    def _read(self, kind: str, value: str) -> bool:
        before, self.last = self.last, kind
        if kind == "Bar":
            self.bar, self.place = self.bar + 1, 0
        if kind == "TimeShift":
            beats, ticks, quarter = map(int, value.split("."))
            self.place += beats * quarter + ticks
        if kind == "MicroTiming" and before in ("Pitch", "PitchDrum"):
            return 1920 * self.bar + self.place + int(value) >= 0
        return self.place < 1920


@pytest.mark.parametrize("trained", [False, True])
def test_every_id_stays_inside_the_bar_and_the_piece(trained: bool, scores: list[ScoreTick]) -> None:
    tokenizer = cached(trained, 0, scores)
    grammar = PerTokGrammar(tokenizer, programs=PROGRAMS)
    for kind in ("none", "TimeShift", "Pitch"):
        for row in sample(tokenizer, grammar, prefer(tokenizer, kind), rows=2, steps=30, seed=1):
            clock = Clock()
            for length in range(len(row)):
                judged = grammar(torch.tensor([[BOS, *row[:length]]]), torch.zeros(1, tokenizer.vocab_size))[0] == 0
                for index in judged.nonzero().flatten().tolist():
                    if index > EOS:
                        assert copy.deepcopy(clock).read(expand(tokenizer, index)), (row[:length], index)
                assert clock.read(expand(tokenizer, row[length]))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), kind=st.sampled_from(KINDS), number=st.integers(0, len(OPTIONS) - 1))
@pytest.mark.parametrize("trained", [False, True])
def test_samples_are_music(trained: bool, seed: int, kind: str, number: int, scores: list[ScoreTick]) -> None:
    processor = MidiProcessor(cached(trained, number, scores), programs=sorted(PROGRAMS))
    tokenizer = processor.midi_tokenizer
    for row in sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=2, steps=40, seed=seed):
        assert_music(processor, row, PROGRAMS)
        assert processor.decode(row[:MAX_SILENT_TOKENS]).note_num()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_real_music_is_always_allowed(number: int, trained: bool, scores: list[ScoreTick]) -> None:
    tokenizer = cached(trained, number, scores)
    for score in scores[:3]:
        assert_allowed(tokenizer, score)


@pytest.mark.parametrize(("kind", "for_bars"), [("Bar", 60.0), ("TimeShift", 30.0), ("none", 6.0)])
def test_the_first_bar_counts_although_it_has_no_token(kind: str, for_bars: float, scores: list[ScoreTick]) -> None:
    processor = MidiProcessor(cached(False, 0, scores))
    tokenizer = processor.midi_tokenizer
    grammar = processor.grammar(max_bars=3, min_bars=3)
    preference = prefer(tokenizer, kind)
    # A bar line where the kind cannot follow, and the end as soon as possible.
    preference[tokenizer.vocab["Bar_None"]] = for_bars
    preference[EOS] = 50.0
    for row in sample(tokenizer, grammar, preference, rows=10, steps=120):
        names = [token for index in row for token in expand(tokenizer, index)]
        assert names.count("Bar_None") == 2
        assert len(row) < 120
        score = processor.decode(row)
        last = max(note.time for track in score.tracks for note in track.notes) / score.tpq
        assert 8 - 1 / 8 <= last < 12 + 1 / 8  # in the third bar, but for microtiming


def test_a_microtiming_of_a_program_is_told_from_that_of_a_note(scores: list[ScoreTick]) -> None:
    tokenizer = cached(False, 0, scores)
    grammar = PerTokGrammar(tokenizer)

    def kinds_after(*names: str) -> set[str]:
        ids = torch.tensor([[BOS, *(tokenizer.vocab[name] for name in names)]])
        judged = grammar(ids, torch.zeros(1, tokenizer.vocab_size))[0] == 0
        return {name.split("_")[0] for name, index in tokenizer.vocab.items() if judged[index]}

    assert kinds_after("Program_40") == {"MicroTiming"}
    assert kinds_after("Program_40", "MicroTiming_0") == {"Pitch", "TimeShift"}
    assert kinds_after("Program_40", "MicroTiming_0", "Pitch_60", "MicroTiming_0") == {"Velocity"}
