"""Training by the clock: rates that fall to zero in time, an end in time, and runs that resume with what was left."""

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments, get_cosine_schedule_with_warmup
from transformers.trainer_callback import TrainerControl, TrainerState

from midimamba.errors import InputError
from midimamba.training import deadline
from midimamba.training.advice import advice
from midimamba.training.deadline import Deadline, endings, seconds_to_train, time_to_choose


class Machine:
    """A machine whose steps take as long as it is told, with everything of a trainer that a deadline sees."""

    def __init__(self, folder: Path, seconds: float, steps: int = 1000, closing: float = 0.0):
        self.now, self.closing = 100.0, closing
        self.deadline = Deadline(seconds, clock=lambda: self.now)
        self.args = TrainingArguments(
            str(folder), eval_strategy="steps", save_strategy="steps", eval_steps=1000, save_steps=1000, use_cpu=True
        )
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        self.schedule = get_cosine_schedule_with_warmup(optimizer, 5, steps)
        self.optimizer = optimizer
        self.state = TrainerState(max_steps=steps)
        self.rates: list[float] = []
        self.evaluations: list[float] = []

    def begin(self) -> None:
        self.deadline.on_train_begin(self.args, self.state, TrainerControl(), lr_scheduler=self.schedule)

    def step(self, seconds: float) -> bool:
        """Whether this was the last step."""
        self.now += seconds
        self.optimizer.step()
        self.schedule.step()
        self.rates.append(self.schedule.get_last_lr()[0])
        self.state.global_step += 1
        control = self.deadline.on_step_end(self.args, self.state, TrainerControl())
        if control.should_evaluate:
            assert control.should_save
            self.evaluations.append(self.now)
            self.now += self.closing
            self.deadline.on_save(self.args, self.state, control)
        return control.should_training_stop

    def run(self, *seconds: float) -> None:
        for each in seconds:
            if self.step(each):
                return


def test_rates_fall_to_zero_at_the_deadline_on_a_machine_that_becomes_slow(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 60, closing=0.5)
    machine.begin()
    machine.run(*[0.1] * 200, *[2.0] * 1000)
    assert machine.now <= 160 + 2.0  # a step at the most
    assert machine.rates[-1] < 0.01 < max(machine.rates)
    assert machine.rates[10:] == sorted(machine.rates[10:], reverse=True)
    assert 12 <= len(machine.evaluations) <= 17
    assert machine.deadline.ended


def test_steps_end_a_run_that_is_faster_than_its_time(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1e6, steps=50)
    machine.begin()
    machine.run(*[0.1] * 50)
    assert machine.state.global_step == 50
    assert machine.rates[-1] == pytest.approx(0, abs=1e-6)


def test_a_run_that_resumes_has_the_time_that_was_left(tmp_path: Path) -> None:
    first = Machine(tmp_path, 60)
    first.begin()
    first.run(*[1.0] * 40)
    kept = json.loads(json.dumps(first.deadline.state()))
    second = Machine(tmp_path, 60)
    second.now = 5000.0
    second.state.global_step = 40
    second.state.stateful_callbacks = {"Deadline": kept}  # type: ignore[assignment]
    second.begin()
    assert second.deadline.spent == pytest.approx(40)
    second.run(*[1.0] * 100)
    assert second.now == pytest.approx(5020, abs=1.5)
    assert second.rates[0] < 0.4
    assert second.rates[-1] < 0.01
    third = Machine(tmp_path, 60)
    third.state.global_step = second.state.global_step
    third.state.stateful_callbacks = {"Deadline": second.deadline.state()}  # type: ignore[assignment]
    third.begin()
    assert third.state.max_steps == third.state.global_step  # nothing is left


def test_time_counts_from_the_command_and_some_is_kept_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    monkeypatch.setenv(deadline.STARTED, "900")
    assert seconds_to_train(10) == 440  # of 600: 100 have passed, 60 are kept
    assert time_to_choose(10) == 1485  # a quarter of what is kept is for comparing and saving
    assert seconds_to_train(1) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="minutes ends a run of one process: give max_steps"):
        endings(1.0, stops_early=True)


@pytest.mark.parametrize(
    ("curve", "loss", "beginning"),
    [
        ([3.0, 2.0, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0], 1.0, "add music: the held-out loss was best after 38% of the run"),
        ([3.0, 2.5, 2.2, 2.0, 1.9, 1.8], 1.9, "give it longer"),
        ([3.0, 2.0, 1.52, 1.51, 1.5, 1.5], 1.4, "try a larger --size"),
        ([3.0, 2.0, 1.7, 1.6, 1.55, 1.5], 0.6, "add music: the model knows the training pieces"),
        ([], 1.0, "give it more music or more time"),
    ],
)
def test_advice_follows_from_the_curves(curve: list[float], loss: float, beginning: str) -> None:
    assert advice(curve, loss, epochs=2.0).startswith(beginning)
