"""The grammar under MidiTok's options: pedals, bends, chords, rests, keys, and what notes may lack."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from grammar_support import BOS, EOS, assert_allowed, assert_music, expand, prefer, sample
from miditok import MusicTokenizer
from symusic import ControlChange, KeySignature, Pedal, PitchBend
from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.tokenization.grammar import MAX_SILENT_EFFECTS, MAX_SILENT_TOKENS
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from support import make_score

PROGRAMS = {-1, 40}
EFFECTS: dict[str, Any] = {
    "use_sustain_pedals": True,
    "use_pitch_bends": True,
    "use_control_changes": True,
    "control_change_numbers": [11],  # MidiTok writes pedals only where this leaves out number 64
    "use_chords": True,
    "use_key_signatures": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "effects": EFFECTS,
    "effects of programs before each": {**EFFECTS, "program_changes": False},
    "drums as pitches": {"use_pitchdrum_tokens": False},
    "no durations": {"use_note_duration_programs": [], "use_velocities": False},
    "two programs": {"programs": [-1, 40], "use_time_signatures": False, "use_tempos": False},
    "several resolutions": {"beat_res": {(0, 1): 24, (1, 4): 12, (4, 8): 2}},
}
RESTS: dict[str, dict[str, Any]] = {
    "rests": {"use_rests": True},
    "rests without meters": {"use_rests": True, "use_time_signatures": False, "use_tempos": False},
    "rests and effects": {"use_rests": True, **EFFECTS},
    "merges over bar lines": {"use_rests": True, "encode_ids_split": "no"},
}
OF_BEAT: dict[str, dict[str, Any]] = {
    "no velocities": {"use_velocities": False, "use_tempos": False},
    "keys": {"use_key_signatures": True, "encode_ids_split": "no"},
}
CASES = [
    *((name, case) for name in ("REMI", "TSD") for case in OPTIONS),
    ("Structured", "no durations"),
    *(("MMM", case) for case in OPTIONS if not case.startswith("effects")),
    *((name, case) for name in ("REMI", "TSD") for case in RESTS),
    ("BEAT", "drums as pitches"),
    ("BEAT", "no velocities"),
    ("BEAT", "keys"),
]


@pytest.fixture(scope="module")
def rich() -> list[ScoreTick]:
    """Scores with pedals, bends, control changes and keys."""
    return [_rich(seed) for seed in range(12)]


def _rich(seed: int) -> ScoreTick:
    score = make_score(seed, bars=4)
    first = min(note.time for track in score.tracks for note in track.notes)  # it comes within 16 base tokens
    for track in score.tracks:
        for time in range(first, 4000, 960):
            track.controls.append(ControlChange(time + 40, 11, 90))
            if not track.is_drum:
                track.pedals.append(Pedal(time + 80, 400))
                track.pitch_bends.append(PitchBend(time + 120, 4000))
    score.key_signatures.append(KeySignature(0, 2, 0))
    return score


def _build(name: str, case: str, trained: bool, scores: list[ScoreTick]) -> MusicTokenizer:
    options = (OPTIONS | RESTS | OF_BEAT)[case]
    if name == "TSD":  # it has no bars to split at
        options = {key: value for key, value in options.items() if key != "encode_ids_split"}
    if name == "Structured":
        options = {key: value for key, value in options.items() if key != "program_changes"}
    tokenizer = build_tokenizer(name, **options)
    if trained:
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 300)
    return tokenizer


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "BPE"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_samples_are_music(name: str, case: str, trained: bool, rich: list[ScoreTick]) -> None:
    tokenizer = _build(name, case, trained, rich)
    processor = MidiProcessor(tokenizer, programs=sorted(PROGRAMS), voices=2)
    preferred = ["none", "Bar", "TimeShift", "Program", "Pitch", "EOS"]
    preferred += ["Pedal", "PedalOff", "PitchBend", "ControlChange", "Chord", "KeySig"] if case in OPTIONS else []
    preferred += ["Rest"] if case in RESTS else ["Track", "Beat"]
    for seed, kind in enumerate(preferred):
        grammar = processor.grammar()
        for row in sample(tokenizer, grammar, prefer(tokenizer, kind), rows=1, steps=30, seed=seed):
            assert_music(processor, row, PROGRAMS)
            tokens = [token for index in row for token in expand(tokenizer, index)]
            assert processor.decode(_ids(tokenizer, tokens[:MAX_SILENT_TOKENS])).note_num()


def _ids(tokenizer: MusicTokenizer, tokens: list[str]) -> list[int]:
    return [tokenizer.vocab[token] for token in tokens]


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "BPE"])
@pytest.mark.parametrize(("name", "case"), [pair for pair in CASES if pair[1] != "two programs"])
def test_real_music_is_always_allowed(name: str, case: str, trained: bool, rich: list[ScoreTick]) -> None:
    tokenizer = _build(name, case, trained, rich)
    for score in rich[:2]:
        assert_allowed(tokenizer, score)


@pytest.mark.parametrize("name", ["REMI", "TSD"])
def test_effects_come_in_numbers_but_not_without_end(name: str, rich: list[ScoreTick]) -> None:
    tokenizer = _build(name, "effects", False, rich)
    # One voice: at the onset of the first note, no other may begin, however long the model says pedals.
    grammar = MidiProcessor(tokenizer, programs=[40], voices=1).grammar()
    for row in sample(tokenizer, grammar, prefer(tokenizer, "Pedal"), rows=2, steps=2 * MAX_SILENT_EFFECTS):
        kinds = [token.split("_")[0] for index in row for token in expand(tokenizer, index)]
        notes = [-1, *(index for index, kind in enumerate(kinds) if kind == "Duration")]
        assert notes[1] < MAX_SILENT_TOKENS
        gaps = [after - before for before, after in pairwise(notes)]
        assert MAX_SILENT_TOKENS < max(gaps) <= MAX_SILENT_EFFECTS


@pytest.mark.parametrize("name", ["REMI", "TSD"])
def test_a_piece_ends_after_an_effect_only_if_it_has_a_note(name: str, rich: list[ScoreTick]) -> None:
    tokenizer = _build(name, "effects", False, rich)
    grammar = MidiProcessor(tokenizer).grammar()
    time = ["Bar_None", "TimeSig_4/4", "Position_0"] if name == "REMI" else []
    for note, expected in (([], False), (["Program_40", "Pitch_60", "Velocity_63", "Duration_1.0.12"], True)):
        ids = torch.tensor([[BOS, *_ids(tokenizer, [*time, *note, "Pedal_40"])]])
        assert bool(grammar(ids, torch.zeros(1, tokenizer.vocab_size))[0, EOS] == 0) == expected


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "BPE"])
def test_without_bar_tokens_meters_change_at_bar_lines(trained: bool, rich: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer("TSD")
    if trained:
        train_tokenizer(tokenizer, rich, len(tokenizer.vocab) + 300)
    grammar = MidiProcessor(tokenizer, programs=[40]).grammar()
    changes = 0
    for row in sample(tokenizer, grammar, prefer(tokenizer, "TimeSig"), rows=8, steps=80):
        place, length = 0, 48
        for token in (token for index in row for token in expand(tokenizer, index)):
            kind, value = token.split("_")
            if kind == "TimeShift":
                beats, part, parts = map(int, value.split("."))
                place += beats * 12 + part * 12 // parts
            elif kind == "TimeSig":
                assert place % length == 0
                changes += place > 0
                place, length = 0, 12 * int(value.split("/")[0])
    assert changes


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("REMI", {"use_rests": True, "use_note_duration_programs": []}, "use_rests"),
        ("REMI", {"use_rests": True, "beat_res": {(0, 4): 12, (4, 12): 5}}, "beat_res"),
        ("MMM", {"base_tokenizer": "TSD"}, "base_tokenizer"),
        ("MMM", {"use_rests": True}, "use_rests"),
        ("MMM", {"use_chords": True}, "use_chords"),
        ("MMM", {"use_sustain_pedals": True, "use_pitch_bends": True}, "use_pitch_bends"),
        ("TSD", {"use_sustain_pedals": True, "sustain_pedal_duration": True}, "sustain_pedal_duration"),
        ("TSD", {"use_note_duration_programs": [0]}, "use_note_duration_programs"),
        ("Structured", {"use_pitchdrum_tokens": False}, "use_pitchdrum_tokens"),
        ("PerTok", {"use_chords": True}, "use_chords"),
        ("PerTok", {"use_position_toks": True}, "use_position_toks"),
    ],
)
def test_options_without_rules_are_refused(name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MidiProcessor(build_tokenizer(name, **options)).grammar()
