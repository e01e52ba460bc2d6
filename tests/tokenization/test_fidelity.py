"""Music in every meter, tempo, length and overlap comes back as it was, or the change is said."""

import warnings
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from symusic import ControlChange, Note, Pedal, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.evaluation.features import measure
from midimamba.tokenization.choices import TOKENIZATIONS
from midimamba.tokenization.controls import describe
from midimamba.tokenization.ingest import MidiRefusedError, read_score
from midimamba.tokenization.normalization import normalize
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer

WITH_METERS = [name for name in TOKENIZATIONS if build_tokenizer(name).config.use_time_signatures]
APART = ("MMM", "BEAT")  # these keep tracks of one program apart
PROCESSORS = {name: MidiProcessor(build_tokenizer(name)) for name in TOKENIZATIONS}
QUARTER = 480


class Music(NamedTuple):
    """Times in quarter notes."""

    meters: list[tuple[Fraction, int, int]]
    notes: list[tuple[int, int, Fraction, Fraction, int, int]]  # track, program, onset, duration, pitch, velocity
    tempos: list[tuple[Fraction, float]]

    def score(self) -> ScoreTick:
        score = Score(QUARTER)
        score.time_signatures.extend(TimeSignature(int(time * QUARTER), *meter) for time, *meter in self.meters)
        score.tempos.extend(Tempo(int(time * QUARTER), qpm) for time, qpm in self.tempos)
        for track, program in sorted({(note[0], note[1]) for note in self.notes}):
            notes = [
                Note(int(onset * QUARTER), int(duration * QUARTER), pitch, velocity)
                for index, _, onset, duration, pitch, velocity in self.notes
                if index == track
            ]
            score.tracks.append(Track(program=max(program, 0), is_drum=program < 0, notes=notes))
        return score

    def bar_lines(self) -> set[Fraction]:
        """Up to the last onset: a meter starts a bar, and lasts until the next."""
        last = max(note[2] for note in self.notes)
        lines: set[Fraction] = set()
        meters = self.meters if self.meters and self.meters[0][0] == 0 else [(Fraction(0), 4, 4), *self.meters]
        stops = [*(time for time, _, _ in meters[1:]), last + 1]
        for (time, numerator, denominator), stop in zip(meters, stops, strict=True):
            while time < stop and time <= last:
                lines.add(time)
                time += Fraction(4 * numerator, denominator)
        return lines

    def sounding(self, apart: bool) -> dict[tuple[int, int, Fraction], Fraction]:
        """The ends of notes by instrument, pitch and onset: the rule of overlaps, one note after another."""
        found: dict[tuple[int, int, Fraction], Fraction] = {}
        for track, program, onset, duration, pitch, _ in sorted(self.notes, key=lambda note: note[2]):
            instrument = track if apart else program
            end = onset + duration
            for (other, same, start), stop in list(found.items()):
                if (other, same) == (instrument, pitch) and stop > onset:
                    end = max(end, stop)
                    if start < onset:
                        found[other, same, start] = onset
            found[instrument, pitch, onset] = max(end, found.get((instrument, pitch, onset), end))
        return found


SIXTEENTHS = st.integers(0, 160).map(lambda count: Fraction(count, 4))
# Short ones, those around the longest duration in x/4, x/8 and x/16, and multiples of it.
DURATIONS = st.one_of(
    st.integers(1, 8), st.sampled_from([11, 12, 13, 23, 24, 25, 46, 47, 48, 49, 95, 96, 97, 144, 400])
).map(lambda count: Fraction(count, 4))


@st.composite
def meters(draw: st.DrawFn, finest: int = 16) -> list[tuple[Fraction, int, int]]:
    """Meters that come after whole bars, or cut one short."""
    found = []
    time = draw(st.sampled_from([Fraction(0), Fraction(0), Fraction(3), Fraction(7, 4)]))
    for _ in range(draw(st.integers(0, 5))):
        denominator = draw(st.sampled_from([2**power for power in range(8) if 2**power <= finest]))
        numerator = draw(st.one_of(st.integers(1, 17), st.just(128)))
        found.append((time, numerator, denominator))
        bar = Fraction(4 * numerator, denominator)
        time += draw(st.integers(0, 3)) * bar + draw(st.sampled_from([0, 0, 0, 1, 5, 14])) * Fraction(1, 4)
    return [meter for meter in found if meter[0] < 200]


@st.composite
def music(draw: st.DrawFn, finest: int = 16) -> Music:
    """Few pitches and long notes, so that they overlap; on the grid that all tokenizers share."""
    programs = draw(st.lists(st.sampled_from([-1, 0, 0, 40]), min_size=1, max_size=3))
    notes = []
    for _ in range(draw(st.integers(1, 14))):
        track = draw(st.integers(0, len(programs) - 1))
        pitch, velocity = draw(st.sampled_from([60, 61])), draw(st.sampled_from([40, 40, 90]))
        notes.append((track, programs[track], draw(SIXTEENTHS), draw(DURATIONS), pitch, velocity))
    tempos = draw(st.lists(st.tuples(SIXTEENTHS, st.sampled_from([60.0, 97.0, 120.0, 240.0])), max_size=3))
    return Music(draw(meters(finest)), notes, sorted(tempos))


def sounds(score: ScoreTick) -> list[tuple[int, int, Fraction | int, Fraction | int]]:
    """Sorted program (-1 for drums), pitch, onset and end in quarter notes."""
    quarter = score.ticks_per_quarter
    return sorted(
        (-1 if track.is_drum else track.program, note.pitch, Fraction(note.time, quarter), Fraction(note.end, quarter))
        for track in score.tracks
        for note in track.notes
    )


def contents(score: ScoreTick) -> list[Any]:
    """Everything that a file must bring back."""
    tracks = [
        (track.program, track.is_drum, [(n.time, n.duration, n.pitch, n.velocity) for n in track.notes])
        for track in score.tracks
    ]
    tempos = [(tempo.time, tempo.mspq) for tempo in score.tempos]
    return [tracks, tempos, [(meter.time, meter.numerator, meter.denominator) for meter in score.time_signatures]]


def encode(processor: MidiProcessor, piece: Any) -> list[Any]:
    try:
        return processor.encode(piece)
    except MidiRefusedError:  # what Structured, Octuple and MuMIDI cannot write is refused, not changed
        assume(processor.midi_tokenizer.config.use_time_signatures)
        raise


@pytest.mark.parametrize("name", TOKENIZATIONS)
@settings(max_examples=60, deadline=None)
@given(music())
def test_notes_come_back_by_the_rule_of_overlaps(name: str, piece: Music) -> None:
    processor = PROCESSORS[name]
    score = processor.decode(encode(processor, piece.score()))
    programs = {track: program for track, program, *_ in piece.notes}
    expected = sorted(
        (programs[instrument] if name in APART else instrument, pitch, onset, end)
        for (instrument, pitch, onset), end in piece.sounding(name in APART).items()
    )
    found = sounds(score)
    assert [note[:3] for note in found] == [note[:3] for note in expected]
    early = [(note[3] - other[3]) for note, other in zip(expected, found, strict=True) if note[3] != other[3]]
    # A quarter of a beat at most, which a real repetition after the longest duration costs; and that is said.
    assert all(0 < difference <= Fraction(1, 4) for difference in early), early
    said = [
        change
        for change in normalize(processor.midi_tokenizer, read_score(piece.score())).changes
        if "short" in change and "note" in change
    ]
    assert bool(early) == bool(said)


@pytest.mark.parametrize("name", TOKENIZATIONS)
@settings(max_examples=40, deadline=None)
@given(music(finest=128))
def test_a_written_file_reads_back_as_the_decoded_score_and_has_its_ids(name: str, piece: Music) -> None:
    processor = PROCESSORS[name]
    if name == "PerTok":  # writes a change of tempo with the note before it
        piece = piece._replace(tempos=piece.tempos[:1] and [(Fraction(0), piece.tempos[0][1])])
    if name == "BEAT":  # has one velocity for a pitch in a beat
        piece = piece._replace(notes=[(*note[:-1], 64) for note in piece.notes])
    ids = encode(processor, piece.score())
    score = processor.decode(ids)
    assert contents(read_score(score.dumps_midi())) == contents(score)
    assert encode(processor, score.dumps_midi()) == ids == encode(processor, score)


@pytest.mark.parametrize("name", WITH_METERS)
@settings(max_examples=100, deadline=None)
@given(music())
def test_every_bar_line_of_sixteenths_is_kept(name: str, piece: Music) -> None:
    processor = PROCESSORS[name]
    score = processor.decode(processor.encode(piece.score()))
    found = Music(
        [(Fraction(m.time, score.ticks_per_quarter), m.numerator, m.denominator) for m in score.time_signatures],
        piece.notes,
        [],
    )
    missing = piece.bar_lines() - found.bar_lines()
    assert not missing
    if added := found.bar_lines() - piece.bar_lines():
        changes = normalize(processor.midi_tokenizer, read_score(piece.score())).changes
        assert any(("written as" in change and "+" in change) or "x" in change for change in changes), added


@st.composite
def off_the_grid(draw: st.DrawFn) -> Music:
    """Every pitch once, at any tick."""
    notes = []
    for pitch in range(40, 40 + draw(st.integers(1, 12))):
        onset, duration = draw(st.integers(0, 20 * QUARTER)), draw(st.integers(1, 30 * QUARTER))
        notes.append((0, 0, Fraction(onset, QUARTER), Fraction(duration, QUARTER), pitch, 64))
    return Music(draw(meters(finest=128)), notes, [])


@pytest.mark.parametrize("name", TOKENIZATIONS)
@settings(max_examples=40, deadline=None)
@given(off_the_grid())
def test_every_note_is_kept_to_the_resolution(name: str, piece: Music) -> None:
    processor = PROCESSORS[name]
    found = sounds(processor.decode(encode(processor, piece.score())))
    expected = sorted((program, pitch, onset, onset + length) for _, program, onset, length, pitch, _ in piece.notes)
    assert [note[:2] for note in found] == [note[:2] for note in expected]
    # Half a position, and half the step of long durations; BEAT has 4 positions per quarter note.
    position, step = (Fraction(1, 8), Fraction(1, 4)) if name == "BEAT" else (Fraction(1, 24), Fraction(1, 8))
    for note, other in zip(found, expected, strict=True):
        assert abs(note[2] - other[2]) <= position
        assert abs((note[3] - note[2]) - (other[3] - other[2])) <= step + position or note[3] - note[2] == 2 * position


def play(*notes: tuple[float, float, int], meters: tuple[tuple[float, int, int], ...] = (), **track: Any) -> ScoreTick:
    """One track of notes (onset, duration and pitch), times in quarter notes."""
    score = Score(QUARTER)
    score.time_signatures.extend(TimeSignature(int(time * QUARTER), *meter) for time, *meter in meters)
    ticks = [Note(int(onset * QUARTER), int(length * QUARTER), pitch, 80) for onset, length, pitch in notes]
    score.tracks.append(Track(notes=ticks, **track))
    return score


@pytest.mark.parametrize("name", TOKENIZATIONS)
@pytest.mark.parametrize(("meter", "length"), [((4, 4), 16), ((6, 8), 9), ((12, 8), 12), ((4, 4), 100)])
def test_long_notes_last_as_long_as_they_do(name: str, meter: tuple[int, int], length: int) -> None:
    processor = PROCESSORS[name]
    score = play((0, length, 48), (length, 1, 48), (length, 1, 60), meters=((0, *meter),))
    if name == "Structured" and length > 32:
        assert processor.decode(processor.encode(score)).end() == (length + 1) * 12  # ties bridge the pause
    # The repetition after the long note is not joined to it.
    assert sorted(note[1:3] for note in sounds(processor.decode(processor.encode(score)))) == [
        (48, 0), (48, length), (60, length)
    ]  # fmt: skip
    score = play((0, length, 48), (length, 1, 60), meters=((0, *meter),))
    assert sounds(processor.decode(processor.encode(score)))[0] == (0, 48, 0, length)
    assert not [change for change in processor.changes(score) if "note" in change]


@pytest.mark.parametrize("name", WITH_METERS)
def test_nine_meters_start_where_they_start(name: str) -> None:
    starts = [(0, 5, 8), (5, 8, 8), (9, 7, 4), (16, 4, 4), (24, 6, 8), (30, 2, 2), (34, 3, 4), (40, 12, 8), (46, 4, 4)]
    score = play(*((time / 2, 0.5, 60 + time % 12) for time in range(100)), meters=tuple(starts))
    processor = PROCESSORS[name]
    found = processor.decode(processor.encode(score))
    expected = [meter if meter[2] != 2 else (34 - 4, 4, 4) for meter in starts]
    quarter = found.ticks_per_quarter
    assert [(m.time / quarter, m.numerator, m.denominator) for m in found.time_signatures] == expected
    assert processor.changes(score) == ["1 bar of 2/2 written as 4/4"]


def test_a_tokenizer_of_an_earlier_version_keeps_bar_lines_in_the_meters_it_has() -> None:
    old = build_tokenizer(time_signature_range={4: [1, 2, 3, 4, 5, 6, 7, 8], 8: [3, 5, 6, 7, 9, 12]})
    processor = MidiProcessor(old)
    score = play(*((beat, 1, 60) for beat in range(24)), meters=((0, 8, 8), (4, 11, 8), (9.5, 4, 4), (15.5, 3, 4)))
    found = processor.decode(processor.encode(score))
    quarter = found.ticks_per_quarter
    assert [(m.time / quarter, m.numerator, m.denominator) for m in found.time_signatures] == [
        (0, 4, 4), (4, 9, 8), (8.5, 1, 4), (9.5, 4, 4), (13.5, 2, 4), (15.5, 3, 4)
    ]  # fmt: skip


@pytest.mark.parametrize("meter", [(128, 2), (255, 1), (255, 4), (3, 2), (15, 16), (16, 16), (7, 32), (255, 128)])
@pytest.mark.parametrize("name", TOKENIZATIONS)
def test_any_meter_can_be_encoded(name: str, meter: tuple[int, int]) -> None:
    score = play(*((beat, 1, 60) for beat in range(24)), meters=((0, *meter),))
    processor = PROCESSORS[name]
    found = processor.decode(processor.encode(score))
    assert sounds(found) == [(0, 60, beat, beat + 1) for beat in range(24)]
    assert processor.changes(score)
    describe(read_score(score))
    measure([read_score(score)])


@pytest.mark.parametrize("name", [name for name in TOKENIZATIONS if name != "Structured"])
def test_half_once_and_twice_midis_own_tempo_are_exact(name: str) -> None:
    processor = PROCESSORS[name]
    for tempos, expected in (([], 120.0), ([120.0], 120.0), ([60.0], 60.0), ([240.0], 240.0), ([300.0], 240.0)):
        score = play((0, 1, 60))
        for qpm in tempos:
            score.tempos.append(Tempo(0, qpm))
        assert processor.decode(processor.encode(score)).tempos[0].qpm == expected
        assert processor.changes(score) == (["tempo 300 is written as 240"] if tempos == [300.0] else [])


def pedalled(*presses: tuple[float, float | None], notes: tuple[tuple[float, float, int], ...]) -> ScoreTick:
    """A track with a sustain pedal, pressed and lifted at these quarter notes, as a file has it."""
    score = play(*notes)
    for press, lift in presses:
        score.tracks[0].controls.append(ControlChange(int(press * QUARTER), 64, 127))
        if lift is not None:
            score.tracks[0].controls.append(ControlChange(int(lift * QUARTER), 64, 0))
    return read_score(score.dumps_midi())


@pytest.mark.parametrize("name", TOKENIZATIONS)
def test_the_sustain_pedal_lengthens_notes_until_it_is_lifted_or_their_pitch_is_struck_again(name: str) -> None:
    processor = PROCESSORS[name]
    notes = ((0, 0.25, 60), (1, 0.25, 64), (2, 0.25, 64), (4, 1, 67))
    score = pedalled((0, 4), notes=notes)
    expected = [(0, 60, 0, 4), (0, 64, 1, 2), (0, 64, 2, 4), (0, 67, 4, 5)]
    assert sounds(processor.decode(processor.encode(score))) == expected
    assert "3 notes lengthened until the sustain pedal is lifted" in processor.changes(score)
    never_lifted = pedalled((0, None), notes=notes)
    expected = [(0, 60, 0, 5), (0, 64, 1, 2), (0, 64, 2, 5), (0, 67, 4, 5)]
    assert sounds(processor.decode(processor.encode(never_lifted))) == expected


def test_a_pedal_track_without_notes_applies_to_its_program_and_never_to_drums() -> None:
    score = play((0, 0.25, 60))
    score.tracks.append(Track(program=40, notes=[Note(0, 120, 60, 80)]))
    score.tracks.append(Track(is_drum=True, notes=[Note(0, 120, 40, 80)]))
    pedal = Track(program=40)
    pedal.pedals.append(Pedal(0, 960))
    score.tracks.append(pedal)
    processor = PROCESSORS["REMI"]
    quarter = Fraction(1, 4)
    expected = [(-1, 40, 0, quarter), (0, 60, 0, quarter), (40, 60, 0, 2)]
    assert sounds(processor.decode(processor.encode(score))) == expected


def test_a_tokenizer_that_writes_pedals_keeps_them_and_the_notes() -> None:
    processor = MidiProcessor(build_tokenizer(use_sustain_pedals=True))
    found = processor.decode(processor.encode(pedalled((0, 4), notes=((0, 0.25, 60), (4, 1, 67)))))
    assert [note[3] for note in sounds(found)] == [Fraction(1, 4), 5]
    assert [(pedal.time, pedal.end) for pedal in found.tracks[0].pedals] == [(0, 4 * found.ticks_per_quarter)]


def open_notes() -> bytes:
    """C4 twice, one of which ends at 2; E4 that never ends, in a track that lasts until 4; G4 in another track."""
    content = play((0, 1, 60)).dumps_midi()
    head, end = content[:14], b"\x00\xff\x2f\x00"
    first = b"\x00\x90\x3c\x50\x83\x60\x90\x3c\x50\x00\x90\x40\x50\x83\x60\x80\x3c\x00\x87\x40" + end[1:]
    second = b"\x00\x91\x43\x50\x87\x40" + end[1:]
    head = head[:8] + b"\x00\x01\x00\x02" + QUARTER.to_bytes(2, "big")
    return head + b"".join(b"MTrk" + len(track).to_bytes(4, "big") + track for track in (first, second))


def test_notes_that_never_end_are_kept_and_said() -> None:
    score = read_score(open_notes())
    found = sorted(
        (note.pitch, note.time / QUARTER, note.end / QUARTER) for track in score.tracks for note in track.notes
    )
    assert found == [(60, 0, 2), (60, 1, 2), (64, 1, 2), (67, 0, 2)]
    changes = PROCESSORS["REMI"].changes(open_notes())
    assert changes[0] == "3 notes that never end, ended with another of its pitch or with the track"


def test_drum_kits_and_overlaps_are_said(caplog: pytest.LogCaptureFixture) -> None:
    score = play((0, 4, 60), (1, 1, 60), (1, 2, 60))
    score.tracks.append(Track(program=25, is_drum=True, notes=[Note(0, 480, 36, 80)]))
    processor = PROCESSORS["REMI"]
    assert processor.changes(score) == [
        "1 note ended where the same instrument strikes the same pitch again",
        "1 note left out: the same instrument has another one of its pitch and onset",
        "drum kit 25 is written as the standard kit",
    ]
    with caplog.at_level("INFO", logger="midimamba"):
        processor.encode(score)
    assert [record.message for record in caplog.records] == processor.changes(score)


def test_more_instruments_than_channels_are_warned_of() -> None:
    score = Score(QUARTER)
    for program in range(15):
        score.tracks.append(Track(program=program, notes=[Note(0, 480, 60, 80)]))
    score.tracks.append(Track(is_drum=True, notes=[Note(0, 480, 40, 80)]))
    processor = PROCESSORS["REMI"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.decode(processor.encode(score))
    score.tracks.append(Track(program=99, notes=[Note(0, 480, 60, 80)]))
    with pytest.warns(UserWarning, match="more tracks than a MIDI file has channels"):
        processor.decode(processor.encode(score))
