"""What commands can be told about constraints; see [`midimamba.command_options`] for the others. Light to import."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from midimamba.tokenization.constraints import Constraints


@dataclass(frozen=True)
class GapConstraintOptions:
    """What the notes of a gap must keep to; see [`~midimamba.tokenization.constraints.Constraints`]."""

    scale: str | None = field(
        default=None,
        metadata={
            "group": "constraints",
            "metavar": "D-dorian",
            "help": "only notes of this scale, or of pitch classes such as C,E,G; it does not bind drums",
        },
    )
    pitch_range: Sequence[str] | None = field(
        default=None,
        metadata={
            "group": "constraints",
            "metavar": "48-72",
            "help": "the lowest and highest MIDI pitch of all instruments but drums; violin=55-100 is that of one",
        },
    )
    polyphony: int | None = field(
        default=None,
        metadata={
            "group": "constraints",
            "metavar": "N",
            "help": "at most this many notes sound at once, drums aside",
        },
    )
    grid: str | None = field(
        default=None,
        metadata={
            "group": "constraints",
            "metavar": "1/8",
            "help": "notes begin only at multiples of this part of a whole note from the bar line: 1/8 for eighths, "
            "1/12 for their triplets",
        },
    )
    notes_per_bar: str | None = field(
        default=None,
        metadata={
            "group": "constraints",
            "metavar": "4-16",
            "help": "how many notes begin in each new bar; 4- for at least 4, 0-16 for at most 16; needs REMI",
        },
    )

    def __post_init__(self) -> None:
        _ = self.constraints  # what makes no sense is found before anything is loaded

    @property
    def constraints(self) -> Constraints | None:
        """What they say, if they say anything."""
        return Constraints.of({option.name: getattr(self, option.name) for option in fields(self)})


@dataclass(frozen=True)
class ConstraintOptions(GapConstraintOptions):
    """What the notes of a new piece must keep to; see [`~midimamba.tokenization.constraints.Constraints`]."""

    instruments: Sequence[str] | None = field(
        default=None,
        metadata={
            "group": "constraints",
            "metavar": "NAME",
            "help": "only these play, such as piano violin drums (default: those of the prompt, or else of the "
            "training data)",
        },
    )
