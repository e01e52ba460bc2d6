"""A generator that two processes keep in parts: one process's numbers, and checkpoints that fit any number of them.

This file is also the program that those processes run: `python test_sharding.py OUT ROWS_PER_PROCESS CHECKPOINT`.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from distributed_support import GLOBAL_BATCH, draws_that_do_not_depend_on_processes, launch, make_blocks, make_trainer
from midimamba import MidiMambaForCausalLM
from midimamba.corpus.packing import BlockCollator
from midimamba.errors import InputError
from midimamba.training.lora import add_adapters
from midimamba.training.process import training_process
from midimamba.training.sharding import hollow_copy, own_part, with_parameters
from midimamba.training.whole_checkpoints import WholeCheckpointTrainer
from support import make_generator

LOOK_BACK: dict[str, Any] = {"lookback_bars": [1, 2], "bar_token_ids": [1], "position_token_ids": [[2, 0], [3, 4]]}
# Three steps an epoch: a checkpoint of the fourth lies within the second.
STEPS, SAVED = 6, 4
PRETRAINING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "look-back": (LOOK_BACK, {"max_grad_norm": 0.1, "eval_strategy": "steps", "eval_steps": 2}),
    "recomputed": ({"layout": "transformer"}, {"gradient_checkpointing": True, "weight_decay": 0.1}),
    "untied": ({"layout": "mamba-mlp", "tie_word_embeddings": False}, {"optim": "sgd"}),
}
# What reads the weights or the gradient of the generator, and the copies of it.
TUNING: dict[str, dict[str, Any]] = {
    "momentum": {"num_rollouts": 2, "rollout_positions": 2, "rollout_momentum": 0.5, "max_grad_norm": 0.1},
    "ppo": {
        **{"estimator": "terminal", "ppo_epochs": 2, "ppo_clip": 0.2, "kl_coef": 0.5, "kl_target": 0.001},
        **{"entropy_coef": 0.01, "ema_decay": 0.5, "micro_batch_size": 2, "optim": "adamw_torch"},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    },
    "adapters": {"estimator": "terminal", "peft_config": LoraConfig(r=2), "kl_coef": 0.5},
}


def pretrain(folder: Path, rows: int, case: str, resume: Path | None = None) -> WholeCheckpointTrainer:
    """Pre-train in as many processes as there are, and save what becomes of the generator."""
    network, options = PRETRAINING[case]
    common: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": rows, "learning_rate": 1e-2}
    common |= {"save_strategy": "steps", "save_steps": SAVED, "logging_steps": 1, "disable_tqdm": True}
    common |= {"use_cpu": True, "lr_scheduler_type": "constant"}
    args = TrainingArguments(str(folder / case), **common | options)
    model, blocks = make_generator(**network), (make_blocks(24, 5), make_blocks(8, 6))
    trainer = WholeCheckpointTrainer(model, args, BlockCollator(1), *blocks, shards=args.world_size > 1)
    trainer.train(None if resume is None else str(resume))
    record(trainer, folder / f"{case}.safetensors", {"": trainer.whole_model()})
    return trainer


def record(trainer: WholeCheckpointTrainer, file: Path, networks: dict[str, nn.Module]) -> None:
    """Save weights and logs in the main process."""
    if trainer.is_world_process_zero():
        state = {f"{key}.{n}": p.detach().clone() for key, net in networks.items() for n, p in net.named_parameters()}
        for log in trainer.state.log_history[:-1]:
            for key in log.keys() & {"loss", "grad_norm", "eval_loss", "kl", "reward", "d_accuracy", "ema_distance"}:
                state[f"log.{log['step']}.{key}"] = torch.tensor(float(log[key]))
        save_file(state, file)


def share(tensors: list[Tensor]) -> float:
    """Of what number of values this process keeps, by what there is."""
    assert all(isinstance(tensor, DTensor) for tensor in tensors)
    kept = sum(tensor.to_local().numel() for tensor in tensors if isinstance(tensor, DTensor))
    return kept / sum(tensor.numel() for tensor in tensors)


class Poison(TrainerCallback):
    """Makes a weight of the generator infinite in one process, once."""

    used = False

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 1 and not self.used:
            self.used = True
            if args.process_index == 1:
                with torch.no_grad():
                    own_part(others["model"].lm_head.weight).fill_(torch.inf)


def work(out: Path, rows: int, checkpoint: Path | None) -> None:
    """Train all cases; go on from a checkpoint of other processes; note what this process keeps."""
    trainers = {case: pretrain(out, rows, case) for case in PRETRAINING}
    for case, options in TUNING.items():
        with draws_that_do_not_depend_on_processes():
            trainer = make_trainer(out / case, rows, shards=checkpoint is not None, **options)
            trainer.train()
        networks = {"g": trainer.generator_for_saving, "d": trainer.accelerator.unwrap_model(trainer.discriminator)}
        record(trainer, out / f"{case}.safetensors", networks)
    if checkpoint is None:
        return
    (out / "resumed").mkdir(exist_ok=True)
    pretrain(out / "resumed", rows, "look-back", checkpoint)
    moments = trainers["look-back"].optimizer.state_dict()["state"].values()
    facts: dict[str, Any] = {
        "weights": share(list(trainers["look-back"].model.parameters())),
        "moments": share([each[name] for each in moments for name in ("exp_avg", "exp_avg_sq")]),
    }
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "estimator": "terminal"}
    trainer = make_trainer(out / "own", rows, shards=True, bf16=True, **saving)
    trainer.add_callback(Poison())
    trainer.train()
    generator, resident = trainer.generator, trainer.resident_policy
    assert resident is not None
    again = make_trainer(out / "own", rows, shards=True, bf16=True, **saving)
    again.train(resume_from_checkpoint=str(out / "own" / "checkpoint-2"))
    facts |= {
        "rollbacks": trainer.guard.rollbacks,
        "kept": sorted({str(parameter.dtype) for parameter in generator.parameters()}),
        "sampled": sorted({str(parameter.dtype) for parameter in resident.parameters()}),
        "resumed": all(
            torch.equal(own_part(ours), own_part(theirs))
            for ours, theirs in zip(again.generator.parameters(), generator.parameters(), strict=True)
        ),
        "discriminator": sum(p.double().sum().item() for p in trainer.discriminator.parameters()),
        "resident": all(
            torch.equal(ours, theirs.full_tensor().bfloat16())
            for ours, theirs in zip(resident.parameters(), generator.parameters(), strict=True)
            if isinstance(theirs, DTensor)
        ),
    }
    (out / f"facts-{trainer.args.process_index}").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of one process, which is this one and shards nothing, and of two, which do."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    work(one, GLOBAL_BATCH, None)
    launch(__file__, two, GLOBAL_BATCH // 2, one / "look-back" / f"checkpoint-{SAVED}")
    return one, two


def assert_alike(ours: Path, theirs: Path) -> None:
    """The same weights and logs."""
    one, two = load_file(ours), load_file(theirs)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-5, msg=partial("{}: {}".format, key))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PRETRAINING, *TUNING])
def test_two_processes_that_keep_parts_give_the_update_of_one(case: str, runs: tuple[Path, Path]) -> None:
    assert_alike(*(run / f"{case}.safetensors" for run in runs))
    start = make_generator(**PRETRAINING[case][0] if case in PRETRAINING else {"eos_token_id": None})
    ended = load_file(runs[1] / f"{case}.safetensors")
    prefix = "." if case in PRETRAINING else "g."
    apart = [(ended[f"{prefix}{name}"] - parameter).abs().max() for name, parameter in start.named_parameters()]
    assert max(apart) > 1e-4


@pytest.mark.slow
def test_a_process_keeps_its_share_samples_from_a_whole_copy_and_resumes_bit_for_bit(runs: tuple[Path, Path]) -> None:
    facts = [json.loads((runs[1] / f"facts-{index}").read_text()) for index in (0, 1)]
    for each in facts:
        assert 0.4 < each["weights"] < 0.6
        assert 0.4 < each["moments"] < 0.6
        assert each["kept"] == ["torch.float32"]
        assert each["sampled"] == ["torch.bfloat16"]
        assert each["resident"]
        assert each["resumed"]
    assert facts[0]["discriminator"] == facts[1]["discriminator"]


@pytest.mark.slow
def test_all_processes_go_back_when_a_weight_of_one_is_not_finite(runs: tuple[Path, Path]) -> None:
    assert [json.loads((runs[1] / f"facts-{index}").read_text())["rollbacks"] for index in (0, 1)] == [1, 1]
    ended = MidiMambaForCausalLM.from_pretrained(runs[1] / "own" / "checkpoint-3")
    assert all(parameter.isfinite().all() for parameter in ended.parameters())


@pytest.mark.slow
def test_checkpoints_are_whole_and_hold_what_those_of_one_process_hold(runs: tuple[Path, Path]) -> None:
    for case in ("look-back", "untied", "ppo"):
        one, two = (run / case / f"checkpoint-{1 if case == 'ppo' else SAVED}" for run in runs)
        names = {path.name for path in one.iterdir()} ^ {path.name for path in two.iterdir()}
        assert names == {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
        ours, theirs = (load_file(run / "model.safetensors") for run in (one, two))
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
        ours, theirs = (torch.load(run / "optimizer.pt", weights_only=True) for run in (one, two))
        assert ours["param_groups"] == theirs["param_groups"]
        torch.testing.assert_close(ours["state"], theirs["state"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(runs: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = runs
    assert_alike(one / "look-back.safetensors", two / "resumed" / "look-back.safetensors")
    pretrain(tmp_path, GLOBAL_BATCH, "look-back", two / "look-back" / f"checkpoint-{SAVED}")
    assert_alike(one / "look-back.safetensors", tmp_path / "look-back.safetensors")


def test_a_single_process_has_nobody_to_share_with(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="over several processes, and there is one: start more"):
        make_trainer(tmp_path, GLOBAL_BATCH, shards=True)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: add_adapters(model, LoraConfig(r=2))])
def test_a_copy_with_other_parameters_keeps_ties_and_the_model(
    wrap: Callable[[PreTrainedModel], PreTrainedModel],
) -> None:
    model = wrap(make_generator(**LOOK_BACK))
    assert all(parameter.is_meta for parameter in hollow_copy(model).parameters())
    doubled = with_parameters(model, lambda parameter: parameter.detach() * 2)
    assert doubled.get_input_embeddings().weight is doubled.get_output_embeddings().weight
    for ours, theirs in zip(doubled.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, 2 * theirs)
        assert ours.requires_grad == theirs.requires_grad


if __name__ == "__main__":
    with training_process():  # like the scripts: torch's own end of a process group aborts now and then
        work(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
