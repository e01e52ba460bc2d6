"""The options of [`~midimamba.corpus.build.tokenize_corpus`], light to import because they are flags as well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from midimamba.errors import InputError
from midimamba.tokenization.choices import CONTROLS, SUBWORD_MODELS, TOKENIZATIONS
from midimamba.tokenization.sampling_limits import MAX_SIZE, check_fraction, check_whole

MAX_TASKS = 99_999  # file names have five digits
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
            existing model. It decides the tokenization and the subword model, so they cannot be chosen as well.
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


EXECUTORS = ("local", "slurm", "ray")


@dataclass(frozen=True)
class ClusterOptions:
    """
    Where a corpus is made, if not by one process with its workers: in tasks that datatrove runs.

    Args:
        executor (`str`, *optional*):
            `"local"`: in processes of this machine. `"slurm"`: as jobs, on a cluster with Slurm. `"ray"`: on a Ray
            cluster.
        tasks (`int`, *optional*, defaults to 8):
            Into how many parts the work is divided. A task that is interrupted starts again. The result does not
            depend on it.
        work (`str`, *optional*):
            The folder in which tasks hand their results to each other, on a file system that all of them see. By
            default a hidden folder beside the corpus.
        slurm (`Sequence[str]`, *optional*):
            Options of `sbatch` as `NAME=VALUE`, such as `"partition=cpu"` and `"time=04:00:00"`.

    Raises:
        InputError: if an option makes no sense, or needs another one.
    """

    executor: str | None = field(
        default=None,
        metadata={
            "group": "cluster",
            "help": "make the corpus in tasks: in processes of this machine, as Slurm jobs, or on a Ray cluster; "
            "--num-workers then bounds how many run at once",
            "choices": EXECUTORS,
        },
    )
    tasks: int | None = field(default=None, metadata={"group": "cluster", "help": "number of tasks (default: 8)"})
    work: str | None = field(
        default=None,
        metadata={
            "group": "cluster",
            "help": "folder or address for what tasks hand to each other; all of them must see it "
            "(default: hidden, beside the corpus)",
        },
    )
    slurm: Sequence[str] = field(
        default=(),
        metadata={
            "group": "cluster",
            "repeated": True,
            "metavar": "NAME=VALUE",
            "help": "an option of sbatch, such as partition=cpu; repeat it for more",
        },
    )

    def __post_init__(self) -> None:
        if self.executor is None and (given := [n for n in ("tasks", "work", "slurm") if getattr(self, n)]):
            raise InputError(
                f"--{given[0]} is for tasks: add --executor {'slurm' if given[0] == 'slurm' else 'local'}"
            )
        if self.tasks is not None:
            check_whole("tasks", self.tasks, 1, MAX_TASKS)
        if self.slurm and self.executor != "slurm":
            raise InputError("--slurm is for --executor slurm: leave it out")
        if wrong := [text for text in self.slurm if not all(text.partition("=")[::2])]:
            raise InputError(f"--slurm {wrong[0]}: write NAME=VALUE, such as partition=cpu")
        if self.executor == "slurm" and "partition" not in self.sbatch:
            raise InputError("which machines should do it? Add --slurm partition=NAME; `sinfo` lists them")

    @property
    def sbatch(self) -> dict[str, str]:
        """The options of `sbatch`."""
        return {name: value for name, _, value in (text.partition("=") for text in self.slurm)}
