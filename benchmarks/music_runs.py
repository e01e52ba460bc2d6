"""One run of the benchmark `music.py`: everything that belongs to an arm and a seed, from the generator to figures."""

import copy
import functools
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from music_judging import Real, embedding_distance, embeddings, feature_accuracy, figures, first_openings, halve
from safetensors.torch import load_file
from torch import Tensor

from midimamba import MidiDiscriminator, MidiMambaForCausalLM
from midimamba.command_options import SamplingOptions
from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import BlockCollator
from midimamba.evaluation.comparison import Piece
from midimamba.evaluation.features import Vector, measure
from midimamba.evaluation.judges import Ensemble, MusicalJudge, auc, likelihood_gain, load_judges
from midimamba.evaluation.metrics import piece_nlls
from midimamba.evaluation.report_music import likelihood
from midimamba.evaluation.samples import decode_all
from midimamba.generation import draw_sequences, load_pair
from midimamba.launching import discriminators_of
from midimamba.modeling.resampling import choose, effective_sample_size
from midimamba.training.adversarial import discriminator_folder
from midimamba.training.checkpoint import DISCRIMINATOR_FILE
from midimamba.training.judging import MUSICAL_FOLDER
from resumable import Row
from tuning import read_recipe, train

DRAWS = 8
"""Of which best-of chooses one."""
RANDOM_WEIGHTINGS = 5


@dataclass(frozen=True)
class Settings:
    """
    What all runs have in common.

    Args:
        data (`str`): a corpus.
        split (`str`): the held-out split on which arms are measured.
        num, bars (`int`): pieces per figure, and bars per piece.
        temperatures (`list[float]`): that are tried on the validation split, once for each generator.
        steps (`int`): of pre-training.
        draws (`int`): of the generator, for the discriminators and again for the round of every trained arm.
    """

    data: str
    split: str = "validation"
    num: int = 500
    bars: int = 16
    temperatures: list[float] = field(default_factory=lambda: [0.6, 0.7, 0.8])
    steps: int = 2000
    draws: int = 3072


# Pre-training: the rule of `midimamba train` at its smallest size, with steps twice as large.
BASE: dict[str, Any] = {
    **{"size": "tiny", "sequence_length": 512, "lookback_bars": [1, 2, 4, 8, 16], "transpose": 5},
    **{"per_device_train_batch_size": 4, "learning_rate": 6e-3, "lr_scheduler_type": "cosine", "warmup_steps": 40},
    **{"weight_decay": 0.1, "max_grad_norm": 1.0, "eval_strategy": "steps", "save_strategy": "steps"},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False},
}
# More likelihood, for about as long as the other arms take.
MORE: dict[str, Any] = {"max_steps": 600, "learning_rate": 1e-3}
# Algorithm 1 with its Monte-Carlo roll-outs, at a few positions of short sequences: all of them would take days.
PAPER: dict[str, Any] = {
    **{"sequence_length": 128, "num_rollouts": 4, "rollout_positions": 8, "per_device_train_batch_size": 16},
    **{"max_steps": 30, "d_warmup_steps": 30, "d_steps": 2},
}
KNOWS_NOTHING: dict[str, Any] = {"musical_discriminator": False, "d_steps": 0}
# Every draw is learned from once.
EACH_ONCE: dict[str, Any] = {"draws_per_sample": 1, "ppo_epochs": 1}
POLICY_GRADIENT: dict[str, Any] = {
    **EACH_ONCE,
    **{"estimator": "terminal", "baseline": "leave-one-out", "ppo_clip": 0.2, "advantage_clip": 3.0},
    **{"learning_rate": 5e-4, "mini_batch_size": 32},
}
# Of four times the draws, twice as many are learned from: what the recipe has by now.
MORE_DRAWS: dict[str, Any] = {"draws_per_sample": 4, "ppo_epochs": 2}
# The arms that train a generator: how they differ from the recipe `distill-adversarial`.
TRAINED: dict[str, dict[str, Any]] = {
    "distilled": EACH_ONCE,
    "distilled, constant": {**EACH_ONCE, "reward": "constant", **KNOWS_NOTHING},
    "distilled, shuffled": {**EACH_ONCE, "reward": "shuffled"},
    "distilled, more draws": MORE_DRAWS,
    "distilled, more draws, constant": {**MORE_DRAWS, "reward": "constant", **KNOWS_NOTHING},
    "distilled, more draws, shuffled": {**MORE_DRAWS, "reward": "shuffled"},
    "policy gradient": POLICY_GRADIENT,
    "policy gradient, random": {**POLICY_GRADIENT, "reward": "random", **KNOWS_NOTHING},
    "policy gradient, shuffled": {**POLICY_GRADIENT, "reward": "shuffled"},
}
CHOSEN = "chosen"
"""The run of all arms that choose among draws of the generator itself."""
TAUGHT_AND_CHOSEN = {f"{arm}, best of 8": arm for arm in ("distilled", "distilled, more draws")}
"""Of a trained arm's draws its discriminators choose, those that were fitted to it after its round."""
NOT_REFITTED = "distilled, best of 8, not refitted"
"""Of draws of `distilled` those discriminators choose that have taught it."""
MLE = "mle"


def run(arm: str, seed: int, settings: Settings, folder: Path) -> Row:
    """Make a run: its cost, and figures on `settings.split`.

    Args:
        arm (`str`): one of `TRAINED`, `more`, `paper`, `TAUGHT_AND_CHOSEN`, [`NOT_REFITTED`], `"trial "` followed
            by options as JSON, or `CHOSEN`, whose row has the figures of many arms.
        seed (`int`): for generators, discriminators, samples and judges.
        settings (`Settings`): the settings of all runs.
        folder (`Path`): networks and pieces are kept here.
    """
    start = time.process_time()
    origin = Seed(settings, seed, folder)
    row: Row = {"arm": arm, "seed": seed, "settings": asdict(settings), "temperature": origin.temperature}
    if arm == CHOSEN:
        return row | origin.chosen() | {"cpu_seconds": round(time.process_time() - start)}
    if arm in (*TAUGHT_AND_CHOSEN, NOT_REFITTED):
        found = origin.taught_and_chosen(arm)
        return row | {"figures": found, "cpu_seconds": round(time.process_time() - start)}
    generator, seconds = origin.trained(arm)
    samples = origin.draw(generator, settings.num)[1]
    return row | {"figures": origin.measure(generator, samples), "cpu_seconds": round(seconds)}


class Seed:
    """
    The generator of a seed, with the halves of the music and a temperature; made once and kept.

    Args:
        settings (`Settings`): of all runs.
        seed (`int`): of everything.
        folder (`Path`): where it is kept.
    """

    def __init__(self, settings: Settings, seed: int, folder: Path):
        self.settings, self.seed, self.folder = settings, seed, folder / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data, self.half = halve(settings.data, 0, folder / "half")
        self.base = self.folder / "base"
        if not (self.base / "config.json").exists():
            self._run("pretrain", {**BASE, "data": settings.data, "max_steps": settings.steps}, self.base)
        self.temperature = self._temperature()

    def _run(self, script: str, options: Mapping[str, Any], output: Path) -> float:
        """Run a training script; the processor time in seconds."""
        trained = train({**options, "seed": self.seed}, output, script)
        if trained.failed:
            raise RuntimeError(f"{script} of {output} failed:\n{trained.printed}")
        return trained.cpu_seconds

    def _temperature(self) -> float:
        """The temperature at which the generator is closest to the validation split."""
        file = self.folder / "temperature.json"
        if not file.exists():
            real = self.real("validation")
            tried = {}
            for each in self.settings.temperatures:
                samples = self.draw(self.base, self.settings.num // 2, each)[1]
                tried[each] = feature_accuracy(measure([piece.score for piece in samples]), real)
            best = min(tried, key=lambda each: tried[each])
            file.write_text(json.dumps({"best": best, "tried": tried}))
        return float(json.loads(file.read_text())["best"])

    def real(self, split: str) -> Real:
        return _real(self.settings.data, str(self.data), split, self.settings.bars)

    def draw(self, generator: Path, num: int, temperature: float | None = None) -> tuple[list[list[int]], list[Piece]]:
        """Pieces of a generator: their tokens, and their openings. What is not music is left out of both."""
        model, processor = load_pair(str(generator))
        options = SamplingOptions(
            num, bars=self.settings.bars, temperature=temperature or self.temperature, top_p=1.0, seed=self.seed
        )
        sequences, pieces = [], []
        for ids in draw_sequences(model, processor, options):
            scores = decode_all(processor, [ids]).scores
            if found := first_openings(processor, scores, self.settings.bars):
                sequences.append(ids)
                pieces.append(found[0])
        return sequences, pieces

    def measure(self, generator: Path, samples: list[Piece]) -> dict[str, float]:
        """Figures of samples, and the held-out likelihood of the generator that they are from."""
        model, learned = self._embedded
        return {
            **figures(samples, self.real(self.settings.split), self.seed),
            "embedding_frechet": embedding_distance(model, samples, learned),
            "held_out_nll_per_token": _held_out_nll(str(generator), self.settings.data, self.settings.split),
        }

    @functools.cached_property
    def _embedded(self) -> tuple[MidiMambaForCausalLM, Vector]:
        """The generator of the seed, and what it holds of the music that the judges learn from."""
        model = load_pair(str(self.base))[0]
        return model, embeddings(model, self.real(self.settings.split).learned)

    # ---- arms that train ----

    def trained(self, arm: str) -> tuple[Path, float]:
        """The generator of an arm, and what it cost in seconds of processor time."""
        output = self.folder / hashlib.sha256(arm.encode()).hexdigest()[:8]
        cost = output.with_suffix(".cost")
        if not cost.exists():
            cost.write_text(str(self._train(arm, output)))
        return output, float(cost.read_text())

    def _train(self, arm: str, output: Path) -> float:
        given = {"model": str(self.base), "data": str(self.data), "temperature": self.temperature}
        if arm == "more":
            options = {name: value for name, value in BASE.items() if name not in ("size", "lookback_bars")}
            return self._run(
                "pretrain", {**options, "model": str(self.base), "data": self.settings.data, **MORE}, output
            )
        if arm == "paper":
            return self._run("adversarial", {**read_recipe("paper-adversarial"), **given, **PAPER}, output)
        recipe = {**read_recipe("distill-adversarial"), **given, "bars": self.settings.bars}
        recipe["per_device_train_batch_size"] = self.settings.draws
        chosen = json.loads(arm.removeprefix("trial ")) if arm.startswith("trial ") else TRAINED[arm]
        return self._run("adversarial", {**recipe, **chosen}, output)

    # ---- arms that choose ----

    def judges(self) -> list[Path]:
        """Discriminators of the generator itself: those of the only round of `distilled`, from its checkpoint."""
        output, _ = self.trained("distilled")
        (checkpoint,) = output.glob("checkpoint-*")
        tokens = Path(f"{output}-round-discriminator")
        if not (tokens / "config.json").exists():
            discriminator = MidiDiscriminator.from_pretrained(discriminator_folder(output))
            discriminator.load_state_dict(load_file(checkpoint / DISCRIMINATOR_FILE))
            discriminator.save_pretrained(tokens)
        return [tokens, checkpoint / MUSICAL_FOLDER]

    def draw_groups(self, generator: Path) -> tuple[list[list[int]], list[Piece]]:
        """As `draw`, in whole groups of `DRAWS`."""
        sequences, pieces = self.draw(generator, DRAWS * self.settings.num)
        kept = len(pieces) // DRAWS * DRAWS
        return sequences[:kept], pieces[:kept]

    def taught_and_chosen(self, arm: str) -> dict[str, float]:
        """The figures of one of `TAUGHT_AND_CHOSEN` or of [`NOT_REFITTED`]."""
        generator, _ = self.trained(TAUGHT_AND_CHOSEN.get(arm, "distilled"))
        sequences, pieces = self.draw_groups(generator)
        judges = load_judges(
            self.judges() if arm == NOT_REFITTED else discriminators_of(generator), load_pair(str(generator))[1]
        )
        log_odds = Ensemble(judges).log_odds(sequences)
        return self.measure(generator, taken(pieces, choose(log_odds.view(-1, DRAWS), "resample", self.seed)))

    def chosen(self) -> dict[str, Any]:
        """One of every `DRAWS` draws, by discriminators and by controls."""
        sequences, pieces = self.draw_groups(self.base)
        count = len(pieces) // DRAWS
        model, processor = load_pair(str(self.base))
        judges = load_judges(self.judges(), processor)
        musical = judges[1]
        assert isinstance(musical, MusicalJudge)
        each = [judge.log_odds(sequences) for judge in judges]
        both = torch.stack(each).sum(0)
        weightings = {
            MLE: torch.zeros(len(both)),
            "best of 8": both,
            "best of 8, tokens": each[0],
            "best of 8, music": each[1],
            "best of 8, shuffled": both[torch.randperm(len(both), generator=torch.Generator().manual_seed(self.seed))],
            **{
                f"best of 8, random {k}": _random_weighting(musical, pieces, both, k) for k in range(RANDOM_WEIGHTINGS)
            },
        }
        likely = -torch.tensor(piece_nlls(model, sequences, BlockCollator.for_processor(processor))[0])
        picks = {
            name: choose(weights.view(count, DRAWS), "resample", self.seed) for name, weights in weightings.items()
        }
        picks["best of 8, likelihood"] = likely.view(count, DRAWS).argmax(1)
        found = {}
        for name, places in picks.items():
            found[name] = self.measure(self.base, taken(pieces, places))
        held_out = Ensemble(judges).log_odds(
            [[processor.bos_token_id, *p.ids] for p in self.real(self.settings.split).held_out]
        )
        return {
            "arms": found,
            "effective": float(effective_sample_size(both.view(count, DRAWS)).mean()),
            "auc": auc(held_out, both),
            "likelihood_gain": likelihood_gain(held_out, both),
        }


def taken(pieces: list[Piece], places: Tensor) -> list[Piece]:
    """Of every group of `DRAWS` pieces the one at its place."""
    return [pieces[group * DRAWS + place] for group, place in enumerate(places.tolist())]


def _random_weighting(judge: MusicalJudge, pieces: list[Piece], like: Tensor, seed: int) -> Tensor:
    """Log-odds of a musical discriminator with random weights, with the deviation that the real ones have."""
    random = copy.deepcopy(judge.discriminator)
    with torch.no_grad():
        random.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    random.calibration.set(1.0, 0.0)
    log_odds = MusicalJudge(random, judge.processor).of_scores([piece.score for piece in pieces])
    return log_odds / log_odds.std() * like.std()


@functools.cache
def _held_out_nll(generator: str, data: str, split: str) -> float:
    """In nats per token, once for each generator: many sets of samples are from the same one."""
    model, processor = load_pair(generator)
    return likelihood(model, load_corpus(data)[0][split], BlockCollator.for_processor(processor))["held_out_nll"]


@functools.cache
def _real(data: str, half: str, split: str, bars: int) -> Real:
    return Real.read(data, halve(data, 0, Path(half))[1], split, bars)
