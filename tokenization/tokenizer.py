"""MidiTok tokenizers of one stream, and the same tokenizer as a plain `transformers` one.

A piece is one sequence of *base tokens* such as `Bar_None TimeSig_4/4 Position_0 Program_0 Pitch_60 Velocity_63
Duration_1.0.12`. Byte-pair encoding then merges frequent successions within a bar into one id and loses nothing:
with 1,000 ids the sequences of chorales become 3.0 times shorter, those of folk tunes 3.6 times.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import miditok
from miditok import MusicTokenizer, TokenizerConfig, TokSequence
from symusic.core import ScoreTick
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from midimamba.errors import InputError

MIDITOK_FILE = "miditok.json"
PAD, BOS, EOS = "PAD_None", "BOS_None", "EOS_None"
BAR = "Bar_None"
# The type of the token that completes a note.
NOTE_END = "Duration"

# Only these write one stream for all tracks, decode whatever a model may sample, and can be trained.
TOKENIZATIONS = ("REMI", "TSD")

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
}

# One stream for all tracks, a program token at every change of instrument, special tokens with ids 0, 1, 2.
_FIXED: dict[str, Any] = {
    "use_programs": True,
    "one_token_stream_for_programs": True,
    "program_changes": True,
    "special_tokens": ["PAD", "BOS", "EOS"],
}

# What may be chosen. Under MidiTok's other options a note is not always Pitch, Velocity, Duration, or a bar has no
# token of its own, and the grammar could promise nothing.
OPTIONS = frozenset(
    {
        "beat_res",
        "num_tempos",
        "num_velocities",
        "tempo_range",
        "time_signature_range",
        "use_tempos",
        "use_time_signatures",
        "use_velocities",
    }
)


def build_tokenizer(tokenization: str = "REMI", **options: Any) -> MusicTokenizer:
    """Build an untrained MidiTok tokenizer that writes all tracks of a piece as one sequence.

    Args:
        tokenization (`str`, *optional*, defaults to `"REMI"`):
            `"REMI"` (time as bars and positions) or `"TSD"` (time as shifts).
        options:
            Fields of `miditok.TokenizerConfig` named in `OPTIONS` that replace this package's choice.

    Raises:
        InputError: if the tokenization is another one, or an option is not one of `OPTIONS`.
    """
    if tokenization not in TOKENIZATIONS:
        raise InputError(f"tokenization {tokenization!r} is not supported: choose one of {', '.join(TOKENIZATIONS)}")
    if unusable := sorted(set(options) - OPTIONS):
        raise InputError(f"tokenizer option {unusable[0]!r} cannot be set: choose among {', '.join(sorted(OPTIONS))}")
    # TSD has no bar tokens, so a text cannot be split where MidiTok would split by time.
    split = "bar" if tokenization == "REMI" else "no"
    config = TokenizerConfig(**{**_DEFAULTS, **options, **_FIXED, "encode_ids_split": split})
    return getattr(miditok, tokenization)(config)


def base_ids(tokenizer: MusicTokenizer, score: ScoreTick) -> list[int]:
    """The ids of a score's base tokens, before byte-pair encoding, from the first bar to the last note.

    What MidiTok appends for tempo and time signature changes after the last note is cut off: nobody hears it.
    Meters of half notes are written with quarters (3/2 as 6/4), which MidiTok would otherwise drop.
    """
    if any(signature.denominator == 2 for signature in score.time_signatures):
        score = score.copy()
        for meter in score.time_signatures:
            if meter.denominator == 2:
                meter.numerator, meter.denominator = meter.numerator * 2, 4
    ids: list[int] = tokenizer.encode(score, encode_ids=False).ids
    ends = set(tokenizer.token_ids_of_type(NOTE_END))
    length = next((i + 1 for i in reversed(range(len(ids))) if ids[i] in ends), 0)
    return ids[:length]


def merge_ids(tokenizer: MusicTokenizer, ids: Sequence[int]) -> list[int]:
    """Apply the trained byte-pair encoding to base ids; an untrained tokenizer returns them as they are."""
    if not tokenizer.is_trained:
        return list(ids)
    return tokenizer._model.encode(_words(tokenizer, ids), is_pretokenized=True).ids


def expand_ids(tokenizer: MusicTokenizer, ids: Sequence[int]) -> list[int]:
    """Undo [`merge_ids`]: the base ids that `ids` stand for."""
    sequence = TokSequence(ids=list(ids), are_ids_encoded=tokenizer.is_trained)
    tokenizer.decode_token_ids(sequence)
    return sequence.ids


def train_tokenizer(tokenizer: MusicTokenizer, scores: Iterable[ScoreTick], vocab_size: int) -> None:
    """Learn byte-pair encoding from scores, in place.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            From [`build_tokenizer`].
        scores (iterable of `symusic.Score`):
            The training split only.
        vocab_size (`int`):
            Number of ids afterwards. Fewer are learned where the scores hold too few different successions.

    Raises:
        InputError: if `vocab_size` is not larger than the number of base tokens.
    """
    train_on_ids(tokenizer, (base_ids(tokenizer, score) for score in scores), vocab_size)


def train_on_ids(tokenizer: MusicTokenizer, pieces: Iterable[Sequence[int]], vocab_size: int) -> None:
    """[`train_tokenizer`] on pieces that are base ids already."""
    check_vocab_size(tokenizer, vocab_size)
    # A model instead of its name "BPE" keeps MidiTok from adding a word-start symbol, an id that means no music.
    tokenizer.train(vocab_size, model=models.BPE(), iterator=[_words(tokenizer, piece) for piece in pieces])


def check_vocab_size(tokenizer: MusicTokenizer, vocab_size: int) -> None:
    """Raise an [`InputError`] if training to `vocab_size` ids would have nothing to learn."""
    if vocab_size <= len(tokenizer.vocab):
        raise InputError(
            f"a vocabulary of {vocab_size} leaves nothing to learn: "
            f"{type(tokenizer).__name__} has {len(tokenizer.vocab)} base tokens, choose more"
        )


def _words(tokenizer: MusicTokenizer, ids: Sequence[int]) -> list[str]:
    """MidiTok's one-character symbols of base ids, split before every bar so that no merge crosses a bar line."""
    symbols: str = tokenizer._ids_to_bytes(list(ids), as_one_str=True)
    if BAR not in tokenizer.vocab:
        return [symbols]
    bar = tokenizer._vocab_base_id_to_byte[tokenizer.vocab[BAR]]
    before, *bars = symbols.split(bar)
    return ([before] if before else []) + [bar + rest for rest in bars]


def fast_tokenizer(tokenizer: MusicTokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer for text: base tokens joined by spaces, with MidiTok's ids, whether trained or not.

    It is a plain `tokenizers` pipeline, so that `AutoTokenizer` loads what it saves without this package. A normalizer
    writes every base token as one private character, a bar starts a word, MidiTok's own merges apply, and the
    decoder writes the characters as tokens again. Text that is no base token is dropped.
    """
    vocab: dict[str, int] = tokenizer.vocab
    special = [token for token in (PAD, BOS, EOS) if token in vocab]
    # MidiTok's symbols start at "!": shifted to Unicode's private area, no text can be mistaken for one.
    symbols = {token: chr(0xE000 + index) for token, index in vocab.items() if token not in special}
    private = {tokenizer._vocab_base_id_to_byte[vocab[token]]: symbol for token, symbol in symbols.items()}
    pipeline = Tokenizer(_private_model(tokenizer, str.maketrans(private), special, symbols))
    # The longest first, or Pitch_6 would match the start of Pitch_60.
    longest_first = sorted(symbols, key=len, reverse=True)
    pipeline.normalizer = normalizers.Sequence(
        [*(normalizers.Replace(token, symbols[token]) for token in longest_first), normalizers.Replace(" ", "")]
    )
    if BAR in symbols:
        pipeline.pre_tokenizer = pre_tokenizers.Split(symbols[BAR], "merged_with_next")
    written = {token: token for token in special} | {symbol: token for token, symbol in symbols.items()}
    pipeline.decoder = decoders.Sequence(
        [
            decoders.Fuse(),
            *(decoders.Replace(symbol, f"{token} ") for symbol, token in written.items()),
            decoders.Strip(" ", 0, 1),
        ]
    )
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _private_model(
    tokenizer: MusicTokenizer, private: dict[int, str], special: list[str], symbols: dict[str, str]
) -> models.BPE:
    vocab = {token: tokenizer.vocab[token] for token in special}
    vocab |= {symbol: tokenizer.vocab[token] for token, symbol in symbols.items()}
    if not tokenizer.is_trained:
        return models.BPE(vocab=vocab, merges=[])
    learned = json.loads(tokenizer._model.to_str())["model"]
    base_size = len(tokenizer.vocab)
    vocab |= {word.translate(private): index for word, index in learned["vocab"].items() if index >= base_size}
    merges = [(left.translate(private), right.translate(private)) for left, right in learned["merges"]]
    return models.BPE(vocab=vocab, merges=merges)


def load_tokenizer(name: str, **hub_options: Any) -> MusicTokenizer:
    """Read the MidiTok tokenizer of a folder or a Hub repository from its `miditok.json`.

    Args:
        name (`str`):
            A folder or a Hub id.
        hub_options:
            Passed to `transformers.utils.cached_file`: `revision`, `token`, `cache_dir`, `local_files_only` and so on.

    Raises:
        InputError: if there is no `miditok.json`, or not one of a supported tokenization.
    """
    try:
        path = Path(cast(str, cached_file(name, MIDITOK_FILE, **hub_options)))
        tokenization = json.loads(path.read_text()).get("tokenization")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name} is no MIDI model: its {MIDITOK_FILE} cannot be read ({reason})") from error
    if tokenization not in TOKENIZATIONS:
        raise InputError(f"{path} is for {tokenization!r}: supported are {', '.join(TOKENIZATIONS)}")
    return getattr(miditok, tokenization)(params=path)
