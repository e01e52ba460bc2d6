"""From ids to notes while the ids are still being sampled, with the notes that the whole sequence would give.

A piece that is decoded as a whole is settled at its end: long notes are tied together, a note ends where its pitch is
struck again, and where no voice is left the oldest note ends. Here the same rules are followed as time goes by, one
onset after the other. A note is *complete* when nothing that may still come can change its end: the music has reached
it. Only what sounds is remembered, so memory does not grow.
"""

from bisect import bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from miditok import REMI, MusicTokenizer
from symusic import Tempo
from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.tokenization.constraints import DRUMS
from midimamba.tokenization.continuation import end_with_last_bar, in_fine_division, instrument_of
from midimamba.tokenization.grammar_types import check_plain
from midimamba.tokenization.ingest import read_unordered
from midimamba.tokenization.processor import Midi, MidiProcessor
from midimamba.tokenization.tokenizer import expand_ids
from midimamba.tokenization.walks import NO_SHIFT

# MidiTok's, where a tokenizer has no tokens for velocities, and MIDI's, in microseconds per quarter note.
_VELOCITY, _MSPQ = 100, 500_000
# Changes of the beat that are remembered. What is looked up lies less than a bar back.
_SECTIONS = 16
STREAMED = ("REMI", "TSD", "Structured")
"""The tokenizations whose notes come in the order of time, each complete when its last token is read."""


def check_streamed(tokenizer: MusicTokenizer) -> None:
    """Raise an [`InputError`] if notes cannot be told before the piece is there."""
    if (name := type(tokenizer).__name__) not in STREAMED:
        raise InputError(f"streaming needs {', '.join(STREAMED)}, not {name}: sample whole pieces")
    check_plain(tokenizer, "streaming")


class Note(NamedTuple):
    """
    A note, complete with its end.

    Args:
        onset, duration (`float`): in quarter notes. The onset counts from the start of the piece, prompt included.
        seconds, duration_seconds (`float`): onset and duration in seconds, at the tempos of the piece.
        pitch (`int`): from 0 to 127.
        velocity (`int`): from 1 to 127.
        program (`int`): of General MIDI, from 0 to 127; 0 for drums.
        is_drum (`bool`): whether it is a drum, which belongs on MIDI channel 10.
    """

    onset: float
    duration: float
    seconds: float
    duration_seconds: float
    pitch: int
    velocity: int
    program: int
    is_drum: bool


@dataclass(eq=False, slots=True)
class _Open:
    """
    A note whose end may still change. `raw` times are the tokenizer's ticks, the others those of the result.

    Args:
        program (`int`): -1 for drums.
        time, raw (`int`): the onset.
        until (`int`): the latest end of earlier notes of its pitch, to which it lasts, in raw ticks.
        cap (`int`, *optional*): where a note of the prompt strikes its pitch, which ends it.
        end, raw_end (`int`): as far as is known.
        tie (`int`, *optional*): the end of its last piece, in raw ticks, if what begins there may be tied to it.
        is_closed (`bool`): its pitch was struck again: its end stands.
        is_stolen (`bool`): no voice was left, so it ended.
    """

    pitch: int
    velocity: int
    program: int
    time: int
    raw: int
    until: int
    cap: int | None
    end: int = 0
    raw_end: int = 0
    tie: int | None = None
    is_closed: bool = False
    is_stolen: bool = False


class _Struck(NamedTuple):
    """A note as its tokens say it, in the tokenizer's ticks."""

    program: int
    pitch: int
    velocity: int
    duration: int


class _Grid:
    """Positions and longest durations by the meter in force, as [`~midimamba.tokenization.note_times.Grid`]."""

    def __init__(self, tokenizer: MusicTokenizer):
        self._per_beat = tokenizer.config.max_num_pos_per_beat
        self._longest = {beat: int(times[-1]) for beat, times in tokenizer._tpb_to_time_array.items()}
        self._sections: deque[tuple[int, int]] = deque([(0, tokenizer.time_division)], _SECTIONS)

    def change(self, time: int, beat: int) -> None:
        """From `time` on, a beat has `beat` ticks."""
        if beat != self._sections[-1][1]:
            self._sections.append((time, beat))

    def _section(self, time: int) -> tuple[int, int]:
        return next((section for section in reversed(self._sections) if section[0] <= time), self._sections[0])

    def is_longest(self, time: int, duration: int) -> bool:
        """Whether a note could not be longer without a tie."""
        return duration == self._longest[self._section(time)[1]]

    def round(self, time: int) -> int:
        """The nearest position."""
        start, beat = self._section(time)
        step = beat // self._per_beat
        return (2 * (time - start) + step) // (2 * step) * step + start


class _Clock:
    """
    Seconds by ticks. Only the tempos that are still needed are kept.

    Args:
        tempos (iterable of `tuple[int, int]`): ticks, and microseconds per quarter note from there on.
        division (`int`): ticks per quarter note.
    """

    def __init__(self, tempos: Iterable[tuple[int, int]], division: int):
        self._division = division
        self._changes = sorted(tempos, key=lambda change: change[0])
        self._time, self._seconds, self._mspq = 0, 0.0, _MSPQ

    def change(self, time: int, mspq: int) -> None:
        """Add a tempo, after those of the same tick."""
        insort(self._changes, (time, mspq), key=lambda change: change[0])

    def seconds(self, time: int) -> float:
        """From the start of the piece to tick `time`, which is not before the last one that was forgotten."""
        return self._walk(time, bisect_right(self._changes, time, key=lambda change: change[0]))[1]

    def forget(self, time: int) -> None:
        """Nothing before tick `time` will be asked for."""
        passed = bisect_right(self._changes, time, key=lambda change: change[0])
        if passed:
            self._time, self._seconds, self._mspq = self._walk(self._changes[passed - 1][0], passed)
            del self._changes[:passed]

    def _walk(self, time: int, passed: int) -> tuple[int, float, int]:
        """Tick, seconds and tempo at `time`, which `passed` changes precede."""
        at, seconds, mspq = self._time, self._seconds, self._mspq
        for start, tempo in self._changes[:passed]:
            seconds += (start - at) * mspq / self._division / 1e6
            at, mspq = start, tempo
        return time, seconds + (time - at) * mspq / self._division / 1e6, mspq


class _Reader:
    """
    Where the music of ids stands, token by token, as MidiTok decodes it.

    Args:
        tokenizer (`miditok.MusicTokenizer`): one that the grammar supports.
    """

    def __init__(self, tokenizer: MusicTokenizer):
        self.tokenizer = tokenizer
        self.grid = _Grid(tokenizer)
        self.tick = 0
        self.tempos: list[tuple[int, int]] = []
        """Ticks and tempos that were read and that nobody has taken."""
        self.time = "Bar" if isinstance(tokenizer, REMI) else "TimeShift"
        """The type of the tokens with which time goes on."""
        self._tokens: dict[int, list[tuple[str, str]]] = {}
        self._beat = tokenizer.time_division
        self._bar_length = 4 * self._beat
        self._bar: int | None = None  # where the open bar starts
        self._program = 0
        self._note: list[int] = []  # pitch and velocity of the note that is being read

    def tokens(self, index: int) -> list[tuple[str, str]]:
        """The base tokens of an id, each as its type and value."""
        if index not in self._tokens:
            names = self.tokenizer._ids_to_tokens(expand_ids(self.tokenizer, [index]))
            self._tokens[index] = [(kind, value) for kind, _, value in (name.partition("_") for name in names)]
        return self._tokens[index]

    def read(self, kind: str, value: str) -> _Struck | None:
        """Take in one token. Returns the note that it completes."""
        note, self._note = self._note, []
        if kind in ("Pitch", "PitchDrum"):
            self._note = [int(value)] if self.tokenizer.config.use_velocities else [int(value), _VELOCITY]
        elif kind == "Velocity" and len(note) == 1:
            self._note = [*note, int(value)]
        elif kind == "Duration" and len(note) == 2:
            return _Struck(self._program, note[0], note[1], max(1, self._ticks(value)))
        elif kind == "Program":
            self._program = int(value)
        elif kind == "Tempo":
            self.tempos.append((self.tick, Tempo(0, float(value)).mspq))
        elif kind == "TimeSig":
            self._change_meter(*map(int, value.split("/")))
        elif kind in ("Bar", "Position", "TimeShift"):
            self._move(kind, value)
        return None

    def _ticks(self, duration: str) -> int:
        return int(self.tokenizer._tpb_tokens_to_ticks[self._beat][duration])

    def _move(self, kind: str, value: str) -> None:
        if kind == "TimeShift":
            self.tick += 0 if value == NO_SHIFT else self._ticks(value)
        elif kind == "Bar":
            self._bar = 0 if self._bar is None else self._bar + self._bar_length
            self.tick = self._bar
        else:
            self._bar = self._bar or 0
            self.tick = self._bar + int(value) * self.tokenizer._compute_ticks_per_pos(self._beat)

    def _change_meter(self, numerator: int, denominator: int) -> None:
        self._beat = self.tokenizer._tpb_per_ts[denominator]
        self._bar_length = 4 * self.tokenizer.time_division * numerator // denominator
        self.grid.change(self.tick, 4 * self.tokenizer.time_division // denominator)


class _Voices:
    """
    The limit of voices, onset by onset: [`~midimamba.tokenization.voices.limit_voices`].

    Args:
        most (`int`, *optional*): how many may sound at once. By default any number.
        given (iterable of `tuple[int, int]`): onsets and ends of the pitched notes of the prompt.
    """

    def __init__(self, most: int | None, given: Iterable[tuple[int, int]]):
        self._most = most
        self._given = deque(sorted(given))
        self._running: list[int] = []  # the ends of given notes
        self._alive: list[_Open] = []  # by onset and pitch

    def begin(self, time: int, notes: list[_Open]) -> None:
        """Let notes begin at `time`, by pitch and program. Before them come the given notes up to that time."""
        if self._most is not None and notes:
            self.pass_to(time)
            self._begin(time, notes, self._most)

    def pass_to(self, time: int | None) -> None:
        """Let the given notes begin whose onsets lie before `time`, or all."""
        while self._most is not None and self._given and (time is None or self._given[0][0] < time):
            self._begin(self._given[0][0], [], self._most)

    def _begin(self, time: int, notes: list[_Open], most: int) -> None:
        ends = []
        while self._given and self._given[0][0] == time:
            ends.append(self._given.popleft()[1])
        self._running = [end for end in self._running if end > time]
        self._alive = [note for note in self._alive if note.end > time]
        wanted = len(self._running) + len(ends) + len(notes)
        while self._alive and len(self._alive) + wanted > most:
            stolen = self._alive.pop(0)
            stolen.end, stolen.is_stolen = time, True
        self._running += ends
        self._alive += notes


class NoteDecoder:
    """
    Turns ids into notes one by one. All that it returns, in order, are the new notes of `continue_score`.

    Ids have to be music in the order of time, as what is sampled under the grammar.

    Args:
        processor (`MidiProcessor`): of REMI, TSD or Structured.
        prompt (`str`, `Path`, `bytes` or `symusic.Score`, *optional*): what the ids continue. It gives no notes.
        longest (`float`, *optional*): a note that is tied on for more than this many quarter notes is struck again
            instead. By default any length, which has to be waited for.
        polyphony (`int`, *optional*): as for `continue_score`.

    Raises:
        InputError: if the tokenization is another, or its pieces hold more than notes, tempos and meters.
        MidiRefusedError: if the prompt cannot be used.
    """

    def __init__(
        self,
        processor: MidiProcessor,
        prompt: Midi | None = None,
        longest: float | None = None,
        polyphony: int | None = None,
    ):
        tokenizer = processor.midi_tokenizer
        check_streamed(tokenizer)
        assert processor.tokenizer is not None
        self._music = range(len(processor.tokenizer.all_special_ids), len(processor.tokenizer))
        self._reader = _Reader(tokenizer)
        self._longest = None if longest is None else round(longest * tokenizer.time_division)
        self._group: list[_Struck] = []  # those at the onset that is open
        self._onset = 0
        self._open: dict[tuple[int, int], _Open] = {}  # the last note of each program and pitch
        self._queue: deque[_Open] = deque()  # by onset
        self._sounding: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        score = None if prompt is None else read_unordered(prompt)[0]
        self.prompt_ids: list[int] = [] if score is None else processor.encode(score, add_bos=False)
        """The ids of the prompt's music, which are read already."""
        tempos = self._read_prompt(score)
        self._clock = _Clock(tempos, self._division)
        self._voices = _Voices(processor.voices_within(polyphony), self._given)

    def _read_prompt(self, score: ScoreTick | None) -> list[tuple[int, int]]:
        """Read the prompt. Returns the tempos of the piece so far."""
        reader = self._reader
        quarter = reader.tokenizer.time_division
        self._division, self._given = quarter, []
        for index in self.prompt_ids:
            for token in reader.tokens(index):
                reader.read(*token)
        said, reader.tempos = reader.tempos, []
        if not said or said[0][0]:  # as MidiTok decodes it
            said.insert(0, (0, Tempo(0, reader.tokenizer.default_tempo).mspq))
        tempos = said
        if score is not None:
            score = in_fine_division(score, quarter)
            self._division = score.ticks_per_quarter
            end_with_last_bar(score)
            tempos = [(tempo.time, tempo.mspq) for tempo in score.tempos]
            for track in score.tracks:
                is_drum, program = instrument_of(track)
                spans = [(note.time, note.end) for note in track.notes]
                for note, span in zip(track.notes, spans, strict=True):
                    self._sounding[DRUMS if is_drum else program, note.pitch].append(span)
                self._given += [] if is_drum else [(start, end) for start, end in spans if end > start]
        self._scale = self._division / quarter
        self._tempo = said[-1][1]
        self._said = set() if score is None else {(self._scaled(time), mspq) for time, mspq in said}
        self._onset = reader.tick
        return tempos

    def _scaled(self, time: int) -> int:
        """Of the tokenizer's ticks, those of the result: as `symusic` resamples."""
        return int(time * self._scale + 0.5)

    def is_head(self, index: int) -> bool:
        """Whether music can be read from an id on: it opens a bar, or moves time where there are no bars."""
        return index in self._music and self._reader.tokens(index)[0][0] == self._reader.time

    # ---- reading ----

    def music_of(self, ids: Iterable[int]) -> list[int]:
        """The ids without special tokens and those beyond the vocabulary."""
        return [index for index in ids if index in self._music]

    def read(self, ids: Iterable[int]) -> list[Note]:
        """Take in ids, and return the notes that are complete by now."""
        for index in self.music_of(ids):
            for token in self._reader.tokens(index):
                note = self._reader.read(*token)
                if self._reader.tick != self._onset:
                    self._advance()
                if note is not None:
                    self._group.append(note)
        return self._take(is_over=False)

    def finish(self) -> list[Note]:
        """Return the other notes: nothing follows."""
        self._begin()
        self._voices.pass_to(None)
        return self._take(is_over=True)

    def _advance(self) -> None:
        """Time has moved."""
        if self._reader.tick < self._onset:
            raise ValueError(
                "the ids go back in time, so their notes cannot be given out in order: sample them with "
                "logits_processor=[processor.grammar(prompt_length=…)]"
            )
        self._begin()
        self._onset = self._reader.tick
        self._voices.pass_to(self._scaled(self._onset))

    def _begin(self) -> None:
        """Let the notes of an onset begin, now that all are known. Of those of one pitch, one remains."""
        self._take_tempos()
        if not self._group:
            return
        raw, time = self._onset, self._scaled(self._onset)
        struck: dict[tuple[int, int], _Struck] = {}
        for note in self._group:
            key = note.program, note.pitch
            other = struck.get(key, note)
            velocity, duration = max(note.velocity, other.velocity), max(note.duration, other.duration)
            struck[key] = _Struck(*key, velocity, duration)
        self._group = []
        notes = [new for one in struck.values() if (new := self._strike(one, raw, time)) is not None]
        self._voices.begin(
            time, sorted((n for n in notes if n.program != DRUMS), key=lambda note: (note.pitch, note.program))
        )
        self._queue += sorted(notes, key=lambda note: (note.program == DRUMS, note.program, note.pitch))

    def _strike(self, struck: _Struck, raw: int, time: int) -> _Open | None:
        """What a note means for the one before it on its pitch. Returns it if it is one of its own and sounds."""
        key = struck.program, struck.pitch
        before = self._open.get(key)
        until = 0
        if before is not None:
            if self._is_tied(before, struck, raw):
                self._extend(before, raw, struck.duration)
                return None
            until = before.raw_end
            self._close(before, min(until, raw))
        sounding = self._sounding.get(key, ())
        cap = min((start for start, _ in sounding if start > time), default=None)
        note = _Open(struck.pitch, struck.velocity, struck.program, time, raw, until=until, cap=cap)
        self._open[key] = note
        self._extend(note, raw, struck.duration)
        return None if any(start <= time < end for start, end in sounding) else note

    def _is_tied(self, note: _Open, struck: _Struck, raw: int) -> bool:
        """Whether a note goes on with what was struck at `raw`."""
        if note.tie is None or note.velocity != struck.velocity or self._reader.grid.round(note.tie) != raw:
            return False
        return self._longest is None or raw + struck.duration - note.raw <= self._longest

    def _extend(self, note: _Open, raw: int, duration: int) -> None:
        """A note has a piece at `raw`: its first, or a tied one."""
        end = raw + duration
        note.tie = end if self._reader.grid.is_longest(raw, duration) else None
        self._set_end(note, max(note.until, end))

    def _close(self, note: _Open, raw_end: int) -> None:
        """A note ends for good."""
        self._set_end(note, raw_end)
        note.is_closed = True

    def _set_end(self, note: _Open, raw_end: int) -> None:
        note.raw_end = raw_end
        if not note.is_stolen:
            end = note.time + max(1, self._scaled(raw_end - note.raw))
            note.end = end if note.cap is None else min(end, note.cap)

    # ---- what is complete ----

    def _take(self, is_over: bool) -> list[Note]:
        """The notes that are complete, up to the first that is not."""
        taken = []
        while self._queue and (is_over or self._is_complete(self._queue[0])):
            taken.append(self._note(self._queue.popleft()))
        if taken:
            self._clock.forget(self._queue[0].time if self._queue else self._scaled(self._onset))
        return taken

    def _is_complete(self, note: _Open) -> bool:
        """Whether nothing that begins now or later can change the end of a note."""
        now = self._onset
        if note.is_stolen:
            return True
        if note.end > self._scaled(now):
            return False
        is_over = note.raw_end <= now and (note.tie is None or max(note.tie, self._reader.grid.round(note.tie)) < now)
        return note.is_closed or is_over

    def _note(self, note: _Open) -> Note:
        start, end = self._clock.seconds(note.time), self._clock.seconds(note.end)
        is_drum = note.program == DRUMS
        onset, duration = note.time / self._division, (note.end - note.time) / self._division
        program = 0 if is_drum else note.program
        return Note(onset, duration, start, end - start, note.pitch, note.velocity, program, is_drum)

    def _take_tempos(self) -> None:
        """Add the changes of tempo that were read, as [`~midimamba.tokenization.continuation`] does."""
        for raw, mspq in self._reader.tempos:
            time = self._scaled(raw)
            if mspq != self._tempo and (time, mspq) not in self._said:
                self._clock.change(time, mspq)
                self._tempo = mspq
        self._reader.tempos.clear()
