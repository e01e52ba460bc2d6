"""Which MidiTok tokenizations this package builds, and with which options.

All write the tracks of a piece as one sequence, with padding, begin and end as ids 0, 1 and 2 and the full range of
pitches. Whatever else MidiTok can be told may be chosen; what MidiTok could not do, or would do silently wrong, is
refused with the reason.
"""

import inspect
import reprlib
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import miditok
from miditok import BEAT, MusicTokenizer, Structured, TokenizerConfig

from midimamba.errors import InputError

PAD, BOS, EOS = "PAD_None", "BOS_None", "EOS_None"
BAR = "Bar_None"
TRACK_START = "Track_Start"

TOKENIZATIONS = ("REMI", "TSD", "MIDILike", "Structured", "PerTok", "MMM", "BEAT")

_SEVERAL_IDS = "it writes several ids a step, and the language models here read one"
_REFUSED_TOKENIZATIONS = dict.fromkeys(("CPWord", "Octuple", "MuMIDI"), _SEVERAL_IDS)

_DEFAULTS: dict[str, Any] = {
    # MidiTok's own default range silently drops the lowest and the highest notes, and drums outside General MIDI 2.
    "pitch_range": (0, 127),
    "drums_pitch_range": (0, 127),
    # 12 positions a beat hold sixteenths and triplets exactly; notes longer than a bar of 4/4 need less precision.
    "beat_res": {(0, 4): 12, (4, 12): 4},
    "num_velocities": 32,
    "use_tempos": True,
    # 32 tempos in equal ratios: 6 % apart, about what a listener tells apart.
    "log_tempos": True,
    "delete_equal_successive_tempo_changes": True,
    "use_time_signatures": True,
    # The meters of MidiTok's default and a few more; one that is missing here is ignored, its notes are kept.
    "time_signature_range": {4: [1, 2, 3, 4, 5, 6, 7, 8], 8: [3, 5, 6, 7, 9, 12]},
    # MidiTok's own rests of an eighth of a beat are no whole number of its steps, and all that follows is shifted.
    "beat_res_rest": {(0, 2): 4, (2, 12): 2},
    # A program token at every change of instrument instead of before every note.
    "program_changes": True,
}

# What single tokenizations need on top, or in place of it.
_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    # Every note follows the last by one time shift, which therefore must be exact at any length.
    "Structured": {"beat_res": {(0, 32): 12}},
    "PerTok": {
        "use_time_signatures": False,
        # A multiple of 12: positions are whole ticks. Microtiming then places a note to 2 ticks, 1/240 of a beat.
        "ticks_per_quarter": 480,
        "use_microtiming": True,
        "max_microtiming_shift": 0.125,
        "num_microtiming_bins": 30,
        "use_position_toks": False,
    },
    "MMM": {"base_tokenizer": "REMI"},
}

# One stream for all tracks, special tokens with ids 0, 1, 2.
_FIXED: dict[str, Any] = {
    "use_programs": True,
    "one_token_stream_for_programs": True,
    "special_tokens": ["PAD", "BOS", "EOS"],
}
_WHY_FIXED = {
    "use_programs": "all tracks share one sequence, which names their instruments",
    "one_token_stream_for_programs": "the language models read one sequence a piece",
    "special_tokens": "padding, begin and end are ids 0, 1 and 2 for everything here",
}

# Where MidiTok 3.1 itself fails; `None` stands for every tokenization.
_BROKEN: dict[tuple[str | None, str], str] = {
    ("PerTok", "use_time_signatures"): "MidiTok places its bars wrongly and cannot decode tempos after a meter",
    ("PerTok", "use_sustain_pedals"): "MidiTok cannot decode its pedals",
    (None, "use_pitch_intervals"): "MidiTok decodes some of the notes at another pitch",
}

# The fields of `miditok.TokenizerConfig`.
OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(TokenizerConfig).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
)


def build_tokenizer(tokenization: str = "REMI", **options: Any) -> MusicTokenizer:
    """Build an untrained MidiTok tokenizer that writes all tracks of a piece as one sequence.

    Args:
        tokenization (`str`, *optional*, defaults to `"REMI"`):
            - `"REMI"`: time as bars and positions in them.
            - `"TSD"`: time as shifts between notes.
            - `"MIDILike"`: notes begin and end with an event each, as in MIDI: where notes of one pitch and
              instrument overlap, the one that began first ends first.
            - `"Structured"`: shift, program, pitch, velocity and duration for every note; no tempos, no meters, and
              no pause longer than 32 quarter notes.
            - `"PerTok"`: bars of 4/4, shifts and microtiming; tempos, no meters.
            - `"MMM"`: one track after the other, each as `base_tokenizer` (`"REMI"`, the default, or `"TSD"`).
            - `"BEAT"`: the piano roll of each beat at 4 steps a beat, with one velocity for each pitch in it.
        options:
            Fields of `miditok.TokenizerConfig` that replace this package's choice, in MidiTok's form or as JSON and
            YAML hold them (`beat_res: {"0_4": 12}`); for PerTok and MMM also their own.

    Raises:
        InputError: if there is no such tokenization or option, or one that MidiTok cannot honour here.
    """
    check_tokenization(tokenization)
    for name, value in options.items():
        _check_option(tokenization, name, value)
    given = {name: _python_value(name, value) for name, value in options.items()}
    defaults = _DEFAULTS | _OWN_DEFAULTS.get(tokenization, {})
    merged = {"encode_ids_split": _split(tokenization, defaults | given), **defaults, **given, **_FIXED}
    try:
        tokenizer = _construct(tokenization, merged)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{tokenization} cannot be built with these options: {error}") from error
    _check_honoured(tokenizer, given)
    _check_lossless(tokenizer)
    return tokenizer


def check_tokenization(tokenization: str) -> None:
    """Raise an [`InputError`] if `tokenization` is not one of `TOKENIZATIONS`."""
    if tokenization not in TOKENIZATIONS:
        reason = f" ({_REFUSED_TOKENIZATIONS[tokenization]})" if tokenization in _REFUSED_TOKENIZATIONS else ""
        raise InputError(
            f"tokenization {tokenization!r} is not supported{reason}: choose one of {', '.join(TOKENIZATIONS)}"
        )


def _construct(tokenization: str, options: dict[str, Any]) -> MusicTokenizer:
    with warnings.catch_warnings():
        # MidiTok warns of options it turns off; `_check_honoured` refuses those that were asked for.
        warnings.simplefilter("ignore")
        return getattr(miditok, tokenization)(TokenizerConfig(**options))


def _check_option(tokenization: str, name: str, value: Any) -> None:
    known = [*OPTIONS, *(key for key in _OWN_DEFAULTS.get(tokenization, {}) if key not in OPTIONS)]
    if name not in known:
        nearest = ", ".join(get_close_matches(name, known, n=3, cutoff=0))
        raise InputError(f"{tokenization} has no option {name!r}: the nearest are {nearest}")
    if name in _FIXED and value != _FIXED[name]:
        raise InputError(f"tokenizer option {name!r} cannot be set: {_WHY_FIXED[name]}")
    if name.startswith("ac_") and value is True:
        raise InputError(f"tokenizer option {name!r} cannot be set: attribute controls are for single tracks")
    reason = _BROKEN.get((tokenization, name), _BROKEN.get((None, name)))
    if reason and value:
        raise InputError(f"tokenizer option {name!r} cannot be set for {tokenization}: {reason}")


def _python_value(name: str, value: Any) -> Any:
    """Options from JSON or YAML, whose keys are no tuples and may be no numbers, as MidiTok takes them."""
    if not isinstance(value, Mapping):
        return value
    if name in ("beat_res", "beat_res_rest"):
        return {_beats(key): resolution for key, resolution in value.items()}
    if name == "time_signature_range":
        return {int(denominator): numerators for denominator, numerators in value.items()}
    if name == "chord_maps":
        return {quality: tuple(intervals) for quality, intervals in value.items()}
    return value


def _beats(key: Any) -> tuple[int, int]:
    try:
        first, last = key.split("_") if isinstance(key, str) else key
        return int(first), int(last)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key!r} is no range of beats: write (0, 4) or '0_4'") from error


def _split(tokenization: str, options: Mapping[str, Any]) -> str:
    """Whether subword models may learn across bar lines; a text can only be split where there is a bar token.

    PerTok writes bars of 4/4 whatever the meter is, and MidiTok would split at the bars of the meter.
    """
    base = options.get("base_tokenizer", tokenization)
    splits = ("bar", "no") if base in ("REMI", "BEAT") else ("no",)
    split: str = options.get("encode_ids_split", splits[0])
    if split not in splits:
        raise InputError(
            f"tokenizer option 'encode_ids_split' cannot be {split!r} for {tokenization}, whose text "
            f"has no tokens to split at: choose {' or '.join(splits)}"
        )
    return split


def _check_honoured(tokenizer: MusicTokenizer, given: Mapping[str, Any]) -> None:
    """MidiTok turns off what a tokenization lacks, with a warning at best."""
    for name in given.keys() & set(OPTIONS) - _FIXED.keys():
        kept = getattr(tokenizer.config, name)
        if kept != (set(given[name]) if isinstance(kept, set) else given[name]) and name != "time_signature_range":
            raise InputError(
                f"tokenizer option {name!r} cannot be set so for {type(tokenizer).__name__}: "
                f"MidiTok keeps it at {reprlib.repr(kept)}"
            )


def _check_lossless(tokenizer: MusicTokenizer) -> None:
    """Refuse ranges that MidiTok accepts and then loses or shifts notes under."""
    config = tokenizer.config
    (low, high), (drums_low, drums_high) = config.pitch_range, config.drums_pitch_range
    outside = config.use_pitchdrum_tokens and (drums_low < low or drums_high > high)
    if outside and type(tokenizer) not in (Structured, BEAT):
        raise InputError(
            f"tokenizer option 'drums_pitch_range' must lie within 'pitch_range' {low}-{high}: "
            "MidiTok does not decode drums outside it"
        )
    if 2 in config.time_signature_range:
        raise InputError(
            "tokenizer option 'time_signature_range' cannot hold meters of half notes: 3/2 is read as 6/4"
        )
    steps = config.max_num_pos_per_beat
    if config.use_rests and any(steps % rests for rests in config.beat_res_rest.values()):
        raise InputError(
            f"tokenizer option 'beat_res_rest' must divide the {steps} positions of a beat: MidiTok shifts notes else"
        )
