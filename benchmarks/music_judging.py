"""What the benchmark `music.py` measures of a set of samples, with judges that no reward has used.

The training pieces are halved. Discriminators learn from the one half, the judges here from the other, and what is
reported is how they do on held-out pieces and on samples that they have not seen.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from symusic.core import ScoreTick
from tqdm.auto import tqdm

from midimamba import MidiDiscriminator, MidiDiscriminatorConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.corpus.augmentation import Augmentation
from midimamba.corpus.load import load_corpus
from midimamba.evaluation.comparison import Piece, first_bars
from midimamba.evaluation.copying import Melodies, copied_share
from midimamba.evaluation.distances import compare_sets
from midimamba.evaluation.features import Vector, measure
from midimamba.evaluation.frechet import embed, frechet_distance
from midimamba.evaluation.logistic import balanced, logistic_regression, with_constant
from midimamba.evaluation.metrics import distinct_n, self_bleu
from midimamba.modeling.scoring import score_sequences
from midimamba.training.plan import LAGS, TRANSPOSE
from midimamba.training.scripts import look_back_fields

RIDGE = 3.0
EPOCHS, BATCH, LEARNING_RATE = 4, 16, 2e-3
COPIED_NOTES = 12


def halve(data: str, seed: int, folder: Path) -> tuple[Path, list[list[int]]]:
    """A corpus whose training split is half of that of `data`, made in `folder` unless it is there; the other half.

    Args:
        data (`str`): folder of a corpus.
        seed (`int`): decides which piece goes to which half.
        folder (`Path`): gets the corpus of the first half.
    """
    splits, _ = load_corpus(data)
    order = np.random.default_rng(seed).permutation(len(splits["train"]))
    first, second = np.array_split(order, 2)
    if not folder.exists():
        scratch = folder.with_name(f".{folder.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(data, scratch, ignore=shutil.ignore_patterns("train"))
        splits["train"].select(sorted(first.tolist())).save_to_disk(str(scratch / "train"))
        scratch.rename(folder)
    return folder, splits["train"].select(second)["input_ids"]


@dataclass(frozen=True)
class Real:
    """
    Real music to judge by.

    Args:
        processor (`MidiProcessor`): of the corpus.
        learned, held_out (`list[Piece]`): openings that the judges learn from, and that they are tested on.
        learned_features, held_out_features (`Mapping`): as [`~midimamba.evaluation.features.measure`] returns them.
        training (`Melodies`): of the whole training split, for copies.
    """

    processor: MidiProcessor
    learned: list[Piece]
    held_out: list[Piece]
    learned_features: Mapping[str, Vector]
    held_out_features: Mapping[str, Vector]
    training: Melodies

    @classmethod
    def read(cls, data: str, half: Sequence[Sequence[int]], split: str, bars: int) -> "Real":
        """Openings of one half of the training pieces, and of a held-out split, in keys of all kinds: a generator that
        learned them in changing keys must not be known by its keys."""
        splits, processor = load_corpus(data)
        change, random = Augmentation(transpose=TRANSPOSE), np.random.default_rng(0)
        learned, held_out = (
            first_openings(processor, [change.apply(processor.decode(ids), random) for ids in rows], bars)
            for rows in (half, splits[split]["input_ids"])
        )
        ours, theirs = (measure([piece.score for piece in pieces]) for pieces in (learned, held_out))
        training = Melodies(processor.decode(ids) for ids in splits["train"]["input_ids"])
        return cls(processor, learned, held_out, ours, theirs, training)


def first_openings(processor: MidiProcessor, scores: Sequence[ScoreTick], bars: int) -> list[Piece]:
    """The first bars of scores, as the tokenizer writes them. What is not music is left out."""
    found = [first_bars(processor, score, bars) for score in scores]
    return [piece for piece in found if piece]


def figures(samples: Sequence[Piece], real: Real, seed: int) -> dict[str, float]:
    """
    All figures of a set of samples.

    Returns:
        By name: `classifier` (primary) and `token_classifier` (co-primary), accuracies of fresh judges on held-out
        music and unseen samples, both kinds alike; `overlap`, the mean overlapping area, and `frechet`, the Fréchet
        distance, from the judges' half of the music; likeness of bars, scale consistency, copies and diversity.
    """
    size = min(len(samples), len(real.learned))
    features = measure([piece.score for piece in samples])
    compared = {name: values[:size] for name, values in features.items()}
    base = {name: values[:size] for name, values in real.learned_features.items()}
    areas = [compare_sets(values, base[name], seed, replicates=0)[0].value for name, values in compared.items()]
    ids = [piece.ids[:128] for piece in samples[:size]]
    steps = Melodies([piece.score for piece in samples])
    return {
        "classifier": feature_accuracy(features, real),
        "token_classifier": token_accuracy(samples, real, seed),
        "overlap": float(np.nanmean(areas)),
        "frechet": frechet_distance(embed(compared, base), embed(base, base), seed, replicates=0).value,
        **{name: float(np.nanmean(compared[name])) for name in SHOWN},
        "copied_runs_12": copied_share(steps.runs(COPIED_NOTES), real.training.runs(COPIED_NOTES)),
        "self_bleu_4": self_bleu(ids),
        "distinct_4": distinct_n(ids, 4),
    }


SHOWN = ("bar_self_similarity_4", "bar_self_similarity_8", "scale_consistency", "notes_per_bar", "polyphony")
"""Features of which the mean is reported, to be read beside that of real music."""


def feature_accuracy(features: Mapping[str, Vector], real: Real) -> float:
    """How often logistic regression on musical features is right that has learned from half of the samples, and is
    tested on the other half; the mean over both halves.

    Args:
        features (`Mapping[str, array]`): of the samples, as [`~midimamba.evaluation.features.measure`] returns them.
        real (`Real`): real music.
    """
    points = embed(features, real.learned_features)
    learned, held_out = (
        embed(each, real.learned_features) for each in (real.learned_features, real.held_out_features)
    )

    def accuracy(seen: Vector, unseen: Vector) -> float:
        labels = np.repeat([1.0, 0.0], [len(learned), len(seen)])
        weights = logistic_regression(with_constant(np.concatenate([learned, seen])), labels, RIDGE, balanced(labels))
        return _accuracy(with_constant(held_out) @ weights, with_constant(unseen) @ weights)

    half = len(points) // 2
    return (accuracy(points[:half], points[half:]) + accuracy(points[half:], points[:half])) / 2


def token_accuracy(samples: Sequence[Piece], real: Real, seed: int) -> float:
    """The same of a convolutional network that reads tokens and looks back; its family rewards nothing here."""
    processor = real.processor
    vocab_size = processor.vocab_size
    assert isinstance(vocab_size, int)  # a tokenization of one stream
    config = MidiDiscriminatorConfig(
        kind="cnn",
        vocab_size=vocab_size,
        hidden_size=32,
        filter_sizes=[1, 2, 3, 4, 6, 8],
        num_filters=[32] * 6,
        bos_token_id=processor.bos_token_id,
        **look_back_fields(LAGS, processor),
    )

    def accuracy(seen: Sequence[Piece], unseen: Sequence[Piece]) -> float:
        network = MidiDiscriminator(config).train()
        _learn(network, [piece.ids for piece in real.learned], [piece.ids for piece in seen], processor.pad_token_id)
        judged = [
            score_sequences(network, [torch.tensor(piece.ids) for piece in pieces], processor.pad_token_id).numpy()
            for pieces in (real.held_out, unseen)
        ]
        return _accuracy(*judged)

    half = len(samples) // 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (accuracy(samples[:half], samples[half:]) + accuracy(samples[half:], samples[:half])) / 2


def embedding_distance(model: MidiMambaForCausalLM, samples: Sequence[Piece], real: Vector) -> float:
    """
    The Fréchet distance between samples and as much real music, in what a generator holds of a piece on average.

    Args:
        model (`MidiMambaForCausalLM`): in any mode. Distances in its space can be compared, others not.
        samples (`Sequence[Piece]`): pieces. Their number is the same wherever distances are compared.
        real (`array` of shape `(pieces, hidden_size)`): the [`embeddings`] of real pieces.
    """
    size = min(len(samples), len(real))
    return frechet_distance(embeddings(model, samples[:size]), real[:size], replicates=0).value


@torch.no_grad()
def embeddings(model: MidiMambaForCausalLM, pieces: Sequence[Piece]) -> Vector:
    """The mean over the tokens of every piece of the last hidden state, `(pieces, hidden_size)`."""
    rows = [
        model.backbone(input_ids=torch.tensor([piece.ids]), use_cache=False).last_hidden_state[0].mean(0)
        for piece in pieces
    ]
    return np.asarray(torch.stack(rows).double().numpy())


def _learn(network: MidiDiscriminator, real: list[list[int]], fake: list[list[int]], pad: int) -> None:
    size = min(len(real), len(fake))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    for _ in tqdm(range(EPOCHS), desc="token judge", leave=False, disable=None):
        orders = (torch.randperm(len(rows))[:size].split(BATCH) for rows in (real, fake))
        for some_real, some_fake in zip(*orders, strict=True):
            rows = [torch.tensor(real[i]) for i in some_real] + [torch.tensor(fake[i]) for i in some_fake]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            labels = torch.zeros(len(rows))
            labels[: len(some_real)] = 1
            optimizer.zero_grad()
            network(ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()


def _accuracy(real: Any, fake: Any) -> float:
    """How often log-odds are right, on both kinds alike."""
    return float((np.mean(real > 0) + np.mean(fake <= 0)) / 2)
