"""Checkpoints: a damaged or foreign one is never gone on from in silence, and none is lost before there is another."""

import functools
import json
import os
import pickle
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from midimamba.corpus.packing import BlockCollator
from midimamba.errors import InputError
from midimamba.training import whole_checkpoints
from midimamba.training.resume import check_recipe, claimed, find_resume_point, recipe_of
from midimamba.training.whole_checkpoints import (
    SEAL_FILE,
    WholeCheckpointTrainer,
    checkpoints_in,
    choose_checkpoint,
    close_seal,
    fault_of,
)
from support import make_generator
from trainer_support import ALL_STABILISERS, make_blocks, make_trainer

STEPS = 4


def blocks(count: int = 24) -> tuple[Any, Any]:
    return make_blocks(count), make_blocks(8)


def pretrainer(folder: Path, **options: Any) -> WholeCheckpointTrainer:
    torch.manual_seed(0)
    usual: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    usual |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True}
    args = TrainingArguments(str(folder), use_cpu=True, **usual | options)
    model = make_generator()
    return WholeCheckpointTrainer(model, args, BlockCollator(model.config.bos_token_id), *blocks())


def tuner(folder: Path, **options: Any) -> WholeCheckpointTrainer:
    usual: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    return make_trainer(folder, **ALL_STABILISERS, **usual | options)


Maker = Callable[..., WholeCheckpointTrainer]


@pytest.fixture(scope="module", params=[pretrainer, tuner])
def make(request: pytest.FixtureRequest) -> Maker:
    maker: Maker = request.param
    return maker


@pytest.fixture(scope="module")
def straight(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    make(folder).train()
    return folder


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


def resume_point(folder: Path, value: object = "true") -> str | None:
    return find_resume_point(TrainingArguments(str(folder), resume_from_checkpoint=str(value), use_cpu=True))


def same_weights(ours: Path, theirs: Path) -> bool:
    left, right = (load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors") for folder in (ours, theirs))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "lacks": Path.unlink,
    "has a damaged": cut,
    "has a damaged ": flip,
    "has a damaged  ": lambda file: file.write_bytes(b""),
}


def test_every_damage_to_every_file_is_seen_and_the_run_goes_on_from_the_one_before(
    make: Maker, run: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    last = run / f"checkpoint-{STEPS}"
    files = [path for path in sorted(last.iterdir()) if path.name != SEAL_FILE]
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    needed |= (
        {"discriminator.safetensors", "adversarial_state.json", "replay_0.safetensors"} if make is tuner else set()
    )
    assert needed <= {file.name for file in files}
    for file in files:
        for message, damage in DAMAGE.items():
            before = file.read_bytes()
            damage(file)
            assert fault_of(last) == (f"{message.strip()} {file.name}", True)
            file.write_bytes(before)
    (last / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"checkpoint-4 lacks optimizer\.pt: resume from another checkpoint"):
        resume_point(run, last)
    with pytest.raises(InputError, match=r"lacks optimizer\.pt"):
        make(run).train(resume_from_checkpoint=str(last))
    point = resume_point(run)
    assert point == str(run / f"checkpoint-{STEPS - 1}")
    assert capfd.readouterr().err == f"warning: {last} lacks optimizer.pt; the run goes on from {point}\n"
    make(run).train(resume_from_checkpoint=point)
    assert same_weights(run, straight)
    assert [path.name for path in checkpoints_in(run)] == [path.name for path in checkpoints_in(straight)]


def test_where_none_is_whole_work_is_never_thrown_away(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for checkpoint in checkpoints_in(run):
        (checkpoint / SEAL_FILE).write_text("{}\n")  # as of a run that was killed while it wrote
    assert resume_point(run) is None
    assert "was never finished; the run starts from the beginning" in capfd.readouterr().err
    for damage, message in (
        (lambda seal: seal.write_text("null"), "has a damaged checkpoint.json"),
        (Path.unlink, "lacks checkpoint.json, which says what is in it"),
    ):
        damage(run / "checkpoint-4" / SEAL_FILE)
        with pytest.raises(InputError, match=message + ", and no other checkpoint is whole: put back") as refusal:
            resume_point(run)
        assert "\n" not in str(refusal.value)
    assert len(checkpoints_in(run)) == 3


def test_old_checkpoints_are_deleted_only_when_there_is_a_whole_one(
    make: Maker, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "checkpoint-3" / SEAL_FILE).write_text("{}\n")
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-1")  # another program's
    (run / "checkpoint-1" / SEAL_FILE).unlink()
    there_while_sealing = []

    def watched(folder: Path, *arguments: Any) -> None:
        there_while_sealing.append({path.name for path in checkpoints_in(run)})
        close_seal(folder, *arguments)

    monkeypatch.setattr(whole_checkpoints, "close_seal", watched)
    make(run, max_steps=5, save_total_limit=1).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert there_while_sealing == [{f"checkpoint-{step}" for step in (1, 2, 3, 4, 5)}]
    assert {path.name for path in checkpoints_in(run)} == {"checkpoint-1", "checkpoint-5"}


def test_the_newest_by_time_and_the_best_are_kept(make: Maker, run: Path) -> None:
    """A run that goes on from an early checkpoint must not delete what it writes itself."""
    for step in (8, 9):
        shutil.copytree(run / "checkpoint-4", run / f"checkpoint-{step}")
    whole_checkpoints.rotate(run, 2, str(run / "checkpoint-2"))
    assert {path.name for path in checkpoints_in(run)} == {"checkpoint-2", "checkpoint-9"}
    make(run, max_steps=3, save_total_limit=1).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert {path.name for path in checkpoints_in(run)} == {"checkpoint-3"}


class Fork:
    """Unpickled, it would leave a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_resuming_runs_no_code_of_a_checkpoint(make: Maker, run: Path, tmp_path: Path) -> None:
    last, trace = run / "checkpoint-4", tmp_path / "trace"
    for name in [path.name for path in last.iterdir() if path.suffix in (".pt", ".pth", ".bin")]:
        before = (last / name).read_bytes()
        torch.save(Fork(trace), last / name)
        assert fault_of(last) is not None
        close_seal(last, 1, {})  # an attacker can do that as well
        if name == "training_args.bin":
            make(run, max_steps=STEPS + 1).train(resume_from_checkpoint=str(last))
        else:
            with pytest.raises(pickle.UnpicklingError):
                make(run, max_steps=STEPS + 1).train(resume_from_checkpoint=str(last))
        (last / name).write_bytes(before)
        assert not trace.exists()


def refusal_on_a_disk_with_room_for(size: int, work: Callable[[], object]) -> str:
    """What work in a forked process is refused with where no file can grow beyond a size in bytes."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            work()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        refusal = stream.read()
    os.waitpid(child, 0)
    return refusal


def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(make: Maker, run: Path, straight: Path) -> None:
    names = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
    sizes = {(run / "checkpoint-4" / name).stat().st_size for name in names}
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    before = {path.name for path in run.iterdir()}
    for size in [0, *sorted(size - 1 for size in sizes)]:
        trainer = make(run)
        refusal = refusal_on_a_disk_with_room_for(
            size, functools.partial(trainer.train, resume_from_checkpoint=str(run / "checkpoint-2"))
        )
        assert re.fullmatch(r"InputError: .*checkpoint-3 cannot be written \(.*\): make room .*", refusal), (
            size,
            refusal,
        )
        assert {path.name for path in run.iterdir()} == before
    point = resume_point(run)
    make(run).train(resume_from_checkpoint=point)
    assert same_weights(run, straight)


def test_an_interruption_while_saving_leaves_no_half_checkpoint(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise SystemExit(130)

    monkeypatch.setattr(Trainer, "_save_rng_state", interrupted)
    with pytest.raises(SystemExit):
        make(tmp_path / "run").train()
    assert [path for path in (tmp_path / "run").iterdir() if path.name != "samples"] == []


def test_a_best_checkpoint_that_is_gone_is_refused_when_the_run_would_end_with_it(run: Path) -> None:
    state = run / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": str(run / "checkpoint-1")}))
    close_seal(run / "checkpoint-4", 1, {})
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(InputError, match="checkpoint-1 is not a folder"):
        pretrainer(run, **options).train(resume_from_checkpoint=str(run / "checkpoint-4"))


def args_for(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, **options)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / f"{PREFIX_CHECKPOINT_DIR}-1"
    checkpoint.mkdir()
    model = make_generator()
    ours = recipe_of([args_for(tmp_path)], blocks(), model, is_given=True)
    close_seal(checkpoint, 1, json.loads(json.dumps(ours)))
    check_recipe(str(checkpoint), ours, 1)
    check_recipe(None, {}, 1)
    nn.init.zeros_(next(iter(model.parameters())))
    for other, message in (
        (recipe_of([args_for(tmp_path, learning_rate=1.0)], blocks(), model), "learning_rate is 1.0, and was 5e-05"),
        (recipe_of([args_for(tmp_path, seed=1)], blocks(), model), "seed is 1, and was 42"),
        (recipe_of([args_for(tmp_path)], blocks(23), model), "the corpus is another"),
        (recipe_of([args_for(tmp_path)], blocks(), make_generator(layout="mamba-mlp")), "configuration is another"),
        (recipe_of([args_for(tmp_path)], blocks(), model, is_given=True), "the generator that is trained is another"),
    ):
        with pytest.raises(InputError, match=f"is of another run: .*{message}"):
            check_recipe(str(checkpoint), other, 1)
    assert capfd.readouterr().err == ""
    with pytest.raises(InputError, match=r"a run with 8 blocks a batch, and this one would have 16: choose .* is 8"):
        check_recipe(str(checkpoint), ours, 2)
    shared = recipe_of(
        [args_for(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)], blocks(), model
    )
    check_recipe(str(checkpoint), shared, 2)
    assert "was written by 1 processes, and this run has 2: it goes on with the next block" in capfd.readouterr().err
    check_recipe(str(checkpoint), recipe_of([args_for(tmp_path, max_steps=9)], blocks(), make_generator()), 1)
    assert "max_steps was -1 and is 9: learning rates follow the new length" in capfd.readouterr().err


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".unfinished-checkpoint-3").mkdir(parents=True)
    (run / ".unfinished-notes").write_text("half")
    (run / "notes").write_text("mine")
    with claimed(run):
        assert [path.name for path in run.iterdir()] == ["notes"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_place_that_cannot_hold_a_run_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file is not a folder: choose another"), claimed(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="cannot hold a run"), claimed(Path("/")):
        pass
    with pytest.raises(OSError, match="too long"), claimed(tmp_path / ("x" * 255)):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    assert choose_checkpoint(tmp_path / "nowhere") == (None, [])
