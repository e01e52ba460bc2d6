"""The memory of old negatives: sequences are told apart by the number they repeat."""

import pytest
import torch

from midimamba.training.replay import ReplayBuffer


def numbered(start: int, end: int) -> torch.Tensor:
    return torch.arange(start, end)[:, None].expand(-1, 3)


def numbers(sequences: torch.Tensor | None) -> list[int]:
    assert sequences is not None
    assert (sequences == sequences[:, :1]).all()
    return sequences[:, 0].tolist()


def test_everything_is_remembered_until_the_buffer_is_full() -> None:
    replay = ReplayBuffer(10)
    replay.add(numbered(0, 4))
    replay.add(numbered(4, 9))
    assert sorted(numbers(replay.sequences)) == list(range(9))


def test_a_full_buffer_takes_what_is_new_and_forgets_at_random() -> None:
    torch.manual_seed(0)
    replay = ReplayBuffer(10)
    for start in range(0, 400, 4):
        replay.add(numbered(start, start + 4))
        held = numbers(replay.sequences)
        assert len(held) == min(10, start + 4)
        assert len(set(held)) == len(held)
        assert set(range(start, start + 4)) <= set(held)


def test_ages_fall_off_geometrically() -> None:
    """A sequence survives a batch with probability 1 - n / size. A ring would hold exactly the last `size`."""
    torch.manual_seed(0)
    replay = ReplayBuffer(1000)
    for start in range(0, 10_000, 100):
        replay.add(numbered(start, start + 100))
    ages = 99 - torch.tensor(numbers(replay.sequences)) // 100
    for age in (1, 5, 20):
        expected = 0.9**age
        assert (ages >= age).float().mean().item() == pytest.approx(expected, abs=4 * (expected / 1000) ** 0.5)


def test_more_than_fits_at_once_leaves_the_last() -> None:
    replay = ReplayBuffer(3)
    replay.add(numbered(0, 8))
    assert sorted(numbers(replay.sequences)) == [5, 6, 7]
    assert len(ReplayBuffer(0)) == 0


def test_a_buffer_without_room_stays_empty() -> None:
    replay = ReplayBuffer(0)
    replay.add(numbered(0, 8))
    assert replay.sequences is None


def test_draws_are_different_sequences_of_all_that_are_held() -> None:
    torch.manual_seed(0)
    replay = ReplayBuffer(6)
    replay.add(numbered(0, 6))
    drawn = [numbers(replay.draw(3)) for _ in range(40)]
    assert all(len(set(draw)) == 3 for draw in drawn)
    assert {number for draw in drawn for number in draw} == set(range(6))
    with pytest.raises(ValueError, match="holds 6 sequences, 7 were asked for"):
        replay.draw(7)


def test_what_is_drawn_is_a_copy() -> None:
    replay = ReplayBuffer(2)
    source = numbered(0, 2).clone()
    replay.add(source)
    replay.draw(2).zero_()
    source.zero_()
    assert sorted(numbers(replay.sequences)) == [0, 1]
