"""The Mamba mixer (arXiv 2312.00752): transformers' parameters, a linear scan and an exact state on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba.modeling_mamba import MambaMixer

from .configuration_midimamba import MidiMambaConfig
from .frame import Frame
from .layer_states import MambaState, Scratch
from .selective_scan import choose_backend, selective_scan, selective_step_


class MidiMambaMixer(MambaMixer):
    """Transformers' mixer (its parameters and their initialisation) with our own forward pass."""

    def __init__(self, config: MidiMambaConfig, layer_idx: int):
        super().__init__(config, layer_idx, initialize_mixer_weights=False)

    def forward(self, hidden_states: Tensor, state: MambaState | None, frame: Frame) -> Tensor:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, time, hidden)`): the normalised residual stream.
            state (`MambaState` or `None`): the state to start from, updated in place.
            frame (`Frame`): padding and the starts of documents. A padding token enters neither convolution nor
                state, so padding on the left is exact. Neither of them looks across the start of a document.

        Returns:
            `Tensor` of shape `(batch, time, hidden)`.
        """
        mask, begins = frame.mask, frame.begins
        if state is not None and hidden_states.shape[1] == 1 and mask is None and not torch.is_grad_enabled():
            return self._step(hidden_states[:, 0], state, frame.scratch)[:, None]
        channels, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        if mask is not None:  # here, because the projection's bias would enter the convolution
            channels = channels * mask.to(channels.dtype)
        by_kernels = self._fits_kernels(channels)
        convolved = self._convolve(channels, state, begins, by_kernels)
        if mask is not None:
            convolved = convolved * mask.to(convolved.dtype)
        inputs, dt, A, B, C = self._discretize(convolved, by_kernels)
        outputs = self._scan(inputs, dt, A, B, C, state, begins)
        return self.out_proj(self._gate(outputs, inputs, gate, by_kernels).to(hidden_states.dtype))

    def _fits_kernels(self, tensor: Tensor) -> bool:
        """Whether the kernels can compute a mixer whose projection is this tensor."""
        in_float32 = tensor.dtype == self.A_log.dtype == torch.float32
        in_float32 &= not torch.is_autocast_enabled(tensor.device.type)
        fits = in_float32 and self.config.hidden_act == "silu" and tensor.numel() > 0
        return fits and choose_backend(tensor.device) == "numba"

    def _step(self, hidden_states: Tensor, state: MambaState, scratch: Scratch) -> Tensor:
        """One token `(batch, hidden)` onto the state, in place and without a graph: what `forward` computes."""
        projected = self.in_proj(hidden_states)
        if self._fits_kernels(projected):
            return self._step_by_kernels(projected, state)
        channels, gate = projected.chunk(2, dim=-1)
        past, weight = state.conv, self.conv1d.weight[:, 0].T.contiguous()
        mixed = channels * weight[-1]
        for tap, kernel in enumerate(weight[:-1]):
            mixed.addcmul_(past[:, tap].to(mixed.dtype), kernel)
        for tap in range(past.shape[1]):
            past[:, tap] = past[:, tap + 1] if tap + 1 < past.shape[1] else channels
        if self.conv1d.bias is not None:
            mixed += self.conv1d.bias
        inputs, dt, A, B, C = self._discretize(self.act(mixed))
        outputs = selective_step_(state.scan, inputs, dt, A, B, C, scratch.like(state.scan))
        outputs = outputs.addcmul_(inputs, self.D.to(inputs.dtype)) * self.act(gate)
        return self.out_proj(outputs.to(hidden_states.dtype))

    def _step_by_kernels(self, projected: Tensor, state: MambaState) -> Tensor:
        """The same with compiled kernels, from channels and gate `(batch, 2 * channels)` on."""
        from .step_numba import convolve_step_, scan_step_

        channels = convolve_step_(state.conv, projected, self.conv1d.weight, self.conv1d.bias)
        selected = self.x_proj(channels)
        steps = F.linear(selected[:, : self.time_step_rank], self.dt_proj.weight)
        outputs = scan_step_(state.scan, channels, steps, self.dt_proj.bias, self.A_log, selected, self.D, projected)
        return self.out_proj(outputs)

    def _discretize(self, channels: Tensor, by_kernels: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the scan needs: the convolved channels `(…, channels)` themselves, dt, A, B and C, in float32 or wider.

        The recurrence runs in that type, whatever the model's own: its products decay towards zero.
        """
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = torch.split(self.x_proj(channels), sizes, dim=-1)
        wide, projected = torch.promote_types(channels.dtype, torch.float32), F.linear(dt, self.dt_proj.weight)
        if by_kernels:
            from .mixer_numba import to_steps

            dt = to_steps(projected, self.dt_proj.bias)
        else:
            dt = F.softplus(projected.to(wide) + self.dt_proj.bias.to(wide))
        return channels.to(wide), dt, -torch.exp(self.A_log.to(wide)), B.to(wide), C.to(wide)

    def _scan(
        self,
        inputs: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: MambaState | None,
        begins: Tensor | None,
    ) -> Tensor:
        if state is None:
            return selective_scan(inputs, dt, A, B, C, reset=begins)[0]
        # A copy, because the scan keeps its initial state for the backward pass and the cache moves on.
        outputs, last = selective_scan(inputs, dt, A, B, C, state.scan.clone(), begins)
        state.scan.copy_(last.detach())
        return outputs

    def _gate(self, outputs: Tensor, inputs: Tensor, gate: Tensor, by_kernels: bool) -> Tensor:
        """What the scan puts out and skips, times the activated gate."""
        if by_kernels:
            from .mixer_numba import gate_outputs

            return gate_outputs(outputs, inputs, self.D, gate)
        return torch.addcmul(outputs, inputs, self.D.to(inputs.dtype)) * self.act(gate)

    def _convolve(self, channels: Tensor, state: MambaState | None, begins: Tensor | None, by_kernels: bool) -> Tensor:
        """Causal depthwise convolution over time, as a sum of shifted products: no transposition, any length. Then
        the activation."""
        time, kernel = channels.shape[1], self.conv_kernel_size
        document = None
        if begins is not None:  # numbers over the whole window; what lies before this call belongs to the first, 0
            document = F.pad(begins.cumsum(1)[..., None], (0, 0, kernel - 1, 0))
        if state is None:
            window = F.pad(channels, (0, 0, kernel - 1, 0))
        else:
            past = state.conv
            window = torch.cat([past.to(channels.dtype), channels], dim=1)
            past.copy_(window[:, time:].detach())
            if document is not None:
                past.masked_fill_(document[:, time:] != document[:, -1:], 0)
        if by_kernels:
            from .mixer_numba import convolve

            return convolve(window, self.conv1d.weight, self.conv1d.bias, begins)
        weight = self.conv1d.weight[:, 0].to(channels.dtype)
        outputs = channels * weight[:, -1]
        for tap in range(kernel - 1):
            earlier = window[:, tap : tap + time]
            if document is None:
                outputs = torch.addcmul(outputs, earlier, weight[:, tap])
            else:
                # The product is masked, not the factor: autograd then keeps the window once, not once per tap.
                other = document[:, tap : tap + time] != document[:, kernel - 1 :]
                outputs = outputs + (earlier * weight[:, tap]).masked_fill(other, 0)
        return self.act(outputs if self.conv1d.bias is None else outputs + self.conv1d.bias.to(channels.dtype))


__all__ = ["MidiMambaMixer"]
