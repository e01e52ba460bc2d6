"""Pieces to ids and back with a MidiTok tokenizer, and the subword models that shorten them.

A piece is one sequence of *base tokens* such as `Bar_None TimeSig_4/4 Position_0 Program_0 Pitch_60 Velocity_63
Duration_1.0.12`. A subword model (byte-pair encoding or unigram) then writes frequent sequences within a bar as one
id, without loss: with 1,000 BPE ids, chorales become 3.0 times shorter and folk tunes 3.6 times.

Tokenizations with several vocabularies write rows of ids instead, one id from each. They have no subword model.
"""

import json
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, SupportsIndex, cast

import miditok
import numpy as np
from miditok import MMM, MusicTokenizer, Structured, TokSequence
from symusic.core import ScoreTick
from tokenizers import Tokenizer, models, trainers
from transformers.utils.hub import cached_file

from .choices import SUBWORD_MODELS
from .errors import InputError
from .hf_tokenizer import fast_tokenizer, word_starts
from .ingest import MidiRefusedError
from .normalization import normalize_score
from .tokenizations import (
    BOS,
    EOS,
    PAD,
    build_tokenizer,
    check_tokenization,
)

__all__ = [
    "BOS",
    "EOS",
    "MIDITOK_FILE",
    "PAD",
    "base_ids",
    "build_tokenizer",
    "check_subword_model",
    "check_vocab_size",
    "encode_normalized",
    "expand_ids",
    "fast_tokenizer",
    "load_tokenizer",
    "merge_ids",
    "normalize_score",
    "time_ids",
    "train_on_ids",
    "train_tokenizer",
]

MIDITOK_FILE = "miditok.json"
# What MMM repeats in every track, over all tracks: 220,000 take a second.
MAX_SHARED_EVENTS = 300_000
# What MidiTok writes to it. It would set anything else as an attribute, methods included.
_STORED = frozenset(
    {"config", "tokenization", "_model", "_vocab_base", "_vocab_base_byte_to_token", "has_bpe"}
    | {"miditok_version", "symusic_version", "hf_tokenizers_version"}
)
_MAX_TOKENS = 100_000
# Elsewhere the trainers of `tokenizers` print empty lines instead of a bar.
_SHOW_PROGRESS = sys.stderr.isatty()


def _onsets(score: ScoreTick) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(track.notes.numpy()["time"] for track in score.tracks)])


def base_ids(tokenizer: MusicTokenizer, score: ScoreTick) -> list[Any]:
    """The ids of the base tokens of a score, before any subword model.

    The score is first put into the form that [`~midimamba.tokenization.normalization.normalize`] describes.

    Returns:
        `list[int]`, or for several vocabularies `list[list[int]]` of shape (time, vocabularies). MuMIDI's bars,
        positions and programs have neither velocity nor duration; padding takes their place.

    Raises:
        MidiRefusedError: if the tokenization cannot write the piece: Structured has no time shift for a long pause,
            Octuple and MuMIDI no number for a bar beyond their `max_bar_embedding`; or if it has very many long notes.
    """
    return encode_normalized(tokenizer, normalize_score(tokenizer, score))


def encode_normalized(tokenizer: MusicTokenizer, score: ScoreTick) -> list[Any]:
    """[`base_ids`] of a score that is normalised already."""
    if type(tokenizer) is Structured:
        _check_pauses(tokenizer, score)
    insert = partial(_insert_program_changes, programs=tokenizer.config.programs)
    cast(Any, tokenizer)._insert_program_change_events = insert
    if type(tokenizer) is MMM:
        _check_tracks(score)
        # MidiTok adds up the sequences of tracks one by one, which is quadratic: 17 seconds for 1,000 tracks.
        tracks = tokenizer.encode(score, encode_ids=False, concatenate_track_sequences=False)
        return [id_ for track in cast(list[TokSequence], tracks) for id_ in track.ids]
    if not tokenizer.is_multi_voc:
        return tokenizer.encode(score, encode_ids=False).ids
    score = tokenizer.preprocess_score(score)
    _check_bars(tokenizer, score)
    rows = tokenizer.encode(score, no_preprocess_score=True).ids
    return [row + [tokenizer.pad_token_id] * (len(tokenizer.vocab) - len(row)) for row in rows]


class _Insertions(list[Any]):
    """A list that remembers what is to be inserted into it."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.insertions: dict[int, Any] = {}

    def insert(self, index: SupportsIndex, item: Any) -> None:
        self.insertions[int(index)] = item


def _insert_program_changes(events: list[Any], programs: Container[int]) -> None:
    """MidiTok's method in linear time, for any programs.

    MidiTok inserts events into a list one by one, from the last to the first. With 100,000 notes on 1,000 tracks that
    takes 5 to 50 seconds. It also writes program 0 before a key signature, and fails if the tokenizer has no piano.
    """
    for event in events:
        if event.type_ == "KeySig" and event.program not in programs:
            event.program = None
    marked = _Insertions(events)
    MusicTokenizer._insert_program_change_events(marked)
    events[:] = [
        item
        for index, event in enumerate(events)
        for item in ((marked.insertions[index], event) if index in marked.insertions else (event,))
    ]


def _check_pauses(tokenizer: Structured, score: ScoreTick) -> None:
    """MidiTok's Structured shortens a pause for which it has no time shift, so everything after it comes too early."""
    limit = max(last for _, last in tokenizer.config.beat_res)
    onsets = np.sort(_onsets(score))
    if np.diff(onsets, prepend=0).max(initial=0) > limit * score.ticks_per_quarter:
        raise MidiRefusedError(f"no note starts for more than {limit} quarter notes, which Structured cannot write")


def _check_tracks(score: ScoreTick) -> None:
    """MMM repeats bars and changes of tempo and meter in every track, so a small file may have a billion tokens."""
    quarters = int(_onsets(score).max(initial=0)) // score.ticks_per_quarter
    shared = quarters // 4 + len(score.tempos) + len(score.time_signatures)
    if len(score.tracks) * shared > MAX_SHARED_EVENTS:
        raise MidiRefusedError(
            f"MMM repeats {shared:,} bars and changes of tempo and meter in each of {len(score.tracks):,} tracks; "
            f"the limit is {MAX_SHARED_EVENTS:,} in all"
        )


def _check_bars(tokenizer: MusicTokenizer, score: ScoreTick) -> None:
    """MidiTok cuts off everything after the last bar that Octuple or MuMIDI can number, with only a warning."""
    limit = tokenizer.config.additional_params.get("max_bar_embedding")
    bars = int(_onsets(score).max(initial=0)) // (4 * score.ticks_per_quarter) + 1
    if limit is not None and bars > limit:
        raise MidiRefusedError(
            f"it has {bars:,} bars of 4/4, but {type(tokenizer).__name__} numbers only {limit:,}: "
            "raise its option 'max_bar_embedding'"
        )


def merge_ids(tokenizer: MusicTokenizer, ids: Sequence[Any]) -> list[Any]:
    """Apply the trained subword model to base ids; an untrained tokenizer returns them as they are."""
    if not tokenizer.is_trained:
        return list(ids)
    return tokenizer._model.encode(_words(tokenizer, ids), is_pretokenized=True).ids


def expand_ids(tokenizer: MusicTokenizer, ids: Sequence[Any]) -> list[Any]:
    """Undo [`merge_ids`]: the base ids that `ids` stand for."""
    sequence = TokSequence(ids=list(ids), are_ids_encoded=tokenizer.is_trained)
    tokenizer.decode_token_ids(sequence)
    return sequence.ids


def time_ids(tokenizer: MusicTokenizer) -> tuple[list[int], list[list[int]]]:
    """Which ids tell where in the music a token is, for a model that looks back by bars.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            One that writes one id per step, trained or not.

    Returns:
        `tuple[list[int], list[list[int]]]`: the ids that open a bar, and pairs of an id and the last position in the
        bar that it sets. A learned id may do both, because it stands for several base tokens.
    """
    bars, positions = [], []
    for index in range(tokenizer.vocab_size):
        tokens = tokenizer._ids_to_tokens(expand_ids(tokenizer, [index]))
        if any(token.startswith("Bar_") for token in tokens):
            bars.append(index)
        if found := [int(token.removeprefix("Position_")) for token in tokens if token.startswith("Position_")]:
            positions.append([index, found[-1]])
    return bars, positions


def train_tokenizer(
    tokenizer: MusicTokenizer, scores: Iterable[ScoreTick], vocab_size: int, model: str = "BPE"
) -> None:
    """Learn a subword model from scores, in place.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            From [`build_tokenizer`].
        scores (iterable of `symusic.Score`):
            The training split only.
        vocab_size (`int`):
            Number of ids afterwards. Fewer are learned if the scores hold too few different sequences.
        model (`str`, *optional*, defaults to `"BPE"`):
            `"BPE"` (byte-pair encoding) or `"Unigram"`. Base tokens keep their ids under both.

    Raises:
        InputError: if `vocab_size` isn't larger than the number of base tokens, `model` isn't supported, or the
            tokenizer has several vocabularies.
    """
    train_on_ids(tokenizer, (base_ids(tokenizer, score) for score in scores), vocab_size, model)


def train_on_ids(
    tokenizer: MusicTokenizer, pieces: Iterable[Sequence[int]], vocab_size: int, model: str = "BPE"
) -> None:
    """[`train_tokenizer`] on pieces that are base ids already.

    MidiTok's own `train` is not used: it adds a word-start symbol that has no musical meaning; under Unigram it writes
    each special token with three characters and gives base tokens new ids; and it splits at MMM's track tokens only
    when it encodes.
    """
    check_vocab_size(tokenizer, vocab_size)
    check_subword_model(model)
    alphabet = [tokenizer._vocab_base_id_to_byte[index] for index in range(len(tokenizer.vocab))]
    words = (_words(tokenizer, piece) for piece in pieces)  # the trainers count words and keep each one once
    learn = _learn_unigram if model == "Unigram" else _learn_bpe
    tokenizer._model = learn(alphabet, words, vocab_size)
    # What MidiTok derives from its model when it loads one.
    tokens = tokenizer._vocab_base_byte_to_token
    tokenizer._vocab_learned_bytes_to_tokens = {
        piece: [tokens[symbol] for symbol in piece] for piece in tokenizer._model.get_vocab()
    }


def _learn_bpe(alphabet: list[str], words: Iterable[list[str]], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding whose first ids are the alphabet: its characters ascend, and the trainer sorts them."""
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=_SHOW_PROGRESS)
    learner.train_from_iterator(words, trainer)
    return learner


def _learn_unigram(alphabet: list[str], words: Iterable[list[str]], vocab_size: int) -> Tokenizer:
    """A unigram model whose first ids are the alphabet, then the learned pieces, the likeliest first."""
    learner = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=_SHOW_PROGRESS)
    learner.train_from_iterator(words, trainer)
    # The trainer adds numbers in any order, so they are rounded. It puts back the symbols that it dropped, 0.0001
    # apart from the lowest score up, again in any order, so these are levelled.
    learned = {piece: round(score, 6) for piece, score in json.loads(learner.to_str())["model"]["vocab"]}
    lowest = min(learned.values())
    put_back = lowest + 0.0001 * len(alphabet)
    scores = [learned.pop(symbol) for symbol in alphabet]
    base = [(symbol, score if score > put_back else lowest) for symbol, score in zip(alphabet, scores, strict=True)]
    return Tokenizer(models.Unigram(base + sorted(learned.items(), key=lambda item: (-item[1], item[0])), None, False))


def check_vocab_size(tokenizer: MusicTokenizer, vocab_size: int) -> None:
    """Raise an [`InputError`] if training to `vocab_size` ids would have nothing to learn, or cannot be."""
    if tokenizer.is_multi_voc:
        raise InputError(
            f"{type(tokenizer).__name__} cannot have a subword model, "
            "which needs one sequence of ids: use it untrained"
        )
    if vocab_size <= len(tokenizer.vocab):
        raise InputError(
            f"a vocabulary of {vocab_size} leaves nothing to learn: "
            f"{type(tokenizer).__name__} has {len(tokenizer.vocab)} base tokens; choose a larger one"
        )


def check_subword_model(model: str) -> None:
    """Raise an [`InputError`] if `model` is not one of `SUBWORD_MODELS`."""
    if model not in SUBWORD_MODELS:
        reason = " (it loses music: a word it does not know becomes one unknown id)" if model == "WordPiece" else ""
        raise InputError(f"subword model {model!r} is not supported{reason}: choose {' or '.join(SUBWORD_MODELS)}")


def _words(tokenizer: MusicTokenizer, ids: Sequence[int]) -> list[str]:
    """MidiTok's one-character symbols of base ids, split before every token that starts a word."""
    starts = {tokenizer.vocab[token] for token in word_starts(tokenizer)}
    cuts = [0, *(index for index, token in enumerate(ids) if token in starts and index), len(ids)]
    symbols: str = tokenizer._ids_to_bytes(list(ids), as_one_str=True)
    return [symbols[first:last] for first, last in pairwise(cuts)]


def load_tokenizer(name: str, **hub_options: Any) -> MusicTokenizer:
    """Read the MidiTok tokenizer of a folder or a Hub repository from its `miditok.json`.

    Args:
        name (`str`):
            A folder or a Hub id.
        hub_options:
            Passed to `transformers.utils.cached_file`: `revision`, `token`, `cache_dir`, `local_files_only` and so on.

    Raises:
        InputError: if there is no `miditok.json`, or it is not one that this package can read.
    """
    try:
        path = Path(cast(str, cached_file(name, MIDITOK_FILE, **hub_options)))
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSON can be too deep for Python's stack
        reason = str(error).splitlines()[0]
        raise InputError(f"{name} is not a MIDI model: its {MIDITOK_FILE} cannot be read ({reason})") from error
    broken = f"{name} is not a MIDI model: its {MIDITOK_FILE} is damaged"
    if not isinstance(content, dict):
        raise InputError(f"{broken}: it holds no JSON object; save or download the model again")
    check_tokenization(content.get("tokenization"))  # type: ignore[arg-type]  # checked there
    if not isinstance(content.get("config"), dict):
        raise InputError(f"{broken}: it holds no `config`; save or download the model again")
    if unknown := content.keys() - _STORED:
        raise InputError(f"{broken}: {min(unknown)!r} is not a part of a tokenizer; save or download the model again")
    if (largest := max(_numbers(content["config"]))) > _MAX_TOKENS:
        raise InputError(f"{broken}: an option of {largest:,} would give more than {_MAX_TOKENS:,} tokens of one kind")
    try:
        tokenizer: MusicTokenizer = getattr(miditok, content["tokenization"])(params=path)
        special = [tokenizer[token] for token in (PAD, BOS, EOS)] if not tokenizer.is_multi_voc else [0, 1, 2]
    except Exception as error:  # MidiTok checks little of what it reads, and `tokenizers` raises bare exceptions
        reason = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise InputError(f"{broken} ({reason}); save or download the model again") from error
    if special != [0, 1, 2]:
        raise InputError(f"{broken}: PAD, BOS and EOS are not ids 0, 1 and 2; save or download the model again")
    return tokenizer


def _numbers(options: Any) -> Iterator[float]:
    """How many tokens each option of a tokenizer asks for, at most, before MidiTok makes them."""
    yield 0
    if isinstance(options, dict):
        for name, value in options.items():
            yield from _numbers(value)
            beats = str(name).rpartition("_")[2]  # of "0_4": 12
            if beats.isdecimal() and isinstance(value, (int, float)):
                yield int(beats) * value
    elif isinstance(options, list):
        for value in options:
            yield from _numbers(value)
    elif isinstance(options, (int, float)):
        yield abs(options)
