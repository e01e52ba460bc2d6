"""From a generator to scores: new music, with or without controls, or the continuation of a prompt."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from symusic.core import ScoreTick
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from midimamba import MidiMambaForCausalLM, MidiProcessor, load
from midimamba.command_options import DrawingOptions, SamplingOptions
from midimamba.errors import InputError
from midimamba.evaluation.samples import Samples, decode_all
from midimamba.loading import load_processor
from midimamba.modeling.judging import Judge, music_of
from midimamba.modeling.resampling import choose, effective_sample_size
from midimamba.tokenization.composing import Composed, seeded
from midimamba.tokenization.processor import Midi
from midimamba.tokenization.sampling_limits import BEST_OF, complete_sampling

_SAMPLED_AT_ONCE = 64  # so that memory does not grow with the number of pieces


class Chosen(NamedTuple):
    """
    What a judge chose, and what it left.

    Args:
        scores (`list[symusic.Score]`): one of each group of draws.
        unused (`list[list[symusic.Score]]`): the other draws of each group, if they are kept; else empty.
        effective_sample_size (`float`): the mean over the groups; 1 if one draw of each has all the weight, and the
            number of draws if the judge finds no difference. See
            [`~midimamba.modeling.resampling.effective_sample_size`].
    """

    scores: list[ScoreTick]
    unused: list[list[ScoreTick]]
    effective_sample_size: float


_watch: ContextVar[Callable[[], object] | None] = ContextVar("watch", default=None)
_streamer: ContextVar[BaseStreamer | None] = ContextVar("streamer", default=None)


@contextmanager
def watched(watch: Callable[[], object]) -> Iterator[None]:
    """Call `watch` after every token that is sampled within, instead of showing a progress bar.

    What it raises ends the sampling.
    """
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def streamed_to(streamer: BaseStreamer) -> Iterator[None]:
    """Hand the ids of the one piece that is sampled within to a streamer of transformers, while they are sampled."""
    token = _streamer.set(streamer)
    try:
        yield
    finally:
        _streamer.reset(token)


def tell_watcher() -> None:
    """Call what watches, if anything does."""
    if (watch := _watch.get()) is not None:
        watch()


class _EachToken(StoppingCriteria):
    """Never stops anything. `generate` calls it after every token, which is what a progress bar needs."""

    def __init__(self, tell: Callable[[], object]):
        self.tell = tell

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.tell()
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
    prompt: Midi | None = None,
    controls: Mapping[str, str | Sequence[str]] | None = None,
    judge: Judge | None = None,
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
        judge ([`~midimamba.modeling.judging.Judge`], *optional*): chooses one of every `options.best_of` draws, by
            default of 8; see [`choose_scores`], which can return the others as well.

    Returns:
        `list[symusic.Score]` of length `options.num`.

    Raises:
        MidiRefusedError: if the prompt cannot be used.
        InputError: if there is no such control or value, the model computes NaN, or pieces are still not music after
            several draws where the tokenization has no grammar.
    """
    options = options or SamplingOptions()
    if judge is not None:
        return choose_scores(model, processor, judge, options, prompt=prompt, controls=controls).scores
    if options.best_of is not None:
        raise InputError(f"best_of is {options.best_of}, but nothing chooses: give a judge as well")
    inputs = processor(prompt, return_tensors="pt", controls=controls)
    parts = _compose(model, processor, inputs, options)
    return [processor.continue_score(prompt, ids, options.polyphony) for ids in _rows(parts)]


def infill_scores(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    song: Midi,
    bars: tuple[int, int],
    tracks: Sequence[int] | None = None,
    options: DrawingOptions | None = None,
    controls: Mapping[str, str | Sequence[str]] | None = None,
) -> list[ScoreTick]:
    """
    Write some bars of a piece again, in all tracks or in some. Everything else is the piece itself.

    torch's random state is afterwards what it was before.

    Args:
        model (`MidiMambaForCausalLM`): a generator that has learned to fill gaps.
        processor (`MidiProcessor`): its processor.
        song (`str`, `Path`, `bytes` or `symusic.Score`): the piece.
        bars (`tuple[int, int]`): the first bar and the last, counted from 1.
        tracks (`Sequence[int]`, *optional*): indices into the tracks of the score. By default all.
        options ([`~midimamba.command_options.DrawingOptions`], *optional*): how many fillings, how daring.
        controls (`Mapping[str, str | Sequence[str]]`, *optional*): as for [`generate_scores`].

    Returns:
        `list[symusic.Score]` of length `options.num`.

    Raises:
        MidiRefusedError: if the piece cannot be used.
        InputError: if the piece has no such bars or tracks, the model has not learned to fill gaps or computes NaN, or
            there is no such control or value.
    """
    inputs = processor.infill(song, bars, tracks, controls, return_tensors="pt")
    options = options or DrawingOptions()
    drawing = {option.name: getattr(options, option.name) for option in fields(DrawingOptions)}
    parts = _compose(model, processor, inputs, SamplingOptions(**drawing, bars=bars[1] - bars[0] + 1))
    return [processor.place(song, ids, bars, tracks, options.polyphony) for ids in _rows(parts)]


def _rows(parts: Sequence[Composed]) -> Iterator[Tensor]:
    """All sequences. What watches is told of each, because decoding takes time as well."""
    for part in parts:
        for ids in part.ids:
            tell_watcher()
            yield ids


def choose_scores(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    judge: Judge,
    options: SamplingOptions | None = None,
    *,
    prompt: Midi | None = None,
    controls: Mapping[str, str | Sequence[str]] | None = None,
    keep_unused: bool = False,
) -> Chosen:
    """
    Sample `options.best_of` pieces for each wanted one, and let a judge choose: importance resampling.

    A prompt is judged together with what follows it.

    Args:
        judge ([`~midimamba.modeling.judging.Judge`]): such as
            `Ensemble(load_judges(["you/bach-discriminator"], processor))` of [`~midimamba.evaluation.judges`].
        model, processor, options, prompt, controls: as for [`generate_scores`].
        keep_unused (`bool`, *optional*, defaults to `False`): whether to decode and return the draws that were not
            chosen.

    Raises:
        MidiRefusedError, InputError: as [`generate_scores`]; also if the judge computes NaN.
    """
    options = options or SamplingOptions()
    options = replace(options, best_of=options.best_of or BEST_OF)
    parts = _compose(model, processor, processor(prompt, return_tensors="pt", controls=controls), options)
    draws = [ids for part in parts for ids in part.ids]
    ends = processor.pad_token_id, processor.eos_token_id
    log_odds = judge.log_odds([music_of(ids, *ends) for ids in draws]).view(options.num, -1)
    try:
        places = choose(log_odds, options.pick, options.seed).tolist()
    except ValueError as error:
        raise InputError(str(error)) from error
    size = log_odds.shape[1]
    groups = [draws[start : start + size] for start in range(0, len(draws), size)]
    chosen = [group.pop(place) for group, place in zip(groups, places, strict=True)]

    def decode(sequences: Sequence[Tensor]) -> list[ScoreTick]:
        return [processor.continue_score(prompt, ids, options.polyphony) for ids in sequences]

    unused = [decode(group) for group in groups] if keep_unused else []
    return Chosen(decode(chosen), unused, float(effective_sample_size(log_odds).mean()))


def generate_samples(model: MidiMambaForCausalLM, processor: MidiProcessor, options: SamplingOptions) -> Samples:
    """Sample music to be measured: as [`generate_scores`], but what is not music is counted and not drawn again.

    Only `options` bound what is drawn: a `top_k` of the model's own has no effect.
    """
    return decode_all(processor, draw_sequences(model, processor, options))


def draw_sequences(model: MidiMambaForCausalLM, processor: MidiProcessor, options: SamplingOptions) -> list[list[int]]:
    """The tokens of [`generate_samples`], without padding and the end of sequence, as a judge reads them."""
    parts = _compose(model, processor, processor(None, return_tensors="pt"), options, redraw=False, top_k=0)
    ends = processor.pad_token_id, processor.eos_token_id
    return [music_of(ids, *ends) for part in parts for ids in part.ids]


def _compose(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    inputs: Mapping[str, Any],
    options: SamplingOptions,
    **more: Any,
) -> list[Composed]:
    """Continue one prompt `options.num` times, or `best_of` times as often, in parts. `more` is for `compose`."""
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
    sampling = complete_sampling(model.generation_config, given | {"do_sample": True} | more)
    limit = sampling["max_new_tokens"]
    total = options.num * (options.best_of or 1)
    counts = [min(_SAMPLED_AT_ONCE, total - start) for start in range(0, total, _SAMPLED_AT_ONCE)]
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    parts: list[Composed] = []
    watch = _watch.get()
    if (streamer := _streamer.get()) is not None:
        sampling["streamer"] = streamer
    hidden = None if watch is None else True  # None hides it where there is no terminal
    with (
        seeded(options.seed, model.device),
        tqdm(total=limit * len(counts), desc="sampling", unit="token", leave=False, disable=hidden) as bar,
    ):
        for count in counts:
            part = processor.compose(
                model,
                inputs,
                bars=options.bars,
                at_most=options.at_most,
                constraints=options.constraints,
                num_return_sequences=count,
                **sampling,
                stopping_criteria=StoppingCriteriaList([_EachToken(watch or bar.update)]),
            )
            parts.append(part)
            bar.update(len(parts) * limit - bar.n)  # a part ends early when all of its pieces do
    Composed.tell_unfinished(parts)
    return parts
