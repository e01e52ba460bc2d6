"""SeqGAN for Mamba language models, as a `transformers.Trainer` with a second network."""

import contextlib
import copy
from collections import defaultdict
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin, Trainer, TrainerCallback

from midimamba.evaluation.metrics import discriminator_accuracy, distinct_n, self_bleu
from midimamba.modeling.feed_forward import SwitchExperts
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import inference, sample
from midimamba.tokenization.packing import IGNORED, BlockCollator, stack_blocks
from midimamba.training import credit
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.rollout import monte_carlo_values, rollout_positions

# Beside the files of Trainer in every checkpoint.
DISCRIMINATOR_FILE = "discriminator.safetensors"
ROLLOUT_POLICY_FILE = "rollout_policy.safetensors"
D_OPTIMIZER_FILE = "discriminator_optimizer.pt"


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

    Raises:
        ValueError: if the vocabularies differ, or `dense` is asked of a discriminator that values no prefixes.
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
    ):
        if discriminator.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the discriminator knows {discriminator.config.vocab_size} tokens, "
                f"the generator {model.config.vocab_size}; they must share one tokenizer"
            )
        if args.estimator == "dense" and discriminator.config.kind != "mamba":
            raise ValueError("estimator 'dense' needs a discriminator of kind 'mamba', which values every prefix")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or BlockCollator(model.config.bos_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        for module in model.modules():
            if isinstance(module, SwitchExperts):
                # Sampling drops no token. Nor must the pass that scores its samples, or it scores another policy.
                module.capacity_factor = model.config.num_experts
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self.rollout_policy = copy.deepcopy(model).requires_grad_(False).to(args.device)
        d_optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr=args.d_learning_rate, weight_decay=args.d_weight_decay
        )
        self.discriminator, self.d_optimizer = self.accelerator.prepare(discriminator, d_optimizer)

    # ---- Algorithm 1 ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One generator step; at the start of a round the discriminator's steps come first."""
        model.train()
        real: Tensor = self._prepare_inputs(inputs)["input_ids"]
        # The last batch of an epoch may be smaller, even a single sequence, which has no others for a baseline.
        real = torch.cat([real, self._draw_blocks(self.args.per_device_train_batch_size - len(real))])
        step = self.state.global_step
        if step == 0:
            torch.manual_seed(self.args.seed + self.args.process_index)  # every process samples music of its own
            self._warm_up_discriminator()
        if step % self.args.g_steps == 0:
            self._update_rollout_policy()
            for _ in range(self.args.d_steps):
                self._discriminator_step()
        return self._generator_step(model, real)

    def _warm_up_discriminator(self) -> None:
        hidden = self.args.disable_tqdm or not self.is_local_process_zero()
        bar = tqdm(range(self.args.d_warmup_steps), desc="discriminator warm-up", disable=hidden)
        for _ in bar:
            bar.set_postfix(accuracy=f"{self._discriminator_step():.2f}")

    def _generator_step(self, model: nn.Module, real: Tensor) -> Tensor:
        """Sample, value, and accumulate the gradient of one teacher-forced pass in micro-batches."""
        prompt = self.args.prompt_length
        fake = sample(self.generator, real[:, :prompt], self.args.sequence_length)
        values = self._action_values(fake)
        advantages = credit.leave_one_out_advantages(values) if self.args.baseline == "leave-one-out" else values
        self._metrics["reward"].append(values[:, -1].mean().item())
        self._metrics["advantage_std"].append(advantages.std(correction=0).item())
        if self.args.normalize_advantages:
            advantages = credit.normalize_advantages(advantages)
        total = real.new_zeros((), dtype=torch.float32)
        chunks = list(zip(*(t.split(self.args.micro_batch_size) for t in (fake, real, advantages)), strict=True))
        for index, chunk in enumerate(chunks):
            is_last = index == len(chunks) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = self._generator_loss(model, *chunk) * (len(chunk[0]) / len(fake))
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _generator_loss(self, model: nn.Module, fake: Tensor, real: Tensor, advantages: Tensor) -> Tensor:
        """REINFORCE on sampled sequences plus maximum likelihood on real ones, in one pass of the network."""
        sequences, seq_idx = fake, None
        if self.args.mle_weight:
            music = self.data_collator.separate(real)
            sequences = torch.cat([fake, real])
            if "seq_idx" in music:
                # The sampler's state runs on past a token that begins a piece, in the prompt or drawn. The gradient
                # needs the probabilities it drew from: a sampled sequence is one document.
                seq_idx = torch.cat([torch.zeros_like(fake), music["seq_idx"]])
        with self.compute_loss_context_manager():
            logits = model(input_ids=sequences, use_cache=False, seq_idx=seq_idx).logits[:, :-1]
        log_probabilities = logits.log_softmax(-1)
        chosen = log_probabilities.gather(-1, sequences[:, 1:, None]).squeeze(-1)
        first_action = self.args.prompt_length - 1
        policy_loss = credit.reinforce_loss(chosen[: len(fake), first_action:], advantages)
        self._metrics["policy_loss"].append(policy_loss.item())
        with torch.no_grad():
            sampled = log_probabilities[: len(fake), first_action:]
            self._metrics["entropy"].append(-(sampled.exp() * sampled).sum(-1).mean().item())
        if not self.args.mle_weight:
            return policy_loss
        is_target = music["labels"][:, 1:] != IGNORED
        likelihood = chosen[len(fake) :].masked_fill(~is_target, 0).sum()
        self._metrics["mle_loss"].append(-(likelihood / is_target.sum()).item())
        return policy_loss - self.args.mle_weight * likelihood / len(real)

    def _action_values(self, sequences: Tensor) -> Tensor:
        """Q of every sampled action, `(batch, actions)`; the last is the reward of the whole sequence."""
        length, prompt = self.args.sequence_length, self.args.prompt_length
        actions = length - prompt
        if self.args.estimator == "terminal":
            return self._rewards(sequences)[:, None].expand(-1, actions)
        if self.args.estimator == "dense":
            rewards = self._rewards(sequences, every_prefix=True)[:, prompt:]
            return credit.discounted_returns(2 * rewards - 1, self.args.discount)
        positions = rollout_positions(length, prompt, self.args.rollout_positions)
        values = monte_carlo_values(
            self.rollout_policy,
            self._rewards,
            sequences,
            positions,
            self.args.num_rollouts,
            self.args.rollout_batch_size,
        )
        times = torch.tensor([*positions, length - 1], device=values.device) - prompt
        return credit.interpolate_values(values, times, actions)

    def _rewards(self, sequences: Tensor, every_prefix: bool = False) -> Tensor:
        """How likely sequences `(n, time)` are real, `(n,)`; or every prefix of them, `(n, time)`."""
        if self.args.reward != "discriminator":
            shape = sequences.shape if every_prefix else sequences.shape[:1]
            make = torch.ones if self.args.reward == "constant" else torch.rand
            return make(shape, device=sequences.device)
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        with inference(discriminator):
            outputs = [discriminator(rows) for rows in sequences.split(self.args.rollout_batch_size)]
        if every_prefix:
            return torch.cat([output.position_logits for output in outputs]).float().sigmoid()
        return torch.cat([output.logits[:, 0] for output in outputs]).float().sigmoid()

    def _discriminator_step(self) -> float:
        """Fresh real blocks against fresh samples that start alike. Returns the accuracy before the update."""
        real = self._draw_blocks(self.args.per_device_train_batch_size)
        fake = sample(self.generator, real[:, : self.args.prompt_length], self.args.sequence_length)
        sequences = torch.cat([real, fake])
        labels = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))]).to(self.args.device)
        self.discriminator.train()
        for epoch in range(self.args.d_epochs):
            output = self.discriminator(sequences, labels=labels)
            if epoch == 0:
                accuracy: float = ((output.logits[:, 0] > 0) == (labels > 0.5)).float().mean().item()
            self.d_optimizer.zero_grad()
            self.accelerator.backward(output.loss)
            if self.args.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.discriminator.parameters(), self.args.max_grad_norm)
            self.d_optimizer.step()
            self._metrics["d_loss"].append(output.loss.item())
        self._metrics["d_accuracy"].append(accuracy)
        return accuracy

    def _draw_blocks(self, count: int) -> Tensor:
        """So many blocks of the training music at random, `(count, time)`."""
        rows = torch.randint(len(self.train_dataset), (count,))
        blocks = [self.train_dataset[int(row)]["input_ids"] for row in rows]
        return torch.tensor(blocks, dtype=torch.long, device=self.args.device).view(count, self.args.sequence_length)

    @torch.no_grad()
    def _update_rollout_policy(self) -> None:
        """`beta <- m beta + (1 - m) theta`."""
        for beta, theta in zip(self.rollout_policy.parameters(), self.generator.parameters(), strict=True):
            beta.lerp_(theta.detach(), 1 - self.args.rollout_momentum)

    @property
    def generator(self) -> MidiMambaForCausalLM:
        """The generator without the wrappers of distributed training."""
        generator: MidiMambaForCausalLM = self.accelerator.unwrap_model(self.model)
        return generator

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
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            samples = self._evaluate_samples(self.eval_dataset if eval_dataset is None else eval_dataset)
        measured = {f"{metric_key_prefix}_{name}": value for name, value in samples.items()}
        self.log(measured)
        return {**metrics, **measured}

    def _evaluate_samples(self, dataset: Dataset) -> dict[str, float]:
        count = min(self.args.num_eval_samples, len(dataset))
        real = stack_blocks([dataset[index * len(dataset) // count] for index in range(count)])
        real = real.to(self.args.device)
        fake = sample(self.generator, real[:, : self.args.prompt_length], self.args.sequence_length)
        accuracy = discriminator_accuracy(self.accelerator.unwrap_model(self.discriminator), real, fake)
        return {
            **{f"d_{name}": value for name, value in accuracy.items()},
            **{f"distinct_{n}": distinct_n(fake, n) for n in (1, 2, 3, 4)},
            "self_bleu_4": self_bleu(fake, 4),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages of what the steps since the last training log collected."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._metrics.items()}
            self._metrics.clear()
        super().log(logs, start_time)

    # ---- checkpoints: everything a resumed run needs to go on bit for bit ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            folder = Path(output_dir)
            discriminator = self.accelerator.unwrap_model(self.discriminator)
            save_file(discriminator.state_dict(), folder / DISCRIMINATOR_FILE, metadata={"format": "pt"})
            save_file(self._rollout_state(), folder / ROLLOUT_POLICY_FILE, metadata={"format": "pt"})
            torch.save(self.d_optimizer.state_dict(), folder / D_OPTIMIZER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self.accelerator.unwrap_model(self.discriminator).load_state_dict(load_file(folder / DISCRIMINATOR_FILE))
        for name, tensor in load_file(folder / ROLLOUT_POLICY_FILE).items():
            self.rollout_policy.get_parameter(name).data.copy_(tensor)
        state = torch.load(folder / D_OPTIMIZER_FILE, map_location=self.args.device, weights_only=True)
        self.d_optimizer.load_state_dict(state)

    def _rollout_state(self) -> dict[str, Tensor]:
        # `named_parameters` lists tied weights once, as safetensors demands.
        return {name: parameter.detach() for name, parameter in self.rollout_policy.named_parameters()}
