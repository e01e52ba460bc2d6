"""The options of adversarial fine-tuning."""

import dataclasses
from dataclasses import dataclass, field

from transformers import TrainingArguments

from midimamba.training.option_checks import TRAINER_RULES, Rule, check_numbers

_RULES = (
    Rule("-1, for any, or at least 0", lambda value: value == -1 or value >= 0, ("max_steps",)),
    Rule(
        "at least 1",
        lambda value: value >= 1,
        (
            *("prompt_length", "micro_batch_size", "num_rollouts", "ppo_epochs"),
            *("d_epochs", "num_eval_samples", "mini_batch_size", "bars", "draws_per_sample"),
        ),
    ),
    Rule("at least 2", lambda value: value >= 2, ("group_size",)),
    Rule(
        "at least 0",
        lambda value: value >= 0,
        (
            *("kl_coef", "entropy_coef", "mle_weight", "r1_weight", "d_warmup_steps", "d_learning_rate"),
            *("d_steps", "d_max_grad_norm", "max_nll_drift", "max_self_bleu_increase"),
        ),
    ),
    Rule(
        "greater than 0",
        lambda value: value > 0,
        ("advantage_clip", "kl_target", "rollout_memory_mb", "temperature"),
    ),
    Rule("in [0, 1)", lambda value: 0 <= value < 1, ("rollout_momentum", "replay_fraction", "ema_decay")),
    Rule("in (0, 1)", lambda value: 0 < value < 1, ("ppo_clip",)),
    Rule("in [0, 0.5)", lambda value: 0 <= value < 0.5, ("label_smoothing",)),
    Rule("in [0.5, 1]", lambda value: 0.5 <= value <= 1, ("d_max_accuracy",)),
)

# The sections of the help.
OPTION_GROUPS = {
    "sequences": ("sequence_length", "prompt_length", "bars", "temperature", "micro_batch_size", "mini_batch_size"),
    "action values": (
        *("estimator", "reward", "num_rollouts", "rollout_positions", "rollout_memory_mb", "rollout_momentum"),
    ),
    "credit": ("baseline", "group_size", "draws_per_sample", "normalize_advantages", "advantage_clip"),
    "the generator's step": (
        *("ppo_epochs", "ppo_clip", "kl_coef", "kl_target", "entropy_coef", "mle_weight", "ema_decay"),
    ),
    "the discriminator's steps": (
        *("d_steps", "d_epochs", "d_warmup_steps", "d_max_accuracy", "d_learning_rate", "d_max_grad_norm"),
        *("label_smoothing", "r1_weight", "replay_fraction"),
    ),
    "evaluation and the guard": ("num_eval_samples", "max_nll_drift", "max_self_bleu_increase"),
}


@dataclass
class AdversarialConfig(TrainingArguments):
    r"""
    Configuration of the [`AdversarialTrainer`]: SeqGAN (Yu et al., arXiv 1609.05473) on top of
    [`~transformers.TrainingArguments`].

    The defaults are the recipe `training/recipes/stable-adversarial.yaml`: SeqGAN with everything on that keeps what
    pre-training has learned. `distill-adversarial.yaml` there is the default of `midimamba tune`, and
    `paper-adversarial.yaml` is Algorithm 1 with nothing added.

    One training step is one round: the discriminator's steps, then one generator step. The batch of the data loader
    gives the prompts, and the music of the interleaved maximum-likelihood term. All terms of the generator's loss are
    sums over time, averaged over the batch. A sequence ends at the generator's `eos_token_id`, if it has one; what
    follows is padding that is neither judged nor learned from.

    > Parameters that control the sequences

    Parameters:
        sequence_length (`int`, *optional*, defaults to 128): tokens in a sequence, prompt included.
        prompt_length (`int`, *optional*, defaults to 1): tokens at the start of every sampled sequence that are taken
            from real music and not rewarded. Real and sampled sequences then start alike, wherever a block begins.
        bars (`int`, *optional*): sequences are judged, and learned from, up to the end of this many bars. Real music
            and samples are then of one length to a musician, if not in tokens. Unset: up to their end.
        temperature (`float`, *optional*, defaults to 1.0): the policy is the softmax of the generator's logits
            divided by this, in sampling and in every term of the loss but the maximum-likelihood one. Set it to the
            temperature at which the generator will be used.
        micro_batch_size (`int`, *optional*, defaults to 16): sequences in memory at once while gradients are
            computed; for the discriminator, this many real ones and as many samples.
        mini_batch_size (`int`, *optional*): take an optimizer step of the generator after this many samples, and one
            of the discriminator after this many real sequences and as many samples. The learning rate falls within
            a round. Unset: after the whole batch.

        > Parameters that control action values

        estimator (`str`, *optional*, defaults to `"monte-carlo"`): how actions are valued: `monte-carlo` (the
            paper's), `dense` (the causal discriminator's values of prefixes) or `terminal` (the value of the whole
            sequence). `distill` is no policy gradient: it fits the generator to its own samples by weighted maximum
            likelihood, with weights proportional to exp(log-odds), so that it becomes the generator times the odds
            of being real. The largest weights are cut where they would rest on less than a tenth of the samples. With
            `mini_batch_size`, samples are drawn in proportion to their weights.
        reward (`str`, *optional*, defaults to `"discriminator"`): the probability that a sequence is real, which is
            the paper's. `log-odds`: its logit, log D - log(1 - D), which does not saturate, and whose mean is the
            negative divergence KL(policy ‖ music) if the discriminator is perfect (arXiv 1710.11248); for `dense` what
            a token adds to it. For `terminal` and `distill`, log-odds are calibrated in every round, on held-out music
            and on samples that the discriminator has not seen, and are 0 if it cannot tell those apart.
            `constant`, `random` and `shuffled` (the log-odds, dealt out at random) are the controls
            without which no effect of a reward can be claimed.
        num_rollouts (`int`, *optional*, defaults to 4): completions per action value; `N` in the paper.
        rollout_positions (`int`, *optional*, defaults to 8): how many actions of a sequence roll-outs value: bar lines
            first, evenly spread ones if there are more, then other actions. Values between them are interpolated.
            Unset: every action, as in the paper.
        rollout_memory_mb (`float`, *optional*, defaults to 64): memory for roll-outs in MB of 2^20 bytes, beside the
            weights. The number of completions in memory at once follows from it.
        rollout_momentum (`float`, *optional*, defaults to 0.5): `m` in `beta <- m beta + (1 - m) theta` after a round;
            0 is the paper's.

        > Parameters that control credit

        baseline (`str`, *optional*, defaults to `"leave-one-out"`): what is subtracted from an action value.
            `leave-one-out`: the mean value of the other sequences at the same position; `running`: the moving average
            of earlier steps at the same position; `none`: nothing, as in the paper.
        group_size (`int`, *optional*): draw this many samples of every prompt, and let the leave-one-out baseline
            compare those alone (arXiv 2402.03300). A batch then has that many times fewer prompts. Unset: every
            sequence has its own prompt, and the whole batch is compared.
        draws_per_sample (`int`, *optional*, defaults to 1): for `distill`, draw this many times as many samples as are
            learned from. They are drawn again from these, in proportion to their weights: with more draws, fewer of
            them are the same. Needs a `mini_batch_size` below the batch.
        normalize_advantages (`bool`, *optional*, defaults to `True`): scale advantages to unit standard deviation
            over the batch.
        advantage_clip (`float`, *optional*, defaults to 3): largest absolute advantage, after the normalisation;
            unset: any.

        > Parameters that control the generator's step

        ppo_epochs (`int`, *optional*, defaults to 2): optimizer steps per sampled batch.
        ppo_clip (`float`, *optional*, defaults to 0.2): clip the ratio of new to old probabilities of an action to
            1 ± `ppo_clip` (PPO, arXiv 1707.06347). Unset: the paper's REINFORCE, which allows one step per batch. The
            gradient of the first step is the same.
        kl_coef (`float`, *optional*, defaults to 0.1): weight of the divergence KL(policy ‖ pre-trained generator);
            0 leaves it out, whatever `kl_target` is.
        kl_target (`float`, *optional*, defaults to 0.02): adapt `kl_coef` so that the divergence is this many nats per
            token (arXiv 1909.08593, section 2.2). Unset: `kl_coef` stays as it is.
        entropy_coef (`float`, *optional*, defaults to 0.01): weight of the bonus for the policy's entropy.
        mle_weight (`float`, *optional*, defaults to 1.0): weight of the interleaved maximum-likelihood term; 0 is the
            paper's.
        ema_decay (`float`, *optional*, defaults to 0.9): evaluate and save, instead of the generator, an exponential
            moving average of its weights over the steps; 0: the generator itself. The average starts from the
            pre-trained weights and has a memory of about `1 / (1 - ema_decay)` steps.

        > Parameters that control the discriminator's steps

        d_steps (`int`, *optional*, defaults to 2): discriminator steps per round, each with fresh negatives; 0: it
            stays as it is.
        d_epochs (`int`, *optional*, defaults to 3): passes over the negatives of a step; `k` in the paper.
        d_warmup_steps (`int`, *optional*, defaults to 60): discriminator steps before the first round.
        d_max_accuracy (`float`, *optional*, defaults to 0.9): leave out a discriminator step, in the warm-up as well,
            if the discriminator is right more often than this on its fresh batch. Unset: never.
        d_learning_rate (`float`, *optional*, defaults to 1e-3): of the discriminator, with AdamW and the generator's
            `weight_decay`.
        d_max_grad_norm (`float`, *optional*, defaults to 1.0): largest norm of the discriminator's gradient; 0: any.
        label_smoothing (`float`, *optional*, defaults to 0.1): real music has the label `1 - label_smoothing`, samples
            keep 0 (one-sided, arXiv 1606.03498).
        r1_weight (`float`, *optional*, defaults to 0.01): weight of half the squared gradient of the discriminator's
            logit on real music, with respect to token embeddings (R1, arXiv 1801.04406). Only for `cnn`.
        replay_fraction (`float`, *optional*, defaults to 0.25): share of a discriminator step's negatives that is
            drawn from the samples of earlier steps, as far as there are any.

        > Parameters that control evaluation and the guard

        num_eval_samples (`int`, *optional*, defaults to 64): sequences sampled at an evaluation. The first four are
            written as MIDI and (with matplotlib) piano rolls under `output_dir/samples/step-N`.
        max_nll_drift (`float`, *optional*, defaults to 0.03): roll back when the held-out negative log-likelihood
            (`eval_loss`) has risen by more than this share of what it was before the first step. Unset: never.
        max_self_bleu_increase (`float`, *optional*, defaults to 0.05): roll back when the samples' self-BLEU-4 has
            risen by more than this since before the first step. Unset: never. Besides the two bounds, losses,
            gradients and weights that are not finite make a run go back.
    """

    # > Parameters that control the sequences
    sequence_length: int = field(default=128, metadata={"help": "Tokens in a sequence, prompt included."})
    prompt_length: int = field(
        default=1, metadata={"help": "Tokens at the start of a sampled sequence that are taken from real music."}
    )
    bars: int | None = field(default=None, metadata={"help": "Judge sequences up to the end of this many bars."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits of the policy."})
    micro_batch_size: int = field(
        default=16, metadata={"help": "Sequences in memory at once while gradients are computed."}
    )

    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences of an optimizer step; unset: the whole batch."}
    )

    # > Parameters that control action values
    estimator: str = field(
        default="monte-carlo",
        metadata={"help": "Estimator of action values.", "choices": ["monte-carlo", "dense", "terminal", "distill"]},
    )
    reward: str = field(
        default="discriminator",
        metadata={
            "help": "What rewards a sequence: the probability that it is real, or its log-odds; or a control.",
            "choices": ["discriminator", "log-odds", "constant", "random", "shuffled"],
        },
    )
    num_rollouts: int = field(default=4, metadata={"help": "Completions per action value (N in the paper)."})
    rollout_positions: int | None = field(
        default=8,
        metadata={"help": "Value this many actions of a sequence by roll-outs and interpolate; unset: every action."},
    )
    rollout_memory_mb: float = field(
        default=64.0, metadata={"help": "Memory for roll-outs in MB, beside the weights."}
    )
    rollout_momentum: float = field(default=0.5, metadata={"help": "m in beta <- m beta + (1 - m) theta."})

    # > Parameters that control credit
    baseline: str = field(
        default="leave-one-out",
        metadata={
            "help": "What is subtracted from action values.",
            "choices": ["leave-one-out", "running", "none"],
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={"help": "Samples of every prompt, which the baseline compares; unset: the whole batch."},
    )
    draws_per_sample: int = field(
        default=1, metadata={"help": "For distill: draw so many times as many samples as are learned from."}
    )
    normalize_advantages: bool = field(
        default=True, metadata={"help": "Scale advantages to unit standard deviation over the batch."}
    )
    advantage_clip: float | None = field(
        default=3.0, metadata={"help": "Largest absolute advantage, after the normalisation; unset: any."}
    )

    # > Parameters that control the generator's step
    ppo_epochs: int = field(default=2, metadata={"help": "Optimizer steps per sampled batch."})
    ppo_clip: float | None = field(
        default=0.2, metadata={"help": "Clip the policy's ratio to 1 ± this; unset: REINFORCE, one step per batch."}
    )
    kl_coef: float = field(default=0.1, metadata={"help": "Weight of the divergence from the pre-trained generator."})
    kl_target: float | None = field(
        default=0.02, metadata={"help": "Adapt kl_coef to reach this many nats per token; unset: a fixed kl_coef."}
    )
    entropy_coef: float = field(default=0.01, metadata={"help": "Weight of the bonus for the policy's entropy."})
    mle_weight: float = field(
        default=1.0, metadata={"help": "Weight of the interleaved maximum-likelihood term; 0: the paper's."}
    )
    ema_decay: float = field(
        default=0.9, metadata={"help": "Evaluate and save a moving average of the generator's weights; 0: off."}
    )

    # > Parameters that control the discriminator's steps
    d_steps: int = field(default=2, metadata={"help": "Discriminator steps per round, each with fresh negatives."})
    d_epochs: int = field(default=3, metadata={"help": "Passes over the negatives of a discriminator step."})
    d_warmup_steps: int = field(default=60, metadata={"help": "Discriminator steps before the first round."})
    d_max_accuracy: float | None = field(
        default=0.9, metadata={"help": "Leave out discriminator steps at a higher accuracy; unset: none."}
    )
    d_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the discriminator."})
    d_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Largest norm of the discriminator's gradient; 0: any."}
    )
    label_smoothing: float = field(default=0.1, metadata={"help": "Real music has the label 1 - this."})
    r1_weight: float = field(
        default=0.01, metadata={"help": "Weight of the R1 gradient penalty; for discriminators of kind cnn."}
    )
    replay_fraction: float = field(
        default=0.25, metadata={"help": "Share of a discriminator step's negatives that are old ones."}
    )

    # > Parameters that control evaluation and the guard
    num_eval_samples: int = field(default=64, metadata={"help": "Sequences sampled at an evaluation."})
    max_nll_drift: float | None = field(
        default=0.03, metadata={"help": "Roll back if eval_loss has risen by this share of its start; unset: never."}
    )
    max_self_bleu_increase: float | None = field(
        default=0.05, metadata={"help": "Roll back if self-BLEU-4 has risen by this since the start; unset: never."}
    )

    # > Parameters of Trainer with other defaults
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of the generator."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the generator's rate."})
    max_steps: int = field(default=40, metadata={"help": "Rounds; 0: fit the discriminators alone."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences per round and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Held-out sequences per pass and device."})
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=10, metadata={"help": "Steps between evaluations."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save: no, steps, epoch or best."})
    save_steps: float = field(default=10, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=2, metadata={"help": "Steps between logs."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin the data loader's memory."})
    # The NaN filter of Trainer replaces a NaN loss in the log: a broken run would look sound.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, (*TRAINER_RULES, *_RULES))
        # The command line refuses other choices itself; a recipe and a caller's code do not.
        for name in ("estimator", "reward", "baseline"):
            value, choices = getattr(self, name), _choices(name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
        for is_impossible, message in self._conflicts():
            if is_impossible:
                raise ValueError(message)
        if self.bounds_evaluation:
            self.eval_on_start = True  # the bounds are relative to the pre-trained generator

    @property
    def bounds_evaluation(self) -> bool:
        """Whether what an evaluation measures can make a run roll back."""
        return self.max_nll_drift is not None or self.max_self_bleu_increase is not None

    @property
    def calibrates(self) -> bool:
        """Whether the discriminator's log-odds are calibrated in every round."""
        return self.reward in ("log-odds", "shuffled") and self.estimator in ("terminal", "distill")

    @property
    def _may_step_often(self) -> bool:
        return self.ppo_clip is not None or self.estimator == "distill"

    @property
    def _saves_only_what_is_evaluated(self) -> bool:
        if self.save_strategy != self.eval_strategy:
            return bool(self.save_strategy == "best")
        return self.save_strategy != "steps" or self.save_steps % (self.eval_steps or 1) == 0

    def _conflicts(self) -> tuple[tuple[bool, str], ...]:
        """Options that are possible alone and impossible together, with what to say about them."""
        batch = self.per_device_train_batch_size
        actions = self.sequence_length - self.prompt_length
        return (
            (
                actions < 1,
                f"prompt_length {self.prompt_length} leaves nothing to sample of {self.sequence_length} tokens",
            ),
            (
                self.rollout_positions is not None and self.rollout_positions < 1,
                f"rollout_positions is {self.rollout_positions}, but must be at least 1; leave it unset for all",
            ),
            (
                self.baseline == "leave-one-out" and batch < 2,
                "the leave-one-out baseline needs per_device_train_batch_size of at least 2",
            ),
            (
                self.group_size is not None and batch % self.group_size > 0,
                f"per_device_train_batch_size is {batch}, but must be a multiple of group_size {self.group_size}",
            ),
            (
                self.ppo_epochs > 1 and self.ppo_clip is None and self.estimator != "distill",
                f"ppo_epochs is {self.ppo_epochs}, but more than 1 needs ppo_clip: after the first step the samples "
                "are those of another policy",
            ),
            (
                self.mini_batch_size is not None and self.mini_batch_size < batch and not self._may_step_often,
                f"mini_batch_size {self.mini_batch_size} is below per_device_train_batch_size {batch}, which needs "
                "ppo_clip or estimator 'distill': after the first step the samples are those of another policy",
            ),
            (
                self.draws_per_sample > 1
                and not (self.estimator == "distill" and (self.mini_batch_size or batch) < batch),
                f"draws_per_sample is {self.draws_per_sample}, but only estimator 'distill' with a mini_batch_size "
                "below per_device_train_batch_size draws from more samples than it learns from: set it to 1",
            ),
            (
                self.estimator == "distill" and self.reward == "discriminator",
                "estimator 'distill' weighs samples by log-odds: set reward to log-odds, or to a control",
            ),
            (
                self.reward == "shuffled" and self.estimator in ("monte-carlo", "dense"),
                f"reward 'shuffled' deals out the log-odds of whole sequences, and estimator {self.estimator!r} has "
                "others as well: set estimator to terminal or distill",
            ),
            (
                self.max_steps == 0 and not self.calibrates,
                "max_steps 0 fits discriminators that can choose among samples: set reward to log-odds, and estimator "
                "to distill or terminal",
            ),
            (
                self.replay_fraction > 0 and int(self.replay_fraction * batch) < 1,
                f"replay_fraction is {self.replay_fraction}, which of {batch} negatives is less than one",
            ),
            (
                self.bounds_evaluation and (self.save_strategy == "no" or not self._saves_only_what_is_evaluated),
                "max_nll_drift and max_self_bleu_increase go back to checkpoints that were evaluated: set "
                "eval_strategy to save_strategy, and save_steps to a multiple of eval_steps",
            ),
            (
                self.gradient_accumulation_steps != 1,
                "use micro_batch_size instead of gradient_accumulation_steps: a step samples one batch",
            ),
        )


def _choices(name: str) -> list[str]:
    (option,) = (option for option in dataclasses.fields(AdversarialConfig) if option.name == name)
    choices: list[str] = option.metadata["choices"]
    return choices
