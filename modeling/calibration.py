"""The last thing that a discriminator does: turn its logits into log-odds that can be trusted."""

import torch
from torch import Tensor, nn


class Calibration(nn.Module):
    """
    Platt scaling: `scale * logit + offset`, fitted on music that the discriminator was not trained on.

    A new discriminator has scale 1 and offset 0. They are buffers, which no optimizer changes and every checkpoint
    holds. Older checkpoints lack them, and are read as scale 1 and offset 0.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, logits: Tensor) -> Tensor:
        """Log-odds from logits, of any shape."""
        return logits * self.scale.to(logits.dtype) + self.offset.to(logits.dtype)

    @torch.no_grad()
    def set(self, scale: float, offset: float) -> None:
        """Replace both numbers."""
        self.scale.fill_(scale)
        self.offset.fill_(offset)


__all__ = ["Calibration"]
