"""Metrics of a generator: how well it predicts held-out music, and how varied and how convincing its samples are.

Distinct-n and self-BLEU depend on the number of sequences and on their length: compare only sets of equal size.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from midimamba.corpus.packing import IGNORED, BlockCollator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.policy import inference
from midimamba.modeling.recurrent_cache import RecurrentCache
from midimamba.modeling.scoring import score

Sequences = Tensor | Sequence[Sequence[int]]
NGram = tuple[int, ...]


def held_out_nll(model: PreTrainedModel, blocks: Tensor, collator: BlockCollator, batch_size: int = 16) -> float:
    """
    Negative log-likelihood of held-out music, teacher-forced, in evaluation mode.

    Args:
        model (`PreTrainedModel`): any causal language model; its mode is the same afterwards.
        blocks (`LongTensor` of shape `(n, time)`): packed blocks without padding.
        collator (`BlockCollator`): knows where pieces begin, and which tokens are not targets.
        batch_size (`int`, *optional*, defaults to 16): blocks per forward pass.

    Returns:
        `float`: nats per predicted token. A block of `time` tokens has at most `time - 1` of them.

    Raises:
        ValueError: if there is no token to predict.
    """
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise ValueError(f"blocks of shape {tuple(blocks.shape)} hold no token to predict")
    total, targets = 0.0, 0
    with inference(model):
        for rows in tqdm(blocks.split(batch_size), desc="held-out likelihood", leave=False, disable=None):
            batch = collator.separate(rows.to(model.device))
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum").item()
            targets += int((labels != IGNORED).sum())
    return total / targets


def piece_nlls(
    model: MidiMambaForCausalLM, pieces: Sequence[Sequence[int]], collator: BlockCollator, window: int = 1024
) -> tuple[list[float], list[int]]:
    """
    Negative log-likelihood of whole pieces, each read from its start to its end with its whole past.

    Divided by the notes or seconds of a piece instead of its tokens, it can be compared between tokenizers: a large
    vocabulary writes the same music with fewer and costlier tokens.

    Args:
        model (`MidiMambaForCausalLM`): its mode is the same afterwards.
        pieces (`Sequence[Sequence[int]]`): the ids of each piece, from begin-of-sequence to end-of-sequence.
        collator (`BlockCollator`): knows which tokens are not targets.
        window (`int`, *optional*, defaults to 1024): tokens per forward pass. It bounds memory and does not change
            the result, because the state is carried on.

    Returns:
        `tuple[list[float], list[int]]`: the nats and the number of predicted tokens of every piece.
    """
    nats, targets = [], []
    with inference(model):
        for ids in tqdm(pieces, desc="held-out likelihood", leave=False, disable=None):
            piece = torch.tensor([ids], device=model.device)
            labels = collator.separate(piece)["labels"]
            cache = RecurrentCache.for_model(model, 1, max_length=len(ids))
            total = 0.0
            for start in range(0, len(ids) - 1, window):
                following = labels[0, start + 1 : start + 1 + window]
                read = piece[:, start : start + len(following)]
                logits = model(input_ids=read, past_key_values=cache).logits[0].float()
                total += F.cross_entropy(logits, following, ignore_index=IGNORED, reduction="sum").item()
            nats.append(total)
            targets.append(int((labels[0, 1:] != IGNORED).sum()))
    return nats, targets


def discriminator_accuracy(
    discriminator: PreTrainedModel,
    real: Tensor,
    fake: Tensor,
    batch_size: int = 64,
    masks: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """
    The accuracy of a discriminator at the threshold 0.5. At an `accuracy` of 0.5 it cannot tell the two apart.

    Args:
        discriminator (`MidiDiscriminator`): its mode is the same afterwards.
        real (`LongTensor` of shape `(n, time)`): held-out music.
        fake (`LongTensor` of shape `(m, time)`): generated sequences.
        batch_size (`int`, *optional*, defaults to 64): sequences per forward pass.
        masks (`tuple` of two `LongTensor`s, *optional*): 0 on the padding of `real` and of `fake`, 1 elsewhere.

    Returns:
        `dict[str, float]`: `accuracy_real`, `accuracy_fake`, and `accuracy`, the mean of the two, so that it does not
        depend on the number of sequences of each kind.
    """
    of_real, of_fake = masks or (torch.ones_like(real), torch.ones_like(fake))
    right_real = share_judged_real(discriminator, real, of_real, batch_size)
    right_fake = 1.0 - share_judged_real(discriminator, fake, of_fake, batch_size)
    return {"accuracy": (right_real + right_fake) / 2, "accuracy_real": right_real, "accuracy_fake": right_fake}


def share_judged_real(discriminator: PreTrainedModel, sequences: Tensor, mask: Tensor, batch_size: int = 64) -> float:
    """The share of sequences `(n, time)`, with 0 in the mask on padding, that are more likely real than generated."""
    return (score(discriminator, sequences, mask, batch_size) > 0).float().mean().item()


def distinct_n(sequences: Sequences, n: int) -> float:
    """
    Distinct n-grams over all n-grams of all sequences (Li et al. 2016, arXiv 1510.03055); 1 means no repetition.

    Args:
        sequences (`LongTensor` of shape `(count, time)`, or a list of lists of `int`): token ids.
        n (`int`): tokens per n-gram.

    Raises:
        ValueError: if every sequence is shorter than `n`.
    """
    counts = Counter(gram for row in _rows(sequences) for gram in _ngrams(row, n))
    if not counts:
        raise ValueError(f"no sequence has {n} tokens")
    return len(counts) / counts.total()


def self_bleu(sequences: Sequences, n: int = 4) -> float:
    """
    Mean BLEU-n of each sequence against all the others (Zhu et al. 2018, Texygen, arXiv 1802.01886).

    1 means that the sequences are copies of one another, so lower is more diverse. BLEU (Papineni et al. 2002) is used
    here with uniform weights, clipped counts, the brevity penalty of the closest reference length, and no smoothing:
    it is 0 for a sequence that shares no n-gram of some order with any other.

    Args:
        sequences (`LongTensor` of shape `(count, time)`, or a list of lists of `int`): token ids.
        n (`int`, *optional*, defaults to 4): the longest n-gram.

    Raises:
        ValueError: if there are fewer than two sequences.
    """
    rows = _rows(sequences)
    if len(rows) < 2:
        raise ValueError("self-BLEU compares at least two sequences")
    precisions = [_clipped_precisions(rows, order) for order in range(1, n + 1)]
    lengths = [len(row) for row in rows]
    scores = [
        _brevity_penalty(lengths, index) * _geometric_mean(by_order)
        for index, by_order in enumerate(zip(*precisions, strict=True))
    ]
    return sum(scores) / len(scores)


def _clipped_precisions(rows: list[list[int]], order: int) -> list[float]:
    """For every sequence: the share of its n-grams that another sequence contains, with clipped counts."""
    counts = [Counter(_ngrams(row, order)) for row in rows]
    # The largest count among the *others* is the largest of all or, for the sequence that has the largest, the second
    # largest. So two numbers per n-gram are enough, and the work is linear in the number of sequences.
    top_two: dict[NGram, tuple[int, int]] = {}
    for count in counts:
        for gram, times in count.items():
            largest, second = top_two.get(gram, (0, 0))
            top_two[gram] = (times, largest) if times > largest else (largest, max(second, times))
    precisions = []
    for count in counts:
        matches = sum(
            min(times, second if times == largest else largest)
            for gram, times in count.items()
            for largest, second in (top_two[gram],)
        )
        precisions.append(matches / max(1, count.total()))
    return precisions


def _brevity_penalty(lengths: list[int], index: int) -> float:
    length = lengths[index]
    if not length:
        return 0.0
    others = lengths[:index] + lengths[index + 1 :]
    closest = min(others, key=lambda other: (abs(other - length), other))
    return min(1.0, math.exp(1 - closest / length))


def _geometric_mean(values: Sequence[float]) -> float:
    return math.prod(values) ** (1 / len(values))


def _rows(sequences: Sequences) -> list[list[int]]:
    return sequences.tolist() if isinstance(sequences, Tensor) else [list(row) for row in sequences]


def _ngrams(row: list[int], n: int) -> Iterator[NGram]:
    return zip(*(row[start:] for start in range(n)), strict=False)
