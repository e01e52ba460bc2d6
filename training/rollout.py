"""Monte-Carlo action values by forking recurrent states.

Nothing here builds a graph, and no prefix is ever encoded twice: a state is constant in size, so a roll-out starts
from a copy of it. Roll-outs from several positions advance together: the sequential depth is that of one sequence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.recurrent_cache import RecurrentCache
from midimamba.modeling.sampling import draw, inference, next_logits

Reward = Callable[[Tensor], Tensor]
"""Whole sequences `(n, time)` to rewards `(n,)`."""


def rollout_positions(length: int, prompt: int, count: int | None) -> list[int]:
    """Which actions roll-outs value: times `prompt … length - 2`, all of them or `count` evenly spread ones."""
    times = range(prompt, length - 1)
    if count is None or count >= len(times):
        return list(times)
    return [times[(2 * k + 1) * len(times) // (2 * count)] for k in range(count)]


def monte_carlo_values(
    policy: MidiMambaForCausalLM,
    reward: Reward,
    sequences: Tensor,
    positions: list[int],
    num_rollouts: int,
    max_rows: int,
) -> Tensor:
    """Action values by Monte-Carlo search, equation 4 of SeqGAN.

    Args:
        policy (`MidiMambaForCausalLM`): the roll-out policy.
        reward (`Callable`): values whole sequences `(n, time)`, as `(n,)`.
        sequences (`LongTensor` of shape `(batch, time)`): what the generator sampled.
        positions (`list[int]`): increasing times below `time - 1`. Time `t` values the action `sequences[:, t]`.
        num_rollouts (`int`): completions drawn for every action.
        max_rows (`int`): at most so many completions are in memory at once (but at least `num_rollouts`).

    Returns:
        `Tensor` of shape `(batch, len(positions) + 1)`: the mean reward of the completions of each prefix, and last
        the reward of the sequence itself, which is the value of the last action.
    """
    values = []
    with inference(policy):
        for rows in sequences.split(max(1, max_rows // num_rollouts)):
            prefixes = RecurrentCache.for_model(policy, len(rows), max_length=sequences.shape[1])
            group = max(1, max_rows // (len(rows) * num_rollouts))
            groups = [positions[start : start + group] for start in range(0, len(positions), group)]
            read = 0
            of_rows = []
            for times in groups:
                completions = _complete(policy, rows, prefixes, read, times, num_rollouts)
                read = times[-1] + 1
                of_rows.append(reward(completions.flatten(0, 2)).view(completions.shape[:3]).mean(-1).T)
            values.append(torch.cat([*of_rows, reward(rows)[:, None]], dim=1))
    return torch.cat(values)


def _complete(
    policy: MidiMambaForCausalLM,
    rows: Tensor,
    prefixes: RecurrentCache,
    read: int,
    times: list[int],
    num_rollouts: int,
) -> Tensor:
    """Complete the prefixes that end at `times`, all in lockstep: at each of the times another set of forks joins in.

    `prefixes` has read the first `read` tokens of `rows` and is advanced to the last of the times.
    Returns completions `(len(times), batch, num_rollouts, time)`.
    """
    batch, length = rows.shape
    per_time = batch * num_rollouts
    completions = rows.repeat_interleave(num_rollouts, 0).repeat(len(times), 1)
    forks = RecurrentCache.for_model(policy, len(completions), max_length=length)
    logits = rows.new_empty((0, policy.config.vocab_size), dtype=torch.float32)
    running = 0
    for t in range(times[0], length - 1):
        if t in times:
            prefix_logits = next_logits(policy, rows[:, read : t + 1], prefixes)
            read = t + 1
            forks.rows(running, running + per_time).copy_(prefixes.fork(num_rollouts))
            logits = torch.cat([logits, prefix_logits.float().repeat_interleave(num_rollouts, 0)])
            running += per_time
        completions[:running, t + 1] = draw(logits)
        if t + 2 < length:
            logits = next_logits(policy, completions[:running, t + 1 : t + 2], forks.rows(0, running))
    return completions.view(len(times), batch, num_rollouts, length)
