"""What a terminal shows during a run: bars within a round, which may take minutes, and lines of figures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

Part = TypeVar("Part")


def progress(parts: Sequence[Part], description: str, args: TrainingArguments) -> Iterable[Part]:
    """The parts of a round one after another, with a bar that goes away if there are several.

    Args:
        parts (`Sequence`): what a loop runs through.
        description (`str`): what stands before the bar.
        args (`TrainingArguments`): `disable_tqdm` turns bars off. Only the first process shows any.
    """
    hidden = args.disable_tqdm or args.process_index != 0 or len(parts) < 2
    return tqdm(parts, desc=description, leave=False, disable=hidden)


class ProgressLines(ProgressCallback):
    """The bars of `Trainer`, with figures as lines of text. By default they are dictionaries of strings."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line_of_figures(state.global_step, logs or {}))


def line_of_figures(step: int, figures: Mapping[str, Any]) -> str:
    """Figures of a step in a line: names and values, floats with four digits. The app reads these lines."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in figures.items()}
    shown.pop("total_flos", None)
    return "  ".join(f"{name} {value}" for name, value in {"step": step, **shown}.items())


def show_lines(trainer: Trainer) -> None:
    """Let a trainer write figures as lines of text, if it shows bars at all."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLines())
