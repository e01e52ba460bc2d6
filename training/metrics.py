"""What a run measures between two logs."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Measures = dict[str, Tensor | float]
"""Figures of one batch by name: scalars, on the device where they were computed."""


class Metrics:
    """
    Collects figures and averages them by their weights; of a name that ends in `_max` it keeps the largest.

    Figures stay on their device until [`~Metrics.fetch`] brings them over together, so that all of them cost a
    training step one wait for the device.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[str, Tensor, float]] = []
        self._totals: dict[str, tuple[float, float]] = {}

    def add(self, measures: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Take figures in.

        Args:
            measures (`Mapping[str, Tensor | float]`): scalars by name.
            weight (`float`, *optional*, defaults to 1.0): the share of a batch that they are of.
        """
        for name, value in measures.items():
            if isinstance(value, Tensor):
                self._waiting.append((name, value.detach(), weight))
            else:
                self._count(name, value, weight)

    def fetch(self, *others: Tensor) -> list[float]:
        """Bring all figures over from the device, at once. Other scalars come along and are returned."""
        scalars = [*others, *(value for _, value, _ in self._waiting)]
        numbers = torch.stack([scalar.detach().float() for scalar in scalars]).tolist() if scalars else []
        for (name, _, weight), number in zip(self._waiting, numbers[len(others) :], strict=True):
            self._count(name, number, weight)
        self._waiting.clear()
        return numbers[: len(others)]

    def averages(self) -> dict[str, float]:
        """All figures that were taken in since the last [`~Metrics.clear`]."""
        self.fetch()
        return {
            name: total if name.endswith("_max") else total / weight
            for name, (total, weight) in sorted(self._totals.items())
        }

    def clear(self) -> None:
        """Forget all figures, as after a log."""
        self._waiting.clear()
        self._totals.clear()

    def _count(self, name: str, value: float, weight: float) -> None:
        total, weights = self._totals.get(name, (value if name.endswith("_max") else 0.0, 0.0))
        total = max(total, value) if name.endswith("_max") else total + weight * value
        self._totals[name] = (total, weights + weight)


def weighted_mean(parts: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor | float]]]) -> dict[str, Tensor]:
    """The figures of a batch from those of its parts; the largest of a name in `_max`.

    Args:
        parts (`Sequence[tuple[Mapping, Mapping]]`): figures by name, and what each is a mean over: a number of
            sequences or of tokens. A figure without a number counts once per part.
    """
    names = {name: None for measures, _ in parts for name in measures}
    return {
        name: _combine(name, [(measures[name], counts.get(name, 1)) for measures, counts in parts if name in measures])
        for name in names
    }


def _combine(name: str, figures: list[tuple[Tensor, Tensor | float]]) -> Tensor:
    if name.endswith("_max"):
        return torch.stack([value for value, _ in figures]).max()
    total = sum(count for _, count in figures)
    if isinstance(total, Tensor):
        total = total.clamp(min=1)  # the mean of nothing is 0
    return torch.stack([value * (count / total) for value, count in figures]).sum()


class RunningMeans:
    """
    The means of figures over the steps of an update; of a name in `_max` the largest.

    They are added up in place. A small tensor that stayed behind after every step would lie between the large ones of
    that step and of the next, which then could not have the same place: memory would grow with the number of steps.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add those of a step."""
        for name, value in figures.items():
            if name not in self._totals:
                self._totals[name] = value.detach().clone()
            elif name.endswith("_max"):
                torch.maximum(self._totals[name], value.detach(), out=self._totals[name])
            else:
                self._totals[name] += value.detach()
            self._counts[name] += 1

    def means(self) -> dict[str, Tensor]:
        """Each over the steps that had it."""
        return {
            name: total if name.endswith("_max") else total / self._counts[name]
            for name, total in self._totals.items()
        }
