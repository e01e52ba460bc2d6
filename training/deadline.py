"""Training that ends in time: the learning rate falls to its end, and the run stops, when the time is spent."""

import os
import time
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from midimamba.errors import InputError
from midimamba.training.plan import EVALUATIONS, PATIENCE

STARTED = "MIDIMAMBA_STARTED"
"""The environment variable with the time (in seconds, as `time.time` has it) at which a command was given."""
_IMPORTED = time.time()
_RESERVE, _LEAST_RESERVE, _MOST_RESERVE = 0.1, 1.0, 60.0
_CHOOSING = 0.75
"""The part of what is kept in which music is drawn to choose a temperature. The rest is for comparing and saving."""


def ending(minutes: float) -> float:
    """When a run of so many minutes has to end, as `time.time` has it. They count from the command that started it."""
    return float(os.environ.get(STARTED, _IMPORTED)) + 60 * minutes


def seconds_to_train(minutes: float) -> float:
    """What is left for training from now on.

    A tenth of the time, up to a minute, is kept for what comes after it: choosing a temperature, saving.
    """
    return max(ending(minutes) - _reserve(minutes) - time.time(), 0.0)


def time_to_choose(minutes: float) -> float:
    """Until when music may be drawn to choose a temperature, as `time.time` has it."""
    return ending(minutes) - (1 - _CHOOSING) * _reserve(minutes)


def _reserve(minutes: float) -> float:
    return min(max(_RESERVE * 60 * minutes, _LEAST_RESERVE), _MOST_RESERVE)


def endings(minutes: float | None, stops_early: bool) -> list[TrainerCallback]:
    """What ends a run before its steps do. The time for training counts from now on.

    Args:
        minutes (`float`, *optional*): the time that the user gave.
        stops_early (`bool`): whether evaluations that are no better than an earlier one end the run.

    Raises:
        InputError: if a time is given and there are several processes, whose clocks would not agree.
    """
    if minutes is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("minutes ends a run of one process: give max_steps in its place, or start one process")
    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(PATIENCE)] if stops_early else []
    if minutes is not None:
        callbacks.append(Deadline(seconds_to_train(minutes), 60 * minutes))
    return callbacks


class Deadline(TrainerCallback, ExportableState):
    """
    Ends a run when its time is spent, after a last evaluation and a last checkpoint.

    How far a run is, is the larger of two fractions: that of its steps and that of its time. The learning rate is that
    of the schedule which the options name, read there. So it falls to its end at the deadline, however slow the
    machine becomes meanwhile. A run that resumes goes on with the time that the interrupted one had left.

    Args:
        seconds (`float`): for training, with its evaluations and checkpoints.
        total (`float`, *optional*, defaults to `seconds`): what the user gave, of which `seconds` is left after
            reading and before saving. A run that resumes takes the difference from the interrupted one.
        evaluations (`int`, *optional*, defaults to 16): evaluate and save after each of this many equal parts, as far
            as the options let the run evaluate and save at all.
        clock (`Callable[[], float]`, *optional*, defaults to `time.monotonic`): seconds from any origin.
    """

    def __init__(
        self,
        seconds: float,
        total: float | None = None,
        evaluations: int = EVALUATIONS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.seconds = seconds
        self.total = seconds if total is None else total
        self.evaluations = evaluations
        self.clock = clock
        self.before = 0.0  # seconds, spent by the runs that this one resumes
        self.ended = False
        self._started: float | None = None
        self._evaluated = 0
        self._asked: float | None = None  # when it asked for an evaluation and a checkpoint
        self._closing = 0.0  # seconds that these take at most

    @property
    def spent(self) -> float:
        """Seconds of training, those of the interrupted run included."""
        return self.before + (0.0 if self._started is None else self.clock() - self._started)

    def fraction(self, state: TrainerState) -> float:
        """How far the run is, from 0 to 1."""
        by_time = self.spent / max(self.seconds - self._closing, 1e-9)
        return min(1.0, max(by_time, state.global_step / max(state.max_steps, 1)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {"before": self.spent, "ended": self.ended}
        return {"args": {"seconds": self.seconds, "total": self.total}, "attributes": kept}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self.clock()
        callbacks: Any = state.stateful_callbacks  # transformers types it as a list; it is a dict of names
        kept = callbacks.get(type(self).__name__) if callbacks else None
        if state.global_step and isinstance(kept, dict):
            theirs, attributes = kept["args"], kept["attributes"]
            self.before = attributes["before"]
            self.seconds = max(self.total - (theirs["total"] - theirs["seconds"]), 0.0)
            if attributes["ended"] and self.total <= theirs["total"]:
                state.max_steps = state.global_step  # nothing is left to train
        self._evaluated = self._parts(state)
        self._follow(kwargs.get("lr_scheduler"), state)

    def _follow(self, scheduler: Any, state: TrainerState) -> None:
        """Let a schedule by steps read how far the run is by time as well."""
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
        if not isinstance(scheduler, LambdaLR):
            return

        def by_time(by_step: Callable[[Any], float]) -> Callable[[float], float]:
            return lambda step: by_step(max(step, self.fraction(state) * state.max_steps))

        scheduler.lr_lambdas = [by_time(by_step) for by_step in scheduler.lr_lambdas]

    def _parts(self, state: TrainerState) -> int:
        return int(self.fraction(state) * self.evaluations)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.ended = self.fraction(state) >= 1
        if self.ended or self._parts(state) > self._evaluated:
            self._evaluated = self._parts(state)
            control.should_evaluate |= args.eval_strategy != IntervalStrategy.NO
            control.should_save |= args.save_strategy != SaveStrategy.NO
            self._asked = self.clock()
        control.should_training_stop |= self.ended
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._asked is not None:
            self._closing = max(self._closing, self.clock() - self._asked)
            self._asked = None
