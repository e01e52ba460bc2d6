"""Infilling: a piece arranged so that what is wanted comes last, after everything that stays.

A causal model reads the bars after the gap, what is wanted, and the bars before it, and goes on writing:

    BOS controls GAP after GAP programs (TimeSig GAP) … FILL FILL … before | span EOS

`programs` are those that may play in the span, and then each wanted bar is a meter and a GAP. There is a FILL for each
bar that is shown before the gap, and one more. A GAP right after BOS and the controls tells an arranged piece from one
that is written from its beginning to its end.

Nothing stands between the bars before the gap and the span, so a model fills a gap as it continues a piece, and learns
both from either. The order is suffix, prefix, middle of Bavarian et al. (2022), "Efficient Training of Language Models
to Fill in the Middle", https://arxiv.org/abs/2207.14255. It also keeps the look-back of a model aligned: 4 bars ago is
4 bars before in the piece, down to the first bar that is shown. From the number of FILLs, a model that looks ahead
knows how far the bars after the gap are.

Where only some tracks are wanted, the gap with what stays in it comes last:

    … FILL FILL … before FILL others FILL | span EOS

There the same bar of the other instruments is as many bars ago as bars are wanted, and everything before the gap that
much further. With no bar before the gap, its FILL is left out.

That tracks are wanted as well as bars is as in MMM (Ens and Pasquier, 2020, https://arxiv.org/abs/2008.06048).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from miditok import REMI, MusicTokenizer
from numpy.typing import NDArray
from symusic import Note, Track
from symusic.core import ScoreTick

from .errors import InputError
from .gaps import Gap, with_gap
from .grammar_types import check_plain
from .ingest import check_score
from .normalization import normalize_score
from .tokenizations import FILL, GAP
from .tokenizer import encode_normalized, expand_ids, merge_ids

Ints = NDArray[np.int64]

NOT_LEARNED = "this model has not learned to fill gaps: train one with `midimamba train MUSIC --infill`"
CONTEXT_BARS = 16
"""The most bars before a gap, and after it, that a model is shown: in training and later."""

_KINDS = ("Bar", "TimeSig", "Position", "Tempo", "Program", "Pitch", "Velocity", "Duration")
_BAR, _METER, _POSITION, _TEMPO, _PROGRAM, _PITCH, _VELOCITY, _DURATION = range(len(_KINDS))
_OTHER = -1
# Quarter notes: a bar line further off than this is another one. Half a position of a quarter note.
_NOTICED = 1 / 24
_PIANO = 0  # MidiTok's program until a token says otherwise


def check_can_infill(tokenizer: MusicTokenizer) -> None:
    """Raise an [`InputError`] if pieces of a tokenizer cannot be arranged: only REMI has bars that stand alone."""
    if type(tokenizer) is not REMI:
        raise InputError(f"infilling needs REMI, not {type(tokenizer).__name__}: choose --tokenization REMI")
    check_plain(tokenizer, "infilling")


@dataclass(frozen=True)
class Piece:
    """
    A piece, taken apart. Bars count from 0.

    Args:
        meters (`array` of shape (bars,)): the id of each bar's time signature, or -1 if bars have none.
        bar, position, program (`array` of shape (notes,)): of each note, in the order of the ids.
        tokens (`array` of shape (notes, 2 or 3)): the ids of pitch, velocity if there is one, and duration.
        tempos (`array` of shape (tempos, 3)): bar, position and id of each change of tempo.
    """

    meters: Ints
    bar: Ints
    position: Ints
    program: Ints
    tokens: Ints
    tempos: Ints

    @property
    def num_bars(self) -> int:
        return len(self.meters)

    def up_to(self, bar: int) -> "Piece":
        """The piece without this bar and those after it."""
        notes, tempos = self.bar < bar, self.tempos[:, 0] < bar
        return Piece(
            self.meters[:bar],
            self.bar[notes],
            self.position[notes],
            self.program[notes],
            self.tokens[notes],
            self.tempos[tempos],
        )


class Span(NamedTuple):
    """
    What is wanted of a piece, and how much of the rest is shown. Bars count from 0.

    Args:
        first, last (`int`): the wanted bars are `first` to `last - 1`.
        wanted (`array` of shape (notes,)): which notes belong to the span. All others stay.
        programs (`Sequence[int]`): those that may play in it, -1 for drums.
        beside (`bool`): whether other notes may stay in these bars, because only some tracks are wanted.
    """

    first: int
    last: int
    wanted: NDArray[np.bool_]
    programs: Sequence[int]
    beside: bool


class Asked(NamedTuple):
    """
    What a prompt asks for.

    Args:
        meters (`list[str]`): the time signature of each wanted bar, such as `"3/4"`.
        programs (`list[int]`): the programs that may play in them.
    """

    meters: list[str]
    programs: list[int]


class _Start(NamedTuple):
    """The place in ids from which a span is written, and how many bars of the piece stand between it and the span."""

    place: int
    before: int


class Arranger:
    """
    Arranges pieces of one tokenizer.

    Args:
        tokenizer (`miditok.MusicTokenizer`): REMI with the two tokens of infilling, trained or not.

    Raises:
        InputError: if it has not.
    """

    def __init__(self, tokenizer: MusicTokenizer) -> None:
        if GAP not in tokenizer.special_tokens:
            raise InputError(NOT_LEARNED)
        check_can_infill(tokenizer)
        self.tokenizer = tokenizer
        vocab: dict[str, int] = tokenizer.vocab
        self.gap_id, self.fill_id, self._bar_id = vocab[GAP], vocab[FILL], vocab["Bar_None"]
        self._kind = np.full(len(vocab), _OTHER)
        self._value = np.zeros(len(vocab), np.int64)
        for token, index in vocab.items():
            kind, _, value = token.partition("_")
            kind = kind.removesuffix("Drum")
            if kind in _KINDS:
                self._kind[index] = _KINDS.index(kind)
            if kind in ("Position", "Program"):
                self._value[index] = int(value)
        self._ids = {kind: self._ids_of(kind) for kind in (_POSITION, _PROGRAM)}
        self._meters = {vocab[token]: token.partition("_")[2] for token in vocab if token.startswith("TimeSig_")}
        self._rest = [_VELOCITY, _DURATION] if tokenizer.config.use_velocities else [_DURATION]

    def _ids_of(self, kind: int) -> dict[int, int]:
        """The ids of a kind by their values."""
        ids = np.flatnonzero(self._kind == kind)
        return dict(zip(self._value[ids].tolist(), ids.tolist(), strict=True))

    def expand(self, ids: Sequence[int]) -> Ints:
        """Base ids, special ones included."""
        return np.array(expand_ids(self.tokenizer, ids), np.int64)

    # ---- a piece and its ids ----

    def take_apart(self, ids: Ints) -> Piece:
        """The piece that base ids of shape (time,) write. Special tokens and notes that break off are left out."""
        kind, value = self._kind[ids], self._value[ids]
        bars = np.cumsum(kind == _BAR) - 1
        positions, programs = _latest(value, kind == _POSITION, 0), _latest(value, kind == _PROGRAM, _PIANO)
        meters = np.full(int((kind == _BAR).sum()), -1)
        places = np.flatnonzero((kind == _METER) & (bars >= 0))
        meters[bars[places]] = ids[places]
        tempos = np.flatnonzero((kind == _TEMPO) & (bars >= 0))
        notes = np.flatnonzero((kind == _PITCH) & (bars >= 0))
        notes = notes[notes + len(self._rest) < len(ids)]
        for distance, expected in enumerate(self._rest, start=1):
            notes = notes[kind[notes + distance] == expected]
        return Piece(
            meters,
            bars[notes],
            positions[notes],
            programs[notes],
            ids[notes[:, None] + np.arange(1 + len(self._rest))],
            np.stack([bars[tempos], positions[tempos], ids[tempos]], axis=1),
        )

    def write(
        self,
        piece: Piece,
        first: int,
        last: int,
        keep: NDArray[np.bool_] | None = None,
        with_tempos: bool = True,
    ) -> list[int]:
        """Base ids of bars `first` to `last - 1`, as the tokenizer writes a piece.

        Args:
            piece (`Piece`): the piece.
            first, last (`int`): the bars.
            keep (`array` of shape (notes,), *optional*): which notes to write. By default all.
            with_tempos (`bool`, *optional*, defaults to `True`): whether to write tempos; then the tempo in force
                stands at the beginning.
        """
        inside = (piece.bar >= first) & (piece.bar < last)
        notes = np.flatnonzero(inside if keep is None else inside & keep)
        events = [(int(piece.bar[n]), int(piece.position[n]), 1, int(n)) for n in notes]
        if with_tempos:
            events = sorted([*events, *self._tempos(piece, first, last)])
        always = not self.tokenizer.config.program_changes
        ids: list[int] = []
        bar, position, program = first - 1, -1, None
        for its_bar, its_position, is_note, place in events:
            if its_bar > bar:
                ids += self._heads(piece, bar + 1, its_bar + 1)
                bar, position = its_bar, -1
            if its_position != position:
                position = its_position
                ids.append(self._ids[_POSITION][position])
            if not is_note:
                ids.append(place)
                continue
            if always or piece.program[place] != program:
                program = int(piece.program[place])
                ids.append(self._ids[_PROGRAM][program])
            ids += piece.tokens[place].tolist()
        return ids + self._heads(piece, bar + 1, last)

    def num_base_ids(self, piece: Piece) -> Ints:
        """About how many base ids each bar has, shape (bars,)."""
        counts = np.bincount(piece.bar, minlength=piece.num_bars)
        return 2 + (piece.tokens.shape[1] + 1) * counts

    def _heads(self, piece: Piece, first: int, last: int) -> list[int]:
        """The tokens with which bars begin."""
        meters = piece.meters[first:last].tolist()
        return [index for meter in meters for index in (self._bar_id, *([meter] if meter >= 0 else []))]

    @staticmethod
    def _tempos(piece: Piece, first: int, last: int) -> list[tuple[int, int, int, int]]:
        """The changes of tempo of some bars as events, with the tempo in force where the first one begins."""
        bars = piece.tempos[:, 0]
        found = [
            (int(bar), int(position), 0, int(index))
            for bar, position, index in piece.tempos[(bars >= first) & (bars < last)]
        ]
        before = piece.tempos[bars < first]
        if len(before) and last > first and not any(event[:2] == (first, 0) for event in found):
            found.append((first, 0, 0, int(before[-1, 2])))
        return found

    # ---- arranging ----

    def span_of(self, piece: Piece, score: ScoreTick, gap: Gap) -> Span:
        """The bars of a gap in the ids of a score whose gap is empty.

        A bar of the score may be several in ids, because it is written as meters that the tokenizer has.

        Raises:
            InputError: if the gap does not begin and end at bar lines of the ids.
        """
        lines = self.bar_lines(piece)
        places = [int(np.abs(lines - tick / score.ticks_per_quarter).argmin()) for tick in (gap.start, gap.end)]
        distance = max(
            abs(lines[place] * score.ticks_per_quarter - tick) for place, tick in zip(places, gap, strict=False)
        )
        if distance > _NOTICED * score.ticks_per_quarter or places[0] == places[1]:
            raise InputError(
                "the model cannot write bars as long as the wanted ones: choose others, or a model with more meters"
            )
        nothing = np.zeros(len(piece.bar), bool)
        return Span(places[0], places[1], nothing, gap.programs(score), gap.only)

    def prompt(self, score: ScoreTick, gap: Gap, before: int = CONTEXT_BARS, after: int = CONTEXT_BARS) -> list[int]:
        """The prompt that asks a model to fill a gap of a score, without BOS and controls.

        Raises:
            MidiRefusedError: if the tokenization cannot write the score.
            InputError: if the gap does not begin and end at bar lines of the ids.
        """
        context = with_gap(score, gap)
        last = max((note.time for track in context.tracks for note in track.notes), default=-1)
        if last < gap.end:  # else no bar after the last note is written: a note after the gap asks for them
            pitch = self.tokenizer.config.drums_pitch_range[0]
            context.tracks.append(Track(is_drum=True, notes=[Note(gap.end, 1, pitch, 64)]))
        normal = normalize_score(self.tokenizer, check_score(context))
        piece = self.take_apart(np.array(encode_normalized(self.tokenizer, normal)))
        span = self.span_of(piece, score, gap)
        if last < gap.end:
            piece = piece.up_to(span.last)
            span = span._replace(wanted=np.zeros(len(piece.bar), bool))
        return self.arrange(piece, span, before, after)[0]

    def arrange(
        self, piece: Piece, span: Span, before: int = CONTEXT_BARS, after: int = CONTEXT_BARS
    ) -> tuple[list[int], list[int]]:
        """A piece with what is wanted at its end.

        Args:
            piece (`Piece`): the piece.
            span (`Span`): what is wanted.
            before, after (`int`, *optional*, defaults to 16): at most this many bars of context.

        Returns:
            `tuple[list[int], list[int]]`: the prompt, without BOS and controls, and the span, without EOS.
        """
        start = max(span.first - before, 0)
        right = self.write(piece, span.last, min(span.last + after, piece.num_bars))
        prompt = [self.gap_id, *self._merge(right), self.gap_id]
        prompt += [self._ids[_PROGRAM][program] for program in sorted(span.programs)]
        for meter in piece.meters[span.first : span.last].tolist():
            prompt += [self.gap_id] if meter < 0 else [meter, self.gap_id]
        shown = span.first - start
        if not span.beside:
            left, music = self.continued(piece, span.first, span.last, before)
            return [*prompt, *[self.fill_id] * (shown + 1), *left], music
        if shown:
            prompt += [*[self.fill_id] * (shown + 1), *self._merge(self.write(piece, start, span.first))]
        others = self.write(piece, span.first, span.last, ~span.wanted)
        prompt += [self.fill_id, *self._merge(others), self.fill_id]
        return prompt, self._merge(self.write(piece, span.first, span.last, span.wanted, with_tempos=False))

    def continued(
        self, piece: Piece, first: int, last: int, before: int = CONTEXT_BARS
    ) -> tuple[list[int], list[int]]:
        """Bars of a piece after those before them, as a continuation: the prompt without BOS, and bars without tempos.

        So a model's likelihood of them can be compared with that of a span that [`arrange`] gives.
        """
        start = max(first - before, 0)
        unchanging = replace(piece, tempos=piece.tempos[piece.tempos[:, 0] < first])
        prompt, both = self.write(unchanging, start, first), self.write(unchanging, start, last)
        return self._merge(prompt), self._merge(both[len(prompt) :])

    def _merge(self, ids: list[int]) -> list[int]:
        return merge_ids(self.tokenizer, ids) if ids else []

    def asked(self, prompt: Sequence[int]) -> Asked | None:
        """What a prompt asks for. `None` if it does not ask to fill a gap."""
        if self.fill_id not in prompt:  # nothing is merged with it
            return None
        ids = self.expand(prompt)
        gaps = np.flatnonzero(ids == self.gap_id)[1:]  # the first is that before the bars after
        if not len(gaps):
            return None
        header = ids[gaps[0] : gaps[-1]]
        has_meters = bool(self.tokenizer.config.use_time_signatures)
        wanted = [int(ids[place - 1]) if has_meters else -1 for place in gaps[1:]]
        programs = self._value[header[self._kind[header] == _PROGRAM]].tolist()
        return Asked([self._meter(meter) for meter in wanted], programs)

    def filling(self, ids: Sequence[int]) -> list[int]:
        """What a model wrote after a prompt, as base ids."""
        base = self.expand(ids)
        start = self._start(base)
        if start is None:
            raise ValueError("the ids hold no request to fill a gap: give the prompt of `infill` with what follows it")
        if not start.before:
            return base[start.place :].tolist()
        piece = self.take_apart(base[start.place :])
        return self.write(piece, start.before, piece.num_bars, with_tempos=False)

    def _start(self, ids: Ints) -> "_Start | None":
        """Where the music begins that the span continues, in base ids with a request; `None` without one."""
        fills = np.flatnonzero(ids == self.fill_id)
        if not len(fills):
            return None
        run = len(fills) - np.searchsorted(fills - np.arange(len(fills)), fills[-1] - len(fills) + 1)
        return _Start(int(fills[-1]) + 1, int(run) - 1)

    def bar_lines(self, piece: Piece) -> NDArray[np.float64]:
        """Where bars begin, in quarter notes, shape (bars + 1,); the last is the end of the piece."""
        lengths = [0.0]
        for meter in piece.meters.tolist():
            numerator, denominator = self._meter(meter).split("/")
            lengths.append(4 * int(numerator) / int(denominator))
        return np.cumsum(lengths)

    def _meter(self, index: int) -> str:
        """The time signature of an id; that of -1 is 4/4."""
        return self._meters.get(index, "4/4")


def _latest(values: Ints, where: NDArray[np.bool_], default: int) -> Ints:
    """For every place, the value at the last place up to it that is marked; shapes (time,)."""
    places = np.maximum.accumulate(np.where(where, np.arange(len(values)), -1))
    return np.where(places >= 0, values[places], default)
