import json
import subprocess
import sys
from pathlib import Path

import pytest
from miditok import MusicTokenizer
from symusic import Note, Score, Tempo, TimeSignature, Track
from transformers import MambaConfig

from midimamba.errors import InputError
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import (
    base_ids,
    build_tokenizer,
    expand_ids,
    fast_tokenizer,
    load_tokenizer,
    merge_ids,
    train_tokenizer,
)

VOCAB_SIZE = 900


@pytest.fixture(scope="module", params=["REMI", "TSD"])
def tokenization(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["untrained", "trained"])
def tokenizer(request: pytest.FixtureRequest, tokenization: str, scores) -> MusicTokenizer:
    tokenizer = build_tokenizer(tokenization)
    if request.param == "trained":
        train_tokenizer(tokenizer, scores[:20], VOCAB_SIZE)
        assert tokenizer.vocab_size == VOCAB_SIZE
    return tokenizer


def test_special_tokens_come_first_and_agree(tokenizer: MusicTokenizer) -> None:
    fast = fast_tokenizer(tokenizer)
    assert tokenizer.special_tokens == ["PAD_None", "BOS_None", "EOS_None"]
    assert (fast.pad_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2)
    assert len(fast) == tokenizer.vocab_size


def test_text_has_miditoks_ids_and_decodes_to_the_same_text(tokenizer: MusicTokenizer, scores) -> None:
    fast = fast_tokenizer(tokenizer)
    for score in scores:
        text = " ".join(tokenizer.encode(score, encode_ids=False).tokens)
        ids = tokenizer.encode(score).ids
        assert fast(text, add_special_tokens=False)["input_ids"] == ids
        assert fast.decode(ids) == text
        assert expand_ids(tokenizer, ids) == base_ids(tokenizer, score)
        assert merge_ids(tokenizer, base_ids(tokenizer, score)) == ids


def test_every_base_token_is_found_alone_and_beside_special_tokens(tokenizer: MusicTokenizer) -> None:
    fast = fast_tokenizer(tokenizer)
    for token, index in tokenizer.vocab.items():
        assert fast(token)["input_ids"] == [index]
        assert fast(f"BOS_None {token} EOS_None")["input_ids"] == ([1, index, 2])
    assert fast.decode([1, 5, 2]) == f"BOS_None {tokenizer[5]} EOS_None"
    assert fast.decode([1, 5, 2], skip_special_tokens=True) == tokenizer[5]


def test_text_that_is_no_token_means_nothing(tokenizer: MusicTokenizer) -> None:
    # MidiTok's own symbols are plain characters from "!" on: they must not be read as music.
    assert fast_tokenizer(tokenizer)('! " hello # ÿ')["input_ids"] == []


def test_training_shortens_and_is_deterministic(tokenization: str, scores) -> None:
    first, second = build_tokenizer(tokenization), build_tokenizer(tokenization)
    train_tokenizer(first, scores, VOCAB_SIZE)
    train_tokenizer(second, scores, VOCAB_SIZE)
    base = base_ids(first, scores[0])
    assert merge_ids(first, base) == merge_ids(second, base)
    assert len(merge_ids(first, base)) < len(base)


def test_no_merge_crosses_a_bar_line(scores) -> None:
    tokenizer = build_tokenizer()
    train_tokenizer(tokenizer, scores, VOCAB_SIZE)
    for index in range(3, tokenizer.vocab_size):
        tokens = tokenizer._ids_to_tokens(expand_ids(tokenizer, [index]))
        assert "Bar_None" not in tokens[1:]


def test_a_saved_tokenizer_is_the_same(tokenizer: MusicTokenizer, scores, tmp_path: Path) -> None:
    MidiProcessor(tokenizer).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded == tokenizer
    assert all(loaded.encode(score).ids == tokenizer.encode(score).ids for score in scores[:5])


def test_plain_auto_tokenizer_loads_it_beside_a_mamba_config(scores, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    train_tokenizer(tokenizer, scores[:10], VOCAB_SIZE)
    MidiProcessor(tokenizer).save_pretrained(tmp_path)
    MambaConfig(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    text = " ".join(tokenizer.encode(scores[0], encode_ids=False).tokens)
    script = (
        "import json, sys\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer(sys.argv[2], add_special_tokens=False)['input_ids']\n"
        "special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]\n"
        "assert not any(name.startswith(('midimamba', 'miditok')) for name in sys.modules)\n"
        "print(json.dumps([ids, tokenizer.decode(ids), special, tokenizer.padding_side]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), text], capture_output=True, text=True, check=True
    )
    expected = [tokenizer.encode(scores[0]).ids, text, [0, 1, 2], "left"]
    assert json.loads(run.stdout.splitlines()[-1]) == expected


def test_a_score_on_the_grid_survives_a_round_trip(tokenizer: MusicTokenizer, scores, notes) -> None:
    for score in scores:
        assert notes(tokenizer.decode(tokenizer.encode(score))) == notes(score)


def test_the_lowest_and_highest_notes_and_drums_are_kept(tokenization: str, notes) -> None:
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
    score.tempos.extend([Tempo(0, 120.0), Tempo(480 * 40, 60.0)])
    for tokenization in ("REMI", "TSD"):
        tokenizer = build_tokenizer(tokenization)
        assert tokenizer[base_ids(tokenizer, score)[-1]].startswith("Duration_")


def test_options_reach_miditok_and_unknown_ones_are_refused() -> None:
    assert not build_tokenizer(use_velocities=False).config.use_velocities
    with pytest.raises(InputError, match="use_rests"):
        build_tokenizer(use_rests=True)
    with pytest.raises(InputError, match="CPWord"):
        build_tokenizer("CPWord")


def test_a_vocabulary_without_room_to_learn_is_refused(tokenization: str, scores) -> None:
    tokenizer = build_tokenizer(tokenization)
    with pytest.raises(InputError, match="nothing to learn"):
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab))


def test_a_folder_without_miditok_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"miditok\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "miditok.json").write_text('{"tokenization": "Octuple"}')
    with pytest.raises(InputError, match="Octuple"):
        load_tokenizer(str(tmp_path))
