"""What is watched during a run."""

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers.trainer_callback import CallbackHandler

from midimamba import MidiProcessor
from midimamba.corpus.packing import BlockCollator
from midimamba.evaluation import rendering
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.monitoring import LOGGED_SAMPLES, SampleLog, peak_memory_mb
from midimamba.training.whole_checkpoints import output_folder
from support import make_discriminator, make_generator, make_score
from trainer_support import LENGTH, PLAIN, make_trainer


def test_the_peak_of_memory_is_in_megabytes() -> None:
    assert 50 < peak_memory_mb(torch.device("cpu")) < 50_000


def test_every_log_and_every_evaluation_has_what_is_watched(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    watched = {
        "reward_at_25",
        "reward_at_100",
        "d_accuracy_held_out",
        "tokens_per_second",
        "memory_mb_max",
        "rollbacks",
    }
    for log in logged:
        assert watched <= log.keys()
        assert log["reward_at_100"] == log["reward"]
        assert log["tokens_per_second"] > 0
    evaluated = [log for log in trainer.state.log_history if "eval_copied_8" in log]
    assert len(evaluated) == 3
    assert all(0 <= log["eval_copied_8_real"] <= 1 for log in evaluated)


def test_the_tokens_drawn_are_counted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, d_warmup_steps=2)
    trainer.train()
    batches = 2 + 1 + 1  # warm-up, d-step, g-step
    assert trainer._num_sampled == batches * 4 * (LENGTH - 2)
    positions = (3, 5)  # two of the times 2 … 6
    assert trainer.rollouts.num_drawn == 4 * 2 * sum(LENGTH - 1 - position for position in positions)
    assert trainer.num_drawn == trainer._num_sampled + trainer.rollouts.num_drawn


@pytest.fixture
def musical(tmp_path: Path, processor: MidiProcessor) -> AdversarialTrainer:
    ids = [token for seed in range(4) for token in processor.encode(make_score(seed))]
    blocks = Dataset.from_dict({"input_ids": [ids[i : i + 24] for i in range(0, len(ids) - 24, 24)]})
    options: dict[str, Any] = {"estimator": "terminal", "d_warmup_steps": 0, "num_eval_samples": 6}
    shape: dict[str, Any] = {
        "sequence_length": 24,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "disable_tqdm": True,
    }
    watching: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "report_to": "tensorboard"}
    folder: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True}
    args = AdversarialConfig(**PLAIN | folder | options | shape | watching)
    size = processor.vocab_size
    networks = (make_generator(vocab_size=size), make_discriminator(vocab_size=size))
    return AdversarialTrainer(*networks, args, blocks, blocks, BlockCollator.for_processor(processor), processor)


def test_samples_of_evaluations_are_written_and_drawn(musical: AdversarialTrainer) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    musical.train()
    folder = output_folder(musical.args)
    written = sorted(path.name for path in (folder / "samples" / "step-1").iterdir())
    assert written == [f"{index}.{kind}" for index in range(LOGGED_SAMPLES) for kind in ("mid", "png")]
    assert (folder / "samples" / "step-1" / "0.mid").read_bytes()[:4] == b"MThd"
    (events,) = folder.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events.parent), size_guidance={"images": 0}).Reload().Tags()["images"]
    assert {re.sub(r"/image.*", "", tag) for tag in shown} == {f"samples/{index}" for index in range(LOGGED_SAMPLES)}


def test_trackio_shows_them_too(musical: AdversarialTrainer, tmp_path: Path) -> None:
    from transformers.integrations.integration_utils import TrackioCallback

    musical.args.project, musical.args.logging_steps = "music", 1
    musical.add_callback(TrackioCallback)
    musical.train()
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("music")
    logged = SQLiteStorage.get_logs("music", run.name)
    assert {"samples/0", "samples/1", "train/reward", "eval/self_bleu_4"} <= {name for row in logged for name in row}
    pictures = {path.read_bytes() for path in Path(os.environ["TRACKIO_DIR"]).rglob("*.png")}
    assert pictures == {path.read_bytes() for path in (tmp_path / "samples").rglob("*.png")}


def test_wandb_shows_them_too(musical: AdversarialTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.integration_utils import WandbCallback

    class Callback(WandbCallback):
        def __init__(self) -> None:
            """Without wandb, which is not installed for tests."""

    logged: list[dict[str, Any]] = []
    wandb = ModuleType("wandb")
    vars(wandb).update(run=None, log=logged.append, Image=lambda file, caption: (Path(file).read_bytes(), caption))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    processor = musical.processing_class
    assert isinstance(processor, MidiProcessor)
    log = SampleLog(
        output_folder(musical.args) / "samples",
        processor,
        CallbackHandler([Callback()], musical.model, processor, None, None),
    )
    ids = processor.encode(make_score(1))
    log.write(3, [ids])
    assert not logged  # no run has begun
    vars(wandb)["run"] = "a run"
    log.write(4, [ids, ids])
    folder = output_folder(musical.args) / "samples" / "step-4"
    assert logged == [
        {f"samples/{index}": ((folder / f"{index}.png").read_bytes(), "step 4"), "train/global_step": 4}
        for index in range(2)
    ]


def test_without_matplotlib_one_line_says_that_there_are_no_pictures(
    musical: AdversarialTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.chdir(tmp_path)  # before training begins, transformers logs into the folder that it runs in
    monkeypatch.setattr(rendering, "import_module", missing)
    musical.evaluate()
    musical.evaluate()
    lines = [line for line in capsys.readouterr().err.splitlines() if "piano rolls" in line]
    assert len(lines) == 1
    assert "matplotlib is not installed" in lines[0]
    written = {path.suffix for path in (output_folder(musical.args) / "samples").rglob("*.*")}
    assert written == {".mid"}
