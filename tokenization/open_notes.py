"""Notes that are started and never ended: in MIDI files and in ids of MIDILike.

symusic and MidiTok leave them out without a word.
"""

from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise

from miditok import MusicTokenizer
from symusic.core import ScoreTick

_END_OF_TRACK = b"\xff\x2f\x00"
# All notes of all channels, off, each at once after the last: a status byte for every channel, then pairs of pitch and
# velocity. The first has the time of the end of the track.
_ALL_OFF = b"\x00".join(
    bytes([0x80 | channel]) + b"\x00".join(bytes([pitch, 0]) for pitch in range(128)) for channel in range(16)
)


def close_notes(content: bytes, score: ScoreTick, parse: Callable[[bytes], ScoreTick]) -> tuple[ScoreTick, int]:
    """End the notes that a file leaves open.

    Each ends where another note of its pitch in its track does, or else with the track, but not after everything else.

    Args:
        content (`bytes`):
            A well-formed MIDI file.
        score (`symusic.Score`):
            What `parse` makes of it.
        parse (`Callable[[bytes], symusic.Score]`):
            Reads the content of a file.

    Returns:
        `tuple[symusic.Score, int]`: the score, and how many notes were open.
    """
    closed_content = _with_all_off(content)
    if closed_content is None:
        return score, 0
    closed = parse(closed_content)
    opened = closed.note_num() - score.note_num()
    if opened <= 0:
        return score, 0
    known = Counter(chain.from_iterable(_notes(score)))
    latest = score.end()
    for track, notes in zip(closed.tracks, _notes(closed), strict=True):
        known.subtract(notes)
        ended = list(track.notes)
        for note, key in zip(track.notes, notes, strict=True):
            if known[key] >= 0:
                continue
            known[key] += 1
            ends = [other.end for other in ended if other.pitch == note.pitch and note.time < other.end < note.end]
            limit = max(latest, note.time + closed.ticks_per_quarter)
            note.duration = min(ends, default=min(note.end, limit)) - note.time
    return closed, opened


def _notes(score: ScoreTick) -> list[list[tuple[int, ...]]]:
    return [
        [(track.is_drum, track.program, note.time, note.duration, note.pitch, note.velocity) for note in track.notes]
        for track in score.tracks
    ]


def _with_all_off(content: bytes) -> bytes | None:
    """The file with every note ended at the end of every track, or `None` if its tracks do not end as they should."""
    position = 8 + int.from_bytes(content[4:8], "big")
    parts = [content[:position]]
    while position < len(content):
        kind, length = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "big")
        body = content[position + 8 : position + 8 + length]
        position += 8 + length
        if kind == b"MTrk":
            if len(body) != length or not body.endswith(_END_OF_TRACK):
                return None
            body = body[:-3] + _ALL_OFF + b"\x00" + _END_OF_TRACK
        parts += [kind, len(body).to_bytes(4, "big"), body]
    return b"".join(parts)


def end_notes(tokenizer: MusicTokenizer, ids: list[int]) -> list[int]:
    """Base ids of MIDILike with ends for the notes that they leave open: where they stop, or else a step later.

    A start without a velocity after it, such as where the ids are cut off, is left out: MidiTok would take the number
    of whatever follows, which may be no velocity that MIDI has.
    """
    if tokenizer.config.use_velocities:
        texts = [*tokenizer._ids_to_tokens(ids), ""]
        ids = [
            index
            for index, (text, following) in zip(ids, pairwise(texts), strict=True)
            if not text.startswith(("NoteOn_", "DrumOn_")) or following.startswith("Velocity_")
        ]
    tokens = tokenizer._ids_to_tokens(ids)
    program, time = 0, 0
    opened: dict[tuple[int, str, str], list[int]] = {}
    for token in tokens:
        kind, value = token.split("_")
        if kind == "Program":
            program = int(value)
        elif kind in ("TimeShift", "Rest"):
            time += 1
        elif kind in ("NoteOn", "DrumOn") and program in tokenizer.config.use_note_duration_programs:
            opened.setdefault((program, kind.replace("On", "Off"), value), []).append(time)
        elif kind in ("NoteOff", "DrumOff"):
            del opened.get((program, kind, value), [])[:1]
    parts: tuple[list[str], list[str]] = [], []  # of notes that began earlier, and of those that begin where ids stop
    for (program, kind, value), onsets in opened.items():
        for onset in onsets:
            parts[onset == time].extend([f"Program_{program}", f"{kind}_{value}"])
    shortest = ".".join(map(str, tokenizer.durations[0]))
    ends = parts[0] + ([f"TimeShift_{shortest}", *parts[1]] if parts[1] else [])
    return [*ids, *(tokenizer.vocab[token] for token in ends)]
