"""A MidiTok tokenizer as a plain `transformers` one, for text of base tokens joined by spaces."""

import json

from miditok import MusicTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .controls import is_control
from .errors import InputError
from .tokenizations import BAR, BOS, EOS, FILL, GAP, PAD, TRACK_START

# The first code point of Unicode's largest private area: no text can be mistaken for one of these symbols.
_PRIVATE = 0xF0000


def word_starts(tokenizer: MusicTokenizer) -> list[str]:
    """The base tokens that start a word. No subword reaches across the start of a word.

    MidiTok splits a track into bars, and the tracks of MMM from each other, before it applies a model. Nothing that
    crosses such a line is ever learned here, so encoding a whole text at once gives MidiTok's ids.
    """
    starts = [TRACK_START, BAR] if tokenizer.config.encode_ids_split == "bar" else [TRACK_START]
    return [token for token in starts if token in tokenizer.vocab]


def fast_tokenizer(tokenizer: MusicTokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer for text: base tokens joined by spaces, with MidiTok's ids, whether trained or not.

    It is a plain `tokenizers` pipeline, so that `AutoTokenizer` loads what it saves without this package. A normalizer
    writes every base token as one private character, each bar or track starts a word, MidiTok's own model applies, and
    the decoder writes the characters as tokens again. Control tokens and those of
    infilling are special tokens, just as BOS and EOS are. Text that isn't a base token is dropped.

    Raises:
        InputError: if the tokenizer has several vocabularies.
    """
    if tokenizer.is_multi_voc:
        raise InputError(f"{type(tokenizer).__name__} has no text form: its steps are rows of ids, not tokens")
    vocab: dict[str, int] = tokenizer.vocab
    more = [token for token in vocab if is_control(token) or token in (GAP, FILL)]
    special = [PAD, BOS, EOS, *more]
    symbols = {token: chr(_PRIVATE + index) for token, index in vocab.items() if token not in special}
    pipeline = Tokenizer(_private_model(tokenizer, symbols))
    # The longest first, or Pitch_6 would match the start of Pitch_60.
    longest_first = sorted(symbols, key=len, reverse=True)
    pipeline.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(token, symbols[token]) for token in longest_first),
            normalizers.Replace(Regex(rf"[^\x{{{_PRIVATE:X}}}-\x{{FFFFD}}]"), ""),
        ]
    )
    if starts := word_starts(tokenizer):
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(symbols[token], "merged_with_next") for token in starts]
        )
    pipeline.decoder = decoders.Sequence(
        [
            # Special tokens come as they are. Each gets its own space, because one name may be the start of another.
            decoders.Replace(Regex(rf"(?<=[^\x{{{_PRIVATE:X}}}-\x{{FFFFD}}])\z"), " "),
            decoders.Fuse(),
            *(decoders.Replace(symbol, f"{token} ") for token, symbol in symbols.items()),
            decoders.Strip(" ", 0, 1),
        ]
    )
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=more,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _private_model(tokenizer: MusicTokenizer, symbols: dict[str, str]) -> models.Model:
    """MidiTok's model with its characters, which start at "!", in the private area; special tokens by their names."""
    byte_of = tokenizer._vocab_base_id_to_byte
    private = str.maketrans({byte_of[index]: symbols.get(token, token) for token, index in tokenizer.vocab.items()})
    if not tokenizer.is_trained:
        return models.BPE(vocab={symbols.get(token, token): i for token, i in tokenizer.vocab.items()}, merges=[])
    learned = json.loads(tokenizer._model.to_str())["model"]
    if learned["type"] == "Unigram":
        return models.Unigram([(piece.translate(private), score) for piece, score in learned["vocab"]], None, False)
    vocab = {word.translate(private): index for word, index in learned["vocab"].items()}
    merges = [(left.translate(private), right.translate(private)) for left, right in learned["merges"]]
    return models.BPE(vocab=vocab, merges=merges)
