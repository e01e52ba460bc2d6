"""What works on each token after a mixer: a SwiGLU MLP, or one of several, chosen for each token."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_midimamba import MidiMambaConfig


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202), with the parameters of Llama."""

    def __init__(self, config: MidiMambaConfig):
        super().__init__()
        inner = config.mlp_intermediate_size
        assert inner is not None  # set by the configuration
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Any shape `(…, hidden)` to the same."""
        outputs: Tensor = self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return outputs


class SwitchExperts(nn.Module):
    """
    Mixture of SwiGLU experts with top-1 routing, as in the Switch Transformer (Fedus et al., arXiv 2101.03961).

    In training an expert takes its first `capacity_factor * tokens / num_experts` tokens; the others skip it and
    keep their residual stream only. In evaluation no token is dropped, so decoding one by one equals the full pass.
    Padding does not count as a token: it takes no part in capacity, losses or shares, and its output is zero.
    """

    def __init__(self, config: MidiMambaConfig):
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        assert inner is not None  # set by the configuration
        self.capacity_factor = config.capacity_factor
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, hidden))

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, time, hidden)`): the normalised residual stream.
            mask (`Tensor` of shape `(batch, time, 1)`, *optional*): 0 where a token is padding.

        Returns:
            The output of shape `(batch, time, hidden)`, and a `Tensor` of shape `(3,)`: load-balancing loss, z-loss
            and the share of tokens dropped.
        """
        tokens = hidden_states.flatten(0, 1)
        if mask is None:
            outputs, statistics = self._route(tokens)
        else:
            real = mask.flatten().nonzero().squeeze(-1)
            routed, statistics = self._route(tokens[real])
            outputs = torch.zeros_like(tokens, dtype=routed.dtype).index_copy(0, real, routed)
        return outputs.view_as(hidden_states), statistics

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(n, hidden)`, none of them padding, through the expert of each."""
        logits = self._router_logits(tokens)
        probabilities = logits.softmax(-1)
        gate, expert = probabilities.max(-1)
        chosen = F.one_hot(expert, len(self.down_proj))
        place = chosen.cumsum(0).gather(1, expert[:, None]).squeeze(1) - 1  # in the queue of its expert
        if self.training:
            capacity = math.ceil(self.capacity_factor * len(tokens) / len(self.down_proj))
            outputs = self._run_experts(tokens, expert, place, capacity, self.gate_up_proj, self.down_proj)
        else:
            capacity = int(place.max()) + 1
            outputs = self._run_chosen_experts(tokens, expert, place, capacity)
        statistics = [
            balance_loss(probabilities, chosen),
            logits.logsumexp(-1).square().mean(),  # ST-MoE, arXiv 2202.08906, equation 5
            (place >= capacity).to(logits.dtype).mean(),
        ]
        return outputs * gate[:, None].to(outputs.dtype), torch.stack(statistics)

    def _router_logits(self, tokens: Tensor) -> Tensor:
        """In float32 or wider, whatever the model's type: with rounded logits, training is unstable (section 2.4)."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(wide), self.router.weight.to(wide))

    def _run_chosen_experts(self, tokens: Tensor, expert: Tensor, place: Tensor, capacity: int) -> Tensor:
        """Run only the experts that some token chose: decoding then reads the weights of one expert per sequence."""
        used, expert = expert.unique(return_inverse=True)
        if len(used) == len(self.down_proj):
            return self._run_experts(tokens, expert, place, capacity, self.gate_up_proj, self.down_proj)
        return self._run_experts(tokens, expert, place, capacity, self.gate_up_proj[used], self.down_proj[used])

    @staticmethod
    def _run_experts(
        tokens: Tensor, expert: Tensor, place: Tensor, capacity: int, gate_up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        """All experts at once, as products of `(experts, capacity, hidden)`; zeros for tokens beyond capacity."""
        slots = len(down_proj) * capacity
        slot = torch.where(place < capacity, expert * capacity + place, slots)  # the last is for what is dropped
        queues = tokens.new_zeros(slots + 1, tokens.shape[1]).index_copy(0, slot, tokens)[:-1]
        gate, up = (queues.view(-1, capacity, tokens.shape[1]) @ gate_up_proj).chunk(2, dim=-1)
        outputs = ((F.silu(gate) * up) @ down_proj).flatten(0, 1)
        return F.pad(outputs, (0, 0, 0, 1))[slot]


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """The load-balancing loss of a Switch layer (arXiv 2101.03961, equations 4 to 6, without its coefficient).

    Args:
        probabilities (`Tensor` of shape `(tokens, experts)`): of the router.
        chosen (`Tensor` of shape `(tokens, experts)`): 1 for the expert that a token was sent to, 0 for others.

    Returns:
        A scalar: 1 if both are even over the experts; the number of experts if every token goes to one of them.
    """
    share = chosen.to(probabilities.dtype).mean(0)
    return probabilities.shape[1] * (share * probabilities.mean(0)).sum()


__all__ = ["SwiGLU", "SwitchExperts", "balance_loss"]
