"""Which tokens may follow: a logits processor under which whatever a model samples is valid music.

MidiTok knows which *type* of token may follow which. That alone allows a PitchDrum under a piano, a position before
the previous one or behind the bar line, and empty bars without end. Here the state of the music is derived from the
ids alone (nothing is remembered between calls, so beams may be reordered and batches cut at will) and an id may
follow if *all* base tokens it stands for may.
"""

from collections import deque
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from miditok import MusicTokenizer
from torch import Tensor
from transformers import LogitsProcessor

from .controls import is_control
from .errors import InputError
from .tokenizer import BOS, EOS, PAD, expand_ids

# The rules below rely on a note being Pitch, Velocity, Duration under the program before it. MIDILike ends notes long
# after they start, PerTok does not say types, MMM and BEAT have tracks and beats that must fit each other.
SUPPORTED = ("REMI", "TSD", "Structured")
# Under these options other tokens come in between, or a note is not complete with its duration.
_MUST_BE_OFF = (
    "use_chords",
    "use_rests",
    "use_key_signatures",
    "use_sustain_pedals",
    "use_pitch_bends",
    "use_control_changes",
    "use_pitch_intervals",
)
_MUST_BE_ON = ("use_pitchdrum_tokens",)
_MUST_BE_ALL = ("use_note_duration_programs", "programs")

# The type of the token that completes a note.
NOTE_END = "Duration"

# From the start of a sequence, or from any note, the next note is complete within this many base tokens.
MAX_SILENT_TOKENS = 16

_DRUMS = -1  # MidiTok's program of drums
_UNSET = -9
_NEVER = torch.iinfo(torch.long).max


@dataclass
class _Meaning:
    """What an id means on its own, whatever came before: its base tokens in order."""

    # What it leaves behind; `_UNSET` where it says nothing. Types are indices into the follower graph.
    last: int = _UNSET  # the type of its last token
    position: int = _UNSET  # the last position in the open bar; -1 in a new one
    limit: int = _UNSET  # positions per bar
    drums: int = _UNSET  # 1 under the drum program, 0 under another
    anchor: int = _UNSET  # 0 if the count of silence restarts here: at a complete note or BOS
    start: int = _UNSET  # 0 if the count of bars restarts here: at BOS

    # What it requires of what came before.
    first: int = 0  # the type of its first token
    fits: bool = True  # whether its tokens may follow each other
    first_position: int = _NEVER  # its first position in the bar already open
    last_position: int = -1  # its last position in a bar whose length it doesn't say
    pitch_kind: int = -1  # 1 if its first pitch needs the drum program before it, 0 if another

    # What it adds.
    lead: int = 0  # base tokens up to its first complete note, which may end in the ids to come
    lead_bars: int = 0  # bars opened before its first complete note
    tail: int = 0  # base tokens after its last complete note; all if there is none
    tail_bars: int = 0  # bars opened after its last complete note; all if there is none
    bars: int = 0  # bars opened


# The columns of a state: the first fields above.
_LAST, _POSITION, _LIMIT, _DRUM, _ANCHOR, _START = range(6)


class MidiGrammar(LogitsProcessor):
    """Forbids every id after which a sequence would not be valid music.

    Padding, begin-of-sequence and control tokens are never sampled, end-of-sequence only right after a complete note;
    positions grow within a bar and stay inside its meter; drum pitches belong to the drum program. Every sample holds
    a note: at most 16 base tokens after BOS and the controls, whatever the model prefers. In every row at least one id
    is allowed.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            From [`~midimamba.tokenization.tokenizer.build_tokenizer`], trained or not.
        max_empty_bars (`int`, *optional*, defaults to 2):
            At most this many consecutive bars may have no note.
        max_bars (`int`, *optional*):
            At most this many bars per sequence, counted from its start and including those of a prompt. Where the
            model would open one more, the sequence ends: the probability of a further bar goes to end-of-sequence.

    Raises:
        InputError: if the tokenizer isn't REMI, TSD or Structured, or an option adds tokens beyond the rules.
        ValueError: if `max_bars` is less than 1, or the tokenization has no bar tokens.
    """

    def __init__(self, tokenizer: MusicTokenizer, max_empty_bars: int = 2, max_bars: int | None = None) -> None:
        _check_supported(tokenizer)
        if max_bars is not None and (max_bars < 1 or not tokenizer.token_ids_of_type("Bar")):
            raise ValueError("max_bars must be at least 1, and needs a tokenization with bars such as REMI")
        self.max_empty_bars = max_empty_bars
        self.max_bars = max_bars
        self.eos_token_id: int = tokenizer.vocab[EOS]
        self._tables = _tables(tokenizer)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of ids that may not follow to -inf.

        Args:
            input_ids (`torch.LongTensor` of shape (batch, time)):
                The sequences so far: padded on the left or not, with or without begin-of-sequence. Time may be 0.
            scores (`torch.FloatTensor` of shape (batch, vocab)):
                Logits. Columns beyond the tokenizer's vocabulary are also forbidden.

        Returns:
            `torch.FloatTensor` of shape (batch, vocab).
        """
        if self._tables["follows"].device != input_ids.device:
            self._tables = {name: table.to(input_ids.device) for name, table in self._tables.items()}
        table = self._tables
        state, silence, empty, bars = self._state(input_ids)
        position, limit, drums = (state[:, column, None] for column in (_POSITION, _LIMIT, _DRUM))
        # A prompt may be silent for longer than allowed; then only the shortest way to a note is left.
        budget = torch.maximum(MAX_SILENT_TOKENS - silence, table["distance"][state[:, _LAST]])

        # Every term has shape (batch, vocab).
        allowed = table["follows"][state[:, _LAST]]
        allowed &= (table["first_position"] > position) & (table["last_position"] < limit)
        allowed &= (table["pitch_kind"] < 0) | (table["pitch_kind"] == drums)
        allowed &= (table["lead_bars"] == 0) | (table["lead_bars"] + empty[:, None] <= self.max_empty_bars + 1)
        allowed &= table["lead"] <= budget[:, None]

        music = scores[:, : allowed.shape[1]]
        if self.max_bars is not None:
            beyond = allowed & (table["bars"] + bars[:, None] > self.max_bars)
            music = self._end_instead(music, beyond)
            allowed &= ~beyond
        result = torch.full_like(scores, float("-inf"))
        result[:, : allowed.shape[1]] = music.masked_fill(~allowed, float("-inf"))
        return result

    def _end_instead(self, scores: Tensor, beyond: Tensor) -> Tensor:
        """Add the probability of the ids `beyond` the last bar to end-of-sequence; shapes (batch, vocab)."""
        further = scores.masked_fill(~beyond, float("-inf")).logsumexp(dim=1)
        scores = scores.clone()
        scores[:, self.eos_token_id] = torch.logaddexp(scores[:, self.eos_token_id], further)
        return scores

    def _state(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the music stands after `input_ids` of shape (batch, time).

        Returns:
            The latest value of every column, shape (batch, 6), and of shape (batch,) each: base tokens since the last
            complete note, bars opened since, bars opened since the start of the sequence.
        """
        table = self._tables
        begin = table["begin_state"].expand(len(input_ids), 1, -1)
        left = torch.cat([begin, table["left"][input_ids]], dim=1)  # (batch, 1 + time, 6)
        steps = torch.arange(left.shape[1], device=input_ids.device)
        latest = torch.where(left != _UNSET, steps[:, None], 0).amax(dim=1)  # (batch, 6)
        state = left.gather(1, latest[:, None]).squeeze(1)

        steps = steps[1:]  # of `input_ids`; 0 was before the first
        # The id that completes the last note also counts, with what follows the note inside it.
        since_note = steps >= latest[:, _ANCHOR, None]
        silence = (table["tail"][input_ids] * since_note).sum(dim=1)
        empty = (table["tail_bars"][input_ids] * since_note).sum(dim=1)
        bars = (table["bars"][input_ids] * (steps > latest[:, _START, None])).sum(dim=1)
        return state, silence, empty, bars


def _check_supported(tokenizer: MusicTokenizer) -> None:
    name = type(tokenizer).__name__
    if name not in SUPPORTED:
        raise InputError(f"the grammar supports {', '.join(SUPPORTED)}, not {name}: generate without it")
    config = tokenizer.config
    wrong = [option for option in _MUST_BE_OFF if getattr(config, option)]
    wrong += [option for option in _MUST_BE_ON if not getattr(config, option)]
    wrong += [option for option in _MUST_BE_ALL if getattr(config, option) != set(range(-1, 128))]
    if wrong:
        raise InputError(
            f"the grammar does not support this value of the tokenizer option {wrong[0]!r}: generate without it"
        )


def _tables(tokenizer: MusicTokenizer) -> dict[str, Tensor]:
    """What is known about every id beforehand: the fields of `_Meaning`, of shape (vocab,) each; `follows` of shape
    (types, vocab); `distance` of shape (types,); `left` of shape (vocab, 6) and `begin_state` of shape (6,).
    """
    followers = _followers(tokenizer)
    types = list(followers)
    distances = _distances(followers)
    per_beat = tokenizer.config.max_num_pos_per_beat
    meanings = [
        _meaning(tokenizer._ids_to_tokens(expand_ids(tokenizer, [index])), followers, distances, per_beat)
        for index in range(tokenizer.vocab_size)
    ]
    names = [field.name for field in fields(_Meaning)]
    tables = {name: torch.tensor([getattr(meaning, name) for meaning in meanings]) for name in names}
    graph = torch.tensor([[after in followers[kind] for after in types] for kind in types])
    left = torch.stack([tables[name] for name in names[:6]], dim=1)
    return tables | {
        "follows": graph[:, tables["first"]] & tables["fits"],
        "distance": torch.tensor([distances[kind] for kind in types]),
        "left": left,
        "begin_state": left[tokenizer.vocab[BOS]],
    }


def _followers(tokenizer: MusicTokenizer) -> dict[str, set[str]]:
    """MidiTok's graph of types, narrowed to what its encoder writes. No PAD, BOS or control may follow anything."""
    special = {*tokenizer.special_tokens, *(token.split("_")[0] for token in tokenizer.special_tokens)}
    graph = {kind: set(after) - special for kind, after in tokenizer.tokens_types_graph.items() if kind not in special}
    time = "Bar" if "Bar" in graph else "TimeShift"
    # A program announces a note. MidiTok's graph also leads back to time and tempo, and round in circles.
    graph["Program"] &= {"Pitch", "PitchDrum"}
    # A meter belongs to the bar line: elsewhere it would alter the length of the open bar.
    for kind in graph.keys() - {time}:
        graph[kind].discard("TimeSig")
    if time == "Bar":
        graph.get("TimeSig", set()).intersection_update({"Bar", "Position"})
    graph["BOS"] = {time}
    if time in graph[time]:  # TSD shifts only where time passes, Structured before every note
        graph["BOS"] |= graph[time]
    graph[NOTE_END].add("EOS")
    # Rows of a batch that are finished still need a token to choose; `generate` replaces it by padding.
    graph["EOS"] = {"EOS"}
    graph["PAD"] = set()
    return graph


def _distances(followers: dict[str, set[str]]) -> dict[str, int]:
    """Fewest base tokens from each type until a note is complete; 0 where none can come."""
    distances = {kind: 1 for kind, after in followers.items() if NOTE_END in after}
    queue = deque(distances)
    while queue:
        nearer = queue.popleft()
        for kind, after in followers.items():
            if nearer in after and kind not in distances:
                distances[kind] = distances[nearer] + 1
                queue.append(kind)
    return {kind: distances.get(kind, 0) for kind in followers}


def _meaning(
    tokens: list[str], followers: dict[str, set[str]], distances: dict[str, int], positions_per_beat: int
) -> _Meaning:
    types = {kind: index for index, kind in enumerate(followers)}
    kinds = [token.split("_")[0] for token in tokens]
    if tokens == [PAD] or is_control(tokens[0]):  # neither changes what may follow
        return _Meaning(first=types["PAD"])
    if tokens == [BOS]:  # MidiTok decodes 4/4 and no drums until a token says otherwise
        return _Meaning(types["BOS"], -1, 4 * positions_per_beat, 0, 0, 0, first=types["BOS"])
    if tokens == [EOS]:
        return _Meaning(types["EOS"], first=types["EOS"])
    meaning = _Meaning(types[kinds[-1]], first=types[kinds[0]])
    meaning.fits = all(b in followers[a] for a, b in pairwise(kinds))
    for token, kind in zip(tokens, kinds, strict=True):
        _read(meaning, kind, token.split("_")[1], positions_per_beat)
    _count(meaning, kinds, distances)
    return meaning


def _read(meaning: _Meaning, kind: str, value: str, positions_per_beat: int) -> None:
    """Take in one base token: what it changes, and what it requires of those before it."""
    if kind == "Bar":
        meaning.position = -1
    elif kind == "TimeSig":
        meaning.limit = int(value.split("/")[0]) * positions_per_beat
    elif kind == "Program":
        meaning.drums = int(int(value) == _DRUMS)
    elif kind in ("Pitch", "PitchDrum"):
        drums = int(kind == "PitchDrum")
        if meaning.drums == _UNSET:
            meaning.drums = meaning.pitch_kind = drums
        meaning.fits &= drums == meaning.drums
    elif kind == "Position":
        position = int(value)
        if meaning.position == _UNSET:
            meaning.first_position = position
        if meaning.limit == _UNSET:
            meaning.last_position = position
        meaning.fits &= position > meaning.position and (meaning.limit == _UNSET or position < meaning.limit)
        meaning.position = position


def _count(meaning: _Meaning, kinds: list[str], distances: dict[str, int]) -> None:
    """Count base tokens and bars before, between and after the complete notes."""
    meaning.bars = kinds.count("Bar")
    notes = [index for index, kind in enumerate(kinds) if kind == NOTE_END]
    if notes:
        first, last = notes[0] + 1, notes[-1] + 1
        meaning.anchor = 0
        meaning.lead = first
    else:
        first, last = len(kinds), 0
        meaning.lead = len(kinds) + distances[kinds[-1]]
    meaning.lead_bars = kinds[:first].count("Bar")
    meaning.tail = len(kinds) - last
    meaning.tail_bars = kinds[last:].count("Bar")
