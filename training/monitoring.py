"""What a person watches during a run: rewards over time, memory, measures of samples, and the samples themselves."""

import sys
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from midimamba.corpus.packing import stack_blocks
from midimamba.errors import InputError
from midimamba.evaluation.copying import COPIED_TOKENS, CopyRate
from midimamba.evaluation.metrics import discriminator_accuracy, distinct_n, self_bleu
from midimamba.evaluation.rendering import draw_piano_roll, import_demo
from midimamba.files import write_whole
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.sampling import Ending, Sequences
from midimamba.modeling.scoring import score
from midimamba.text import show
from midimamba.tokenization.processor import MidiProcessor
from midimamba.training.adversarial_config import AdversarialConfig

LOGGED_SAMPLES = 4
"""Samples of an evaluation that are written as MIDI and as piano rolls."""


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far, in MB of 2^20 bytes: of the graphics card if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return 0.0  # the standard library does not tell
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def spread_blocks(dataset: Any, count: int) -> Tensor:
    """`count` blocks, evenly spread over a data set, `(count, time)`; all if there are fewer."""
    count = min(count, len(dataset))
    return stack_blocks([dataset[index * len(dataset) // count] for index in range(count)])


class Monitor:
    """
    Measures a run on music that it does not train on, and what it has copied of the music that it does.

    Args:
        args (`AdversarialConfig`): the options.
        discriminator (`MidiDiscriminator`): without the wrappers of distributed training.
        train_dataset (`Dataset`): training blocks.
        eval_dataset (`Dataset`): held-out blocks.
        ending (`Ending`): sequences are measured up to their end.
    """

    def __init__(
        self,
        args: AdversarialConfig,
        discriminator: MidiDiscriminator,
        train_dataset: Any,
        eval_dataset: Any,
        ending: Ending,
    ):
        self.args = args
        self.discriminator = discriminator
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.ending = ending

    def measure_log(self) -> dict[str, float]:
        """What changes from log to log rather than from step to step.

        `d_accuracy_held_out` is how often the discriminator takes a batch of held-out music, always the same, for
        real: if that is far below its accuracy on training music, it knows the training music by heart.
        `memory_mb_max` is the peak.
        """
        log_odds = score(self.discriminator, self._held_out.ids, self._held_out.mask)
        return {
            "d_accuracy_held_out": (log_odds > 0).float().mean().item(),
            "memory_mb_max": peak_memory_mb(self.args.device),
        }

    def measure(self, real: Tensor, fake: Tensor) -> tuple[dict[str, float], list[list[int]]]:
        """
        Measures of samples `(count, time)` beside as much held-out music, up to their ends if they have any.

        Returns:
            `dict[str, float]` and the samples without padding: the accuracies of the discriminator (`d_accuracy…`),
            `distinct_1` … `distinct_4`, `self_bleu_4`, and the copy rates of the samples and of the music: music that
            copies nothing shares that much.
        """
        masks = (self._judged(real).mask, self._judged(fake).mask)
        accuracy = discriminator_accuracy(self.discriminator, real, fake, masks=masks)
        music, samples = (_without_padding(rows, mask) for rows, mask in zip((real, fake), masks, strict=True))
        longest = max(map(len, samples))
        measures = {
            **{f"d_{name}": value for name, value in accuracy.items()},
            **{f"distinct_{n}": distinct_n(samples, n) if longest >= n else 0.0 for n in (1, 2, 3, 4)},
            "self_bleu_4": self_bleu(samples, 4),
            f"copied_{COPIED_TOKENS}": self._copy_rate(samples),
            f"copied_{COPIED_TOKENS}_real": self._copy_rate(music),
        }
        return measures, samples

    @cached_property
    def _held_out(self) -> Sequences:
        blocks = spread_blocks(self.eval_dataset, self.args.per_device_train_batch_size)
        return self._judged(blocks.to(self.args.device))

    @cached_property
    def _copy_rate(self) -> CopyRate:
        return CopyRate(self.train_dataset)

    def _judged(self, ids: Tensor) -> Sequences:
        return Sequences(ids, self.ending.mask(ids, self.args.prompt_length))


def _without_padding(sequences: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[:count] for row, count in zip(sequences.tolist(), mask.sum(1).tolist(), strict=True)]


class SampleLog:
    """
    Writes samples as MIDI and as piano rolls, and shows those in TensorBoard, trackio and wandb if they are on.

    Args:
        folder (`Path`): gets a folder `step-N` for every evaluation.
        processor (`ProcessorMixin`, *optional*): decodes samples; nothing is written without a
            [`MidiProcessor`].
        callbacks (`CallbackHandler`): the trainer's, among which those that `report_to` adds may be.
    """

    def __init__(self, folder: Path, processor: ProcessorMixin | None, callbacks: CallbackHandler):
        self.folder = folder
        self.processor = processor
        self.callbacks = callbacks
        self._draws = True

    def write(self, step: int, samples: list[list[int]]) -> None:
        """Write the first samples of an evaluation. Without matplotlib there are no pictures, and one line says so."""
        if not isinstance(self.processor, MidiProcessor):
            return
        for index, ids in enumerate(samples[:LOGGED_SAMPLES]):
            file = self.folder / f"step-{step}" / f"{index}.mid"
            try:
                score = self.processor.decode(ids)
            except ValueError as error:
                show(f"sample {index} of step {step} is not written: {error}", file=sys.stderr)
                continue
            write_whole(file, score.dumps_midi())
            if self._draws:
                self._draw(score, file.with_suffix(".png"), step)

    def _draw(self, score: Any, file: Path, step: int) -> None:
        try:
            draw_piano_roll(score, file, f"step {step}")
        except InputError as error:
            self._draws = False
            show(f"samples are written without piano rolls: {error}", file=sys.stderr)
            return
        for callback in self.callbacks.callbacks:
            for kind, add in _TRACKERS.items():
                if isinstance(callback, kind):
                    add(callback, file, step)


def _add_to_tensorboard(callback: Any, file: Path, step: int) -> None:
    if callback.tb_writer is not None:
        image = import_demo("matplotlib.image").imread(file)
        callback.tb_writer.add_image(f"samples/{file.stem}", image, step, dataformats="HWC")


def _add_to_trackio(callback: Any, file: Path, step: int) -> None:
    trackio = import_module("trackio")
    if trackio.context_vars.current_run.get() is not None:
        _log_image(trackio, file, step)


def _add_to_wandb(callback: Any, file: Path, step: int) -> None:
    wandb = import_module("wandb")
    if wandb.run is not None:
        _log_image(wandb, file, step)


def _log_image(tracker: Any, file: Path, step: int) -> None:
    """Log a picture to trackio or wandb, whose functions are alike, at the step under which `Trainer` logs figures."""
    picture = tracker.Image(str(file), caption=f"step {step}")
    tracker.log({f"samples/{file.stem}": picture, "train/global_step": step})


# How a picture is shown, by the callback that `report_to` adds to a trainer.
_TRACKERS: dict[type, Callable[[Any, Path, int], None]] = {
    TensorBoardCallback: _add_to_tensorboard,
    TrackioCallback: _add_to_trackio,
    WandbCallback: _add_to_wandb,
}
