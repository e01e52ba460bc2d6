"""Compare generated music with held-out music: every figure with its interval, and beside real music against itself.

All music is heard the same way: through the tokenizer of the reference corpus, on its grid, and only its first bars.
Otherwise a recording would differ from samples by its timing, and a whole piece from an excerpt by its length.

The reference is cut into two halves that share no piece. Sets are compared with the first half; the second half,
compared with it the same way, is the floor: what even real music does not reach.
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
from midimamba.evaluation.copying import Melodies, copied_share, longest_copies
from midimamba.evaluation.distances import UNDEFINED, Estimate, mean_estimate, ratio_estimate
from midimamba.evaluation.features import Vector, measure, opening
from midimamba.evaluation.halving import HALVINGS, Figure, Music, compare_halves
from midimamba.evaluation.metrics import piece_nlls
from midimamba.evaluation.two_sample import FOLDS
from midimamba.evaluation.validity import Samples, decode_all, grammar_errors, syntax_errors, until_end
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import sample
from midimamba.tokenization.ingest import MidiRefusedError
from midimamba.tokenization.processor import MidiProcessor

RUNS = (8, 12, 16)  # notes
_SAMPLED_AT_ONCE = 16


class Piece(NamedTuple):
    """
    The opening of a piece as the tokenizer of the reference hears it.

    Args:
        score (`symusic.Score`): times in ticks.
        ids (`list[int]`): the same as tokens, without any special token.
    """

    score: ScoreTick
    ids: list[int]


@dataclass(frozen=True)
class FeatureFigures:
    """
    A musical feature of two sets.

    Args:
        samples (`Estimate`): mean over all samples; of histograms undefined.
        real (`Estimate`): mean over all of the reference.
        overlapping_area (`Figure`): of distances within the reference and to it.
        kl_divergence (`Figure`): likewise, in nats.
        classifier (`Figure`): accuracy of a fresh one that knows nothing else; undefined of histograms, and
            where too few pieces have the feature.
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
        processor (`MidiProcessor`): the corpus's.
        rows (`datasets.Dataset`): the held-out split, a piece a row.
        pieces (`list[Piece]`): openings of the held-out pieces.
        training (`Melodies`): of the train split, whole.
        bars (`int`): the length of an opening.
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
        measured (`dict[str, tuple[array, array]]`): every feature of all samples and of all of the reference.
        pieces (`list[Piece]`): the samples as heard.
        sizes (`dict[str, int]`): pieces and tokens that took part.
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
        name (`str`): a folder that `midimamba tokenize` made, or such a data set on the Hub.
        split (`str`, *optional*, defaults to `"test"`): the held-out split.
        bars (`int`, *optional*, defaults to 32): so many bars of every piece are compared.

    Raises:
        InputError: if it is no corpus of one vocabulary, or the split holds too few pieces.
    """
    splits, processor = load_corpus(name)
    if processor.midi_tokenizer.is_multi_voc:
        raise InputError(f"{name} has several vocabularies: tokenize the same music as REMI to compare with it")
    rows = splits[split]
    if len(rows) < 2 * FOLDS:
        raise InputError(f"{name}: the {split} split holds {len(rows)} pieces, but a comparison needs {2 * FOLDS}")
    pieces = [hear(processor, score, bars) for score in _decoded(processor, rows, f"{split} split")]
    training = Melodies(_decoded(processor, splits["train"], "train split"))
    return Reference(processor, rows, [piece for piece in pieces if piece], training, bars)


def hear(processor: MidiProcessor, score: ScoreTick, bars: int) -> Piece | None:
    """The opening of a score as a tokenizer hears it; `None` if it holds no notes, or cannot be written."""
    try:
        heard = opening(processor.decode(processor.encode(score)), bars)
        return Piece(heard, processor.encode(heard, add_bos=False))
    except MidiRefusedError:
        return None


def compare(samples: Samples, reference: Reference, length: int = 128, seed: int = 0) -> Comparison:
    """
    Compare generated music with held-out music.

    Args:
        samples (`Samples`): what was generated.
        reference (`Reference`): what it should be like.
        length (`int`, *optional*, defaults to 128): tokens a sequence, where sequences of equal length are compared.
        seed (`int`, *optional*, defaults to 0): of halves, intervals and classifiers.

    Raises:
        InputError: if there are too few samples that can be used.
    """
    heard = [
        hear(reference.processor, score, reference.bars)
        for score in tqdm(samples.scores, desc="samples", leave=False, disable=None)
    ]
    pieces = [piece for piece in heard if piece]
    size = min(len(pieces), len(reference.pieces) // 2)
    if size < FOLDS:
        raise InputError(
            f"{len(pieces)} of {samples.total} samples can be used, and {len(reference.pieces)} pieces of real music; "
            f"a comparison needs {FOLDS} and {2 * FOLDS}"
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
        "pieces_a_set": size,
        "halvings": HALVINGS,
        "bars_a_piece": reference.bars,
        "tokens_a_sequence": length,
    }
    measured = {name: (ours.features[name], real.features[name]) for name in features}
    return Comparison(features, figures, measured, pieces, sizes)


def copy_figures(pieces: Sequence[Piece], reference: Reference, seed: int = 0) -> dict[str, Figure]:
    """What is copied from the training set: runs of notes, and the longest. The floor is the held-out music."""
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
    What only a model can be asked: the likelihood of held-out music, and whether it keeps the grammar by itself.

    Args:
        model (`MidiMambaForCausalLM`): the generator.
        processor (`MidiProcessor`): its processor. Where it is not that of the reference, it encodes the reference
            anew.
        reference (`Reference`): held-out music.
        num (`int`, *optional*, defaults to 64): sequences to sample without the grammar.
        length (`int`, *optional*, defaults to 128): tokens a sequence.
        temperature (`float`, *optional*, defaults to 1.0): of these.
        seed (`int`, *optional*, defaults to 0): likewise; the global random state is left as it was.
    """
    real = _encoded_for(processor, reference)
    nats, targets = piece_nlls(model, real, BlockCollator.for_processor(processor))
    units = {"token": targets, "note": reference.rows["num_notes"], "second": reference.rows["seconds"]}
    figures = {f"held_out_nll_per_{unit}": Figure(ratio_estimate(nats, list(units[unit]), seed)) for unit in units}
    prompts = torch.full((num, 1), processor.bos_token_id, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = tqdm(prompts.split(_SAMPLED_AT_ONCE), desc="free samples", leave=False, disable=None)
        drawn = torch.cat([sample(model, rows, length, processor.eos_token_id, temperature) for rows in batches])
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
    """Figures as JSON has them: dictionaries, and `null` for NaN."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (Figure, FeatureFigures)):
        return to_json(asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures_from_json(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """What [`to_json`] made of figures by name."""
    return {name: Figure(_estimate(row["estimate"]), _number(row["floor"])) for name, row in figures.items()}


def features_from_json(features: Mapping[str, Any]) -> dict[str, FeatureFigures]:
    """What [`to_json`] made of features by name."""
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
    """The held-out pieces, from begin to end, as the model's own tokenizer writes them."""
    if processor.midi_tokenizer.to_dict() == reference.processor.midi_tokenizer.to_dict():
        return list(reference.rows["input_ids"])
    scores = _decoded(reference.processor, reference.rows, "encoding for the model")
    return [[*processor.encode(score), processor.eos_token_id] for score in scores]


def _feature_mean(values: Vector, seed: int) -> Estimate:
    """Over pieces; a histogram has none."""
    return UNDEFINED if values.shape[1] > 1 else mean_estimate(values[:, 0], seed)


def _share(count: int, total: int, seed: int) -> Estimate:
    return mean_estimate([1.0] * count + [0.0] * (total - count), seed)
