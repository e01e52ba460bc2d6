"""The options of adversarial fine-tuning."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import TrainingArguments

# What a number may be, in words and as a test, and for which options. An option that is unset passes; NaN never.
_ALLOWED: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        (
            *("prompt_length", "micro_batch_size", "num_rollouts", "rollout_batch_size", "ppo_epochs"),
            *("g_steps", "d_steps", "d_epochs", "num_eval_samples", "importance_clip"),
        ),
    ),
    ("at least 2", lambda value: value >= 2, ("group_size",)),
    (
        "at least 0",
        lambda value: value >= 0,
        (
            *("kl_coef", "entropy_coef", "mle_weight", "mle_weight_final", "r1_weight", "replay_size"),
            *("d_warmup_steps", "d_learning_rate", "d_weight_decay", "d_max_grad_norm"),
            *("num_logged_samples", "max_nll_drift", "max_self_bleu_increase", "max_rollbacks"),
        ),
    ),
    ("greater than 0", lambda value: value > 0, ("advantage_clip", "kl_target", "rollout_memory_mb", "temperature")),
    (
        "in [0, 1)",
        lambda value: 0 <= value < 1,
        ("rollout_momentum", "baseline_decay", "replay_fraction", "ema_decay"),
    ),
    ("in (0, 1)", lambda value: 0 < value < 1, ("ppo_clip",)),
    ("in [0, 1]", lambda value: 0 <= value <= 1, ("discount",)),
    ("in [0, 0.5)", lambda value: 0 <= value < 0.5, ("label_smoothing",)),
    ("in [0.5, 1]", lambda value: 0.5 <= value <= 1, ("d_max_accuracy", "d_warmup_accuracy")),
)


@dataclass
class AdversarialConfig(TrainingArguments):
    r"""
    Configuration of the [`AdversarialTrainer`]: SeqGAN (Yu et al., arXiv 1609.05473) on top of
    [`~transformers.TrainingArguments`].

    One training step is one generator step, preceded at the start of every round by the discriminator's steps. The
    batch of the data loader gives the prompts, and the music of the interleaved maximum-likelihood term. All terms of
    the generator's loss are sums over time, averaged over the batch.

    Parameters:
        sequence_length (`int`, *optional*, defaults to 128): tokens in a sequence, prompt included.
        stop_at_eos (`bool`, *optional*, defaults to `False`): sequences end at the generator's `eos_token_id`; what
            follows is padding that is neither judged nor learned from, and the discriminator sees real blocks up to
            their first end. By default sequences run on past an end into the next piece, as the packed blocks do.
        prompt_length (`int`, *optional*, defaults to 1): tokens at the start of every sampled sequence that are taken
            from real music and not rewarded. Real and sampled sequences then start alike, wherever a block begins.
        micro_batch_size (`int`, *optional*, defaults to 16): sequences in memory at once while gradients are
            computed; of the discriminator, so many real ones and as many samples.
        estimator (`str`, *optional*, defaults to `"monte-carlo"`): of action values: `monte-carlo` (the paper's),
            `dense` (the causal discriminator's values of prefixes) or `terminal` (the value of the whole sequence).
        num_rollouts (`int`, *optional*, defaults to 16): completions an action value; `N` in the paper.
        rollout_positions (`int`, *optional*): value so many actions a sequence by roll-outs and interpolate between
            them. Every action by default, as in the paper.
        rollout_at (`str`, *optional*, defaults to `"bars"`): which those are. `bars`: the sequence's bar lines first,
            evenly spread ones if there are more, then other actions; without a tokenizer that has bars the same as
            `strided`: evenly spread.
        rollout_batch_size (`int`, *optional*, defaults to 512): completions in memory at once.
        rollout_memory_mb (`float`, *optional*): memory for roll-outs in MB of 2^20 bytes, beside the weights. The
            number of completions in memory at once then follows from it.
        rollout_momentum (`float`, *optional*, defaults to 0.0): `m` in `beta <- m beta + (1 - m) theta` after a round.
        temperature (`float`, *optional*, defaults to 1.0): of the sequences that the generator learns from (ColdGANs,
            arXiv 2006.04643). Other than 1, every action is weighted by how much likelier the policy itself makes it.
            Negatives and roll-outs stay at 1: the discriminator is to judge the policy. There is no top-p: no weight
            corrects for what it never lets be drawn.
        importance_clip (`float`, *optional*, defaults to 5.0): the largest such weight.
        discount (`float`, *optional*, defaults to 0.95): of later rewards, for `dense`.
        reward (`str`, *optional*, defaults to `"discriminator"`): the probability that a sequence is real, which is
            the paper's. `log-odds`: its logit, log D - log(1 - D), which does not saturate, and whose mean is the
            negative divergence KL(policy ‖ music) if the discriminator is perfect (arXiv 1710.11248); for `dense` what
            a token adds to it. `constant` and `random` are the two controls without which no effect of a reward can be
            claimed.
        baseline (`str`, *optional*, defaults to `"leave-one-out"`): what is subtracted from an action value.
            `leave-one-out`: the mean value of the other sequences at the same position; `group`: the same among
            `group_size` sequences that share a prompt (arXiv 2402.03300); `running`: the moving average of earlier
            steps at the same position; `none`: nothing, as in the paper.
        group_size (`int`, *optional*, defaults to 4): samples of a prompt, for the `group` baseline. A batch then has
            that many times fewer prompts.
        baseline_decay (`float`, *optional*, defaults to 0.9): weight of the past in the `running` baseline.
        normalize_advantages (`bool`, *optional*, defaults to `True`): to unit standard deviation over the batch.
        advantage_clip (`float`, *optional*): largest absolute advantage, after the normalisation.
        ppo_epochs (`int`, *optional*, defaults to 1): optimizer steps on a sampled batch.
        ppo_clip (`float`, *optional*): clip the ratio of new to old probabilities of an action to 1 ± `ppo_clip`
            (PPO, arXiv 1707.06347). Unset: the paper's REINFORCE, which allows one step a batch. The gradient of the
            first step is the same.
        kl_coef (`float`, *optional*, defaults to 0.0): weight of the divergence KL(policy ‖ pre-trained generator).
        kl_target (`float`, *optional*): adapt `kl_coef` so that the divergence is so many nats a token
            (arXiv 1909.08593, section 2.2). Unset: `kl_coef` stays as it is.
        entropy_coef (`float`, *optional*, defaults to 0.0): weight of the bonus for the policy's entropy.
        mle_weight (`float`, *optional*, defaults to 1.0): weight of the interleaved maximum-likelihood term; 0 is the
            paper's.
        mle_weight_final (`float`, *optional*): `mle_weight` changes linearly to this value at the last step. Unset: it
            stays as it is.
        ema_decay (`float`, *optional*, defaults to 0.0): evaluate and save, instead of the generator, an exponential
            moving average of its weights over the steps; 0: the generator itself. The average begins at the
            pre-trained weights and has a memory of about `1 / (1 - ema_decay)` steps.
        g_steps (`int`, *optional*, defaults to 1): generator steps a round.
        d_steps (`int`, *optional*, defaults to 1): discriminator steps a round, each with fresh negatives.
        d_epochs (`int`, *optional*, defaults to 1): passes over a step's negatives; `k` in the paper.
        d_max_accuracy (`float`, *optional*): leave out a round's discriminator step if the discriminator is more often
            right on its fresh batch. Unset: never.
        d_warmup_steps (`int`, *optional*, defaults to 50): discriminator steps before the first round.
        d_warmup_accuracy (`float`, *optional*): end the warm-up as soon as the discriminator is right so often on a
            fresh batch. Unset: after `d_warmup_steps`.
        d_learning_rate (`float`, *optional*, defaults to 1e-3): of the discriminator, with AdamW.
        d_weight_decay (`float`, *optional*, defaults to 0.01): of the discriminator.
        d_max_grad_norm (`float`, *optional*, defaults to 1.0): largest norm of the discriminator's gradient; 0: any.
        label_smoothing (`float`, *optional*, defaults to 0.0): real music has the label `1 - label_smoothing`, samples
            keep 0 (one-sided, arXiv 1606.03498).
        r1_weight (`float`, *optional*, defaults to 0.0): weight of half the squared gradient of the discriminator's
            logit on real music, with respect to token embeddings (R1, arXiv 1801.04406). Only for `cnn`.
        replay_size (`int`, *optional*, defaults to 0): old negatives to remember.
        replay_fraction (`float`, *optional*, defaults to 0.0): share of a discriminator step's negatives that is drawn
            from those, as far as there are any.
        num_eval_samples (`int`, *optional*, defaults to 64): sequences sampled at an evaluation.
        num_logged_samples (`int`, *optional*, defaults to 4): so many of them are written as MIDI and (with
            matplotlib) piano rolls under `output_dir/samples/step-N`, and shown in TensorBoard if it is on. Needs a
            processor.
        max_nll_drift (`float`, *optional*): roll back when held-out likelihood (`eval_loss`) has risen by more than
            this share of what it was before the first step.
        max_self_bleu_increase (`float`, *optional*): roll back when the samples' self-BLEU-4 has risen by more than
            this since before the first step.
        max_rollbacks (`int`, *optional*, defaults to 3): how often to go back to the last checkpoint with half the
            learning rates before the run ends there. Besides the two bounds, losses, gradients and weights that are
            not finite make a run go back.
    """

    sequence_length: int = field(default=128, metadata={"help": "Tokens in a sequence, prompt included."})
    prompt_length: int = field(
        default=1, metadata={"help": "Tokens at the start of a sampled sequence that are taken from real music."}
    )
    stop_at_eos: bool = field(
        default=False, metadata={"help": "Sequences end at the end-of-sequence token, real ones for the judge, too."}
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
    rollout_at: str = field(
        default="bars",
        metadata={
            "help": "Which actions those are: bar lines first, or evenly spread.",
            "choices": ["bars", "strided"],
        },
    )
    rollout_batch_size: int = field(default=512, metadata={"help": "Completions in memory at once."})
    rollout_memory_mb: float | None = field(
        default=None, metadata={"help": "Memory for roll-outs in MB; unset: that of rollout_batch_size completions."}
    )
    rollout_momentum: float = field(default=0.0, metadata={"help": "m in beta <- m beta + (1 - m) theta."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of the samples that the generator learns from; other than 1, by weights."}
    )
    importance_clip: float = field(default=5.0, metadata={"help": "Largest weight of an action, with a temperature."})
    discount: float = field(default=0.95, metadata={"help": "Discount of later rewards, for the dense estimator."})
    reward: str = field(
        default="discriminator",
        metadata={
            "help": "What rewards a sequence: its probability to be real, or log-odds; or a control.",
            "choices": ["discriminator", "log-odds", "constant", "random"],
        },
    )
    baseline: str = field(
        default="leave-one-out",
        metadata={
            "help": "What is subtracted from action values.",
            "choices": ["leave-one-out", "group", "running", "none"],
        },
    )
    group_size: int = field(default=4, metadata={"help": "Samples of a prompt, for the group baseline."})
    baseline_decay: float = field(default=0.9, metadata={"help": "Weight of the past in the running baseline."})
    normalize_advantages: bool = field(default=True, metadata={"help": "To unit standard deviation over the batch."})
    advantage_clip: float | None = field(
        default=None, metadata={"help": "Largest absolute advantage, after the normalisation; unset: any."}
    )
    ppo_epochs: int = field(default=1, metadata={"help": "Optimizer steps on a sampled batch."})
    ppo_clip: float | None = field(
        default=None, metadata={"help": "Clip the policy's ratio to 1 ± this; unset: REINFORCE, one step a batch."}
    )
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the divergence from the pre-trained generator."})
    kl_target: float | None = field(
        default=None, metadata={"help": "Adapt kl_coef to reach so many nats a token; unset: a fixed kl_coef."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the bonus for the policy's entropy."})
    mle_weight: float = field(
        default=1.0, metadata={"help": "Weight of the interleaved maximum-likelihood term; 0: the paper's."}
    )
    mle_weight_final: float | None = field(
        default=None, metadata={"help": "mle_weight changes linearly to this value; unset: it stays."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Evaluate and save a moving average of the generator's weights; 0: off."}
    )
    g_steps: int = field(default=1, metadata={"help": "Generator steps a round."})
    d_steps: int = field(default=1, metadata={"help": "Discriminator steps a round, each with fresh negatives."})
    d_epochs: int = field(default=1, metadata={"help": "Passes over the negatives of a discriminator step."})
    d_max_accuracy: float | None = field(
        default=None, metadata={"help": "Leave out discriminator steps at a higher accuracy; unset: none."}
    )
    d_warmup_steps: int = field(default=50, metadata={"help": "Discriminator steps before the first round."})
    d_warmup_accuracy: float | None = field(
        default=None, metadata={"help": "End the warm-up at this accuracy; unset: after d_warmup_steps."}
    )
    d_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the discriminator."})
    d_weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the discriminator."})
    d_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Largest norm of the discriminator's gradient; 0: any."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Real music has the label 1 - this."})
    r1_weight: float = field(
        default=0.0, metadata={"help": "Weight of the R1 gradient penalty; for discriminators of kind cnn."}
    )
    replay_size: int = field(default=0, metadata={"help": "Old negatives to remember."})
    replay_fraction: float = field(
        default=0.0, metadata={"help": "Share of a discriminator step's negatives that are old ones."}
    )
    num_eval_samples: int = field(default=64, metadata={"help": "Sequences sampled at an evaluation."})
    num_logged_samples: int = field(
        default=4, metadata={"help": "Of these, so many are written as MIDI and piano rolls; 0: none."}
    )
    max_nll_drift: float | None = field(
        default=None, metadata={"help": "Roll back if eval_loss has risen by this share of its start; unset: never."}
    )
    max_self_bleu_increase: float | None = field(
        default=None, metadata={"help": "Roll back if self-BLEU-4 has risen by this since the start; unset: never."}
    )
    max_rollbacks: int = field(
        default=3, metadata={"help": "Roll-backs to the last checkpoint, with half the learning rates each."}
    )

    # The NaN filter of Trainer replaces a NaN loss in the log: a broken run would look sound.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for allowed, holds, names in _ALLOWED:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name} is {value}, but must be {allowed}")
        # The command line refuses other choices itself; a recipe and a caller's code do not.
        for name in ("estimator", "reward", "baseline", "rollout_at"):
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
    def _saves_only_what_is_evaluated(self) -> bool:
        if self.save_strategy != self.eval_strategy:
            return self.save_strategy == "best"
        return self.save_strategy != "steps" or self.save_steps % self.eval_steps == 0

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
                self.rollout_positions is not None and not 1 <= self.rollout_positions <= actions,
                f"rollout_positions is {self.rollout_positions}, but must lie in 1 … {actions}",
            ),
            (
                self.baseline == "leave-one-out" and batch < 2,
                "the leave-one-out baseline needs per_device_train_batch_size of at least 2",
            ),
            (
                self.baseline == "group" and batch % self.group_size > 0,
                f"per_device_train_batch_size is {batch}, but must be a multiple of group_size {self.group_size}",
            ),
            (
                self.ppo_epochs > 1 and self.ppo_clip is None,
                f"ppo_epochs is {self.ppo_epochs}, but more than 1 needs ppo_clip: after the first step the samples "
                "are those of another policy",
            ),
            (
                self.kl_target is not None and not self.kl_coef,
                f"kl_target is {self.kl_target}, but needs a kl_coef greater than 0 to start from",
            ),
            (
                self.replay_fraction > 0 and not self.replay_size,
                f"replay_fraction is {self.replay_fraction}, but replay_size 0 remembers no negatives",
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
