"""The grammar of MIDILike: notes that begin, sound and end."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from grammar_support import BOS, EOS, PAD, assert_allowed, assert_music, expand, prefer, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from miditok import MusicTokenizer
from symusic.core import ScoreTick

from midimamba.tokenization.grammar import MAX_SILENT_TOKENS
from midimamba.tokenization.grammar_midilike import MidiLikeGrammar
from midimamba.tokenization.open_notes import end_notes
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, merge_ids, train_tokenizer
from support import make_score

PROGRAMS = {-1, 40}
KINDS = ["none", "NoteOn", "DrumOn", "NoteOff", "DrumOff", "Program", "TimeShift", "TimeSig", "Velocity", "EOS"]


def build(trained: bool, scores: Sequence[ScoreTick], **options: Any) -> MusicTokenizer:
    tokenizer = build_tokenizer("MIDILike", **options)
    if trained:
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 300)
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["untrained", "BPE"])
def tokenizer(request: pytest.FixtureRequest, scores: list[ScoreTick]) -> MusicTokenizer:
    return build(request.param, scores)


class Sounding:
    """The rules about sounding notes once more, read token by token."""

    def __init__(self) -> None:
        self.program, self.time = 0, 0
        self.began: dict[tuple[int, int], int] = {}
        self.last = "BOS"

    def read(self, tokens: list[str]) -> bool:
        return all(self._read(*token.split("_")) for token in tokens)

    def _read(self, kind: str, value: str) -> bool:
        self.last = kind
        if kind == "Program":
            self.program = int(value)
        if kind == "TimeShift":
            self.time += 1
        if kind not in ("NoteOn", "DrumOn", "NoteOff", "DrumOff"):
            return True
        if kind.startswith("Drum") != (self.program == -1):
            return False
        note = self.program, int(value)
        if kind.endswith("Off"):
            return self.began.pop(note, self.time) < self.time
        is_new = note not in self.began
        self.began[note] = self.time
        return is_new

    def may_end(self) -> bool:
        return self.last in ("NoteOff", "DrumOff") and not self.began


def prefer_ends(tokenizer: MusicTokenizer) -> torch.Tensor:
    """Prefer what ends a note, or else what leads there, so that few notes sound."""
    kinds = [{name.split("_")[0] for name in expand(tokenizer, index)} for index in range(tokenizer.vocab_size)]
    offs, ways = {"NoteOff", "DrumOff"}, {"TimeShift", "Program"}
    return torch.tensor([40.0 if found & offs else 20.0 if found <= ways else 0.0 for found in kinds])


def test_every_id_keeps_the_rules_of_sounding_notes(tokenizer: MusicTokenizer) -> None:
    grammar = MidiLikeGrammar(tokenizer, programs=PROGRAMS)
    ends = 0
    for preference in (
        prefer_ends(tokenizer),
        *(prefer(tokenizer, kind) for kind in ("NoteOff", "TimeShift", "none")),
    ):
        preference[EOS] = 60.0
        for row in sample(tokenizer, grammar, preference, rows=2, steps=40, seed=1):
            reader = Sounding()
            for length in range(len(row)):
                judged = grammar(torch.tensor([[BOS, *row[:length]]]), torch.zeros(1, tokenizer.vocab_size))[0] == 0
                assert not (judged[EOS] and not reader.may_end())
                for index in judged.nonzero().flatten().tolist():
                    if index > EOS:
                        assert copy.deepcopy(reader).read(expand(tokenizer, index)), (row[:length], index)
                assert reader.read(expand(tokenizer, row[length]))
            ends += len(row) < 40
    assert ends


def test_whatever_sounds_may_end_and_whatever_is_silent_may_begin(tokenizer: MusicTokenizer) -> None:
    grammar = MidiLikeGrammar(tokenizer)
    names = ["Program_40", "NoteOn_60", "Velocity_63", "TimeShift_1.0.12"]
    ids = [tokenizer.vocab[name] for name in names]
    judged = grammar(torch.tensor([[BOS, *ids]]), torch.zeros(1, tokenizer.vocab_size))[0] == 0
    allowed = {name for name, index in tokenizer.vocab.items() if judged[index]}
    assert {name for name in allowed if name.startswith("NoteOff")} == {"NoteOff_60"}
    assert {name for name in allowed if name.startswith("NoteOn")} == {f"NoteOn_{i}" for i in range(128)} - {
        "NoteOn_60"
    }
    assert not {name for name in allowed if name.startswith(("Drum", "EOS"))}
    # At its own onset it may not end.
    judged = grammar(torch.tensor([[BOS, *ids[:3]]]), torch.zeros(1, tokenizer.vocab_size))[0] == 0
    assert not judged[tokenizer.vocab["NoteOff_60"]]
    judged = grammar(torch.tensor([[BOS, *ids, tokenizer.vocab["NoteOff_60"]]]), torch.zeros(1, tokenizer.vocab_size))[
        0
    ]
    assert judged[EOS] == 0


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), kind=st.sampled_from(KINDS), tiny=st.booleans())
@pytest.mark.parametrize("trained", [False, True])
def test_samples_are_music(trained: bool, seed: int, kind: str, tiny: bool, scores: list[ScoreTick]) -> None:
    # With two drums and one voice, there is often no pitch left that may begin.
    options = {"pitch_range": (60, 62), "drums_pitch_range": (60, 61)} if tiny else {}
    processor = MidiProcessor(_cached(trained, scores, options), programs=sorted(PROGRAMS), voices=1 if tiny else None)
    tokenizer = processor.midi_tokenizer
    for row in sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=2, steps=40, seed=seed):
        assert_music(processor, row, PROGRAMS)
        assert processor.decode(row[:MAX_SILENT_TOKENS]).note_num()


_CACHE: dict[tuple[bool, str], MusicTokenizer] = {}


def _cached(trained: bool, scores: list[ScoreTick], options: dict[str, Any]) -> MusicTokenizer:
    key = trained, str(options)
    if key not in _CACHE:
        _CACHE[key] = build(trained, scores, **options)
    return _CACHE[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"program_changes": False},
        {"use_velocities": False, "use_rests": True},
        {"use_pitchdrum_tokens": False, "use_time_signatures": False},
        {"use_note_duration_programs": list(range(128))},
        {"use_note_duration_programs": []},
        {"use_sustain_pedals": True, "use_pitch_bends": True, "use_tempos": False},
        {"programs": [-1, 40], "use_key_signatures": True, "use_chords": True},
    ],
)
def test_options_are_honoured(options: dict[str, Any], scores: list[ScoreTick]) -> None:
    for trained in (False, True):
        tokenizer = build(trained, scores, **options)
        processor = MidiProcessor(tokenizer, programs=sorted(PROGRAMS))
        for kind in ("none", "NoteOff", "Program", "EOS"):
            for row in sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=2, steps=30):
                assert_music(processor, row, PROGRAMS)
        if "programs" not in options:
            assert_allowed(tokenizer, scores[0])


@pytest.mark.slow
def test_real_music_is_always_allowed(tokenizer: MusicTokenizer, scores: list[ScoreTick]) -> None:
    for score in scores[:2]:
        assert_allowed(tokenizer, score)


def test_a_prompt_goes_on_with_its_instruments(tokenizer: MusicTokenizer) -> None:
    prompt = [BOS, *merge_ids(tokenizer, base_ids(tokenizer, make_score(3, bars=2, programs=(0, 40), drums=False)))]
    processor = MidiProcessor(tokenizer, programs=[73])
    grammar = processor.grammar(prompt_length=len(prompt))
    size = tokenizer.vocab_size
    for row in sample(tokenizer, grammar, torch.zeros(size), rows=4, steps=30, prefix=prompt):
        assert_music(processor, row, {0, 40})
        assert processor.decode(row).note_num() > processor.decode(prompt).note_num()


def test_reordered_and_cut_batches_are_judged_as_if_read_from_the_start(tokenizer: MusicTokenizer) -> None:
    size = tokenizer.vocab_size
    carried = MidiLikeGrammar(tokenizer)
    rows = sample(tokenizer, carried, torch.zeros(size), rows=6, steps=20, seed=4)
    ids = torch.tensor([[BOS, *row] for row in rows if len(row) == 20])
    generator = torch.Generator().manual_seed(0)
    for length in [3, 4, 5, 9, 9, 12, 20, 6]:
        prefixes = ids[torch.randint(len(ids), (1 + length % 4,), generator=generator), :length]
        logits = torch.zeros(len(prefixes), size)
        assert torch.equal(carried(prefixes, logits), MidiLikeGrammar(tokenizer)(prefixes, logits))
    packed = torch.cat([ids[:1], torch.tensor([[EOS, BOS]]), ids[1:2, 1:8]], dim=1)
    alone = MidiLikeGrammar(tokenizer)(ids[1:2, :8], torch.zeros(1, size))
    assert torch.equal(MidiLikeGrammar(tokenizer)(packed, torch.zeros(1, size)), alone)


def test_notes_that_ids_leave_open_are_ended() -> None:
    tokenizer = build_tokenizer("MIDILike")
    names = ["Program_40", "NoteOn_60", "Velocity_63", "TimeShift_1.0.12", "NoteOn_62", "Velocity_63", "NoteOn_64"]
    ids = [tokenizer.vocab[name] for name in names]
    ended = tokenizer._ids_to_tokens(end_notes(tokenizer, ids))
    assert ended[6:] == ["Program_40", "NoteOff_60", "TimeShift_0.1.12", "Program_40", "NoteOff_62"]
    score = MidiProcessor(tokenizer).decode([BOS, *ids, PAD])
    found = [(note.pitch, note.time / score.tpq, note.duration / score.tpq) for note in score.tracks[0].notes]
    assert found == [(60, 0, 1), (62, 1, 1 / 12)]
    # No number of another token becomes a velocity.
    other = [tokenizer.vocab[name] for name in ("NoteOn_62", "Program_-1", "NoteOn_70", "NoteOn_0")]
    assert tokenizer._ids_to_tokens(end_notes(tokenizer, [*other, *ids[:4]]))[:3] == ["Program_-1", *names[:2]]
    done = [*ids[:4], tokenizer.vocab["NoteOff_60"]]
    assert end_notes(tokenizer, done) == done
