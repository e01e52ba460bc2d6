"""Files have the names of the stock classes, models have plain ones, and every way of loading knows both."""

from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from midimamba import MidiDiscriminator, MidiMambaForCausalLM
from midimamba.modeling.configuration_midimamba import LAYOUTS
from midimamba.modeling.modeling_midimamba import MidiMambaModel
from midimamba.modeling.stock_names import plain_name
from support import make_discriminator, make_generator

Model = TypeVar("Model", bound=PreTrainedModel)

SHAPE: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 12}
# What a file of each layout holds for its second layer: a name per module.
WRITTEN = {
    "mamba": {"norm", "mixer"},
    "mamba-mlp": {"norm", "mixer", "feed_forward_norm", "feed_forward"},
    "moe-mamba": {"norm", "mixer", "feed_forward_norm", "feed_forward"},
    "transformer": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "transformer-moe": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "hybrid": {"norm", "mixer"},
}


def tokens() -> Tensor:
    return torch.randint(1, 11, (3, 20), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(tokens()).logits
    return found


def load_fully(kind: type[Model], folder: Path) -> Model:
    """A checkpoint of which no weight is missing, left over or of another shape."""
    # Transformers declares a model alone, also where a report comes with it.
    loaded = kind.from_pretrained(folder, output_loading_info=True)
    model, report = cast(tuple[Model, dict[str, Any]], loaded)
    assert not any(report.values())
    return model


def make_stock(kind: str, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(**SHAPE, state_size=4, tie_word_embeddings=tied)).eval()
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **heads, tie_word_embeddings=tied)).eval()


@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["mamba", "transformer"])
def test_a_stock_checkpoint_comes_in_and_goes_out_unchanged(
    kind: str, tied: bool, max_shard_size: str, tmp_path: Path
) -> None:
    stock = make_stock(kind, tied)
    stock.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    ours = load_fully(MidiMambaForCausalLM, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(stock), atol=1e-5, rtol=0)
    ours.save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
    again = load_fully(type(stock), tmp_path / "ours")
    assert torch.equal(logits(again), logits(stock))
    files = [sorted(folder.glob("*.safetensors")) for folder in (tmp_path / "theirs", tmp_path / "ours")]
    theirs, written = ({name: t for file in part for name, t in load_file(file).items()} for part in files)
    assert theirs.keys() == written.keys()
    assert all(torch.equal(theirs[name], written[name]) for name in theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_have_stock_names_and_modules_plain_ones(layout: str, tmp_path: Path) -> None:
    model = make_generator(layout=layout)
    model.save_pretrained(tmp_path / "new")
    MidiMambaForCausalLM.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "loaded")
    model.save_pretrained(tmp_path / "trainer", state_dict=model.state_dict())  # as `Trainer` calls it
    for name in ("new", "loaded", "trainer"):
        written = load_file(tmp_path / name / "model.safetensors")
        assert {name.split(".")[3] for name in written if ".layers.1." in name} == WRITTEN[layout]
        assert {plain_name(name) for name in written} | {"lm_head.weight"} == set(model.state_dict())
    block = {"mixer_norm", "mixer"} | ({"feed_forward_norm", "feed_forward"} if len(WRITTEN[layout]) == 4 else set())
    assert {name for name, _ in model.backbone.layers[0].named_children()} == block


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts_of_both_names_are_read(layout: str, tmp_path: Path) -> None:
    """`Trainer` resumes with `load_state_dict` of a file, and goes back to its best model so."""
    model = make_generator(layout=layout, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    for state_dict in (load_file(tmp_path / "model.safetensors"), model.state_dict()):
        other = MidiMambaForCausalLM(model.config)
        assert not torch.equal(logits(other), logits(model))
        other.load_state_dict(state_dict)
        assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_without_its_head_is_exchanged_with_one(layout: str, tmp_path: Path) -> None:
    model = make_generator(layout=layout)
    model.save_pretrained(tmp_path / "whole")
    network = MidiMambaModel.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        expected = model.backbone(tokens()).last_hidden_state
        assert torch.equal(network(tokens()).last_hidden_state, expected)
    network.save_pretrained(tmp_path / "network")
    whole = MidiMambaForCausalLM.from_pretrained(tmp_path / "network")
    assert torch.equal(logits(whole), logits(model))
    whole.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "again")]
    assert files[0].keys() == files[1].keys()


@pytest.mark.parametrize("kind", ["mamba", "cnn"])
def test_a_discriminator_is_written_as_ever(kind: str, tmp_path: Path) -> None:
    model = make_discriminator(kind)
    model.save_pretrained(tmp_path / "first")
    again = load_fully(MidiDiscriminator, tmp_path / "first")
    torch.testing.assert_close(logits(again), logits(model))
    again.save_pretrained(tmp_path / "second")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second")]
    assert files[0].keys() == files[1].keys()
    assert {plain_name(name) for name in files[0]} == set(model.state_dict())
    assert ("encoder.layers.0.norm.weight" in files[0]) == (kind == "mamba")
    other = make_discriminator(kind)
    nn.init.normal_(other.score.weight)
    other.load_state_dict(files[0])
    torch.testing.assert_close(logits(other), logits(model))


def test_a_discriminator_with_spectral_norm_comes_back(tmp_path: Path) -> None:
    model = make_discriminator("mamba", spectral_norm=True)
    model.save_pretrained(tmp_path)
    again = load_fully(MidiDiscriminator, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plain_name_stays_as_it_is(layout: str) -> None:
    for name in make_generator(layout=layout).state_dict():
        assert plain_name(name) == name
        assert plain_name(f"encoder.{name}") == f"encoder.{name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_with_plain_names_are_read_and_written_with_stock_names(layout: str, tmp_path: Path) -> None:
    model = make_generator(layout=layout)
    model.save_pretrained(tmp_path)
    stock = set(load_file(tmp_path / "model.safetensors"))
    plain = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = MidiMambaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == stock
