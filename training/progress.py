"""Bars within a round, which may take minutes."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm.auto import tqdm
from transformers import TrainingArguments

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
