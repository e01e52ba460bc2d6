"""One run of the benchmark `repetition.py`: train a new generator, keep it, and measure it."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import set_seed

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import SamplingOptions
from midimamba.corpus.augmentation import Augmentation, EpochBlocks
from midimamba.corpus.packing import BlockCollator
from midimamba.evaluation.comparison import Comparison, compare, read_reference
from midimamba.evaluation.report_music import likelihood
from midimamba.generation import generate_samples, load_pair
from midimamba.modeling.mamba_mixer import MidiMambaMixer
from midimamba.tokenization.sampling_limits import give_sampling_defaults
from midimamba.training.plan import LAGS, TRANSPOSE
from midimamba.training.pretrain import PretrainArguments, new_config
from midimamba.training.scripts import load_blocks, save_model
from midimamba.training.temperature import choose_temperature
from resumable import Row

REPETITION = ("bar_self_similarity_4", "bar_self_similarity_8")


@dataclass(frozen=True)
class Arm:
    """
    A kind of generator.

    Args:
        layout (`str`): its layout.
        looks_back (`bool`): with look-back embeddings.
        mimetic (`bool`): with mimetic initialisation.
    """

    layout: str
    looks_back: bool = False
    mimetic: bool = False


ARMS = {
    "mamba": Arm("mamba"),
    "mamba, mimetic": Arm("mamba", mimetic=True),
    "mamba, look-back": Arm("mamba", looks_back=True),
    "hybrid": Arm("hybrid"),
    "hybrid, look-back": Arm("hybrid", looks_back=True),
    "transformer": Arm("transformer"),
    "transformer, look-back": Arm("transformer", looks_back=True),
}


@dataclass(frozen=True)
class Training:
    """
    What all runs have in common.

    Args:
        data (`str`): the corpus.
        size (`str`): the size of every generator.
        length, batch_size (`int`): tokens per block, and blocks per step.
        learning_rate (`float`): the highest of a cycle that ends near 0.
        seconds (`float`): the processor time of a run.
        num, bars (`int`): pieces that are sampled for every figure, and bars per piece that are compared.
        temperatures (`list[float]`): the temperatures that are tried on the validation split; if there are none,
            samples are drawn at 1.
    """

    data: str
    size: str = "tiny"
    length: int = 512
    batch_size: int = 8
    learning_rate: float = 3e-3
    seconds: float = 150.0
    num: int = 96
    bars: int = 16
    temperatures: list[float] = field(default_factory=lambda: [0.6, 0.7, 0.8, 0.9, 1.0])


def new_generator(arm: Arm, processor: MidiProcessor, size: str) -> MidiMambaForCausalLM:
    """A generator of an arm with random weights."""
    lags = list(LAGS) if arm.looks_back else []
    arguments = PretrainArguments(data="", layout=arm.layout, size=size, lookback_bars=lags)
    model = MidiMambaForCausalLM(new_config(arguments, processor))
    give_sampling_defaults(model.generation_config)
    if arm.mimetic:
        for module in model.modules():
            if isinstance(module, MidiMambaMixer):
                mimic_attention(module)
    return model


@torch.no_grad()
def mimic_attention(mixer: MidiMambaMixer) -> None:
    """
    Let a Mamba mixer begin close to linear attention, so that it learns to recall (Trockman et al. 2024,
    arXiv 2410.11135): the convolution passes its input on, a step is 1, the state hardly decays, and what is read is
    what was written for the same input, because B and C begin with the same weights.
    """
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1
    mixer.dt_proj.weight.zero_()
    mixer.dt_proj.bias.fill_(math.log(math.e - 1))  # softplus of it is 1
    mixer.A_log.fill_(math.log(1e-3))
    _, written, read = mixer.x_proj.weight.split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size])
    read.copy_(written)


def costs(training: Training, rounds: int = 9) -> dict[str, dict[str, float]]:
    """Median processor time of a training step and of a sampled token for 16 sequences, and the size, of every arm.

    The arms take turns, so that load falls on all alike.
    """
    blocks, _, processor = load_blocks(training.data, training.length, Augmentation(), 0)
    batch = BlockCollator.for_processor(processor)([blocks[i % len(blocks)] for i in range(training.batch_size)])
    prompt = torch.tensor([blocks[i % len(blocks)]["input_ids"] for i in range(16)])
    learners = {name: Learner(new_generator(arm, processor, training.size), 1e-4, 1000) for name, arm in ARMS.items()}
    steps: dict[str, list[float]] = {name: [] for name in ARMS}
    tokens: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(rounds):
        for name, learner in learners.items():
            start = time.process_time()
            learner.learn(batch)
            steps[name].append(time.process_time() - start)
            tokens[name].append(_token_seconds(learner.model, prompt))
    return {
        name: {
            "parameters": learner.model.num_parameters(),
            "step_seconds": statistics.median(steps[name]),
            "token_seconds": statistics.median(tokens[name]),
        }
        for name, learner in learners.items()
    }


@torch.no_grad()
def _token_seconds(model: MidiMambaForCausalLM, prompt: Tensor, count: int = 32) -> float:
    """Processor time per token that is read onto a state, behind the rest of a prompt."""
    model.eval()
    state = model.make_state(len(prompt), prompt.shape[1])
    model.next_logits(prompt[:, :-count], state)
    start = time.process_time()
    for index in range(prompt.shape[1] - count, prompt.shape[1]):
        model.next_logits(prompt[:, index : index + 1], state)
    seconds = time.process_time() - start
    model.train()
    return seconds / count


def run(arm: str, seed: int, training: Training, steps: Mapping[str, int], folder: Path) -> Row:
    """Train a generator of an arm unless it is there already, and measure it.

    Args:
        arm (`str`): one of `ARMS`.
        seed (`int`): for training, samples and figures.
        training (`Training`): what all runs have in common.
        steps (`Mapping[str, int]`): the training steps of every arm.
        folder (`Path`): generators are kept here, in a folder `<arm>-<seed>`.
    """
    kept = folder / f"{arm}-{seed}"
    if not (kept / "config.json").exists():
        train(arm, seed, training, steps[arm], kept)
    model, processor = load_pair(str(kept))
    if training.temperatures:
        choose_temperature(model, processor, training.data, training.temperatures)
    reference = read_reference(training.data, "test", training.bars)
    nats = likelihood(model, reference.rows, BlockCollator.for_processor(processor))
    samples = generate_samples(model, processor, SamplingOptions(training.num, bars=training.bars, seed=seed))
    found = compare(samples, reference, seed=seed)
    form = {name: found.features[name] for name in REPETITION}
    copies = found.figures["copied_runs_12"]
    return {
        "arm": arm,
        "seed": seed,
        "settings": asdict(training),
        "steps": steps[arm],
        "temperature": model.generation_config.temperature,
        "test": {
            "held_out_nll_per_token": nats["held_out_nll"],
            "held_out_nll_per_note": nats["held_out_nll_per_note"],
            **{name: figures.samples.value for name, figures in form.items()},
            "copied_runs_12": copies.estimate.value,
            "mean_overlapping_area": mean_overlapping_area(found),
        },
        "real": {
            **{name: figures.real.value for name, figures in form.items()},
            "copied_runs_12": copies.floor,
        },
    }


def train(arm: str, seed: int, training: Training, steps: int, output: Path) -> None:
    """Train a generator of an arm for a number of steps, and save it."""
    augmentation = Augmentation(transpose=TRANSPOSE)
    blocks, _, processor = load_blocks(training.data, training.length, augmentation, seed)
    collator = BlockCollator.for_processor(processor)
    set_seed(seed)
    learner = Learner(new_generator(ARMS[arm], processor, training.size), training.learning_rate, steps)
    order, epoch = list[int](), 0
    for _ in range(steps):
        if len(order) < training.batch_size:
            assert isinstance(blocks, EpochBlocks)  # keys change
            blocks.set_epoch(epoch)
            order, epoch = torch.randperm(len(blocks)).tolist(), epoch + 1
        learner.learn(collator([blocks[order.pop()] for _ in range(training.batch_size)]))
    save_model(output, learner.model, processor)


class Learner:
    """A generator and what trains it."""

    def __init__(self, model: MidiMambaForCausalLM, learning_rate: float, steps: int):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
        self.schedule = OneCycleLR(self.optimizer, learning_rate, total_steps=steps, pct_start=0.05)

    def learn(self, batch: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def mean_overlapping_area(found: Comparison) -> float:
    """The mean over the features that both sets have."""
    areas = [row.overlapping_area.estimate.value for row in found.features.values()]
    return statistics.fmean(area for area in areas if math.isfinite(area))
