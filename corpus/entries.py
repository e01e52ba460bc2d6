"""The files of a source: those to read, those that are refused, and those that are skipped."""

import re
from dataclasses import dataclass
from pathlib import Path

MUSICXML_SUFFIXES = (".mxl", ".xml")
# Why a file is skipped whose suffix is not worth a count of its own.
OTHER_SUFFIXES = "not MIDI (other suffixes)"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source.

    Args:
        name (`str`):
            The path within the source; of a member of an archive, the archive's with the member's appended.
        path (`Path`):
            The file, or the archive that it is in.
        size (`int`):
            In bytes, as the folder or the archive says.
        member (`int`, `str` or `bytes`, *optional*):
            Where it is in the archive: its offset in a tar file, its name in a zip file, its offset in a book of
            tunes. For a file in an archive in
            an archive, a JSON list of place, size and name of the inner archive, and the place in that.
    """

    name: str
    path: Path
    size: int
    member: int | str | bytes | None = None

    @property
    def is_musicxml(self) -> bool:
        """Whether it is one of music21's chorales; everything else is MIDI."""
        return self.member is None and self.path.suffix in MUSICXML_SUFFIXES


@dataclass(frozen=True)
class Refusal:
    """A file that is not used.

    Args:
        name (`str`):
            As in [`Entry`].
        sha256 (`str`, *optional*):
            Of its bytes, if they could be read.
        stage (`str`):
            `"read"`, `"check"` or `"tokenize"`.
        reason (`str`):
            Why, in plain words.
    """

    name: str
    sha256: str | None
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """Files that are not used and need no row each: their names say that they hold no MIDI.

    Args:
        reason (`str`):
            Why, in plain words.
        count (`int`, *optional*, defaults to 1):
            How many.
    """

    reason: str
    count: int = 1


# A run of backslashes before what looks like an escape, or before what will be one.
_BACKSLASHES = re.compile(r"\\+(?=ud[89a-f][0-9a-f]{2}|[\ud800-\udfff])")


def unique_name(name: str) -> str:
    r"""A name as text. Bytes that are not text, which Python keeps as surrogates, become `\udc80` to `\udcff`.

    They could be neither written as JSON nor stored by Arrow. Backslashes before what looks like such an escape are
    doubled, so that different names stay different.
    """
    return _BACKSLASHES.sub(lambda found: found[0] * 2, name).encode(errors="backslashreplace").decode()
