"""Sequences that count up to the end of a number of bars: masks against a loop, and batches without their padding."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from midimamba.modeling.sampling import Ending, Sequences, sample
from support import make_generator

EOS, PAD = 2, 0
BARS = (5, 6)


def slow_mask(row: list[int], prompt: int, ends: bool, bars: int | None) -> list[int]:
    """Token by token, as a reader counts."""
    mask, begun, is_over = [], 0, False
    for time, token in enumerate(row):
        begun += token in BARS
        counts = not is_over and (bars is None or begun <= bars)
        mask.append(int(counts))
        is_over = is_over or (ends and time >= prompt and token == EOS)
    return mask


rows = st.integers(1, 12).flatmap(
    lambda time: st.lists(st.lists(st.integers(0, 6), min_size=time, max_size=time), min_size=1, max_size=4)
)


@given(rows, st.integers(0, 4), st.booleans(), st.none() | st.integers(1, 4))
def test_the_mask_is_that_of_counting_bars_and_ends(
    ids: list[list[int]], prompt: int, ends: bool, bars: int | None
) -> None:
    ending = Ending(EOS if ends else None, PAD, bars, BARS)
    mask = ending.mask(torch.tensor(ids), prompt)
    assert mask.dtype == torch.long
    assert mask.tolist() == [slow_mask(row, prompt, ends, bars) for row in ids]


@given(rows, st.booleans(), st.none() | st.integers(1, 4))
def test_trimmed_sequences_lose_only_what_is_padding_in_every_row(
    ids: list[list[int]], ends: bool, bars: int | None
) -> None:
    tokens = torch.tensor(ids)
    mask = Ending(EOS if ends else None, PAD, bars, BARS).mask(tokens, 1)
    trimmed = Sequences(tokens, mask).trimmed()
    width = trimmed.ids.shape[1]
    assert torch.equal(trimmed.ids, tokens[:, :width])
    assert torch.equal(trimmed.mask, mask[:, :width])
    assert not mask[:, width:].any()
    assert width == 0 or trimmed.mask[:, -1].any()


def test_bars_change_what_counts_and_not_what_is_drawn() -> None:
    policy = make_generator(vocab_size=7)
    prompts = torch.ones(16, 1, dtype=torch.long)

    def drawn(ending: Ending) -> Tensor:
        torch.manual_seed(0)
        return sample(policy, prompts, 12, ending)

    counted = Ending(EOS, PAD, 1, BARS)
    assert torch.equal(drawn(counted), drawn(Ending(EOS, PAD)))
    lengths = counted.mask(drawn(counted), 1).sum(1)
    assert (lengths < Ending(EOS, PAD).mask(drawn(counted), 1).sum(1)).any()
