"""Music while it is being sampled: notes one by one, as soon as they are complete, for a piece or for ever."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import SamplingOptions
from midimamba.errors import InputError
from midimamba.generation import tell_watcher
from midimamba.note_decoding import Note, NoteDecoder
from midimamba.tokenization.composing import Composed, FiniteLogits, grammar_for
from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.processor import Midi
from midimamba.tokenization.sampling_limits import complete_sampling

# In music without end, a note that is tied on for more quarter notes than these is struck again: it could be waited
# for without end.
LONGEST_NOTE = 64.0
# Ids before the next one that logits processors of a model's own see in music without end.
_WINDOW = 1024


class _Step(LogitsProcessor):
    """A grammar that is told one id at a time, and that can forbid the end."""

    def __init__(self, grammar: MidiGrammar, endless: bool):
        self._grammar, self._endless, self._has_begun = grammar, endless, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._endless:
            scores[:, self._grammar.eos_token_id] = -torch.inf
        if self._has_begun:
            return self._grammar.step(input_ids[:, -1], scores)
        self._has_begun = True
        return self._grammar(input_ids, scores)


def stream(
    model: MidiMambaForCausalLM,
    processor: MidiProcessor,
    prompt: Midi | None = None,
    options: SamplingOptions | None = None,
    *,
    controls: Mapping[str, str | Sequence[str]] | None = None,
    endless: bool = False,
) -> Iterator[Note]:
    """
    Sample music and yield its notes while it is being sampled.

    The notes are those of [`~midimamba.generation.generate_scores`] for one piece with the same options, prompt
    apart, in the order of their onsets. A note comes when it is complete: when the music has reached its end, so that
    nothing that follows can shorten it (where its pitch is struck again, or no voice is left) or lengthen it (where it
    is tied). A long note holds back those that begin after it.

    Nothing is sampled before the first note is asked for, and nothing while a note is being used: stop at any time, or
    call `close()`. torch's random state is not touched, whatever is drawn between two notes.

    Args:
        model (`MidiMambaForCausalLM`): the generator.
        processor (`MidiProcessor`): its processor, of REMI, TSD or Structured.
        prompt (`str`, `Path`, `bytes` or `symusic.Score`, *optional*): music to continue. Its notes are not yielded,
            but onsets count from its start.
        options ([`~midimamba.command_options.SamplingOptions`], *optional*): how long, how daring. There is one piece,
            whatever `num` says.
        controls (`Mapping[str, str | Sequence[str]]`, *optional*): what the music should be like, such as
            `{"key": "C-major"}`.
        endless (`bool`, *optional*, defaults to `False`): go on for ever; `bars`, `at_most` and `max_new_tokens` have
            no effect. The model cannot end the piece. Memory stays as it is. A note that is tied on for over 64
            quarter notes is struck again.

    Yields:
        [`~midimamba.note_decoding.Note`]

    Raises:
        MidiRefusedError: if the prompt cannot be used.
        InputError: if the tokenization has no grammar, there is no such control or value, the model computes NaN, or
            `options` ask to choose among several pieces.
    """
    options = options or SamplingOptions()
    if options.best_of is not None:
        raise InputError(f"best_of is {options.best_of}, but whole pieces are chosen, not notes: leave it out")
    decoder = NoteDecoder(processor, prompt, LONGEST_NOTE if endless else None)
    inputs = processor(prompt, return_tensors="pt", controls=controls)
    grammar = grammar_for(processor, None if endless else options.bars, options.at_most, inputs["input_ids"].shape[1])
    assert grammar is not None  # the decoder has checked that there is one
    return _notes(decoder, _sample(model, inputs, options, grammar, endless))


def _notes(decoder: NoteDecoder, ids: Iterator[int]) -> Iterator[Note]:
    for index in ids:
        tell_watcher()
        yield from decoder.read([index])
    yield from decoder.finish()


def _sample(
    model: MidiMambaForCausalLM,
    inputs: Mapping[str, Any],
    options: SamplingOptions,
    grammar: MidiGrammar,
    endless: bool,
) -> Iterator[int]:
    """Ids that continue a prompt, each sampled when it is asked for: those that `generate` returns."""
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
    sampling = complete_sampling(model.generation_config, given | {"do_sample": True})
    randomness = torch.Generator(model.device).manual_seed(options.seed)

    def loop(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **more: Any
    ) -> Iterator[int]:
        """What `generate` calls when it has prepared everything. It returns our iterator as it is."""
        more.pop("generation_config")
        logits, cache = _prefill(model, input_ids, more)
        seen = input_ids
        while True:
            index = _draw(logits_processor(seen, logits), randomness)
            yield int(index)
            seen = torch.cat([seen, index], dim=1)
            if not endless and bool(stopping_criteria(seen, None).all()):
                break
            logits = _read(model, index, cache)
        if grammar.min_bars and int(index) != grammar.eos_token_id:
            Composed.tell_unfinished([Composed(seen, 1, grammar.min_bars)])

    result = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        **sampling,
        logits_processor=LogitsProcessorList([FiniteLogits(), _Step(grammar, endless)]),
        custom_generate=loop,
    )
    return cast(Iterator[int], result)


@torch.no_grad()
def _prefill(model: Any, input_ids: Tensor, more: dict[str, Any]) -> tuple[Tensor, Any]:
    """Logits of what follows a prompt, and the state after it."""
    outputs = model(**model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **more))
    return outputs.logits[:, -1].float(), outputs.past_key_values


@torch.no_grad()
def _read(model: Any, index: Tensor, cache: Any) -> Tensor:
    logits: Tensor = model(input_ids=index, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1].float()


@torch.no_grad()
def _draw(scores: Tensor, randomness: torch.Generator) -> Tensor:
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=randomness)
