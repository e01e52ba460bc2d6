"""Where music comes from: a folder, an archive, a folder with archives in it, or the chorales of music21.

Files of ABC notation are read like archives, whose members are tunes.

Archives, and archives in them, are read as they are. Nothing is unpacked to the disk, so the names of members are only
names, whatever path they claim.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, cast

from midimamba.corpus.archives import (
    ARCHIVE_SUFFIXES,
    BOOK_SUFFIX,
    MAX_MEMBERS,
    Archive,
    Budget,
    Member,
    TuneBook,
    describe,
    is_archive,
    kind_of,
    opened,
    read_member,
)
from midimamba.corpus.chorales import OTHERS
from midimamba.corpus.entries import MUSICXML_SUFFIXES, OTHER_SUFFIXES, Entry, Refusal, Skipped, unique_name
from midimamba.corpus.folders import walk
from midimamba.corpus.manifests import Label, is_manifest, read_manifests
from midimamba.errors import InputError
from midimamba.tokenization.ingest import MidiRefusedError, is_midi, open_regular, read_content

CHORALES = "chorales"
NO_MUSIC21 = 'the chorales come with music21: pip install "midimamba[demo]"'
# Files of a data set, which is read as one only where no MIDI file is.
DATA_SUFFIXES = (".parquet", ".arrow")
# These may hold music as well, but Python cannot read them.
_OTHER_ARCHIVES = (".7z", ".rar", ".tar.zst", ".tar.lz", ".tar.lz4", ".tar.z", ".lha", ".lzh", ".sit", ".cab", ".dmg")
# A suffix of more characters, the dot included, is the end of a title.
_MAX_SUFFIX = 8
_REPLACED = "a member of an archive with the name of a later one"
_Item = Entry | Refusal | Skipped
# An entry, and the way to it: its place in an archive, or the four parts of `Entry.member`.
_Wanted = tuple[Entry, list[int | str]]


def list_source(source: str, columns: Sequence[str] = ()) -> Iterator[Entry | Refusal | Skipped | Label]:
    """The MIDI files of a source in any order, what else there is in it, and what its manifests say about files.

    Names are unique. Every file of the source, those in archives included, is in exactly one of the items.

    Args:
        source (`str`):
            A folder, searched recursively, linked folders and archives included; an archive; or `chorales`.
        columns (sequence of `str`, *optional*):
            Columns of manifests to read as labels.

    Raises:
        InputError: if it isn't one of these, is a broken archive, or has a manifest that makes no sense.
    """
    if source == CHORALES:
        yield from _find_chorales()
        return
    manifests: dict[str, Entry] = {}
    for item in _list_files(source):
        if isinstance(item, Refusal) and is_manifest(item.name):
            raise InputError(f"{item.name}: {item.reason}; mend it or delete it")  # or its splits would be ignored
        if isinstance(item, Entry) and is_manifest(item.name):
            manifests[item.name] = item
            yield Skipped("a manifest")
        else:
            yield item
    yield from read_manifests(read_entries(manifests.values()), source, columns)


def midi_files(folder: Path) -> list[Path]:
    """All MIDI files of a folder and its subfolders, linked ones included, by name. Archives are not opened."""
    files = (item for item in walk(folder) if not isinstance(item, Refusal))
    return sorted(path for name, path, _ in files if _is_wanted(name) and is_midi(name))


def holds_data_set(folder: Path) -> bool:
    """Whether a folder holds files of a data set, and no MIDI file, neither by itself nor in an archive."""
    archives, found = [], False
    for item in walk(folder):
        if not isinstance(item, Refusal):
            name, path, _ = item
            if _is_wanted(name) and is_midi(name):
                return False
            if _is_wanted(name) and is_archive(name):
                archives.append(path)
            found |= name.lower().endswith(DATA_SUFFIXES)
    return found and not any(isinstance(item, Entry) for path in archives for item in _list_archive(path, ""))


def read_entries(entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | MidiRefusedError]]:
    """The bytes of every entry, or why there are none. An archive is opened once for all entries in a row."""
    for path, group in groupby(entries, key=lambda entry: entry.path):
        members = list(group)
        if members[0].member is None:
            yield from zip(members, map(_read_file, members), strict=True)
            continue
        # In the order in which they lie in the archive, so that a compressed file is read once.
        wanted = sorted(((entry, _way_to(entry)) for entry in members), key=lambda pair: pair[1])
        try:
            with open_regular(path) as file:
                yield from _read_archive(file, path.name, Budget(path.stat().st_size), wanted)
        except (MidiRefusedError, OSError) as error:  # the archive was there when it was listed
            reason = error.reason if isinstance(error, MidiRefusedError) else describe(error)
            yield from ((entry, MidiRefusedError(reason)) for entry, _ in wanted)


def _list_files(source: str) -> Iterator[_Item]:
    path = Path(source)
    if path.is_dir():
        for item in walk(path):
            if isinstance(item, Refusal):
                yield item
            else:
                yield from _list_file(*item)
        return
    if not (path.is_file() and is_archive(path.name)):
        raise InputError(
            f"{source} is not a folder, an archive ({', '.join(ARCHIVE_SUFFIXES)}), tunes ({BOOK_SUFFIX}) or "
            f"a data set on the Hub (owner/name): name one with MIDI files, or write {CHORALES}"
        )
    try:
        yield from _list_archive(path, unique_name(path.name), alone=True)
    except MidiRefusedError as error:
        raise InputError(f"{source}: {error.reason}") from error


def _list_file(name: str, path: Path, size: int) -> Iterable[_Item]:
    if _is_wanted(name) and is_archive(name):
        return _list_archive(path, name)
    return [_by_name(Entry(name, path, size))]


def _list_archive(path: Path, name: str, alone: bool = False) -> list[_Item]:
    """What an archive holds. If it is broken: it itself, refused.

    Raises:
        MidiRefusedError: if it is broken and `alone`, the whole source.
    """
    try:
        with open_regular(path) as file:
            budget = Budget(path.stat().st_size)
            with opened(file, path.name, budget) as archive:
                return _list_members(archive, Entry(name, path, 0), budget)
    except MidiRefusedError as error:
        if alone:
            raise
        return [Refusal(name, _digest_of(path), "read", error.reason)]


def _list_members(archive: Archive, outer: Entry, budget: Budget, way: Sequence[int | str] = ()) -> list[_Item]:
    """What an archive holds: `outer`, or one in it, to which `way` leads.

    Raises:
        MidiRefusedError: if it is broken.
    """
    items: dict[str, Entry | Refusal] = {}
    skipped: dict[str, int] = {}
    for count, member in enumerate(archive.members(), 1):
        if count > MAX_MEMBERS:
            raise MidiRefusedError(f"it holds more than {MAX_MEMBERS:,} files")
        for item in _list_member(archive, member, outer, budget, way):
            if isinstance(item, Skipped):
                skipped[item.reason] = skipped.get(item.reason, 0) + item.count
            else:
                if items.pop(item.name, None):
                    skipped[_REPLACED] = skipped.get(_REPLACED, 0) + 1
                items[item.name] = item
    if not items and not skipped:
        skipped["an empty archive"] = 1
    return [*items.values(), *(Skipped(reason, count) for reason, count in skipped.items())]


def _list_member(
    archive: Archive, member: Member, outer: Entry, budget: Budget, way: Sequence[int | str]
) -> Iterable[_Item]:
    name = f"{outer.name}/{unique_name(member.name)}"
    place = json.dumps([*way, member.place]).encode() if way else member.place
    if isinstance(archive, TuneBook):
        return [Entry(name if member.name else outer.name, outer.path, member.size, place)]
    item = _by_name(Entry(name, outer.path, member.size, place))
    if isinstance(item, Entry) and member.defect:
        return [Refusal(name, None, "read", member.defect)]
    if not (isinstance(item, Entry) and is_archive(name)):
        return [item]
    if way and kind_of(name) != BOOK_SUFFIX:
        return [Refusal(name, None, "read", "it is an archive in an archive in an archive: unpack one of them")]
    content = read_member(archive, member.place, member.size)
    if isinstance(content, MidiRefusedError):
        return [Refusal(name, None, "read", content.reason)]
    try:
        with opened(io.BytesIO(content), name, budget) as inner:
            way = (*way, member.place, member.size, kind_of(name))
            return _list_members(inner, Entry(name, outer.path, 0), budget, way)
    except MidiRefusedError as error:
        return [Refusal(name, hashlib.sha256(content).hexdigest(), "read", error.reason)]


def _by_name(entry: Entry) -> _Item:
    """A file by its name alone: an entry if it is a MIDI file, a manifest or an archive."""
    name = PurePosixPath(entry.name).name.lower()
    if not _is_wanted(entry.name):
        return Skipped("a resource fork of macOS")
    if is_midi(name) or is_manifest(entry.name) or is_archive(name):
        return entry
    if name.endswith(_OTHER_ARCHIVES):
        return Refusal(entry.name, None, "read", "archives of this kind are not read: unpack it")
    suffix = PurePosixPath(name).suffix
    if suffix in DATA_SUFFIXES:
        return Skipped(f"a data set's file beside MIDI files ({suffix})")
    usual = suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= _MAX_SUFFIX
    return Skipped(f"not MIDI ({suffix or 'no suffix'})" if usual or not suffix else OTHER_SUFFIXES)


def _is_wanted(name: str) -> bool:
    """macOS writes `__MACOSX/._name` beside a file into archives, and `._name` on other systems' disks."""
    parts = name.split("/")
    return not parts[-1].startswith("._") and "__MACOSX" not in parts


def _way_to(entry: Entry) -> list[int | str]:
    place = entry.member
    return json.loads(place) if isinstance(place, bytes) else [cast(int | str, place)]


def _read_archive(
    file: IO[bytes], name: str, budget: Budget, wanted: list[_Wanted]
) -> Iterator[tuple[Entry, bytes | MidiRefusedError]]:
    done = 0
    try:
        with opened(file, name, budget) as archive:
            for way, group in groupby(wanted, key=lambda pair: pair[1][:3]):
                for item in _read_at(archive, way, list(group), budget):
                    yield item
                    done += 1
    except MidiRefusedError as error:
        yield from ((entry, error) for entry, _ in wanted[done:])


def _read_at(
    archive: Archive, way: list[int | str], wanted: list[_Wanted], budget: Budget
) -> Iterator[tuple[Entry, bytes | MidiRefusedError]]:
    """A member, or all that is wanted of an archive in the archive."""
    place, *rest = way
    if not rest:
        yield from ((entry, read_member(archive, place, entry.size)) for entry, _ in wanted)
        return
    size, kind = cast(tuple[int, str], rest)
    content = read_member(archive, place, size)
    if isinstance(content, MidiRefusedError):
        yield from ((entry, content) for entry, _ in wanted)
        return
    yield from _read_archive(io.BytesIO(content), kind, budget, [(entry, full[3:]) for entry, full in wanted])


def _read_file(entry: Entry) -> bytes | MidiRefusedError:
    try:
        return read_content(entry.path)
    except MidiRefusedError as error:
        return error


def _digest_of(path: Path) -> str | None:
    """Of a file that is small enough to be read."""
    try:
        return hashlib.sha256(read_content(path)).hexdigest()
    except MidiRefusedError:
        return None


def _find_chorales() -> Iterator[Entry]:
    try:
        with redirect_stderr(io.StringIO()):  # music21 comments on other packages that one might install
            from music21 import corpus
    except ImportError as error:
        raise InputError(NO_MUSIC21) from error
    # Three more are Humdrum encodings (.krn) of chorales that are also there as MusicXML; one of them does not parse.
    paths = [Path(path) for path in corpus.getComposer("bach") if Path(path).suffix in MUSICXML_SUFFIXES]
    for path in paths:
        if path.stem not in OTHERS:
            yield Entry(f"bach/{path.stem}", path, path.stat().st_size)
