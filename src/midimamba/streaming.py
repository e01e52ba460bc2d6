"""Music while it is being sampled: notes one by one, as soon as they are complete, for a piece or for ever."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Queue
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from midimamba import MidiMambaForCausalLM, MidiProcessor, RecurrentCache
from midimamba.command_options import SamplingOptions
from midimamba.errors import InputError
from midimamba.generation import tell_watcher
from midimamba.modeling.policy import CACHE
from midimamba.note_decoding import Note, NoteDecoder
from midimamba.tokenization.composing import Composed, FiniteLogits, grammar_for
from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.processor import Midi
from midimamba.tokenization.sampling_limits import complete_sampling

# In music without end, a note that is tied on for more quarter notes than these is struck again: it could be waited
# for without end.
LONGEST_NOTE = 64.0
# In music without end: after this many ids, what lies too far back is forgotten. Logits processors of a model's own
# see as many ids before the next one, and a model that attends reads that many again.
_WINDOW = 1024


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
        InputError: if the tokenization cannot be streamed, there is no such control or value, the model computes NaN,
            or `options` ask to choose among several pieces.
    """
    options = options or SamplingOptions()
    if options.best_of is not None:
        raise InputError(f"best_of is {options.best_of}, but whole pieces are chosen, not notes: leave it out")
    decoder = NoteDecoder(processor, prompt, LONGEST_NOTE if endless else None, options.polyphony)
    inputs = processor(prompt, return_tensors="pt", controls=controls).to(model.device)
    bars = None if endless else options.bars
    grammar = grammar_for(processor, bars, options.at_most, inputs["input_ids"].shape[1], options.constraints)
    assert grammar is not None  # the decoder has checked that there is one
    opening = (
        processor(None, return_tensors="pt", controls=controls)["input_ids"].to(model.device) if endless else None
    )
    loop = _Loop(grammar, options.seed, opening, decoder.is_head)
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
    ids = model.generate(
        **inputs,
        **complete_sampling(model.generation_config, given | {"do_sample": True}),
        logits_processor=LogitsProcessorList([FiniteLogits(), loop]),
        custom_generate=loop.run,
    )
    return _notes(decoder, cast(Iterator[int], ids))


class NoteStreamer(BaseStreamer):
    """
    For `model.generate(..., streamer=streamer)`: an iterator over the notes of one sequence, each as soon as it is
    complete, like `TextIteratorStreamer` over text. `generate` has to run in another thread.

    Sample under the grammar: `logits_processor=[processor.grammar(prompt_length=…)]`. Without it, ids that go back in
    time end `generate` with a `ValueError`.

    Args:
        processor (`MidiProcessor`): of REMI, TSD or Structured.
        prompt (`str`, `Path`, `bytes` or `symusic.Score`, *optional*): the music that was encoded as the prompt, if
            any was. It gives no notes, but onsets count from its start.
        timeout (`float`, *optional*): after this many seconds without a note, the iterator raises `queue.Empty`. By
            default it waits for ever.

    Raises:
        InputError: if the tokenization cannot be streamed.
        MidiRefusedError: if the prompt cannot be used.
    """

    def __init__(self, processor: MidiProcessor, prompt: Midi | None = None, timeout: float | None = None):
        self._decoder = NoteDecoder(processor, prompt)
        self._timeout = timeout
        self._has_prompt = False
        self._notes: Queue[Note | None] = Queue()

    def put(self, value: Tensor) -> None:
        """Take in the prompt of shape (1, time), and then one id at a time, of shape (1,).

        Raises:
            ValueError: if there are several sequences, or the prompt is another than was given.
        """
        if len(value) != 1:
            raise ValueError(f"a NoteStreamer takes one sequence, not {len(value)}")
        ids = value.flatten().tolist()
        if not self._has_prompt:
            self._has_prompt = True
            if self._decoder.music_of(ids) != self._decoder.prompt_ids:
                raise ValueError("the ids are not those of the prompt: give NoteStreamer the prompt that was encoded")
            return
        for note in self._decoder.read(ids):
            self._notes.put(note)

    def end(self) -> None:
        """Nothing follows."""
        for note in self._decoder.finish():
            self._notes.put(note)
        self._notes.put(None)

    def __iter__(self) -> Iterator[Note]:
        while (note := self._notes.get(timeout=self._timeout)) is not None:
            yield note


def _notes(decoder: NoteDecoder, ids: Iterator[int]) -> Iterator[Note]:
    for index in ids:
        tell_watcher()
        yield from decoder.read([index])
    yield from decoder.finish()


class _Loop(LogitsProcessor):
    """
    The decoding loop of `generate`, which samples an id when it is asked for one. As a logits processor, it is the
    grammar, which is told one id at a time.

    Args:
        grammar (`MidiGrammar`): for one sequence.
        seed (`int`): decides what is drawn.
        opening (`LongTensor` of shape `(1, time)`, *optional*): for music without end: what precedes all music.
        is_head (`Callable[[int], bool]`, *optional*): for music without end: whether music can be read from an id on.
    """

    def __init__(
        self,
        grammar: MidiGrammar,
        seed: int,
        opening: Tensor | None = None,
        is_head: Callable[[int], bool] = bool,
    ):
        self._grammar, self._seed, self._opening, self._is_head = grammar, seed, opening, is_head
        self._has_begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._opening is not None:  # no end
            scores[:, self._grammar.eos_token_id] = -torch.inf
        if self._has_begun:
            return self._grammar.step(input_ids[:, -1], scores)
        self._has_begun = True
        return self._grammar(input_ids, scores)

    def run(
        self,
        model: MidiMambaForCausalLM,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[[Tensor, Tensor], Tensor],
        **more: Any,
    ) -> Iterator[int]:
        """The ids that `generate` would return after `input_ids` of shape (1, time), without its end."""
        randomness = torch.Generator(input_ids.device).manual_seed(self._seed)
        seen, index = input_ids, input_ids[:, -1:]
        logits, state = _read_first(model, seen, more)
        while True:
            index = _draw(logits_processor(seen, logits), randomness)
            yield int(index)
            seen = torch.cat([seen, index], dim=1)
            if self._opening is None:
                if bool(stopping_criteria(seen, logits).all()):
                    break
            elif seen.shape[1] >= 2 * _WINDOW:
                seen = seen[:, -_WINDOW:].clone()
                if "attention" in model.config.mixers:
                    logits, state = _read_first(model, self._from_head(seen), {"use_cache": True})
                    continue
                model.forget(state)
            logits = _read(model, index, state)
        if self._grammar.max_bars is not None and int(index) != self._grammar.eos_token_id:
            Composed.tell_unfinished([Composed(seen, 1, self._grammar.max_bars)])

    def _from_head(self, seen: Tensor) -> Tensor:
        """The last ids behind what precedes all music, from where they can be read."""
        assert self._opening is not None
        first = next((at for at, index in enumerate(seen[0].tolist()) if self._is_head(index)), 0)
        return torch.cat([self._opening, seen[:, first:]], dim=1)


@torch.no_grad()
def _read_first(model: MidiMambaForCausalLM, ids: Tensor, more: dict[str, Any]) -> tuple[Tensor, RecurrentCache]:
    """Logits of what follows ids of shape (1, time), and the state after them. As `generate` reads its prompt."""
    outputs = model(**model.prepare_inputs_for_generation(ids, is_first_iteration=True, **more))
    return outputs.logits[:, -1].float(), getattr(outputs, CACHE)


@torch.no_grad()
def _read(model: MidiMambaForCausalLM, index: Tensor, state: RecurrentCache) -> Tensor:
    return model.next_logits(index, state).float()


@torch.no_grad()
def _draw(scores: Tensor, randomness: torch.Generator) -> Tensor:
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=randomness)
