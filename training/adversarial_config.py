"""The options of adversarial fine-tuning."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class AdversarialConfig(TrainingArguments):
    r"""
    Configuration of the [`AdversarialTrainer`]: SeqGAN (Yu et al., arXiv 1609.05473) on top of
    [`~transformers.TrainingArguments`].

    One training step is one generator step, preceded at the start of every round by the discriminator's steps. The
    batch of the data loader gives the prompts, and the music of the interleaved maximum-likelihood term.

    Parameters:
        sequence_length (`int`, *optional*, defaults to 128): tokens in a sequence, prompt included.
        prompt_length (`int`, *optional*, defaults to 1): tokens at the start of every sampled sequence that are taken
            from real music and not rewarded. Real and sampled sequences then start alike, wherever a block begins.
        micro_batch_size (`int`, *optional*, defaults to 16): sequences in memory at once while gradients are computed.
        estimator (`str`, *optional*, defaults to `"monte-carlo"`): of action values: `monte-carlo` (the paper's),
            `dense` (the causal discriminator's values of prefixes) or `terminal` (the value of the whole sequence).
        num_rollouts (`int`, *optional*, defaults to 16): completions an action value; `N` in the paper.
        rollout_positions (`int`, *optional*): value so many actions a sequence by roll-outs, evenly spread, and
            interpolate between them. Every action by default, as in the paper.
        rollout_batch_size (`int`, *optional*, defaults to 512): completions in memory at once.
        rollout_momentum (`float`, *optional*, defaults to 0.0): `m` in `beta <- m beta + (1 - m) theta` after a round.
        discount (`float`, *optional*, defaults to 0.95): of later rewards, for `dense`.
        reward (`str`, *optional*, defaults to `"discriminator"`): or `constant` or `random`, the two controls without
            which no effect of a reward can be claimed.
        baseline (`str`, *optional*, defaults to `"leave-one-out"`): `leave-one-out`: minus the mean value of the other
            sequences at the same position; `none`: the paper's.
        normalize_advantages (`bool`, *optional*, defaults to `True`): to unit standard deviation over the batch.
        mle_weight (`float`, *optional*, defaults to 1.0): weight of the interleaved maximum-likelihood term; 0 is the
            paper's. Both terms are sums over time, averaged over the batch.
        g_steps (`int`, *optional*, defaults to 1): generator steps a round.
        d_steps (`int`, *optional*, defaults to 1): discriminator steps a round, each with fresh negatives.
        d_epochs (`int`, *optional*, defaults to 1): passes over a step's negatives; `k` in the paper.
        d_warmup_steps (`int`, *optional*, defaults to 50): discriminator steps before the first round.
        d_learning_rate (`float`, *optional*, defaults to 1e-3): of the discriminator, with AdamW.
        d_weight_decay (`float`, *optional*, defaults to 0.01): of the discriminator.
        num_eval_samples (`int`, *optional*, defaults to 64): sequences sampled at an evaluation.
    """

    sequence_length: int = field(default=128, metadata={"help": "Tokens in a sequence, prompt included."})
    prompt_length: int = field(
        default=1, metadata={"help": "Tokens at the start of a sampled sequence that are taken from real music."}
    )
    micro_batch_size: int = field(
        default=16, metadata={"help": "Sequences in memory at once while gradients are computed."}
    )
    estimator: str = field(
        default="monte-carlo",
        metadata={"help": "Estimator of action values.", "choices": ["monte-carlo", "dense", "terminal"]},
    )
    num_rollouts: int = field(default=16, metadata={"help": "Completions an action value (N in the paper)."})
    rollout_positions: int | None = field(
        default=None,
        metadata={"help": "Value so many actions a sequence by roll-outs and interpolate; unset: every action."},
    )
    rollout_batch_size: int = field(default=512, metadata={"help": "Completions in memory at once."})
    rollout_momentum: float = field(default=0.0, metadata={"help": "m in beta <- m beta + (1 - m) theta."})
    discount: float = field(default=0.95, metadata={"help": "Discount of later rewards, for the dense estimator."})
    reward: str = field(
        default="discriminator",
        metadata={
            "help": "What rewards a sequence; constant and random are controls.",
            "choices": ["discriminator", "constant", "random"],
        },
    )
    baseline: str = field(
        default="leave-one-out",
        metadata={"help": "What is subtracted from action values.", "choices": ["leave-one-out", "none"]},
    )
    normalize_advantages: bool = field(default=True, metadata={"help": "To unit standard deviation over the batch."})
    mle_weight: float = field(
        default=1.0, metadata={"help": "Weight of the interleaved maximum-likelihood term; 0: the paper's."}
    )
    g_steps: int = field(default=1, metadata={"help": "Generator steps a round."})
    d_steps: int = field(default=1, metadata={"help": "Discriminator steps a round, each with fresh negatives."})
    d_epochs: int = field(default=1, metadata={"help": "Passes over the negatives of a discriminator step."})
    d_warmup_steps: int = field(default=50, metadata={"help": "Discriminator steps before the first round."})
    d_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the discriminator."})
    d_weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the discriminator."})
    num_eval_samples: int = field(default=64, metadata={"help": "Sequences sampled at an evaluation."})

    # The NaN filter of Trainer replaces a NaN loss in the log: a broken run would look sound.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one = (
            *("prompt_length", "micro_batch_size", "num_rollouts", "rollout_batch_size"),
            *("g_steps", "d_steps", "d_epochs", "num_eval_samples"),
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.prompt_length >= self.sequence_length:
            raise ValueError(
                f"prompt_length {self.prompt_length} leaves nothing to sample of {self.sequence_length} tokens"
            )
        actions = self.sequence_length - self.prompt_length
        if self.rollout_positions is not None and not 1 <= self.rollout_positions <= actions:
            raise ValueError(f"rollout_positions is {self.rollout_positions}, but must lie in 1 … {actions}")
        if not 0 <= self.rollout_momentum < 1:
            raise ValueError(f"rollout_momentum is {self.rollout_momentum}, but must lie in [0, 1)")
        if self.baseline == "leave-one-out" and self.per_device_train_batch_size < 2:
            raise ValueError("the leave-one-out baseline needs per_device_train_batch_size of at least 2")
        if self.gradient_accumulation_steps != 1:
            raise ValueError("use micro_batch_size instead of gradient_accumulation_steps: a step samples one batch")
