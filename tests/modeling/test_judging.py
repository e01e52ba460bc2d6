"""What judges hear of a sequence: its music, and neither padding nor its end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from midimamba.modeling.judging import Ensemble, TokenJudge, music_of
from support import make_discriminator

PAD, EOS = 0, 2


def test_a_judge_is_given_the_music_without_padding_and_end() -> None:
    assert music_of(torch.tensor([0, 0, 1, 5, 0, 6, 2, 0]), 0, 2) == [1, 5, 0, 6]
    assert music_of(torch.tensor([1, 5, 2, 2]), 2, 2) == [1, 5]
    assert music_of(torch.tensor([1, 5]), None, None) == [1, 5]


@pytest.mark.parametrize("pad", [PAD, EOS], ids=["padding", "ends as padding"])
@settings(deadline=None)
@given(before=st.integers(0, 3), after=st.integers(0, 3), inside=st.lists(st.integers(0, 10), max_size=5))
def test_padding_and_ends_are_cut_off_both_sides_and_kept_between(
    pad: int, before: int, after: int, inside: list[int]
) -> None:
    music = [3, *inside, 4]
    row = [pad] * before + music + [EOS] + [pad] * after
    assert music_of(row, pad, EOS) == music_of(torch.tensor(row), pad, EOS) == music
    assert music_of(music_of(row, pad, EOS), pad, EOS) == music


@pytest.mark.parametrize("pad", [PAD, EOS], ids=["padding", "ends as padding"])
@pytest.mark.parametrize("kind", ["cnn", "mamba"])
def test_a_judge_of_tokens_never_sees_the_end(kind: str, pad: int) -> None:
    discriminator = make_discriminator(kind)
    music = [[1, 5, 3], [2, 9, 9, 4], [4, 4, 1, 6, 2, 8, 3]]
    judge = Ensemble([TokenJudge(discriminator, pad, EOS)])
    expected = [discriminator(torch.tensor([row[row[0] == EOS :]])).logits.item() for row in music]
    for rows in (music, [[*row, EOS] for row in music], [[*row, EOS, pad, pad] for row in music]):
        torch.testing.assert_close(judge.log_odds(rows), torch.tensor(expected).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("row", [[EOS], [PAD, PAD], [EOS, PAD]])
def test_a_sequence_without_music_is_still_judged(row: list[int]) -> None:
    assert music_of(row, PAD, EOS) == row[:1]
    assert TokenJudge(make_discriminator(), PAD, EOS).log_odds([row]).isfinite().all()
