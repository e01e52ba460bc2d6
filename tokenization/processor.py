"""The `AutoProcessor` of MIDI: files, bytes or scores to `input_ids` and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from miditok import MusicTokenizer, TokSequence
from symusic.core import ScoreQuarter, ScoreSecond, ScoreTick
from transformers import BatchEncoding, ProcessorMixin

from midimamba.files import write_whole
from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.ingest import read_score
from midimamba.tokenization.tokenizer import MIDITOK_FILE, base_ids, fast_tokenizer, load_tokenizer, merge_ids

Midi = str | Path | bytes | ScoreTick | ScoreQuarter | ScoreSecond

# What `from_pretrained` may be told about the Hub; the rest of its arguments concern other kinds of processors.
_HUB_OPTIONS = frozenset(
    {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "user_agent"}
)


class MidiProcessor(ProcessorMixin):
    """Turns MIDI into `input_ids` and ids into scores.

    Args:
        midi_tokenizer (`miditok.MusicTokenizer`):
            From [`~midimamba.tokenization.tokenizer.build_tokenizer`], trained or not. The text tokenizer `tokenizer`,
            which plain `AutoTokenizer` loads, is derived from it, so the two cannot disagree.
    """

    def __init__(self, midi_tokenizer: MusicTokenizer) -> None:
        super().__init__(fast_tokenizer(midi_tokenizer))
        self.midi_tokenizer = midi_tokenizer

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Only the text tokenizer is a part that transformers knows how to save."""
        return ["tokenizer"]

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def bos_token_id(self) -> int:
        return self.tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    def __call__(
        self,
        midi: Midi | list[Midi],
        return_tensors: str | None = None,
        padding: bool | str = True,
        add_bos: bool = True,
    ) -> BatchEncoding:
        """Encode one piece or several as a prompt for `generate`.

        Args:
            midi (`str`, `Path`, `bytes`, `symusic.Score` or a list of them):
                Files, contents of files, or scores.
            return_tensors (`str`, *optional*):
                `"pt"` for tensors of shape (batch, time), also for a single piece; `None` for lists of ids.
            padding (`bool` or `str`, *optional*, defaults to `True`):
                Pads a list to its longest piece, on the left, because generation continues on the right.
            add_bos (`bool`, *optional*, defaults to `True`):
                Whether a piece starts with the id that begins a sequence.

        Returns:
            `BatchEncoding`: with `input_ids` and `attention_mask`.

        Raises:
            MidiRefusedError: if a piece cannot be used; the message says why.
        """
        if not isinstance(midi, list):
            if return_tensors is None:
                ids = self.encode(midi, add_bos)
                return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})
            midi = [midi]
        batch = {"input_ids": [self.encode(piece, add_bos) for piece in midi]}
        return self.tokenizer.pad(batch, padding=padding, return_tensors=return_tensors)

    def encode(self, midi: Midi, add_bos: bool = True) -> list[int]:
        """The ids of one piece, from the begin-of-sequence id to the last note; nothing marks the end.

        Raises:
            MidiRefusedError: if the piece cannot be used.
        """
        ids = merge_ids(self.midi_tokenizer, base_ids(self.midi_tokenizer, read_score(midi)))
        return [self.bos_token_id, *ids] if add_bos else ids

    def decode(self, ids: Sequence[int] | torch.Tensor) -> ScoreTick:
        """Write ids as a score. Special tokens, and ids beyond the vocabulary, are dropped.

        Args:
            ids (`list[int]`, array or tensor of shape (time,) or (1, time)):
                One sequence; see `batch_decode` for several.

        Raises:
            ValueError: if `ids` holds more than one sequence.
        """
        flat = torch.as_tensor(ids, dtype=torch.long).cpu()
        if flat.dim() == 2 and flat.shape[0] == 1:
            flat = flat[0]
        if flat.dim() != 1:
            raise ValueError(f"decode takes one sequence, not shape {tuple(flat.shape)}: use batch_decode")
        music = flat[(flat >= len(self.tokenizer.all_special_ids)) & (flat < self.vocab_size)]
        sequence = TokSequence(ids=music.tolist(), are_ids_encoded=self.midi_tokenizer.is_trained)
        return self.midi_tokenizer.decode(sequence)

    def batch_decode(self, ids: Sequence[Sequence[int]] | torch.Tensor) -> list[ScoreTick]:
        """[`decode`] of every sequence of a batch of shape (batch, time), or of a list of sequences of any length."""
        return [self.decode(sequence) for sequence in ids]

    def grammar(self, **options: Any) -> MidiGrammar:
        """The logits processor that only lets valid music pass; `options` as for [`MidiGrammar`]."""
        return MidiGrammar(self.midi_tokenizer, **options)

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds: the class. Everything else is in `miditok.json`."""
        return {"processor_class": type(self).__name__}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `miditok.json`, `processor_config.json` and the text tokenizer's files.

        Args:
            save_directory (`str` or `Path`):
                Created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload them as well, as `repo_id` or else under the folder's name.
            kwargs:
                Passed to `push_to_hub`.
        """
        super().save_pretrained(save_directory)
        write_whole(Path(save_directory) / MIDITOK_FILE, json.dumps(self.midi_tokenizer.to_dict(), indent=2))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read a processor from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                A folder that `save_pretrained` wrote, or a Hub id.
            kwargs:
                `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder` and the like.

        Raises:
            InputError: if there is no `miditok.json`.
        """
        hub_options = {key: value for key, value in kwargs.items() if key in _HUB_OPTIONS}
        return cls(load_tokenizer(str(pretrained_model_name_or_path), **hub_options))
