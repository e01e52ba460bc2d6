"""Control tokens: a prefix by which a user requests instruments, a tempo, a key and so on.

They come after BOS and before the music: `BOS_None Control-instruments_violin Control-key_C-major Bar_None …`.
A tokenizer that has them holds them as special tokens of MidiTok. The values of [`CONTROLS`] are computed from a
score by [`describe`]; any other name is a free label, such as `composer`, whose values come with the files.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np
from miditok import MusicTokenizer
from miditok.constants import MIDI_INSTRUMENTS
from symusic.core import ScoreTick

from .choices import CONTROLS
from .errors import InputError
from .musical_time import KEYS, best_keys, count_bars, mean_tempo, meter_spans

# MidiTok's tokens are of the form Type_Value. It has no type that starts like this: its `ControlChange` has no hyphen.
_PREFIX = "Control-"
# Neither white space nor what acts unseen where a vocabulary is shown: controls, marks of direction, hidden signs.
_SIGNS = (
    r"[^\s_\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]+"
)
_TOKEN = re.compile(rf"{_PREFIX}{_SIGNS}_{_SIGNS}")

DRUMS = "drums"
# General MIDI's names; where sounds share a program, the first.
INSTRUMENTS = tuple(
    re.sub(r"[^a-z0-9]+", "-", instrument["name"].split(",")[0].lower()).strip("-") for instrument in MIDI_INSTRUMENTS
)

# Bands and where they start; each ends where the next starts.
_TEMPOS = {"0-60": 0, "60-90": 60, "90-120": 90, "120-150": 120, "150-180": 150, "180+": 180}
_DENSITIES = {"0-1": 0, "1-2": 1, "2-4": 2, "4-8": 4, "8-16": 8, "16+": 16}
_BARS = {"1-8": 1, "9-16": 9, "17-32": 17, "33-64": 33, "65+": 65}

NO_CONTROLS = "this tokenizer has no control tokens: train on a corpus of `midimamba tokenize SOURCE --controls …`"
# In a message, a list of values longer than this is cut to the nearest ones.
_MAX_LISTED = 12
_NEAREST = 5


def control_token(name: str, value: str) -> str:
    """The token of a control: `control_token("composer", "Bach, J. S.")` is `"Control-composer_Bach,-J.-S."`.

    Args:
        name (`str`):
            One of `CONTROLS`, or the name of a label.
        value (`str`):
            In name and value, a run of white space, underscores or hidden signs (controls, marks of direction) becomes
            a hyphen: tokens have none.

    Raises:
        InputError: if nothing is left of either.
    """
    slugs = [_slug(part) for part in (name, value)]
    if not all(slugs):
        raise InputError(f"a control needs a name and a value, not {name!r} and {value!r}")
    return f"{_PREFIX}{'_'.join(slugs)}"


def _slug(text: str) -> str:
    """A name or value as tokens hold it."""
    return "-".join(re.findall(_SIGNS, text))


def check_control_tokens(tokens: Sequence[str]) -> None:
    """Raise an [`InputError`] if one isn't as [`control_token`] writes it, or occurs twice."""
    if wrong := [token for token in tokens if not _TOKEN.fullmatch(token)]:
        raise InputError(f"{wrong[0]!r} is not a control token: make one with control_token(name, value)")
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise InputError(f"control token {twice[0]!r} is given twice")


def is_control(token: str) -> bool:
    """Whether a token is a control token."""
    return token.startswith(_PREFIX)


def controls_of(tokenizer: MusicTokenizer) -> dict[str, list[str]]:
    """The controls of a tokenizer: their names, and the values each can have, in the order of the vocabulary."""
    controls: dict[str, list[str]] = {}
    for token in filter(is_control, tokenizer.special_tokens):
        name, value = token.removeprefix(_PREFIX).split("_")
        controls.setdefault(name, []).append(value)
    return controls


def control_ids(tokenizer: MusicTokenizer, values: Mapping[str, str | Sequence[str]]) -> list[int]:
    """The ids that request `values`, in the order of the vocabulary.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            From [`~midimamba.tokenization.tokenizer.build_tokenizer`].
        values (`Mapping[str, str | Sequence[str]]`):
            Names of controls, each with one value or several. Upper and lower case are the same, unless names or
            values differ in nothing else.

    Raises:
        InputError: if the tokenizer has no such control or value; the message names those it has.
    """
    known = controls_of(tokenizer)
    if values and not known:
        raise InputError(NO_CONTROLS)
    ids = set()
    for name, given in values.items():
        control = _match(name, list(known))
        if control is None:
            raise InputError(f"there is no control {name!r}: {_choices(name, list(known))}")
        for value in [given] if isinstance(given, str) else given:
            match = _match(value, known[control])
            if match is None:
                raise InputError(f"control {control!r} has no value {value!r}: {_choices(value, known[control])}")
            ids.add(tokenizer.vocab[control_token(control, match)])
    return sorted(ids)


def _match(wanted: str, known: list[str]) -> str | None:
    """The one of `known` that is `wanted`, as tokens are written; without regard to case if that leaves only one."""
    slug = _slug(wanted)
    if slug in known:
        return slug
    alike = [name for name in known if name.lower() == slug.lower()]
    if len(alike) > 1:
        raise InputError(f"{wanted!r} may be {' or '.join(alike)}: write one of them exactly")
    return alike[0] if alike else None


def _choices(wanted: str, known: list[str]) -> str:
    if len(known) <= _MAX_LISTED:
        return f"choose one of {', '.join(known)}"
    lowered = {name.lower(): name for name in known}
    nearest = get_close_matches(wanted.lower(), lowered, n=_NEAREST, cutoff=0)
    return f"the nearest of {len(known)} are {', '.join(lowered[name] for name in nearest)}"


def describe(score: ScoreTick) -> dict[str, list[str]]:
    """The values of all `CONTROLS` of a score.

    Args:
        score (`symusic.Score`):
            Times in ticks, checked by [`~midimamba.tokenization.ingest.check_score`].

    Returns:
        `dict[str, list[str]]`: one value per control, none if there is none; for `instruments`, all of them.

        - `instruments`: those that play, by General MIDI's names such as `acoustic-grand-piano`, and `drums`.
        - `tempo`: a band of the mean tempo in quarter notes per minute, rounded: all quarter notes by all minutes.
        - `density`: a band of notes per quarter note, from the first onset to the end of the last note.
        - `key`: such as `C-major` or `F#-minor`: the one whose profile of Krumhansl and Kessler correlates best with
          the total durations of the pitch classes. None for drums alone, or if all twelve classes are alike.
        - `meter`: the time signature that is in force longest, `4/4` until there is one.
        - `bars`: a band of the number of bars up to the last onset.
    """
    if score.note_num() == 0:
        return {name: [] for name in CONTROLS}
    notes = [track.notes.numpy() for track in score.tracks]
    onsets = np.concatenate([track["time"] for track in notes]).astype(np.int64)
    durations = np.concatenate([track["duration"] for track in notes])
    first, last, end = int(onsets.min()), int(onsets.max()), int((onsets + durations).max())
    quarters = max(end - first, 1) / score.ticks_per_quarter
    return {
        "instruments": _instruments(score),
        # Rounded, because MIDI cannot write 90 exactly: it becomes 89.99996.
        "tempo": [_band(round(mean_tempo(score, max(end, 1))), _TEMPOS)],
        "density": [_band(len(onsets) / quarters, _DENSITIES)],
        "key": _key(score),
        "meter": [_longest_meter(score, max(end, 1))],
        "bars": [_band(count_bars(score, last + 1), _BARS)],
    }


def _band(value: float, bands: Mapping[str, int]) -> str:
    return [band for band, start in bands.items() if value >= start][-1]


def _instruments(score: ScoreTick) -> list[str]:
    playing = sorted({(track.is_drum, 0 if track.is_drum else track.program) for track in score.tracks if track.notes})
    return [DRUMS if is_drum else INSTRUMENTS[program] for is_drum, program in playing]


def _key(score: ScoreTick) -> list[str]:
    weights = np.zeros(12)  # ticks of every pitch class
    for track in score.tracks:
        if not track.is_drum:
            notes = track.notes.numpy()
            np.add.at(weights, notes["pitch"] % 12, notes["duration"])
    return [KEYS[key] for key in best_keys(weights[None])]


def _longest_meter(score: ScoreTick, end: int) -> str:
    ticks: Counter[str] = Counter()
    for meter, span in meter_spans(score, end):
        ticks[str(meter)] += span
    return ticks.most_common(1)[0][0]
