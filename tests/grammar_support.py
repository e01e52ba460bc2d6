"""The rules of the grammar once more, read slowly, and what samples by it: for the tests of the grammar."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from miditok import MusicTokenizer
from symusic.core import ScoreTick

from midimamba.tokenization.controls import control_token
from midimamba.tokenization.grammar import MAX_SILENT_TOKENS, MidiGrammar
from midimamba.tokenization.grammars import make_grammar
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import base_ids, expand_ids, merge_ids

PAD, BOS, EOS = 0, 1, 2
CONTROL_TOKENS = [control_token(*pair) for pair in (("key", "C-major"), ("instruments", "drums"), ("bars", "1-8"))]
# In REMI: the fewest base tokens from each type to a complete note.
TO_NOTE = {
    "Bar": 5,
    "TimeSig": 4,
    "Position": 3,
    "Tempo": 3,
    "Program": 3,
    "Pitch": 2,
    "PitchDrum": 2,
    "Velocity": 1,
}
NEXT = {
    None: {"Bar"},
    "Bar": {"TimeSig"},
    "TimeSig": {"Bar", "Position"},
    "Position": {"Tempo", "Program", "Pitch", "PitchDrum"},
    "Tempo": {"Bar", "Position", "Program", "Pitch", "PitchDrum"},
    "Program": {"Pitch", "PitchDrum"},
    "Pitch": {"Velocity"},
    "PitchDrum": {"Velocity"},
    "Velocity": {"Duration"},
    "Duration": {"Bar", "Position", "Program", "Pitch", "PitchDrum"},
}


class Reader:
    """The rules of REMI once more, read token by token and slowly."""

    def __init__(
        self,
        max_empty_bars: int = 2,
        max_notes: int = 32,
        programs: Collection[int] = range(-1, 128),
        bars: int | None = None,
        voices: int = 32,
    ) -> None:
        self.max_empty_bars, self.max_notes, self.programs, self.exact_bars = max_empty_bars, max_notes, programs, bars
        self.voices = voices
        self.last: str | None = None
        self.position, self.limit, self.program = -1, 48, 0
        self.silence = self.empty = self.bars = self.notes = 0
        self.onset: set[tuple[int, int]] = set()  # (program, pitch)
        self.held = False

    def continue_prompt(self) -> None:
        """What was read is a prompt."""
        self.held, self.bars = True, 0

    def read(self, tokens: list[str]) -> bool:
        """Whether `tokens` may follow what was read before."""
        return all(self._read(*token.split("_")) for token in tokens) and self._in_time()

    def may_end(self) -> bool:
        """Whether the end may follow."""
        return self.last == "Duration" and not self.held and self.exact_bars in (None, self.bars)

    def _in_time(self) -> bool:
        assert self.last is not None
        if self.last == "Duration":
            return True
        to_note = TO_NOTE[self.last]
        if self.program not in self.programs and self.last not in ("Pitch", "PitchDrum", "Velocity"):
            to_note += 1  # a program
        return self.silence + to_note <= MAX_SILENT_TOKENS

    def _read(self, kind: str, value: str) -> bool:
        if kind not in NEXT[self.last]:
            return False
        self.last = kind
        self.silence += 1
        if kind in ("Bar", "Position"):
            self.onset, self.held = set(), False
        if kind == "Bar":
            self.position = -1
            self.bars += 1
            self.empty += 1
            return self.empty <= self.max_empty_bars + 1 and (self.exact_bars is None or self.bars <= self.exact_bars)
        if kind == "TimeSig":
            self.limit = int(value.split("/")[0]) * 12
        if kind == "Program":
            self.program = int(value)
            return self._is_room() and self.program in self.programs
        if kind in ("Pitch", "PitchDrum"):
            note = (self.program, int(value))
            fits = self._is_room() and self.program in self.programs and note not in self.onset
            self.onset.add(note)
            return fits and (self.program == -1) == (kind == "PitchDrum")
        if kind == "Position":
            before, self.position = self.position, int(value)
            return before < self.position < self.limit
        if kind == "Duration":
            in_time = self.silence <= MAX_SILENT_TOKENS
            self.silence = self.empty = 0
            self.notes += 1
            return in_time
        return True

    def _is_room(self) -> bool:
        pitched = sum(program != -1 for program, _ in self.onset)
        has_voice = self.program == -1 or pitched < self.voices
        return not self.held and has_voice and len(self.onset) < self.max_notes


def read(tokenizer: MusicTokenizer, ids: Sequence[int], **options: Any) -> Reader:
    reader = Reader(**options)
    for index in ids:
        assert reader.read(expand(tokenizer, index)), (index, ids)
    return reader


# The tokenizer is kept beside its tokens, or another could get its `id`.
_EXPANDED: dict[int, tuple[MusicTokenizer, list[list[str]]]] = {}


def expand(tokenizer: MusicTokenizer, index: int) -> list[str]:
    if id(tokenizer) not in _EXPANDED:
        tokens = [tokenizer._ids_to_tokens(expand_ids(tokenizer, [i])) for i in range(tokenizer.vocab_size)]
        _EXPANDED[id(tokenizer)] = tokenizer, tokens
    return _EXPANDED[id(tokenizer)][1][index]


def sample(
    tokenizer: MusicTokenizer,
    grammar: MidiGrammar,
    preference: torch.Tensor,
    rows: int,
    steps: int,
    seed: int = 0,
    prefix: Sequence[int] = (BOS,),
) -> list[list[int]]:
    """Sample rows of ids from random logits plus `preference` of shape (vocab,), as `generate` would."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prefix]).repeat(rows, 1)
    for _ in range(steps):
        scores = torch.randn(rows, len(preference), generator=generator) + preference
        scores = grammar(ids, scores)
        assert (scores > -torch.inf).any(dim=1).all()
        chosen = torch.multinomial(scores.softmax(dim=1), 1, generator=generator)
        done = (ids == EOS).any(dim=1, keepdim=True)
        ids = torch.cat([ids, chosen.masked_fill(done, PAD)], dim=1)
    assert not ((ids[:, 1:] == BOS).any())
    assert not (((ids == PAD) & ~(ids == EOS).cumsum(dim=1).bool()).any())
    return [[index for index in row if index > EOS] for row in ids.tolist()]


def prefer(tokenizer: MusicTokenizer, kind: str) -> torch.Tensor:
    firsts = [expand(tokenizer, index)[0].split("_")[0] for index in range(tokenizer.vocab_size)]
    return torch.tensor([60.0 if first == kind else 0.0 for first in firsts])


def assert_allowed(tokenizer: MusicTokenizer, score: ScoreTick) -> None:
    """The grammar lets a model write `score`, id by id, and end there, with no more voices than `score` has."""
    written = MidiProcessor(tokenizer).decode(base_ids(tokenizer, score))
    notes = Counter(n.time for track in written.tracks if not track.is_drum for n in track.notes)
    ids = [BOS, *merge_ids(tokenizer, base_ids(tokenizer, score)), EOS]
    prefixes = torch.zeros(len(ids) - 1, len(ids) - 1, dtype=torch.long)
    for length in range(1, len(ids)):
        prefixes[length - 1, -length:] = torch.tensor(ids[:length])
    grammar = make_grammar(tokenizer, voices=max(notes.values(), default=None))
    judged = grammar(prefixes, torch.zeros(len(prefixes), tokenizer.vocab_size))
    assert (judged[torch.arange(len(prefixes)), torch.tensor(ids[1:])] == 0).all()


def starts_of(score: ScoreTick) -> list[tuple[int, float, int]]:
    """Sorted (program, onset in quarter notes, pitch)."""
    return sorted(
        (-1 if track.is_drum else track.program, note.time / score.tpq, note.pitch)
        for track in score.tracks
        for note in track.notes
    )


def assert_music(processor: MidiProcessor, row: Sequence[int], programs: Collection[int]) -> None:
    """A sample is music: notes of `programs`, none twice in a track; encoding what it means gives the same notes."""
    score = processor.decode(row)
    starts = starts_of(score)
    assert starts
    for track in score.tracks:
        assert len({(note.time, note.pitch) for note in track.notes}) == len(track.notes)
    assert min(time for _, time, _ in starts) >= 0
    assert {program for program, _, _ in starts} <= set(programs)
    # Tracks without notes come from pedals, bends and control changes.
    assert {-1 if track.is_drum else track.program for track in score.tracks} <= set(programs)
    assert starts_of(processor.decode(processor.encode(score))) == starts
