"""Filling a gap: what was not asked for stays as it is, and exactly what was asked for is written."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import ControlChange, Note, Pedal, PitchBend, Score, Tempo, TextMeta, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.tokenization.infilling import Span
from midimamba.tokenization.musical_time import bar_starts
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, train_tokenizer
from support import Notes, make_generator, make_score

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "without velocities": {"use_velocities": False},
    "a program before every note": {"program_changes": False},
    "without tempos": {"use_tempos": False},
    "without meters": {"use_time_signatures": False},
}


def make_processor(size: int | None = None, **options: Any) -> MidiProcessor:
    tokenizer = build_tokenizer("REMI", infill=True, **options)
    if size is not None:
        train_tokenizer(tokenizer, [make_score(seed) for seed in range(8)], size)
    return MidiProcessor(tokenizer)


PLAIN, MERGED = make_processor(), make_processor(900)
PROCESSORS = [PLAIN, MERGED]


@st.composite
def scores(draw: st.DrawFn) -> ScoreTick:
    """Scores off the grid: changes of tempo and meter, pedals, bends, several tracks of one instrument, a drum kit."""
    quarter = draw(st.sampled_from([96, 120, 220, 480, 1024]))
    score = Score(quarter)
    time = 0
    for _ in range(draw(st.integers(2, 6))):
        numerator, denominator = draw(st.sampled_from([(4, 4), (3, 4), (6, 8), (7, 8), (5, 4), (15, 16)]))
        score.time_signatures.append(TimeSignature(time, numerator, denominator))
        time += numerator * 4 * quarter // denominator * draw(st.integers(1, 2))
    for _ in range(draw(st.integers(0, 5))):
        score.tempos.append(Tempo(draw(st.integers(0, time)), draw(st.floats(40, 200))))
    score.tempos.sort()
    score.markers.append(TextMeta(draw(st.integers(0, time)), "A"))
    for name, program, drums in (("LH", 0, False), ("RH", 0, False), ("Solo", 40, False), ("Kit", 25, True)):
        track = Track(name, program, drums)
        for _ in range(draw(st.integers(1, 12))):
            length = draw(st.integers(1, 3 * quarter))
            pitch, velocity = draw(st.integers(30, 90)), draw(st.integers(1, 127))
            track.notes.append(Note(draw(st.integers(0, time - 1)), length, pitch, velocity))
        if draw(st.booleans()):
            track.controls.extend([ControlChange(draw(st.integers(0, time)), 64, value) for value in (127, 0)])
            track.pedals.append(Pedal(draw(st.integers(0, time)), quarter))
            track.pitch_bends.append(PitchBend(draw(st.integers(0, time)), 100))
        score.tracks.append(track)
    return score


def _time(note: Note) -> int:
    return int(note.time)


def everything_but_notes(score: ScoreTick) -> list[Any]:
    tracks = [
        (track.name, track.program, track.is_drum, list(track.controls), list(track.pedals), list(track.pitch_bends))
        for track in score.tracks
    ]
    shared = [list(score.tempos), list(score.time_signatures), list(score.key_signatures), list(score.markers)]
    return [score.ticks_per_quarter, tracks, *shared]


@settings(max_examples=60, deadline=None)
@given(score=scores(), seed=st.integers(0, 2**32), data=st.data())
def test_what_was_not_asked_for_is_the_users_own(score: ScoreTick, seed: int, data: st.DataObject) -> None:
    processor = data.draw(st.sampled_from(PROCESSORS))
    lines = bar_starts(score)
    count = int((lines < score.end()).sum())
    bars = sorted(data.draw(st.lists(st.integers(1, count), min_size=2, max_size=2)))
    tracks = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=1))
    before = score.copy()
    prompt = processor.infill(score, bars, tracks)["input_ids"]
    size, first = processor.vocab_size, processor.arranger.fill_id + 1
    assert isinstance(size, int)
    sampled = torch.randint(first, size, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = processor.place(score, [*prompt, *sampled], bars, tracks)
    assert score == before, "changed"
    if score.ticks_per_quarter >= 96:
        assert everything_but_notes(found)[0] == score.ticks_per_quarter
    extra = len(found.tracks) - len(score.tracks)
    assert extra == 0 or tracks is None
    start, end = lines[bars[0] - 1], lines[bars[1]]
    for index, track in enumerate(found.tracks):
        ours = score.tracks[index] if index < len(score.tracks) else Track()
        is_wanted = tracks is None or index in tracks
        stay, kept = (
            sorted((note for note in each.notes if not (is_wanted and start <= note.time < end)), key=_time)
            for each in (ours, track)
        )
        assert kept == stay
        assert all(note.end <= end for note in track.notes if is_wanted and start <= note.time < end)
    del found.tracks[len(score.tracks) :]
    assert everything_but_notes(found) == everything_but_notes(score)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_piece_taken_apart_is_written_as_before(options: dict[str, Any]) -> None:
    arranger = make_processor(**options).arranger
    for seed in range(10):
        ids = np.array(base_ids(arranger.tokenizer, make_score(seed)))
        piece = arranger.take_apart(ids)
        assert arranger.write(piece, 0, piece.num_bars) == ids.tolist()
        # In parts, a program and a tempo are said again; that is all.
        parts = [index for bar in range(piece.num_bars) for index in arranger.write(piece, bar, bar + 1)]
        joined = arranger.take_apart(np.array(parts))
        assert arranger.write(joined, 0, piece.num_bars, with_tempos=False) == arranger.write(
            piece, 0, piece.num_bars, with_tempos=False
        )


@pytest.mark.parametrize("processor", PROCESSORS, ids=["plain", "merged"])
@pytest.mark.parametrize("tracks", [None, [0], [1, 3]])
def test_a_piece_arranged_and_placed_is_the_piece(
    processor: MidiProcessor, tracks: list[int] | None, notes: Notes
) -> None:
    arranger = processor.arranger
    for seed in range(8):
        score = make_score(seed)
        lines = bar_starts(score)
        piece = arranger.take_apart(np.array(base_ids(processor.midi_tokenizer, score)))
        programs = [-1 if track.is_drum else track.program for track in score.tracks]
        asked = [programs[track] for track in (range(len(programs)) if tracks is None else tracks)]
        wanted = (piece.bar >= 2) & (piece.bar < 4) & np.isin(piece.program, asked)
        prompt, music = arranger.arrange(piece, Span(2, 4, wanted, asked, tracks is not None))
        [bos, *given] = processor.infill(score, (3, 4), tracks)["input_ids"]
        assert bos == processor.bos_token_id
        assert given == prompt  # training and sampling agree on what a gap looks like
        found = processor.place(score, [*given, *music, processor.eos_token_id], (3, 4), tracks)
        expected = score.copy()
        start, end = int(lines[2]), int(lines[4])
        for track, program in zip(expected.tracks, programs, strict=True):
            for note in track.notes:
                if program in asked and start <= note.time < end:
                    note.duration = min(note.duration, end - note.time)
        assert notes(found) == notes(expected)


@pytest.mark.parametrize("processor", PROCESSORS, ids=["plain", "merged"])
@pytest.mark.parametrize(
    ("tracks", "bars"),
    [(None, (1, 2)), ([0], (3, 6)), ([1, 3], (6, 6)), (None, (1, 6)), (None, (2, 3)), (None, (4, 6))],
)
def test_exactly_the_wanted_bars_of_the_wanted_instruments_are_sampled(
    processor: MidiProcessor, tracks: list[int] | None, bars: tuple[int, int]
) -> None:
    arranger, score = processor.arranger, make_score(3)
    model = make_generator(vocab_size=processor.vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    inputs = processor.infill(score, bars, tracks, return_tensors="pt")
    asked = arranger.asked(inputs["input_ids"][0].tolist())
    assert asked is not None
    with torch.no_grad():
        sampled = processor.compose(model, inputs, num=4, max_new_tokens=2000, seed=1)
    assert sampled.unfinished == 0
    assert len(asked.meters) == bars[1] - bars[0] + 1
    for row in sampled.ids.tolist():
        piece = arranger.take_apart(np.array(arranger.filling(row)))
        names = list(processor.midi_tokenizer.vocab)
        assert [names[meter].split("_")[1] for meter in piece.meters] == asked.meters
        assert len(piece.bar)
        assert set(piece.program.tolist()) <= set(asked.programs)
        found = processor.place(score, row, bars, tracks)
        lines = bar_starts(score)
        onsets = [note.time for track in found.tracks for note in track.notes if note not in list(track.notes)]
        assert all(lines[bars[0] - 1] <= onset < lines[bars[1]] for onset in onsets)


@pytest.mark.parametrize("bars", [(3, 4), (2, 3), (4, 4)])
def test_an_instrument_of_the_gap_may_play_though_it_is_silent_before(bars: tuple[int, int]) -> None:
    score = Score(480)
    score.tracks.append(Track("Piano", 0, notes=[Note(480 * beat, 480, 60, 64) for beat in range(16)]))
    score.tracks.append(Track("Violin", 40, notes=[Note(480 * beat, 480, 72, 64) for beat in range(8, 16)]))
    ids = PLAIN.infill(score, bars)["input_ids"]
    vocab = PLAIN.midi_tokenizer.vocab
    row = torch.tensor([[*ids, vocab["Bar_None"], vocab["TimeSig_4/4"], vocab["Position_0"]]])
    for constraints in (None, {"scale": "C-major"}):
        grammar = PLAIN.grammar(row[:, : len(ids)], constraints=constraints)
        allowed = grammar(row, torch.zeros(1, len(vocab)))[0].isfinite()
        assert [bool(allowed[vocab[f"Program_{program}"]]) for program in (0, 40, 41)] == [True, True, False]


def test_the_last_wanted_bar_may_be_silent() -> None:
    vocab = PLAIN.midi_tokenizer.vocab
    note = ["Position_0", "Program_0", "Pitch_60", "Velocity_63", "Duration_1.0.12"]
    rows = [["Bar_None", "TimeSig_4/4", *note, "Bar_None", "TimeSig_3/4"], ["Bar_None", "TimeSig_4/4", *note]]
    for tokens, may_end in zip(rows, (True, False), strict=True):
        prompt = torch.tensor([[1, vocab["Infill_Gap"], vocab["Infill_Fill"], *(vocab[token] for token in tokens)]])
        grammar = PLAIN.grammar(prompt_length=3, meters=["4/4", "3/4"])
        scores = grammar(prompt, torch.zeros(1, len(vocab)))
        assert bool(scores[0, PLAIN.eos_token_id].isfinite()) == may_end


def test_a_gap_at_the_end_and_a_gap_that_is_everything_can_be_filled() -> None:
    score = Score(480)
    score.tracks.append(Track("Solo", 40, notes=[Note(0, 480, 60, 64), Note(3 * 1920, 3 * 1920, 64, 64)]))
    for bars in ((4, 6), (6, 6), (1, 6)):
        asked = PLAIN.arranger.asked(PLAIN.infill(score, bars)["input_ids"])
        assert asked is not None
        assert asked.meters == ["4/4"] * (bars[1] - bars[0] + 1)
        assert asked.programs == [40]


def test_only_what_is_near_a_gap_is_shown() -> None:
    score = Score(480)
    score.tracks.append(Track(notes=[Note(1920 * bar, 480, 30 + bar % 60, 64) for bar in range(100)]))
    ids = PLAIN.infill(score, (50, 51))["input_ids"]
    shown = PLAIN.arranger.take_apart(np.array(ids))
    pitches = (shown.tokens[:, 0] - PLAIN.midi_tokenizer.vocab["Pitch_0"]).tolist()
    bars = [*range(51, 67), *range(33, 49)]
    assert pitches == [30 + bar % 60 for bar in bars]


@pytest.mark.parametrize(
    ("bars", "tracks", "message"),
    [
        ((5, 8), None, "bars 5 to 8 are not all there: the piece has bars 1 to 6"),
        ((0, 2), None, "bars 0 to 2 are not all there"),
        ((3, 2), None, "give the first bar and the last"),
        ((3,), None, "give the first bar and the last"),
        ((1, 2), [9], "there is no track 9: the piece has tracks 0 to 3"),
        ((1, 2), [], "tracks is empty"),
    ],
)
def test_what_the_piece_does_not_have_is_refused(
    bars: tuple[int, ...], tracks: list[int] | None, message: str
) -> None:
    score = make_score(0)
    score = score.clip(0, int(bar_starts(score)[6]), clip_end=True)
    with pytest.raises(InputError, match=message):
        PLAIN.infill(score, bars, tracks)


def test_a_model_that_has_not_learned_it_says_so() -> None:
    with pytest.raises(InputError, match="has not learned to fill gaps: train one with"):
        MidiProcessor(build_tokenizer()).infill(make_score(0), (1, 2))


def test_a_meter_that_the_tokenizer_cannot_write_is_refused() -> None:
    processor = make_processor(use_time_signatures=False)
    score = make_score(0)
    score.time_signatures.clear()
    score.time_signatures.append(TimeSignature(0, 3, 4))
    with pytest.raises(InputError, match="cannot write bars as long as the wanted ones"):
        processor.infill(score, (2, 2))


def test_other_ids_stay_as_they_are() -> None:
    plain, infilling = build_tokenizer(), PLAIN.midi_tokenizer
    assert infilling.special_tokens[3:] == ["Infill_Gap", "Infill_Fill"]
    assert list(infilling.vocab)[5:] == list(plain.vocab)[3:]
    score = make_score(1)
    assert [index - 2 for index in PLAIN.encode(score)[1:]] == MidiProcessor(plain).encode(score)[1:]
    # Saved and loaded, what asks for a filling is not music.
    assert PLAIN.tokenizer.convert_ids_to_tokens([3, 4]) == ["Infill_Gap", "Infill_Fill"]
    assert PLAIN.decode([*PLAIN.encode(score), 3, 4]) == PLAIN.decode(PLAIN.encode(score))
