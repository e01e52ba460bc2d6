"""`--push_to_hub` of the training scripts: one upload at the end, of what users load."""

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainingArguments

from midimamba.hub_cards.publish import check_target, publish
from midimamba.training.scripts import announce


def take_over_push(args: TrainingArguments, discriminators: Sequence[str] = ()) -> bool:
    """
    Whether to publish when training is done. Call it before a `Trainer` is made.

    `Trainer` would create the repository at once, and upload optimizer states and pickled arguments with their tokens.

    Args:
        args (`TrainingArguments`): `push_to_hub` is turned off.
        discriminators (`Sequence[str]`, *optional*): the kinds of those that are published as well, of
            [`~midimamba.hub_cards.publish.DISCRIMINATORS`].

    Raises:
        InputError: if the name is impossible or the token may not write, before hours of training.
    """
    push, args.push_to_hub = bool(args.push_to_hub), False
    if push and args.process_index == 0:
        check_target(_repository(args), discriminators=discriminators, token=args.hub_token)
    return push


def publish_run(args: TrainingArguments, folder: Path, discriminators: Sequence[Path] = ()) -> None:
    """
    Publish what a run has saved, and say where.

    Args:
        args (`TrainingArguments`): of the run; they name the repository.
        folder (`Path`): of the generator.
        discriminators (`Sequence[Path]`, *optional*): theirs.

    Raises:
        InputError: if the Hub cannot be reached or refuses. The run is saved in any case.
    """
    private = bool(args.hub_private_repo)
    done = publish(folder, _repository(args), discriminators=discriminators, private=private, token=args.hub_token)
    for url in done.urls.values():
        announce(f"published {url}")


def _repository(args: TrainingArguments) -> str:
    return args.hub_model_id or Path(args.output_dir or ".").resolve().name
