"""What the layers of one forward pass share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .layer_states import Scratch


@dataclass
class AttentionFrame:
    """
    Positions, and which keys a query sees.

    Args:
        angles (`tuple[Tensor, Tensor]`): cosine and sine of every position, each `(batch or 1, 1, time, head)`.
        visible (`Tensor`, *optional*): which key a query sees, `(batch, 1, time, keys)`; for flash attention
            `(batch, keys)`. `None`: every key up to the query's own.
        packing (`Mapping[str, Any]`, *optional*, defaults to `{}`): flash attention's bounds of packed documents.
    """

    angles: tuple[Tensor, Tensor]
    visible: Tensor | None = None
    packing: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "AttentionFrame":
        """The same on another device."""
        cosine, sine = self.angles
        packing = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in self.packing.items()}
        return AttentionFrame((cosine.to(device), sine.to(device)), _moved(self.visible, device), packing)


@dataclass
class Frame:
    """
    What every mixer and feed-forward may ask about the tokens of a forward pass.

    Args:
        past (`int`, *optional*, defaults to 0): how many tokens the states have read before.
        mask (`Tensor` of shape `(batch, time, 1)`, *optional*): 0 where a token is padding.
        begins (`BoolTensor` of shape `(batch, time)`, *optional*): tokens with which a document begins. Never the
            first, which goes on from the state.
        scratch (`Scratch`, *optional*): memory that a layer may overwrite.
        attention (`AttentionFrame`, *optional*): for layers that attend.
    """

    past: int = 0
    mask: Tensor | None = None
    begins: Tensor | None = None
    scratch: Scratch = field(default_factory=Scratch)
    attention: AttentionFrame | None = None

    def to(self, device: torch.device | str) -> "Frame":
        """The same on another device. Accelerate asks for it where layers are on several."""
        attention = None if self.attention is None else self.attention.to(device)
        return replace(self, mask=_moved(self.mask, device), begins=_moved(self.begins, device), attention=attention)


def _moved(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


__all__ = ["AttentionFrame", "Frame"]
