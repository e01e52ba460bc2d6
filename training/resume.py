"""Which checkpoint a run goes on from, and whether it is a checkpoint of that run."""

import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel, TrainingArguments

from midimamba.errors import InputError
from midimamba.files import locked
from midimamba.modeling.stock_names import plain_name
from midimamba.training.adversarial_config import OPTION_GROUPS
from midimamba.training.process import is_main_process, stoppable
from midimamba.training.scripts import announce
from midimamba.training.whole_checkpoints import (
    LITTER,
    checkpoints_in,
    choose_checkpoint,
    fault_of,
    output_folder,
    remove,
    seal_of,
)

# Options of Trainer on which the weights depend, but for the length of the run, which may grow.
_TRAINER_OPTIONS = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"),
    *("neftune_noise_alpha", "bf16", "fp16", "gradient_checkpointing"),
)
_LENGTH = ("max_steps", "num_train_epochs", "minutes")
# How a batch comes about. With the number of processes, their product counts.
_SHARES = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Folders may be moved; what is in them is compared instead. What an evaluation measures, and which temperatures are
# tried at the end, may change in a run, and so may who keeps which part of the generator.
_LEFT_OUT = {"data", "model", "plan", "temperatures", "shard", *OPTION_GROUPS["evaluation and the guard"]}
_COMPARED_BLOCKS = 1024
_WRITTEN = (".json", ".safetensors", ".py", ".md")
"""Of the files that a run leaves in the end: weights, configurations, the code of published models."""


@contextmanager
def claimed(*folders: Path) -> Iterator[None]:
    """Keep other runs from writing where this one writes, and remove what a killed run left there.

    Raises:
        InputError: if another run writes there, or this one cannot.
    """
    with ExitStack() as stack:
        if is_main_process():
            for folder in folders:
                if not folder.name:
                    raise InputError(f"{folder} cannot hold a run: choose another --output_dir")
                stack.enter_context(locked(folder))
        stack.enter_context(stoppable())
        if is_main_process():
            for folder in folders:
                _make_sure_of(folder)
        yield


def _make_sure_of(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: choose another --output_dir")
    with tempfile.TemporaryFile(dir=folder):  # fails here rather than at the first checkpoint
        pass
    for left in folder.glob(f"{LITTER}*"):
        remove(left)


def find_resume_point(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from. `--resume_from_checkpoint true` takes the last whole one, and says so if there are
    newer ones that are not. Without any it starts from the beginning, if no work is lost by that.

    Raises:
        InputError: if the output folder holds an earlier run that was not asked to be resumed, or something else, or
            the checkpoint is missing or not whole.
    """
    output = output_folder(args)
    if (output / "config.json").exists():
        raise InputError(f"{output} holds a finished run; choose another --output_dir or delete it")
    found = checkpoints_in(output)
    if not found and (foreign := _foreign_in(output)):
        raise InputError(f"{foreign} is of no run that was begun here; choose another --output_dir or delete it")
    if args.resume_from_checkpoint is None:
        if found:
            raise InputError(
                f"{found[-1]} is there from an earlier run; add --resume_from_checkpoint true, or delete {output}"
            )
        return None
    if str(args.resume_from_checkpoint).lower() == "true":  # YAML gives a bool
        return _last_whole(output)
    if str(args.resume_from_checkpoint).lower() == "false":
        raise InputError("resume_from_checkpoint false says nothing: leave it out, or give true or a checkpoint")
    given = Path(args.resume_from_checkpoint)
    if not given.is_dir():
        raise InputError(f"{given} is no checkpoint to resume from")
    if fault := fault_of(given):
        raise InputError(f"{given} {fault.reason}: resume from another checkpoint, or start again without")
    return str(given)


def _foreign_in(output: Path) -> Path | None:
    """A file that a finished run could replace, in a folder where none was begun."""
    files = sorted(output.iterdir()) if output.is_dir() else []
    return next((file for file in files if file.is_file() and file.suffix in _WRITTEN and file.name[0] != "."), None)


def _last_whole(output: Path) -> str | None:
    checkpoint, passed_over = choose_checkpoint(output)
    if checkpoint is None:
        for lost, fault in passed_over:
            if fault.loses_work:
                raise InputError(
                    f"{lost} {fault.reason}, and no other checkpoint is whole: put back what is missing, "
                    f"or delete {output} to start from the beginning"
                )
    goes_on = "starts from the beginning" if checkpoint is None else f"goes on from {checkpoint}"
    for unused, fault in passed_over:
        announce(f"warning: {unused} {fault.reason}; the run {goes_on}")
    return None if checkpoint is None else str(checkpoint)


def recipe_of(
    parts: Sequence[Any], blocks: Sequence[Any], model: PreTrainedModel, is_given: bool = False
) -> dict[str, Any]:
    """What a run is, for comparison with the run that wrote a checkpoint. Make it before the run changes anything.

    Args:
        parts (`Sequence[Any]`): the dataclasses with its options.
        blocks (`Sequence[Any]`): its training and validation blocks.
        model (`PreTrainedModel`): the generator it begins with.
        is_given (`bool`, *optional*, defaults to `False`): whether that is a trained one rather than a new one, whose
            weights follow from the seed.
    """
    recipe: dict[str, Any] = {}
    inherited = {option.name for option in dataclasses.fields(TrainingArguments)}
    for part in parts:
        for option in dataclasses.fields(part):
            is_trainers = isinstance(part, TrainingArguments) and option.name in inherited
            if option.name not in _LEFT_OUT and (not is_trainers or option.name in (*_TRAINER_OPTIONS, *_LENGTH)):
                recipe[option.name] = _plain(getattr(part, option.name))
    recipe["the corpus"] = _digest(np.array(_some(split), dtype=np.int64) for split in blocks)
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "dtype"))}
    recipe["the generator's configuration"] = _digest([np.frombuffer(repr(sorted(config.items())).encode(), np.uint8)])
    if is_given:
        tensors = (tensor.detach().cpu().contiguous() for tensor in model.state_dict().values())
        recipe["the generator that is trained"] = _digest(tensor.view(torch.uint8).numpy() for tensor in tensors)
    return recipe


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value if isinstance(value, str | int | float | list | None) else repr(value)


def _some(split: Any) -> list[list[int]]:
    """Blocks, evenly spread, after their number."""
    count = min(len(split), _COMPARED_BLOCKS)
    rows: list[list[int]] = [split[index * len(split) // count]["input_ids"] for index in range(count)]
    return [[len(split)] * len(rows[0]), *rows]


def _digest(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def check_recipe(checkpoint: str | None, recipe: Mapping[str, Any], processes: int) -> None:
    """Refuse to go on from a checkpoint of another run, and say what keeps a run from going on bit for bit.

    Another number of processes goes on with the next block, if a batch has as many blocks as before: the order of the
    blocks does not depend on who reads them.

    Args:
        checkpoint (`str`, *optional*): a whole checkpoint; without one everything fits.
        recipe (`Mapping[str, Any]`): of this run; see [`recipe_of`].
        processes (`int`): of this run.

    Raises:
        InputError: if the corpus, the generator, an option or the size of a batch differs.
    """
    if checkpoint is None:
        return
    seal = seal_of(Path(checkpoint))
    theirs = seal.get("recipe") or {}
    batches = [_batch(part, number) for part, number in ((theirs, seal.get("processes")), (recipe, processes))]
    if None not in batches and batches[0] != batches[1]:
        raise InputError(
            f"{checkpoint} is of a run with {batches[0]} blocks a batch, and this one would have {batches[1]}: choose "
            f"{' and '.join(_SHARES)} so that their product with the {processes} processes is {batches[0]}"
        )
    split = _SHARES if None not in batches else ()
    differing = [name for name in recipe if name in theirs and name not in split and theirs[name] != recipe[name]]
    for name in differing:
        if name not in _LENGTH:
            digest = name.startswith("the ")
            what = f"{name} is another" if digest else f"{name} is {recipe[name]}, and was {theirs[name]}"
            raise InputError(f"{checkpoint} is of another run: {what}; resume with what the run was started with")
    if not is_main_process():
        return
    if set(differing) & set(_LENGTH) and recipe.get("lr_scheduler_type") not in (None, "constant"):
        changes = ", ".join(f"{name} was {theirs[name]} and is {recipe[name]}" for name in differing)
        announce(f"warning: {changes}: learning rates follow the new length, so this is not the run of either length")
    if seal.get("processes") != processes:
        announce(
            f"warning: {checkpoint} was written by {seal.get('processes')} processes, and this run has {processes}: "
            "it goes on with the next block, but random numbers and rounding differ, so not bit for bit"
        )


def _batch(recipe: Mapping[str, Any], processes: int | None) -> int | None:
    """Blocks that all processes learn from in a step; `None` if it is not known."""
    return math.prod((recipe[name] for name in _SHARES), start=processes or 0) if set(_SHARES) <= set(recipe) else None


def check_resumes(checkpoint: str | None, networks: Mapping[str, PreTrainedModel]) -> None:
    """Refuse to go on, with these networks, from a checkpoint that others wrote.

    Args:
        checkpoint (`str`, *optional*): the checkpoint; without one everything fits.
        networks (`Mapping[str, PreTrainedModel]`): by the name of their file. One that is not there, as of a generator
            whose checkpoints hold adapters, is left to the trainer.

    Raises:
        InputError: if a tensor is missing or has another shape.
    """
    for file, network in networks.items():
        path = Path(checkpoint or "") / file
        if checkpoint is None or not path.exists():
            continue
        with safe_open(path, "pt") as saved:
            theirs = {plain_name(name): list(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
        ours = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        other = next((name for name in sorted(theirs) if theirs[name] != ours.get(name)), None)
        if other is not None:
            raise InputError(
                f"{path} is of another network: {other} has shape {theirs[other]} there, and here "
                f"{ours.get(other, 'is no such tensor')}; resume with the options the run was started with"
            )
