"""One step of decoding as an ONNX file: a token and the states in, logits and the new states out.

Programs without Python's torch can sample from it, with any ONNX runtime. The graph is that of
[`~midimamba.modeling.mamba_mixer.MidiMambaMixer._step`] without anything in place, which ONNX does not have.
"""

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midimamba.errors import InputError
from midimamba.evaluation.rendering import import_demo
from midimamba.files import check_can_be_made, write_whole
from midimamba.modeling.feed_forward import SwitchExperts
from midimamba.modeling.layer_states import MambaState
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.runtime import silenced
from midimamba.training.lora import merged

_MAX_BYTES = 2**31 - 2**20  # of a file with weights in it: a limit of protobuf


def export_onnx(model: MidiMambaForCausalLM, path: str | Path) -> None:
    """
    Write one step of decoding as an ONNX file, in float32.

    Inputs are `input_ids` of shape `(batch, 1)` and, for each layer `i`, `conv.i` of shape
    `(batch, conv_kernel - 1, channels)` and `scan.i` of shape `(batch, state, channels)`, both zeros before the first
    token. Outputs are `logits` of shape `(batch, vocab)`, and `new_conv.i` and `new_scan.i`, the inputs of the next
    step. The batch may have any size.

    Args:
        model (`MidiMambaForCausalLM`): a generator with the layout `mamba`, `mamba-mlp` or `moe-mamba`.
        path (`str` or `Path`): the file, replaced atomically.

    Raises:
        InputError: if the model attends or looks back, whose states grow with every token; if it is too large for one
            file; or if onnx or onnxscript is not installed.
    """
    path = Path(path)
    check_can_be_made(path)
    config = model.config
    if "attention" in config.mixers:
        raise InputError(
            f"the layout {config.layout} cannot be exported to ONNX, because attention keeps every token: "
            "export one of mamba, mamba-mlp, moe-mamba"
        )
    if config.lookback_bars:
        raise InputError(
            "a generator that looks back cannot be exported to ONNX, because it keeps every token: "
            "export one that was trained without lookback_bars"
        )
    if sum(4 * parameter.numel() for parameter in model.parameters()) > _MAX_BYTES:
        raise InputError("the generator is larger than 2 GB, more than one ONNX file holds: export a smaller one")
    for package in ("onnx", "onnxscript"):
        import_demo(package, "onnx")
    write_whole(path, _exported(model))


@torch.no_grad()
def _exported(model: MidiMambaForCausalLM) -> bytes:
    step = _Step(merged(model))
    layers, batch = model.config.num_hidden_layers, 2  # of one sequence, the size would become a constant
    states = [
        tensor for _ in range(layers) for tensor in MambaState.empty(model.config, batch, torch.float32, "cpu").tensors
    ]
    names = [f"{kind}.{layer}" for layer in range(layers) for kind in ("conv", "scan")]
    size = torch.export.Dim("batch", min=1)
    inputs: Any = (torch.zeros(batch, 1, dtype=torch.long), states)
    # The exporter reports its progress.
    with silenced("torch.onnx"), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step,
            inputs,
            dynamo=True,
            input_names=["input_ids", *names],
            output_names=["logits", *(f"new_{name}" for name in names)],
            dynamic_shapes=({0: size}, [{0: size} for _ in states]),
            verbose=False,
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


class _Step(nn.Module):
    """A step as a pure function of the token and the states."""

    def __init__(self, model: Any):
        super().__init__()
        embeddings: Any = model.get_input_embeddings()
        self.embeddings = nn.Embedding.from_pretrained(_plain(embeddings.weight))
        self.layers = nn.ModuleList(map(_Layer, model.backbone.layers))
        self.norm = _Norm(model.backbone.final_norm)
        self.head = _linear(model.lm_head)

    def forward(self, input_ids: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        hidden, updated = self.embeddings(input_ids[:, 0]), []
        for index, layer in enumerate(self.layers):
            hidden, *new = layer(hidden, states[2 * index], states[2 * index + 1])
            updated += new
        return self.head(self.norm(hidden)), updated


class _Layer(nn.Module):
    def __init__(self, block: Any):
        super().__init__()
        mixer = block.mixer
        self.mixer_norm = _Norm(block.mixer_norm)
        self.in_proj, self.x_proj, self.dt_proj, self.out_proj = map(
            _linear, (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
        )
        self.act = mixer.act
        self.sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        self.kernel = nn.Parameter(_plain(mixer.conv1d.weight[:, 0].T.contiguous()))
        bias = mixer.conv1d.bias
        self.bias = nn.Parameter(torch.zeros(self.kernel.shape[1]) if bias is None else _plain(bias))
        self.A = nn.Parameter(-_plain(mixer.A_log).exp().T.contiguous())
        self.D = nn.Parameter(_plain(mixer.D))
        self.feed_forward: nn.Module | None = None
        if block.feed_forward is not None:
            self.feed_forward_norm = _Norm(block.feed_forward_norm)
            is_routed = isinstance(block.feed_forward, SwitchExperts)
            self.feed_forward = (_Experts if is_routed else _SwiGLU)(block.feed_forward)

    def forward(self, hidden: Tensor, conv: Tensor, scan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels, gate = self.in_proj(self.mixer_norm(hidden)).chunk(2, dim=-1)
        window = torch.cat([conv, channels[:, None]], dim=1)
        channels = self.act((window * self.kernel).sum(1) + self.bias)
        dt, B, C = torch.split(self.x_proj(channels), self.sizes, dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        scan = torch.exp(dt[:, None] * self.A) * scan + B[:, :, None] * (dt * channels)[:, None]
        outputs = (C[:, None] @ scan)[:, 0] + channels * self.D
        hidden = hidden + self.out_proj(outputs * self.act(gate))
        if self.feed_forward is not None:
            hidden = hidden + self.feed_forward(self.feed_forward_norm(hidden))
        return hidden, window[:, 1:], scan


class _SwiGLU(nn.Module):
    def __init__(self, mlp: Any):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def forward(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return outputs


class _Experts(nn.Module):
    """Each sequence through the expert that its router chooses."""

    def __init__(self, experts: SwitchExperts):
        super().__init__()
        self.router = _linear(experts.router)
        self.gate_up_proj = nn.Parameter(_plain(experts.gate_up_proj))
        self.down_proj = nn.Parameter(_plain(experts.down_proj))

    def forward(self, hidden: Tensor) -> Tensor:
        share, expert = self.router(hidden).softmax(-1).max(-1)
        gate, up = (hidden[:, None] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        return ((F.silu(gate) * up) @ self.down_proj[expert])[:, 0] * share[:, None]


class _Norm(nn.Module):
    def __init__(self, norm: Any):
        super().__init__()
        self.weight = nn.Parameter(_plain(norm.weight))
        self.eps = norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps))


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu()


def _linear(linear: Any) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    copy.weight = nn.Parameter(_plain(linear.weight))
    if linear.bias is not None:
        copy.bias = nn.Parameter(_plain(linear.bias))
    return copy
