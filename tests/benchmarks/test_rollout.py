"""Roll-outs in several ways: the benchmark compares their action values before it compares their times."""

import importlib

import torch

from support import make_generator


def test_all_ways_to_complete_a_sequence_have_the_same_values() -> None:
    rollout = importlib.import_module("rollout")
    rows = torch.randint(3, 11, (2, 12), generator=torch.Generator().manual_seed(1))
    ways = list(rollout.SIDES)
    seconds = rollout.compare(make_generator().double(), rows, rollout.spread(12, 3), 2, ways)  # ends if they differ
    assert list(seconds) == ways
