"""A Space of the Hub: the page of `midimamba app` for one model."""

from importlib.resources import files
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from midimamba.errors import InputError
from midimamba.files import whole_folder

from .provenance import on_hub
from .upload import Hub, Upload, check_name, scratch_folder

# The versions with which the page is tested. The Hub installs Gradio itself.
SDK_VERSION = "6.31.0"
_PYTHON_VERSION = "3.12"
_PORT = 7860  # the one that the Hub shows
_REQUIREMENTS = "midimamba[app] @ git+https://github.com/midimamba/midimamba\n"
_APP = '''"""The page of {model}."""

from midimamba.cli import main

main(["app", "{model}", "--host", "0.0.0.0", "--port", "{port}", "--no-browser"])
'''


def write_space(model: str, out: Path) -> None:
    """
    Make the folder of a Space.

    Args:
        model (`str`): the generator's repository on the Hub, as `"owner/name"`.
        out (`Path`): the folder to make. It appears once it is complete.

    Raises:
        InputError: if `model` is not the name of a repository.
        FileExistsError: if `out` exists and is not an empty folder.
    """
    _check_model(model)
    with whole_folder(out) as folder:
        _fill(folder, model)


def publish_space(model: str, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """
    Make a Space on the Hub, or bring one up to date.

    Args:
        model (`str`): the generator's repository on the Hub, as `"owner/name"`.
        repo_id (`str`): the Space's, as `"owner/name"`, or `"name"` for the owner of the token.
        private (`bool`, *optional*, defaults to `False`): whether a Space that is created is private.
        token (`str`, *optional*): the token for the Hub; that of `hf auth login` by default.

    Returns:
        `str`: its address.

    Raises:
        InputError: if a name is impossible, or if the Hub cannot be reached or refuses.
    """
    _check_model(model)
    check_name(repo_id)
    hub = Hub(token)
    with scratch_folder() as folder:
        _fill(folder, model)
        return hub.send(hub.prepare([Upload("space", repo_id, folder)]), private)["space"]


def _check_model(model: str) -> None:
    if Path(model).exists():
        raise InputError(
            f"{model} is a folder of this machine, which a Space cannot read: publish it with `midimamba publish "
            f"{model} --repo OWNER/NAME`, then name that repository"
        )
    if on_hub(model) is None:
        raise InputError(f"{model!r} is not the name of a model on the Hub: write it as owner/name")
    check_name(model)


def _fill(folder: Path, model: str) -> None:
    name = model.split("/")[-1]
    data = SpaceCardData(
        title=name,
        emoji="🎼",
        colorFrom="blue",
        colorTo="gray",
        sdk="gradio",
        sdk_version=SDK_VERSION,
        python_version=_PYTHON_VERSION,
        app_file="app.py",
        models=[model],
        tags=["midi", "music", "music-generation"],
        pinned=False,
    )
    template = (files("midimamba.hub_cards") / "space_card.md").read_text(encoding="utf-8")
    SpaceCard.from_template(data, template_str=template, repo_name=name, model=model).save(folder / "README.md")
    (folder / "app.py").write_text(_APP.format(model=model, port=_PORT), encoding="utf-8")
    (folder / "requirements.txt").write_text(_REQUIREMENTS, encoding="utf-8")
