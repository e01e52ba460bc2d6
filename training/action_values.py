"""Action values of sampled sequences: which estimator, of what reward, from where."""

from collections.abc import Sequence

import torch
from torch import Tensor

from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import inference, valid_tokens
from midimamba.training import credit
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.rollout import (
    Reward,
    Worth,
    bar_positions,
    monte_carlo_values,
    rollout_positions,
    rows_for_budget,
)


class ActionValues:
    """
    Q of every sampled action, by the estimator and the reward that the options name.

    Args:
        args (`AdversarialConfig`): the options.
        policy (`MidiMambaForCausalLM`): the roll-out policy.
        discriminator (`MidiDiscriminator`): without the wrappers of distributed training.
        bar_token_ids (`Sequence[int]`): the tokens that begin a bar; none: positions are evenly spread.
        eos_token_id (`int`, *optional*): the token that ends sequences; by default nothing does.

    Attributes:
        reward (`MidiDiscriminator` or `Callable`): what values whole sequences.
        worth (`Callable`): of a discriminator's logits, as `monte_carlo_values` takes it.
        max_rows (`int`): completions in memory at once.
        num_drawn (`int`): tokens that roll-outs have drawn so far.

    Raises:
        ValueError: if `rollout_memory_mb` does not hold a single completion.
    """

    def __init__(
        self,
        args: AdversarialConfig,
        policy: MidiMambaForCausalLM,
        discriminator: MidiDiscriminator,
        bar_token_ids: Sequence[int],
        eos_token_id: int | None,
    ):
        self.args = args
        self.policy = policy
        self.bar_token_ids = bar_token_ids
        self.eos_token_id = eos_token_id
        self.reward: MidiDiscriminator | Reward = discriminator
        if args.reward == "constant":
            self.reward = lambda sequences: torch.ones(len(sequences), device=sequences.device)
        elif args.reward == "random":
            self.reward = lambda sequences: torch.rand(len(sequences), device=sequences.device)
        self.worth: Worth = (lambda logits: logits) if args.reward == "log-odds" else torch.sigmoid
        self.max_rows = args.rollout_batch_size
        if args.rollout_memory_mb is not None:
            judge = discriminator if self.reward is discriminator else None
            self.max_rows = rows_for_budget(policy, args.sequence_length, args.rollout_memory_mb, judge)
        self.num_drawn = 0

    def __call__(self, sequences: Tensor) -> Tensor:
        """Q of sequences `(batch, time)`, of shape `(batch, actions)`; the last is the reward of the whole."""
        length, prompt = self.args.sequence_length, self.args.prompt_length
        if self.args.estimator == "dense":
            return credit.discounted_returns(self._rewards_of_actions(sequences), self.args.discount)
        positions = self._positions(sequences)
        values = monte_carlo_values(
            self.policy,
            self.reward,
            sequences,
            positions,
            self.args.num_rollouts,
            self.max_rows,
            self.eos_token_id,
            prompt,
            self.worth,
        )
        self.num_drawn += self.args.num_rollouts * int((length - 1 - positions).sum())
        times = torch.cat([positions, torch.full_like(sequences[:, :1], length - 1)], dim=1) - prompt
        return credit.interpolate_rows(values, times, length - prompt)

    def _positions(self, sequences: Tensor) -> Tensor:
        """The times that roll-outs value, `(batch, K)`; none for `terminal`, which spreads the reward of the whole."""
        length, prompt, count = self.args.sequence_length, self.args.prompt_length, self.args.rollout_positions
        if self.args.estimator == "terminal":
            return sequences[:, :0]
        if self.args.rollout_at == "bars" and self.bar_token_ids:
            return bar_positions(sequences, self.bar_token_ids, prompt, count)
        spread = rollout_positions(length, prompt, count)
        return torch.tensor(spread, dtype=torch.long, device=sequences.device).expand(len(sequences), -1)

    def _rewards_of_actions(self, sequences: Tensor) -> Tensor:
        """Of each action of sequences `(batch, time)`, what the prefix that it ends is worth, 2D - 1, or what it adds
        to the log-odds; 0 behind their ends."""
        prompt = self.args.prompt_length
        valid = valid_tokens(sequences, self.eos_token_id, prompt)
        if isinstance(self.reward, MidiDiscriminator):
            parts = zip(sequences.split(self.max_rows), valid.split(self.max_rows), strict=True)
            with inference(self.reward):
                logits = [self.reward(rows, attention_mask=mask).position_logits for rows, mask in parts]
            values = self.worth(torch.cat(logits).float())
        else:
            values = self.reward(sequences.flatten()).view(sequences.shape)
        rewards = values.diff(dim=1)[:, prompt - 1 :] if self.args.reward == "log-odds" else 2 * values[:, prompt:] - 1
        return rewards * valid[:, prompt:]


def ending_token(model: MidiMambaForCausalLM) -> int:
    """The token that ends sequences.

    Raises:
        ValueError: if the generator's configuration does not say, or has no padding for what follows.
    """
    config = model.config
    if not isinstance(config.eos_token_id, int) or config.pad_token_id is None:
        raise ValueError(
            f"stop_at_eos needs an eos_token_id and a pad_token_id in the generator's configuration, "
            f"but they are {config.eos_token_id} and {config.pad_token_id}"
        )
    return config.eos_token_id
