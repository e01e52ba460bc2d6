import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from miditok import MusicTokenizer, TokSequence
from symusic import ControlChange, KeySignature, Note, Score, Tempo, TimeSignature, Track
from symusic.core import ControlChangeTickList, NoteTickList, ScoreTick, TempoTickList, TimeSignatureTickList
from transformers import MambaConfig

from midimamba.errors import InputError
from midimamba.tokenization.choices import ONE_STREAM, SUBWORD_MODELS
from midimamba.tokenization.controls import control_token, is_control
from midimamba.tokenization.ingest import MidiRefusedError, read_score
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import (
    base_ids,
    build_tokenizer,
    expand_ids,
    fast_tokenizer,
    load_tokenizer,
    merge_ids,
    normalize_score,
    train_tokenizer,
)
from support import Notes, make_score

VOCAB_SIZE = 900
MODELS = ("untrained", "BPE", "Unigram")
# One begins another, one holds the name of a base token.
CONTROL_TOKENS = [
    control_token(*pair)
    for pair in (("composer", "Bach"), ("composer", "Bach, J. S."), ("key", "C-major"), ("label", "Bar_None"))
]


@pytest.fixture(scope="module", params=ONE_STREAM)
def tokenization(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request: pytest.FixtureRequest, tokenization: str, scores: list[ScoreTick]) -> MusicTokenizer:
    return make_tokenizer(tokenization, request.param, scores)


def make_tokenizer(tokenization: str, model: str, scores: list[ScoreTick], **options: Any) -> MusicTokenizer:
    tokenizer = build_tokenizer(tokenization, **options)
    if model != "untrained":
        size = len(tokenizer.vocab) + 200
        train_tokenizer(tokenizer, scores[:20], size, model)
        assert tokenizer.vocab_size == size
    return tokenizer


def encode(tokenizer: MusicTokenizer, score: ScoreTick) -> tuple[str, list[int]]:
    """MidiTok's own text and ids. Its PerTok changes a score that has its resolution already, hence the copy."""
    text = " ".join(tokenizer.encode(score.copy(), encode_ids=False).tokens)
    return text, tokenizer.encode(score.copy()).ids


def test_special_tokens_come_first_and_agree(tokenizer: MusicTokenizer) -> None:
    fast = fast_tokenizer(tokenizer)
    assert tokenizer.special_tokens[:3] == ["PAD_None", "BOS_None", "EOS_None"]
    assert (fast.pad_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2)
    assert len(fast) == tokenizer.vocab_size


def test_text_has_miditoks_ids_and_decodes_to_the_same_text(
    tokenizer: MusicTokenizer, random_score: Callable[..., ScoreTick]
) -> None:
    fast = fast_tokenizer(tokenizer)
    for seed in range(100, 130):
        score = normalize_score(tokenizer, random_score(seed, bars=seed % 7 + 1, drums=bool(seed % 3)))
        text, ids = encode(tokenizer, score)
        assert fast(text, add_special_tokens=False)["input_ids"] == ids
        assert fast.decode(ids) == text
        assert merge_ids(tokenizer, base_ids(tokenizer, score)) == ids
        assert expand_ids(tokenizer, ids) == base_ids(tokenizer, score)


def test_controls_shift_the_base_ids_and_change_nothing_else(tokenization: str, scores: list[ScoreTick]) -> None:
    shift = len(CONTROL_TOKENS)
    plain, controlled = (build_tokenizer(tokenization, controls=tokens) for tokens in ([], CONTROL_TOKENS))
    vocab = [token for token in controlled.vocab if token not in CONTROL_TOKENS]
    assert vocab == list(plain.vocab)
    assert list(controlled.vocab)[3 : 3 + shift] == CONTROL_TOKENS
    for train in (False, True):
        if train:
            for tokenizer in (plain, controlled):
                train_tokenizer(tokenizer, scores[:20], len(tokenizer.vocab) + 200)
        for score in scores[20:25]:
            ids = base_ids(plain, score)
            assert base_ids(controlled, score) == [index + shift for index in ids]
            merged = merge_ids(plain, ids)
            assert merge_ids(controlled, base_ids(controlled, score)) == [index + shift for index in merged]


@pytest.mark.parametrize("model", MODELS)
def test_controls_before_the_music_are_text_and_ids(tokenization: str, model: str, scores: list[ScoreTick]) -> None:
    tokenizer = make_tokenizer(tokenization, model, scores, controls=CONTROL_TOKENS)
    fast = fast_tokenizer(tokenizer)
    assert len(fast) == tokenizer.vocab_size
    assert sorted(fast.all_special_ids) == list(range(7))
    for index in range(len(tokenizer.vocab), tokenizer.vocab_size):
        assert not any(map(is_control, tokenizer._ids_to_tokens(expand_ids(tokenizer, [index]))))
    for score in scores[20:25]:
        music, ids = encode(tokenizer, normalize_score(tokenizer, score))
        for chosen in ([3, 5], [4], [3, 4, 5, 6]):
            text = " ".join(["BOS_None", *(tokenizer[index] for index in chosen), music, "EOS_None"])
            assert fast(text)["input_ids"] == [1, *chosen, *ids, 2]
            assert fast.decode([1, *chosen, *ids, 2]) == text
            assert fast.decode([1, *chosen, *ids, 2], skip_special_tokens=True) == music
            assert expand_ids(tokenizer, [1, *chosen, *ids]) == [1, *chosen, *base_ids(tokenizer, score)]


@pytest.mark.parametrize("model", MODELS)
def test_miditok_alone_reads_a_tokenizer_with_controls(
    tokenization: str, model: str, scores: list[ScoreTick], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(tokenization, model, scores, controls=CONTROL_TOKENS)
    MidiProcessor(tokenizer).save_pretrained(tmp_path)
    alone = MusicTokenizer.from_pretrained(tmp_path, filename="miditok.json")
    ids = MidiProcessor(tokenizer).encode(scores[0], controls={"key": "C-major"})
    for loaded in (alone, load_tokenizer(str(tmp_path))):
        assert loaded.vocab == tokenizer.vocab
        assert loaded.special_tokens == tokenizer.special_tokens
        assert [1, 5, *encode(loaded, normalize_score(loaded, read_score(scores[0])))[1]] == ids


def test_base_ids_are_miditoks_ids_of_the_normalised_score(
    tokenization: str, random_score: Callable[..., ScoreTick]
) -> None:
    tokenizer = build_tokenizer(tokenization)
    for seed in range(20):
        score = random_score(seed)
        score.time_signatures.append(TimeSignature(score.end() // 2, 3, 2))
        score.tempos.append(Tempo(score.end() + 4800, 70.0))
        normalised = normalize_score(tokenizer, score)
        ids = base_ids(tokenizer, score)
        assert ids == tokenizer.encode(normalised.copy(), encode_ids=False).ids
        if tokenization not in ("BEAT", "PerTok"):  # one velocity per beat; a tempo comes with the note before it
            assert base_ids(tokenizer, MidiProcessor(tokenizer).decode(ids)) == ids


@pytest.mark.parametrize("base", ["REMI", "TSD"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", ["bar", "no"])
def test_mmm_over_either_tokenization_is_identical(base: str, model: str, split: str, scores: list[ScoreTick]) -> None:
    if (base, split) == ("TSD", "bar"):
        with pytest.raises(InputError, match="no tokens to split at"):
            build_tokenizer("MMM", base_tokenizer=base, encode_ids_split=split)
        return
    tokenizer = make_tokenizer("MMM", model, scores, base_tokenizer=base, encode_ids_split=split)
    fast = fast_tokenizer(tokenizer)
    for score in scores[20:30]:
        text, ids = encode(tokenizer, normalize_score(tokenizer, score))
        assert fast(text)["input_ids"] == merge_ids(tokenizer, base_ids(tokenizer, score)) == ids
        assert fast.decode(ids) == text


@pytest.mark.parametrize("name", ["REMI", "TSD", "MIDILike"])
def test_a_key_signature_needs_no_piano(name: str) -> None:
    """MidiTok writes program 0 before it, which it cannot where the tokenizer lacks that program."""
    tokenizer = build_tokenizer(name, programs=[-1, 40], use_key_signatures=True)
    score = make_score(0, bars=2, programs=(40,))
    score.key_signatures.append(KeySignature(0, 2, 0))
    tokens = tokenizer._ids_to_tokens(base_ids(tokenizer, score))
    assert tokens.count("KeySig_2:0") == 1
    before = tokens[: tokens.index("KeySig_2:0")]
    assert not [token for token in before if token.startswith("Program")]
    assert {token for token in tokens if token.startswith("Program")} == {"Program_-1", "Program_40"}


@pytest.mark.parametrize(
    "options",
    [
        {"use_chords": True, "chord_tokens_with_root_note": True, "chord_unknown": (2, 6)},
        {"use_sustain_pedals": True, "use_key_signatures": True, "use_rests": True},
        # More tokens than Unicode's smaller private area has characters.
        {"use_control_changes": True, "control_change_numbers": range(128), "control_change_n_bins": 128},
    ],
)
def test_options_that_add_tokens_keep_the_ids_identical(options: dict[str, Any], scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer("REMI", **options)
    fast = fast_tokenizer(tokenizer)
    score = normalize_score(tokenizer, scores[0])
    score.tracks[0].controls.extend(
        ControlChangeTickList([ControlChange(480 * beat, 7, 5 * beat) for beat in range(8)])
    )
    text, ids = encode(tokenizer, score)
    assert fast(text)["input_ids"] == base_ids(tokenizer, score) == ids
    assert fast.decode(ids) == text


def test_every_base_token_is_found_alone_and_beside_special_tokens(tokenizer: MusicTokenizer) -> None:
    fast = fast_tokenizer(tokenizer)
    for token, index in tokenizer.vocab.items():
        assert fast(token)["input_ids"] == [index]
        assert fast(f"BOS_None {token} EOS_None")["input_ids"] == ([1, index, 2])
    assert fast.decode([1, 5, 2]) == f"BOS_None {tokenizer[5]} EOS_None"
    assert fast.decode([1, 5, 2], skip_special_tokens=True) == tokenizer[5]


def test_text_that_is_not_a_token_is_dropped(tokenizer: MusicTokenizer) -> None:
    # MidiTok's own symbols are plain characters from "!" on: they must not be read as music.
    assert fast_tokenizer(tokenizer)('! " hello # ÿ')["input_ids"] == []


@pytest.mark.parametrize("model", SUBWORD_MODELS)
def test_training_shortens_and_is_deterministic(tokenization: str, model: str, scores: list[ScoreTick]) -> None:
    first, second = (make_tokenizer(tokenization, model, scores) for _ in range(2))
    assert first._model.to_str() == second._model.to_str()
    base = base_ids(first, scores[0])
    assert len(merge_ids(first, base)) < len(base)


@pytest.mark.parametrize("model", SUBWORD_MODELS)
@pytest.mark.parametrize("name", ["REMI", "MMM", "BEAT"])
def test_no_subword_crosses_a_bar_line_or_a_track(name: str, model: str, scores: list[ScoreTick]) -> None:
    tokenizer = make_tokenizer(name, model, scores)
    for index in range(3, tokenizer.vocab_size):
        tokens = tokenizer._ids_to_tokens(expand_ids(tokenizer, [index]))
        assert not {"Bar_None", "Track_Start"} & set(tokens[1:])


@pytest.mark.parametrize("model", SUBWORD_MODELS)
def test_base_tokens_keep_their_ids(tokenization: str, model: str, scores: list[ScoreTick]) -> None:
    tokenizer = make_tokenizer(tokenization, model, scores)
    base = list(range(len(tokenizer.vocab)))
    assert expand_ids(tokenizer, base) == base


def test_other_subword_models_are_refused(scores: list[ScoreTick]) -> None:
    with pytest.raises(InputError, match=r"WordPiece.*loses music.*BPE or Unigram"):
        train_tokenizer(build_tokenizer(), scores, VOCAB_SIZE, "WordPiece")
    with pytest.raises(InputError, match="BPE or Unigram"):
        train_tokenizer(build_tokenizer(), scores, VOCAB_SIZE, "bpe")


def test_a_saved_tokenizer_is_the_same(tokenizer: MusicTokenizer, scores: list[ScoreTick], tmp_path: Path) -> None:
    MidiProcessor(tokenizer).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.config == tokenizer.config
    assert all(encode(loaded, score) == encode(tokenizer, score) for score in scores[:5])
    assert all(MidiProcessor(loaded).encode(score) == MidiProcessor(tokenizer).encode(score) for score in scores[:5])


@pytest.mark.slow
def test_plain_auto_tokenizer_loads_it_beside_a_mamba_config(scores: list[ScoreTick], tmp_path: Path) -> None:
    expected = {}
    for tokenization in ONE_STREAM:
        for model in MODELS:
            tokenizer = make_tokenizer(tokenization, model, scores, controls=CONTROL_TOKENS)
            folder = tmp_path / f"{tokenization}-{model}"
            MidiProcessor(tokenizer).save_pretrained(folder)
            MambaConfig(vocab_size=tokenizer.vocab_size).save_pretrained(folder)
            text, ids = encode(tokenizer, normalize_score(tokenizer, scores[30]))
            text, ids = f"{CONTROL_TOKENS[1]} {text}", [4, *ids]
            (folder / "text").write_text(text)
            expected[folder.name] = [ids, text, [0, 1, 2], "left"]
    script = (
        "import json, pathlib, sys\n"
        "from transformers import AutoTokenizer\n"
        "found = {}\n"
        "for folder in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "    ids = tokenizer((folder / 'text').read_text(), add_special_tokens=False)['input_ids']\n"
        "    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]\n"
        "    found[folder.name] = [ids, tokenizer.decode(ids), special, tokenizer.padding_side]\n"
        "assert not any(name.startswith(('midimamba', 'miditok')) for name in sys.modules)\n"
        "print(json.dumps(found))\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("tokenization", ["REMI", "TSD", "Structured", "PerTok", "MMM"])
@pytest.mark.parametrize("model", MODELS)
def test_a_score_on_the_grid_survives_a_round_trip(
    tokenization: str, model: str, scores: list[ScoreTick], notes: Notes
) -> None:
    processor = MidiProcessor(make_tokenizer(tokenization, model, scores))
    for score in scores:
        assert notes(processor.decode(processor.encode(score))) == notes(score)


def test_velocities_survive_to_the_nearest_bin(tokenization: str, scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer(tokenization)
    score = without_overlaps(scores[1])
    found = notes_with_velocity(tokenizer.decode(base_sequence(tokenizer, score)))
    bins = [int(token.split("_")[1]) for token in tokenizer.vocab if token.startswith("Velocity")]
    for note, velocity in notes_with_velocity(score).items():
        assert min(bins, key=lambda value: abs(value - velocity)) == pytest.approx(found[note], abs=4), note


def test_a_note_ends_where_its_pitch_is_struck_again_and_its_end_is_passed_on(notes: Notes) -> None:
    score = Score(480)
    score.tracks.append(Track(notes=[Note(0, 1920, 60, 64), Note(480, 480, 60, 64), Note(480, 480, 64, 64)]))
    tokenizer = build_tokenizer("MIDILike")
    decoded = notes(tokenizer.decode(base_sequence(tokenizer, score)))
    assert decoded == [(0, False, 60, 0, 12), (0, False, 60, 12, 36), (0, False, 64, 12, 12)]


def test_beat_keeps_the_roll_of_every_beat(scores: list[ScoreTick], notes: Notes) -> None:
    tokenizer = build_tokenizer("BEAT")
    for score in scores:
        expected = tokenizer.preprocess_score(score)
        assert notes(tokenizer.decode(base_sequence(tokenizer, score))) == notes(expected)
        # A pitch that is struck again ends, so a note may be lost to one of the same pitch in the same quarter beat.
        assert expected.note_num() >= 0.95 * score.note_num()


def test_structured_refuses_a_pause_it_cannot_write() -> None:
    score = Score(480)
    score.tracks.append(Track(notes=[Note(0, 480, 60, 64), Note(32 * 480, 480, 60, 64)]))
    tokenizer = build_tokenizer("Structured")
    assert tokenizer.decode(base_sequence(tokenizer, score)).tracks[0].notes[1].time == 32 * 12
    score.tracks[0].notes[1].time += 40
    with pytest.raises(MidiRefusedError, match="32 quarter notes"):
        base_ids(tokenizer, score)


def without_overlaps(score: ScoreTick) -> ScoreTick:
    """The score with one note for each pitch, instrument and bar of four beats, on the grid of quarter beats."""
    score = score.copy()
    for track in score.tracks:
        first = {(note.pitch, note.time // 1920): note for note in track.notes}
        track.notes = NoteTickList(
            Note(bar * 1920 + note.pitch % 8 * 120, 480, pitch, note.velocity) for (pitch, bar), note in first.items()
        )
    return score


def base_sequence(tokenizer: MusicTokenizer, score: ScoreTick) -> TokSequence:
    return TokSequence(ids=base_ids(tokenizer, score))


def notes_with_velocity(score: ScoreTick) -> dict[tuple[int, bool, int, float], int]:
    return {
        (
            0 if track.is_drum else track.program,
            track.is_drum,
            note.pitch,
            note.time / score.ticks_per_quarter,
        ): note.velocity
        for track in score.tracks
        for note in track.notes
    }


def test_the_lowest_and_highest_notes_and_drums_are_kept(tokenization: str, notes: Notes) -> None:
    score = Score(480)
    extremes = [Note(0, 480, pitch, 64) for pitch in (0, 1, 126, 127)]
    score.tracks.extend([Track(program=5, notes=extremes), Track(is_drum=True, notes=extremes)])
    tokenizer = build_tokenizer(tokenization)
    assert notes(tokenizer.decode(tokenizer.encode(score))) == notes(score)


@pytest.mark.parametrize(("numerator", "bar_beats"), [(2, 4), (3, 6)])
def test_meters_of_half_notes_keep_their_bars(numerator: int, bar_beats: int) -> None:
    score = Score(480)
    score.time_signatures.append(TimeSignature(0, numerator, 2))
    score.tracks.append(Track(notes=[Note(bar * bar_beats * 480, 480, 60, 64) for bar in range(4)]))
    tokenizer = build_tokenizer()
    tokens = tokenizer._ids_to_tokens(base_ids(tokenizer, score))
    assert [token for token in tokens if token.startswith("Position")] == ["Position_0"] * 4
    assert {token for token in tokens if token.startswith("TimeSig")} == {f"TimeSig_{bar_beats}/4"}
    assert score.time_signatures[0].denominator == 2


def test_nothing_follows_the_last_note() -> None:
    score = Score(480)
    score.tracks.append(Track(notes=[Note(0, 480, 60, 64)]))
    score.tempos.extend(TempoTickList([Tempo(0, 120.0), Tempo(480 * 40, 60.0)]))
    meters = [TimeSignature(0, 4, 4), TimeSignature(0, 3, 4), TimeSignature(480, 2, 4)]
    score.time_signatures.extend(TimeSignatureTickList(meters))
    for tokenization in ("REMI", "TSD", "PerTok"):
        tokenizer = build_tokenizer(tokenization)
        tokens = tokenizer._ids_to_tokens(base_ids(tokenizer, score))
        assert tokens[-1].startswith("Duration_")
        assert "TimeSig_2/4" not in tokens


def test_options_reach_miditok() -> None:
    assert not build_tokenizer(use_velocities=False).config.use_velocities
    assert build_tokenizer("PerTok", use_position_toks=True).use_position_toks
    # As YAML and JSON write them.
    options: dict[str, Any] = {
        "beat_res": {"0_4": 8, "4_12": 4},
        "time_signature_range": {"4": [3, 4]},
        "pitch_range": [10, 110],
    }
    config = build_tokenizer(**options, drums_pitch_range=[30, 90], use_programs=True).config
    assert config.beat_res == {(0, 4): 8, (4, 12): 4}
    assert config.time_signature_range == {4: [3, 4]}


@pytest.mark.parametrize(
    ("tokenization", "options", "reason"),
    [
        ("REMI", {"use_velocitys": True}, "use_velocities"),
        ("REMI", {"base_tokenizer": "TSD"}, "REMI has no option 'base_tokenizer'"),
        ("MMM", {"base_tokenizer": "BEAT"}, "base_tokenizer"),
        ("REMI", {"special_tokens": ["PAD", "MASK"]}, "ids 0, 1 and 2"),
        ("TSD", {"use_programs": False}, "one sequence"),
        ("TSD", {"one_token_stream_for_programs": False}, "one sequence"),
        ("TSD", {"encode_ids_split": "bar"}, "no tokens to split at"),
        ("REMI", {"encode_ids_split": "beat"}, "bar or no"),
        ("REMI", {"ac_polyphony_bar": True}, "single tracks"),
        ("REMI", {"use_pitch_intervals": True}, "another pitch"),
        ("REMI", {"pitch_range": (30, 90)}, "drums"),
        ("REMI", {"pitch_range": (90, 30)}, "pitch_range"),
        ("REMI", {"beat_res": {"all": 8}}, "0_4"),
        ("TSD", {"use_rests": True, "beat_res_rest": {(0, 2): 8}}, "must divide the 12"),
        ("REMI", {"time_signature_range": {2: [3], 4: [4]}}, "half notes"),
        ("PerTok", {"use_time_signatures": True}, "bars wrongly"),
        ("PerTok", {"use_sustain_pedals": True}, "pedals"),
        ("Structured", {"use_tempos": True}, "MidiTok keeps it at False"),
        ("BEAT", {"beat_res": {(0, 4): 8}}, "MidiTok keeps it at"),
        ("ABC", {}, "choose one of REMI"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tokenization: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        build_tokenizer(tokenization, **options)


def test_a_vocabulary_without_room_to_learn_is_refused(tokenization: str, scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer(tokenization)
    with pytest.raises(InputError, match="nothing to learn"):
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab))


def test_a_folder_without_miditok_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"miditok\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "miditok.json").write_text('{"tokenization": "ABC"}')
    with pytest.raises(InputError, match="ABC"):
        load_tokenizer(str(tmp_path))
