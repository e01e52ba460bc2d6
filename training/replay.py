"""Old negatives: a discriminator that sees only the newest forgets what it knew, and the generator goes in circles."""

import torch
from torch import Tensor


class ReplayBuffer:
    """
    A history of generated sequences (Shrivastava et al. 2017, arXiv 1612.07828, section 2.3).

    A full buffer overwrites random sequences, so that the age of those it holds falls off geometrically: mostly recent
    ones, a few old ones. All draws come from torch's own generator, whose state is in every checkpoint.

    Args:
        size (`int`): sequences to hold; 0 remembers none.
    """

    def __init__(self, size: int):
        self.size = size
        self.sequences: Tensor | None = None
        """`(len, time)`, or `None` before the first are added."""

    def __len__(self) -> int:
        return 0 if self.sequences is None else len(self.sequences)

    def add(self, sequences: Tensor) -> None:
        """Remember sequences `(n, time)`; when there are more than room for, some random ones of the older go."""
        sequences = sequences[-self.size :] if self.size else sequences[:0]
        if not len(sequences):
            return
        if self.sequences is None:
            self.sequences = sequences[:0].clone()
        room = self.size - len(self)
        appended, overwriting = sequences[:room], sequences[room:]
        places = torch.randperm(len(self))[: len(overwriting)].to(sequences.device)
        self.sequences[places] = overwriting
        self.sequences = torch.cat([self.sequences, appended])

    def draw(self, count: int) -> Tensor:
        """So many different sequences at random, `(count, time)`.

        Raises:
            ValueError: if the buffer holds fewer.
        """
        if self.sequences is None or count > len(self):
            raise ValueError(f"the replay holds {len(self)} sequences, {count} were asked for")
        return self.sequences[torch.randperm(len(self))[:count].to(self.sequences.device)]
