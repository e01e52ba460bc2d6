"""What makes a run go back: numbers that are not finite, likelihood that drifts, samples that grow alike."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from midimamba.files import read_json, write_whole
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.sharding import own_part
from midimamba.training.whole_checkpoints import output_folder

ROLLBACKS_FILE = "rollbacks.json"

MAX_ROLLBACKS = 3
"""How often a run goes back before it ends with its last good checkpoint."""


class DivergedError(Exception):
    """The run has gone wrong; the message says what was measured and what is allowed."""


class Guard:
    """
    Watches a run, and remembers what to go back to and how often that was done.

    All processes of a run raise together: whatever one of them finds counts for all.

    Args:
        args (`AdversarialConfig`): the bounds.
        accelerator (`Accelerator`): the trainer's.

    Attributes:
        reference (`dict[str, float]`): what the pre-trained generator measured; empty before its evaluation.
        rollbacks (`int`): how often the run went back. Learning rates are halved as often.
        last_good (`Path`, *optional*): the checkpoint to go back to.
    """

    def __init__(self, args: AdversarialConfig, accelerator: Accelerator):
        self.accelerator = accelerator
        bounds = (("eval_loss", args.max_nll_drift), ("eval_self_bleu_4", args.max_self_bleu_increase))
        self._bounds = {name: bound for name, bound in bounds if bound is not None}
        self._file = output_folder(args) / ROLLBACKS_FILE
        self._watched: list[str] = []
        self._flags = torch.zeros(0)  # one tensor for all of them, see `RunningMeans`
        self.reference: dict[str, float] = {}
        self.rollbacks = 0
        self.last_good: Path | None = None

    def begin(self, checkpoint: str | None) -> None:
        """A run starts, or goes on from a checkpoint: then the roll-backs after that checkpoint count as well."""
        self.last_good = None if checkpoint is None else Path(checkpoint)
        if checkpoint is not None and self._file.exists():
            self.rollbacks = int(read_json(self._file).get("rollbacks", 0))
        elif self.accelerator.is_main_process:
            self._file.unlink(missing_ok=True)

    def roll_back(self) -> None:
        """Count a roll-back, on the disk as well: a run that is killed before its next checkpoint does not forget."""
        self._watched.clear()
        self.rollbacks += 1
        if self.accelerator.is_main_process:
            write_whole(self._file, json.dumps({"rollbacks": self.rollbacks}))

    def watch(self, what: str, values: Tensor) -> None:
        """Remember that values have to be finite. Nothing waits for the device here; see [`~Guard.flags`]."""
        self._remember(what, ~values.detach().isfinite().all())

    def watch_weights(self, parameters: Iterable[Tensor]) -> None:
        """The same for all weights; of those that are sharded, this process's part."""
        finite = torch.stack([own_part(parameter.detach()).isfinite().all() for parameter in parameters])
        self._remember("a weight", ~finite.all())

    def _remember(self, what: str, is_wrong: Tensor) -> None:
        if len(self._watched) == len(self._flags):
            more = torch.zeros(max(64, len(self._flags)), device=is_wrong.device)
            self._flags = torch.cat([self._flags.to(is_wrong.device), more])
        self._flags[len(self._watched)] = is_wrong
        self._watched.append(what)

    def flags(self) -> Tensor:
        """For everything that is watched, in how many processes it is not finite; on the device, `(n,)`."""
        flags: Tensor = self.accelerator.reduce(self._flags[: len(self._watched)].clone(), "sum")
        return flags

    def check_flags(self, flags: Sequence[float]) -> None:
        """Judge the step by its flags, brought over from the device.

        Raises:
            DivergedError: if something is infinite or NaN in any process.
        """
        names, self._watched = self._watched, []
        for what, flag in zip(names, flags, strict=True):
            if flag:
                raise DivergedError(f"{what} is not finite")

    def check_evaluation(self, metrics: dict[str, float]) -> None:
        """The first evaluation of a run, before its first step, is what later ones are compared with.

        Raises:
            DivergedError: if a bound is broken.
        """
        if not self.reference:
            self.reference = {name: metrics[name] for name in self._bounds}
        for name, bound in self._bounds.items():
            start, value = self.reference.get(name, metrics[name]), metrics[name]
            limit = start * (1 + bound) if name == "eval_loss" else start + bound
            # NaN is not below any limit.
            message = f"{name} is {value:.4f}, above its bound of {limit:.4f} (it was {start:.4f} at the start)"
            self._raise_together(not value <= limit, message)

    def _raise_together(self, is_wrong: bool, message: str) -> None:
        wrong = torch.tensor(float(is_wrong), device=self.accelerator.device)
        if self.accelerator.reduce(wrong, "sum").item():
            raise DivergedError(message if is_wrong else f"{message} in another process")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        return {"reference": self.reference, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> float:
        """Go on from a checkpoint. Returns what its learning rates are to be multiplied by."""
        self.reference = state["reference"]
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        return math.ldexp(1.0, state["rollbacks"] - self.rollbacks)


def scale_learning_rates(optimizer: Any, factor: float, scheduler: Any = None) -> None:
    """Multiply the rates of an optimizer, and those from which its scheduler computes the next ones."""
    for group in optimizer.param_groups:
        for name in {"lr", "initial_lr"} & group.keys():
            group[name] *= factor
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = [rate * factor for rate in scheduler.get_last_lr()]  # what Trainer logs
