"""A generator that is exported to GGUF computes in llama.cpp's graph what it computes here; others are refused."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from gguf.quants import dequantize
from peft import LoraConfig
from torch import nn

import midimamba
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import QUANTIZED
from midimamba.errors import InputError
from midimamba.tokenization.tokenizer import expand_ids
from midimamba.training.lora import add_adapters
from support import command, make_generator

WIDE = {"hidden_size": 64, "vocab_size": 40, "time_step_rank": 32}  # every row is made of blocks of 32


class Graph:
    """What llama.cpp computes from a file, token by token: `build_mamba_layer` and `ggml_ssm_scan`, in NumPy."""

    def __init__(self, path: Path):
        reader = GGUFReader(path)
        self.facts = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        # Shapes are written from the innermost axis out.
        self.tensors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
            for tensor in reader.tensors
        }

    def fact(self, name: str) -> Any:
        return self.facts[f"mamba.{name}"]

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of shape `(time, vocab)`, of one sequence from its start."""
        inner, kernel = self.fact("ssm.inner_size"), self.fact("ssm.conv_kernel")
        layers = range(self.fact("block_count"))
        windows = [np.zeros((inner, kernel)) for _ in layers]
        states = [np.zeros((inner, self.fact("ssm.state_size"))) for _ in layers]
        rows = []
        for token in ids:
            hidden = self.tensors["token_embd.weight"][token].astype(np.float64)
            for index in layers:
                hidden = hidden + self.mixed(index, hidden, windows, states)
            head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
            rows.append(head @ self.normed("output_norm.weight", hidden))
        return np.stack(rows)

    def normed(self, name: str, hidden: np.ndarray) -> np.ndarray:
        scale = np.sqrt(np.square(hidden).mean() + self.fact("attention.layer_norm_rms_epsilon"))
        return hidden / scale * self.tensors[name]

    def mixed(self, index: int, hidden: np.ndarray, windows: list[np.ndarray], states: list[np.ndarray]) -> np.ndarray:
        layer = {
            name.removeprefix(f"blk.{index}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"blk.{index}.")
        }
        x, z = np.split(layer["ssm_in.weight"] @ self.normed(f"blk.{index}.attn_norm.weight", hidden), 2)
        windows[index] = np.column_stack([windows[index][:, 1:], x])
        x = silu((windows[index] * layer["ssm_conv1d.weight"]).sum(1) + layer["ssm_conv1d.bias"])
        rank, size = self.fact("ssm.time_step_rank"), self.fact("ssm.state_size")
        dt, B, C = np.split(layer["ssm_x.weight"] @ x, [rank, rank + size])
        dt = np.logaddexp(0, layer["ssm_dt.weight"] @ dt + layer["ssm_dt.bias"])
        states[index] = states[index] * np.exp(dt[:, None] * layer["ssm_a"]) + np.outer(dt * x, B)
        y = states[index] @ C + x * layer["ssm_d"]
        return layer["ssm_out.weight"] @ (y * silu(z))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@torch.no_grad()
def our_logits(model: MidiMambaForCausalLM, ids: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def some_ids(model: MidiMambaForCausalLM, length: int) -> list[int]:
    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False},
        {"use_conv_bias": False, "conv_kernel": 3},
        {"state_size": 8, "time_step_rank": 3, "layer_norm_epsilon": 1e-2},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_the_graph_of_llama_cpp_gives_the_logits_of_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = make_generator(**options)
    midimamba.export_gguf(model, tmp_path / "model.gguf")
    graph = Graph(tmp_path / "model.gguf")
    assert set(graph.types.values()) == {GGMLQuantizationType.F32}
    assert ("output.weight" in graph.tensors) == (not options.get("tie_word_embeddings", True))
    ids = some_ids(model, 500)
    np.testing.assert_allclose(graph.logits(ids), our_logits(model, ids), atol=1e-5, rtol=1e-5)


def test_weights_in_half_precision_are_written_as_they_are(tmp_path: Path) -> None:
    model: Any = make_generator()
    midimamba.export_gguf(model.bfloat16(), tmp_path / "model.gguf")
    ids = some_ids(model, 20)
    np.testing.assert_allclose(
        Graph(tmp_path / "model.gguf").logits(ids), our_logits(model.float(), ids), atol=1e-5, rtol=1e-5
    )


def test_adapters_are_merged(tmp_path: Path) -> None:
    model = make_generator()
    for name, parameter in add_adapters(model, LoraConfig(r=4)).named_parameters():
        if "lora_B" in name:  # begins at zero, without an effect
            nn.init.normal_(parameter, std=0.3)
    midimamba.export_gguf(model, tmp_path / "model.gguf")
    ids = some_ids(model, 20)
    ours = our_logits(model, ids)
    assert np.abs(ours - our_logits(make_generator(), ids)).max() > 0.1
    np.testing.assert_allclose(Graph(tmp_path / "model.gguf").logits(ids), ours, atol=1e-5, rtol=1e-5)


# The largest error of a number as a share of the largest number in its block: half the last bit, or half the distance
# of two levels. The scales of blocks are written as F16.
SCALES = 2**-10
ERRORS = {
    **{"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + SCALES, "Q5_1": 1 / 31 + SCALES, "Q5_0": 1 / 16 + SCALES},
    **{"Q4_1": 1 / 15 + SCALES, "Q4_0": 1 / 8 + SCALES},
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_matrices_are_near_and_all_else_is_exact(kind: str, tmp_path: Path) -> None:
    model = make_generator(**WIDE, tie_word_embeddings=False)
    midimamba.export_gguf(model, tmp_path / "whole.gguf")
    midimamba.export_gguf(model, tmp_path / "small.gguf", quantize=kind)
    whole, small = Graph(tmp_path / "whole.gguf"), Graph(tmp_path / "small.gguf")
    assert small.facts["general.file_type"] == LlamaFileType[f"MOSTLY_{kind}"]
    assert (tmp_path / "small.gguf").stat().st_size < 0.75 * (tmp_path / "whole.gguf").stat().st_size
    matrices = {name for name, type_ in small.types.items() if type_ == GGMLQuantizationType[kind]}
    assert {name.split(".")[-2] for name in matrices} == {
        *("token_embd", "ssm_in", "ssm_x", "ssm_dt", "ssm_out", "output")
    }
    for name, numbers in whole.tensors.items():
        if name not in matrices:
            np.testing.assert_array_equal(small.tensors[name], numbers)
            continue
        blocks, errors = numbers.reshape(-1, 32), (small.tensors[name] - numbers).reshape(-1, 32)
        assert (np.abs(errors) <= ERRORS[kind] * np.abs(blocks).max(1, keepdims=True)).all(), name
    ids = some_ids(model, 100)
    exact = our_logits(model, ids)
    error = np.sqrt(np.square(small.logits(ids) - exact).mean()) / exact.std()
    assert 0 < error < 4 * ERRORS[kind]


def test_a_matrix_with_rows_that_are_not_made_of_blocks_is_written_as_f16(tmp_path: Path) -> None:
    model = make_generator(**WIDE | {"time_step_rank": 4})
    midimamba.export_gguf(model, tmp_path / "model.gguf", quantize="Q8_0")
    graph = Graph(tmp_path / "model.gguf")
    assert graph.types["blk.1.ssm_dt.weight"] == GGMLQuantizationType.F16
    assert graph.types["blk.1.ssm_x.weight"] == GGMLQuantizationType.Q8_0


class LlamaCpp:
    """The logits of llama.cpp itself, by its bindings for Python."""

    def __init__(self, path: Path, length: int):
        reason = "llama-cpp-python is not installed: `pip install llama-cpp-python` compiles it for several minutes"
        module = pytest.importorskip("llama_cpp", reason=reason)
        self.model = module.Llama(
            str(path), n_ctx=length, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of shape `(time, vocab)`: a prompt in batches, then token by token."""
        self.model.reset()
        half = len(ids) // 2
        self.model.eval(ids[:half])
        for token in ids[half:]:
            self.model.eval([token])
        return self.model.scores[: len(ids)].copy()


@pytest.mark.parametrize(
    "options",
    [
        WIDE,
        WIDE | {"tie_word_embeddings": False, "time_step_rank": 3},
        {"use_conv_bias": False, "conv_kernel": 3},
        {"state_size": 1, "conv_kernel": 2},
        {"conv_kernel": 1},
    ],
    ids=lambda options: ", ".join(options),
)
def test_llama_cpp_gives_the_logits_of_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = make_generator(**options)
    midimamba.export_gguf(model, tmp_path / "model.gguf")
    ids = some_ids(model, 500)
    logits = LlamaCpp(tmp_path / "model.gguf", len(ids)).logits(ids)
    np.testing.assert_allclose(logits, our_logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_llama_cpp_reads_quantized_matrices(kind: str, tmp_path: Path) -> None:
    model = make_generator(**WIDE)
    midimamba.export_gguf(model, tmp_path / "model.gguf", quantize=kind)
    ids = some_ids(model, 100)
    logits, expected = (
        LlamaCpp(tmp_path / "model.gguf", len(ids)).logits(ids),
        Graph(tmp_path / "model.gguf").logits(ids),
    )
    # It quantizes activations as well, to the type of the matrix or to 8 bits.
    assert np.sqrt(np.square(logits - expected).mean()) / expected.std() < 0.02


def test_the_command_writes_what_each_id_means(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bach"
    shutil.copytree(pretrained, folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nA model.\n")
    assert command(monkeypatch, "export", folder, "--gguf", tmp_path / "model.gguf", "--quantize", "q8_0") == 0
    graph, tokenizer = Graph(tmp_path / "model.gguf"), MidiProcessor.from_pretrained(folder).midi_tokenizer
    assert graph.facts["general.architecture"] == "mamba"
    assert graph.facts["general.name"] == "bach"
    assert graph.facts["general.license"] == "cc-by-4.0"
    assert graph.facts["tokenizer.ggml.model"] == "none"
    special = {token: graph.facts[f"tokenizer.ggml.{token}_token_id"] for token in ("bos", "eos", "padding")}
    assert special == {"bos": 1, "eos": 2, "padding": 0}
    names = {index: token for token, index in tokenizer.vocab.items()}
    assert len(tokenizer.vocab) < tokenizer.len == graph.fact("vocab_size")
    assert graph.facts["tokenizer.ggml.tokens"] == [
        " ".join(names[base] for base in expand_ids(tokenizer, [index])) for index in range(tokenizer.len)
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "mamba-mlp"}, "layout mamba-mlp cannot be exported to GGUF"),
        ({"layout": "hybrid", "hidden_size": 64}, "layout hybrid cannot be exported to GGUF"),
        ({"layout": "transformer", "hidden_size": 64}, "layout transformer cannot be exported to GGUF"),
        ({"lookback_bars": [1, 2], "bar_token_ids": [4]}, "looks back cannot be exported to GGUF"),
        ({"expand": 3}, "intermediate_size is 48 .* always 32"),
        ({"use_bias": True}, "use_bias is True .* always False"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu .* always silu"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = MidiMambaForCausalLM(MidiMambaConfig(vocab_size=11, num_hidden_layers=2, **{"hidden_size": 16, **options}))
    with pytest.raises(InputError, match=reason):
        midimamba.export_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_other_types_and_other_vocabularies_are_refused(processor: MidiProcessor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quantize is 'Q4_K': choose one of F16, .*Q4_0"):
        midimamba.export_gguf(make_generator(), tmp_path / "model.gguf", quantize="Q4_K")
    with pytest.raises(InputError, match="has 11 tokens, but the tokenizer 760"):
        midimamba.export_gguf(make_generator(), tmp_path / "model.gguf", processor)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "name one file to write"),
        (["--gguf", "a.gguf", "--onnx", "a.onnx"], "name one file to write"),
        (["--onnx", "a.onnx", "--quantize", "F16"], "leave it out"),
        (["--gguf", "taken.gguf"], "already exists"),
        (["--gguf", "taken.gguf/a.gguf"], "is not a folder"),
        (["--gguf", "a.gguf"], "header that is not YAML"),
    ],
)
def test_bad_requests_end_in_one_line(
    words: list[str],
    reason: str,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pretrained, "model")
    Path("model", "README.md").write_text("---\nlicense: [\n---\n")
    Path("taken.gguf").write_text("mine")
    assert command(monkeypatch, "export", "model", *words) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert reason in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "taken.gguf"]
    assert Path("taken.gguf").read_text() == "mine"


@pytest.mark.slow
def test_the_command_writes_onnx_as_well(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    assert command(monkeypatch, "export", pretrained, "--onnx", tmp_path / "step.onnx") == 0
    onnx.checker.check_model(tmp_path / "step.onnx")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gguf(name: str) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError(name)
        return import_module(name)

    monkeypatch.setattr("midimamba.evaluation.rendering.import_module", without_gguf)
    with pytest.raises(InputError, match=r"midimamba\[gguf\]"):
        midimamba.export_gguf(make_generator(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
