"""A continuation opens with the prompt itself, and only what was sampled is added to it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import ControlChange, Note, Pedal, Score, Tempo, TextMeta, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.tokenization.choices import TOKENIZATIONS
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer

# In MMM one track follows another: a longer piece does not begin with the ids of a shorter one.
PROCESSORS = {name: MidiProcessor(build_tokenizer(name)) for name in TOKENIZATIONS if name != "MMM"}
GROWING = list(PROCESSORS)


def band(quarter: int = 480) -> ScoreTick:
    """Two tracks of one program, a named violin with a pedal, a kit, own tempo and meters: nothing on the grid."""
    score = Score(quarter)
    score.tempos.append(Tempo(0, 96.0))
    score.time_signatures.extend([TimeSignature(0, 3, 2), TimeSignature(6 * quarter, 4, 4)])
    score.markers.append(TextMeta(quarter, "A"))
    for name, program, drums, pitch in (
        ("LH", 0, False, 36),
        ("Solo", 40, False, 72),
        ("RH", 0, False, 60),
        ("Kit", 25, True, 38),
    ):
        notes = [Note(beat * quarter + 7, quarter - 11, pitch + beat % 3, 101) for beat in range(10)]
        score.tracks.append(Track(name, program, drums, notes=notes))
    score.tracks[0].notes.append(Note(0, 14 * quarter, 30, 77))  # a drone beyond the longest duration
    score.tracks[1].controls.append(ControlChange(3, 64, 127))
    return score


def contents(score: ScoreTick, until: float = float("inf")) -> list[Any]:
    """Everything in a score before a quarter note, times in quarter notes."""
    quarter = score.ticks_per_quarter

    def kept(events: Any) -> list[Any]:
        return [(event.time / quarter, event) for event in events if event.time < until * quarter]

    tracks = [
        (
            *(track.name, track.program, track.is_drum),
            sorted((time, note.duration / quarter, note.pitch, note.velocity) for time, note in kept(track.notes)),
            [(time, event.number, event.value) for time, event in kept(track.controls)],
        )
        for track in score.tracks
    ]
    tempos = [(time, tempo.mspq) for time, tempo in kept(score.tempos)]
    meters = [(time, meter.numerator, meter.denominator) for time, meter in kept(score.time_signatures)]
    return [tracks, tempos, meters, [(time, marker.text) for time, marker in kept(score.markers)]]


def longer(prompt: ScoreTick) -> ScoreTick:
    """The prompt and more of it: a note for its piano, one for a new instrument, another tempo and another meter."""
    score = prompt.copy()
    start = 18 * score.ticks_per_quarter
    score.tracks[1].controls.append(ControlChange(14 * score.ticks_per_quarter, 64, 0))
    score.tracks[2].notes.append(Note(start, 480, 64, 80))
    score.tracks.append(Track("more", 11, notes=[Note(start, 480, 50, 60)]))
    score.tempos.append(Tempo(start, 60.0))
    score.time_signatures.append(TimeSignature(start, 3, 4))
    return score


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("quarter", [96, 220, 480, 1024, 20000])
def test_a_prompt_comes_back_as_it_is(name: str, quarter: int) -> None:
    processor, prompt = PROCESSORS[name], band(quarter)
    before = prompt.copy()
    found = processor.continue_score(prompt, processor.encode(prompt))
    assert contents(found, 14) == contents(prompt)
    assert prompt == before
    file = prompt.dumps_midi()
    assert (
        contents(processor.continue_score(file, processor.encode(file)), 14)[0] == contents(Score.from_midi(file))[0]
    )


@pytest.mark.parametrize("quarter", [96, 120, 220, 480, 1024, 20000])
def test_the_ticks_of_a_prompt_stay_as_they_are(quarter: int) -> None:
    prompt = band(quarter)
    found = PROCESSORS["REMI"].continue_score(prompt, PROCESSORS["REMI"].encode(longer(prompt)))
    assert found.ticks_per_quarter == quarter
    for ours, theirs in zip(prompt.tracks, found.tracks, strict=False):
        assert list(theirs.notes)[: len(ours.notes)] == sorted(ours.notes, key=lambda note: note.time)
    assert list(found.tempos)[:1] == list(prompt.tempos)
    assert list(found.time_signatures)[:2] == list(prompt.time_signatures)


@pytest.mark.parametrize("name", GROWING)
def test_what_follows_is_added(name: str) -> None:
    processor, prompt = PROCESSORS[name], band()
    found = processor.continue_score(prompt, processor.encode(longer(prompt)))
    assert contents(found, 14)[0][:4] == contents(prompt)[0]
    quarter = found.ticks_per_quarter
    new = [
        (track.name, track.program, note.time / quarter, note.pitch)
        for track in found.tracks
        for note in track.notes
        if note.time > 14 * quarter
    ]
    assert new == [("LH", 0, 18, 64), ("Vibraphone", 11, 18, 50)]
    tempos, meters = contents(found)[1:3]
    if processor.midi_tokenizer.config.use_tempos:
        assert tempos[0] == (0, 625_000)
        assert tempos[1][1] == 1_000_000
    if processor.midi_tokenizer.config.use_time_signatures:
        assert meters == [(0, 3, 2), (6, 4, 4), (18, 3, 4)]
    # The violin's pedal, which the prompt leaves pressed, is lifted where the prompt ends.
    assert [(control.time / quarter, control.value) for control in found.tracks[1].controls] == [
        (3 / 480, 127),
        (14, 0),
    ]


@pytest.mark.parametrize("name", ["REMI", "TSD"])
def test_changes_after_the_last_bar_of_a_prompt_do_not_bend_what_follows(name: str) -> None:
    processor, prompt = PROCESSORS[name], Score(480)
    prompt.tracks.append(Track(notes=[Note(480 * beat, 240, 60, 64) for beat in range(7)]))
    prompt.time_signatures.append(TimeSignature(0, 4, 4))
    prompt.time_signatures.append(TimeSignature(3 * 1920, 3, 4))
    prompt.tempos.extend([Tempo(0, 120.0), Tempo(7 * 480, 100.0), Tempo(3 * 1920, 60.0)])  # the second: a ritardando
    longer = prompt.copy()
    longer.time_signatures.pop()
    del longer.tempos[1:]
    assert processor.encode(longer) == processor.encode(prompt)  # of the changes, no id tells
    longer.tracks[0].notes.extend([Note(480 * beat, 240, 62, 64) for beat in range(8, 20)])
    found = processor.continue_score(prompt, processor.encode(longer))
    assert [(meter.time, meter.numerator) for meter in found.time_signatures] == [(0, 4)]
    assert [(tempo.time, round(tempo.qpm)) for tempo in found.tempos] == [(0, 120), (7 * 480, 100)]
    alone = processor.continue_score(prompt, processor.encode(prompt))
    assert list(alone.time_signatures) == list(prompt.time_signatures)
    assert list(alone.tempos) == list(prompt.tempos)


def test_a_new_note_under_the_prompts_own_of_its_pitch_is_left_out() -> None:
    processor, prompt = PROCESSORS["REMI"], Score(480)
    prompt.tracks.append(Track(notes=[Note(0, 11 * 480, 48, 64), Note(0, 480, 60, 64)]))
    # In the third bar, one note within the drone of eleven quarter notes, and one that would outlast it.
    tokens = ["Bar_None", "TimeSig_4/4"] * 2 + [
        "Position_0",
        "Program_0",
        "Pitch_48",
        "Velocity_63",
        "Duration_1.0.12",
    ]
    tokens += ["Position_24", "Pitch_48", "Velocity_63", "Duration_4.0.4"]
    vocab = processor.midi_tokenizer.vocab
    found = processor.continue_score(prompt, [*processor.encode(prompt), *(vocab[token] for token in tokens)])
    drone = [(note.time, note.duration) for note in found.tracks[0].notes if note.pitch == 48]
    assert drone == [(0, 11 * 480)]


def test_other_ids_than_the_prompts_are_refused() -> None:
    processor = PROCESSORS["REMI"]
    with pytest.raises(ValueError, match="do not begin with those of the prompt"):
        processor.continue_score(band(), processor.encode(longer(band()))[:20])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["REMI", "TSD", "MIDILike", "Structured"]))
def test_whatever_follows_the_prompt_is_kept_and_a_file_holds_it(seed: int, name: str) -> None:
    processor, prompt = PROCESSORS[name], band()
    prompt.tracks[0].pedals.append(Pedal(0, 480))
    generator = torch.Generator().manual_seed(seed)
    size = processor.vocab_size
    assert isinstance(size, int)
    ids = [*processor.encode(prompt), *torch.randint(3, size, (300,), generator=generator).tolist()]
    found = processor.continue_score(prompt, ids)
    for ours, theirs in zip(contents(prompt)[0], contents(found)[0], strict=False):
        assert ours[:3] == theirs[:3]
        assert set(ours[3]) <= set(theirs[3])
    notes = [track[3] for track in contents(found)[0]]
    assert notes == [track[3] for track in contents(Score.from_midi(found.dumps_midi()))[0]]
