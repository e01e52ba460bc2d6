"""SeqGAN (Yu et al., arXiv 1609.05473), Algorithm 1, as a `transformers.Trainer` with a second network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from midimamba.corpus.packing import BlockCollator
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.sampling import Ending
from midimamba.training.action_values import ActionValues
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.credit import Credit
from midimamba.training.discriminator_update import DiscriminatorUpdate
from midimamba.training.generator_update import Batch, GeneratorLoss, GeneratorUpdate
from midimamba.training.guard import Guard
from midimamba.training.guarded_trainer import GuardedTrainer, check_networks
from midimamba.training.judging import Judges
from midimamba.training.lora import add_adapters
from midimamba.training.monitoring import spread_blocks
from midimamba.training.policies import follow, frozen_copy
from midimamba.training.rewards import Reward
from midimamba.training.rollout import Rollouts, rows_for_budget

if TYPE_CHECKING:
    from peft import LoraConfig


HELD_OUT = 256
"""Held-out sequences on which the discriminator is watched and calibrated."""


class AdversarialTrainer(GuardedTrainer):
    """
    Algorithm 1 of SeqGAN. A training step is one round; before the first, the discriminator is trained on samples of
    the pre-trained generator.

    Args:
        model (`PreTrainedModel`): the generator, pre-trained by maximum likelihood: a [`MidiMambaForCausalLM`], a
            causal language model of transformers, or any other [`~midimamba.modeling.policy.Policy`].
        discriminator (`MidiDiscriminator`): over the same vocabulary.
        args (`AdversarialConfig`): all options.
        train_dataset (`Dataset`): blocks of `sequence_length` tokens in a column `input_ids`.
        eval_dataset (`Dataset`): held-out blocks.
        data_collator (`BlockCollator`, *optional*): knows where pieces begin in blocks; by default at the
            `bos_token_id` of the generator's configuration.
        processing_class (`ProcessorMixin`, *optional*): saved beside the generator.
        callbacks (`list[TrainerCallback]`, *optional*): as for `Trainer`.
        bar_token_ids (`Sequence[int]`, *optional*): the tokens that begin a bar, which roll-outs value first and
            `bars` counts; see [`~midimamba.training.action_values.tokens_that_begin_bars`].
        musical_discriminator (`bool`, *optional*, defaults to `False`): add the log-odds of a discriminator of musical
            features, which is fitted in every round; for rewards `log-odds` and `shuffled` of whole sequences.
        peft_config (`LoraConfig`, *optional*): train low-rank adapters instead. Checkpoints then hold only those.
        shards (`bool`, *optional*, defaults to `False`): split the generator over processes, and sample from a copy.

    Raises:
        ValueError: if the vocabularies differ, or an option does not fit the networks or the processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        discriminator: MidiDiscriminator,
        args: AdversarialConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        data_collator: BlockCollator | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        bar_token_ids: Sequence[int] = (),
        musical_discriminator: bool = False,
        peft_config: "LoraConfig | None" = None,
        shards: bool = False,
    ):
        check_networks(model, discriminator, args, bar_token_ids)
        super().__init__(
            model=model if peft_config is None else add_adapters(model, peft_config),
            args=args,
            data_collator=data_collator or BlockCollator(getattr(model.config, "bos_token_id", None)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            shards=shards,
        )
        self.guard = Guard(args, self.accelerator)
        self.ending = Ending.of(model.config)._replace(bars=args.bars, bar_token_ids=tuple(bar_token_ids))
        self.rollout_policy = frozen_copy(self.generator)
        self.reference_policy = frozen_copy(self.generator) if args.kl_coef else None
        held_out = spread_blocks(eval_dataset, HELD_OUT).to(args.device)
        decoder = processing_class if musical_discriminator else None
        self.judges = Judges(discriminator, self.accelerator, held_out, self.ending, args.prompt_length, decoder)
        reward = Reward(args.reward, discriminator, self.judges.log_odds)
        rows = rows_for_budget(self.rollout_policy, args.sequence_length, args.rollout_memory_mb, reward.judge)
        self.rollouts = Rollouts(
            self.rollout_policy, args.num_rollouts, rows, self.ending, args.prompt_length, args.temperature
        )
        self.action_values = ActionValues(args.estimator, reward, self.rollouts, args.rollout_positions, bar_token_ids)
        self.credit = Credit(args, self.accelerator)
        self.generator_loss = GeneratorLoss(args, self.data_collator, self.reference_policy)
        self.generator_update = GeneratorUpdate(self.generator_loss, args, self.accelerator, self.guard.watch)
        self.discriminator_update = DiscriminatorUpdate(discriminator, args, self.accelerator, self.ending, held_out)
        self.discriminator = self.discriminator_update.discriminator
        self.prepare_run(discriminator)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One round. Trainer takes the optimizer's step for the last pass over the samples."""
        model.train()
        real = self.fill_up(self._prepare_inputs(inputs)["input_ids"])
        if self.state.global_step == 0:
            self.begin_sampling()
            self.pretrain_discriminator()
        follow(self.rollout_policy, self.generator, self.args.rollout_momentum)  # beta <- theta
        for _ in range(self.args.d_steps):
            self.train_discriminator()
        return self._train_generator(model, real)

    def train_discriminator(self) -> None:
        """Train D on real blocks against fresh samples that start alike, by cross-entropy."""
        real = self.draw_blocks(self.args.per_device_train_batch_size)
        fresh = len(real) - self.discriminator_update.num_replayed(len(real))
        fake = self.sample(real[:fresh, : self.args.prompt_length])
        self.judges.forget_calibration()
        self.metrics.add(self.discriminator_update(real, fake))
        self.judges.seen = real, fake

    def _train_generator(self, model: nn.Module, real: Tensor) -> Tensor:
        """Sample Y ~ G, value each action by Q, and ascend the gradient of log G weighted by the advantages."""
        prompts = real[:: self.args.group_size or 1, : self.args.prompt_length]
        draws = (self.args.group_size or 1) * self.args.draws_per_sample
        fake = self.sample_to_ends(prompts.repeat_interleave(draws, 0))
        if self.args.calibrates:
            self.metrics.add(self.judges.calibrate(fake.rows(slice(None, None, self.args.draws_per_sample))))
        values = self.action_values(fake)
        advantages, credited = self.credit(values, fake.mask[:, self.args.prompt_length :].bool())
        loss, learned = self.generator_update(model, self.optimizer, Batch(fake, real, advantages))
        self.metrics.add({**credited, **learned})
        self.divergence = learned.get("kl")
        return loss
