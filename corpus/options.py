"""The options of [`~midimamba.corpus.build.tokenize_corpus`], light to import because they are flags as well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from midimamba.errors import InputError
from midimamba.tokenization.choices import CONTROLS, SUBWORD_MODELS, TOKENIZATIONS
from midimamba.tokenization.sampling_limits import MAX_SIZE, check_fraction, check_whole

INFILL_SHARE = 0.3
"""The share of training pieces that are rearranged where a corpus was made for infilling."""


def integer_or_none(text: str) -> int | None:
    """The value of a flag that may be the word `none`."""
    return None if text.lower() == "none" else int(text)


@dataclass(frozen=True)
class CorpusOptions:
    """
    How MIDI files become a corpus.

    > Parameters that control the tokenizer

    Args:
        tokenization (`str`, *optional*, defaults to `"REMI"`):
            One of [`~midimamba.tokenization.choices.TOKENIZATIONS`].
        tokenizer_options (`Mapping[str, Any]`, *optional*):
            MidiTok's options, see [`~midimamba.tokenization.tokenizations.build_tokenizer`].
        tokenizer (`str`, *optional*):
            Use the tokenizer of this folder or Hub repository instead of making one: for a corpus that fits an
            existing model. The other options of this group then have no effect.
        subword_model (`str`, *optional*, defaults to `"BPE"`):
            `"BPE"` or `"Unigram"`.
        vocab_size (`int`, *optional*, defaults to 1000):
            Number of ids after the subword model. `None` keeps the base tokens, as tokenizations with several
            vocabularies always do.
        training_tokens (`int`, *optional*, defaults to 10,000,000):
            Train the subword model on pieces with at most this many base tokens in total, drawn at random. This
            bounds its memory.
        infill (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer has what a model needs to fill gaps. Only REMI can have it.

    > Parameters that control the control tokens

    Args:
        controls (`Sequence[str]`, *optional*):
            Computed controls that prefix each piece, from [`~midimamba.tokenization.choices.CONTROLS`].
        labels (`Sequence[str]`, *optional*):
            Columns of the manifest, or of the data set, that prefix each piece. Beside `controls`, none may have the
            name of a computed control.

    > Parameters that control the splits

    Args:
        valid_fraction, test_fraction (`float`, *optional*, defaults to 0.1):
            Expected fractions of the pieces in these splits.
        seed (`int`, *optional*, defaults to 0):
            Decides which piece goes to which split.

    > Parameters that control the reading of files

    Args:
        limit (`int`, *optional*):
            Use at most this many files, the first by name.
        midi_column (`str`, *optional*):
            The column of a data set that holds MIDI bytes. By default the only column with bytes.
        streaming (`bool`, *optional*, defaults to `False`):
            Read a data set from the Hub row by row, without downloading it first.
        num_workers (`int`, *optional*):
            Processes that read files, by default one per processor. The result does not depend on it.

    Raises:
        InputError: if a number makes no sense.
    """

    tokenization: str = field(
        default="REMI",
        metadata={"group": "tokenizer", "help": "MidiTok's tokenization", "choices": TOKENIZATIONS},
    )
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = field(
        default=None,
        metadata={
            "group": "tokenizer",
            "help": "use the tokenizer of this folder or repository, to make a corpus for an existing model",
        },
    )
    subword_model: str = field(
        default="BPE",
        metadata={
            "group": "tokenizer",
            "help": "how frequent token sequences become one id",
            "choices": SUBWORD_MODELS,
        },
    )
    vocab_size: int | None = field(
        default=1000,
        metadata={
            "group": "tokenizer",
            "help": "number of ids with the subword model; `none` for no subword model",
            "parse": integer_or_none,
        },
    )
    training_tokens: int = field(
        default=10_000_000,
        metadata={
            "group": "tokenizer",
            "help": "train the subword model on at most this many base tokens, which bounds its memory",
        },
    )
    infill: bool = field(
        default=False,
        metadata={
            "group": "tokenizer",
            "help": "add the tokens with which a model can learn to fill gaps (REMI only)",
        },
    )
    controls: Sequence[str] = field(
        default=(),
        metadata={
            "group": "control tokens",
            "help": "prefix each piece with these controls",
            "choices": CONTROLS,
            "parse": str.lower,
        },
    )
    labels: Sequence[str] = field(
        default=(),
        metadata={
            "group": "control tokens",
            "help": "prefix each piece with these columns of the manifest or data set",
            "metavar": "COLUMN",
        },
    )
    valid_fraction: float = field(
        default=0.1, metadata={"group": "splits", "help": "fraction of the pieces for validation"}
    )
    test_fraction: float = field(
        default=0.1, metadata={"group": "splits", "help": "fraction of the pieces for the final test"}
    )
    seed: int = field(default=0, metadata={"group": "splits", "help": "decides which piece goes to which split"})
    limit: int | None = field(
        default=None, metadata={"group": "reading", "help": "use at most this many files, the first by name"}
    )
    midi_column: str | None = field(
        default=None,
        metadata={
            "group": "reading",
            "help": "the data set's column of MIDI bytes; by default the only column with bytes",
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"group": "reading", "help": "read the data set row by row, without downloading it first"},
    )
    num_workers: int | None = field(
        default=None, metadata={"group": "reading", "help": "processes that read files; by default one per processor"}
    )

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("training_tokens", 1), ("limit", 1), ("num_workers", 1)):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, least, MAX_SIZE)
        valid, test = self.valid_fraction, self.test_fraction
        check_fraction("valid_fraction", valid)
        check_fraction("test_fraction", test)
        if valid + test >= 1:
            raise InputError(
                f"validation and test fractions {valid} and {test} leave nothing to train on: choose smaller ones"
            )
