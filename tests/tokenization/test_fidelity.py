"""Music in every meter, tempo, length and overlap comes back as it was, or the change is said."""

from fractions import Fraction
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.tokenization.choices import TOKENIZATIONS
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


def sounds(score: ScoreTick) -> list[tuple[int, int, Fraction, Fraction]]:
    """Sorted program (-1 for drums), pitch, onset and end."""
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
