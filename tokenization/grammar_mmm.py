"""The grammar of MMM, which writes one track after another, each with bars of its own."""

import torch
from miditok import MusicTokenizer
from torch import Tensor

from .grammar import MidiGrammar
from .grammar_state import At, State
from .grammar_tables import UNSET, Tables, tokens_of_ids
from .grammar_torch import Limits
from .grammar_types import kind_of

TRACK_END = "Track_End"
# What a row remembers: tracks that began; bars and notes of the last; tracks that ended since the prompt; bars of the
# first track, and the meters of its first bars. Later bars keep to the last of these.
_TRACKS, _BARS, _NOTES, _ENDED, _KNOWN, _METERS = range(6)
_MOST_METERS = 1024


class MmmGrammar(MidiGrammar):
    """[`MidiGrammar`] of MMM on the base of REMI.

    Every track has one program and a note. All tracks have the meters of the first one; only its tempos are decoded.
    `min_bars` and `max_bars` hold for the first new track, and no other is longer. A track may be silent for long
    while others play: within 512 base tokens a note comes. What sounds at once is known of a single track only, so
    `max_empty_bars` has no effect, and `max_notes` and `voices` hold in each track.
    """

    tokenizations = ("MMM",)
    _longest_silence = 512

    def _make_tables(self, tokenizer: MusicTokenizer, pitches: Tensor) -> Tables:
        tables = super()._make_tables(tokenizer, pitches)
        kinds = [[kind_of(token) for token in tokens] for tokens in tokens_of_ids(tokenizer)]
        tables["starts"] = torch.tensor([each[0] == "TrackStart" for each in kinds])
        tables["closes"] = torch.tensor([each[-1] == "TrackEnd" for each in kinds])
        is_apart = ["TrackStart" not in each[1:] and "TrackEnd" not in each[:-1] for each in kinds]
        tables["follows"] &= torch.tensor(is_apart)
        tables["keeps"][:, 1:] &= ~tables["starts"][:, None]
        return tables

    def _own(self, tokenizer: MusicTokenizer) -> Tensor:
        return torch.zeros(_METERS + _MOST_METERS, dtype=torch.long)

    def _make_limits(self) -> Limits:
        # A piece ends after a track, and bars are counted where that ends.
        return super()._make_limits()._replace(min_bars=0)

    def _last_id(self, tokenizer: MusicTokenizer) -> int:
        return tokenizer.vocab[TRACK_END]

    def _opened(self, state: State) -> Tensor:
        return self._tables["bars"] - self._tables["starts"] * state.values[:, At.BARS, None]

    def _narrow(
        self, state: State, structure: Tensor, has_room: Tensor, in_time: Tensor, sayable: Tensor
    ) -> tuple[Tensor, ...]:
        table, values, own = self._tables, state.values, state.own[:, :, None]
        may_close = own[:, _NOTES] + table["num_notes"] > 0
        if self.min_bars:
            is_full = values[:, At.BARS, None] + table["bars"] >= self.min_bars
            is_full &= values[:, At.EMPTY, None] * table["keeps"][:, 1] + table["adds"][:, 1] == 0
            may_close &= is_full | (own[:, _ENDED] > 0)
        structure &= (~table["closes"] | may_close) & self._has_meters(state)
        return structure, torch.ones_like(has_room), in_time, sayable

    def _has_meters(self, state: State) -> Tensor:
        """Whether the meters of ids are those of the first track, of shape (batch, vocab)."""
        table, own = self._tables, state.own
        starts = table["starts"][None, :, None]
        bar = own[:, _BARS, None, None] * ~starts + table["meter_bar"] - 1  # (batch, vocab, meters)
        is_first = own[:, _TRACKS, None, None] + starts.long() == 1
        known = torch.where(is_first, _MOST_METERS, own[:, _KNOWN, None, None].clamp(max=_MOST_METERS))
        place = torch.minimum(bar, known - 1).clamp(min=0)
        wanted = own.gather(1, _METERS + place.flatten(1)).view_as(place)
        is_free = (table["meter_of"] == UNSET) | (is_first & (bar < _MOST_METERS))
        return (is_free | (table["meter_of"] == wanted)).all(dim=2)

    def _read(self, state: State, ids: Tensor, step: int) -> None:
        table, own = self._tables, state.own
        super()._read(state, ids, step)
        own *= ~table["begins"][ids, None]
        starts = table["starts"][ids]
        own[:, _TRACKS] += starts
        own[:, _BARS : _NOTES + 1] *= ~starts[:, None]
        is_first = own[:, _TRACKS] == 1
        bar = own[:, _BARS, None] + table["meter_bar"][ids] - 1
        told = (table["meter_of"][ids] != UNSET) & is_first[:, None] & (bar >= 0) & (bar < _MOST_METERS)
        place = torch.where(told, _METERS + bar, _METERS + _MOST_METERS - 1)
        own.scatter_(1, place, torch.where(told, table["meter_of"][ids], own.gather(1, place)))
        own[:, _BARS] += table["bars"][ids]
        own[:, _NOTES] += table["num_notes"][ids]
        own[:, _ENDED] += table["closes"][ids]
        own[:, _KNOWN] = torch.where(is_first, own[:, _BARS], own[:, _KNOWN])
        if step + 1 == self.prompt_length:
            own[:, _ENDED] = 0
