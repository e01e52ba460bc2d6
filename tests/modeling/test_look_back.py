"""Look-back: a slow definition of the alignment, and what it must be whichever way the tokens arrive."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midimamba import CacheMismatchError, MidiMambaConfig, MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.layer_states import LookBackState
from midimamba.modeling.look_back import LookBack
from support import make_generator

LAGS = (1, 2, 4)
# Of a small vocabulary: 3 and 4 open a bar, 4 at its position 2; 5 to 8 set positions; 9 and 10 are notes.
BARS, PAIRS = [3, 4], [(4, 2), (5, 0), (6, 1), (7, 2), (8, 5)]
PAD, BOS = 0, 1
LOOK_BACK: dict[str, Any] = {
    "lookback_bars": list(LAGS),
    "bar_token_ids": BARS,
    "position_token_ids": [list(pair) for pair in PAIRS],
}


Find = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(params=["mamba", "moe-mamba", "transformer", "hybrid"])
def model(request: pytest.FixtureRequest) -> MidiMambaForCausalLM:
    model = make_generator(layout=request.param, num_experts=2, capacity_factor=4.0, **LOOK_BACK)
    look_back = model.backbone.look_back
    assert look_back is not None
    with torch.no_grad():  # nothing is shown by a repeat at first
        look_back.repeats.normal_(generator=torch.Generator().manual_seed(3))
    return model


def music(batch: int, time: int, seed: int = 1) -> Tensor:
    """Random ids in the order that music has: bars, rising positions, notes; a second piece in some rows."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        row: list[int] = [BOS, 2]
        while len(row) < time:
            if torch.rand((), generator=draw) < 0.07:
                row += [BOS]
            row += [BARS[int(torch.randint(0, 2, (), generator=draw))]]
            for mark in (5, 6, 7, 8):
                if torch.rand((), generator=draw) < 0.5 and not (row[-1] == 4 and mark <= 7):
                    row += [
                        mark,
                        *(
                            9 + torch.randint(0, 2, (int(torch.randint(0, 3, (), generator=draw)),), generator=draw)
                        ).tolist(),
                    ]
        rows.append(row[:time])
    return torch.tensor(rows)


def align_slowly(row: list[int]) -> list[list[tuple[int, bool, bool]]]:
    """The definition, token by token: the id that followed, whether there is one, whether the token repeats."""
    positions: dict[int, int] = dict(PAIRS)
    bars: list[list[int]] = []  # of the piece so far: the indices of each bar's tokens
    place: dict[int, tuple[int, int]] = {}  # position and count of ids since, of every token
    result = []
    for t, token in enumerate(row):
        if token == BOS:
            bars = []
        if token in BARS:
            bars.append([])
            place[t] = (positions.get(token, -1), 0)
        elif token in positions:
            place[t] = (positions[token], 0)
        elif bars and t > 0:
            place[t] = (place[t - 1][0], place[t - 1][1] + 1)
        if bars:
            bars[-1].append(t)
        found = []
        for lag in LAGS:
            earlier = [u for u in bars[-1 - lag] if place[u] <= place[t]] if len(bars) > lag else []
            if earlier:
                at = earlier[-1]
                found.append((row[at + 1], True, place[at] == place[t] and row[at] == token))
            else:
                found.append((0, False, False))
        result.append(found)
    return result


@pytest.fixture(params=["numba", "torch"])
def find(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Find:
    """What a look-back finds, by each of the two ways to compute it."""
    monkeypatch.setattr("midimamba.modeling.look_back._has_numba", lambda: request.param == "numba")
    look_back = LookBack(MidiMambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, **LOOK_BACK))
    return lambda ids: look_back.find(ids, None, None, 0)


def test_the_alignment_is_its_definition(find: Find) -> None:
    ids = music(8, 150)
    followers, found, repeated = find(ids)
    for row in range(len(ids)):
        expected = torch.tensor(align_slowly(ids[row].tolist()))
        assert followers[row].tolist() == expected[..., 0].tolist()
        assert found[row].tolist() == expected[..., 1].tolist()
        assert repeated[row].tolist() == expected[..., 2].tolist()
    assert 0.3 < found.mean() < 0.95
    assert repeated.any()


@pytest.mark.parametrize("numba", [True, False])
def test_a_vocabulary_may_grow(model: MidiMambaForCausalLM, numba: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midimamba.modeling.look_back._has_numba", lambda: numba)
    ids = music(2, 60)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(100_000)
        torch.testing.assert_close(model(ids).logits[..., :11], before)
        ids[:, 7] = 99_999
        grown = model(ids).logits
        fresh = MidiMambaForCausalLM(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(fresh(ids).logits, grown)


def test_a_piece_that_repeats_a_bar_is_told_what_follows(find: Find) -> None:
    bar = [3, 5, 9, 6, 10, 9]
    followers, found, repeated = find(torch.tensor([[BOS, *bar, *bar, *bar]]))
    assert followers[0, 7:12, 0].tolist() == bar[1:]
    assert repeated[0, 7:, 0].all()
    assert not found[0, :7].any()
    assert repeated[0, 13:, 1].all()


GAP, FILL = 11, 12
AHEAD: dict[str, Any] = {**LOOK_BACK, "lookahead_bars": [1, 2, 4], "gap_token_id": GAP, "fill_token_id": FILL}


def asked(batch: int, seed: int = 1) -> list[list[int]]:
    """Rows of requests to fill a gap, each with its filling: the bars after the gap, those before it, the wanted ones.

    A fill token stands for each bar before the gap, and one more. In some rows other parts of the wanted bars stand
    before them.
    """
    draw = random.Random(seed)

    def bars(count: int) -> list[int]:
        written: list[int] = []
        for _ in range(count):
            written.append(3)
            for mark in (5, 6, 8):
                if draw.random() < 0.6:
                    written += [mark, *draw.choices((9, 10), k=draw.randrange(3))]
        return written

    rows = []
    for _ in range(batch):
        wanted = draw.randrange(1, 6)
        before, is_beside = draw.randrange(7), draw.random() < 0.4
        row = [BOS, 2, GAP, *bars(draw.randrange(7)), GAP, *[2, GAP] * wanted]
        if before or not is_beside:
            row += [*[FILL] * (before + 1), *bars(before)]
        if is_beside:
            row += [FILL, *bars(wanted), FILL]
        rows.append([*row, *bars(wanted)])
    return rows


def look_ahead_slowly(row: list[int], lag: int) -> list[tuple[int, bool, bool]]:
    """The definition: what followed the same place `lag` bars later, as if the bars after the gap came next."""
    positions: dict[int, int] = dict(PAIRS)
    gaps = [t for t, token in enumerate(row) if token == GAP]
    wanted, last = len(gaps) - 2, len(row) - 1 - row[::-1].index(FILL)
    before_gap = next(count for count in range(last) if row[last - count - 1] != FILL)
    after, filling, bars, place = list[list[int]](), list[list[int]](), list[list[int]](), dict[int, tuple[int, int]]()
    for t, token in enumerate(row):
        if t in (gaps[0], gaps[1], last):
            bars = after if t == gaps[0] else filling if t == last else []
        if token in BARS:
            bars.append([])
        is_mark = token in BARS or token in positions or token == GAP
        earlier_place = place.get(t - 1, (-1, -1))
        place[t] = (positions.get(token, -1), 0) if is_mark else (earlier_place[0], earlier_place[1] + 1)
        if bars:
            bars[-1].append(t)
    found = [(0, False, False)] * len(row)
    for number, tokens in enumerate(filling):
        target = number - before_gap + lag - wanted
        for t in tokens if 0 <= target < len(after) else []:
            if earlier := [u for u in after[target] if place[u] <= place[t]]:
                at = earlier[-1]
                found[t] = row[at + 1], True, place[at] == place[t] and row[at] == row[t]
    return found


def test_a_filling_looks_ahead_at_the_bars_after_its_gap(find: Find) -> None:
    look_back = LookBack(MidiMambaConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, **AHEAD))
    seen = 0
    for row in asked(60):
        followers, found, repeated = look_back.find(torch.tensor([row]), None, None, 0)
        start = len(row) - row[::-1].index(FILL)
        for index, lag in enumerate((1, 2, 4), start=3):
            expected = torch.tensor(look_ahead_slowly(row, lag))[start:]
            assert followers[0, start:, index].tolist() == expected[:, 0].tolist()
            assert found[0, start:, index].tolist() == expected[:, 1].tolist()
            assert repeated[0, start:, index].tolist() == expected[:, 2].tolist()
            seen += int(found[0, start:, index].sum())
        assert not found[0, : row.index(FILL), 3:].any()
    assert seen > 100


@pytest.mark.parametrize("steps", [1, 3, 400])
def test_requests_may_be_packed_and_read_in_steps(find: Find, steps: int) -> None:
    """Each looks as it does alone, also in rows that are chosen and joined on the way."""
    config = MidiMambaConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, **AHEAD)
    look_back = LookBack(config)
    rows = [[BOS, 3, 5, 9, *itertools.chain(*asked(4, seed))] for seed in range(3)]
    length = min(map(len, rows))
    ids = torch.tensor([row[:length] for row in rows])
    state = LookBackState.empty(config, 3, torch.float32, torch.device("cpu"))
    parts = []
    for start in range(0, length, steps):
        parts.append(look_back.find(ids[:, start : start + steps], None, state, start))
        state = state.select(torch.arange(3))
    found = [torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)]
    compared = 0
    for row in range(3):
        start = 4
        for request in asked(4, row):
            alone = look_back.find(torch.tensor([request]), None, None, 0)
            count = min(len(request), length - start) - 1  # what follows the last token is another one
            for ours, theirs in zip(found, alone, strict=True):
                if count > 0:
                    assert torch.equal(ours[row, start : start + count], theirs[0, :count])
                    compared += count
            start += len(request)
    assert compared > 500


@pytest.mark.usefixtures("find")
def test_a_gap_is_to_the_look_back_what_a_piece_is() -> None:
    options = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, **LOOK_BACK}
    pieces, gaps = (LookBack(MidiMambaConfig(**options, gap_token_id=token)) for token in (None, 11))
    ids = music(8, 150)
    marked = ids.clone()
    marked[:, 1:][ids[:, 1:] == BOS] = 11
    assert (marked == 11).sum() > 8
    for ours, theirs in zip(gaps.find(marked, None, None, 0), pieces.find(ids, None, None, 0), strict=True):
        assert torch.equal(ours, theirs)


def test_no_token_of_the_future_is_seen(model: MidiMambaForCausalLM) -> None:
    ids = music(2, 60)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for t in (0, 1, 20, 33, 59):
            for other in (3, 6, 10):
                changed = ids.clone()
                changed[:, t] = other
                after = model(changed, use_cache=False).logits
                torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-5, rtol=0)


def test_looking_back_changes_what_is_expected(model: MidiMambaForCausalLM) -> None:
    ids = music(2, 60)
    changed = ids.clone()
    changed[:, 20:24] = ids.flip(0)[:, 20:24]
    with torch.no_grad():
        look_back = model.backbone.look_back
        assert look_back is not None
        with_it = model(ids).logits
        look_back.projection.weight.zero_()
        look_back.repeats.zero_()
        assert (with_it - model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 7, 64])
@pytest.mark.parametrize("max_length", [None, 130])
def test_steps_of_any_size_are_one_pass(model: MidiMambaForCausalLM, steps: int, max_length: int | None) -> None:
    ids = music(3, 130)
    cache = RecurrentCache.for_model(model, 3, max_length)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


def test_a_fork_goes_on_as_a_fresh_read(model: MidiMambaForCausalLM) -> None:
    ids, endings = music(2, 40), music(6, 30, seed=2)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        kept = cache.snapshot()
        forked = model(endings, past_key_values=cache.fork(3)).logits
        fresh = model(torch.cat([ids.repeat_interleave(3, 0), endings], dim=1), use_cache=False).logits[:, 40:]
        torch.testing.assert_close(forked, fresh, atol=1e-4, rtol=0)
        # The origin did not change, and rows may be chosen, joined and put back.
        chosen = cache.select(torch.tensor([1, 0, 1]))
        joined = cache.select(torch.tensor([1])).append(cache.select(torch.tensor([0, 1])))
        order = [1, 0, 1]
        expected = model(endings[order], past_key_values=kept.select(torch.tensor(order))).logits
        for state in (chosen, joined):
            torch.testing.assert_close(
                model(endings[order], past_key_values=state).logits, expected, atol=1e-4, rtol=0
            )


def test_packed_pieces_are_separate_ones(model: MidiMambaForCausalLM) -> None:
    """Whether a piece begins with begin-of-sequence, or only its number says so."""
    pieces = [music(1, 40, seed)[:, skip:] for seed, skip in ((5, 0), (6, 1), (7, 2))]
    for piece in pieces:
        piece[:, 1:][piece[:, 1:] == BOS] = 9
    numbers = torch.cat([torch.full_like(piece, index) for index, piece in enumerate(pieces)], dim=1)
    with torch.no_grad():
        packed = model(torch.cat(pieces, dim=1), seq_idx=numbers, use_cache=False).logits
        alone = torch.cat([model(piece, use_cache=False).logits for piece in pieces], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", [BOS, 3])
def test_padding_on_the_left_changes_nothing(model: MidiMambaForCausalLM, first: int) -> None:
    ids = music(2, 50)
    ids[:, 0] = first
    padded = torch.cat([torch.full((2, 9), PAD), ids], dim=1)
    mask = (torch.arange(59) >= 9).long().expand(2, -1)
    with torch.no_grad():
        alone, behind = model(ids, use_cache=True), model(padded, attention_mask=mask, use_cache=True)
        torch.testing.assert_close(behind.logits[:, 9:], alone.logits, atol=1e-4, rtol=0)
        more = music(2, 20, seed=4)
        ours = model(more, past_key_values=behind.past_key_values).logits
        theirs = model(more, past_key_values=alone.past_key_values).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "num_return_sequences": 1}]
)
def test_generate_with_a_cache_is_generate_without(model: MidiMambaForCausalLM, options: dict[str, Any]) -> None:
    ids = music(2, 30)
    ids[0, :6] = PAD
    inputs: dict[str, Any] = {
        "attention_mask": (ids != PAD).long(),
        "max_new_tokens": 12,
        "pad_token_id": PAD,
        "eos_token_id": 2,
    }
    results = [model.generate(ids, use_cache=use_cache, **inputs, **options) for use_cache in (True, False)]
    cached, fresh = (result for result in results if isinstance(result, Tensor))
    assert torch.equal(cached, fresh)


def test_a_cache_of_a_model_that_does_not_look_back_is_refused(model: MidiMambaForCausalLM) -> None:
    plain = make_generator(layout=model.config.layout, num_experts=2)
    for reader, cache in ((model, plain.make_state(2)), (plain, model.make_state(2))):
        with pytest.raises(CacheMismatchError, match="look-back"):
            reader(music(2, 4), past_key_values=cache)


def test_a_checkpoint_carries_its_code_and_computes_the_same(model: MidiMambaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert (tmp_path / "look_back.py").exists()
    again = MidiMambaForCausalLM.from_pretrained(tmp_path)
    ids = music(2, 40)
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert again.config.lookback_bars == list(LAGS)


def test_the_kernel_is_its_slow_twin(model: MidiMambaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with documents and in steps, whose states it writes."""
    ids = music(3, 90)
    numbers = (torch.arange(90) // 37).expand(3, -1)
    logits = []
    for has_numba in (True, False):
        monkeypatch.setattr("midimamba.modeling.look_back._has_numba", lambda has_numba=has_numba: has_numba)
        cache = model.make_state(3)
        with torch.no_grad():
            parts = [model(ids[:, :70], seq_idx=numbers[:, :70], past_key_values=cache).logits]
            parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(70, 90)]
        logits.append(torch.cat(parts, dim=1))
    assert torch.equal(*logits)
