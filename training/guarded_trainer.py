"""What surrounds Algorithm 1 in a run: the guard, checkpoints, evaluation and logs."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from midimamba.corpus.packing import BlockCollator
from midimamba.errors import InputError
from midimamba.modeling.feed_forward import SwitchExperts
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.sampling import Ending, Sequences, sample
from midimamba.text import show
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.checkpoint import (
    AVERAGED_POLICY_FILE,
    REFERENCE_POLICY_FILE,
    ROLLOUT_POLICY_FILE,
    AdversarialState,
)
from midimamba.training.credit import Credit
from midimamba.training.discriminator_update import DiscriminatorUpdate
from midimamba.training.generator_update import GeneratorLoss
from midimamba.training.guard import (
    MAX_ROLLBACKS,
    DivergedError,
    Guard,
    scale_learning_rates,
)
from midimamba.training.judging import Judges
from midimamba.training.lora import merged, without_wrapper
from midimamba.training.metrics import Metrics
from midimamba.training.monitoring import Monitor, SampleLog, spread_blocks
from midimamba.training.policies import distance, follow, frozen_copy, load_policy
from midimamba.training.progress import progress
from midimamba.training.rollout import Rollouts
from midimamba.training.sharding import is_sharded, own_part
from midimamba.training.whole_checkpoints import (
    TRAINER_STATE_FILE,
    WholeCheckpointTrainer,
    choose_checkpoint,
    output_folder,
)

SAMPLED_AT_ONCE = 512
"""Sequences: more gain no speed, and cost memory."""
CALIBRATED_ON = 512
"""Samples of every process on which the discriminators are calibrated at the end of a run."""


class GuardedTrainer(WholeCheckpointTrainer):
    """
    A `Trainer` with a second network, whose runs go back when they go wrong and resume bit for bit. The algorithm is
    in [`AdversarialTrainer`], which makes the parts that are named here.

    It overrides none of Trainer's private methods. It calls a few when it goes back.
    """

    args: AdversarialConfig
    guard: Guard
    ending: Ending
    discriminator_update: DiscriminatorUpdate
    generator_loss: GeneratorLoss
    credit: Credit
    judges: Judges
    rollouts: Rollouts
    rollout_policy: PreTrainedModel
    reference_policy: PreTrainedModel | None
    discriminator: nn.Module
    train_discriminator: Callable[[], None]
    # Narrower than Trainer declares them: `AdversarialTrainer` takes nothing else, and makes the rest before a step.
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    data_collator: BlockCollator
    train_dataset: Dataset
    eval_dataset: Dataset
    processing_class: ProcessorMixin | None

    def prepare_run(self, discriminator: MidiDiscriminator) -> None:
        """Make what watches, saves and evaluates a run, once the parts of the algorithm are there."""
        self.metrics = Metrics()
        self.averaged_policy = frozen_copy(self.generator) if self.args.ema_decay else None
        self.resident_policy = self._make_resident() if self.shards else None
        policies = {
            ROLLOUT_POLICY_FILE: self.rollout_policy,
            REFERENCE_POLICY_FILE: self.reference_policy,
            AVERAGED_POLICY_FILE: self.averaged_policy,
        }
        kept = {name: policy for name, policy in policies.items() if policy is not None}
        self.adversarial_state = AdversarialState(
            kept, self.discriminator_update, self.generator_loss, self.credit, self.guard, self.judges
        )
        self.monitor = Monitor(self.args, discriminator, self.train_dataset, self.eval_dataset, self.ending)
        folder = output_folder(self.args) / "samples"
        self.sample_log = SampleLog(folder, self.processing_class, self.callback_handler)
        self.divergence: Tensor | float | None = None
        self._num_sampled = 0
        self._resumed_from: str | None = None
        self.add_callback(_Hooks(self))

    # ---- the generator ----

    @property
    def generator(self) -> PreTrainedModel:
        """The generator without the wrappers of distributed training and of peft; adapters are in its layers."""
        return without_wrapper(self.accelerator.unwrap_model(self.model))

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights if there are any, else the generator with its wrappers."""
        return self.model if self.averaged_policy is None else self.averaged_policy

    @property
    def generator_for_saving(self) -> PreTrainedModel:
        """What is evaluated and should be published: the averaged weights if there are any, adapters merged in. Where
        the generator is sharded, all processes ask together, and the main one gets it."""
        return merged(self.whole_model() if self.averaged_policy is None else self.averaged_policy)

    def _make_resident(self) -> PreTrainedModel:
        """The whole copy that a sharded generator is sampled from. Without momentum, it is the roll-out policy."""
        resident = frozen_copy(self.rollout_policy) if self.args.rollout_momentum else self.rollout_policy
        return resident.bfloat16() if self.accelerator.mixed_precision == "bf16" else resident

    def refresh_resident(self) -> None:
        """After every change of a sharded generator: gather it, a parameter at a time."""
        if self.resident_policy is not None:
            follow(self.resident_policy, self.generator, 0.0)

    def begin_sampling(self) -> None:
        """From here on, every process samples music of its own."""
        torch.manual_seed(self.args.seed + self.args.process_index)

    def sample(self, prompts: Tensor) -> Tensor:
        """Sequences `(n, time)` that the generator draws after prompts `(n, prompt)`."""
        length, temperature = self.args.sequence_length, self.args.temperature
        self._num_sampled += len(prompts) * (length - prompts.shape[1])
        policy = self.resident_policy if is_sharded(self.generator) else self.generator
        parts = prompts.split(SAMPLED_AT_ONCE)
        bar = progress(parts, "samples", self.args)
        return torch.cat([sample(policy, part, length, self.ending, temperature) for part in bar])

    def sample_to_ends(self, prompts: Tensor) -> Sequences:
        """Sequences as [`sample`] draws them, and where each ends."""
        ids = self.sample(prompts)
        return Sequences(ids, self.ending.mask(ids, self.args.prompt_length))

    def draw_blocks(self, count: int) -> Tensor:
        """`count` blocks of the training music at random, `(count, time)`."""
        rows = torch.randint(len(self.train_dataset), (count,))
        blocks = [self.train_dataset[int(row)]["input_ids"] for row in rows]
        return torch.tensor(blocks, dtype=torch.long, device=self.args.device).view(count, self.args.sequence_length)

    def fill_up(self, real: Tensor) -> Tensor:
        """The last batch of an epoch may be smaller, even a single sequence, which has no others for a baseline."""
        return torch.cat([real, self.draw_blocks(self.args.per_device_train_batch_size - len(real))])

    @property
    def num_drawn(self) -> int:
        """Tokens that sampling and roll-outs have drawn in this process so far."""
        return self._num_sampled + self.rollouts.num_drawn

    # ---- the discriminators before the first round, and those of the generator that a run leaves ----

    def pretrain_discriminator(self) -> None:
        """Train the discriminator on samples of the generator as the run found it."""
        hidden = self.args.disable_tqdm or not self.is_local_process_zero()
        for _ in tqdm(range(self.args.d_warmup_steps), desc="discriminator warm-up", disable=hidden):
            self.train_discriminator()

    def fit_to_result(self) -> None:
        """Fit the discriminators to the generator as the run leaves it, where their log-odds are calibrated.

        They have learned from samples of an earlier generator, which the last update has taught what they heard. If
        they chose among the draws of this one, they would ask for the same once more.
        """
        if not self.args.calibrates:
            return
        self.begin_sampling()
        with self.standing_in(self.evaluated_model):
            if self.state.global_step == 0:
                self.pretrain_discriminator()
            for _ in range(self.args.d_steps):
                self.train_discriminator()
            fake = self.sample_to_ends(self.draw_blocks(CALIBRATED_ON)[:, : self.args.prompt_length])
        self.judges.calibrate(fake)
        self.metrics.clear()

    # ---- going back when the run goes wrong ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`; of 0 steps, nothing is trained. A run that [`Guard`] finds to go wrong goes back to its
        last checkpoint, with half the learning rates of both networks; after three times it ends there.

        Raises:
            InputError: if a run goes wrong that has no checkpoint yet.
        """
        if self.args.max_steps == 0:  # Trainer would train for epochs
            return TrainOutput(0, 0.0, {})
        checkpoint: str | bool | None = resume_from_checkpoint
        if checkpoint is True:
            chosen = choose_checkpoint(output_folder(self.args)).checkpoint
            checkpoint = True if chosen is None else str(chosen)  # for True, Trainer says there is none
        self.guard.begin(checkpoint if isinstance(checkpoint, str) else None)
        while True:
            self._resumed_from = checkpoint if isinstance(checkpoint, str) else None
            try:
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
                if self.args.load_best_model_at_end:
                    self._load_best_average()
                    self.refresh_resident()
                return output
            except DivergedError as failure:
                message = f"step {self.state.global_step}: {failure}"
                if self.guard.last_good is None:
                    raise InputError(f"{message}; there is no checkpoint to go back to: save earlier") from failure
                checkpoint = str(self.guard.last_good)
                self.metrics.clear()
                if self.guard.rollbacks >= MAX_ROLLBACKS:
                    return self._stop_at(checkpoint, message)
            self.guard.roll_back()
            scale = 0.5**self.guard.rollbacks
            self._announce(
                f"{message}; back to {checkpoint} (roll-back {self.guard.rollbacks} of {MAX_ROLLBACKS}), "
                f"learning_rate {self.args.learning_rate * scale:g}, "
                f"d_learning_rate {self.args.d_learning_rate * scale:g}"
            )

    def _stop_at(self, checkpoint: str, message: str) -> TrainOutput:
        """End the run with what a checkpoint holds, or the best one if that is what a run is to end with."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_FILE))
        self._load_from_checkpoint(checkpoint)
        self._load_optimizer_and_scheduler(checkpoint)
        self.load_adversarial_state(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            checkpoint = self.state.best_model_checkpoint
            self._load_best_model()
            self._load_best_average()
        self.refresh_resident()
        self._announce(f"{message}; the run ends after {self.guard.rollbacks} roll-backs, with {checkpoint}")
        self.is_in_train = False
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        losses = [log["loss"] for log in self.state.log_history if "loss" in log]
        loss = statistics.fmean(losses) if losses else math.nan
        return TrainOutput(self.state.global_step, loss, {"rollbacks": float(self.guard.rollbacks)})

    def _load_best_average(self) -> None:
        """The averaged weights that belong to the best checkpoint, which Trainer does not know of."""
        best = self.state.best_model_checkpoint
        if self.averaged_policy is not None and best is not None:
            load_policy(self.averaged_policy, Path(best) / AVERAGED_POLICY_FILE)

    def _announce(self, message: str) -> None:
        if self.is_world_process_zero():
            show(message, file=sys.stderr)

    # ---- after every step ----

    def finish_step(self, started: float, drawn: int) -> None:
        """Bring the figures of a step over from the device, in one go, and judge them.

        Args:
            started (`float`): when the step began, by `time.perf_counter`.
            drawn (`int`): `num_drawn` at that time.

        Raises:
            DivergedError: if a figure of the step is not finite.
        """
        networks = (self.generator, self.accelerator.unwrap_model(self.discriminator))
        self.guard.watch_weights(parameter for network in networks for parameter in network.parameters())
        self.refresh_resident()
        if self.averaged_policy is not None:
            follow(self.averaged_policy, self.generator, self.args.ema_decay)
            self.metrics.add({"ema_distance": distance(self.generator, self.averaged_policy)})
        divergence = torch.as_tensor(0.0 if self.divergence is None else self.divergence, device=self.args.device)
        flags = self.guard.flags()
        divergence_now, *numbers = self.metrics.fetch(divergence, *flags.unbind())
        self.guard.check_flags(numbers)
        if self.divergence is not None:
            self.generator_loss.adapt(divergence_now)
        self.metrics.add({"tokens_per_second": (self.num_drawn - drawn) / (time.perf_counter() - started)})

    # ---- evaluation and logging ----

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out negative log-likelihood per token (`eval_loss`), then the discriminator's accuracy and diversity.
        Inside a run, the guard checks the figures."""
        # The same random numbers at every evaluation, and none taken from training: curves are comparable, and one
        # evaluation more or less does not change a run.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.standing_in(self.evaluated_model), torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            samples = self._evaluate_samples(self.eval_dataset if eval_dataset is None else eval_dataset)
        measured = {f"{metric_key_prefix}_{name}": value for name, value in samples.items()}
        self.log(measured)
        metrics |= measured
        if self.is_in_train and eval_dataset is None:
            is_first = not self.guard.reference and self.state.global_step == 0
            self.guard.check_evaluation(metrics)
            if self.args.bounds_evaluation and is_first:
                self._save_checkpoint(self.model, None)  # so that there is something to go back to
                self.guard.last_good = self.checkpoint_folder
        return metrics

    def _evaluate_samples(self, dataset: Dataset) -> dict[str, float]:
        real = spread_blocks(dataset, self.args.num_eval_samples).to(self.args.device)
        if len(real) == 1:
            real = real.expand(2, -1)  # diversity compares at least two samples
        measures, samples = self.monitor.measure(real, self.sample(real[:, : self.args.prompt_length]))
        if self.is_world_process_zero():
            self.sample_log.write(self.state.global_step, samples)
        return measures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps since the last training log collected: averages, and the largest of a `…_max`."""
        if "loss" in logs:
            self.metrics.add({**self.monitor.measure_log(), "rollbacks": float(self.guard.rollbacks)})
            ours = self.metrics.averages()
            # Every process has measured the same figures, each on its part of the batch.
            numbers = torch.tensor([list(ours.values())], dtype=torch.float64, device=self.args.device)
            for name, values in zip(ours, self.accelerator.gather(numbers).T.tolist(), strict=True):
                logs[name] = max(values) if name.endswith("_max") else statistics.fmean(values)
            self.metrics.clear()
        super().log(logs, start_time)

    # ---- checkpoints: everything a resumed run needs to go on bit for bit ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a checkpoint gets the rest of the run's state as well."""
        is_checkpoint = output_dir is not None and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        super().save_model(output_dir, _internal_call)
        if is_checkpoint:
            self.adversarial_state.save(Path(str(output_dir)))

    def load_adversarial_state(self, checkpoint: str) -> None:
        """Read what [`~GuardedTrainer.save_model`] added to a checkpoint, and scale the learning rates as it says."""
        factor = self.adversarial_state.load(Path(checkpoint))
        scale_learning_rates(self.optimizer, factor, self.lr_scheduler)
        scale_learning_rates(self.discriminator_update.optimizer, factor)


class _Hooks(TrainerCallback):
    """Trainer's public events, passed on."""

    def __init__(self, trainer: GuardedTrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        # Trainer has loaded its own part of the checkpoint, and draws no random number before its first batch.
        if self.trainer._resumed_from is not None:
            self.trainer.load_adversarial_state(self.trainer._resumed_from)
        self.trainer.refresh_resident()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started, self.drawn = time.perf_counter(), self.trainer.num_drawn

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        gradients = [own_part(p.grad) for p in self.trainer.model.parameters() if p.grad is not None]
        self.trainer.guard.watch("the gradient", torch.stack([gradient.sum() for gradient in gradients]))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        # The callback comes before Trainer saves and evaluates.
        self.trainer.finish_step(self.started, self.drawn)

    def on_save(self, *_: Any, **__: Any) -> None:
        self.trainer.guard.last_good = self.trainer.checkpoint_folder


def check_networks(
    model: PreTrainedModel, discriminator: MidiDiscriminator, args: AdversarialConfig, bar_token_ids: Sequence[int]
) -> None:
    """Refuse networks that do not fit together, and let experts take every token.

    Raises:
        ValueError: if the vocabularies differ, the estimator needs another discriminator, or `bars` are to be counted
            where there are none.
    """
    if discriminator.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the discriminator knows {discriminator.config.vocab_size} tokens, "
            f"the generator {model.config.vocab_size}; they must share one tokenizer"
        )
    if args.estimator == "dense" and discriminator.config.kind != "mamba":
        raise ValueError("estimator 'dense' needs a discriminator of kind 'mamba', which values every prefix")
    if args.bars is not None and not bar_token_ids:
        raise ValueError(f"bars is {args.bars}, but the tokenization has no bars; leave it unset")
    for module in model.modules():
        if isinstance(module, SwitchExperts):
            # Sampling drops no token. Nor must the pass that scores its samples, or it scores another policy.
            module.capacity_factor = model.config.num_experts
