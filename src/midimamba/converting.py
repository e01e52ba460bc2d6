"""One file of music to another, by their suffixes: MIDI, ABC, MusicXML, an engraved page, a picture, sound."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from symusic.core import ScoreTick

from midimamba.errors import InputError
from midimamba.evaluation.rendering import draw_piano_roll, import_demo
from midimamba.evaluation.sound import check_encoder, load_soundfont, render_sounds
from midimamba.files import write_whole
from midimamba.notation import write_down
from midimamba.tokenization.ingest import MUSIC_SUFFIXES, MidiRefusedError, read_unordered

_MUSICXML = (".musicxml", ".mxl", ".xml")
_PAGE = {
    "pageWidth": 2100,
    "pageHeight": 2970,
    "scale": 40,
    "adjustPageHeight": False,
}  # A4, in tenths of a millimetre
_TALLEST = 60_000  # of Verovio's pages
# The sign for a quarter note in the font that Verovio embeds, and in the fonts of the system.
_QUARTER_SIGNS = ("\ueca5", "♩")
_Writer = Callable[[ScoreTick, Path], list[str]]


def read_music(path: Path) -> tuple[ScoreTick, list[str]]:
    """
    Read a file of music of any kind that there is a reader for.

    Returns:
        `tuple[symusic.Score, list[str]]`: the score in ticks, and in plain English what was changed to read it.

    Raises:
        InputError: if the suffix is not known, the file cannot be read, or what reads it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in {*MUSIC_SUFFIXES, *_MUSICXML, ".gz"}:
        known = ", ".join(sorted({*MUSIC_SUFFIXES, *_MUSICXML}))
        raise InputError(f"{path}: files of this kind are not read: name one of {known}")
    try:
        if suffix in _MUSICXML:
            from midimamba.musicxml import read_musicxml

            return read_unordered(read_musicxml(path))
        return read_unordered(path)
    except MidiRefusedError as error:
        where = "" if error.source else f"{path}: "
        raise InputError(f"{where}{error}") from error


def writer_of(path: Path, soundfont: Path | None = None) -> _Writer:
    """
    What writes a score to a file with this suffix.

    Args:
        path (`Path`): the file.
        soundfont (`Path`, *optional*): for sound; by default the one that pretty_midi ships.

    Returns:
        A function that takes the score and the file, and returns in plain English what the format cannot say.

    Raises:
        InputError: if the suffix is not known, or what writes it is not installed. Nothing is written yet.
    """
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise InputError(f"{path}: files of this kind are not written: name one of {', '.join(_WRITERS)}")
    if suffix in (".wav", ".mp3"):
        check_encoder(suffix[1:])
        font = load_soundfont(soundfont)
        return lambda score, target: _write_sound(score, target, font)
    if soundfont is not None:
        raise InputError(f"{path} is not sound: leave out --soundfont")
    for package in _NEEDED.get(suffix, ()):
        import_demo(package, "demo" if suffix == ".png" else "notation")
    return _WRITERS[suffix]


def _write_midi(score: ScoreTick, path: Path) -> list[str]:
    write_whole(path, score.dumps_midi())
    return []


def _write_rmi(score: ScoreTick, path: Path) -> list[str]:
    midi = score.dumps_midi()
    padded = midi + b"\0" * (len(midi) % 2)
    body = b"RMIDdata" + len(midi).to_bytes(4, "little") + padded
    write_whole(path, b"RIFF" + len(body).to_bytes(4, "little") + body)
    return []


def _write_abc(score: ScoreTick, path: Path) -> list[str]:
    from midimamba.abc_page import write_abc

    page = write_down(score)
    text, lost = write_abc(page, path.stem)
    write_whole(path, text)
    return page.changes + lost


def _write_musicxml(score: ScoreTick, path: Path) -> list[str]:
    from midimamba.musicxml import compressed, write_musicxml

    page = write_down(score)
    document = write_musicxml(page, path.stem)
    write_whole(path, compressed(document) if path.suffix.lower() == ".mxl" else document)
    return page.changes


def _write_svg(score: ScoreTick, path: Path) -> list[str]:
    """One page, as tall as the music."""
    pages, changes = _engrave(score, path.stem, {**_PAGE, "pageHeight": _TALLEST, "adjustPageHeight": True})
    if len(pages) > 1:
        raise InputError(f"{path}: the music is too long for a picture of one page: name a .pdf")
    write_whole(path, pages[0])
    return changes


def _write_pdf(score: ScoreTick, path: Path) -> list[str]:
    from cairosvg import svg2pdf
    from pypdf import PdfReader, PdfWriter

    pages, changes = _engrave(score, path.stem, _PAGE)
    document = PdfWriter()
    for page in pages:
        sheet = svg2pdf(bytestring=page.replace(*_QUARTER_SIGNS).encode())
        document.add_page(PdfReader(io.BytesIO(sheet)).pages[0])
    buffer = io.BytesIO()
    document.write(buffer)
    write_whole(path, buffer.getvalue())
    return changes


def _engrave(score: ScoreTick, title: str, options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The pages as SVG, and what could not be written down."""
    import verovio

    from midimamba.musicxml import write_musicxml

    verovio.enableLog(verovio.LOG_OFF)
    page = write_down(score)
    toolkit = verovio.toolkit()
    toolkit.setOptions(options)
    if not toolkit.loadData(write_musicxml(page, title)):
        raise InputError(f"{title} cannot be engraved: Verovio does not read its notation; name a .musicxml file")
    return [toolkit.renderToSVG(number) for number in range(1, toolkit.getPageCount() + 1)], page.changes


def _write_picture(score: ScoreTick, path: Path) -> list[str]:
    draw_piano_roll(score, path, title=path.stem)
    return []


def _write_sound(score: ScoreTick, path: Path, soundfont: bytes = b"") -> list[str]:
    render_sounds({path: score}, soundfont)
    return []


_WRITERS: dict[str, _Writer] = {
    ".mid": _write_midi,
    ".midi": _write_midi,
    ".kar": _write_midi,
    ".rmi": _write_rmi,
    ".abc": _write_abc,
    ".musicxml": _write_musicxml,
    ".mxl": _write_musicxml,
    ".xml": _write_musicxml,
    ".svg": _write_svg,
    ".pdf": _write_pdf,
    ".png": _write_picture,
    ".wav": _write_sound,
    ".mp3": _write_sound,
}
_NEEDED = {".svg": ("verovio",), ".pdf": ("verovio", "cairosvg", "pypdf"), ".png": ("matplotlib.figure",)}
