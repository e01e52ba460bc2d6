"""From a generator to scores: new music, with or without controls, or the continuation of a prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from symusic.core import ScoreTick
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from midimamba import MidiMambaForCausalLM, MidiProcessor, load
from midimamba.command_options import SamplingOptions
from midimamba.errors import InputError
from midimamba.evaluation.samples import Samples, decode_all
from midimamba.loading import load_processor
from midimamba.tokenization.composing import Composed, seeded
from midimamba.tokenization.sampling_limits import complete_sampling

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
        InputError: if one of them is missing or damaged, or their vocabularies differ.
    """
    processor = load_processor(name)
    model = load(name)
    if model.config.vocab_size != processor.vocab_size:
        raise InputError(
            f"{name}: the generator has {model.config.vocab_size} tokens, but its tokenizer {processor.vocab_size}; "
            "the folder mixes two models: save the generator and its processor together again"
        )
    network: nn.Module = model  # the types of transformers' own `to` are wrong
    network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    _check_logits(model, name)
    return model, processor


@torch.no_grad()
def _check_logits(model: MidiMambaForCausalLM, name: str) -> None:
    """Finite weights can still be so large that what they compute is not."""
    first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    if not model(input_ids=first).logits.isfinite().all():
        raise InputError(
            f"the generator {name!r} computes NaN or infinity: its training has diverged or its files are damaged; "
            "take an earlier checkpoint"
        )


def generate_scores(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    options: SamplingOptions | None = None,
    *,
    prompt: str | Path | bytes | ScoreTick | None = None,
    controls: Mapping[str, str | Sequence[str]] | None = None,
) -> list[ScoreTick]:
    """
    Sample music. Where the tokenization has a grammar, it is valid and holds notes, whatever the model's quality.

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
        InputError: if there is no such control or value, the model computes NaN, or pieces are still not music after
            several draws where the tokenization has no grammar.
    """
    options = options or SamplingOptions()
    inputs = processor(prompt, return_tensors="pt", controls=controls)
    parts = _compose(model, processor, inputs, options)
    return [processor.continue_score(prompt, ids) for part in parts for ids in part.ids]


def generate_samples(model: MidiMambaForCausalLM, processor: MidiProcessor, options: SamplingOptions) -> Samples:
    """Sample music to be measured: as [`generate_scores`], but what is not music is counted and not drawn again.

    Only `options` bound what is drawn: a `top_k` of the model's own has no effect.
    """
    parts = _compose(model, processor, processor(None, return_tensors="pt"), options, redraw=False, top_k=0)
    return decode_all(processor, [ids for part in parts for ids in part.ids.tolist()])


def _compose(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    inputs: Mapping[str, Any],
    options: SamplingOptions,
    **more: Any,
) -> list[Composed]:
    """Continue one prompt `options.num` times, in parts. `more` is for `compose`."""
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
    sampling = complete_sampling(model.generation_config, given | {"do_sample": True} | more)
    limit = sampling["max_new_tokens"]
    counts = [min(_SAMPLED_AT_ONCE, options.num - start) for start in range(0, options.num, _SAMPLED_AT_ONCE)]
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    parts: list[Composed] = []
    with (
        seeded(options.seed, model.device),
        tqdm(total=limit * len(counts), desc="sampling", unit="token", leave=False, disable=None) as bar,
    ):
        for count in counts:
            part = processor.compose(
                model,
                inputs,
                bars=options.bars,
                at_most=options.at_most,
                num_return_sequences=count,
                **sampling,
                stopping_criteria=StoppingCriteriaList([_TokenProgress(bar)]),
            )
            parts.append(part)
            bar.update(len(parts) * limit - bar.n)  # a part ends early when all of its pieces do
    Composed.tell_unfinished(parts, options.bars)
    return parts
