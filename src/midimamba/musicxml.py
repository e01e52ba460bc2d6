"""MusicXML 4.0 (https://www.w3.org/2021/06/musicxml40/): written from a page of notation, and read by music21."""

import io
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from symusic import KeySignature, Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick

from midimamba.corpus.chorales import bars_of
from midimamba.corpus.workers import Lost, Mark, run_bounded
from midimamba.errors import InputError
from midimamba.evaluation.rendering import import_demo
from midimamba.notation import GRID, VALUES, Bar, Key, Page, Staff, Symbol
from midimamba.spelling import Spelled, signature, spell
from midimamba.text import printable, shortened
from midimamba.tokenization.ingest import read_content

_QUARTER = 480  # ticks of a score that is read
_LOUD = 90  # the velocity of 100 % in MusicXML
_MAX_SECONDS = 60.0
_DRUM_CHANNEL = 10
_HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE score-partwise PUBLIC "-//Recordare//DTD MusicXML 4.0 Partwise//EN" \
"http://www.musicxml.org/dtds/partwise.dtd">
<score-partwise version="4.0">"""
_CONTAINER = """<?xml version="1.0" encoding="UTF-8"?>
<container><rootfiles><rootfile full-path="score.musicxml"/></rootfiles></container>"""


def write_musicxml(page: Page, title: str) -> str:
    """
    A page as a MusicXML document.

    Args:
        page ([`~midimamba.notation.Page`]): what is written.
        title (`str`): of the piece.
    """
    lines = [_HEAD, f"<work><work-title>{_text(title)}</work-title></work>", "<part-list>"]
    for number, staff in enumerate(page.staves, 1):
        lines += _part(number, staff)
    lines.append("</part-list>")
    for number, staff in enumerate(page.staves, 1):
        lines += [f'<part id="P{number}">', *_measures(number, staff, page.bars), "</part>"]
    return "\n".join([*lines, "</score-partwise>", ""])


def compressed(document: str) -> bytes:
    """A MusicXML document as a compressed file (`.mxl`)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml", _CONTAINER)
        archive.writestr("score.musicxml", document)
    return buffer.getvalue()


def _text(text: str) -> str:
    return escape(printable(text))


def _part(number: int, staff: Staff) -> Iterator[str]:
    name = staff.name or ("Drums" if staff.is_drum else f"Program {staff.program}")
    yield f'<score-part id="P{number}"><part-name>{_text(name)}</part-name>'
    pitches = sorted({p for voice in staff.voices for bar in voice for symbol in bar for p in symbol.pitches})
    instruments = [f"P{number}-I{pitch}" for pitch in pitches] if staff.is_drum else [f"P{number}-I"]
    for instrument in instruments:
        named = f"<instrument-name>{_text(name)}</instrument-name>"
        yield f'<score-instrument id="{instrument}">{named}</score-instrument>'
    channel = _DRUM_CHANNEL if staff.is_drum else (number - 1) % 9 + 1
    for instrument, pitch in zip(instruments, pitches, strict=False):
        unpitched = f"<midi-unpitched>{pitch + 1}</midi-unpitched>" if staff.is_drum else ""
        yield (
            f'<midi-instrument id="{instrument}"><midi-channel>{channel}</midi-channel>'
            f"<midi-program>{staff.program + 1}</midi-program>{unpitched}</midi-instrument>"
        )
    yield "</score-part>"


def _measures(number: int, staff: Staff, bars: list[Bar]) -> Iterator[str]:
    key = Key(0, False)
    for index, bar in enumerate(bars):
        key = bar.key or key
        yield f'<measure number="{index + 1}">'
        yield from _attributes(staff, bar, index == 0)
        if number == 1:
            yield from (_tempo(place, tempo) for place, tempo in bar.tempos)
        for voice, line in enumerate(staff.voices, 1):
            if voice > 1:
                yield f"<backup><duration>{bar.units}</duration></backup>"
            altered: dict[tuple[str, int], int] = {}
            for symbol in line[index]:
                yield from _symbol(symbol, voice, key, altered, f"P{number}-I" if staff.is_drum else None)
        yield "</measure>"


def _attributes(staff: Staff, bar: Bar, is_first: bool) -> Iterator[str]:
    if not (is_first or bar.meter or bar.key):
        return
    yield "<attributes>" + (f"<divisions>{GRID}</divisions>" if is_first else "")
    if bar.key:
        mode = "minor" if bar.key.is_minor else "major"
        yield f"<key><fifths>{bar.key.fifths}</fifths><mode>{mode}</mode></key>"
    if bar.meter:
        yield f"<time><beats>{bar.meter[0]}</beats><beat-type>{bar.meter[1]}</beat-type></time>"
    if is_first:
        yield f"<clef>{_clef(staff)}</clef>"
    yield "</attributes>"


def _clef(staff: Staff) -> str:
    if staff.is_drum:
        return "<sign>percussion</sign>"
    pitches = sorted(p for voice in staff.voices for bar in voice for symbol in bar for p in symbol.pitches)
    return "<sign>F</sign><line>4</line>" if pitches[len(pitches) // 2] < 60 else "<sign>G</sign><line>2</line>"


def _tempo(place: int, tempo: float) -> str:
    offset = f"<offset>{place}</offset>" if place else ""
    return (
        '<direction placement="above"><direction-type><metronome><beat-unit>quarter</beat-unit>'
        f"<per-minute>{tempo:g}</per-minute></metronome></direction-type>{offset}"
        f'<sound tempo="{tempo:g}">{offset}</sound></direction>'
    )


def _symbol(
    symbol: Symbol, voice: int, key: Key, altered: dict[tuple[str, int], int], drums: str | None
) -> Iterator[str]:
    if not symbol.pitches:
        if voice > 1:
            yield f"<forward><duration>{symbol.units}</duration></forward>"
        else:
            yield f"<note><rest/>{_length(symbol, voice, '')}</note>"
        return
    for index, (pitch, velocity) in enumerate(zip(symbol.pitches, symbol.velocities, strict=True)):
        spelled = spell(pitch, key)
        chord = "<chord/>" if index else ""
        accidental = ""
        if drums is None:
            place = (
                f"<pitch><step>{spelled.letter}</step><alter>{spelled.alter}</alter>"
                f"<octave>{spelled.octave}</octave></pitch>"
            )
            accidental = _accidental(spelled, key, altered)
        else:
            place = f"<display-step>{spelled.letter}</display-step><display-octave>4</display-octave>"
            place = f"<unpitched>{place}</unpitched>"
        instrument = "" if drums is None else f'<instrument id="{drums}{pitch}"/>'
        ties = '<tie type="stop"/>' * symbol.tied_from + '<tie type="start"/>' * symbol.tied_to
        notations = ties.replace("<tie ", "<tied ")
        yield (
            f'<note dynamics="{100 * velocity / _LOUD:.2f}">{chord}{place}'
            f"{_length(symbol, voice, accidental, ties + instrument)}"
            f"{f'<notations>{notations}</notations>' if notations else ''}</note>"
        )


def _accidental(spelled: Spelled, key: Key, altered: dict[tuple[str, int], int]) -> str:
    """The sign that is printed, where a note differs from its key or from one before it in the bar."""
    place = spelled.letter, spelled.octave
    if altered.get(place, signature(key)[spelled.letter]) == spelled.alter:
        return ""
    altered[place] = spelled.alter
    return f"<accidental>{('natural', 'sharp', 'flat')[spelled.alter]}</accidental>"


def _length(symbol: Symbol, voice: int, accidental: str, ties: str = "") -> str:
    name, dots, is_triplet = VALUES[symbol.units]
    triplet = "<actual-notes>3</actual-notes><normal-notes>2</normal-notes>"
    return (
        f"<duration>{symbol.units}</duration>{ties}<voice>{voice}</voice>"
        f"<type>{name}</type>{'<dot/>' * dots}{accidental}"
        f"{f'<time-modification>{triplet}</time-modification>' if is_triplet else ''}"
    )


def read_musicxml(path: Path) -> ScoreTick:
    """
    Read MusicXML, compressed or not, in a process with bounds of time and memory. Repeats are written out.

    Raises:
        InputError: if music21 is not installed, or cannot read the file.
        MidiRefusedError: if the file cannot be read at all.
    """
    import_demo("music21")
    content = read_content(path)
    ((_, score),) = run_bounded(_read, [(path.name, content)], 1, max_seconds=_MAX_SECONDS)
    if isinstance(score, Lost):
        raise InputError(f"{path} cannot be read as MusicXML: {score.reason}: export it again")
    return score


def _read(content: bytes, mark: Mark) -> ScoreTick | Lost:
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            parsed = _parse(content)
            return _score_of(parsed) if parsed.parts else Lost("it holds no parts")
    except MemoryError:
        raise
    except Exception as error:  # music21 on a file that anybody may have made
        return Lost(shortened(f"{type(error).__name__}: {error}", 200))


def _parse(content: bytes) -> Any:
    from music21 import converter

    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if not name.startswith("META-INF/")]
            name = next(name for name in names if name.lower().endswith((".musicxml", ".xml")))
            content = archive.read(name)
    document = ElementTree.fromstring(content)
    _give_pitches(document)
    parsed: Any = converter.parseData(ElementTree.tostring(document), format="musicxml")
    has_repeats = any(True for _ in parsed.recurse().getElementsByClass(["Repeat", "RepeatBracket"]))
    return parsed.expandRepeats() if has_repeats else parsed


def _give_pitches(document: ElementTree.Element) -> None:
    """Give drums the channel and the pitches that MIDI has for them, which music21 would guess."""
    pitches: dict[str, int] = {}
    for played in document.iter("midi-instrument"):
        if number := played.findtext("midi-unpitched"):
            pitches[played.get("id", "")] = int(number) - 1
            for channel in played.findall("midi-channel"):
                channel.text = str(_DRUM_CHANNEL)
    for note in document.iter("note"):
        place, instrument = note.find("unpitched"), note.find("instrument")
        pitch = None if instrument is None else pitches.get(instrument.get("id", ""))
        if place is not None and pitch is not None:
            spelled = spell(pitch, Key(0, False))
            place.clear()
            place.tag = "pitch"
            for name, value in zip(("step", "alter", "octave"), spelled, strict=True):
                ElementTree.SubElement(place, name).text = str(value)


def _score_of(parsed: Any) -> ScoreTick:
    measures = list(parsed.parts[0].getElementsByClass("Measure"))
    meter, spans = (4, 4), []
    for measure in measures:
        if measure.timeSignature is not None:
            meter = measure.timeSignature.numerator, measure.timeSignature.denominator
        spans.append((_ticks(measure.offset), _ticks(measure.duration.quarterLength), meter))
    bars = list(bars_of(spans))
    shift = -bars[0].start
    score, before = Score(_QUARTER), None
    for bar in bars:
        if bar.meter != before:
            score.time_signatures.append(TimeSignature(bar.start + shift, *bar.meter))
        before = bar.meter
    flat = parsed.parts[0].flatten()
    for key in flat.getElementsByClass("KeySignature"):
        minor = getattr(key, "mode", "major") == "minor"
        score.key_signatures.append(KeySignature(_ticks(key.offset) + shift, key.sharps, int(minor)))
    for mark in parsed.flatten().getElementsByClass("MetronomeMark"):
        if (tempo := mark.getQuarterBPM()) is not None:
            score.tempos.append(Tempo(_ticks(mark.offset) + shift, tempo))
    for part in parsed.parts:
        score.tracks.append(_track(part, shift))
    return score


def _track(part: Any, shift: int) -> Any:
    instrument = part.getInstrument(returnDefault=True)
    elements = [element for element in part.flatten().notes if "ChordSymbol" not in element.classes]
    is_drum = instrument.midiChannel == _DRUM_CHANNEL - 1 or any(
        "Unpitched" in element.classes for element in elements
    )
    track = Track(name=part.partName or "", program=0 if is_drum else instrument.midiProgram or 0, is_drum=is_drum)
    track.notes.extend(_untied(elements, shift))
    return track


def _untied(elements: list[Any], shift: int) -> list[Any]:
    """Notes, each with those that are tied to it. music21's own `stripTies` misses ties between voices and chords."""
    notes: list[Any] = []
    held: dict[tuple[int, int], Any] = {}  # notes that are tied on, by pitch and end
    for element in sorted(elements, key=lambda element: float(element.offset)):
        start, end = (_ticks(time) + shift for time in (element.offset, element.offset + element.quarterLength))
        if end <= start:  # grace notes take no time
            continue
        for found in getattr(element, "notes", (element,)):
            pitch, kind = _pitch(found), found.tie.type if found.tie else None
            note = held.pop((pitch, start), None) if kind in ("stop", "continue") else None
            if note is None:
                velocity = found.volume.velocity or element.volume.velocity or round(127 * element.volume.realized)
                note = Note(start, end - start, pitch, max(min(velocity, 127), 1))
                notes.append(note)
            note.duration = end - note.time
            if kind in ("start", "continue"):
                held[pitch, end] = note
    return notes


def _pitch(note: Any) -> int:
    return int((note.displayPitch() if "Unpitched" in note.classes else note.pitch).midi)


def _ticks(quarters: Any) -> int:
    return round(float(quarters) * _QUARTER)
