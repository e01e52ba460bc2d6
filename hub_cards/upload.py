"""What will be uploaded, complete in a scratch folder, and the Hub that it goes to: check first, then create."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    ModelCard,
    RepoCard,
    SpaceCard,
    get_session,
    get_token,
)
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from midimamba.errors import InputError, reaching_hub
from midimamba.files import locked
from midimamba.text import printable

from .redaction import remove_secrets, secrets_in_use

# Seconds to wait for the next sign of life of the Hub. Its client would wait for ever.
PATIENCE = 120.0
_CARDS: dict[str, type[RepoCard]] = {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}
_FOLDERS = {"model": "", "dataset": "datasets/", "space": "spaces/"}  # in addresses
_LICENSE_SIGNS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-+")
_LONGEST_LICENSE = 40


class Upload(NamedTuple):
    """
    One repository and all that goes into it.

    Args:
        kind (`str`): `"generator"`, `"discriminator"`, `"musical-discriminator"`, `"corpus"` or `"space"`.
        repo_id (`str`): `"owner/name"`.
        folder (`Path`): a scratch folder; every file in it is uploaded.
        stale (`str`, *optional*): pattern of files in the repository that this upload replaces.
    """

    kind: str
    repo_id: str
    folder: Path
    stale: str | None = None

    @property
    def repo_type(self) -> str:
        return {"corpus": "dataset", "space": "space"}.get(self.kind, "model")


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A folder for what is uploaded, removed afterwards, or by the next run if this one is killed.

    The disk of `folder` has room for a second one; the temporary folder of the system may be small, or in memory.

    Raises:
        InputError: if another run is publishing `folder`.
    """
    folder = folder.resolve()
    if not os.access(folder.parent, os.W_OK):
        with scratch_folder() as scratch:
            yield scratch
        return
    place = folder.with_name(f".{folder.name}.publish")
    with locked(place):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder among the system's temporary ones, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="publish-") as scratch:
        yield Path(scratch)


def copy_known(source: Path, patterns: Iterable[str], target: Path) -> None:
    """
    Copy the files of `source` that match a pattern to the same places in `target`.

    Raises:
        InputError: if one is a link or in a folder that is a link, wherever it points, or is not a file.
    """
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            copy_file(source, file, target / file.relative_to(source))


def copy_file(root: Path, file: Path, target: Path, may_be_empty: bool = False) -> None:
    """
    Copy a file that lies in `root`.

    Raises:
        InputError: if it, or a folder between `root` and it, is a link, if it is not a file or is empty, or if its
            name has signs that cannot be seen.
    """
    refuse_links(root, file)
    if printable(target.name) != target.name:
        raise InputError(f"{file} has signs in its name that cannot be seen: rename it")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A link that takes the place of the file now is refused by the system, and a pipe does not block.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(file, flags), "rb") as reader:
        status = os.fstat(reader.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{file} is not a file: remove it or write it again")
        if status.st_size == 0 and not may_be_empty:
            raise InputError(f"{file} is empty: write it again")
        with target.open("wb") as writer:
            shutil.copyfileobj(reader, writer)


def refuse_links(root: Path, file: Path) -> None:
    """Refuse a file in `root` that is a link or is reached through one: it could be any file of this machine."""
    inside = file.relative_to(root)
    if ".." in inside.parts:
        raise InputError(f"{file} is outside {root}: only files in that folder are published")
    for part in (inside, *inside.parents):
        if part.name and (root / part).is_symlink():
            raise InputError(
                f"{root / part} is a link, and links are not published: put what it points to in its place"
            )


def left_out(source: Path, patterns: Iterable[str]) -> list[str]:
    """The files in `source` that match no pattern, by name. A folder without any match is one name."""
    patterns = list(patterns)
    known = {file for pattern in patterns for file in source.glob(pattern)}
    folders = {parent for file in known for parent in file.parents}
    names = []
    for place in (source, *sorted(folder for folder in folders if source in folder.parents)):
        for entry in sorted(place.iterdir()):
            if entry not in known | folders:
                names.append(entry.relative_to(source).as_posix() + "/" * (entry.is_dir() and not entry.is_symlink()))
    return names


def check_license(license: str | None) -> None:
    """Refuse what cannot be the Hub's name of a licence."""
    if license is not None and not (0 < len(license) <= _LONGEST_LICENSE and set(license) <= _LICENSE_SIGNS):
        raise InputError(f"{license!r} is not a licence that the Hub knows: write its name there, such as cc-by-4.0")


def check_name(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{repo_id!r} cannot be the name of a repository ({reason}): choose another") from error


@contextmanager
def _patiently() -> Iterator[None]:
    """Give up on a Hub that does not answer for [`PATIENCE`] seconds."""
    session = get_session()
    before = session.timeout
    session.timeout = PATIENCE
    try:
        yield
    finally:
        session.timeout = before


class Hub:
    """
    The Hub, as far as publishing needs it. Nothing is created or changed there before [`send`].

    Args:
        token (`str`, *optional*): that of `hf auth login` by default.
    """

    def __init__(self, token: str | None = None) -> None:
        self._token = token or get_token()
        self._api = HfApi(token=self._token)

    def resolve(self, uploads: Sequence[Upload]) -> list[Upload]:
        """
        The uploads with full names of their repositories: a name without an owner is the owner of the token's.

        Raises:
            InputError: if there is no token, or if it may only read.
        """
        purpose = f"{uploads[0].repo_id} cannot be published"
        try:
            with _patiently(), reaching_hub(purpose):
                user = self._api.whoami()
        except LocalTokenNotFoundError as error:
            raise InputError(f"{purpose}: there is no token: log in with `hf auth login` or set HF_TOKEN") from error
        access = user.get("auth", {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise InputError(f"{purpose}: your token may only read: make one that may write, then `hf auth login`")
        return [
            upload if "/" in upload.repo_id else upload._replace(repo_id=f"{user['name']}/{upload.repo_id}")
            for upload in uploads
        ]

    def prepare(self, uploads: Sequence[Upload]) -> list[Upload]:
        """The uploads with full names, after secrets were removed from their files: cards are made of what is left."""
        known = secrets_in_use(self._token)
        for upload in uploads:
            remove_secrets(upload.folder, known)
        return self.resolve(uploads)

    def send(self, uploads: Sequence[Upload], private: bool) -> dict[str, str]:
        """
        Check all repositories and cards; then create and fill one repository after the other, each in one commit.

        Returns:
            `dict[str, str]`: the address of each repository, by `kind`.

        Raises:
            InputError: if the Hub cannot be reached or refuses; the message says what was done before.
        """
        with _patiently():
            return self._send(uploads, private)

    def _send(self, uploads: Sequence[Upload], private: bool) -> dict[str, str]:
        for upload in uploads:
            self._check_card(upload)
        exists = {upload: self._exists(upload, private) for upload in uploads}
        done: dict[str, str] = {}
        for upload in uploads:
            try:
                done[upload.kind] = self._publish(upload, exists[upload], private)
            except InputError as error:
                if not done:
                    raise
                raise InputError(f"{error}; published before that: {', '.join(done.values())}") from error
        return done

    def _check_card(self, upload: Upload) -> None:
        kind = _CARDS[upload.repo_type]
        card = read_card(kind, upload.folder / "README.md", "README.md")
        try:
            with reaching_hub(f"the card of {upload.repo_id} cannot be checked"):
                card.validate(upload.repo_type)
        except InputError:
            raise
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"the Hub refuses the card of {upload.repo_id} ({reason}): correct its README.md"
            ) from error

    def _exists(self, upload: Upload, private: bool) -> bool:
        """Whether the repository exists. A public one is refused where a private one is asked for."""
        try:
            with reaching_hub(f"{upload.repo_id} cannot be looked up"):
                try:
                    found = self._api.repo_info(upload.repo_id, repo_type=upload.repo_type)
                except RepositoryNotFoundError:
                    return False
        except InputError:
            raise
        if private and found.private is False:
            raise InputError(
                f"{upload.repo_id} exists and is public: make it private in its settings on the Hub, "
                "choose another name, or leave out --private"
            )
        return True

    def _publish(self, upload: Upload, exists: bool, private: bool) -> str:
        repo_id, repo_type = upload.repo_id, upload.repo_type
        if not exists:
            with reaching_hub(f"{repo_id} cannot be created"):
                sdk = "gradio" if repo_type == "space" else None
                self._api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=sdk)
        state = "is as it was" if exists else "was created and is empty"
        with reaching_hub(f"nothing was uploaded to {repo_id}, which {state}"):
            # Not `upload_folder`, which makes several commits of a large folder.
            self._api.create_commit(
                repo_id, self._operations(upload, exists), commit_message="Publish with midimamba", repo_type=repo_type
            )
        return f"{self._api.endpoint}/{_FOLDERS[repo_type]}{repo_id}"

    def _operations(self, upload: Upload, exists: bool) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Every file of the upload, and the removal of those that it replaces."""
        files = {
            file.relative_to(upload.folder).as_posix(): file for file in upload.folder.rglob("*") if file.is_file()
        }
        stale: set[str] = set()
        if exists and upload.stale is not None:
            there = self._api.list_repo_files(upload.repo_id, repo_type=upload.repo_type)
            stale = {name for name in there if fnmatch(name, upload.stale)} - set(files)
        return [
            *(CommitOperationDelete(name) for name in sorted(stale)),
            *(CommitOperationAdd(name, file) for name, file in sorted(files.items())),
        ]


def read_card(kind: type[RepoCard], file: Path, name: str) -> RepoCard:
    """
    Read a card, and check its metadata.

    Raises:
        InputError: if it is not text, or its metadata are not YAML that a card can have.
    """
    try:
        return kind(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name} has no metadata that can be read ({reason}): correct the lines above its text"
        ) from error
