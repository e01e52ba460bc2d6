"""Which MidiTok tokenizations this package builds, and with which options.

All write the tracks of a piece as one sequence, with PAD, BOS and EOS as ids 0, 1 and 2 and the full range of pitches.
Every other option of MidiTok may be set. What MidiTok cannot do, or would silently do wrong, is refused with the
reason.
"""

import inspect
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import miditok
from miditok import BEAT, CPWord, MusicTokenizer, Structured, TokenizerConfig

from .choices import MULTI_VOCABULARY, ONE_STREAM, TOKENIZATIONS
from .controls import check_control_tokens
from .errors import InputError

PAD, BOS, EOS = "PAD_None", "BOS_None", "EOS_None"
BAR = "Bar_None"
TRACK_START = "Track_Start"
GAP, FILL = "Infill_Gap", "Infill_Fill"  # what they stand for is in infilling.py

_DEFAULTS: dict[str, Any] = {
    # MidiTok's own default range silently drops the lowest and the highest notes, and drums outside General MIDI 2.
    "pitch_range": (0, 127),
    "drums_pitch_range": (0, 127),
    # 12 positions a beat hold sixteenths and triplets exactly; notes longer than a bar of 4/4 need less precision.
    "beat_res": {(0, 4): 12, (4, 12): 4},
    "num_velocities": 32,
    "use_tempos": True,
    # Twelve tempos an octave, 5.9 % apart, about the smallest difference that a listener notices. Half, once and twice
    # MIDI's own tempo of 120 are among them, exactly.
    "tempo_range": (30, 240),
    "num_tempos": 37,
    "log_tempos": True,
    "delete_equal_successive_tempo_changes": True,
    "use_time_signatures": True,
    # Bars of any number of sixteenths can be written with one or a few of these. A denominator of 16 makes positions
    # finer only where there is such a meter.
    "time_signature_range": {4: list(range(1, 13)), 8: list(range(1, 13)), 16: [1, 3, 5, 7, 9, 11]},
    # MidiTok's own rests of an eighth of a beat are not a whole number of its steps, so everything after is shifted.
    "beat_res_rest": {(0, 2): 4, (2, 12): 2},
    # A program token at every change of instrument instead of before every note.
    "program_changes": True,
}

# Bars of 4/4 that are numbered one by one: 34 minutes at 120 quarter notes a minute. MidiTok's own 60 are 2 minutes.
_NUMBERED_BARS = {"use_time_signatures": False, "max_bar_embedding": 1024}

# What single tokenizations need in addition, or instead.
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
    "Octuple": _NUMBERED_BARS,
    "MuMIDI": _NUMBERED_BARS,
}

# One sequence for all tracks, special tokens with ids 0, 1, 2.
_FIXED: dict[str, Any] = {
    "use_programs": True,
    "one_token_stream_for_programs": True,
    "special_tokens": ["PAD", "BOS", "EOS"],
}
_WHY_FIXED = {
    "use_programs": "all tracks share one sequence, which names their instruments",
    "one_token_stream_for_programs": "a piece is one sequence",
    "special_tokens": "PAD, BOS and EOS are ids 0, 1 and 2 everywhere in this package",
}

# Switches under which MidiTok 3.1 itself fails, with the failing value; `None` stands for every tokenization.
_BROKEN: dict[tuple[str | None, str, bool], str] = {
    ("PerTok", "use_time_signatures", True): "MidiTok places its bars wrongly and cannot decode tempos after a meter",
    ("PerTok", "use_sustain_pedals", True): "MidiTok cannot decode its pedals",
    ("Octuple", "use_time_signatures", True): "MidiTok shifts all notes after a meter that starts in an empty bar",
    ("MuMIDI", "use_tempos", False): "MidiTok cannot write a piece without a tempo",
    ("MuMIDI", "use_pitchdrum_tokens", False): "MidiTok uses them anyway",
    (None, "use_pitch_intervals", True): "MidiTok decodes some of the notes at another pitch",
}

# The fields of `miditok.TokenizerConfig`.
OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(TokenizerConfig).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
)


def build_tokenizer(
    tokenization: str = "REMI", *, controls: Sequence[str] = (), infill: bool = False, **options: Any
) -> MusicTokenizer:
    """Build an untrained MidiTok tokenizer that writes all tracks of a piece as one sequence.

    Those of `ONE_STREAM` write one id per step. Those of `MULTI_VOCABULARY` write a row of ids per step, each from a
    vocabulary of its own that starts with PAD, BOS and EOS; no model here reads them. All three keep notes, velocities
    and instruments as REMI does, on the same grid. In all, bar lines, long notes, overlaps, pedals and tracks are
    treated as [`~midimamba.tokenization.normalization.normalize`] says.

    Args:
        tokenization (`str`, *optional*, defaults to `"REMI"`):
            - `"REMI"`: time as bars and positions in them.
            - `"TSD"`: time as shifts between notes.
            - `"MIDILike"`: an event for the start and one for the end of each note, as in MIDI.
            - `"Structured"`: shift, program, pitch, velocity and duration for every note; no tempos, no meters, and
              no pause longer than 32 quarter notes.
            - `"PerTok"`: bars of 4/4, shifts and microtiming; no meters; a change of tempo comes with the note before
              it, or the bar line after that note.
            - `"MMM"`: one track after another, each as `base_tokenizer` (`"REMI"`, the default, or `"TSD"`).
            - `"BEAT"`: the piano roll of each beat at 4 steps a beat, with one velocity for each pitch in it.
            - `"CPWord"`: a row for every bar, position and note: 2.3 times fewer rows than REMI has tokens. It loses
              what REMI loses.
            - `"Octuple"`: a row for every note: 3.8 times fewer. Bars of 4/4 with numbers below `max_bar_embedding`,
              1,024 by default: a longer piece is refused. No meters; a change of tempo waits for the next note.
            - `"MuMIDI"`: a row for every bar, position, instrument and note: 1.7 times fewer. Bars as in Octuple; no
              meters; a change of tempo waits for the next note, or the first bar line before it.
        controls (`Sequence[str]`, *optional*):
            Control tokens as [`~midimamba.tokenization.controls.control_token`] writes them, for one of `ONE_STREAM`.
            They get the ids from 3 on, in this order; all other base tokens come after them. Nothing else changes.
        infill (`bool`, *optional*, defaults to `False`):
            Whether there are the two tokens of [`~midimamba.tokenization.infilling`]. They come after the controls.
        options:
            Fields of `miditok.TokenizerConfig` that replace this package's choice, in MidiTok's form or as JSON and
            YAML hold them (`beat_res: {"0_4": 12}`); for PerTok, MMM, Octuple and MuMIDI also their own.

    Raises:
        InputError: if there is no such tokenization or option, if MidiTok cannot honour an option here, or if
            `controls` holds something that isn't a control token, holds one twice, or isn't possible for the
            tokenization.
    """
    check_tokenization(tokenization)
    if controls and tokenization in MULTI_VOCABULARY:
        raise InputError(f"{tokenization} cannot have control tokens: choose one of {', '.join(ONE_STREAM)}")
    check_control_tokens(controls)
    for name, value in options.items():
        _check_option(tokenization, name, value)
    given = {name: _python_value(name, value) for name, value in options.items()}
    defaults = _DEFAULTS | _OWN_DEFAULTS.get(tokenization, {})
    merged = {"encode_ids_split": _split(tokenization, defaults | given), **defaults, **given, **_FIXED}
    merged["special_tokens"] = [*merged["special_tokens"], *controls, *((GAP, FILL) if infill else ())]
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
        raise InputError(f"tokenization {tokenization!r} is not supported: choose one of {', '.join(TOKENIZATIONS)}")


def _construct(tokenization: str, options: dict[str, Any]) -> MusicTokenizer:
    with warnings.catch_warnings():
        # MidiTok warns about options that it turns off; `_check_honoured` refuses those that the user set.
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
    reason = _BROKEN.get((tokenization, name, bool(value)), _BROKEN.get((None, name, bool(value))))
    if reason:
        raise InputError(f"tokenizer option {name!r} cannot be {value!r} for {tokenization}: {reason}")


def _python_value(name: str, value: Any) -> Any:
    """Options as MidiTok takes them. In JSON and YAML, keys cannot be tuples and may be strings instead of numbers."""
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
        raise InputError(f"{key!r} is not a range of beats: write (0, 4) or '0_4'") from error


def _split(tokenization: str, options: Mapping[str, Any]) -> str:
    """Whether subword models may learn across bar lines. A text can only be split where there is a bar token.

    PerTok writes bars of 4/4 whatever the meter, but MidiTok would split at the bars of the meter.
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
    """Refuse options that MidiTok turned off because the tokenization lacks them; it gives a warning at best."""
    for name in given.keys() & set(OPTIONS) - _FIXED.keys():
        kept = getattr(tokenizer.config, name)
        if kept != (set(given[name]) if isinstance(kept, set) else given[name]) and name != "time_signature_range":
            raise InputError(
                f"tokenizer option {name!r} cannot have this value for {type(tokenizer).__name__}: "
                f"MidiTok keeps it at {reprlib.repr(kept)}"
            )


def _check_lossless(tokenizer: MusicTokenizer) -> None:
    """Refuse ranges that MidiTok accepts although it then loses or shifts notes."""
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
    if type(tokenizer) is CPWord and config.use_rests and config.use_time_signatures:
        raise InputError(
            "tokenizer option 'use_rests' needs 'use_time_signatures: false' for CPWord: "
            "MidiTok shifts all notes after a meter that starts in a rest"
        )
    steps = config.max_num_pos_per_beat
    if config.use_rests and any(steps % rests for rests in config.beat_res_rest.values()):
        raise InputError(
            f"tokenizer option 'beat_res_rest' must divide the {steps} positions of a beat: "
            "otherwise MidiTok shifts notes"
        )
