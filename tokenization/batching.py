"""Cutting and padding of encoded pieces, by the arguments that all processors of transformers take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from transformers import BatchEncoding
from transformers.utils import logging
from transformers.utils.generic import PaddingStrategy

from .errors import InputError

logger = logging.get_logger(__name__)

_SIDES = ("left", "right")
# How transformers names truncation: of one sequence, all of them are the same.
_CUTS = {False: False, None: False, "do_not_truncate": False, True: True, "longest_first": True, "only_first": True}


@dataclass(frozen=True)
class Batching:
    """
    How pieces become rows of one length. The arguments are those of transformers' tokenizers.

    Args:
        padding (`bool` or `str`): `True` or `"longest"`: to the longest piece; `"max_length"`: to `max_length`;
            `False` or `"do_not_pad"`: not at all.
        truncation (`bool` or `str`, *optional*): whether pieces are cut to `max_length`.
        max_length (`int`, *optional*): a number of tokens, those before the music included.
        pad_to_multiple_of (`int`, *optional*): lengths are rounded up to a multiple of this.
        padding_side (`str`, *optional*, defaults to `"left"`): or `"right"`.
        truncation_side (`str`, *optional*, defaults to `"right"`): where music is cut off; or `"left"`.

    Raises:
        InputError: if a value is none of these.
    """

    padding: bool | str = True
    truncation: bool | str | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_side: str = "left"
    truncation_side: str = "right"

    def __post_init__(self) -> None:
        if self.padding not in (True, False, *(strategy.value for strategy in PaddingStrategy)):
            raise InputError(f"padding is {self.padding!r}; use True, False, 'longest' or 'max_length'")
        if self.truncation not in _CUTS:
            raise InputError(f"truncation is {self.truncation!r}; use True or False")
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} is {value!r}; it must be a whole number above 0")
        for name in ("padding_side", "truncation_side"):
            if getattr(self, name) not in _SIDES:
                raise InputError(f"{name} is {getattr(self, name)!r}; use 'left' or 'right'")
        if self.max_length is None and (_CUTS[self.truncation] or self.padding == PaddingStrategy.MAX_LENGTH):
            logger.warning_once("pieces have no longest length of their own: give max_length to cut or to pad to it")

    @classmethod
    def of(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Self:
        """
        What a caller gives, and defaults for what is missing or `None`.

        Raises:
            TypeError: if there is no such argument.
        """
        if unknown := sorted(given.keys() - {field.name for field in fields(cls)}):
            raise TypeError(
                f"a MidiProcessor cannot be called with {', '.join(unknown)}: leave it out; it takes midi, "
                f"return_tensors, add_bos, controls, {', '.join(field.name for field in fields(cls))}"
            )
        return cls(**{**defaults, **{name: value for name, value in given.items() if value is not None}})

    def cut(self, prefix: Sequence[Any], music: Sequence[Any]) -> list[Any]:
        """
        One piece of at most `max_length` tokens, if truncation is asked for.

        Args:
            prefix (`list`): begin-of-sequence and controls, which always stay.
            music (`list`): what follows them.

        Raises:
            InputError: if `max_length` leaves no room for the prefix.
        """
        if not _CUTS[self.truncation] or self.max_length is None:
            return [*prefix, *music]
        room = self.max_length - len(prefix)
        if room < 0:
            raise InputError(
                f"max_length is {self.max_length}, but {len(prefix)} tokens come before the music: give a larger one"
            )
        kept = music[:room] if self.truncation_side == "right" else music[max(len(music) - room, 0) :]
        return [*prefix, *kept]

    def pad(self, batch: Sequence[list[Any]], step: Any, return_tensors: str | None) -> BatchEncoding:
        """
        Rows with their mask, 1 on tokens and 0 on padding.

        Args:
            batch (`list`): pieces of any lengths.
            step (`int` or `list[int]`): the padding for one step.
            return_tensors (`str`, *optional*): `"pt"`, `"np"` or `None` for lists.

        Raises:
            ValueError: if tensors are asked for, and rows have different lengths.
        """
        sizes = [self._size(len(row), max(map(len, batch))) for row in batch]
        ids, mask = [], []
        for row, size in zip(batch, sizes, strict=True):
            pads, blank = [step] * (size - len(row)), [0] * (size - len(row))
            right = self.padding_side == "right"
            ids.append([*row, *pads] if right else [*pads, *row])
            mask.append([1] * len(row) + blank if right else blank + [1] * len(row))
        return BatchEncoding({"input_ids": ids, "attention_mask": mask}, tensor_type=return_tensors)

    def _size(self, length: int, longest: int) -> int:
        """The length of a padded row of `length` tokens, which is never less than it has."""
        if self.padding in (False, PaddingStrategy.DO_NOT_PAD):
            return length
        fixed = self.padding == PaddingStrategy.MAX_LENGTH
        wanted = (self.max_length or length) if fixed else longest
        multiple = self.pad_to_multiple_of or 1
        return max(-(-wanted // multiple) * multiple, length)


__all__ = ["Batching"]
