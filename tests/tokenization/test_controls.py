"""Control tokens: what is computed of a score, and how a tokenizer holds and finds them."""

from collections.abc import Sequence

import pytest
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import NoteTickList, ScoreTick, TempoTickList, TimeSignatureTickList

from midimamba.errors import InputError
from midimamba.tokenization.choices import CONTROLS
from midimamba.tokenization.controls import INSTRUMENTS, control_ids, control_token, controls_of, describe
from midimamba.tokenization.musical_time import KEYS
from midimamba.tokenization.tokenizations import BAR
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer
from support import make_score

QUARTER = 480
MAJOR = (60, 62, 64, 65, 67, 69, 71, 72, 67, 64, 60)
MINOR = (69, 71, 72, 74, 76, 77, 80, 81, 76, 72, 69)


def melody(pitches: Sequence[int], duration: int = QUARTER, start: int = 0) -> ScoreTick:
    score = Score(QUARTER)
    notes = [Note(start + index * duration, duration, pitch, 80) for index, pitch in enumerate(pitches)]
    score.tracks.append(Track(notes=notes))
    return score


def drums(length: int = 8) -> Track:
    return Track(is_drum=True, notes=[Note(index * QUARTER, QUARTER, 38, 100) for index in range(length)])


def test_every_control_is_described_by_values_that_are_their_own_slugs() -> None:
    for seed in range(20):
        described = describe(make_score(seed))
        assert tuple(described) == CONTROLS
        for name, values in described.items():
            assert len(values) == 1 or name == "instruments"
            assert [control_token(name, value) for value in values] == [f"Control-{name}_{value}" for value in values]


def test_a_score_without_notes_has_no_controls() -> None:
    assert describe(Score(QUARTER)) == {name: [] for name in CONTROLS}


@pytest.mark.parametrize("shift", range(12))
def test_the_key_goes_along_with_a_transposition(shift: int) -> None:
    assert describe(melody([pitch + shift for pitch in MAJOR]))["key"] == [KEYS[shift]]
    assert describe(melody([pitch + shift for pitch in MINOR]))["key"] == [KEYS[12 + (9 + shift) % 12]]


def test_keys_have_their_usual_names() -> None:
    assert describe(melody(MAJOR))["key"] == ["C-major"]
    assert describe(melody(MINOR))["key"] == ["A-minor"]
    assert describe(melody([pitch + 6 for pitch in MAJOR]))["key"] == ["F#-major"]
    assert describe(melody([pitch + 1 for pitch in MINOR]))["key"] == ["Bb-minor"]
    assert len(set(KEYS)) == 24


def test_the_key_weighs_durations_and_ignores_drums() -> None:
    score = melody(MAJOR)
    expected = describe(score)
    score.tracks.append(Track(is_drum=True, notes=[Note(0, 100 * QUARTER, pitch, 80) for pitch in (42, 44, 46, 49)]))
    assert describe(score)["key"] == expected["key"]
    # Grace notes weigh little; by number they would be most of the piece, and in another key.
    score.tracks[0].notes.extend(NoteTickList([Note(0, 1, pitch + 6, 80) for pitch in MAJOR * 5]))
    assert describe(score)["key"] == expected["key"]


def test_without_pitches_or_if_all_are_alike_there_is_no_key() -> None:
    score = Score(QUARTER)
    score.tracks.append(drums())
    assert describe(score)["key"] == []
    assert describe(score)["instruments"] == ["drums"]
    assert describe(melody(range(60, 72)))["key"] == []


@pytest.mark.parametrize(
    ("tempo", "band"),
    [(59, "0-60"), (60, "60-90"), (89, "60-90"), (90, "90-120"), (119, "90-120"), (120, "120-150"), (240, "180+")],
)
def test_tempos_fall_into_bands(tempo: float, band: str) -> None:
    score = melody(MAJOR)
    score.tempos.append(Tempo(0, tempo))
    assert describe(score)["tempo"] == [band]


def test_a_tempo_of_twice_the_speed_is_another_band_and_none_is_120() -> None:
    score = melody(MAJOR)
    assert describe(score)["tempo"] == ["120-150"]
    score.tempos.append(Tempo(0, 70))
    assert describe(score)["tempo"] == ["60-90"]
    score.tempos[0].qpm = 140
    assert describe(score)["tempo"] == ["120-150"]


def test_the_mean_tempo_is_all_quarters_by_all_minutes() -> None:
    score = melody([60] * 20)
    score.tempos.extend(TempoTickList([Tempo(10 * QUARTER, 180), Tempo(0, 54)]))
    # 20 quarters in 10/54 + 10/180 minutes are 83 a minute; the mean over quarters would be 117.
    assert describe(score)["tempo"] == ["60-90"]
    score.tempos.append(Tempo(40 * QUARTER, 600))  # after the last note
    assert describe(score)["tempo"] == ["60-90"]


def test_the_meter_is_the_one_in_force_for_longest() -> None:
    score = melody([60] * 24)
    assert describe(score)["meter"] == ["4/4"]
    meters = [TimeSignature(8 * QUARTER, 3, 4), TimeSignature(17 * QUARTER, 6, 8)]
    score.time_signatures.extend(TimeSignatureTickList(meters))
    assert describe(score)["meter"] == ["3/4"]
    score.time_signatures[0].time = 11 * QUARTER
    assert describe(score)["meter"] == ["4/4"]
    score.time_signatures[0].time = 0
    score.time_signatures.append(TimeSignature(100 * QUARTER, 5, 4))
    assert describe(score)["meter"] == ["3/4"]
    # Two stretches of one meter count together.
    meters = [TimeSignature(6 * QUARTER, 2, 2), TimeSignature(12 * QUARTER, 2, 2)]
    score.time_signatures.extend(TimeSignatureTickList(meters))
    score.time_signatures.append(TimeSignature(9 * QUARTER, 3, 4))
    assert describe(score)["meter"] == ["3/4"]


@pytest.mark.parametrize(
    ("bars", "band"),
    [(1, "1-8"), (8, "1-8"), (9, "9-16"), (16, "9-16"), (17, "17-32"), (33, "33-64"), (64, "33-64"), (65, "65+")],
)
def test_bars_are_counted_to_the_last_onset(bars: int, band: str) -> None:
    # In 3/4, the last note at the very begin of the last bar and held over the next bar line.
    score = melody([60, 62], 6 * QUARTER)
    score.time_signatures.append(TimeSignature(0, 3, 4))
    score.tracks[0].notes[1].time = (bars - 1) * 3 * QUARTER
    assert describe(score)["bars"] == [band]


def test_bars_agree_with_the_bar_tokens() -> None:
    tokenizer = build_tokenizer()
    for seed in range(30):
        score = make_score(seed, bars=seed + 1)
        count = base_ids(tokenizer, score).count(tokenizer.vocab[BAR])
        (band,) = describe(score)["bars"]
        low, _, high = band.replace("+", "-").partition("-")
        assert int(low) <= count <= int(high or count)


@pytest.mark.parametrize(
    ("notes_a_quarter", "band"), [(1, "1-2"), (2, "2-4"), (3, "2-4"), (4, "4-8"), (8, "8-16"), (16, "16+")]
)
def test_density_counts_notes_per_quarter(notes_a_quarter: int, band: str) -> None:
    pitches = [60] * (8 * notes_a_quarter)
    assert describe(melody(pitches, QUARTER // notes_a_quarter))["density"] == [band]
    # Silence before the first note is not part of the music.
    assert describe(melody(pitches, QUARTER // notes_a_quarter, start=40 * QUARTER))["density"] == [band]


def test_a_slow_piece_is_sparse_and_drums_count_as_notes() -> None:
    score = melody([60, 62], 4 * QUARTER)
    assert describe(score)["density"] == ["0-1"]
    score.tracks.append(drums(8))
    assert describe(score)["density"] == ["1-2"]


def test_instruments_that_play_are_named_by_program() -> None:
    score = melody(MAJOR)
    score.tracks.append(drums())
    for program in (73, 40, 40):
        score.tracks.append(Track(program=program, notes=[Note(0, 480, 60, 80)]))
    score.tracks.append(Track(program=24))
    assert describe(score)["instruments"] == ["acoustic-grand-piano", "violin", "flute", "drums"]
    assert len(set(INSTRUMENTS)) == 128


def test_notes_without_duration_are_accepted() -> None:
    score = Score(QUARTER)
    score.tracks.append(Track(notes=[Note(0, 0, 60, 80)]))
    described = describe(score)
    assert (described["key"], described["bars"], described["meter"]) == ([], ["1-8"], ["4/4"])


@pytest.mark.parametrize(
    ("name", "value", "token"),
    [
        ("composer", "Bach, J. S.", "Control-composer_Bach,-J.-S."),
        ("my genre", " slow\t_ blues_", "Control-my-genre_slow-blues"),
        ("meter", "6/8", "Control-meter_6/8"),
    ],
)
def test_names_and_values_become_one_token(name: str, value: str, token: str) -> None:
    assert control_token(name, value) == token
    assert build_tokenizer(controls=[token]).vocab[token] == 3


@pytest.mark.parametrize(("name", "value"), [("", "x"), ("key", ""), ("key", " _ "), ("_", "x")])
def test_a_control_without_name_or_value_is_refused(name: str, value: str) -> None:
    with pytest.raises(InputError, match="needs a name and a value"):
        control_token(name, value)


@pytest.mark.parametrize("token", ["Pitch_60", "Control-key", "Control-_x", "Control-key_a b", "Control-key_a_b"])
def test_anything_but_a_control_token_is_refused(token: str) -> None:
    with pytest.raises(InputError, match="is not a control token"):
        build_tokenizer(controls=[token])


def test_a_control_token_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="'Control-key_C-major' is given twice"):
        build_tokenizer(controls=[control_token("key", "C-major")] * 2)


def test_a_tokenizer_names_its_controls_in_its_order() -> None:
    pairs = [("tempo", "60-90"), ("key", "C-major"), ("tempo", "0-60"), ("composer", "Bach")]
    tokenizer = build_tokenizer(controls=[control_token(*pair) for pair in pairs])
    assert list(controls_of(tokenizer).items()) == [
        ("tempo", ["60-90", "0-60"]),
        ("key", ["C-major"]),
        ("composer", ["Bach"]),
    ]
    assert controls_of(build_tokenizer("MMM")) == {}
    values = {"composer": "Bach", "tempo": ["0-60", "60-90", "0-60"], "key": []}
    assert control_ids(tokenizer, values) == [3, 5, 6]


def test_requests_do_not_distinguish_case_unless_values_differ_in_nothing_else() -> None:
    pairs = [
        ("key", "C-major"),
        ("key", "F#-minor"),
        ("My label", "Bach"),
        ("My label", "BACH"),
        ("My label", "Satie"),
    ]
    tokenizer = build_tokenizer(controls=[control_token(*pair) for pair in pairs])
    assert control_ids(tokenizer, {"KEY": ["c-MAJOR", "f#-Minor"]}) == [3, 4]
    assert control_ids(tokenizer, {"my label": ["BACH", "satie"]}) == [6, 7]
    with pytest.raises(InputError, match="'bach' may be Bach or BACH: write one of them exactly"):
        control_ids(tokenizer, {"my-LABEL": "bach"})


def test_refusals_name_the_choices() -> None:
    tokens = [control_token("composer", "Bach, J. S."), *(control_token("key", key) for key in KEYS)]
    tokenizer = build_tokenizer(controls=tokens)
    for values, message in (
        ({"kye": "C-major"}, r"no control 'kye': choose one of composer, key$"),
        ({"composer": "Bax"}, r"control 'composer' has no value 'Bax': choose one of Bach,-J\.-S\.$"),
        ({"key": "c-MAJ"}, r"control 'key' has no value 'c-MAJ': the nearest of 24 are C-major, [^,]*(, [^,]*){3}$"),
        ({"key": ["C-major", " "]}, "control 'key' has no value ' '"),
    ):
        with pytest.raises(InputError, match=message) as refusal:
            control_ids(tokenizer, values)
        assert "\n" not in str(refusal.value)
    plain = build_tokenizer()
    assert control_ids(plain, {}) == []
    with pytest.raises(InputError, match="midimamba tokenize SOURCE --controls"):
        control_ids(plain, {"key": "C-major"})
