"""The grammar of every tokenization that has one."""

from typing import Any

from miditok import MusicTokenizer

from .grammar import MidiGrammar
from .grammar_beat import BeatGrammar
from .grammar_midilike import MidiLikeGrammar
from .grammar_mmm import MmmGrammar
from .grammar_pertok import PerTokGrammar
from .grammar_rests import RestGrammar
from .grammar_types import check_supported, name_of

_OF_TOKENIZATION = {
    name: kind
    for kind in (MidiGrammar, RestGrammar, MidiLikeGrammar, PerTokGrammar, MmmGrammar, BeatGrammar)
    for name in kind.tokenizations
}


def make_grammar(tokenizer: MusicTokenizer, **options: Any) -> MidiGrammar:
    """The grammar of a tokenizer.

    Args:
        tokenizer (`miditok.MusicTokenizer`):
            From [`~midimamba.tokenization.tokenizer.build_tokenizer`], trained or not.
        options:
            As for [`~midimamba.tokenization.grammar.MidiGrammar`].

    Raises:
        InputError: if there are no rules for the tokenization, or for one of its options.
    """
    check_supported(tokenizer)
    return _OF_TOKENIZATION[name_of(tokenizer)](tokenizer, **options)
