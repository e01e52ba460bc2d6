"""Compare generated music with held-out music: every figure with its interval, beside the same figure of real music.

All music is prepared in the same way: it passes through the tokenizer of the reference corpus, onto its grid, and only
its first bars are kept. Otherwise a recording would differ from samples by its timing, and a whole piece from an
excerpt by its length.

The reference is cut into two halves that have no piece in common. Samples are compared with the first half. The second
half is compared with the first in the same way, and gives the floor: the figure that real music itself gets.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from symusic.core import ScoreTick
from tqdm.auto import tqdm

from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import BlockCollator
from midimamba.errors import InputError
from midimamba.evaluation.comparison_halves import HALVINGS, Figure, Music, compare_halves
from midimamba.evaluation.copying import Melodies, copied_share, longest_copies
from midimamba.evaluation.estimates import UNDEFINED, Estimate, mean_estimate, ratio_estimate
from midimamba.evaluation.features import Vector, measure, opening
from midimamba.evaluation.metrics import piece_nlls
from midimamba.evaluation.samples import Samples, decode_all, fresh_samples, until_end
from midimamba.evaluation.two_sample import FOLDS
from midimamba.evaluation.validity import grammar_errors, syntax_errors
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import Ending
from midimamba.tokenization.ingest import MidiRefusedError
from midimamba.tokenization.processor import MidiProcessor

RUNS = (8, 12, 16)  # notes


class Piece(NamedTuple):
    """
    The first bars of a piece, as the tokenizer of the reference writes them.

    Args:
        score (`symusic.Score`): times in ticks.
        ids (`list[int]`): the same music as tokens, without special tokens.
    """

    score: ScoreTick
    ids: list[int]


@dataclass(frozen=True)
class FeatureFigures:
    """
    A musical feature of two sets.

    Args:
        samples (`Estimate`): mean over all samples; undefined for histograms.
        real (`Estimate`): mean over the whole reference.
        overlapping_area (`Figure`): of the distances within the reference and between samples and reference.
        kl_divergence (`Figure`): of the same distances, in nats.
        classifier (`Figure`): accuracy of a fresh classifier that sees only this feature; undefined for histograms,
            and if too few pieces have the feature.
    """

    samples: Estimate
    real: Estimate
    overlapping_area: Figure
    kl_divergence: Figure
    classifier: Figure


@dataclass(frozen=True)
class Reference:
    """
    Real music to compare with.

    Args:
        processor (`MidiProcessor`): the processor of the corpus.
        rows (`datasets.Dataset`): the held-out split, one piece per row.
        pieces (`list[Piece]`): the first bars of the held-out pieces.
        training (`Melodies`): the melodies of the whole train split.
        bars (`int`): the number of bars that are kept of a piece.
    """

    processor: MidiProcessor
    rows: Dataset
    pieces: list[Piece]
    training: Melodies
    bars: int


@dataclass(frozen=True)
class Comparison:
    """
    What [`compare`] found.

    Args:
        features (`dict[str, FeatureFigures]`): by name.
        figures (`dict[str, Figure]`): by name.
        measured (`dict[str, tuple[array, array]]`): every feature of all samples and of the whole reference.
        pieces (`list[Piece]`): the samples that were compared.
        sizes (`dict[str, int]`): the numbers of pieces, bars and tokens that were compared.
    """

    features: dict[str, FeatureFigures]
    figures: dict[str, Figure]
    measured: dict[str, tuple[Vector, Vector]]
    pieces: list[Piece]
    sizes: dict[str, int]


def read_reference(name: str, split: str = "test", bars: int = 32) -> Reference:
    """
    Read a corpus to compare with.

    Args:
        name (`str`): a folder that `midimamba tokenize` has written, or such a data set on the Hub.
        split (`str`, *optional*, defaults to `"test"`): the held-out split.
        bars (`int`, *optional*, defaults to 32): the number of bars of every piece that are compared.

    Raises:
        InputError: if it is not a corpus with one vocabulary, or the split has too few pieces.
    """
    splits, processor = load_corpus(name)
    if processor.midi_tokenizer.is_multi_voc:
        raise InputError(f"{name} has several vocabularies; tokenize the same music as REMI to compare with it")
    rows = splits[split]
    if len(rows) < 2 * FOLDS:
        raise InputError(
            f"{name}: the {split} split holds {len(rows)} pieces, but a comparison needs {2 * FOLDS}; "
            "choose another split or a larger corpus"
        )
    pieces = [first_bars(processor, score, bars) for score in _decoded(processor, rows, f"{split} split")]
    training = Melodies(_decoded(processor, splits["train"], "train split"))
    return Reference(processor, rows, [piece for piece in pieces if piece], training, bars)


def first_bars(processor: MidiProcessor, score: ScoreTick, bars: int) -> Piece | None:
    """The first bars of a score as a tokenizer writes them; `None` if they have no notes or cannot be tokenized."""
    try:
        written = opening(processor.decode(processor.encode(score)), bars)
        return Piece(written, processor.encode(written, add_bos=False))
    except MidiRefusedError:
        return None


def compare(samples: Samples, reference: Reference, length: int = 128, seed: int = 0) -> Comparison:
    """
    Compare generated music with held-out music.

    Args:
        samples (`Samples`): the generated music.
        reference (`Reference`): the music that it should be like.
        length (`int`, *optional*, defaults to 128): tokens per sequence, for the figures that compare sequences of
            equal length.
        seed (`int`, *optional*, defaults to 0): for halves, intervals and classifiers.

    Raises:
        InputError: if there are too few samples that can be used.
    """
    progress = tqdm(samples.scores, desc="samples", leave=False, disable=None)
    openings = [first_bars(reference.processor, score, reference.bars) for score in progress]
    pieces = [piece for piece in openings if piece]
    size = min(len(pieces), len(reference.pieces) // 2)
    if size < FOLDS:
        raise InputError(
            f"{len(pieces)} of {samples.total} samples can be used, and {len(reference.pieces)} pieces of real music; "
            f"a comparison needs {FOLDS} and {2 * FOLDS}; generate more, or choose a larger reference"
        )
    ours, real = (
        Music(measure([piece.score for piece in group]), [piece.ids for piece in group])
        for group in (pieces, reference.pieces)
    )
    found, figures = compare_halves(ours, real, reference.processor.midi_tokenizer.vocab_size, length, seed)
    features = {}
    for name, compared in found.items():
        ours_mean, real_mean = (_feature_mean(music.features[name], seed) for music in (ours, real))
        features[name] = FeatureFigures(ours_mean, real_mean, **compared)
    figures |= {
        "usable_samples": Figure(_share(len(pieces), samples.total, seed), 1.0),
        "empty_samples": Figure(_share(samples.empty, samples.total, seed), 0.0),
        **copy_figures(pieces, reference, seed),
    }
    sizes = {
        "samples": samples.total,
        "reference_pieces": len(reference.pieces),
        "pieces_per_set": size,
        "halvings": HALVINGS,
        "bars_per_piece": reference.bars,
        "tokens_per_sequence": length,
    }
    measured = {name: (ours.features[name], real.features[name]) for name in features}
    return Comparison(features, figures, measured, pieces, sizes)


def copy_figures(pieces: Sequence[Piece], reference: Reference, seed: int = 0) -> dict[str, Figure]:
    """Copies from the training set: runs of notes, and the longest one. The floor is that of the held-out music."""
    figures = {}
    ours, real = ([Melodies([piece.score]) for piece in group] for group in (pieces, reference.pieces))
    for notes in tqdm(RUNS, desc="copies", leave=False, disable=None):
        known = np.unique(reference.training.runs(notes))
        shares = [[copied_share(melodies.runs(notes), known) for melodies in group] for group in (ours, real)]
        figures[f"copied_runs_{notes}"] = Figure(mean_estimate(shares[0], seed), mean_estimate(shares[1]).value)
    longest = longest_copies([*ours, *real], reference.training)
    estimate = mean_estimate(longest[: len(ours)], seed)
    figures["longest_copy"] = Figure(estimate, float(np.mean(longest[len(ours) :])))
    return figures


def model_figures(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    reference: Reference,
    num: int = 64,
    length: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Figure]:
    """
    The figures that need the model itself: the likelihood of held-out music, and the validity of its samples.

    Args:
        model (`MidiMambaForCausalLM`): the generator.
        processor (`MidiProcessor`): its processor. If it differs from that of the reference, the reference is encoded
            again with it.
        reference (`Reference`): held-out music.
        num (`int`, *optional*, defaults to 64): sequences to sample without the grammar.
        length (`int`, *optional*, defaults to 128): tokens per sampled sequence.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits of the samples.
        seed (`int`, *optional*, defaults to 0): for samples and intervals; the global random state is left as it was.
    """
    real = _encoded_for(processor, reference)
    nats, targets = piece_nlls(model, real, BlockCollator.for_processor(processor))
    units = {"token": targets, "note": reference.rows["num_notes"], "second": reference.rows["seconds"]}
    figures = {f"held_out_nll_per_{unit}": Figure(ratio_estimate(nats, list(units[unit]), seed)) for unit in units}
    prompts = torch.full((num, 1), processor.bos_token_id)
    ending = Ending(processor.eos_token_id, processor.pad_token_id)
    drawn = fresh_samples(model, prompts, length, seed, ending, temperature)
    free = [until_end(ids, processor.eos_token_id) for ids in drawn.tolist()]
    decoded, opened = decode_all(processor, free), [ids[:length] for ids in real]
    errors, real_errors = grammar_errors(processor, free), grammar_errors(processor, opened)
    syntax, real_syntax = ([syntax_errors(processor, ids) for ids in group] for group in (free, opened))
    return figures | {
        "free_samples_usable": Figure(_share(len(decoded.scores), decoded.total, seed), 1.0),
        "grammar_errors": Figure(mean_estimate(errors, seed), mean_estimate(real_errors).value),
        "syntax_errors": Figure(mean_estimate(syntax, seed), mean_estimate(real_syntax).value),
    }


def to_json(value: Any) -> Any:
    """Figures in the form of JSON: dictionaries, and `null` for NaN."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (Figure, FeatureFigures)):
        return to_json(asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures_from_json(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures by name of which [`to_json`] made dictionaries."""
    return {name: Figure(_estimate(row["estimate"]), _number(row["floor"])) for name, row in figures.items()}


def features_from_json(features: Mapping[str, Any]) -> dict[str, FeatureFigures]:
    """The features by name of which [`to_json`] made dictionaries."""
    return {
        name: FeatureFigures(
            _estimate(row["samples"]),
            _estimate(row["real"]),
            **figures_from_json({key: row[key] for key in ("overlapping_area", "kl_divergence", "classifier")}),
        )
        for name, row in features.items()
    }


def _estimate(row: Mapping[str, float | None]) -> Estimate:
    return Estimate(*(_number(row[name]) for name in ("value", "low", "high")))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _decoded(processor: MidiProcessor, rows: Dataset, description: str) -> Iterator[ScoreTick]:
    for ids in tqdm(rows["input_ids"], desc=description, leave=False, disable=None):
        yield processor.decode(ids)


def _encoded_for(processor: MidiProcessor, reference: Reference) -> list[list[int]]:
    """The whole held-out pieces, as the tokenizer of the model writes them."""
    if processor.midi_tokenizer.to_dict() == reference.processor.midi_tokenizer.to_dict():
        return list(reference.rows["input_ids"])
    scores = _decoded(reference.processor, reference.rows, "encoding for the model")
    return [[*processor.encode(score), processor.eos_token_id] for score in scores]


def _feature_mean(values: Vector, seed: int) -> Estimate:
    """The mean over pieces; a histogram has none."""
    return UNDEFINED if values.shape[1] > 1 else mean_estimate(values[:, 0], seed)


def _share(count: int, total: int, seed: int) -> Estimate:
    return mean_estimate([1.0] * count + [0.0] * (total - count), seed)
