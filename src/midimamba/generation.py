"""From a generator to scores: new music, with or without controls, or the continuation of a prompt."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from symusic.core import ScoreTick
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from midimamba import MidiMambaForCausalLM, MidiProcessor, load
from midimamba.command_options import SamplingOptions
from midimamba.errors import InputError, loading_generator
from midimamba.tokenization.tokenizations import BAR

_SAMPLED_AT_ONCE = 16  # so that memory does not grow with the number of pieces


class _TokenProgress(StoppingCriteria):
    """Never stops anything. `generate` calls it after every token, which is what a progress bar needs."""

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
            f"{name}: the generator has {model.config.vocab_size} tokens, but its tokenizer {processor.vocab_size}; "
            "the folder mixes two models: save the generator and its processor together again"
        )
    network: nn.Module = model  # the types of transformers' own `to` are wrong
    network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, processor


def generate_scores(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    options: SamplingOptions | None = None,
    *,
    prompt: str | Path | bytes | ScoreTick | None = None,
    controls: Mapping[str, str | Sequence[str]] | None = None,
) -> list[ScoreTick]:
    """
    Sample music that is valid and holds notes, whatever the model's quality.

    torch's random state is afterwards what it was before.

    Args:
        model (`MidiMambaForCausalLM`): the generator.
        processor (`MidiProcessor`): its processor.
        options ([`~midimamba.command_options.SamplingOptions`], *optional*): how many pieces, how long, how daring.
        prompt (`str`, `Path`, `bytes` or `symusic.Score`, *optional*): music to continue; every result begins with it.
        controls (`Mapping[str, str | Sequence[str]]`, *optional*): what the music should be like, such as
            `{"key": "C-major"}`; `processor.controls` has the names and their values.

    Returns:
        `list[symusic.Score]` of length `options.num`.

    Raises:
        MidiRefusedError: if the prompt cannot be used.
        InputError: if there is no such control or value, or valid music cannot be guaranteed for the tokenization.
    """
    options = options or SamplingOptions()
    ids = processor.encode(prompt, controls=controls)
    max_bars = None
    if BAR in processor.midi_tokenizer.vocab:
        max_bars = options.bars + processor.tokenizer.decode(ids).split().count(BAR)
    grammar = processor.grammar(max_bars=max_bars)
    limit = options.max_new_tokens
    parts = [min(_SAMPLED_AT_ONCE, options.num - start) for start in range(0, options.num, _SAMPLED_AT_ONCE)]
    scores = []
    with (
        _seeded(options.seed, model.device),
        tqdm(total=limit * len(parts), desc="sampling", unit="token", leave=False, disable=None) as bar,
    ):
        for index, part in enumerate(parts):
            sequences = model.generate(
                torch.tensor([ids], device=model.device),
                do_sample=True,
                num_return_sequences=part,
                max_new_tokens=limit,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=0,
                logits_processor=LogitsProcessorList([grammar]),
                stopping_criteria=StoppingCriteriaList([_TokenProgress(bar)]),
            )
            bar.update((index + 1) * limit - bar.n)  # a part ends early when all of its pieces do
            scores += [processor.continue_score(prompt, sequence) for sequence in cast(Tensor, sequences)]
    return scores


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw by `seed` on the CPU and on `device`, then put their random states back. No other device is touched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield
