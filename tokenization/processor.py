"""The `AutoProcessor` of MIDI: files, bytes or scores to `input_ids` and back.

`save_pretrained` copies this module and everything it imports by a dot, so that the folder can be read where midimamba
is not installed: `AutoProcessor.from_pretrained(folder, trust_remote_code=True)`. These modules therefore import
nothing else of midimamba.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from miditok import MuMIDI, MusicTokenizer, TokSequence
from symusic.core import ScoreQuarter, ScoreSecond, ScoreTick
from transformers import BatchEncoding, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import PROCESSOR_NAME, logging

from .batching import Batching
from .composing import Composed, compose, grammar_options
from .continuation import add_continuation, warn_of_shared_channels
from .controls import control_ids, controls_of
from .errors import InputError
from .gaps import fill_gap, find_gap
from .grammar import MidiGrammar
from .grammars import make_grammar
from .infilling import Arranger
from .ingest import check_score, read_unordered
from .normalization import normalize, settle_notes
from .open_notes import end_notes
from .processor_loading import load_facts, split_options
from .tokenizer import (
    BOS,
    EOS,
    MIDITOK_FILE,
    PAD,
    encode_normalized,
    expand_ids,
    fast_tokenizer,
    load_tokenizer,
    merge_ids,
)
from .voices import limit_voices

logger = logging.get_logger(__name__)

Midi = str | Path | bytes | ScoreTick | ScoreQuarter | ScoreSecond
Controls = Mapping[str, str | Sequence[str]]
Ids = Sequence[Any] | np.ndarray | torch.Tensor

# A text tokenizer that knows no longest length says so by a huge number.
_NO_LIMIT = 10**20

# What every row of MuMIDI has: the event, the numbers of bar and position, the tempo.
_MUMIDI_COLUMNS = 4


class MidiProcessor(ProcessorMixin):
    """Turns MIDI into `input_ids` and ids into scores.

    Args:
        midi_tokenizer (`miditok.MusicTokenizer`):
            From [`~midimamba.tokenization.tokenizer.build_tokenizer`], trained or not. The text tokenizer `tokenizer`,
            which plain `AutoTokenizer` loads, is derived from it, so the two cannot disagree. It is `None` for
            several vocabularies: then every id below is a row of ids of shape (vocabularies,).
        programs (`Sequence[int]`, *optional*):
            The General MIDI programs of the training data, and -1 for drums: the grammar lets new music have no
            others. By default all.
        voices (`int`, *optional*):
            The most notes that sound at once in a piece of the training data, without drums; a single piece may
            decide it. New music keeps to it: the grammar lets no more notes begin at one onset, and `continue_score`
            ends notes that are held too long. By default any number.
    """

    def __init__(
        self, midi_tokenizer: MusicTokenizer, programs: Sequence[int] | None = None, voices: int | None = None
    ) -> None:
        super().__init__(None if midi_tokenizer.is_multi_voc else fast_tokenizer(midi_tokenizer))
        self.midi_tokenizer = midi_tokenizer
        self.programs = None if programs is None else sorted(programs)
        self.voices = voices

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """As in transformers, except that a part may be `None`, which transformers supports apart from this check."""
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Only the text tokenizer is a part that transformers knows how to save."""
        return ["tokenizer"]

    @property
    def vocab_size(self) -> int | list[int]:
        """Number of ids, special tokens included; with several vocabularies, a list of such numbers."""
        return self.midi_tokenizer.len

    @property
    def controls(self) -> dict[str, list[str]]:
        """The controls by which music can be requested: their names, and the values each can have."""
        return controls_of(self.midi_tokenizer)

    @property
    def pad_token_id(self) -> int:
        return self.midi_tokenizer.special_tokens.index(PAD)

    @property
    def bos_token_id(self) -> int:
        return self.midi_tokenizer.special_tokens.index(BOS)

    @property
    def eos_token_id(self) -> int:
        return self.midi_tokenizer.special_tokens.index(EOS)

    def __call__(
        self,
        midi: Midi | Sequence[Midi | None] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        add_bos: bool = True,
        controls: Controls | None = None,
        **batching: Any,
    ) -> BatchEncoding:
        """Encode one piece or several as a prompt for `generate`.

        Args:
            midi (`str`, `Path`, `bytes`, `symusic.Score` or a sequence of them, *optional*):
                Files, contents of files, or scores. By default no music at all, for a piece from scratch.
            return_tensors (`str`, *optional*):
                `"pt"` for tensors of shape (batch, time), even for a single piece; `None` for lists of ids. With
                several vocabularies the shape is (batch, time, vocabularies), and that of the mask (batch, time).
            padding (`bool` or `str`, *optional*, defaults to `True`):
                `True` or `"longest"` pads a list to its longest piece, `"max_length"` to `max_length`, by default on
                the left, because generation continues on the right.
            add_bos (`bool`, *optional*, defaults to `True`):
                Whether a piece starts with the begin-of-sequence id.
            controls (`Mapping[str, str | Sequence[str]]`, *optional*):
                What is requested, such as `{"key": "C-major", "instruments": ["violin", "drums"]}`; see
                `self.controls`.
            batching:
                `truncation`, `max_length`, `pad_to_multiple_of`, `padding_side` and `truncation_side`, as in
                transformers; see [`~midimamba.tokenization.batching.Batching`]. The sides and the longest length are
                by default those of the text tokenizer. Only music is cut, never what comes before it.

        Returns:
            `BatchEncoding`: with `input_ids` and `attention_mask`.

        Raises:
            MidiRefusedError: if a piece cannot be used; the message says why.
            InputError: if there is no such control or value; the message names those that exist. If an argument of
                `batching` makes no sense.
            TypeError: if there is no such argument.
        """
        rows = Batching.of(self._batching_defaults(), {"padding": padding, **batching})
        several = isinstance(midi, Sequence) and not isinstance(midi, str | bytes)
        prefix = self._prefix(add_bos, controls)
        pieces: Any = midi if several else [midi]
        encoded = [rows.cut(prefix, self._encode(piece)) for piece in pieces]
        padded = rows.pad(encoded, self._step(self.pad_token_id), return_tensors)
        if several or return_tensors is not None:
            return padded
        return BatchEncoding({name: values[0] for name, values in padded.items()})

    def _batching_defaults(self) -> dict[str, Any]:
        """What a user can set of the text tokenizer."""
        if self.tokenizer is None:
            return {}
        sides = {name: getattr(self.tokenizer, name) for name in ("padding_side", "truncation_side")}
        longest = self.tokenizer.model_max_length
        return sides | ({"max_length": longest} if longest < _NO_LIMIT else {})

    def _step(self, token_id: int) -> int | list[int]:
        """A special token as one step."""
        tokenizer = self.midi_tokenizer
        return [token_id] * len(tokenizer.vocab) if tokenizer.is_multi_voc else token_id

    def encode(self, midi: Midi | None, add_bos: bool = True, controls: Controls | None = None) -> list[Any]:
        """The ids of one piece: begin-of-sequence, controls, music up to the last note; nothing marks the end.

        Returns:
            `list[int]`, or for several vocabularies `list[list[int]]` of shape (time, vocabularies).

        Raises:
            MidiRefusedError: if the piece cannot be used.
            InputError: if there is no such control or value.
        """
        return self._prefix(add_bos, controls) + self._encode(midi)

    def _prefix(self, add_bos: bool, controls: Controls | None) -> list[Any]:
        """What comes before the music."""
        start: list[Any] = [self._step(self.bos_token_id)] if add_bos else []
        return start + self.control_ids(controls or {})

    def _encode(self, midi: Midi | None) -> list[Any]:
        """The ids of the music alone."""
        if midi is None:
            return []
        score, changes = read_unordered(midi)
        score, more = normalize(self.midi_tokenizer, check_score(score))
        for change in changes + more:
            logger.info("%s", change)
        return merge_ids(self.midi_tokenizer, encode_normalized(self.midi_tokenizer, score))

    def control_ids(self, values: Controls) -> list[int]:
        """The ids that ask for `values`, in the order of the vocabulary, whatever the order given.

        Args:
            values (`Mapping[str, str | Sequence[str]]`):
                Names of controls, and one value or several each.

        Raises:
            InputError: if there is no such control or value; the message names those that exist.
        """
        return control_ids(self.midi_tokenizer, values)

    def decode(
        self,
        token_ids: Ids,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> ScoreTick:
        """Write ids as a score. Special tokens (controls included) and ids beyond the vocabulary are dropped.

        With several vocabularies, a row that holds one of these is dropped. Notes last as long as the ids say, however
        many sound at once; `continue_score` keeps new music to `voices`.

        Args:
            token_ids (`list[int]`, array or tensor of shape (time,) or (1, time)):
                One sequence; see `batch_decode` for several. With several vocabularies, of shape (time, vocabularies)
                or (1, time, vocabularies).
            skip_special_tokens, clean_up_tokenization_spaces (`bool`, *optional*):
                As callers of transformers' processors give them. A score has neither special tokens nor spaces, so
                they have no effect.

        Raises:
            ValueError: if `token_ids` holds more than one sequence, or rows of several vocabularies that aren't music.
        """
        score = self._score(self._music(token_ids))
        settle_notes(self.midi_tokenizer, score)
        warn_of_shared_channels(score)
        return score

    def _music(self, ids: Ids) -> list[Any]:
        """The ids of one sequence that are music."""
        tokenizer = self.midi_tokenizer
        shape = (-1, len(tokenizer.vocab)) if tokenizer.is_multi_voc else (-1,)
        steps = torch.as_tensor(ids, dtype=torch.long).cpu()
        if steps.dim() == len(shape) + 1 and steps.shape[0] == 1:
            steps = steps[0]
        if steps.numel() and (steps.dim() != len(shape) or steps.shape[1:] != shape[1:]):
            raise ValueError(f"decode takes one sequence, not shape {tuple(steps.shape)}: use batch_decode")
        steps = steps.reshape(shape)
        music: list[Any] = steps[self._is_music(steps)].tolist()
        return music

    def _score(self, music: list[Any]) -> ScoreTick:
        """What MidiTok decodes."""
        tokenizer = self.midi_tokenizer
        try:
            if tokenizer._note_on_off:
                return tokenizer.decode(TokSequence(ids=end_notes(tokenizer, expand_ids(tokenizer, music))))
            return tokenizer.decode(TokSequence(ids=list(music), are_ids_encoded=tokenizer.is_trained))
        except (LookupError, ValueError) as error:
            raise ValueError(f"{type(tokenizer).__name__} cannot decode these ids, which are not music") from error

    def _is_music(self, steps: torch.Tensor) -> torch.Tensor:
        """Which steps hold no special token and no id beyond its vocabulary, as booleans of shape (time,)."""
        if self.tokenizer is not None:
            # Not MidiTok's own special tokens: those of MMM start and end tracks; nor its `len`, which is slow.
            return (steps >= len(self.tokenizer.all_special_ids)) & (steps < len(self.tokenizer))
        known = (steps > self.eos_token_id) & (steps < torch.tensor(self.vocab_size))
        if type(self.midi_tokenizer) is MuMIDI:  # pads what only notes have
            known[:, _MUMIDI_COLUMNS:] |= steps[:, _MUMIDI_COLUMNS:] == self.pad_token_id
        return known.all(dim=1)

    def continue_score(self, prompt: Midi | None, ids: Ids, polyphony: int | None = None) -> ScoreTick:
        """A prompt with what was sampled after it.

        The prompt's own tracks, names, velocities and controllers stay as they are, and up to its last bar tempos and
        meters. New ones and new notes are added; see [`~midimamba.tokenization.continuation.add_continuation`]. Where
        a new note begins while `voices` notes sound, the new note that began first ends there; see
        [`~midimamba.tokenization.voices.limit_voices`].

        Args:
            prompt (`str`, `Path`, `bytes` or `symusic.Score`, *optional*):
                What was encoded as the prompt. `None` for a piece from scratch, all of which is new.
            ids (`list[int]`, array or tensor of shape (time,) or (1, time)):
                One sequence as for `decode`. Its music begins with that of the prompt.
            polyphony (`int`, *optional*):
                Where it is less than `voices`, it takes their place: that of the constraints of the ids. Then only the
                prompt's own notes, which may sound for longer than ids say, can end a new one.

        Raises:
            MidiRefusedError: if the prompt cannot be used.
            ValueError: if `ids` is more than one sequence, not music, or does not begin with the prompt.
        """
        if prompt is None:
            result = self.decode(ids)
            limit_voices(result, self.voices_within(polyphony))
            return result
        score = read_unordered(prompt)[0]
        opening, music = self.encode(score, add_bos=False), self._music(ids)
        if music[: len(opening)] != opening:
            raise ValueError("the ids do not begin with those of the prompt: give the prompt that was encoded")
        encoded, continued = self._score(opening), self._score(music)
        result = add_continuation(self.midi_tokenizer, score, encoded, continued, self.voices_within(polyphony))
        warn_of_shared_channels(result)
        return result

    def voices_within(self, polyphony: int | None) -> int | None:
        """The most notes that may sound at once in new music."""
        return min((number for number in (self.voices, polyphony) if number is not None), default=None)

    @cached_property
    def arranger(self) -> Arranger:
        """What arranges pieces for infilling.

        Raises:
            InputError: if the tokenizer has no tokens for it, because the model has not learned it.
        """
        return Arranger(self.midi_tokenizer)

    def infill(
        self,
        midi: Midi,
        bars: Sequence[int],
        tracks: Sequence[int] | None = None,
        controls: Controls | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Encode a piece as a prompt that asks for some of its bars, in all tracks or in some.

        Give what `generate` returns for it to [`place`]. [`compose`] samples exactly these bars.

        Args:
            midi (`str`, `Path`, `bytes` or `symusic.Score`):
                The piece. The notes that begin in these bars and tracks are not part of the prompt. Of the rest, up to
                16 bars before and 16 after are.
            bars (`Sequence[int]`):
                The first bar and the last, counted from 1: `(5, 8)` are four bars.
            tracks (`Sequence[int]`, *optional*):
                Indices into the tracks of the score. By default all. Several tracks of one instrument are not told
                apart in ids: what is written for one of them goes together with what stays in the others.
            controls (`Mapping[str, str | Sequence[str]]`, *optional*):
                What is requested, as for `self(...)`.
            return_tensors (`str`, *optional*):
                `"pt"` for tensors of shape (1, time); `None` for a list of ids.

        Raises:
            MidiRefusedError: if the piece cannot be used.
            InputError: if the model has not learned to fill gaps, the piece has no such bars or tracks, there is no
                such control, or the tokenizer has no meters for the wanted bars.
        """
        arranger = self.arranger
        score = read_unordered(midi)[0]
        ids = [self.bos_token_id, *self.control_ids(controls or {})]
        ids += arranger.prompt(score, find_gap(score, bars, tracks))
        encoding = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        return BatchEncoding(encoding, tensor_type=return_tensors, prepend_batch_axis=return_tensors is not None)

    def place(
        self,
        midi: Midi,
        ids: Ids,
        bars: Sequence[int],
        tracks: Sequence[int] | None = None,
        polyphony: int | None = None,
    ) -> ScoreTick:
        """A piece with what was sampled for some of its bars instead of what was there.

        Everything else is the piece itself, not what ids say of it: notes, ticks, tempos, meters, names, controllers,
        pedals. New notes end where the last of these bars ends; see [`~midimamba.tokenization.gaps.fill_gap`].

        Args:
            midi, bars, tracks:
                As for [`infill`].
            ids (`list[int]`, array or tensor of shape (time,) or (1, time)):
                One sequence: the prompt of `infill`, and what follows it.
            polyphony (`int`, *optional*):
                As for [`continue_score`]. Notes that stay around the gap count too, and can end new ones.

        Raises:
            MidiRefusedError: if the piece cannot be used.
            InputError: if the piece has no such bars or tracks, or the model has not learned to fill gaps.
            ValueError: if `ids` is more than one sequence, or not music, or holds no request.
        """
        score = read_unordered(midi)[0]
        gap = find_gap(score, bars, tracks)
        steps = torch.as_tensor(ids, dtype=torch.long).flatten().tolist()
        new = self._score(self._music(self.arranger.filling(steps)))
        result = fill_gap(self.midi_tokenizer, score, gap, new, self.voices_within(polyphony))
        warn_of_shared_channels(result)
        return result

    def changes(self, midi: Midi) -> list[str]:
        """What encoding changes in a piece, in plain English, such as `"1 bar of 15/16 written as 7/8 + 1/16"`.

        Notes and tempos that only move to the nearest position, duration, velocity or tempo of the tokenizer are not
        listed. `encode` logs the same list at level INFO.

        Raises:
            MidiRefusedError: if the piece cannot be used.
        """
        score, read = read_unordered(midi)
        return read + normalize(self.midi_tokenizer, check_score(score)).changes

    def batch_decode(
        self,
        sequences: Sequence[Ids] | Ids,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[ScoreTick]:
        """[`decode`] of every sequence of a batch of shape (batch, time), or of a list of sequences of any length."""
        return [self.decode(sequence, skip_special_tokens, clean_up_tokenization_spaces) for sequence in sequences]

    def grammar(self, prompt: torch.Tensor | None = None, **options: Any) -> MidiGrammar:
        """The logits processor under which only valid music is sampled; `options` as for [`MidiGrammar`].

        Args:
            prompt (`LongTensor` of shape (batch, time), *optional*):
                What is continued or filled: it decides the options that concern it.

        Raises:
            InputError: if there are no rules for the tokenization, or for one of its options.
        """
        of_prompt = {} if prompt is None else grammar_options(self, prompt)
        facts = {"programs": self.programs, "voices": self.voices}
        return make_grammar(self.midi_tokenizer, **facts | of_prompt | options)

    def compose(self, model: Any, inputs: Mapping[str, Any], **options: Any) -> Composed:
        """Let a model continue what this processor returned; see [`~midimamba.tokenization.composing.compose`]."""
        return compose(model, self, inputs, **options)

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds: the class, its module, `programs` and `voices`.

        The rest is in `miditok.json`.
        """
        name = type(self).__name__
        config: dict[str, Any] = {
            "processor_class": name,
            "auto_map": {"AutoProcessor": f"{Path(__file__).stem}.{name}"},
        }
        facts = {"programs": self.programs, "voices": self.voices}
        return config | {name: value for name, value in facts.items() if value is not None}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `miditok.json`, `processor_config.json`, the text tokenizer if there is one, and the code to read it.

        The code is for `AutoProcessor` where midimamba is not installed. Where it is, the installed class is used.

        Args:
            save_directory (`str` or `Path`):
                Created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload them too, as `repo_id` or by default under the folder's name.
            kwargs:
                Passed to `push_to_hub`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # Not through `super()`, which would make AutoTokenizer use this code, although it needs none of it.
        custom_object_save(self, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        self.to_json_file(folder / PROCESSOR_NAME)
        (folder / MIDITOK_FILE).write_text(json.dumps(self.midi_tokenizer.to_dict(), indent=2))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the Hub's arguments are among the keywords
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> Self:
        """Read a processor from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder that `save_pretrained` wrote, or a Hub id.
            kwargs:
                As in transformers: `cache_dir`, `force_download`, `local_files_only`, `token`, `revision`,
                `subfolder`, `proxies` and `user_agent` say how a Hub repository is downloaded; `padding_side`,
                `truncation_side` and `model_max_length` are set of the text tokenizer. Arguments of models, which
                `pipeline` and `AutoProcessor` pass on, have no effect.

        Raises:
            InputError: if there is no `miditok.json`, a file cannot be read, or there is no such argument.
        """
        name = str(pretrained_model_name_or_path)
        hub_options, of_tokenizer = split_options(kwargs)
        processor = cls(load_tokenizer(name, **hub_options), **load_facts(name, hub_options))
        for option, value in of_tokenizer.items():
            if processor.tokenizer is None:
                raise InputError(f"{name} has no text tokenizer, so it has no {option}: leave it out")
            setattr(processor.tokenizer, option, value)
        return processor
