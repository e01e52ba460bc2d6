"""Metrics against brute force and known answers."""

import math
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from midimamba import MidiMambaForCausalLM
from midimamba.corpus.packing import BlockCollator
from midimamba.evaluation.metrics import discriminator_accuracy, distinct_n, held_out_nll, self_bleu


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[start : start + n]) for start in range(len(row) - n + 1)]


def brute_force_bleu(candidate: list[int], references: list[list[int]], n: int) -> float:
    """The definition of Papineni et al. 2002, counted by hand."""
    logs = 0.0
    for order in range(1, n + 1):
        own = grams(candidate, order)
        clipped = sum(
            min(own.count(gram), max(grams(reference, order).count(gram) for reference in references))
            for gram in set(own)
        )
        if not clipped:
            return 0.0
        logs += math.log(clipped / len(own)) / n
    closest = sorted((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[0][1]
    return math.exp(logs) * (1 if len(candidate) > closest else math.exp(1 - closest / len(candidate)))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_bleu_is_the_mean_of_brute_force_bleu(n: int) -> None:
    chance = random.Random(n)
    rows = [[chance.randrange(4) for _ in range(chance.randrange(8, 20))] for _ in range(7)]
    expected = sum(brute_force_bleu(row, rows[:i] + rows[i + 1 :], n) for i, row in enumerate(rows)) / len(rows)
    assert 0 < expected < 1
    assert self_bleu(rows, n) == pytest.approx(expected)


def test_self_bleu_is_one_for_copies_and_zero_for_unrelated_sequences() -> None:
    row = torch.arange(20)
    assert self_bleu(row.repeat(3, 1)) == pytest.approx(1)
    assert self_bleu(torch.stack([row, row + 20, row + 40])) == 0


def test_self_bleu_penalises_a_short_sequence() -> None:
    # The other sequence contains all of [1 2 3 4 5]: precision 1, penalty exp(1 - 6/5). The reverse lowers precisions.
    forward = math.exp(1 - 6 / 5)
    backward = (5 / 6 * 4 / 5) ** 0.5
    assert self_bleu([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]], n=2) == pytest.approx((forward + backward) / 2)


def test_self_bleu_is_fast_enough_for_every_evaluation() -> None:
    rows = torch.randint(200, (64, 256))
    start = time.perf_counter()
    self_bleu(rows)
    assert time.perf_counter() - start < 5  # 0.2 s when idle; comparing all pairs takes over ten


def test_self_bleu_needs_two_sequences() -> None:
    with pytest.raises(ValueError, match="two"):
        self_bleu([[1, 2, 3]])


def test_distinct_n_counts_over_all_sequences() -> None:
    rows = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_n(rows, 1) == pytest.approx(3 / 7)
    assert distinct_n(rows, 2) == pytest.approx(3 / 5)  # 12 21 23 of 12 21 12 12 23
    assert distinct_n(torch.tensor([[5, 5, 5, 5]]), 3) == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="5 tokens"):
        distinct_n(rows, 5)


def test_held_out_nll_is_the_mean_over_single_tokens(generator: MidiMambaForCausalLM) -> None:
    blocks = torch.randint(11, (5, 7))
    nats = [
        -generator(row[None, :t]).logits[0, -1].log_softmax(-1)[row[t]].item() for row in blocks for t in range(1, 7)
    ]
    assert held_out_nll(generator, blocks, BlockCollator(), batch_size=2) == pytest.approx(
        sum(nats) / len(nats), rel=1e-5
    )


def test_held_out_nll_is_that_of_each_piece_by_itself(generator: MidiMambaForCausalLM) -> None:
    blocks = torch.tensor([[5, 6, 1, 7, 8, 9], [1, 3, 5, 6, 7, 8], [6, 5, 1, 3, 9, 9]])
    nats = []
    for piece, first in (([5, 6], 1), ([1, 7, 8, 9], 1), ([1, 3, 5, 6, 7, 8], 2), ([6, 5], 1), ([1, 3, 9, 9], 2)):
        chances = generator(torch.tensor([piece])).logits[0].log_softmax(-1)
        nats += [-chances[t - 1, piece[t]].item() for t in range(first, len(piece))]
    collator = BlockCollator(bos_token_id=1, ignored_ids=(3,))
    assert held_out_nll(generator, blocks, collator, batch_size=2) == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_held_out_nll_leaves_the_model_in_its_mode_and_without_gradients(generator: MidiMambaForCausalLM) -> None:
    generator.train()
    held_out_nll(generator, torch.randint(11, (2, 5)), BlockCollator())
    assert generator.training
    assert all(parameter.grad is None for parameter in generator.parameters())


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (5,)])
def test_held_out_nll_refuses_blocks_without_a_token_to_predict(
    generator: MidiMambaForCausalLM, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="no token to predict"):
        held_out_nll(generator, torch.zeros(shape, dtype=torch.long), BlockCollator())


class FirstTokenJudge(nn.Module):
    """Judges every sequence real that starts with a positive token."""

    device = torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        assert not self.training
        return SimpleNamespace(logits=input_ids[:, :1].float() - 0.5)


def test_discriminator_accuracy_weighs_both_kinds_equally() -> None:
    real = torch.tensor([[1, 0], [1, 0], [0, 0], [1, 0]])
    fake = torch.tensor([[0, 1], [1, 1], [1, 1], [1, 1], [0, 1]])
    judge: Any = FirstTokenJudge().train()
    assert discriminator_accuracy(judge, real, fake, batch_size=3) == {
        "accuracy": pytest.approx(0.575),
        "accuracy_real": pytest.approx(0.75),
        "accuracy_fake": pytest.approx(0.4),
    }
    assert judge.training
