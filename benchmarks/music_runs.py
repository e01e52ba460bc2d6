"""One run of the benchmark `music.py`: tune a generator, sample it at every temperature, compare with real music."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from symusic.core import ScoreTick
from transformers import Trainer, get_cosine_schedule_with_warmup, set_seed

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import SamplingOptions
from midimamba.corpus.augmentation import Augmentation
from midimamba.corpus.packing import BlockCollator
from midimamba.evaluation.comparison import Comparison, Reference, compare, model_figures, read_reference
from midimamba.evaluation.comparison_halves import Figure
from midimamba.evaluation.samples import Samples
from midimamba.generation import generate_scores, load_pair
from midimamba.training.deadline import Deadline
from midimamba.training.scripts import load_blocks, save_model
from resumable import Row
from tuning import CONSTANT, RANDOM, forget, read_recipe, timed_arguments, train

CONTROLS = {"constant": CONSTANT, "random": RANDOM}
MORE_LEARNING_RATE = (
    5e-4  # of `more`: a sixth of the pre-training recipe's initial rate, falling to 0 as it does there
)
MORE_EVALUATIONS = 10
REPETITION = (
    "bar_self_similarity_4",
    "bar_self_similarity_8",
)  # what distinguishes samples of small models from music


@dataclass(frozen=True)
class Settings:
    """
    The settings that all runs have in common.

    Args:
        model, data (`str`): the pre-trained generator and its corpus.
        recipe (`str`): the recipe of adversarial training.
        length (`int`): tokens per training sequence.
        steps (`int`, *optional*): generator steps; those of the recipe by default.
        num, bars (`int`): pieces that are sampled for every figure, and bars per piece that are compared.
        temperatures (`list[float]`): the temperatures that are tried on the validation split.
    """

    model: str
    data: str
    recipe: str = "stable-adversarial"
    length: int = 128
    steps: int | None = None
    num: int = 96
    bars: int = 16
    temperatures: list[float] = field(default_factory=lambda: [0.7, 0.8, 0.9, 1.0])

    @property
    def key(self) -> str:
        """A short name of these settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


def run(arm: str, seed: int, settings: Settings, folder: Path, budgets: Mapping[int, float]) -> Row:
    """Make a run of an arm: its cost, and its figures at its best temperature on the validation and the test split.

    Args:
        arm (`str`): one of `ARMS`, or `"trial "` followed by options as JSON. A trial does not use the test split.
        seed (`int`): for training, samples and figures.
        settings (`Settings`): the settings of all runs.
        folder (`Path`): samples are kept here, in a folder `<arm>-<seed>`.
        budgets (`Mapping[int, float]`): by seed, the processor time in seconds that `more` may take.
    """
    seconds = 0.0
    generator = Path(settings.model)
    scratch = folder / f".{hashlib.sha256(arm.encode()).hexdigest()[:8]}-{seed}"
    if arm == "more":
        generator, seconds = scratch, more_likelihood(settings, seed, budgets[seed], scratch)
    elif arm != "mle":
        generator, seconds = scratch, adversarial(arm, settings, seed, scratch)
    row: Row = {"arm": arm, "seed": seed, "settings": asdict(settings), "cpu_seconds": round(seconds, 1)}
    pair = load_pair(str(generator))
    tried = {each: figures_of(*pair, settings, "validation", each, seed) for each in settings.temperatures}
    best = min(tried, key=lambda temperature: distance(tried[temperature].values))
    row |= {"temperature": best, "tried": {str(each): measured.values for each, measured in tried.items()}}
    measured = {"validation": tried[best]}
    if not arm.startswith("trial "):
        measured["test"] = figures_of(*pair, settings, "test", best, seed)
        kept = folder / f"{arm}-{seed}"
        kept.mkdir(exist_ok=True)
        for index, score in enumerate(measured["test"].scores):
            score.dump_midi(kept / f"{index:03d}.mid")
    for split, found in measured.items():
        reference = _reference(settings.data, split, settings.bars)
        values, floors = numbers(model_figures(*pair, reference, settings.num, settings.length, best, seed))
        row |= {split: found.values | values, f"{split}_floor": found.floors | floors}
    forget(scratch)
    return row


def distance(figures: Mapping[str, float | None]) -> float:
    """The distance from real music: that of a classifier's accuracy from chance, plus 1 minus the overlapping area."""
    classifier, area = figures["classifier"], figures["mean_overlapping_area"]
    assert classifier is not None
    assert area is not None
    return abs(classifier - 0.5) + 1 - area


def adversarial(arm: str, settings: Settings, seed: int, output: Path) -> float:
    """Train with the recipe and return the processor time in seconds.

    Raises:
        RuntimeError: if the script fails.
    """
    given = {"model": settings.model, "data": settings.data, "seed": seed, "sequence_length": settings.length}
    steps = {"max_steps": settings.steps} if settings.steps else {}
    chosen = json.loads(arm.removeprefix("trial ")) if arm.startswith("trial ") else CONTROLS.get(arm, {})
    trained = train({**read_recipe(settings.recipe), **given, **steps, **chosen}, output)
    if trained.failed:
        raise RuntimeError(f"{arm}, seed {seed}, failed:\n{trained.printed}")
    return trained.cpu_seconds


def more_likelihood(settings: Settings, seed: int, budget: float, output: Path) -> float:
    """Continue with maximum likelihood for `budget` seconds of processor time, and return the time that it took.

    The weights that were best on the validation split are kept, which may be those of the original generator.
    """
    forget(output)
    blocks, validation, processor = load_blocks(settings.data, 2 * settings.length, Augmentation(), seed)
    set_seed(seed)
    model, _ = load_pair(settings.model)
    optimizer = torch.optim.AdamW(model.parameters(), MORE_LEARNING_RATE, weight_decay=0.1)
    clock = Deadline(budget, evaluations=MORE_EVALUATIONS, clock=time.process_time)
    args = timed_arguments(output, per_device_train_batch_size=16, per_device_eval_batch_size=16, seed=seed)
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=BlockCollator.for_processor(processor),
        train_dataset=blocks,
        eval_dataset=validation,
        callbacks=[clock],
        optimizers=(optimizer, get_cosine_schedule_with_warmup(optimizer, 0, args.max_steps)),
    )
    start = time.process_time()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    best = trainer.state.best_metric
    save_model(output, model if best is not None and best < before else load_pair(settings.model)[0], processor)
    return time.process_time() - start


@functools.cache
def _reference(data: str, split: str, bars: int) -> Reference:
    """Read the reference once per process."""
    return read_reference(data, split, bars)


class Measured(NamedTuple):
    """Values and floors, as [`numbers`] returns them, and the samples that can be used."""

    values: dict[str, float | None]
    floors: dict[str, float]
    scores: list[ScoreTick]


def numbers(figures: Mapping[str, Figure]) -> tuple[dict[str, float | None], dict[str, float]]:
    """The values by name, `None` for a missing one, and the floors that there are."""
    values = {name: figure.estimate.value for name, figure in figures.items()}
    floors = {name: figure.floor for name, figure in figures.items() if math.isfinite(figure.floor)}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}, floors


def figures_of(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    settings: Settings,
    split: str,
    temperature: float,
    seed: int,
) -> Measured:
    """All figures of `midimamba evaluate` that samples have."""
    sampling = SamplingOptions(
        settings.num, settings.bars, temperature=temperature, top_p=1.0, seed=seed, at_most=True
    )
    samples = Samples.of(generate_scores(model, processor, sampling))
    found = compare(samples, _reference(settings.data, split, settings.bars), settings.length, seed)
    repetition = {name: Figure(found.features[name].samples, found.features[name].real.value) for name in REPETITION}
    values, floors = numbers(found.figures | repetition)
    for kind, known in (("estimate", values), ("floor", floors)):
        accuracies = (known.get(f"classifier_{name}") for name in ("features", "tokens"))
        known["classifier"] = max(accuracy for accuracy in accuracies if accuracy is not None)
        known["mean_overlapping_area"] = mean_overlapping_area(found, kind)
    return Measured(values, floors, samples.scores)


def mean_overlapping_area(found: Comparison, kind: str) -> float:
    """The mean over the features that both sets have, for `kind` `"estimate"` (samples) or `"floor"` (real music)."""
    areas = [row.overlapping_area for row in found.features.values()]
    known = [area for area in areas if math.isfinite(area.estimate.value)]
    return sum(area.floor if kind == "floor" else area.estimate.value for area in known) / len(known)
