"""What a run made by the rule says at its end: what to try next, by its curve, and how to hear what it learned."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerState

_OVERFITTED = 0.7
"""A best evaluation before this fraction of the run means that the rest of it only learned by heart."""
_STILL_FALLING = 0.02
"""A loss that fell by this part of itself in the last third of the run would fall further."""
_BY_HEART = 0.3
"""Where the training loss is lower than the held-out one by this part of it, more music helps more than more time."""


def next_steps(state: "TrainerState") -> str:
    """What to try next, by the history of a run."""
    losses = [row["loss"] for row in state.log_history if "loss" in row]
    curve = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
    return advice(curve, losses[-1] if losses else math.nan, state.epoch or 0.0)


def advice(curve: Sequence[float], loss: float, epochs: float) -> str:
    """
    What to try next.

    Args:
        curve (`Sequence[float]`): held-out losses, in equal parts of the run.
        loss (`float`): the last training loss.
        epochs (`float`): how often every piece was read.
    """
    if len(curve) < 3:
        return "give it more music or more time: there is too little of either to tell what helps"
    best = min(range(len(curve)), key=curve.__getitem__)
    share = (best + 1) / len(curve)
    if share < _OVERFITTED:
        return (
            f"add music: the held-out loss was best after {share:.0%} of the run, then the model learned pieces by "
            "heart; without more music, try a smaller --size or a larger --weight_decay"
        )
    if loss < (1 - _BY_HEART) * curve[best]:
        return "add music: the model knows the training pieces far better than others, so more time would help little"
    before = curve[2 * len(curve) // 3 - 1]
    if before - curve[best] > _STILL_FALLING * before:
        return f"give it longer: the held-out loss still fell after {epochs:.1f} passes over the music"
    return "try a larger --size with more time, or add music: the held-out loss has levelled off"


def listening(folder: Path, discriminators: Sequence[Path] = ()) -> str:
    """The command that makes music with a model, and lets discriminators choose if there are any."""
    names = [shlex.quote(str(each)) for each in discriminators]
    choice = " ".join([" --discriminator", *names]) if names else ""
    out = shlex.quote(f"{folder}-samples")
    return f"midimamba generate {shlex.quote(str(folder))}{choice} --render --out {out}"
