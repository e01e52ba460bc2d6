"""The samples of a repository on its card: piano rolls, players and MIDI files."""

from pathlib import Path

from midimamba.text import for_link, for_markdown

PUBLISHED_SAMPLES = ("samples/*.png", "samples/*.wav", "samples/*.mp3", "samples/*.mid")
_SOUNDS = (".mp3", ".wav")  # browsers play both; the first is smaller


def gallery(folder: Path, repo_id: str) -> str:
    """
    The samples in `folder/samples` as Markdown: for each its piano roll, a player, and a link to the MIDI file, as far
    as there are any.

    Args:
        folder (`Path`): what is uploaded.
        repo_id (`str`): `"owner/name"`. A player needs the whole address, because the Hub completes only those of
            pictures and links.
    """
    names = sorted({file.stem for pattern in PUBLISHED_SAMPLES for file in folder.glob(pattern)})
    return "\n\n".join(_sample(folder, repo_id, name) for name in names)


def _sample(folder: Path, repo_id: str, name: str) -> str:
    def there(suffix: str) -> bool:
        return (folder / "samples" / f"{name}{suffix}").exists()

    link = for_link(f"samples/{name}")
    parts = [f"![Piano roll of {for_markdown(name)}]({link}.png)"] if there(".png") else [for_markdown(name)]
    sound = next(filter(there, _SOUNDS), None)
    if sound:
        address = f"https://huggingface.co/{repo_id}/resolve/main/{link}{sound}"
        parts.append(f'<audio controls src="{address}"></audio>')
    links = [
        f"[{kind}]({link}{suffix})"
        for suffix, kind in ((".mid", "MIDI"), (sound, "sound"))
        if suffix and there(suffix)
    ]
    return "\n\n".join([*parts, " · ".join(links)] if links else parts)
