"""What each command can be told. [`midimamba.options`] makes flags of these dataclasses, so they are light to import.

The options of `midimamba tokenize` are those of a corpus: [`~midimamba.corpus.options.CorpusOptions`]. Those of
commands that judge or publish what others made are in [`midimamba.result_options`].
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from midimamba.errors import InputError
from midimamba.tokenization.choices import CONTROLS
from midimamba.tokenization.constraints import Constraints
from midimamba.tokenization.sampling_limits import (
    BEST_OF,
    MAX_SIZE,
    PICKS,
    check_sampling,
    check_whole,
)
from midimamba.training.plan import SIZES

# The types of numbers that the package gguf can write, for llama.cpp: the first two for each number, the others for
# blocks of 32.
QUANTIZED = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
_OWN = "(default: the model's own)"
_MINUTES = 10.0
# What several commands say of the same option.
MODEL = "a folder or a repository on the Hub"
SOUNDFONT = "play with this .sf2 file instead of the one that pretty_midi ships"
_TEMPERATURE = {"group": "sampling", "help": f"below 1 safer, above 1 wilder {_OWN}"}
_TOP_P = {
    "group": "sampling",
    "help": f"draw from the most likely tokens with this total probability {_OWN}",
}
_CONTROL = {
    "group": "request",
    "repeated": True,
    "metavar": "NAME=VALUE",
    "help": "what the music should be like, such as key=C-major; repeat it for more controls or instruments",
}


@dataclass(frozen=True)
class TokenizeFiles:
    """What `midimamba tokenize` reads and writes."""

    source: str = field(
        metadata={
            "positional": True,
            "help": "a folder of MIDI and ABC files and archives, searched recursively; an archive (.zip, .tar, "
            ".tar.gz, .tar.bz2, .tar.xz); a book of tunes (.abc); a data set with a column of MIDI bytes, in a folder "
            "or on the Hub (owner/name); or `chorales`, Bach's from music21",
        }
    )
    out: str = field(
        metadata={
            "help": "folder to make, or to bring up to date; with --executor, also an address such as s3://bucket/corpus"
        }
    )
    tokenizer_config: Path | None = field(
        default=None,
        metadata={"group": "tokenizer", "help": "YAML file of MidiTok's options, such as `num_velocities: 16`"},
    )


@dataclass(frozen=True)
class TrainOptions:
    """What `midimamba train` reads and writes, and what bounds it. Raises [`InputError`] for values that cannot be."""

    data: str = field(
        metadata={
            "positional": True,
            "aliases": ("--data", "--dataset_name"),
            "help": "a corpus made by `midimamba tokenize`, or music: a folder or an archive of MIDI "
            "files, a data set, or `chorales`. Music is tokenized first, to OUT-data",
        }
    )
    out: Path = field(metadata={"aliases": ("--output_dir",), "help": "folder of the generator to make"})
    minutes: float | None = field(
        default=None,
        metadata={"help": "end after this time, tokenizing and saving included (default: 10 without --steps)"},
    )
    steps: int | None = field(
        default=None, metadata={"aliases": ("--max_steps",), "help": "end after this many steps"}
    )
    size: str | None = field(
        default=None,
        metadata={
            "choices": SIZES,
            "help": "size of the generator (default: the one that suits corpus, machine and time)",
        },
    )
    infill: bool = field(
        default=False,
        metadata={"help": "learn to fill gaps as well, for `midimamba infill`; a corpus must be made with --infill"},
    )
    controls: Sequence[str] = field(
        default=(),
        metadata={
            "choices": CONTROLS,
            "parse": str.lower,
            "help": "learn to be asked for these; a corpus must be made with --controls",
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "read at most this many files of music, the first by name"}
    )
    passed: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"--minutes is {self.minutes}, but must be greater than 0")
        if self.steps is not None:
            check_whole("steps", self.steps, 1, MAX_SIZE)

    @property
    def time(self) -> float | None:
        """Minutes for the whole run, if there is a bound."""
        return _MINUTES if self.minutes is None and self.steps is None else self.minutes


@dataclass(frozen=True)
class DemoOptions:
    """Where `midimamba demo` writes to."""

    out: Path = field(default=Path("midimamba-demo"), metadata={"help": "folder to make"})


@dataclass(frozen=True)
class TuneOptions:
    """What `midimamba tune` reads and writes."""

    model: str = field(
        metadata={
            "positional": True,
            "aliases": ("--model", "--model_name_or_path"),
            "help": "a generator, in a folder or on the Hub",
        }
    )
    data: str = field(
        metadata={
            "aliases": ("--dataset_name",),
            "help": "the generator's corpus, or music, which is tokenized first, to OUT-data",
        }
    )
    out: Path = field(
        metadata={
            "aliases": ("--output_dir",),
            "help": "folder to make; discriminators go to OUT-discriminator and, if there are two, "
            "OUT-musical-discriminator",
        }
    )
    recipe: str = field(
        default="distill",
        metadata={
            "choices": ("distill", "stable", "paper"),
            "help": "distill uses discriminators that hear form, stable is a policy gradient that keeps what was "
            "learned, paper is SeqGAN alone",
        },
    )
    passed: Sequence[str] = ()


@dataclass(frozen=True)
class DrawingOptions:
    """
    How pieces are drawn from a generator, new ones or fillings of a gap.

    Args:
        num (`int`, *optional*, defaults to 4): number of pieces.
        max_new_tokens (`int`, *optional*): at most this many new tokens per piece; at least 16. A piece that needs
            more has fewer bars. By default the model's own, from its generation config, or else 2048.
        temperature (`float`, *optional*): below 1 safer, above 1 wilder; from 0.001 to 1000. By default the model's
            own, or else 1.0.
        top_p (`float`, *optional*): draw from the most likely tokens with this total probability. By default the
            model's own, or else 0.95.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same pieces; not negative.
        constraints ([`~midimamba.tokenization.constraints.Constraints`], *optional*): what new notes must keep to.

    Raises:
        InputError: if a value makes no sense.
    """

    num: int = field(default=4, metadata={"group": "sampling", "help": "number of pieces"})
    max_new_tokens: int | None = field(
        default=None, metadata={"group": "sampling", "help": f"at most this many new tokens per piece {_OWN}"}
    )
    temperature: float | None = field(default=None, metadata=_TEMPERATURE)
    top_p: float | None = field(default=None, metadata=_TOP_P)
    seed: int = field(default=0, metadata={"group": "sampling", "help": "the same seed gives the same pieces"})
    constraints: Constraints | None = None

    def __post_init__(self) -> None:
        check_sampling(**asdict(self))

    @property
    def polyphony(self) -> int | None:
        """The most notes that may sound at once, if constraints say so."""
        return None if self.constraints is None else self.constraints.polyphony


@dataclass(frozen=True)
class SamplingOptions(DrawingOptions):
    """
    How a generator is sampled.

    Args:
        num, max_new_tokens, temperature, top_p, seed, constraints: as in [`DrawingOptions`].
        bars (`int`, *optional*, defaults to 16): this many new bars per piece. TSD and Structured have no bar tokens:
            there the model or `max_new_tokens` ends a piece.
        at_most (`bool`, *optional*, defaults to `False`): a piece ends where the model ends it, with at most `bars`
            new bars.
        best_of (`int`, *optional*): draw this many pieces for each wanted one, and let a discriminator choose; at
            least 2.
        pick (`str`, *optional*, defaults to `"resample"`): choose with probability proportional to the odds that a
            draw is real music; `"best"`: choose the draw with the highest odds.

    Raises:
        InputError: if a value makes no sense.
    """

    bars: int = field(
        default=16, metadata={"group": "sampling", "help": "new bars per piece; TSD and Structured have no bars"}
    )
    at_most: bool = field(
        default=False,
        metadata={
            "group": "sampling",
            "help": "let a piece end where the model ends it, after at most --bars bars",
        },
    )

    best_of: int | None = field(
        default=None,
        metadata={
            "group": "choosing by discriminators",
            "help": f"draw this many pieces for each wanted one, and choose one of them (default: {BEST_OF} with "
            "--discriminator)",
        },
    )
    pick: str = field(
        default=PICKS[0],
        metadata={
            "group": "choosing by discriminators",
            "choices": PICKS,
            "help": "resample: choose at random, in proportion to the odds that a draw is real music; best: choose "
            "the draw with the highest odds, which tends to please the discriminator rather than the ear",
        },
    )


@dataclass(frozen=True, kw_only=True)
class RenderingOptions:
    """Whether pieces are drawn and played, and how."""

    render: bool = field(
        default=False, metadata={"group": "rendering", "help": "write a piano roll and the sound beside each piece"}
    )
    soundfont: Path | None = field(
        default=None,
        metadata={"group": "rendering", "help": SOUNDFONT},
    )
    format: str = field(
        default="wav", metadata={"group": "rendering", "choices": ("wav", "mp3"), "help": "of the sound"}
    )

    def __post_init__(self) -> None:
        if not self.render and (self.soundfont is not None or self.format != "wav"):
            raise InputError("--soundfont and --format say how to play the pieces: add --render")


@dataclass(frozen=True)
class GenerateOptions(RenderingOptions):
    """What `midimamba generate` reads, asks for and writes; how it samples is in [`SamplingOptions`]."""

    model: str = field(metadata={"positional": True, "help": MODEL})
    out: Path | None = field(default=None, metadata={"help": "folder to make"})
    prompt: Path | None = field(default=None, metadata={"group": "request", "help": "a MIDI or ABC file to continue"})
    control: Sequence[str] = field(default=(), metadata=_CONTROL)
    discriminator: Sequence[str] = field(
        default=(),
        metadata={
            "group": "choosing by discriminators",
            "metavar": "D",
            "help": "one or more discriminators, each in a folder or on the Hub; their log-odds are added",
        },
    )
    keep_unused: Path | None = field(
        default=None,
        metadata={
            "group": "choosing by discriminators",
            "metavar": "DIR",
            "help": "folder to make for the draws that were not chosen",
        },
    )
    list_controls: bool = field(
        default=False, metadata={"group": "request", "help": "print the model's controls and their values, and stop"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_unused is not None and not self.discriminator:
            raise InputError("--keep-unused keeps what a discriminator did not choose: add --discriminator")


@dataclass(frozen=True)
class PlayOptions:
    """What `midimamba play` plays, and where. Raises [`InputError`] for values that cannot be."""

    model: str | None = field(
        default=None,
        metadata={"positional": True, "aliases": ("--model",), "help": MODEL},
    )
    port: str | None = field(
        default=None, metadata={"help": "the MIDI port to play to (default: the first that leads out of the machine)"}
    )
    list_ports: bool = field(default=False, metadata={"help": "print the MIDI ports, and stop"})
    prompt: Path | None = field(
        default=None, metadata={"group": "request", "help": "a MIDI file to continue; only what follows it is played"}
    )
    control: Sequence[str] = field(default=(), metadata=_CONTROL)
    bars: int | None = field(
        default=None, metadata={"group": "sampling", "help": "play this many bars (default: play without end)"}
    )
    temperature: float | None = field(default=None, metadata=_TEMPERATURE)
    top_p: float | None = field(default=None, metadata=_TOP_P)
    seed: int | None = field(
        default=None,
        metadata={"group": "sampling", "help": "the same seed plays the same music (default: another every time)"},
    )

    def __post_init__(self) -> None:
        check_sampling(bars=self.bars, temperature=self.temperature, top_p=self.top_p, seed=self.seed)


_BARS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_TRACKS = re.compile(r"\d{1,9}(?:,\d{1,9})*")


def read_span(bars: str) -> tuple[int, int]:
    """`"5-8"` as the first bar and the last, counted from 1; also `"5"`. Raises [`InputError`] for anything else."""
    if not _BARS.fullmatch(bars):
        raise InputError(f"bars is {bars!r}: write the first bar and the last, such as 5-8")
    first, last = bars.partition("-")[::2]
    return int(first), int(last or first)


def read_tracks(tracks: str | None) -> list[int] | None:
    """`"1,2"` as numbers of tracks, counted from 1; `None` for all. Raises [`InputError`] for anything else."""
    if tracks is None:
        return None
    if not _TRACKS.fullmatch(tracks):
        raise InputError(f"tracks is {tracks!r}: write numbers such as 1,2")
    return [int(number) for number in tracks.split(",")]


@dataclass(frozen=True)
class ConvertOptions:
    """What `midimamba convert` reads and writes."""

    music: Path = field(
        metadata={"positional": True, "help": "MIDI (.mid, .rmi, .kar), ABC (.abc) or MusicXML (.musicxml, .mxl)"}
    )
    out: Path = field(
        metadata={
            "positional": True,
            "help": "file to write: one of these, an engraved page (.svg, .pdf), a piano roll (.png) or sound "
            "(.wav, .mp3)",
        }
    )
    soundfont: Path | None = field(default=None, metadata={"help": SOUNDFONT})


@dataclass(frozen=True)
class ExportOptions:
    """What `midimamba export` reads and writes. Raises [`InputError`] for options that do not go together."""

    model: str = field(metadata={"positional": True, "help": MODEL})
    gguf: Path | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "file to write for llama.cpp, with the weights and the names of the tokens; of the layout mamba "
            "without look-back",
        },
    )
    onnx: Path | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "file to write for ONNX runtimes, one step of decoding; of the layouts mamba, mamba-mlp and "
            "moe-mamba without look-back",
        },
    )
    quantize: str | None = field(
        default=None,
        metadata={
            "choices": QUANTIZED,
            "parse": str.upper,
            "help": "with --gguf: the type of the matrices (default: float32)",
        },
    )

    def __post_init__(self) -> None:
        if (self.gguf is None) == (self.onnx is None):
            raise InputError("name one file to write, with --gguf FILE or --onnx FILE")
        if self.quantize is not None and self.gguf is None:
            raise InputError("--quantize says how to write a GGUF file: leave it out, or write one with --gguf")


@dataclass(frozen=True)
class InfillOptions(RenderingOptions):
    """What `midimamba infill` reads, asks for and writes. Raises [`InputError`] for values that cannot be."""

    model: str = field(metadata={"positional": True, "help": MODEL})
    song: Path = field(metadata={"positional": True, "help": "a MIDI or ABC file"})
    bars: str = field(
        metadata={
            "group": "request",
            "metavar": "5-8",
            "help": "the bars to write again, counted from 1; or a single one",
        }
    )
    out: Path = field(metadata={"help": "folder to make"})
    tracks: str | None = field(
        default=None,
        metadata={
            "group": "request",
            "metavar": "1,2",
            "help": "the tracks to write again, counted from 1; the others stay (default: all tracks)",
        },
    )
    control: Sequence[str] = field(default=(), metadata=_CONTROL)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.span, self.numbers  # checks them

    @property
    def span(self) -> tuple[int, int]:
        """The first bar and the last, counted from 1."""
        return read_span(self.bars)

    @property
    def numbers(self) -> list[int] | None:
        """The tracks, counted from 1; `None` for all."""
        return read_tracks(self.tracks)
