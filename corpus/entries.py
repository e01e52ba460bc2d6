"""The files of a source, and those that are refused."""

from dataclasses import dataclass
from pathlib import Path

MUSICXML_SUFFIXES = (".mxl", ".xml")


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
        member (`int` or `str`, *optional*):
            Where it is in the archive: its offset in a tar file, its name in a zip file.
    """

    name: str
    path: Path
    size: int
    member: int | str | None = None

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
