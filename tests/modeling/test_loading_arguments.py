"""Arguments of `from_pretrained`: what transformers passes on is taken, and what nobody knows is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from midimamba import (
    MidiDiscriminator,
    MidiDiscriminatorConfig,
    MidiMambaConfig,
    MidiMambaForCausalLM,
    MusicalDiscriminatorConfig,
)
from support import make_discriminator, make_generator


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "mamba": make_generator(),
        "moe-mamba": make_generator(layout="moe-mamba"),
        "discriminator": make_discriminator(),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in made}


def test_an_unknown_field_is_refused_in_one_line(folders: dict[str, Path]) -> None:
    for kind, folder in (
        (MidiMambaConfig, folders["mamba"]),
        (MidiMambaConfig, folders["moe-mamba"]),
        (AutoConfig, folders["moe-mamba"]),
        (MidiDiscriminatorConfig, folders["discriminator"]),
        (AutoConfig, folders["discriminator"]),
    ):
        with pytest.raises(ValueError, match=r"^Midi\w+Config has no field hiden_size: write hidden_size$"):
            kind.from_pretrained(folder, hiden_size=8)
        config, unused = kind.from_pretrained(folder, hiden_size=8, output_attentions=False, return_unused_kwargs=True)
        assert unused == {"hiden_size": 8}
        assert not hasattr(config, "hiden_size")
    assert MidiMambaConfig.from_pretrained(folders["moe-mamba"], capacity_factor=2.5).capacity_factor == 2.5
    with pytest.raises(ValueError, match="has no field colour: leave it out"):
        MidiMambaConfig.from_pretrained(folders["mamba"], colour="red")


def test_what_concerns_the_hub_and_the_model_is_taken(folders: dict[str, Path]) -> None:
    usual: dict[str, Any] = {
        **{"revision": "main", "token": None, "local_files_only": True, "trust_remote_code": False},
        **{"code_revision": None, "dtype": torch.bfloat16, "device_map": "cpu", "_from_pipeline": "midi-generation"},
    }
    for folder in (folders["mamba"], folders["moe-mamba"]):
        config = MidiMambaConfig.from_pretrained(folder, attn_implementation="eager", **usual)
        assert config.dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(folders["moe-mamba"], **usual).layout == "moe-mamba"


def test_models_refuse_it_too(folders: dict[str, Path]) -> None:
    for kind, folder in (
        (MidiMambaForCausalLM, folders["mamba"]),
        (AutoModelForCausalLM, folders["moe-mamba"]),
        (MidiDiscriminator, folders["discriminator"]),
    ):
        with pytest.raises((TypeError, ValueError), match="hiden_size") as caught:
            kind.from_pretrained(folder, hiden_size=8)
        assert "\n" not in str(caught.value)
        model = kind.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", trust_remote_code=False)
        assert model.dtype == torch.bfloat16


def test_a_misspelled_field_is_refused_and_other_attributes_are_kept() -> None:
    wrong: dict[str, Any] = {"hiden_size": 8}
    for make in (MidiMambaConfig, partial(MidiMambaConfig.of_size, "tiny"), MidiDiscriminatorConfig):
        with pytest.raises(ValueError, match=r"^Midi\w+Config has no field hiden_size: write hidden_size$"):
            make(**wrong)
    with pytest.raises(ValueError, match="has no field feature_name: write feature_names"):
        MusicalDiscriminatorConfig(**{"feature_name": ["a"]})  # type: ignore[arg-type]
    others: dict[str, Any] = {
        "my_note": 1,
        "sep_token_id": 3,
        "id2label": {0: "fake"},
        "max_length": 9,
        "architectures": ["X"],
    }
    others |= {"attn_implementation": "eager", "dtype": "float16", "name_or_path": "x"}
    assert MidiMambaConfig(**others).my_note == 1
    # A file may be of another version.
    read = MidiMambaConfig.from_dict(MidiMambaConfig(hidden_size=8).to_dict() | {"hiden_size": 9, "new": 1})
    assert (read.hidden_size, read.new) == (8, 1)
