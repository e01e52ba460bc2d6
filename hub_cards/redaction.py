"""Secrets and paths of this machine, removed from every file that is uploaded, whatever wrote it."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from midimamba.errors import InputError
from midimamba.text import for_json

REMOVED = "[removed]"
TEXT = frozenset({".json", ".jsonl", ".md", ".py", ".yaml"})

# What access tokens and keys look like: Hugging Face, GitHub, OpenAI and its like, Amazon, Google, Slack, signed web
# tokens, private keys, and addresses with a password in them.
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{16,}"
    r"|(?<![A-Za-z0-9])(?:gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}"
    r"|(?<![A-Za-z0-9])sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bAIza[\w-]{35}"
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^\s/:@\"']*:[^\s/@\"']+(?=@)"
)
# Names whose value is a secret. `bos_token` and its like are names of the vocabulary.
_SECRET = (
    r"(?:hub|hf|huggingface|access|auth|bearer|refresh|session|push_to_hub|github|gitlab|wandb|comet|trackio)_?token"
    r"|(?:[a-z0-9]+_)*(?:api_?key|secret_?key|access_?key|private_?key|password|passwd|secret|credentials)"
)
_NAME = re.compile(rf"(?:[a-z0-9]+_)*(?:{_SECRET}|token)", re.IGNORECASE)
_VOCABULARY = re.compile(
    r"(?:bos|eos|unk|sep|pad|cls|mask|bar|image|audio|boi|eoi|decoder_start|forced_[be]os)_token", re.IGNORECASE
)
# A secret in running text, `HF_TOKEN=…` or `"hub_token": "…"`. Not a bare `token`, which is a word of this field.
_ASSIGNED = re.compile(
    rf"(?P<before>(?<![a-z0-9])(?:{_SECRET})\\?[\"'`]?"
    r"\s*(?:=|:(?!:))\s*\\?[\"']?(?:Bearer\s+)?)(?P<value>[\w+/=.~-]{8,})",
    re.IGNORECASE,
)
# Bytes at the start of a file of safetensors that say how long its header is, and how long it can be.
_HEADER_LENGTH, _LONGEST_HEADER = 8, 100_000_000


def secrets_in_use(token: str | None) -> list[str]:
    """The token of this upload, and every value of the environment that has the name of a secret."""
    named = [value for name, value in os.environ.items() if _is_secret(name)]
    return sorted({value for value in (token or "", *named) if len(value) >= 8}, key=len, reverse=True)


def remove_secrets(folder: Path, known: Iterable[str] = ()) -> list[str]:
    """
    Replace secrets in the text files of a folder by `[removed]`, and in JSON also paths of this machine by their last
    part. A file without any stays as it is, byte for byte.

    Args:
        folder (`Path`): what will be uploaded, not the user's own files.
        known (`Iterable[str]`, *optional*): secrets to look for as they are; others are found by name or by shape.

    Returns:
        `list[str]`: the files that had secrets.

    Raises:
        InputError: if a file that is not text has one, or a text file is not UTF-8.
    """
    changed = []
    known = list(known)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix not in TEXT:
            _check_binary(file, name, known)
            continue
        try:
            text = file.read_bytes().decode("utf-8-sig" if file.suffix == ".json" else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not text in UTF-8: write it again") from error
        clean = _clean_file(text, file.suffix, known)
        if clean != text:
            file.write_bytes(clean.encode())
            changed.append(name)
    return changed


def _clean_file(text: str, suffix: str, known: list[str]) -> str:
    if suffix == ".json":
        return _clean_json(text, known, indent=2)
    if suffix == ".jsonl":
        lines = text.split("\n")
        return "\n".join(_clean_json(line, known) if line.strip() else line for line in lines)
    return _clean_text(text, known)


def _clean_json(text: str, known: list[str], indent: int | None = None) -> str:
    """Also finds what JSON can hide: escaped signs, and a key that is given twice."""
    found = False

    def clean_value(value: Any) -> Any:
        nonlocal found
        if isinstance(value, list):
            return [clean_value(item) for item in value]
        if not isinstance(value, str):
            return value
        clean = _clean_text(_without_path(value), known)
        found = found or clean != value
        return clean

    def clean_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        result: dict[str, Any] = {}
        for name, value in pairs:
            if isinstance(value, str) and value and _is_secret(name):
                found, value = True, REMOVED
            found = found or name in result
            result[clean_value(name)] = clean_value(value)
        return result

    try:
        content = clean_value(json.loads(text, object_pairs_hook=clean_pairs))
    except (ValueError, RecursionError):
        return _clean_text(text, known)
    return for_json(content, indent) + "\n" * (indent is not None) if found else text


def _without_path(value: str) -> str:
    """The last part of a path of this machine, and any other text as it is."""
    try:
        path = Path(value)
        is_here = path.is_absolute() and len(path.parts) > 2 and path.exists()
    except (OSError, ValueError):  # too long for a path, or with signs that no path has
        return value
    return path.name if is_here else value


def _clean_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, REMOVED)
    return _ASSIGNED.sub(rf"\g<before>{REMOVED}", _SHAPES.sub(REMOVED, text))


def _is_secret(name: str) -> bool:
    name = name.replace("-", "_")
    return bool(_NAME.fullmatch(name) or name.lower().endswith("_token")) and not _VOCABULARY.fullmatch(name)


def _check_binary(file: Path, name: str, known: list[str]) -> None:
    """Refuse sound, pictures and weights that hold a secret: there it cannot be cut out."""
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":  # of the weights, only the header is text
            length = int.from_bytes(opened.read(_HEADER_LENGTH), "little")
            content = opened.read(min(length, _LONGEST_HEADER))
        else:
            content = opened.read()
    text = content.decode("latin-1")
    if _SHAPES.search(text) or any(secret.encode() in content for secret in known):
        raise InputError(f"{name} holds what looks like an access token or a password: write the file without it")
