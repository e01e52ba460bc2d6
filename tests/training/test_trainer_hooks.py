"""What the trainers rely on in `transformers.Trainer`: these tests fail when a new version of it has changed that."""

import inspect
import re
from pathlib import Path

from transformers import Trainer

from midimamba.training import adversarial_trainer
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.guarded_trainer import GuardedTrainer
from midimamba.training.whole_checkpoints import WholeCheckpointTrainer


def in_order(source: str, *parts: str) -> bool:
    """Whether all parts are in the source, the first of each in this order."""
    places = [source.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


OURS = vars(WholeCheckpointTrainer).keys() | vars(GuardedTrainer).keys() | vars(AdversarialTrainer).keys()


def test_only_one_private_method_is_overridden() -> None:
    overridden = {name for name in OURS if hasattr(Trainer, name) and not hasattr(object, name)}
    overridden = {name for name in overridden if not name.startswith("__")}
    assert {name for name in overridden if name.startswith("_")} == {"_save_checkpoint"}
    public = {"create_optimizer", "training_step", "train", "evaluate", "log", "save_model"}
    assert {name for name in overridden if not name.startswith("_")} == public


def test_names_of_ours_do_not_hide_attributes_of_an_instance(tmp_path: Path) -> None:
    """Trainer sets these in its methods; a method or a property of the same name would get in its way."""
    source = inspect.getsource(Trainer)
    assert [name for name in OURS if f"self.{name} = " in source] == []


def test_one_private_method_writes_a_checkpoint_and_deletes_old_ones() -> None:
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    source = inspect.getsource(Trainer._save_checkpoint)
    steps = ("self.save_model(", "self._save_optimizer_and_scheduler(", "self._save_rng_state(", ".save_to_json(")
    assert in_order(source, *steps, "save_total_limit=self.args.save_total_limit")


def test_trainer_unpickles_nothing() -> None:
    """It writes pickles, and reads them with `weights_only=True`, which builds tensors and numbers alone."""
    loads = re.findall(r"torch\.load\(.*?weights_only=(\w+)", inspect.getsource(Trainer), flags=re.DOTALL)
    assert len(loads) == inspect.getsource(Trainer).count("torch.load(")
    assert set(loads) == {"True"}


def test_a_run_begins_after_its_checkpoint_is_loaded() -> None:
    """So that the state of the callback is not overwritten."""
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert in_order(loop, "self._prepare_for_training(", "self.callback_handler.on_train_begin(")
    assert "self._load_optimizer_and_scheduler(" in inspect.getsource(Trainer._prepare_for_training)


def test_callbacks_come_before_a_step_is_saved_and_evaluated() -> None:
    source = inspect.getsource(Trainer)
    assert in_order(
        source[source.index("callback_handler.on_pre_optimizer_step(") :],
        "callback_handler.on_pre_optimizer_step(",
        "self.optimizer.step()",
        "callback_handler.on_step_end(",
        "self._maybe_log_save_evaluate(",
    )


def test_the_algorithm_fits_on_a_page() -> None:
    lines = Path(adversarial_trainer.__file__).read_text().splitlines()
    assert len(lines) <= 150
