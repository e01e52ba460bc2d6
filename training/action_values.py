"""Action values of sampled sequences, by one of three estimators.

- `monte-carlo` (SeqGAN, equation 4): the mean reward of roll-outs from an action, at some positions; interpolated.
- `dense`: discounted returns of what a causal discriminator says of every prefix.
- `terminal`: the reward of the whole sequence for every action; `distill` makes weights of it.
"""

from collections.abc import Sequence

import torch
from miditok import MusicTokenizer
from torch import Tensor

from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import Sequences
from midimamba.tokenization.tokenizations import BAR
from midimamba.tokenization.tokenizer import expand_ids
from midimamba.training.rewards import Reward
from midimamba.training.rollout import Rollouts

DISCOUNT = 0.95
"""Of later rewards, for `dense`: an action answers for about the next twenty tokens, a bar or two."""


class ActionValues:
    """
    Q of every sampled action.

    Args:
        estimator (`str`): `monte-carlo`, `dense`, `terminal` or `distill`.
        reward (`Reward`): what values sequences.
        rollouts (`Rollouts`): draws completions.
        num_positions (`int`, *optional*): actions per sequence that roll-outs value; all of them by default.
        bar_token_ids (`Sequence[int]`, *optional*): tokens that begin a bar. Roll-outs value bar lines first; without
            such tokens positions are evenly spread.
    """

    def __init__(
        self,
        estimator: str,
        reward: Reward,
        rollouts: Rollouts,
        num_positions: int | None = None,
        bar_token_ids: Sequence[int] = (),
    ):
        self.estimator = estimator
        self.reward = reward
        self.rollouts = rollouts
        self.num_positions = num_positions
        self.bar_token_ids = bar_token_ids

    def __call__(self, sequences: Sequences) -> Tensor:
        """Q of sequences `(batch, time)`, of shape `(batch, actions)`; the last is the reward of the whole."""
        prompt, length = self.rollouts.prompt_length, sequences.ids.shape[1]
        if self.estimator == "dense":
            rewards = self.reward.of_actions(sequences, prompt, self.rollouts.max_rows)
            return discounted_returns(rewards, DISCOUNT)
        if self.estimator != "monte-carlo":
            whole = self.reward.of_whole(sequences, self.rollouts.rows_valued_at_once)
            return whole[:, None].expand(-1, length - prompt)
        positions = bar_positions(sequences.ids, self.bar_token_ids, prompt, self.num_positions)
        values = monte_carlo_values(self.rollouts, self.reward, sequences, positions)
        times = torch.cat([positions, torch.full_like(sequences.ids[:, :1], length - 1)], dim=1) - prompt
        return interpolate_rows(values, times, length - prompt)


def monte_carlo_values(rollouts: Rollouts, reward: Reward, sequences: Sequences, positions: Tensor) -> Tensor:
    """Action values by Monte-Carlo search, equation 4 of SeqGAN.

    A causal discriminator forks its own state as the policy does, and reads every token once.

    Args:
        rollouts (`Rollouts`): draws completions from the roll-out policy.
        reward (`Reward`): what values them.
        sequences (`Sequences` of shape `(batch, time)`): what the generator sampled.
        positions (`LongTensor` of shape `(batch, K)`): increasing times below `time - 1`. Time `t` values the action
            `sequences.ids[:, t]`. The value of an action on padding is that of the whole sequence.

    Returns:
        `Tensor` of shape `(batch, K + 1)`: the mean reward of the completions of each prefix, and last the reward of
        the sequence itself, which is the value of the last action.
    """
    values = []
    with inference(rollouts.policy):
        # Prefixes take at most as much memory as half of the completions.
        rows = max(1, rollouts.max_rows // 2)
        for part, times in zip(sequences.split(rows), positions.split(rows), strict=True):
            reader = reward.reader(part, rollouts.rows_valued_at_once)
            order = times.flatten().argsort(stable=True)  # by time, then by sequence
            scores = [reader.completions(forks, done) for forks, done in rollouts.draw(part, order, times)]
            rewards = reward.of_scores(torch.cat([*scores, reader.whole()]))
            drawn, whole = rewards.split([len(order) * rollouts.num_rollouts, len(times)])
            means = drawn.view(len(order), rollouts.num_rollouts).mean(1)
            values.append(torch.cat([means[order.argsort()].view(times.shape), whole[:, None]], dim=1))
    return torch.cat(values)


def bar_positions(sequences: Tensor, bar_token_ids: Sequence[int], prompt: int, count: int | None) -> Tensor:
    """Which actions roll-outs value in each sequence: bar lines first.

    Args:
        sequences (`LongTensor` of shape `(batch, time)`): what the generator sampled.
        bar_token_ids (`Sequence[int]`): the tokens that begin a bar; there may be none.
        prompt (`int`): tokens at the start that are not actions.
        count (`int`, *optional*): how many actions of a sequence, `K`; every action by default. If there are more bar
            lines than that, evenly spread ones are taken; if there are fewer, evenly spread other actions join them.

    Returns:
        `LongTensor` of shape `(batch, K)`: times `prompt … time - 2`, increasing in each row.
    """
    times = range(prompt, sequences.shape[1] - 1)
    is_bar = torch.isin(sequences.cpu(), torch.tensor(bar_token_ids, dtype=torch.long)).tolist()
    rows = []
    for row in is_bar:
        bars = _spread([time for time in times if row[time]], count)
        others = [time for time in times if not row[time]]
        rows.append(sorted(bars + _spread(others, None if count is None else count - len(bars))))
    return torch.tensor(rows, dtype=torch.long, device=sequences.device).view(len(sequences), -1)


def _spread(times: Sequence[int], count: int | None) -> list[int]:
    if count is None or count >= len(times):
        return list(times)
    return [times[(2 * k + 1) * len(times) // (2 * count)] for k in range(count)]


def tokens_that_begin_bars(tokenizer: MusicTokenizer) -> list[int]:
    """The ids, for [`bar_positions`], whose music begins with a bar line, those of byte-pair encoding included."""
    ids = range(len(tokenizer.special_tokens), tokenizer.vocab_size)
    return [index for index in ids if tokenizer._ids_to_tokens(expand_ids(tokenizer, [index]))[0] == BAR]


def discounted_returns(rewards: Tensor, discount: float) -> Tensor:
    """`R_t = sum over k >= t of discount^(k - t) r_k`: what is still to come, from rewards `(batch, time)`."""
    returns = torch.empty_like(rewards)
    total = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + discount * total
        returns[:, t] = total
    return returns


def interpolate_rows(values: Tensor, positions: Tensor, length: int) -> Tensor:
    """Action values at every time from those at a few, which differ from row to row.

    Args:
        values (`Tensor` of shape `(batch, K)`): action values at `positions`.
        positions (`LongTensor` of shape `(batch, K)`): increasing in each row; the last is `length - 1`, whose value
            is the reward.
        length (`int`): number of actions.

    Returns:
        `Tensor` of shape `(batch, length)`: linear between two valued positions, constant before the first.
    """
    times = torch.arange(length, device=values.device).expand(len(values), -1).contiguous()
    right = torch.searchsorted(positions.contiguous(), times)
    left = (right - 1).clamp(min=0)
    before, after = positions.gather(1, left), positions.gather(1, right)
    weight = ((times - before) / (after - before).clamp(min=1)).clamp(0, 1).to(values.dtype)
    return torch.lerp(values.gather(1, left), values.gather(1, right), weight)
