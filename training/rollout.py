"""Monte-Carlo action values by forking recurrent states.

Nothing here builds a graph, and no prefix is ever encoded twice: a state is constant in size, so a roll-out starts
from a copy of it. Roll-outs from several positions advance together: the sequential depth is that of one sequence.
Memory is that of `max_rows` completions, however many are drawn and from however many positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from miditok import MusicTokenizer
from torch import Tensor

from midimamba.modeling.configuration_midimamba import MidiMambaConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM, MidiMambaModel
from midimamba.modeling.recurrent_cache import RecurrentCache
from midimamba.modeling.sampling import Ending, draw, inference, next_logits, valid_tokens
from midimamba.modeling.scan_chunked import CHUNK
from midimamba.tokenization.tokenizations import BAR
from midimamba.tokenization.tokenizer import expand_ids

PIECES = 4
"""Completions are valued in so many pieces: reading whole sequences takes more memory than drawing them."""

Reward = Callable[[Tensor], Tensor]
"""Whole sequences `(n, time)` to rewards `(n,)`. Sequences that have ended are padded."""

Worth = Callable[[Tensor], Tensor]
"""Logits `(n,)` of a discriminator, in single precision, to rewards `(n,)`."""


def rollout_positions(length: int, prompt: int, count: int | None) -> list[int]:
    """Which actions roll-outs value: times `prompt … length - 2`, all of them or `count` evenly spread ones."""
    return _spread(range(prompt, length - 1), count)


def bar_positions(sequences: Tensor, bar_token_ids: Sequence[int], prompt: int, count: int | None) -> Tensor:
    """Which actions roll-outs value in each sequence: bar lines first.

    Args:
        sequences (`LongTensor` of shape `(batch, time)`): what the generator sampled.
        bar_token_ids (`Sequence[int]`): the tokens that begin a bar.
        prompt (`int`): tokens at the start that are no actions.
        count (`int`, *optional*): how many actions of a sequence, `K`; every action by default. Of more bar lines than
            that, evenly spread ones are taken; fewer are joined by evenly spread other actions.

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


def tokens_that_begin_bars(tokenizer: MusicTokenizer) -> list[int]:
    """The ids, for [`bar_positions`], whose music begins with a bar line, those of byte-pair encoding included."""
    ids = range(len(tokenizer.special_tokens), tokenizer.vocab_size)
    return [index for index in ids if tokenizer._ids_to_tokens(expand_ids(tokenizer, [index]))[0] == BAR]


def _spread(times: Sequence[int], count: int | None) -> list[int]:
    if count is None or count >= len(times):
        return list(times)
    return [times[(2 * k + 1) * len(times) // (2 * count)] for k in range(count)]


def rows_for_budget(
    policy: MidiMambaForCausalLM, length: int, budget_mb: float, discriminator: MidiDiscriminator | None = None
) -> int:
    """How many completions [`monte_carlo_values`] may hold at once: its `max_rows`.

    Completions are drawn first and valued then, so the dearer of the two counts. Measured on a processor, with both
    kinds of discriminator, a transformer, 16 to 256 rows and 64 to 512 tokens, memory grew by 0.75 to 1.5 times the
    estimate, and not with the number of roll-outs or positions.

    Args:
        policy (`MidiMambaForCausalLM`): the roll-out policy.
        length (`int`): tokens in a sequence.
        budget_mb (`float`): memory for roll-outs beside the weights, in MB of 2^20 bytes.
        discriminator (`MidiDiscriminator`, *optional*): what values the completions; by default something that needs
            no memory worth counting.

    Raises:
        ValueError: if the budget does not hold a single completion.
    """
    tokens = 3 * 8 * length  # and a mask or another copy of them
    drawing = tokens + _drawing_bytes(policy, length)
    valuing = tokens + (0 if discriminator is None else _valuing_bytes(discriminator, length))
    budget = budget_mb * 2**20
    if budget < max(drawing, valuing):
        raise ValueError(
            f"rollout_memory_mb is {budget_mb:g}, but one completion of {length} tokens needs about "
            f"{max(drawing, valuing) / 2**20:.2g} MB"
        )
    return int(budget / max(drawing, valuing / PIECES))


def _drawing_bytes(policy: MidiMambaForCausalLM, length: int) -> int:
    """To draw one completion: its state, a prefix or a copy on its way, a token's pass, logits with temporaries."""
    config = policy.config
    state = RecurrentCache.empty(config, 1, policy.dtype, "meta", length)
    return 2 * state.nbytes + _reading_bytes(config, 1) + 3 * config.vocab_size * 4


def _valuing_bytes(discriminator: MidiDiscriminator, length: int) -> int:
    """To value one completion of so many tokens."""
    config = discriminator.config
    if isinstance(discriminator.encoder, MidiMambaModel):
        inner = discriminator.encoder.config
        return 3 * RecurrentCache.empty(inner, 1, device="meta").nbytes + _reading_bytes(inner, length)
    # The embeddings with two copies, and the windows of the most filters twice. All that twice over, because glibc
    # holds on to freed blocks of less than 32 MB, and a filter of another width does not fit them.
    return 2 * 4 * length * (3 * config.hidden_size + 2 * max(config.num_filters))


def _reading_bytes(config: MidiMambaConfig, length: int) -> int:
    """What a pass over so many tokens keeps at once: a layer's activations, and the buffers of the chunked scan.

    Twelve values a token and channel were measured, from 32 to 512 tokens.
    """
    activations = 12 * length * config.intermediate_size
    buffers = 2 * min(length, CHUNK) * config.state_size * config.intermediate_size
    return 4 * (activations + buffers)


class _Forks(NamedTuple):
    """Completions that are in memory together, ordered by the time at which they leave their prefix.

    Args:
        rows (`LongTensor` of shape `(n,)`): the sequence that each belongs to.
        times (`LongTensor` of shape `(n,)`): the last time of its prefix.
        joins (`dict[int, slice]`): which of them leave their prefix at a time; increasing times.
    """

    rows: Tensor
    times: Tensor
    joins: dict[int, slice]


def _plan(order: Tensor, positions: Tensor, num_rollouts: int, max_rows: int) -> Iterator[_Forks]:
    """All completions of positions `(batch, K)`, `max_rows` at a time. `order` sorts the flattened positions."""
    for start in range(0, len(order) * num_rollouts, max_rows):
        completions = torch.arange(start, min(start + max_rows, len(order) * num_rollouts), device=order.device)
        valued = order[completions // num_rollouts]
        times = positions.flatten()[valued]
        distinct, counts = times.unique_consecutive(return_counts=True)
        spans = zip(distinct.tolist(), counts.tolist(), counts.cumsum(0).tolist(), strict=True)
        joins = {time: slice(stop - count, stop) for time, count, stop in spans}
        yield _Forks(valued // positions.shape[1], times, joins)


class _Prefixes:
    """Sequences that the roll-out policy reads once, from left to right, as far as forks need them.

    A pass reads `max_tokens` at most: a token of a pass takes about as much memory as one layer of a state.
    """

    def __init__(self, policy: MidiMambaForCausalLM, rows: Tensor, max_tokens: int):
        self.policy = policy
        self.rows = rows
        self.cache = RecurrentCache.for_model(policy, len(rows), max_length=rows.shape[1])
        self.span = max(1, max_tokens // len(rows))
        self.read = 0

    def read_to(self, time: int) -> Tensor:
        """Logits `(batch, vocab)` of what follows the token at `time`; the cache is that of the same prefix."""
        while self.read <= time:
            stop = min(self.read + self.span, time + 1)
            self.logits = next_logits(self.policy, self.rows[:, self.read : stop], self.cache)
            self.read = stop
        return self.logits


class _Valuer(Protocol):
    """Values the completions of some sequences, then the sequences: a discriminator's logits, or rewards."""

    def completions(self, forks: _Forks, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Values `(n,)` of completed sequences `(n, time)`. Calls come in the order of the forks' times."""

    def whole(self) -> Tensor:
        """Values `(batch,)` of the sequences themselves; the last call."""


class _WholeSequences:
    """Reads every completion from its first token."""

    def __init__(self, reward: Reward | MidiDiscriminator, rows: Tensor, mask: Tensor | None, max_rows: int):
        self.reward = reward
        self.rows = rows
        self.mask = mask
        self.max_rows = max_rows

    def completions(self, forks: _Forks, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self._value(tokens, mask)

    def whole(self) -> Tensor:
        return self._value(self.rows, self.mask)

    def _value(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if not isinstance(self.reward, MidiDiscriminator):
            return self.reward(tokens)
        mask = torch.ones_like(tokens) if mask is None else mask
        pieces = zip(tokens.split(self.max_rows), mask.split(self.max_rows), strict=True)
        with inference(self.reward):
            logits = [self.reward(piece, attention_mask=valid).logits[:, 0] for piece, valid in pieces]
        return torch.cat(logits)


class _ForkedStates:
    """A causal discriminator: it reads each prefix once, and of a completion only what is new."""

    def __init__(self, discriminator: MidiDiscriminator, rows: Tensor, mask: Tensor | None, max_rows: int):
        self.discriminator = discriminator
        self.rows = rows
        self.mask = mask
        self.max_rows = max_rows
        self.cache = discriminator.make_cache(len(rows))
        self.span = max(1, max_rows * rows.shape[1] // len(rows))
        self.read = 0
        self.logits = rows.new_zeros(len(rows), dtype=discriminator.dtype)  # of the prefixes that the cache has read

    def completions(self, forks: _Forks, tokens: Tensor, mask: Tensor | None) -> Tensor:
        logits = []
        for time, joining in forks.joins.items():
            self._read_to(time)
            for start in range(joining.start, joining.stop, self.max_rows):
                piece = slice(start, min(start + self.max_rows, joining.stop))
                origins = forks.rows[piece]
                new_mask = None if mask is None else mask[piece, time + 1 :]
                states = self.cache.select(origins)
                logits.append(self._continue(states, tokens[piece, time + 1 :], new_mask, self.logits[origins]))
        return torch.cat(logits)

    def whole(self) -> Tensor:
        self._read_to(self.rows.shape[1] - 1)
        return self.logits

    def _read_to(self, time: int) -> None:
        while self.read <= time:
            new = slice(self.read, min(self.read + self.span, time + 1))
            mask = None if self.mask is None else self.mask[:, new]
            self.logits = self._continue(self.cache, self.rows[:, new], mask, self.logits)
            self.read = new.stop

    def _continue(self, states: RecurrentCache, tokens: Tensor, mask: Tensor | None, before: Tensor) -> Tensor:
        """Logits `(n,)` after more tokens `(n, time)`; where all of them are padding, the ones `before`."""
        with inference(self.discriminator):
            outputs = self.discriminator(tokens, attention_mask=mask, past_key_values=states)
        logits: Tensor = outputs.logits[:, 0]
        return logits if mask is None else torch.where(mask.any(1), logits, before)


def monte_carlo_values(
    policy: MidiMambaForCausalLM,
    reward: Reward | MidiDiscriminator,
    sequences: Tensor,
    positions: list[int] | Tensor,
    num_rollouts: int,
    max_rows: int,
    eos_token_id: int | None = None,
    prompt_length: int = 1,
    worth: Worth = torch.sigmoid,
) -> Tensor:
    """Action values by Monte-Carlo search, equation 4 of SeqGAN.

    Args:
        policy (`MidiMambaForCausalLM`): the roll-out policy.
        reward (`MidiDiscriminator` or `Callable`): what values completions. A causal discriminator forks its own state
            as the policy does, and reads every token once. Anything else is called with whole sequences `(n, time)`
            and returns `(n,)`.
        sequences (`LongTensor` of shape `(batch, time)`): what the generator sampled.
        positions (`list[int]`, or `LongTensor` of shape `(batch, K)`): increasing times below `time - 1`, the same for
            all sequences or some for each. Time `t` values the action `sequences[:, t]`.
        num_rollouts (`int`): completions drawn for every action.
        max_rows (`int`): so many completions are in memory at once. See [`rows_for_budget`].
        eos_token_id (`int`, *optional*): the token behind which sequences are padded, as [`sample`] did. The value of
            an action on padding is that of the whole sequence: mask it with [`valid_tokens`].
        prompt_length (`int`, *optional*, defaults to 1): with `eos_token_id`, tokens at the start that end nothing.
        worth (`Callable`, *optional*, defaults to `torch.sigmoid`): what a discriminator's logits are worth; by
            default the probability that a sequence is real.

    Returns:
        `Tensor` of shape `(batch, K + 1)`: the mean reward of the completions of each prefix, and last the reward of
        the sequence itself, which is the value of the last action.

    Raises:
        ValueError: if sequences may end, but the policy has no `pad_token_id`.
    """
    if not isinstance(positions, Tensor):
        positions = torch.tensor(positions, dtype=torch.long, device=sequences.device).expand(len(sequences), -1)
    values = []
    with inference(policy):
        # Prefixes take as much memory as half of the completions at most.
        for rows, times in zip(*(part.split(max(1, max_rows // 2)) for part in (sequences, positions)), strict=True):
            values.append(
                _values(policy, reward, rows, times, num_rollouts, max_rows, eos_token_id, prompt_length, worth)
            )
    return torch.cat(values)


def _values(
    policy: MidiMambaForCausalLM,
    reward: Reward | MidiDiscriminator,
    rows: Tensor,
    positions: Tensor,
    num_rollouts: int,
    max_rows: int,
    eos_token_id: int | None,
    prompt: int,
    worth: Worth,
) -> Tensor:
    """[`monte_carlo_values`] of as many sequences as are read together."""
    mask = None if eos_token_id is None else valid_tokens(rows, eos_token_id, prompt)
    valuer: _Valuer
    if isinstance(reward, MidiDiscriminator) and reward.config.kind == "mamba":
        valuer = _ForkedStates(reward, rows, mask, max(1, max_rows // PIECES))
    else:
        valuer = _WholeSequences(reward, rows, mask, max(1, max_rows // PIECES))
    prefixes = _Prefixes(policy, rows, max_rows)
    order = positions.flatten().argsort(stable=True)  # by time, then by sequence
    valued = []
    for forks in _plan(order, positions, num_rollouts, max_rows):
        if eos_token_id is None or mask is None:
            completions, completed = _complete(prefixes, forks, None), None
        else:
            is_over = mask[forks.rows, forks.times + 1] == 0
            completions = _complete(prefixes, forks, Ending(policy, eos_token_id, is_over))
            completed = valid_tokens(completions, eos_token_id, prompt)
        valued.append(valuer.completions(forks, completions, completed))
    rewards = torch.cat([*valued, valuer.whole()])
    if isinstance(reward, MidiDiscriminator):
        rewards = worth(rewards.float())
    drawn, whole = rewards.split([len(order) * num_rollouts, len(rows)])
    means = drawn.view(len(order), num_rollouts).mean(1)
    return torch.cat([means[order.argsort()].view(positions.shape), whole[:, None]], dim=1)


def _complete(prefixes: _Prefixes, forks: _Forks, ending: Ending | None) -> Tensor:
    """Complete prefixes in lockstep: at each of the forks' times another set of them joins in. Returns `(n, time)`."""
    policy, length = prefixes.policy, prefixes.rows.shape[1]
    completions = prefixes.rows[forks.rows]
    states = RecurrentCache.for_model(policy, len(completions), max_length=length)
    wide = torch.promote_types(policy.dtype, torch.float32)
    logits = torch.empty(0, policy.config.vocab_size, dtype=wide, device=completions.device)
    running = 0
    for t in range(min(forks.joins), length - 1):
        if t in forks.joins:
            joining = forks.joins[t]
            origins = forks.rows[joining]
            prefix_logits = prefixes.read_to(t)
            states.rows(joining.start, joining.stop).copy_(prefixes.cache.select(origins))
            logits = torch.cat([logits, prefix_logits[origins]])
            running = joining.stop
        tokens = draw(logits)
        completions[:running, t + 1] = tokens if ending is None else ending(tokens)
        if ending is not None and running == len(completions) and ending.is_over.all():
            completions[:, t + 2 :] = ending.pad_token_id
            break
        if t + 2 < length:
            logits = next_logits(policy, completions[:running, t + 1 : t + 2], states.rows(0, running))
    return completions
