"""SeqGAN for Mamba language models, as a `transformers.Trainer` with a second network."""

import contextlib
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from midimamba.corpus.packing import BlockCollator
from midimamba.errors import InputError
from midimamba.modeling.feed_forward import SwitchExperts
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import sample, valid_tokens
from midimamba.training import credit
from midimamba.training.action_values import ActionValues, ending_token
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.baseline import Baseline
from midimamba.training.checkpoint import (
    AVERAGED_POLICY_FILE,
    REFERENCE_POLICY_FILE,
    ROLLOUT_POLICY_FILE,
    AdversarialState,
)
from midimamba.training.discriminator_update import DiscriminatorUpdate
from midimamba.training.generator_loss import Batch, GeneratorLoss, LossTerms
from midimamba.training.guard import (
    TRAINER_STATE_FILE,
    DivergedError,
    Guard,
    last_complete_checkpoint,
    scale_learning_rates,
)
from midimamba.training.lora import add_adapters, merged
from midimamba.training.monitoring import Monitor, SampleLog, reward_by_position, spread_blocks
from midimamba.training.policies import distance, follow, frozen_copy, load_policy, weights_of

if TYPE_CHECKING:
    from peft import LoraConfig


class AdversarialTrainer(Trainer):
    """
    Algorithm 1 of SeqGAN. A round is `d_steps` discriminator steps, then `g_steps` generator steps; before the first,
    the discriminator is warmed up on samples of the pre-trained generator.

    Args:
        model (`MidiMambaForCausalLM`): the generator, pre-trained by maximum likelihood.
        discriminator (`MidiDiscriminator`): over the same vocabulary.
        args (`AdversarialConfig`): all options.
        train_dataset (`Dataset`): blocks of `sequence_length` tokens in a column `input_ids`.
        eval_dataset (`Dataset`): held-out blocks.
        data_collator (`BlockCollator`, *optional*): knows where pieces begin in blocks; by default at the
            `bos_token_id` of the generator's configuration.
        processing_class (`ProcessorMixin`, *optional*): saved beside the generator.
        callbacks (`list[TrainerCallback]`, *optional*): as for `Trainer`.
        bar_token_ids (`Sequence[int]`, *optional*): the tokens that begin a bar, for `rollout_at="bars"`; see
            [`~midimamba.training.rollout.tokens_that_begin_bars`]. By default roll-outs are evenly spread.
        peft_config (`LoraConfig`, *optional*): train low-rank adapters of the generator instead of its weights.
            Checkpoints then hold the adapters, `generator_for_saving` the whole with the adapters merged in.

    Raises:
        ValueError: if the vocabularies differ, `dense` is asked of a discriminator that values no prefixes,
            `r1_weight` of one without a second derivative, `rollout_memory_mb` is too little for one completion,
            `stop_at_eos` lacks the tokens it needs, adapters are asked for where they have no effect, or the generator
            would be sharded over processes (FSDP, DeepSpeed).
    """

    args: AdversarialConfig

    def __init__(
        self,
        model: MidiMambaForCausalLM,
        discriminator: MidiDiscriminator,
        args: AdversarialConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        data_collator: BlockCollator | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        bar_token_ids: Sequence[int] = (),
        peft_config: "LoraConfig | None" = None,
    ):
        if discriminator.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the discriminator knows {discriminator.config.vocab_size} tokens, "
                f"the generator {model.config.vocab_size}; they must share one tokenizer"
            )
        if args.estimator == "dense" and discriminator.config.kind != "mamba":
            raise ValueError("estimator 'dense' needs a discriminator of kind 'mamba', which values every prefix")
        super().__init__(
            model=model if peft_config is None else add_adapters(model, peft_config),
            args=args,
            data_collator=data_collator or BlockCollator(model.config.bos_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed would shard the generator, which has to be whole to sample: use plain data "
                "parallelism (training/accelerate_configs/gpu-2.yaml), and a smaller micro_batch_size or --use_peft"
            )
        for module in model.modules():
            if isinstance(module, SwitchExperts):
                # Sampling drops no token. Nor must the pass that scores its samples, or it scores another policy.
                module.capacity_factor = model.config.num_experts
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._num_sampled = 0
        self.eos_token_id = ending_token(model) if args.stop_at_eos else None
        self.rollout_policy = frozen_copy(self.generator)
        self.reference_policy = frozen_copy(self.generator) if args.kl_coef else None
        self.averaged_policy = frozen_copy(self.generator) if args.ema_decay else None
        self.baseline = Baseline(args.baseline, args.group_size, args.baseline_decay)
        self.generator_loss = GeneratorLoss(args, self.data_collator, self.reference_policy, self._metrics)
        self.discriminator_update = DiscriminatorUpdate(
            discriminator, args, self.accelerator, self._metrics, self.eos_token_id
        )
        self.discriminator = self.discriminator_update.discriminator
        self.action_values = ActionValues(args, self.rollout_policy, discriminator, bar_token_ids, self.eos_token_id)
        self.guard = Guard(args, self.accelerator)
        policies = {
            ROLLOUT_POLICY_FILE: self.rollout_policy,
            REFERENCE_POLICY_FILE: self.reference_policy,
            AVERAGED_POLICY_FILE: self.averaged_policy,
        }
        kept = {name: policy for name, policy in policies.items() if policy is not None}
        self.adversarial_state = AdversarialState(
            kept, self.discriminator_update, self.generator_loss, self.baseline, self.guard
        )
        self.monitor = Monitor(args, discriminator, train_dataset, eval_dataset, self.eos_token_id)
        folder, count = Path(args.output_dir) / "samples", args.num_logged_samples
        self.sample_log = SampleLog(folder, processing_class, count, self.callback_handler)
        # Trainer itself takes the step, but the callback comes before it saves and evaluates.
        self.add_callback(_AfterStep(self._after_step))

    # ---- Algorithm 1 ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One generator step; at the start of a round the discriminator's steps come first."""
        start, drawn = time.perf_counter(), self._num_drawn
        model.train()
        real: Tensor = self._prepare_inputs(inputs)["input_ids"]
        # The last batch of an epoch may be smaller, even a single sequence, which has no others for a baseline.
        real = torch.cat([real, self._draw_blocks(self.args.per_device_train_batch_size - len(real))])
        step = self.state.global_step
        if step == 0:
            torch.manual_seed(self.args.seed + self.args.process_index)  # every process samples music of its own
            self._warm_up_discriminator()
        if step % self.args.g_steps == 0:
            follow(self.rollout_policy, self.generator, self.args.rollout_momentum)
            for _ in range(self.args.d_steps):
                self._discriminator_step(may_skip=True)
        loss = self._generator_step(model, real)
        self._metrics["tokens_per_second"].append((self._num_drawn - drawn) / (time.perf_counter() - start))
        return loss

    def _warm_up_discriminator(self) -> None:
        """Discriminator steps until their number or the accuracy is reached."""
        hidden = self.args.disable_tqdm or not self.is_local_process_zero()
        enough = math.inf if self.args.d_warmup_accuracy is None else self.args.d_warmup_accuracy
        made, accuracy = 0, 0.0
        with tqdm(total=self.args.d_warmup_steps, desc="discriminator warm-up", disable=hidden) as bar:
            while made < self.args.d_warmup_steps and accuracy < enough:
                accuracy = self._discriminator_step()
                made += 1
                bar.set_postfix(accuracy=f"{accuracy:.2f}", refresh=False)
                bar.update()
        self._metrics["d_warmup_steps"].append(made)

    def _discriminator_step(self, may_skip: bool = False) -> float:
        """Real blocks against samples that start alike. Returns the accuracy before the update."""
        real = self._draw_blocks(self.args.per_device_train_batch_size)
        prompts = real[: len(real) - self.discriminator_update.num_replayed(len(real)), : self.args.prompt_length]
        return self.discriminator_update.step(real, self._sample(prompts), may_skip)

    def _generator_step(self, model: nn.Module, real: Tensor) -> Tensor:
        """Sample, value, and make the passes over the batch. Trainer takes the optimizer's step after the last one."""
        prompts = real[:, : self.args.prompt_length]
        if self.args.baseline == "group":
            prompts = prompts[:: self.args.group_size].repeat_interleave(self.args.group_size, 0)
        behaviour = None
        if self.args.temperature != 1:
            behaviour = torch.empty(len(prompts), self.args.sequence_length - self.args.prompt_length).to(
                prompts.device
            )
        fake, valid = self._sample(prompts, self.args.temperature, behaviour), None
        if self.eos_token_id is not None:
            valid = valid_tokens(fake, self.eos_token_id, self.args.prompt_length)[:, self.args.prompt_length :].bool()
        advantages = self._advantages(self.action_values(fake), valid)
        batch = Batch(fake, real, advantages, valid=valid, behaviour=behaviour)
        first = self._generator_pass(model, batch)
        loss = first.loss
        for _ in range(1, self.args.ppo_epochs):
            norm = self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or math.inf)
            self.guard.check_finite("the norm of the gradient", norm)
            self.optimizer.step()
            model.zero_grad()
            loss = loss + self._generator_pass(model, batch._replace(old=first.log_probabilities)).loss
        if self.reference_policy is not None:
            # Of the policy that sampled, and of all processes: they must agree on the next coefficient.
            self.generator_loss.adapt(self.accelerator.reduce(first.divergence, "mean").item())
        self._metrics["mle_weight"].append(self._mle_weight)
        return loss / self.args.ppo_epochs

    def _sample(self, prompts: Tensor, temperature: float = 1.0, log_probabilities: Tensor | None = None) -> Tensor:
        """Sequences `(n, time)` that the generator draws, as [`~midimamba.modeling.sampling.sample`] does."""
        length = self.args.sequence_length
        self._num_sampled += len(prompts) * (length - prompts.shape[1])
        return sample(self.generator, prompts, length, self.eos_token_id, temperature, log_probabilities)

    def _generator_pass(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Accumulate the gradient of one teacher-forced pass over a batch in micro-batches."""
        rows = len(batch.fake)
        chunks = batch.split(self.args.micro_batch_size)
        parts = []
        for index, chunk in enumerate(chunks):
            is_last = index == len(chunks) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    terms = self.generator_loss(model, self._mle_weight, *chunk)
                share = len(chunk.fake) / rows
                self.accelerator.backward(terms.loss * share)
            parts.append(LossTerms(terms.loss.detach() * share, terms.log_probabilities, terms.divergence * share))
        losses, log_probabilities, divergences = zip(*parts, strict=True)
        self.guard.check_finite("the loss", torch.stack(losses))
        return LossTerms(torch.stack(losses).sum(), torch.cat(log_probabilities), torch.stack(divergences).sum())

    @property
    def _mle_weight(self) -> float:
        """The weight of the likelihood at this step, on the line from the first step to the last."""
        start, final = self.args.mle_weight, self.args.mle_weight_final
        if final is None:
            return start
        return start + (final - start) * self.state.global_step / max(1, self.state.max_steps - 1)

    def _advantages(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Action values `(batch, actions)` minus the baseline, normalised, clipped, and 0 on padding.

        Processes put their values together: baseline and deviation are those of the whole batch, however it is spread.
        """
        mine = slice(self.args.process_index * len(values), (self.args.process_index + 1) * len(values))
        values = self.accelerator.gather(values)
        valid = torch.ones_like(values, dtype=torch.bool) if valid is None else self.accelerator.gather(valid)
        advantages = self.baseline.advantages(values).masked_fill(~valid, 0)
        self._metrics["reward"].append(values[:, -1].mean().item())
        for name, value in reward_by_position(values).items():
            self._metrics[name].append(value)
        self._metrics["advantage_mean"].append(advantages[valid].mean().item())
        self._metrics["advantage_std"].append(advantages[valid].std(correction=0).item())
        if self.args.normalize_advantages:
            advantages = credit.normalize_advantages(advantages, valid)
        if self.args.advantage_clip is not None:
            limit = self.args.advantage_clip
            self._metrics["advantage_clip_fraction"].append((advantages.abs() > limit).float().mean().item())
            advantages = advantages.clamp(-limit, limit)
        return advantages[mine]

    def _draw_blocks(self, count: int) -> Tensor:
        """So many blocks of the training music at random, `(count, time)`."""
        rows = torch.randint(len(self.train_dataset), (count,))
        blocks = [self.train_dataset[int(row)]["input_ids"] for row in rows]
        return torch.tensor(blocks, dtype=torch.long, device=self.args.device).view(count, self.args.sequence_length)

    @property
    def _num_drawn(self) -> int:
        """Tokens that sampling and roll-outs have drawn in this process so far."""
        return self._num_sampled + self.action_values.num_drawn

    def _after_step(self) -> None:
        networks = (self.generator, self.accelerator.unwrap_model(self.discriminator))
        self.guard.check_weights(parameter for network in networks for parameter in network.parameters())
        if self.averaged_policy is not None:
            follow(self.averaged_policy, self.generator, self.args.ema_decay)
            self._metrics["ema_distance"].append(distance(self.generator, self.averaged_policy))

    @property
    def generator(self) -> MidiMambaForCausalLM:
        """The generator without the wrappers of distributed training and of peft; adapters are in its layers."""
        model = self.accelerator.unwrap_model(self.model)
        return model if isinstance(model, MidiMambaForCausalLM) else model.get_base_model()

    @property
    def generator_for_saving(self) -> MidiMambaForCausalLM:
        """What is evaluated and should be published: the averaged weights if there are any, adapters merged in."""
        return merged(self.generator if self.averaged_policy is None else self.averaged_policy)

    # ---- going back when the run goes wrong ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`. A run that [`Guard`] finds to go wrong goes back to its last checkpoint, with half the
        learning rates of both networks; after `max_rollbacks` times it ends there.

        Raises:
            InputError: if a run goes wrong that has no checkpoint yet.
        """
        checkpoint: str | bool | None = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = last_complete_checkpoint(Path(self.args.output_dir)) or True  # Trainer says there is none
        self.guard.begin(checkpoint if isinstance(checkpoint, str) else None)
        while True:
            try:
                return super().train(checkpoint, trial, ignore_keys_for_eval)
            except DivergedError as failure:
                message = f"step {self.state.global_step}: {failure}"
                if self.guard.last_good is None:
                    raise InputError(f"{message}; there is no checkpoint to go back to: save earlier") from failure
                checkpoint = str(self.guard.last_good)
                self._metrics.clear()
                if self.guard.rollbacks >= self.args.max_rollbacks:
                    return self._stop_at(checkpoint, message)
            self.guard.roll_back()
            scale = 0.5**self.guard.rollbacks
            self._announce(
                f"{message}; back to {checkpoint} (roll-back {self.guard.rollbacks} of {self.args.max_rollbacks}), "
                f"learning_rate {self.args.learning_rate * scale:g}, "
                f"d_learning_rate {self.args.d_learning_rate * scale:g}"
            )

    def _stop_at(self, checkpoint: str, message: str) -> TrainOutput:
        """End the run with what a checkpoint holds, or the best one if that is what a run is to end with."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_FILE))
        self._load_from_checkpoint(checkpoint)
        self._load_optimizer_and_scheduler(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            checkpoint = self.state.best_model_checkpoint
            self._load_best_model()
        self._announce(f"{message}; the run ends after {self.guard.rollbacks} roll-backs, with {checkpoint}")
        self.is_in_train = False
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        losses = [log["loss"] for log in self.state.log_history if "loss" in log]
        loss = statistics.fmean(losses) if losses else math.nan
        return TrainOutput(self.state.global_step, loss, {"rollbacks": float(self.guard.rollbacks)})

    def _announce(self, message: str) -> None:
        if self.is_world_process_zero():
            sys.stderr.write(f"{message}\n")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.check_finite("the norm of the gradient", norm)
        return norm

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        is_first = not self.guard.reference
        self.guard.check_evaluation(metrics)
        if self.args.bounds_evaluation and is_first and self.state.global_step == 0:
            self._save_checkpoint(self.model, trial)  # so that there is something to go back to
        return metrics

    # ---- evaluation and logging ----

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out negative log-likelihood a token (`eval_loss`), then the discriminator's accuracy and diversity."""
        # The same random numbers at every evaluation, and none taken from training: curves are comparable, and an
        # evaluation more or less does not change a run.
        averaged: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.averaged_policy is not None:
            averaged = weights_of(self.generator, self.averaged_policy)
        with averaged, torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            samples = self._evaluate_samples(self.eval_dataset if eval_dataset is None else eval_dataset)
        measured = {f"{metric_key_prefix}_{name}": value for name, value in samples.items()}
        self.log(measured)
        return {**metrics, **measured}

    def _evaluate_samples(self, dataset: Dataset) -> dict[str, float]:
        real = spread_blocks(dataset, self.args.num_eval_samples).to(self.args.device)
        measures, samples = self.monitor.measure(real, self._sample(real[:, : self.args.prompt_length]))
        if self.is_world_process_zero():
            self.sample_log.write(self.state.global_step, samples)
        return measures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps since the last training log collected: averages, and the largest of a `…_max`."""
        if "loss" in logs:
            for name, value in self.monitor.measure_log().items():
                self._metrics[name].append(value)
            self._metrics["rollbacks"].append(self.guard.rollbacks)
            names = sorted(self._metrics)
            ours = [(max if name.endswith("_max") else statistics.fmean)(self._metrics[name]) for name in names]
            # Every process has measured the same, each on its part of the batch.
            theirs = self.accelerator.gather(torch.tensor([ours], dtype=torch.float64, device=self.args.device))
            for name, values in zip(names, theirs.T.tolist(), strict=True):
                logs[name] = max(values) if name.endswith("_max") else statistics.fmean(values)
            self._metrics.clear()
        super().log(logs, start_time)

    # ---- checkpoints: everything a resumed run needs to go on bit for bit ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.adversarial_state.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            factor = self.adversarial_state.load(Path(checkpoint))
            scale_learning_rates(self.optimizer, factor, self.lr_scheduler)
            scale_learning_rates(self.discriminator_update.optimizer, factor)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What follows is the state of Trainer, whose presence says that a checkpoint is whole.
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_FILE).unlink(missing_ok=True)  # of a run that went on from an earlier checkpoint
        super()._save_checkpoint(model, trial)
        self.guard.last_good = folder

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.averaged_policy is not None:
            load_policy(self.averaged_policy, Path(self.state.best_model_checkpoint) / AVERAGED_POLICY_FILE)


class _AfterStep(TrainerCallback):
    """Does something after every step of the optimizer."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.action()
