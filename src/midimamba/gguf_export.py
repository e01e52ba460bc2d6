"""A generator as a GGUF file, which llama.cpp and what builds on it can run.

The names of tensors and their shapes are those of llama.cpp's architecture `mamba` (its `src/models/mamba.cpp`), which
is the layout `mamba` here. Its recurrence takes A itself where a checkpoint holds log(-A), and a convolution without
the axis of length 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midimamba.command_options import QUANTIZED
from midimamba.errors import InputError
from midimamba.evaluation.rendering import import_demo
from midimamba.files import check_can_be_made, whole_file
from midimamba.modeling.configuration_midimamba import MidiMambaConfig
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.tokenization.processor import MidiProcessor
from midimamba.training.lora import merged

# A recurrence has no longest context, but programs ask for one. This is what llama.cpp's own converter writes.
_CONTEXT = 2**20
# The factors of matrix products. llama.cpp wants everything else in float32.
_MATRICES = ("token_embd", "ssm_in", "ssm_x", "ssm_dt", "ssm_out", "output")


def export_gguf(
    model: MidiMambaForCausalLM,
    path: str | Path,
    processor: MidiProcessor | None = None,
    *,
    quantize: str | None = None,
    name: str | None = None,
    license: str | None = None,
) -> None:
    """
    Write a generator as a GGUF file, for llama.cpp.

    llama.cpp cannot turn MIDI into ids: the tokenizer's model is `none` there. A program gives it ids and gets ids or
    logits.

    Args:
        model (`MidiMambaForCausalLM`): a generator with the layout `mamba`, without look-back.
        path (`str` or `Path`): the file, replaced atomically.
        processor (`MidiProcessor`, *optional*): the generator's. The file then says what each id means, as base tokens
            such as `Pitch_60 Velocity_95` joined by spaces.
        quantize (`str`, *optional*): write the matrices as `F16`, `BF16`, `Q8_0`, `Q5_1`, `Q5_0`, `Q4_1` or `Q4_0`; by
            default all is float32. The last five take blocks of 32 numbers, so a matrix whose rows cannot be divided
            into them becomes `F16`.
        name, license (`str`, *optional*): of the model, for those who read the file.

    Raises:
        InputError: if llama.cpp cannot compute what the generator computes, the processor has another vocabulary,
            there is no such type, or gguf is not installed.
    """
    path = Path(path)
    check_can_be_made(path)
    _check_known(model.config)
    if quantize is not None and quantize not in QUANTIZED:
        raise InputError(f"quantize is {quantize!r}: choose one of {', '.join(QUANTIZED)}")
    if processor is not None and processor.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the generator has {model.config.vocab_size} tokens, but the tokenizer {processor.vocab_size}: "
            "give the processor that was saved with the generator"
        )
    gguf = import_demo("gguf", "gguf")
    with whole_file(path) as scratch:
        writer = gguf.GGUFWriter(scratch, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MAMBA])
        for text, add in ((name, writer.add_name), (license, writer.add_license)):
            if text is not None:
                add(text)
        _describe(writer, model.config)
        _describe_tokens(writer, model.config, processor)
        _add_tensors(gguf, writer, merged(model), quantize or "F32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _check_known(config: MidiMambaConfig) -> None:
    """Refuse what llama.cpp's `mamba` lacks. It would load some of it, and compute something else."""
    if config.layout != "mamba":
        raise InputError(
            f"the layout {config.layout} cannot be exported to GGUF, because llama.cpp's `mamba` has Mamba mixers "
            "alone: export one of layout mamba"
        )
    if config.lookback_bars:
        raise InputError(
            "a generator that looks back cannot be exported to GGUF, because llama.cpp knows no look-back: "
            "export one that was trained without lookback_bars"
        )
    needed = {"intermediate_size": 2 * config.hidden_size, "use_bias": False, "hidden_act": "silu"}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise InputError(
                f"a generator whose {name} is {getattr(config, name)} cannot be exported to GGUF, because it is "
                f"always {value} in llama.cpp: export one that was trained with that"
            )


def _describe(writer: Any, config: MidiMambaConfig) -> None:
    """The sizes."""
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


def _describe_tokens(writer: Any, config: MidiMambaConfig, processor: MidiProcessor | None) -> None:
    """The ids that begin, end and pad, and what each id means."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    end = config.eos_token_id
    ids = {"bos": config.bos_token_id, "eos": end[0] if isinstance(end, list) else end, "pad": config.pad_token_id}
    for token, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{token}_token_id")(index)
    if processor is not None:
        assert processor.tokenizer is not None  # it has one vocabulary, since its size is the model's
        writer.add_token_list(processor.tokenizer.batch_decode([[index] for index in range(config.vocab_size)]))


@torch.no_grad()
def _add_tensors(gguf: Any, writer: Any, model: Any, kind: str) -> None:
    prefix = "ALL" if kind == "F32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for name, tensor in _tensors(model):
        numbers = tensor.detach().float().cpu().contiguous().numpy()
        is_matrix = name.removesuffix(".weight").rpartition(".")[2] in _MATRICES and numbers.ndim > 1
        used = "F32" if not is_matrix else kind if numbers.shape[-1] % block == 0 else "F16"
        type_ = gguf.GGMLQuantizationType[used]
        writer.add_tensor(name, gguf.quants.quantize(numbers, type_), raw_dtype=type_)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights by llama.cpp's names, matrices of shape `(out, in)`."""
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    yield "token_embd.weight", embeddings
    for index, block in enumerate(model.backbone.layers):
        for name, tensor in _of_layer(block).items():
            yield f"blk.{index}.{name}", tensor
    yield "output_norm.weight", model.backbone.final_norm.weight
    if head is not embeddings:  # llama.cpp takes the embeddings where there is none
        yield "output.weight", head


def _of_layer(block: Any) -> dict[str, Tensor]:
    mixer = block.mixer
    kernel, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    return {
        "attn_norm.weight": block.mixer_norm.weight,
        "ssm_in.weight": mixer.in_proj.weight,
        "ssm_conv1d.weight": kernel,
        "ssm_conv1d.bias": kernel.new_zeros(len(kernel)) if bias is None else bias,
        "ssm_x.weight": mixer.x_proj.weight,
        "ssm_dt.weight": mixer.dt_proj.weight,
        "ssm_dt.bias": mixer.dt_proj.bias,
        "ssm_a": -mixer.A_log.float().exp(),
        "ssm_d": mixer.D,
        "ssm_out.weight": mixer.out_proj.weight,
    }
