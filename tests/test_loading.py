"""Damaged models are refused in one line that names the damage, by every way of loading; whole ones load."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage_support import NOT_AN_OBJECT, Damage, content, refusal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import midimamba
from midimamba import MidiDiscriminator, MidiMambaForCausalLM, MidiProcessor
from midimamba.generation import load_pair
from midimamba.loading import load_discriminator, load_generator
from midimamba.modeling.modeling_midimamba import MidiMambaModel, MidiMambaPreTrainedModel
from support import command, make_discriminator, make_generator

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def models(processor: MidiProcessor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a whole model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for layout in ("mamba", "transformer", "moe-mamba"):
        make_generator(vocab_size=processor.vocab_size, layout=layout).save_pretrained(folder / layout)
        processor.save_pretrained(folder / layout)
    for kind in ("cnn", "mamba"):
        make_discriminator(kind).save_pretrained(folder / f"{kind}-discriminator")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def damaged(models: dict[str, Path], tmp_path: Path) -> Callable[[Damage, str], Path]:
    def damage_copy(damage: Damage, kind: str = "mamba") -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(models[kind], folder)
        damage(folder)
        return folder

    return damage_copy


def config(**fields: Any) -> Damage:
    """Set fields of `config.json`."""
    return in_json("config.json", **fields)


def in_json(file: str, **fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | fields))

    return damage


def in_miditok(**options: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "miditok.json").read_text())
        content["config"] |= options
        (folder / "miditok.json").write_text(json.dumps(content))

    return damage


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def without(part: str) -> Damage:
    return weights(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def cut_off(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:3000])


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def in_shards(then: Damage) -> Damage:
    def damage(folder: Path) -> None:
        model = load_generator(folder)
        (folder / WEIGHTS).unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        then(folder)

    return damage


def nothing(folder: Path) -> None:
    """No damage."""


GENERATORS: dict[str, tuple[str, Damage, str]] = {
    "one tensor is missing": ("mamba", without("layers.0.mixer.A_log"), "lacks backbone.layers.0.mixer.A_log"),
    "many are missing": ("mamba", without("layers.1."), "and 7 more"),
    "the norm is missing": ("mamba", without("norm_f"), "lacks backbone.norm_f.weight"),
    "embeddings are missing": ("mamba", without("embeddings"), "lacks backbone.embeddings.weight"),
    "other weights": ("mamba", weights(lambda _: {"x": torch.zeros(1)}), "the model has no place for x"),
    "no weights": ("mamba", lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
    "a layer of a transformer": ("transformer", without("layers.0.self_attn.q_proj"), "layers.0.mixer.q_proj.weight"),
    "a layer of experts": ("moe-mamba", without("layers.0.feed_forward"), "lacks backbone.layers.0.feed_forward"),
    "fewer layers": ("mamba", config(num_hidden_layers=1), "no place for backbone.layers.1.mixer.A_log"),
    "more layers": ("mamba", config(num_hidden_layers=3), "lacks backbone.layers.2.mixer.A_log"),
    "no layers": ("mamba", config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "a Mamba called Llama": ("mamba", config(model_type="llama", num_attention_heads=4), "lacks backbone.layers.0"),
    "a Llama called Mamba": ("transformer", config(model_type="mamba"), "lacks backbone.layers.0.mixer.A_log"),
    "untied without a head": ("mamba", config(tie_word_embeddings=False), "lacks lm_head.weight"),
    "wider than its weights": ("mamba", config(hidden_size=32), "[760, 16] instead of [760, 32]"),
    "a larger vocabulary": ("mamba", config(vocab_size=2**24), "[760, 16] instead of [16777216, 16]"),
    "a pickle": ("mamba", pickle_only, "are pickles, which can run code and are never read"),
    "cut off": ("mamba", cut_off, "damaged or cut off"),
    "not safetensors": ("mamba", content(WEIGHTS, "null"), "damaged or cut off"),
    "whole numbers": (
        "mamba",
        weights(lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()}),
        "as I8, and weights are real numbers",
    ),
    "NaN": (
        "mamba",
        weights(lambda tensors: tensors | {"backbone.layers.1.mixer.D": torch.full((32,), NAN)}),
        "NaN or infinity, in backbone.layers.1.mixer.D",
    ),
    "infinity": (
        "mamba",
        weights(lambda tensors: tensors | {"backbone.norm_f.weight": torch.full((16,), -INFINITY)}),
        "NaN or infinity, in backbone.norm_f.weight",
    ),
    "weights beyond all measure": (
        "mamba",
        weights(lambda tensors: {name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()}),
        "computes NaN or infinity",
    ),
    "weights in another file": ("mamba", config(transformers_weights="x.bin"), "incorrect"),
    "a billion labels": ("mamba", config(num_labels=10**9), "num_labels is 1000000000"),
    "a lost shard": (
        "mamba",
        in_shards(lambda folder: sorted(folder.glob("model-*"))[1].unlink()),
        "model-00002-of-00002.safetensors",
    ),
    "an index without a map": ("mamba", in_shards(content(INDEX, '{"metadata": {}}')), "has no `weight_map`"),
    "an index of a list": (
        "mamba",
        in_shards(content(INDEX, '{"metadata": {}, "weight_map": ["a"]}')),
        "has no `weight_map`",
    ),
    "no config": ("mamba", lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "another model": ("mamba", config(model_type="gpt2"), "'gpt2', not a Mamba language model"),
    "no kind of model": ("mamba", config(model_type=None), "type None"),
    "an unknown activation": ("mamba", config(hidden_act="foo"), "hidden_act 'foo' is unknown"),
    "labels of a wrong type": ("mamba", config(id2label=3), "no generator can be loaded"),
    "a negative epsilon": ("mamba", config(layer_norm_epsilon=-1.0), "layer_norm_epsilon is -1.0"),
    "an infinite epsilon": ("mamba", config(layer_norm_epsilon=INFINITY), "layer_norm_epsilon is inf"),
    "a rank of a wrong type": ("mamba", config(time_step_rank="x"), "time_step_rank is 'x'"),
    "channels of a wrong type": ("mamba", config(intermediate_size=1.5), "intermediate_size is 1.5"),
    "no heads": ("transformer", config(num_attention_heads=0), "num_attention_heads is 0"),
    "heads that do not divide": ("transformer", config(num_key_value_heads=3), "must divide num_attention_heads"),
    "positions of a wrong type": ("transformer", config(rope_parameters=[]), "rope_parameters"),
    "no experts": ("moe-mamba", config(num_experts=0), "num_experts is 0"),
    "a billion experts": ("moe-mamba", config(num_experts=10**9), "num_experts is 1000000000"),
    "an unknown layout": ("moe-mamba", config(layout="x"), "layout 'x' is unknown"),
    "a layout of a wrong type": ("moe-mamba", config(layout=[]), "layout"),
    "an end of a wrong type": ("mamba", in_json("generation_config.json", eos_token_id="x"), "eos_token_id is 'x'"),
    "beams of a wrong type": ("mamba", in_json("generation_config.json", num_beams="x"), "num_beams is 'x'"),
    "adapters of nothing": ("mamba", content("adapter_config.json", "{}"), "no generator can be loaded"),
}


@pytest.mark.parametrize("case", GENERATORS)
def test_a_damaged_generator_is_refused(case: str, damaged: Callable[[Damage, str], Path]) -> None:
    kind, damage, reason = GENERATORS[case]
    assert reason in refusal(load_pair, damaged(damage, kind))


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel"]
)
@pytest.mark.parametrize("size", [0, -1, 10**9, 10**12, "x", 1.5, True])
def test_impossible_sizes_are_refused_before_anything_is_built(
    field: str, size: Any, damaged: Callable[[Damage, str], Path]
) -> None:
    folder = damaged(config(**{field: size}), "mamba")
    began = time.monotonic()
    said = [refusal(load_generator, folder)]
    (folder / "config.json").write_text(json.dumps({"model_type": "midimamba-discriminator", field: size}))
    said.append(refusal(load_discriminator, folder))
    assert all(field in one and repr(size) in one for one in said)
    assert time.monotonic() - began < 5


DISCRIMINATORS: dict[str, tuple[Damage, str]] = {
    "no head": (without("score.bias"), "lacks score.bias"),
    "no body": (without("encoder"), "lacks encoder"),
    "a head of infinity": (
        weights(lambda tensors: tensors | {"score.bias": torch.tensor([INFINITY])}),
        "NaN or infinity, in score.bias",
    ),
    "an unknown kind": (config(kind="x"), "kind 'x' is unknown"),
    "no filters": (config(filter_sizes=[]), "filter_sizes is empty"),
    "filters of width 0": (config(filter_sizes=[1, 0, 2]), "filter_sizes is 0"),
    "filters of a wrong type": (config(filter_sizes="x"), "filter_sizes"),
    "a trillion filters": (config(num_filters=[10**12] * 3), "num_filters is 1000000000000"),
    "a billion labels": (config(num_labels=10**9), "num_labels is 1000000000"),
    "too much dropout": (config(dropout=5.0), "dropout is 5.0"),
    "other norms": (config(spectral_norm=True), "parametrizations"),
    "a generator": (config(model_type="mamba"), "'mamba', not a discriminator"),
    "a pickle": (pickle_only, "are pickles"),
    "cut off": (cut_off, "damaged or cut off"),
    "not a configuration": (content("config.json", "null"), "config.json holds NoneType"),
}


@pytest.mark.parametrize("kind", ["cnn", "mamba"])
@pytest.mark.parametrize("case", DISCRIMINATORS)
def test_a_damaged_discriminator_is_refused(case: str, kind: str, damaged: Callable[[Damage, str], Path]) -> None:
    damage, reason = DISCRIMINATORS[case]
    assert reason in refusal(load_discriminator, damaged(damage, f"{kind}-discriminator"))


def test_a_discriminator_of_the_other_kind_is_refused(damaged: Callable[[Damage, str], Path]) -> None:
    folder = damaged(config(kind="mamba"), "cnn-discriminator")
    assert "lacks encoder.layers.0" in refusal(load_discriminator, folder)


@pytest.mark.parametrize("text", NOT_AN_OBJECT)
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "adapter_config.json", INDEX, "miditok.json"]
)
def test_what_is_not_a_json_object_is_named(file: str, text: str, damaged: Callable[[Damage, str], Path]) -> None:
    assert file in refusal(load_pair, damaged(content(file, NOT_AN_OBJECT[text]), "mamba"))


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "no config": (in_json("miditok.json", config=None), "holds no `config`"),
    "an empty config": (in_json("miditok.json", config={}), "damaged"),
    "a number for a name": (in_json("miditok.json", tokenization=5), "tokenization 5 is not supported"),
    "no tokenizer": (in_json("miditok.json", tokenization="Path"), "tokenization 'Path' is not supported"),
    "a method replaced": (in_json("miditok.json", decode=5), "'decode' is not a part of a tokenizer"),
    "no subword model": (in_json("miditok.json", _model="x"), "damaged"),
    "no vocabulary": (in_json("miditok.json", _vocab_base={"a": 0}), "damaged"),
    "other special tokens": (
        in_json("miditok.json", _vocab_base={"BOS_None": 0, "PAD_None": 1, "EOS_None": 2}),
        "damaged",
    ),
    "a pitch of a wrong type": (in_miditok(pitch_range="x"), "damaged"),
    "a billion velocities": (in_miditok(num_velocities=10**9), "1,000,000,000"),
    "a billion beats": (in_miditok(beat_res={"0_1000000000": 12}), "12,000,000,000"),
    "a billion bars": (in_miditok(max_bar_embedding=10**9), "1,000,000,000"),
    "a billion meters": (in_miditok(time_signature_range={"4": [10**9]}), "1,000,000,000"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused(case: str, damaged: Callable[[Damage, str], Path]) -> None:
    damage, reason = TOKENIZERS[case]
    folder = damaged(damage, "mamba")
    said = refusal(MidiProcessor.from_pretrained, folder)
    assert reason in said
    assert refusal(load_pair, folder) == said


WAYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "midimamba.load": ("mamba", midimamba.load),
    "the class": ("mamba", MidiMambaForCausalLM.from_pretrained),
    "the network alone": ("mamba", MidiMambaModel.from_pretrained),
    "AutoModelForCausalLM": ("moe-mamba", AutoModelForCausalLM.from_pretrained),
    "the pipeline": ("moe-mamba", lambda name: pipeline("midi-generation", model=name)),  # type: ignore[call-overload]
    "the discriminator's class": ("mamba-discriminator", MidiDiscriminator.from_pretrained),
    "AutoModelForSequenceClassification": (
        "mamba-discriminator",
        AutoModelForSequenceClassification.from_pretrained,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damage", [without("layers.0.mixer.A_log"), pickle_only], ids=["incomplete", "pickle"])
def test_no_way_of_loading_fills_in_weights_or_reads_a_pickle(
    way: str, damage: Damage, damaged: Callable[[Damage, str], Path]
) -> None:
    kind, load = WAYS[way]
    folder = damaged(damage, kind)
    with pytest.raises((ValueError, OSError), match=r"layers\.0\.mixer\.A_log|no file named model\.safetensors"):
        load(str(folder))


class Bomb:
    """Its pickle makes a folder when it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "options", [{}, {"use_safetensors": False, "weights_only": False}], ids=["plain", "asked for"]
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", WEIGHTS])
def test_no_pickle_runs(name: str, options: Any, damaged: Callable[[Damage, str], Path], tmp_path: Path) -> None:
    folder = damaged(config(transformers_weights=name) if name == "adapter_model.bin" else nothing, "mamba")
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refusal(lambda name: load_generator(name, **options), folder)
    assert not (tmp_path / "ran").exists()


def test_adapters_are_read_whole_or_not_at_all(models: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from midimamba.training.lora import add_adapters

    folder = tmp_path / "adapters"
    adapted = add_adapters(load_generator(models["mamba"]), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted.save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(models["mamba"])})
    )
    assert any("lora" in name for name in load_generator(folder).state_dict())
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file, metadata={"format": "pt"})
    assert "lacks backbone.layers.0.mixer" in refusal(load_generator, folder)
    torch.save(tensors, folder / "adapter_model.bin")
    file.unlink()
    assert "are pickles" in refusal(load_generator, folder)


@pytest.mark.parametrize("kind", ["mamba", "transformer", "moe-mamba", "cnn-discriminator", "mamba-discriminator"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whole_models_load_in_every_precision(
    kind: str, dtype: torch.dtype, damaged: Callable[[Damage, str], Path]
) -> None:
    change = weights(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    folder = damaged(change, kind)
    load = load_discriminator if "discriminator" in kind else load_generator
    expected = load_file(folder / WEIGHTS)
    loaded = load(folder, dtype=dtype)
    loaded.save_pretrained(folder)
    assert loaded.dtype == dtype
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(folder / WEIGHTS).items())


def test_whole_models_in_shards_and_with_extra_tensors_load(damaged: Callable[[Damage, str], Path]) -> None:
    def add(folder: Path) -> None:
        weights(lambda tensors: tensors | {"value_head.weight": torch.zeros(1)})(folder)
        in_shards(nothing)(folder)

    assert load_pair(str(damaged(add, "mamba")))


def test_one_of_two_tied_weights_is_enough(damaged: Callable[[Damage, str], Path]) -> None:
    def head_only(folder: Path) -> None:
        weights(lambda tensors: {name.replace("backbone.embeddings", "lm_head"): t for name, t in tensors.items()})(
            folder
        )

    folder = damaged(head_only, "mamba")
    model = load_generator(folder)
    embeddings = model.state_dict()["backbone.embeddings.weight"]
    assert torch.equal(embeddings, load_file(folder / WEIGHTS)["lm_head.weight"])


class Classifier(MidiMambaPreTrainedModel):
    """A user's own head on the generator's network."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = MidiMambaModel(config)
        self.own_head = nn.Linear(config.hidden_size, 2)
        self.post_init()


def test_a_user_adds_a_new_head_to_a_whole_network(
    models: dict[str, Path], damaged: Callable[[Damage, str], Path]
) -> None:
    loaded: Any = Classifier.from_pretrained(models["mamba"], output_loading_info=True)
    model, info = loaded
    assert set(info["missing_keys"]) == {"own_head.weight", "own_head.bias"}
    assert torch.equal(model.backbone.norm_f.weight, load_file(models["mamba"] / WEIGHTS)["backbone.norm_f.weight"])
    folder = damaged(without("layers.0.mixer.A_log"), "mamba")
    assert "lacks backbone.layers.0.mixer.A_log" in refusal(Classifier.from_pretrained, folder, ValueError)


def test_the_network_alone_and_a_discriminator_begin_as_a_generator(models: dict[str, Path]) -> None:
    generator = load_generator(models["mamba"])
    expected = generator.backbone.state_dict()
    network = MidiMambaModel.from_pretrained(models["mamba"]).state_dict()
    begun = MidiDiscriminator.from_generator(generator).encoder.state_dict()
    assert network.keys() == begun.keys() == expected.keys()
    assert all(torch.equal(network[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(begun[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["you/none", "no/such/folder", "a b", "", "."])
def test_a_name_of_nothing_is_refused(name: str) -> None:
    assert name in refusal(load_pair, name)
    assert name in refusal(load_generator, name)
    assert name in refusal(load_discriminator, name)


@pytest.mark.parametrize("damage", [without("layers.0"), config(hidden_size=0), content("miditok.json", "null")])
@pytest.mark.parametrize("words", [("generate",), ("evaluate", "--reference")], ids=["generate", "evaluate"])
def test_commands_leave_with_2_and_one_line(
    damage: Damage,
    words: tuple[str, ...],
    damaged: Callable[[Damage, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = damaged(damage, "mamba")
    options: tuple[Any, ...] = ("--out", tmp_path / "out")
    if words[0] == "evaluate":
        monkeypatch.setattr("midimamba.evaluation.comparison.read_reference", lambda *_: None)
        options = ("--reference", tmp_path, "--out", tmp_path / "out.json")
    assert command(monkeypatch, words[0], folder, *options) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert [line for line in error.splitlines() if line.startswith("error: ")] == error.splitlines()[-1:]
    assert not (tmp_path / "out").exists()
