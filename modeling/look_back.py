"""Look-back embeddings: beside each token, what followed the same place some bars ago.

Music repeats itself by the bar, and a state of constant size cannot repeat eight bars. So the model is shown what came
next the last times: to the embedding of a token is added, for each lag, the embedding of the token that followed the
aligned place that many bars earlier. The idea is that of Magenta's Lookback RNN (2016).

Everything follows from the ids. Each token gets a *place*, a number that grows along the sequence: the bar that it is
in, the position in the bar, and the count of ids since that position. The aligned place is the same number less the
bars of the lag, and one binary search finds the last token at or before it.

Who fills a gap has read the bars after it, and may look ahead at them as well. There, a *jump* leads from the first
wanted bar to where it would be if the bars after the gap followed it.
"""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_midimamba import MidiMambaConfig
from .layer_states import LATER, LookBackState

# A place is bar * _PLACES + position * _PER_POSITION + count. There are 131,072 bars before 32 bits are full.
_PLACES = 8192
_PER_POSITION = 32
# By how much an embedding is narrowed before each lag projects it.
_NARROWER = 4


class LookBack(nn.Module):
    """
    What is added to the embeddings of tokens.

    Args:
        config (`MidiMambaConfig`): the model's, with `lookback_bars`, and `lookahead_bars` if it fills gaps.
    """

    def __init__(self, config: MidiMambaConfig):
        super().__init__()
        # Negative lags look ahead.
        self.lags = (*config.lookback_bars, *(-lag for lag in config.lookahead_bars))
        # A place that is further than any lag reaches.
        self.apart = max(map(abs, self.lags)) + 1
        # -1 is no token.
        tokens = config.bos_token_id, config.gap_token_id, config.fill_token_id
        self.bos, self.gap, self.fill = (-1 if token is None else token for token in tokens)
        # The embeddings of the tokens, narrowed, serve for all lags; each lag has a projection of its own. Two small
        # matrices learn faster than one of full rank, and cost less in sampling.
        width = max(1, config.hidden_size // _NARROWER)
        self.narrow = nn.Linear(config.hidden_size, width, bias=False)
        self.projection = nn.Linear(len(self.lags) * width, config.hidden_size, bias=False)
        self.repeats = nn.Parameter(torch.zeros(len(self.lags), config.hidden_size))
        self.config = config
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    def initialize(self) -> None:
        """New weights. What is shown starts as large as an embedding."""
        for linear in (self.narrow, self.projection):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
        init.zeros_(self.repeats)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of ids, shape `(known,)` each: whether one opens a bar, and the last position that it sets or -1. Then the
        lags.

        The last entry stands for all higher ids, which do neither: a vocabulary may grow. They follow from the
        configuration, so they are no weights, and are made when they are first needed.
        """
        if self._tables is None or self._tables[0].device != device:
            marks = [*self.config.bar_token_ids, *(index for index, _ in self.config.position_token_ids)]
            known = max(marks, default=-1) + 2
            opens_bar = torch.zeros(known, dtype=torch.bool)
            opens_bar[list(self.config.bar_token_ids)] = True
            position = torch.full((known,), -1)
            for index, value in self.config.position_token_ids:
                position[index] = value
            self._tables = opens_bar.to(device), position.to(device), torch.tensor(self.lags, device=device)
        return self._tables

    def forward(
        self, ids: Tensor, embeddings: nn.Module, begins: Tensor | None, state: LookBackState | None, past: int
    ) -> Tensor:
        """
        Args:
            ids (`LongTensor` of shape `(batch, time)`): the tokens.
            embeddings (`nn.Module`): the embeddings of tokens.
            begins (`BoolTensor` of shape `(batch, time)`, *optional*): tokens with which a document begins, beside
                those that are begin-of-sequence.
            state (`LookBackState`, *optional*): the tokens before these. They are added to it.
            past (`int`): how many tokens came before.

        Returns:
            `Tensor` of shape `(batch, time, hidden)`.
        """
        followers, found, repeated = self.find(ids, begins, state, past)
        dtype = self.repeats.dtype
        shown = self.narrow(embeddings(followers)) * found.to(dtype).unsqueeze(-1)
        added: Tensor = self.projection(shown.flatten(2)) + repeated.to(dtype) @ self.repeats
        return added

    def find(
        self, ids: Tensor, begins: Tensor | None, state: LookBackState | None, past: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Find the tokens that followed the aligned places, and keep these tokens for the next call. See `forward`.

        Returns:
            Three tensors of shape `(batch, time, lags)`: the ids that followed, or 0; 1.0 where something is aligned,
            or 0.0; and 1.0 where it is the same token at the same place, so that this token repeats, or 0.0.
        """
        if state is None:
            state = LookBackState.empty(self.config, len(ids), torch.float32, ids.device)
        state.make_room(past + ids.shape[1])
        begins = torch.zeros_like(ids, dtype=torch.bool) if begins is None else begins
        if ids.device.type == "cpu" and _has_numba():
            return self._find_by_kernel(ids, begins, state, past)
        latest = state.places[:, past - 1 : past].long() if past else ids.new_full((len(ids), 1), _PLACES)
        filled = state.ids[:, past - 1 : past] == self.fill if past else torch.zeros_like(begins[:, :1])
        numbered = self.number(ids, begins, latest, filled, state.request.long())
        state.extend(ids, numbered.places, past)
        state.request.copy_(torch.stack([column[:, -1] for column in numbered[1:]], dim=1))
        return self.align(ids, numbered, state.ids, state.places)

    def _find_by_kernel(
        self, ids: Tensor, begins: Tensor, state: LookBackState, past: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        from .look_back_numba import align_

        shape = *ids.shape, len(self.lags)
        followers, (found, repeated) = ids.new_empty(shape), torch.empty(2, *shape)
        tensors = (ids, begins, *self.tables(ids.device), *state.tensors, followers, found, repeated)
        tokens = self.bos, self.gap, self.fill
        align_(*(tensor.numpy() for tensor in tensors), past, tokens, self.apart, _PLACES, _PER_POSITION)
        return followers, found, repeated

    def forget(self, state: LookBackState, past: int) -> int:
        """
        Forget tokens that no lag can reach from here on, in place. What is shown stays the same. Nothing is forgotten
        of a request to fill a gap.

        Bars are numbered from the start again, so that their numbers do not grow without end either.

        Args:
            state (`LookBackState`): tokens read before, at least one.
            past (`int`): how many.

        Returns:
            `int`: how many tokens are kept.
        """
        if state.request[:, 0].any():
            return past
        places = state.places[:, :past]
        # Even and odd numbers of bars differ in meaning, so an even number is taken off all.
        first = (places[:, -1:] // (2 * _PLACES) - (self.apart - 1)) * (2 * _PLACES)
        start = int(torch.searchsorted(places.contiguous(), first).min())
        kept = past - start
        state.ids[:, :kept] = state.ids[:, start:past].clone()
        state.places[:, :kept] = places[:, start:] - first.clamp(min=0)
        state.places[:, kept:] = LATER
        return kept

    def number(self, ids: Tensor, begins: Tensor, latest: Tensor, filled: Tensor, request: Tensor) -> "Numbered":
        """
        The places of tokens.

        Bars have even numbers, what precedes the first bar of a document has an odd one. Between two documents, and
        between such a prefix and the first bar, more numbers are left out than the largest lag reaches. What a gap
        token begins is numbered as a document.

        Args:
            ids (`LongTensor` of shape `(batch, time)`): the tokens.
            begins (`BoolTensor` of shape `(batch, time)`): see `forward`.
            latest (`LongTensor` of shape `(batch, 1)`): the place of the token before these.
            filled (`BoolTensor` of shape `(batch, 1)`): whether that is a fill token.
            request (`LongTensor` of shape `(batch, 3)`): what was asked for before these; see [`LookBackState`].
        """
        is_gap, starts = ids == self.gap, begins | (ids == self.bos)
        is_begin = starts | is_gap
        opens_bar, position, _ = self.tables(ids.device)
        known = ids.clamp(max=len(position) - 1)
        opens_bar, position = opens_bar[known], position[known]
        bar, within = latest // _PLACES, latest % _PLACES
        bars, documents = opens_bar.cumsum(1), is_begin.cumsum(1)
        # Bars of this document so far, counting from one that was open before.
        before = ((bars - opens_bar.long()) * is_begin).cummax(1).values
        was_open = (bar % 2 == 0) & (documents == 0)
        is_open = was_open | (bars > before)
        firsts = (opens_bar & ~was_open & (bars == before + 1)).cumsum(1)
        number = bar // 2 + bars + self.apart * (documents + firsts)
        following = number + 1 + self.apart * (~is_open).long()  # the number of the next bar
        asked = self._asked(ids, starts, following, filled, request)

        marks = opens_bar | is_begin | (position >= 0)
        steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        mark = (steps * marks).cummax(1).values
        counted = torch.where(mark > 0, steps - mark, within % _PER_POSITION + steps)
        value = F.pad((position + 1) * marks, (1, 0)).gather(1, mark)
        value = torch.where(mark > 0, value, within // _PER_POSITION)
        place = (2 * number + (~is_open).long()) * _PLACES + value * _PER_POSITION
        return Numbered(place + counted.clamp(max=_PER_POSITION - 1), *asked)

    def _asked(
        self, ids: Tensor, starts: Tensor, following: Tensor, filled: Tensor, request: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of [`LookBackState.request`] at every token, each `(batch, time)`."""
        is_gap, is_fill = ids == self.gap, ids == self.fill
        total = is_gap.cumsum(1)
        before = ((total - is_gap.long()) * starts).cummax(1).values
        gaps = total - before + request[:, :1] * (starts.cumsum(1) == 0)
        after = _latest(following, is_gap & (gaps == 1), request[:, 1:2])
        # Each fill token after the first of several stands for a bar between them and the gap.
        is_next = is_fill & torch.cat([filled, is_fill[:, :-1]], dim=1)
        base = _latest(following - after + gaps - 2, is_fill & ~is_next, request[:, 2:])
        steps = is_next.cumsum(1)
        more = steps - _latest(steps, is_fill & ~is_next, torch.zeros_like(request[:, 2:]))
        jump = torch.where(is_fill & (gaps > 2), base + more, 0)
        return gaps, after, _latest(jump, is_fill | is_gap | starts, request[:, 2:])

    def align(
        self, ids: Tensor, numbered: "Numbered", all_ids: Tensor, all_places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Look back from tokens at their places, and ahead.

        Args:
            ids (`LongTensor` of shape `(batch, time)`): the tokens to look from.
            numbered ([`Numbered`]): their places.
            all_ids, all_places (`Tensor` of shape `(batch, length)`): all tokens up to them; more may follow.

        Returns:
            As `find`.
        """
        lags, places, jump = self.tables(ids.device)[2], numbered.places[..., None], numbered.jump[..., None]
        wanted = places - (lags + (lags < 0) * jump) * (2 * _PLACES)
        found = torch.searchsorted(all_places, wanted.flatten(1).to(all_places.dtype), right=True) - 1
        index = found.clamp(min=0)
        at = all_places.gather(1, index).view_as(wanted)
        is_after_gap = (jump > 0) & (wanted // (2 * _PLACES) >= numbered.after[..., None])
        may_look = (places // _PLACES % 2 == 0) & ((lags > 0) | is_after_gap)
        is_found = may_look & (found >= 0).view_as(wanted) & (at // _PLACES == wanted // _PLACES)
        is_same = is_found & (at == wanted) & (all_ids.gather(1, index).view_as(wanted) == ids[..., None])
        followers = all_ids.gather(1, (index + 1).clamp(max=all_ids.shape[1] - 1)).view_as(wanted)
        return followers.long() * is_found, is_found.float(), is_same.float()


class Numbered(NamedTuple):
    """
    Tokens with their places, and with the columns of [`LookBackState.request`]. Each is a `LongTensor` of shape
    `(batch, time)`.
    """

    places: Tensor
    gaps: Tensor
    after: Tensor
    jump: Tensor


def _latest(values: Tensor, where: Tensor, before: Tensor) -> Tensor:
    """The value at the last marked token up to each one, `(batch, time)`; that before all of them is `(batch, 1)`."""
    steps = torch.arange(1, values.shape[1] + 1, device=values.device)
    return torch.cat([before, values], dim=1).gather(1, (steps * where).cummax(1).values)


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


__all__ = ["LookBack"]
