"""The rules of the grammar: what may follow what, that samples are music, and where they end."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from grammar_support import BOS, EOS, PAD, TO_NOTE, assert_allowed, expand, prefer, read, sample
from miditok import MusicTokenizer
from symusic.core import ScoreTick

from midimamba.tokenization.grammar import MAX_SILENT_TOKENS, MidiGrammar
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, merge_ids, train_tokenizer
from support import make_score


@pytest.fixture(scope="module", params=["untrained", "BPE", "Unigram"])
def tokenizer(request: pytest.FixtureRequest, scores: list[ScoreTick]) -> MusicTokenizer:
    tokenizer = build_tokenizer()
    if request.param != "untrained":
        train_tokenizer(tokenizer, scores, 1000, request.param)
    return tokenizer


@pytest.fixture(scope="module", params=["untrained", "BPE", "Unigram"])
def tsd(request: pytest.FixtureRequest, scores: list[ScoreTick]) -> MusicTokenizer:
    tokenizer = build_tokenizer("TSD")
    if request.param != "untrained":
        train_tokenizer(tokenizer, scores, 1000, request.param)
    return tokenizer


def assert_judged_slowly(
    tokenizer: MusicTokenizer, grammar: MidiGrammar, prompt: Sequence[int], row: Sequence[int], **rules: Any
) -> None:
    """Every id is allowed after `prompt` and `row` exactly if the slow reader would read its tokens."""
    judged = grammar(torch.tensor([[BOS, *prompt, *row]]), torch.zeros(1, tokenizer.vocab_size))[0] > -torch.inf
    reader = read(tokenizer, prompt, **rules)
    if prompt:
        reader.continue_prompt()
    for index in row:
        assert reader.read(expand(tokenizer, index))
    for index in range(EOS + 1, tokenizer.vocab_size):
        expected = copy.deepcopy(reader).read(expand(tokenizer, index))
        assert bool(judged[index]) == expected, (row, expand(tokenizer, index))
    assert not judged[PAD]
    assert not judged[BOS]
    assert bool(judged[EOS]) == reader.may_end()


def test_every_id_is_judged_as_if_its_tokens_were_read(tokenizer: MusicTokenizer) -> None:
    grammar = MidiGrammar(tokenizer)
    for row in sample(tokenizer, grammar, torch.zeros(tokenizer.vocab_size), rows=4, steps=25):
        for length in range(0, len(row) + 1, 3):
            assert_judged_slowly(tokenizer, grammar, [], row[:length])


@pytest.mark.parametrize("kind", ["none", "Pitch", "PitchDrum", "Program", "Duration", "Bar"])
def test_ids_are_judged_one_by_one_under_all_rules(tokenizer: MusicTokenizer, kind: str) -> None:
    rules: dict[str, Any] = {"max_notes": 3, "programs": {-1, 40, 73}, "max_empty_bars": 1, "voices": 2}
    grammar = MidiGrammar(tokenizer, **rules, min_bars=2, max_bars=2)
    for row in sample(tokenizer, grammar, prefer(tokenizer, kind), rows=2, steps=24, seed=2):
        for length in range(len(row) + 1):
            assert_judged_slowly(tokenizer, grammar, [], row[:length], **rules, bars=2)


def test_ids_are_judged_one_by_one_after_a_prompt(tokenizer: MusicTokenizer, scores: list[ScoreTick]) -> None:
    prompt = merge_ids(tokenizer, base_ids(tokenizer, make_score(3, bars=2, programs=(0, 40), drums=False)))
    grammar = MidiGrammar(tokenizer, programs=[73], max_bars=2, min_bars=2, prompt_length=len(prompt) + 1)
    preference = torch.zeros(tokenizer.vocab_size)
    for row in sample(tokenizer, grammar, preference, rows=3, steps=20, prefix=[BOS, *prompt]):
        for length in range(0, len(row) - len(prompt) + 1, 2):
            new = row[len(prompt) :][:length]
            assert_judged_slowly(tokenizer, grammar, prompt, new, programs={0, 40}, bars=2)


def test_real_music_is_always_allowed(tokenizer: MusicTokenizer, tsd: MusicTokenizer, scores: list[ScoreTick]) -> None:
    for score in scores[:4]:
        assert_allowed(tokenizer, score)
        assert_allowed(tsd, score)


def test_uniform_samples_are_valid_music(tokenizer: MusicTokenizer) -> None:
    processor = MidiProcessor(tokenizer)
    rows = sample(tokenizer, processor.grammar(), torch.zeros(tokenizer.vocab_size), rows=150, steps=30)
    for row in rows:
        assert read(tokenizer, row).notes > 0
        assert processor.decode(row).note_num() > 0


@pytest.mark.parametrize("kind", [*sorted(TO_NOTE), "Duration", "EOS"])
def test_a_note_comes_within_16_tokens_whatever_the_model_prefers(tokenizer: MusicTokenizer, kind: str) -> None:
    processor = MidiProcessor(tokenizer)
    rows = sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=30, steps=MAX_SILENT_TOKENS)
    for row in rows:
        read(tokenizer, row)
        assert processor.decode(row).note_num() > 0


@pytest.mark.parametrize("kind", ["TimeShift", "TimeSig", "Tempo", "Program", "Pitch", "EOS", "none"])
def test_tsd_samples_also_hold_notes(tsd: MusicTokenizer, kind: str) -> None:
    processor = MidiProcessor(tsd)
    rows = sample(tsd, processor.grammar(), prefer(tsd, kind), rows=30, steps=MAX_SILENT_TOKENS)
    assert all(processor.decode(row).note_num() > 0 for row in rows)


def test_reordered_cut_and_other_batches_are_judged_as_if_read_from_the_start(tokenizer: MusicTokenizer) -> None:
    size = tokenizer.vocab_size
    options: dict[str, Any] = {"prompt_length": 5, "max_bars": 3}
    rows = sample(tokenizer, MidiGrammar(tokenizer), torch.zeros(size), rows=6, steps=24, seed=4)
    rows = [row for row in rows if len(row) == 24] or [[*rows[0]]]
    ids = torch.tensor([[BOS, *row] for row in rows])
    generator = torch.Generator().manual_seed(0)
    grammar = MidiGrammar(tokenizer, **options)
    for length in [5, 6, 7, 9, 10, 10, 12, 20, 6, 7]:
        order = torch.randint(len(ids), (1 + length % 7,), generator=generator)
        prefixes = ids[order, :length]
        logits = torch.randn(len(order), size, generator=generator)
        assert torch.equal(grammar(prefixes, logits), MidiGrammar(tokenizer, **options)(prefixes, logits))


@pytest.mark.parametrize("max_empty_bars", [0, 1, 4])
def test_empty_bars_are_limited(tokenizer: MusicTokenizer, max_empty_bars: int) -> None:
    grammar = MidiGrammar(tokenizer, max_empty_bars=max_empty_bars)
    for row in sample(tokenizer, grammar, prefer(tokenizer, "Bar"), rows=20, steps=60):
        read(tokenizer, row, max_empty_bars=max_empty_bars)


@pytest.mark.parametrize("kind", ["Bar", "Position", "Pitch", "Tempo", "none"])
@pytest.mark.parametrize("max_bars", [1, 3])
def test_samples_have_no_more_bars_than_asked(tokenizer: MusicTokenizer, kind: str, max_bars: int) -> None:
    processor = MidiProcessor(tokenizer)
    grammar = processor.grammar(max_bars=max_bars)
    for row in sample(tokenizer, grammar, prefer(tokenizer, kind), rows=20, steps=40):
        reader = read(tokenizer, row)
        assert 1 <= reader.bars <= max_bars
        assert processor.decode(row).note_num() > 0


def test_a_model_that_wants_another_bar_ends_instead(tokenizer: MusicTokenizer) -> None:
    grammar = MidiGrammar(tokenizer, max_bars=2)
    size = tokenizer.vocab_size
    bar = [tokenizer.vocab[token] for token in ("Bar_None", "TimeSig_4/4")]
    note = [tokenizer.vocab[token] for token in ("Position_0", "Pitch_60", "Velocity_63", "Duration_1.0.12")]
    logits = torch.randn(1, size)
    one = grammar(torch.tensor([[BOS, *bar, *note]]), logits).softmax(dim=1)
    two = grammar(torch.tensor([[BOS, *bar, *note, *bar, *note]]), logits).softmax(dim=1)
    bars = prefer(tokenizer, "Bar") > 0
    assert two[0, bars].sum() == 0
    # Whatever the first row gives to bars, the second gives to the end; everything else stays.
    torch.testing.assert_close(two[0, EOS], one[0, EOS] + one[0, bars].sum())
    others = ~bars
    others[EOS] = False
    torch.testing.assert_close(two[0, others], one[0, others])


def test_padding_bos_and_order_of_rows_change_nothing(tokenizer: MusicTokenizer) -> None:
    grammar = MidiGrammar(tokenizer, max_bars=4)
    size = tokenizer.vocab_size
    rows = sample(tokenizer, grammar, torch.zeros(size), rows=8, steps=20)
    rows = [row[:length] for row, length in zip(rows, range(0, 16, 2), strict=True)]
    alone = torch.cat([grammar(torch.tensor([row], dtype=torch.long), torch.zeros(1, size)) for row in rows])
    padded = torch.tensor([[PAD] * (20 - len(row)) + [BOS, *row] for row in rows])
    assert torch.equal(grammar(padded, torch.zeros(8, size)), alone)
    order = torch.randperm(8)
    assert torch.equal(grammar(padded[order], torch.zeros(8, size)), alone[order])
    # A block of packed pieces: what came before the last begin is forgotten.
    packed = torch.tensor([[*rows[7], EOS, BOS, *rows[5]]])
    assert torch.equal(grammar(packed, torch.zeros(1, size)), alone[5:6])


def test_a_prompt_that_was_silent_too_long_gets_a_note_at_once(tokenizer: MusicTokenizer) -> None:
    bar = [tokenizer.vocab["Bar_None"], tokenizer.vocab["TimeSig_4/4"]]
    ids = torch.tensor([[BOS, *bar * 20]])
    for kind in ("Position", "Pitch", "Velocity", "Duration"):
        allowed = MidiGrammar(tokenizer)(ids, torch.zeros(1, tokenizer.vocab_size))[0] > -torch.inf
        # With merges one id may hold several of the tokens, but never a way round.
        chosen = int(allowed.nonzero()[0])
        token = expand(tokenizer, chosen)[0]
        assert token.split("_")[0] == kind
        ids = torch.cat([ids, torch.tensor([[tokenizer.vocab[token]]])], dim=1)


def test_columns_beyond_the_vocabulary_are_forbidden_and_scores_left_alone(tokenizer: MusicTokenizer) -> None:
    size = tokenizer.vocab_size
    scores = torch.randn(2, size + 24)
    before = scores.clone()
    judged = MidiGrammar(tokenizer, max_bars=1)(torch.empty(2, 0, dtype=torch.long), scores)
    assert torch.equal(scores, before)
    assert torch.isinf(judged[:, size:]).all()
    kept = ~torch.isinf(judged)
    assert torch.equal(judged[kept], scores[kept])
