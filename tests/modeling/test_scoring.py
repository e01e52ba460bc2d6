"""Scoring in batches against scoring one sequence at a time."""

import pytest
import torch

from midimamba.modeling.scoring import score
from support import make_discriminator


@pytest.mark.parametrize("kind", ["cnn", "mamba"])
def test_scores_in_batches_are_those_of_each_sequence_without_its_padding(kind: str) -> None:
    discriminator = make_discriminator(kind, vocab_size=11, dropout=0.5).train()
    sequences = torch.randint(1, 11, (7, 12))
    lengths = torch.tensor([12, 9, 10, 12, 8, 11, 9])
    mask = (torch.arange(12) < lengths[:, None]).long()
    scores = score(discriminator, sequences, mask, batch_size=3)
    assert discriminator.training
    assert not scores.requires_grad
    discriminator.eval()
    expected = [
        discriminator(row[None, :length]).logits.item() for row, length in zip(sequences, lengths, strict=True)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_without_a_mask_every_token_counts() -> None:
    discriminator = make_discriminator("cnn", vocab_size=11)
    sequences = torch.randint(1, 11, (5, 12))
    scores = score(discriminator, sequences, batch_size=2)
    assert torch.equal(scores, score(discriminator, sequences, torch.ones_like(sequences), batch_size=2))


def test_no_sequences_have_no_scores() -> None:
    assert score(make_discriminator("cnn", vocab_size=11), torch.empty(0, 12, dtype=torch.long)).shape == (0,)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 12\) does not fit"):
        score(make_discriminator("cnn", vocab_size=11), torch.ones(3, 12, dtype=torch.long), torch.ones(2, 12))
