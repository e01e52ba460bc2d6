"""Sampling music with any model that has `generate`: under the grammar where there is one, else by drawing again."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from .constraints import Constraints
from .errors import InputError
from .grammar import MidiGrammar
from .grammar_types import check_supported
from .infilling import Asked
from .ingest import check_score
from .sampling_limits import check_sampling, complete_sampling
from .tokenizations import BAR, GAP

logger = logging.getLogger(__name__)

_VERSION = "transformers_version"  # which a generation config holds beside options of `generate`
DRAWS = 8
"""How often a piece is drawn, at most, where nothing guarantees that it is music."""


class Composed(NamedTuple):
    """
    What was sampled.

    Args:
        ids (`LongTensor` of shape `(rows, time)`): prompts and what follows them, padded on the right.
        unfinished (`int`): rows that `max_new_tokens` cut off before they ended.
        bars (`int`): how many new bars they may have.
    """

    ids: Tensor
    unfinished: int = 0
    bars: int = 0

    @staticmethod
    def tell_unfinished(parts: Sequence["Composed"]) -> None:
        """Say in one line how many pieces are shorter than asked for, if any are."""
        if cut := sum(part.unfinished for part in parts):
            total = sum(len(part.ids) for part in parts)
            logger.warning(
                "%d of %d pieces stop before %s new bars are full: raise max_new_tokens", cut, total, parts[0].bars
            )


class FiniteLogits(LogitsProcessor):
    """Refuses to draw from what is no distribution, where torch would end with an assertion."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores.amax(dim=1) < torch.inf).all()):  # NaN is not less
            raise InputError("the model's weights hold NaN or infinite numbers: use an earlier checkpoint")
        return scores


def compose(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    *,
    bars: int | None = None,
    at_most: bool = False,
    redraw: bool = True,
    constraints: Constraints | Mapping[str, Any] | None = None,
    **options: Any,
) -> Composed:
    """Let a model continue prompts.

    With a grammar for the tokenization, everything is valid music. Without one, a line says so, and pieces that cannot
    be decoded or hold no note are drawn again.

    Args:
        model (`PreTrainedModel`):
            Anything with transformers' `generate`.
        processor (`MidiProcessor`):
            Its processor.
        inputs (`Mapping[str, Tensor]`):
            What the processor returned: `input_ids` of shape (batch, time) and `attention_mask`.
        bars (`int`, *optional*):
            New bars per piece. Without effect where the tokenization has no bar tokens, and for a prompt that asks to
            fill a gap: exactly the wanted bars are sampled.
        at_most (`bool`, *optional*, defaults to `False`):
            Whether a piece may end before it has that many bars.
        redraw (`bool`, *optional*, defaults to `True`):
            Whether pieces that are not music are drawn again. Who measures a model wants to count them instead.
        constraints ([`~midimamba.tokenization.constraints.Constraints`] or `Mapping[str, Any]`, *optional*):
            What new music must keep to, such as `{"scale": "D-dorian", "polyphony": 4}`. They need a grammar.
        options:
            As for `generate`. What is not given is the model's own, from its generation config, or else a default;
            see [`~midimamba.tokenization.sampling_limits.complete_sampling`]. Also `num`, the same as
            `num_return_sequences`, `best_of`, which multiplies it, and `seed`: an `int` that decides what is drawn, by
            default torch's random state.

    Returns:
        [`Composed`]

    Raises:
        InputError: if an option makes no sense, constraints cannot be kept, the model computes NaN, or eight drawings
            of a piece are not music.
    """
    wanted = Constraints.of(constraints)
    if (config := options.pop("generation_config", None)) is not None:
        options = {name: value for name, value in config.to_diff_dict().items() if name != _VERSION} | options
    options = complete_sampling(getattr(model, "generation_config", None), options)
    check_sampling(bars=bars, **options)
    seed, processors = options.pop("seed", None), options.pop("logits_processor", None) or ()
    if (num := options.pop("num", None)) is not None:
        options["num_return_sequences"] = num
    if (best_of := options.pop("best_of", None)) is not None:
        options["num_return_sequences"] = best_of * (options.get("num_return_sequences") or 1)
    prompt: Tensor = inputs["input_ids"]
    grammar = (
        grammar_for(processor, bars, at_most, prompt.shape[1], wanted)
        if _asked(processor, prompt) is None
        else _filling(processor, prompt, wanted)
    )
    # The grammar comes last: whatever else changes the scores, what it forbids stays forbidden.
    last = [] if grammar is None else [grammar]
    options["logits_processor"] = LogitsProcessorList([FiniteLogits(), *processors, *last])
    with nullcontext() if seed is None else seeded(seed, prompt.device):
        ids = _generate(model, inputs, options)
        if grammar is None and redraw:
            ids = _draw_again(model, processor, inputs, ids, options)
    if grammar is None or grammar.max_bars is None:
        return Composed(ids)
    ends = (ids[:, prompt.shape[1] :] == processor.eos_token_id).any(dim=1)
    return Composed(ids, int((~ends).sum()), grammar.max_bars)


def _asked(processor: Any, prompt: Tensor) -> Asked | None:
    """The gap that prompts of shape (batch, time) ask to fill, if they do.

    Raises:
        InputError: if they ask for different gaps, which one grammar cannot tell apart.
    """
    if GAP not in processor.midi_tokenizer.special_tokens:
        return None
    found = [processor.arranger.asked(row) for row in prompt.tolist()]
    if any(asked != found[0] for asked in found):
        raise InputError("the prompts of one batch ask for different gaps: give them one by one")
    return found[0] if found else None


def grammar_options(processor: Any, prompt: Tensor) -> dict[str, Any]:
    """What the grammar is to know of prompts: their length, and the meters and programs of the gap that they ask for.

    Args:
        processor (`MidiProcessor`):
            Its processor.
        prompt (`LongTensor` of shape (batch, time)):
            The prompts, padded on the left.

    Raises:
        InputError: if they ask for different gaps.
    """
    asked = _asked(processor, prompt)
    options: dict[str, Any] = {"prompt_length": prompt.shape[1]}
    return options if asked is None else options | {"meters": asked.meters, "programs": asked.programs}


def _filling(processor: Any, prompt: Tensor, constraints: Constraints | None) -> MidiGrammar:
    if constraints is not None and constraints.instruments is not None:
        raise InputError("instruments cannot be chosen for a gap, because its tracks decide them: leave them out")
    grammar: MidiGrammar = processor.grammar(prompt, constraints=constraints)
    return grammar


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw by `seed` on the CPU and on `device`, then put their random states back. No other device is touched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def _generate(model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    output = model.generate(**inputs, **options)
    ids: Tensor = getattr(output, "sequences", output)
    return ids


def grammar_for(
    processor: Any, bars: int | None, at_most: bool, prompt_length: int, constraints: Constraints | None = None
) -> MidiGrammar | None:
    """The grammar of a processor, or None and one line if its tokenization has none."""
    name = type(processor.midi_tokenizer).__name__
    try:
        check_supported(processor.midi_tokenizer)
    except InputError as error:
        if constraints is not None:
            raise InputError(f"constraints need a grammar, but {error}: leave them out") from error
        _say_once(f"{error}: sampled without it, so music is not guaranteed, and only max_new_tokens bounds a piece")
        return None
    limits = {}
    if bars is not None and BAR in processor.midi_tokenizer.vocab:
        limits = {"max_bars": bars, "min_bars": 0 if at_most else bars}
    elif bars is not None:
        _say_once(f"{name} has no bar tokens, so the number of bars has no effect: only max_new_tokens bounds a piece")
    grammar: MidiGrammar = processor.grammar(prompt_length=prompt_length, constraints=constraints, **limits)
    return grammar


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _draw_again(
    model: Any, processor: Any, inputs: Mapping[str, Any], ids: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """`ids` of shape (rows, time) with the rows drawn again that are not music."""
    each = len(ids) // len(inputs["input_ids"])
    rows = list(ids)
    reasons = _reasons(processor, rows, range(len(rows)))
    again = 0
    while reasons and again < DRAWS - 1 and options.get("do_sample", True):
        again += 1
        failed = torch.tensor(list(reasons), device=ids.device)
        some = {name: value[failed // each] for name, value in inputs.items()}
        drawn = _generate(model, some, {**options, "num_return_sequences": 1})
        for place, row in zip(reasons, drawn, strict=True):
            rows[place] = row
        reasons = _reasons(processor, rows, list(reasons))
    if reasons:
        first = next(iter(reasons.values()))
        raise InputError(
            f"{len(reasons)} of {len(rows)} pieces are not music after {again + 1} draws ({first}): "
            "train the model for longer, or one with REMI and default options, which always works"
        )
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=processor.pad_token_id)


def _reasons(processor: Any, rows: Sequence[Tensor], places: Sequence[int]) -> dict[int, str]:
    """Why rows are not music, by their places, for those of `places` that are not."""
    found = {}
    for place in places:
        try:
            if not check_score(processor.decode(rows[place])).note_num():
                found[place] = "they hold no note"
        except ValueError as error:
            found[place] = str(error)
    return found
