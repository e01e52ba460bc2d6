"""Roll-outs: completions of sampled sequences, drawn by forking states.

Nothing here builds a graph, and no prefix is ever read twice: a roll-out starts from a copy of the prefix's state.
Roll-outs from several positions advance together: the sequential depth is that of one sequence. Memory is that of
`max_rows` completions, however many are drawn and from however many positions.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaModel
from midimamba.modeling.policy import Policy, as_policy, inference
from midimamba.modeling.sampling import Ending, Sequences, draw
from midimamba.modeling.scan_chunked import CHUNK

PIECES = 4
"""Completions are valued in this many pieces: reading whole sequences takes more memory than drawing them."""


class Forks(NamedTuple):
    """Completions that are in memory together, ordered by the time at which they leave their prefix.

    Args:
        rows (`LongTensor` of shape `(n,)`): the sequence that each belongs to.
        times (`LongTensor` of shape `(n,)`): the last time of its prefix.
        joins (`dict[int, slice]`): which of them leave their prefix at a time; increasing times.
    """

    rows: Tensor
    times: Tensor
    joins: dict[int, slice]


class Rollouts:
    """
    Draws completions of sequences from the roll-out policy.

    Args:
        model (`Policy` or `PreTrainedModel`): the roll-out policy.
        num_rollouts (`int`): completions drawn for every valued action; `N` in the paper.
        max_rows (`int`): completions in memory at once; see [`rows_for_budget`].
        ending (`Ending`): what ends a sequence.
        prompt_length (`int`): tokens at the start of every sequence that were given.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits.

    Attributes:
        num_drawn (`int`): tokens drawn so far.
    """

    def __init__(
        self,
        model: Any,
        num_rollouts: int,
        max_rows: int,
        ending: Ending,
        prompt_length: int,
        temperature: float = 1.0,
    ):
        self.policy = as_policy(model)
        self.num_rollouts = num_rollouts
        self.max_rows = max_rows
        self.ending = ending
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.num_drawn = 0

    @property
    def rows_valued_at_once(self) -> int:
        """Whole sequences that a discriminator should read at once to stay within the same memory."""
        return max(1, self.max_rows // PIECES)

    def draw(self, sequences: Sequences, order: Tensor, positions: Tensor) -> Iterator[tuple[Forks, Sequences]]:
        """All completions of some prefixes, at most `max_rows` at a time. Call inside [`inference`].

        Args:
            sequences (`Sequences` of shape `(batch, time)`): what the generator sampled.
            order (`LongTensor` of shape `(batch * K,)`): the indices that sort the flattened positions by time.
            positions (`LongTensor` of shape `(batch, K)`): times whose action is valued. Time `t` means the prefix up
                to and including the token at `t`.
        """
        prefixes = _Prefixes(self.policy, sequences.ids, self.max_rows)
        for forks in self._plan(order, positions):
            is_over = sequences.mask[forks.rows, forks.times + 1] == 0
            completions = self._complete(prefixes, forks, is_over)
            last = completions.shape[1] - 1
            self.num_drawn += sum((last - time) * (span.stop - span.start) for time, span in forks.joins.items())
            yield forks, Sequences(completions, self.ending.mask(completions, self.prompt_length))

    def _plan(self, order: Tensor, positions: Tensor) -> Iterator[Forks]:
        count = len(order) * self.num_rollouts
        for start in range(0, count, self.max_rows):
            completions = torch.arange(start, min(start + self.max_rows, count), device=order.device)
            valued = order[completions // self.num_rollouts]
            times = positions.flatten()[valued]
            distinct, counts = times.unique_consecutive(return_counts=True)
            spans = zip(distinct.tolist(), counts.tolist(), counts.cumsum(0).tolist(), strict=True)
            joins = {time: slice(stop - count, stop) for time, count, stop in spans}
            yield Forks(valued // positions.shape[1], times, joins)

    def _complete(self, prefixes: "_Prefixes", forks: Forks, is_over: Tensor) -> Tensor:
        """Complete prefixes in lockstep: at each of the forks' times another set joins. Returns `(n, time)`."""
        length = prefixes.rows.shape[1]
        completions = prefixes.rows[forks.rows]
        state = self.policy.make_state(0, max_length=length, room=len(completions))
        logits: Tensor | None = None
        running = 0
        for t in range(min(forks.joins), length - 1):
            if t in forks.joins:
                joining = forks.joins[t]
                origins = forks.rows[joining]
                started = prefixes.read_to(t)[origins]
                state.append(prefixes.state.select(origins))
                logits = started if logits is None else torch.cat([logits, started])
                running = joining.stop
            assert logits is not None  # the first time is one at which completions join
            completions[:running, t + 1] = self.ending.close(draw(logits, self.temperature), is_over)
            if self.ending.eos_token_id is not None and running == len(completions) and is_over.all():
                completions[:, t + 2 :] = self.ending.pad_token_id
                break
            if t + 2 < length:
                logits = self.policy.next_logits(completions[:running, t + 1 : t + 2], state)
        return completions


class _Prefixes:
    """Sequences that the roll-out policy reads once, from left to right, as far as forks need them.

    A pass reads at most `max_tokens`: a token of a pass takes about as much memory as one layer of a state.
    """

    def __init__(self, policy: Policy, rows: Tensor, max_tokens: int):
        self.policy = policy
        self.rows = rows
        self.state = policy.make_state(len(rows), max_length=rows.shape[1])
        self.span = max(1, max_tokens // len(rows))
        self.read = 0

    def read_to(self, time: int) -> Tensor:
        """Logits `(batch, vocab)` of what follows the token at `time`; the state is that of the same prefix."""
        while self.read <= time:
            stop = min(self.read + self.span, time + 1)
            self.logits = self.policy.next_logits(self.rows[:, self.read : stop], self.state)
            self.read = stop
        return self.logits


def rows_for_budget(model: Any, length: int, budget_mb: float, discriminator: MidiDiscriminator | None = None) -> int:
    """How many completions [`Rollouts`] may hold at once: its `max_rows`.

    Completions are drawn first and valued afterwards, so the more expensive of the two counts. Measured on a CPU, with
    both kinds of discriminator, a transformer, 16 to 256 rows and 64 to 512 tokens, memory grew by 0.75 to 1.5 times
    the estimate, and not with the number of roll-outs or positions.

    Args:
        model (`Policy` or `PreTrainedModel`): the roll-out policy.
        length (`int`): tokens in a sequence.
        budget_mb (`float`): memory for roll-outs beside the weights, in MB of 2^20 bytes.
        discriminator (`MidiDiscriminator`, *optional*): what values the completions; by default something that needs
            no memory worth counting.

    Raises:
        ValueError: if the budget does not hold a single completion.
    """
    tokens = 3 * 8 * length  # and a mask or another copy of them
    drawing = tokens + _drawing_bytes(model, length)
    valuing = tokens + (0 if discriminator is None else _valuing_bytes(discriminator, length))
    budget = budget_mb * 2**20
    if budget < max(drawing, valuing):
        raise ValueError(
            f"rollout_memory_mb is {budget_mb:g}, but one completion of {length} tokens needs about "
            f"{max(drawing, valuing) / 2**20:.2g} MB"
        )
    return int(budget / max(drawing, valuing / PIECES))


def _drawing_bytes(model: Any, length: int) -> int:
    """To draw one completion: its state, a prefix or a copy being moved, a token's pass, logits with temporaries."""
    policy = as_policy(model)
    with inference(policy):
        state = policy.make_state(1, max_length=length)
        policy.next_logits(torch.zeros(1, length, dtype=torch.long, device=model.device), state)
    return 2 * state.nbytes + _reading_bytes(model.config, 1) + 3 * model.config.vocab_size * 4


def _valuing_bytes(discriminator: MidiDiscriminator, length: int) -> int:
    """To value one completion of `length` tokens."""
    config = discriminator.config
    if isinstance(discriminator.encoder, MidiMambaModel):
        return 3 * discriminator.make_cache(1).nbytes + _reading_bytes(discriminator.encoder.config, length)
    # The embeddings with two copies, and the windows of the most filters twice. All that twice over, because glibc
    # holds on to freed blocks of less than 32 MB, and a filter of another width does not fit them.
    return 2 * 4 * length * (3 * config.hidden_size + 2 * max(config.num_filters))


def _reading_bytes(config: Any, length: int) -> int:
    """What a pass over `length` tokens keeps at once: a layer's activations, and the buffers of the chunked scan.

    Twelve values per token and channel were measured, from 32 to 512 tokens. A configuration that does not say how
    wide its layers are inside is taken for a transformer's, four times as wide as its residual stream.
    """
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    buffers = 2 * min(length, CHUNK) * getattr(config, "state_size", 0) * width
    return 4 * (12 * length * width + buffers)
