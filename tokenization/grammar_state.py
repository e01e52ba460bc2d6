"""What the grammar remembers of each sequence."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


class At:
    """The columns of a state's values. The first four are what an id leaves behind, the next three are counts."""

    LAST, POSITION, LIMIT, PROGRAM, SILENCE, EMPTY, BARS, ONSET, NOTES, HELD, PROMPTED = range(11)
    LEFT, COUNTS = slice(LAST, PROGRAM + 1), slice(SILENCE, BARS + 1)


@dataclass
class State:
    """Where the music of every row stands.

    Args:
        values (`LongTensor` of shape (batch, 11)):
            The columns [`At`]: type of the last token; position, positions per bar; program in force; base tokens and
            bars since the last complete note, bars; number of the onset, notes; whether the onset is the prompt's
            last, notes of the prompt.
        stamps (`LongTensor` of shape (batch, notes)): the onset at which each note, program by program, last began.
        used (`LongTensor` of shape (batch, programs + 1)): notes that begin at this onset; the last column is unused.
        played (`BoolTensor` of shape (batch, programs)): programs of the prompt, and of the controls before it.
        clock (`DoubleTensor` of shape (batch, columns)): where the music stands in time, if constraints depend on it.
        own (`LongTensor` of shape (batch, columns)): what the grammar of one tokenization remembers besides.
    """

    values: Tensor
    stamps: Tensor
    used: Tensor
    played: Tensor
    clock: Tensor
    own: Tensor

    @property
    def last(self) -> Tensor:
        """The type of the last token, of shape (batch,)."""
        return self.values[:, At.LAST]

    @property
    def program(self) -> Tensor:
        """The row of the program in force, of shape (batch, 1)."""
        return self.values[:, At.PROGRAM, None]

    @property
    def onset(self) -> Tensor:
        """The number of the onset, of shape (batch, 1)."""
        return self.values[:, At.ONSET, None]

    def rows(self, indices: Tensor) -> "State":
        return State(*(getattr(self, part.name)[indices] for part in fields(self)))

    def joined(self, other: "State") -> "State":
        return State(*(torch.cat([getattr(self, part.name), getattr(other, part.name)]) for part in fields(self)))
