"""Checkpoints that are known to be whole, and a `Trainer` that writes them and goes on from no others.

Trainer writes the files of a checkpoint one after another, into the folder's final name, and resumes without those
that are missing. Here a seal says what a whole checkpoint holds. It is written first as open, and last as closed.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from midimamba.errors import InputError
from midimamba.files import flush_folder, read_json, write_whole
from midimamba.training.lora import without_wrapper
from midimamba.training.sharding import (
    hollow_copy,
    is_sharded,
    shard,
    split_on_loading,
    whole_copy,
    whole_moments,
)

TRAINER_STATE_FILE = "trainer_state.json"
SEAL_FILE = "checkpoint.json"
LITTER = ".unfinished"
"""How the names of files and folders begin that only a killed run leaves."""

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_NEEDED = (TRAINER_STATE_FILE, "optimizer.pt", "scheduler.pt")
# What safetensors and torch raise for a full disk are no errors of the operating system.
_DISK = re.compile(r"os error \d+|PytorchStreamWriter|inline_container|unexpected pos|iostream error", re.IGNORECASE)


def output_folder(args: TrainingArguments) -> Path:
    """Where a run writes. `TrainingArguments` fills `output_dir` in, although its type allows `None`."""
    return Path(str(args.output_dir)).resolve()  # `.` gets a name, and two names of a folder one lock


class Fault(NamedTuple):
    """Why a checkpoint cannot be used.

    Attributes:
        reason (`str`): what is wrong with it.
        loses_work (`bool`): whether it was whole once, or may be for others. Else a process was killed writing it.
    """

    reason: str
    loses_work: bool


class Choice(NamedTuple):
    """Where a run goes on.

    Attributes:
        checkpoint (`Path`, *optional*): the newest whole checkpoint.
        passed_over (`list[tuple[Path, Fault]]`): newer ones that are not whole, newest first.
    """

    checkpoint: Path | None
    passed_over: list[tuple[Path, Fault]]


def choose_checkpoint(folder: Path) -> Choice:
    """The newest whole checkpoint of a run, and what is wrong with the newer ones."""
    passed_over: list[tuple[Path, Fault]] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        fault = fault_of(checkpoint)
        if fault is None:
            return Choice(checkpoint, passed_over)
        passed_over.append((checkpoint, fault))
    return Choice(None, passed_over)


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, by their steps."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def fault_of(checkpoint: Path) -> Fault | None:
    """What is wrong with a checkpoint; `None` if it is, byte for byte, what was written."""
    if not checkpoint.is_dir():
        return Fault("is not a folder", loses_work=True)
    if not (checkpoint / SEAL_FILE).exists():
        empty = all(path.name.startswith(LITTER) for path in checkpoint.iterdir())
        return Fault("was never finished" if empty else f"lacks {SEAL_FILE}, which says what is in it", not empty)
    try:
        seal = read_json(checkpoint / SEAL_FILE)
    except InputError:
        return Fault(f"has a damaged {SEAL_FILE}", loses_work=True)
    files = seal.get("files")
    if not isinstance(files, dict):
        return Fault("was never finished", loses_work=False)
    missing = [name for name in (*_NEEDED, *files) if name not in files or not (checkpoint / name).is_file()]
    if missing:
        return Fault(f"lacks {', '.join(dict.fromkeys(missing))}", loses_work=True)
    damaged = [name for name, digest in files.items() if digest_of(checkpoint / name) != digest]
    return Fault(f"has a damaged {', '.join(damaged)}", loses_work=True) if damaged else None


def seal_of(checkpoint: Path) -> dict[str, Any]:
    """The seal of a whole checkpoint: its `files` with their digests, `processes`, and the run's `recipe`."""
    return read_json(checkpoint / SEAL_FILE)


def digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, if it is there. One that is partly deleted has another name, and counts for nothing."""
    if checkpoint.is_dir():
        scratch = checkpoint.with_name(f"{LITTER}{checkpoint.name}")
        remove(scratch)
        checkpoint.rename(scratch)
        remove(scratch)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def close_seal(checkpoint: Path, processes: int, recipe: dict[str, Any]) -> None:
    """Flush a checkpoint to the disk and declare it whole."""
    flush_folder(checkpoint)
    written = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL_FILE)
    files = {str(path.relative_to(checkpoint)): digest_of(path) for path in written}
    seal = {"files": files, "processes": processes, "recipe": recipe}
    write_whole(checkpoint / SEAL_FILE, json.dumps(seal, indent=2) + "\n")


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest whole checkpoints beyond `limit`, and those that are not, now that there is a whole one.

    Checkpoints without a seal are somebody else's, and stay. As in Trainer, the newest and the best always stay. The
    newest is the one that was written last: a run may have gone on from an earlier one.
    """
    whole = []
    for checkpoint in checkpoints_in(folder):
        if (checkpoint / SEAL_FILE).exists():
            if "files" in seal_of(checkpoint):
                whole.append(checkpoint)
            else:
                discard(checkpoint)
    whole.sort(key=lambda checkpoint: (checkpoint / SEAL_FILE).stat().st_mtime_ns)  # a stable sort: steps break ties
    kept = {whole[-1].name} | ({Path(best).name} if best is not None else set())
    surplus = len(whole) - max(limit, len(kept)) if limit else 0
    for checkpoint in [path for path in whole if path.name not in kept][: max(surplus, 0)]:
        discard(checkpoint)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what libraries raise for a full or broken disk into one line.

    Raises:
        InputError: if `folder` cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and not _DISK.search(str(error)):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        raise InputError(
            f"{folder} cannot be written ({reason}): make room on that disk, or see that you may write there, then "
            "run the same command with --resume_from_checkpoint true"
        ) from error


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a checkpoint lacks the head: it has the embeddings, to which the head is tied."""
    return "missing keys in the checkpoint model loaded: ['lm_head.weight']" not in record.getMessage()


class _NothingLeftError(Exception):
    """The checkpoint is that of the last step."""


class _EndInTime(TrainerCallback):
    """Trainer would take one more step after a checkpoint of step `max_steps` (transformers 5.23)."""

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _NothingLeftError


class WholeCheckpointTrainer(Trainer):
    """
    A `Trainer` whose checkpoints are either whole or known not to be.

    Of Trainer's private methods it overrides one, `_save_checkpoint`: no public one surrounds all that a checkpoint
    consists of, nor comes before old ones are deleted.

    Args:
        args, kwargs: as for `Trainer`.
        shards (`bool`, *optional*, defaults to `False`): split the model over the processes; see
            [`~midimamba.training.sharding`]. Checkpoints are the same as without.

    Attributes:
        recipe (`dict[str, Any]`): what a run that resumes must have in common with this one; see
            [`~midimamba.training.resume.recipe_of`].

    Raises:
        InputError: if there is a single process to split it over, or accelerate is to split it.
    """

    args: TrainingArguments
    # Narrower than Trainer declares them: there is a model from the beginning, and an optimizer before a step.
    model: nn.Module
    optimizer: Optimizer

    def __init__(self, *args: Any, shards: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.data_seed is None:
            # Else the order of the data follows from what torch was seeded with last, which may be something else in
            # each process by the time that a run goes back.
            self.accelerator.dataloader_config.data_seed = self.args.seed
        self.recipe: dict[str, Any] = {}
        self.shards = shards
        self._mould: nn.Module | None = None
        self._check_processes()
        self.add_callback(_EndInTime())

    def _check_processes(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "the checkpoints of accelerate's FSDP and DeepSpeed fit no other number of processes: use "
                "a configuration without them, such as training/accelerate_configs/gpu-8.yaml, and --shard true"
            )
        if self.shards and self.args.world_size == 1:
            raise InputError(
                "shard splits the generator over several processes, and there is one: start more, for example with "
                "training/accelerate_configs/gpu-8.yaml, or leave it out"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As Trainer does it; before, the model is split if that was asked for."""
        splits = self.shards and not is_sharded(self.model)
        if splits:
            self._mould = hollow_copy(self.model)
            # Accelerate leaves alone what it has prepared. For evaluation, it prepares mixed precision and no more.
            prepared = self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
            shard(prepared, self.args.device)
        optimizer: Optimizer = super().create_optimizer(model)
        if splits:
            split_on_loading(optimizer)
        return optimizer

    def whole_model(self) -> PreTrainedModel:
        """The model without the wrappers of distributed training and of peft. Of one that is split, a whole copy: all
        processes call together, and only the main one gets the weights."""
        return without_wrapper(self._whole())

    def _whole(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model if self._mould is None else whole_copy(self._mould, model)

    @contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """Inside, another model is evaluated or saved in place of the one that is trained."""
        trained, self.model = self.model, model
        try:
            yield
        finally:
            self.model = trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, a model that is split as a whole: all processes call together."""
        with self.standing_in(self._whole()):
            super().save_model(output_dir, _internal_call)

    @property
    def checkpoint_folder(self) -> Path:
        """Where a checkpoint of this step is."""
        return output_folder(self.args) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`; resumes from whole checkpoints only.

        Raises:
            InputError: if something is missing or damaged in the checkpoint, or in the best one, which the run would
                load at its end.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(choose_checkpoint(output_folder(self.args)).checkpoint or "") or True
        if isinstance(resume_from_checkpoint, str):
            self._refuse_faulty(Path(resume_from_checkpoint))
        started = time.time()
        logger = logging.getLogger("transformers.trainer")
        logger.addFilter(_is_news)
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except _NothingLeftError:
            output: TrainOutput = self._finalize_training(trial, 0, started)
            return output
        finally:
            logger.removeFilter(_is_news)

    def _refuse_faulty(self, checkpoint: Path) -> None:
        needed = [checkpoint]
        if fault_of(checkpoint) is None and self.args.load_best_model_at_end:
            best = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE)).best_model_checkpoint
            needed += [] if best is None else [Path(best)]
        for needful in needed:
            if fault := fault_of(needful):
                raise InputError(f"{needful} {fault.reason}: resume from another checkpoint")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into an empty folder, declare it whole, and only then delete older ones."""
        folder, limit = self.checkpoint_folder, self.args.save_total_limit
        saves = self.args.should_save
        with writing(folder):
            try:
                if saves:
                    discard(folder)
                    write_whole(folder / SEAL_FILE, "{}\n")  # open: a run that is killed from here on leaves it so
                self.accelerator.wait_for_everyone()
                self.args.save_total_limit = None
                with whole_moments(self.optimizer) if self.shards else nullcontext():
                    super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # every process writes its random numbers
                if saves:
                    close_seal(folder, self.args.world_size, self.recipe)
            except BaseException:
                if saves:
                    discard(folder)  # to make room, and to leave no litter
                raise
            finally:
                self.args.save_total_limit = limit
            if saves:
                rotate(output_folder(self.args), limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # nobody goes on, and perhaps back, while folders come and go
