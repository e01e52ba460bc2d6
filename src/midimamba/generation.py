"""From a generator to scores: new music, as asked for by controls or not, or the continuation of a prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from symusic.core import ScoreTick
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from midimamba import MidiMambaForCausalLM, MidiProcessor, load
from midimamba.errors import InputError, loading_generator
from midimamba.tokenization.tokenizations import BAR

_SAMPLED_AT_ONCE = 16  # so that memory does not grow with the number of pieces


class _TokenProgress(StoppingCriteria):
    """Never stops anything: `generate` calls it after every token, which is what a progress bar needs."""

    def __init__(self, bar: "tqdm[Any]"):
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def load_pair(name: str) -> tuple[MidiMambaForCausalLM, MidiProcessor]:
    """A generator and its processor, from a folder or the Hub, on the best device there is.

    Raises:
        InputError: if one of them is missing, or their vocabularies differ.
    """
    processor = MidiProcessor.from_pretrained(name)
    with loading_generator(name):
        model = load(name)
    if model.config.vocab_size != processor.vocab_size:
        raise InputError(
            f"{name}: the generator knows {model.config.vocab_size} tokens, its tokenizer {processor.vocab_size}; "
            "the folder mixes two models"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def generate_scores(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    *,
    prompt: str | Path | bytes | ScoreTick | None = None,
    controls: Mapping[str, str | Sequence[str]] | None = None,
    num: int = 4,
    bars: int = 16,
    max_new_tokens: int = 2048,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[ScoreTick]:
    """
    Sample music that is valid and holds notes, whatever the model's quality.

    Args:
        model (`MidiMambaForCausalLM`): the generator.
        processor (`MidiProcessor`): its processor.
        prompt (`str`, `Path`, `bytes` or `symusic.Score`, *optional*): music to continue; it opens every result.
        controls (`Mapping[str, str | Sequence[str]]`, *optional*): what the music should be like, such as
            `{"key": "C-major"}`; `processor.controls` has the names and their values.
        num (`int`, *optional*, defaults to 4): pieces.
        bars (`int`, *optional*, defaults to 16): at most so many new bars a piece. TSD and Structured know no
            bars: there only `max_new_tokens` ends a piece.
        max_new_tokens (`int`, *optional*, defaults to 2048): at most so many new tokens a piece, and at least 16.
        temperature (`float`, *optional*, defaults to 1.0): below 1 safer, above 1 wilder.
        top_p (`float`, *optional*, defaults to 0.95): draw from the likeliest tokens of this total probability.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same pieces.

    Returns:
        `list[symusic.Score]` of length `num`.

    Raises:
        MidiRefusedError: if the prompt cannot be used.
        InputError: if there is no such control or value, or valid music cannot be guaranteed for the tokenization.
    """
    ids = processor.encode(prompt, controls=controls)
    max_bars = None
    if BAR in processor.midi_tokenizer.vocab:
        max_bars = bars + processor.tokenizer.decode(ids).split().count(BAR)
    grammar = processor.grammar(max_bars=max_bars)
    torch.manual_seed(seed)
    scores = []
    parts = [min(_SAMPLED_AT_ONCE, num - start) for start in range(0, num, _SAMPLED_AT_ONCE)]
    with tqdm(total=max_new_tokens * len(parts), desc="sampling", unit="token", leave=False, disable=None) as bar:
        for index, part in enumerate(parts):
            sequences = model.generate(
                torch.tensor([ids], device=model.device),
                do_sample=True,
                num_return_sequences=part,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                logits_processor=LogitsProcessorList([grammar]),
                stopping_criteria=StoppingCriteriaList([_TokenProgress(bar)]),
            )
            bar.update((index + 1) * max_new_tokens - bar.n)  # a part ends early when all of its pieces do
            scores += processor.batch_decode(sequences)
    return scores
