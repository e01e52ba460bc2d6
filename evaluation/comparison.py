"""Compare generated music with held-out music: every figure with its interval, and beside real music against itself.

All music is heard the same way: through the tokenizer of the reference corpus, on its grid, and only its first bars.
Otherwise a recording would differ from samples by its timing, and a whole piece from an excerpt by its length.

The reference is cut into two halves that share no piece. Sets are compared with the first half; the second half,
compared with it the same way, is the floor: what even real music does not reach. All these sets are of one size,
because overlaps, Fréchet distances and classifiers depend on it.
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

from midimamba.errors import InputError
from midimamba.evaluation.copying import Melodies, copied_share, longest_copies
from midimamba.evaluation.distances import (
    UNDEFINED,
    Estimate,
    compare_sets,
    jackknife,
    mean_estimate,
    ratio_estimate,
)
from midimamba.evaluation.features import Vector, measure, opening
from midimamba.evaluation.frechet import embed, frechet_distance
from midimamba.evaluation.metrics import distinct_n, piece_nlls, self_bleu
from midimamba.evaluation.two_sample import FOLDS, TwoSampleTest, feature_test, token_test
from midimamba.evaluation.validity import Samples, decode_all, grammar_errors, syntax_errors, until_end
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import sample
from midimamba.tokenization.corpus import load_corpus
from midimamba.tokenization.ingest import MidiRefusedError
from midimamba.tokenization.packing import BlockCollator
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
class Figure:
    """
    One line of a report.

    Args:
        estimate (`Estimate`): of the samples, or of the model.
        floor (`float`, *optional*, defaults to NaN): the same of real music; NaN where that means nothing.
    """

    estimate: Estimate
    floor: float = math.nan


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
    classifier: Figure = Figure(UNDEFINED)


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
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(pieces))[:size]
    first, second = random.permutation(len(reference.pieces))[: 2 * size].reshape(2, size)

    ours, real = measure([piece.score for piece in pieces]), measure([piece.score for piece in reference.pieces])
    features = {
        name: _feature_figures(name, ours[name], real[name], (chosen, first, second), seed)
        for name in tqdm(ours, desc="features", leave=False, disable=None)
    }
    halves = [_rows(real, first), _rows(real, second)]
    points, base, floor = (embed(rows, halves[0]) for rows in (_rows(ours, chosen), *halves))
    figures = {
        "usable_samples": Figure(_share(len(pieces), samples.total, seed), 1.0),
        "empty_samples": Figure(_share(samples.empty, samples.total, seed), 0.0),
        "frechet_distance": Figure(frechet_distance(points, base, seed), frechet_distance(floor, base, seed).value),
        **_test_figures("features", feature_test(base, points, seed), feature_test(base, floor, seed)),
        **_token_figures(
            [pieces[index].ids for index in chosen],
            *([reference.pieces[index].ids for index in half] for half in (first, second)),
            vocab_size=reference.processor.midi_tokenizer.vocab_size,
            length=length,
            seed=seed,
        ),
        **copy_figures(pieces, reference, seed),
    }
    sizes = {
        "samples": samples.total,
        "reference_pieces": len(reference.pieces),
        "pieces_a_set": size,
        "bars_a_piece": reference.bars,
        "tokens_a_sequence": length,
    }
    return Comparison(features, figures, {name: (ours[name], real[name]) for name in ours}, pieces, sizes)


def copy_figures(pieces: Sequence[Piece], reference: Reference, seed: int = 0) -> dict[str, Figure]:
    """What is copied from the training set: runs of notes, and the longest. The floor is the held-out music."""
    figures = {}
    ours, real = ([Melodies([piece.score]) for piece in group] for group in (pieces, reference.pieces))
    for notes in tqdm(RUNS, desc="copies", leave=False, disable=None):
        known = np.unique(reference.training.runs(notes))
        shares = [[copied_share(melodies, known, notes) for melodies in group] for group in (ours, real)]
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


def _rows(features: Mapping[str, Vector], chosen: Any) -> dict[str, Vector]:
    return {name: values[chosen] for name, values in features.items()}


def _feature_figures(name: str, ours: Vector, real: Vector, rows: tuple[Any, Any, Any], seed: int) -> FeatureFigures:
    """`rows` chooses samples, and both halves of the reference."""
    samples, base, other = (values[chosen] for values, chosen in zip((ours, real, real), rows, strict=True))
    found, floors = compare_sets(samples, base, seed), compare_sets(other, base, seed)
    overlap, divergence = (Figure(a, b.value) for a, b in zip(found, floors, strict=True))
    if ours.shape[1] > 1:
        return FeatureFigures(UNDEFINED, UNDEFINED, overlap, divergence)
    means = mean_estimate(ours[:, 0], seed), mean_estimate(real[:, 0], seed)
    if math.isnan(overlap.estimate.value):
        return FeatureFigures(*means, overlap, divergence)
    points = [embed({name: values}, {name: base}, [name]) for values in (base, samples, other)]
    told, told_real = (feature_test(points[0], others, seed).accuracy for others in points[1:])
    return FeatureFigures(*means, overlap, divergence, Figure(told, told_real.value))


def _token_figures(
    ours: Sequence[list[int]],
    first: Sequence[list[int]],
    second: Sequence[list[int]],
    *,
    vocab_size: int,
    length: int,
    seed: int,
) -> dict[str, Figure]:
    """Figures of sequences of equal length: those long enough, as many of each set."""
    sets = [[ids[:length] for ids in group if len(ids) >= length] for group in (ours, first, second)]
    count = min(map(len, sets))
    names = ("classifier_tokens", "classifier_tokens_p_value", "distinct_4", "self_bleu_4")
    if count < FOLDS:
        return {name: Figure(UNDEFINED) for name in names}
    samples, base, floor = (torch.tensor(group[:count]) for group in sets)
    tests = [token_test(base, other, vocab_size, seed) for other in (samples, floor)]
    rows = samples.tolist()
    distinct = jackknife(lambda there: distinct_n([rows[index] for index in there], 4), count)
    repeated = jackknife(lambda there: self_bleu([rows[index] for index in there]), count)
    return _test_figures("tokens", *tests) | {
        "distinct_4": Figure(distinct, distinct_n(base, 4)),
        "self_bleu_4": Figure(repeated, self_bleu(base)),
    }


def _test_figures(kind: str, test: TwoSampleTest, floor: TwoSampleTest) -> dict[str, Figure]:
    p_value = Estimate(test.p_value, math.nan, math.nan)
    return {
        f"classifier_{kind}": Figure(test.accuracy, floor.accuracy.value),
        f"classifier_{kind}_p_value": Figure(p_value, floor.p_value),
    }


def _share(count: int, total: int, seed: int) -> Estimate:
    return mean_estimate([1.0] * count + [0.0] * (total - count), seed)
