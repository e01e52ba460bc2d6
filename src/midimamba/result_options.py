"""What the commands that judge or publish music can be told; see [`midimamba.command_options`]. Light to import."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from midimamba.command_options import SOUNDFONT, SamplingOptions
from midimamba.errors import InputError
from midimamba.tokenization.sampling_limits import MAX_NUMPY_SEED, MAX_SIZE, check_sampling, check_whole

FEWEST_SAMPLES = 5
"""Samples that an evaluation needs, one for each fold of its classifiers. It needs twice as many real pieces."""


@dataclass(frozen=True)
class EvaluateOptions:
    """
    What `midimamba evaluate` compares, and how. Raises [`~midimamba.errors.InputError`] for values that cannot be.
    """

    music: str = field(
        metadata={
            "positional": True,
            "help": "a generator, in a folder or on the Hub; or a folder of MIDI files",
        }
    )
    reference: str = field(metadata={"help": "a corpus made by `midimamba tokenize`, or such a data set on the Hub"})
    out: Path = field(metadata={"help": "report.json to write; report.md and pictures go beside it"})
    split: str = field(
        default="test",
        metadata={
            "group": "comparison",
            "choices": ("test", "validation"),
            "help": "the held-out music; copies are searched for in `train`",
        },
    )
    bars: int = field(
        default=32, metadata={"group": "comparison", "help": "compare this many bars from the start of every piece"}
    )
    length: int = field(
        default=128,
        metadata={"group": "comparison", "help": "number of tokens, where sequences of equal length are compared"},
    )
    seed: int = field(default=0, metadata={"group": "comparison", "help": "the same seed gives the same report"})
    num: int = field(default=64, metadata={"group": "sampling from a generator", "help": "number of pieces"})
    max_new_tokens: int = field(
        default=2048, metadata={"group": "sampling from a generator", "help": "at most this many tokens per piece"}
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "group": "sampling from a generator",
            "help": "below 1 safer, above 1 wilder; 1 is the model's own distribution, whatever its generation config "
            "says",
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "group": "sampling from a generator",
            "help": "draw from the most likely tokens with this total probability; 1 is the model's own distribution",
        },
    )

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, 0, MAX_NUMPY_SEED)
        check_whole("length", self.length, 4, MAX_SIZE)  # distinct-4 counts sequences of four
        check_whole("num", self.num, FEWEST_SAMPLES, MAX_SIZE)
        _ = self.sampling  # checks the rest

    @property
    def sampling(self) -> SamplingOptions:
        """How a generator is sampled for the comparison. Real pieces end where they end, and so do these."""
        names = ("num", "bars", "max_new_tokens", "temperature", "top_p", "seed")
        return SamplingOptions(**{name: getattr(self, name) for name in names}, at_most=True)


@dataclass(frozen=True)
class ListenOptions:
    """What `midimamba listen` makes a test of, or whose answers it scores."""

    paths: Sequence[Path] = field(
        metadata={
            "positional": True,
            "help": "folders of MIDI files; with --score, the listeners' answers.json files",
        }
    )
    out: Path | None = field(
        default=None,
        metadata={
            "group": "make a test",
            "help": "folder to make: sounds, the page index.html, and key.json, which listeners do not get",
        },
    )
    num: int = field(default=8, metadata={"group": "make a test", "help": "number of pieces per folder"})
    bars: int = field(
        default=16, metadata={"group": "make a test", "help": "play this many bars from the start of every piece"}
    )
    seed: int = field(default=0, metadata={"group": "make a test", "help": "the same seed gives the same test"})
    soundfont: Path | None = field(
        default=None,
        metadata={
            "group": "make a test",
            "help": SOUNDFONT,
        },
    )
    score: Path | None = field(
        default=None,
        metadata={
            "group": "score a test",
            "metavar": "DIR",
            "help": "a test made before: print what its listeners thought of each folder",
        },
    )

    def __post_init__(self) -> None:
        check_sampling(num=self.num, bars=self.bars)
        check_whole("seed", self.seed, 0, MAX_NUMPY_SEED)


@dataclass(frozen=True)
class PublishOptions:
    """What `midimamba publish` uploads, and where. Raises [`InputError`] for options that do not go together."""

    folder: Path | None = field(
        default=None,
        metadata={"positional": True, "help": "of a generator, or of a corpus made by `midimamba tokenize`"},
    )
    repo: str | None = field(
        default=None,
        metadata={"aliases": ("--to",), "help": "repository of the generator, corpus or Space, as owner/name"},
    )
    discriminator: Sequence[Path] = field(
        default=(),
        metadata={
            "metavar": "DIR",
            "help": "folders of the generator's discriminators, at most one of each kind: that of tokens goes to "
            "<repo>-discriminator, that of musical features to <repo>-musical-discriminator",
        },
    )
    report: Path | None = field(
        default=None,
        metadata={
            "group": "card",
            "help": "report.json of the generator's run, or what `midimamba evaluate` wrote",
        },
    )
    license: str | None = field(
        default=None,
        metadata={
            "group": "card",
            "help": "the Hub's name of the licence of the weights, or of a corpus, such as cc-by-4.0",
        },
    )
    data_license: str | None = field(
        default=None,
        metadata={"group": "card", "help": "the same of the music that the model was trained on, such as cc0-1.0"},
    )
    private: bool = field(default=False, metadata={"help": "make new repositories private"})
    space: str | None = field(
        default=None,
        metadata={
            "group": "Space",
            "metavar": "MODEL",
            "help": "instead of a folder: make a Space with the page of `midimamba app` for this model of the Hub",
        },
    )
    out: Path | None = field(
        default=None,
        metadata={"group": "Space", "help": "write the Space's files to this new folder, and upload nothing"},
    )

    def __post_init__(self) -> None:
        if self.space is None:
            if self.folder is None:
                raise InputError("FOLDER is missing: name a generator or a corpus first, or a model with --space")
            if self.repo is None:
                raise InputError("--repo is missing: name the repository as owner/name")
            if self.out is not None:
                raise InputError("--out is for --space: leave it out")
        elif self.folder is not None or self.discriminator or self.report or self.license or self.data_license:
            raise InputError("a Space has only a model: leave out the folder and all about its card")
        elif (self.repo is None) == (self.out is None):
            raise InputError("--space needs either --to OWNER/NAME or --out FOLDER: give one of them")
