"""A run that goes wrong goes back with half the learning rates, and ends cleanly when that does not help."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState

from midimamba.errors import InputError
from midimamba.modeling.stock_names import plain_name
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.checkpoint import DISCRIMINATOR_FILE, STATE_FILE
from midimamba.training.guard import MAX_ROLLBACKS, DivergedError, Guard
from midimamba.training.monitoring import Monitor
from trainer_support import ALL_STABILISERS, PLAIN, make_trainer, moved, parameters

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}


class Poison(TrainerCallback):
    """Breaks something once, at a step."""

    def __init__(self, trainer: AdversarialTrainer, what: str, step: int):
        self.trainer, self.what, self.step = trainer, what, step
        self.is_used = False
        self.score = trainer.monitor.discriminator.score

    def _strikes(self, state: TrainerState, what: str) -> bool:
        strikes = state.global_step == self.step and self.what == what and not self.is_used
        self.is_used |= strikes
        return strikes

    def on_step_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        (embeddings,) = self.trainer.generator.get_input_embeddings().parameters()
        if self._strikes(state, "loss"):
            self.score.bias.data.fill_(torch.nan)
        elif self._strikes(state, "gradient"):
            self.handle = embeddings.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))

    def on_optimizer_step(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        if self._strikes(state, "weight"):
            self.score.weight.data[0, 0] = torch.inf

    def on_train_begin(self, *_: object, **__: object) -> None:
        if self.is_used and self.what == "gradient":
            self.handle.remove()


def rates(trainer: AdversarialTrainer) -> tuple[float, ...]:
    optimizers = (trainer.optimizer, trainer.discriminator_update.optimizer)
    return tuple(group["lr"] for optimizer in optimizers for group in optimizer.param_groups[:1])


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_a_run_recovers_from_numbers_that_are_not_finite(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # One pass per batch: after a second one, a broken gradient of the first is noticed by its norm.
    trainer = make_trainer(tmp_path, **ALL_STABILISERS | {"ppo_epochs": 1}, **SAVING)
    trainer.add_callback(Poison(trainer, what, step=3))
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.guard.rollbacks == 1
    assert rates(trainer) == (0.005, 0.0005)
    assert trainer.lr_scheduler.base_lrs[0] == 0.005
    networks = (trainer.generator, trainer.discriminator, *trainer.adversarial_state.policies.values())
    assert all(parameter.isfinite().all() for network in networks for parameter in network.parameters())
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["rollbacks"] for log in logged] == [0, 0, 1, 1, 1, 1]
    assert [log["learning_rate"] for log in logged] == [0.01] * 2 + [0.005] * 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "back to" in line]
    names = {"loss": "the loss", "gradient": "the gradient", "weight": "a weight"}
    assert line.startswith(f"step 4: {names[what]} is not finite; back to ")
    assert "checkpoint-2 (roll-back 1 of 3), learning_rate 0.005, d_learning_rate 0.0005" in line


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["weights", "adapters"])
def test_the_run_after_a_roll_back_is_the_resumed_one(tmp_path: Path, peft_config: LoraConfig | None) -> None:
    """Nothing is left of what went wrong: a new process that goes on from the checkpoint does the same."""
    trainer = make_trainer(tmp_path, peft_config=peft_config, **ALL_STABILISERS, **SAVING)
    trainer.add_callback(Poison(trainer, "loss", step=3))
    trainer.train()
    resumed = make_trainer(tmp_path, peft_config=peft_config, **ALL_STABILISERS, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.guard.rollbacks == 1  # from the file beside the checkpoints: checkpoint-2 knows of none
    for name in ("model", "discriminator", "generator_for_saving"):
        assert moved(parameters(getattr(trainer, name)), parameters(getattr(resumed, name))) == 0.0


@pytest.mark.parametrize("bound", ["max_nll_drift", "max_self_bleu_increase"])
def test_a_bound_that_is_always_broken_ends_the_run_with_what_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bound: str
) -> None:
    evaluate, measure = Trainer.evaluate, Monitor.measure
    options: dict[str, Any] = {"max_steps": 5, bound: 0.0}
    trainer = make_trainer(tmp_path, **ALL_STABILISERS, **SAVING | EVALUATING | options)

    def value() -> float:
        return 1.0 + 0.01 * (trainer.state.global_step > 3)

    def evaluated(run: Trainer, *arguments: Any) -> dict[str, float]:
        return evaluate(run, *arguments) | {"eval_loss": value()}

    def measured(monitor: Monitor, real: Tensor, fake: Tensor) -> tuple[dict[str, float], list[list[int]]]:
        measures, samples = measure(monitor, real, fake)
        return measures | {"self_bleu_4": value()}, samples

    monkeypatch.setattr(Trainer, "evaluate", evaluated)
    monkeypatch.setattr(Monitor, "measure", measured)
    output = trainer.train()
    assert output.global_step == 2
    assert output.metrics["rollbacks"] == trainer.guard.rollbacks == MAX_ROLLBACKS == 3
    assert rates(trainer) == (0.00125, 0.000125)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    ours = trainer.model.state_dict()
    assert all(torch.equal(ours[plain_name(name)], tensor) for name, tensor in saved.items())
    saved = load_file(tmp_path / "checkpoint-2" / DISCRIMINATOR_FILE)
    assert all(torch.equal(trainer.discriminator.state_dict()[name], tensor) for name, tensor in saved.items())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-2"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 4: eval_")]
    assert len(lines) == 4
    assert "is 1.0100, above its bound of 1.0000 (it was 1.0000 at the start)" in lines[0]
    assert lines[-1].endswith(f"the run ends after 3 roll-backs, with {tmp_path / 'checkpoint-2'}")


@pytest.mark.slow
def test_before_the_first_checkpoint_the_start_is_what_a_run_goes_back_to(tmp_path: Path) -> None:
    options = SAVING | EVALUATING | {"max_nll_drift": 100.0}
    trainer = make_trainer(tmp_path / "poisoned", **ALL_STABILISERS, **options)
    trainer.add_callback(Poison(trainer, "loss", step=1))
    trainer.train()
    assert trainer.state.global_step == 6
    half = {"learning_rate": 0.005, "d_learning_rate": 0.0005}
    slow = make_trainer(tmp_path / "slow", **ALL_STABILISERS, **options | half)
    slow.train()
    for name in ("model", "discriminator", "generator_for_saving"):
        assert moved(parameters(getattr(trainer, name)), parameters(getattr(slow, name))) == 0.0
    state = json.loads((tmp_path / "slow" / "checkpoint-6" / STATE_FILE).read_text())["guard"]
    assert state["reference"] == {"eval_loss": slow.state.log_history[0]["eval_loss"]}


def test_a_guarded_run_is_the_run_without_the_guard(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", **ALL_STABILISERS, **SAVING)
    guarded = make_trainer(tmp_path / "guarded", **ALL_STABILISERS, **SAVING | EVALUATING | {"max_nll_drift": 100.0})
    for trainer in (plain, guarded):
        trainer.train()
    assert moved(parameters(plain.model), parameters(guarded.model)) == 0.0
    assert moved(parameters(plain.discriminator), parameters(guarded.discriminator)) == 0.0


def test_without_a_checkpoint_there_is_one_clear_error(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(Poison(trainer, "loss", step=1))
    with pytest.raises(InputError, match="step 2: the loss is not finite; there is no checkpoint to go back to"):
        trainer.train()


class OtherProcess:
    """An `Accelerator` of two processes, in the other of which something has gone wrong."""

    device = torch.device("cpu")
    is_main_process = True

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        assert how == "sum"
        return tensor + 1.0


def make_guard(folder: Path, accelerator: Any, **options: Any) -> Guard:
    saving: dict[str, Any] = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    return Guard(
        AdversarialConfig(**PLAIN | saving | {"output_dir": str(folder), "use_cpu": True} | options), accelerator
    )


def test_all_processes_raise_together(tmp_path: Path) -> None:
    """What one process finds is counted in all of them."""
    guard = make_guard(tmp_path, OtherProcess(), max_nll_drift=0.5)
    guard.watch("the loss", torch.ones(3))
    with pytest.raises(DivergedError, match=r"^the loss is not finite$"):
        guard.check_flags(guard.flags().tolist())
    guard.check_flags([])  # a step is judged once
    with pytest.raises(DivergedError, match=r"in another process$"):
        guard.check_evaluation({"eval_loss": 1.0})


def test_any_number_of_values_can_be_watched(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, Accelerator(cpu=True))
    for _ in range(2):
        for step in range(200):
            guard.watch(f"step {step}", torch.tensor([torch.nan if step in (130, 140) else 1.0]))
        flags = guard.flags().tolist()
        assert [step for step, flag in enumerate(flags) if flag] == [130, 140]
        assert len(flags) == 200
        with pytest.raises(DivergedError, match=r"^step 130 is not finite$"):
            guard.check_flags(flags)


def test_the_first_of_what_is_watched_is_reported(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, Accelerator(cpu=True))
    broken = torch.tensor([1.0, torch.nan])
    for what, values in (("the loss", torch.zeros(2)), ("the gradient", broken)):
        guard.watch(what, values)
    guard.watch_weights([torch.ones(2), broken])
    flags = guard.flags()
    assert flags.tolist() == [0.0, 1.0, 1.0]
    with pytest.raises(DivergedError, match=r"^the gradient is not finite$"):
        guard.check_flags(flags.tolist())
    # What was watched before a roll-back says nothing about the run after it.
    guard.watch("the loss", broken)
    guard.roll_back()
    guard.watch("the loss", torch.zeros(2))
    guard.check_flags(guard.flags().tolist())
