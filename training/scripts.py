"""What the training scripts share: reading recipes, refusing bad ones before any work, writing results whole."""

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import yaml
from datasets import DatasetDict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import TrainerState
from trl.scripts.utils import TrlParser

from midimamba import loading
from midimamba.corpus.augmentation import Augmentation, EpochBlocks, EpochOpenings
from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import PackedBlocks
from midimamba.corpus.rearranging import InfillBlocks, share_of
from midimamba.errors import InputError
from midimamba.files import flush_folder
from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.text import show
from midimamba.tokenization.choices import ONE_STREAM
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.sampling_limits import give_sampling_defaults
from midimamba.tokenization.tokenizer import time_ids
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.option_checks import STEPS, TRAINER_RULES, check_numbers
from midimamba.training.run_record import RECORD_FILE, run_record, without_folders
from midimamba.training.whole_checkpoints import LITTER, TRAINER_STATE_FILE, writing

if TYPE_CHECKING:
    from midimamba.training.adversarial import AdversarialArguments


class RecipeParser(TrlParser):
    """TRL's parser (`--config recipe.yaml`, then any field as a flag) that answers bad input with one line.

    `none` unsets an option that may be unset. The help is in sections: one per dataclass, those of `groups`, and last
    the options that Trainer brings.

    Args:
        dataclass_types (`Sequence[type]`): what is filled; the last one is a `TrainingArguments`.
        groups (`Mapping[str, Sequence[str]]`, *optional*): fields of the last one, by the title of their section.
        kwargs: as for `argparse.ArgumentParser`.
    """

    def __init__(
        self, dataclass_types: Sequence[type], groups: Mapping[str, Sequence[str]] | None = None, **kwargs: Any
    ):
        usage = "%(prog)s [--config RECIPE.yaml] [--OPTION VALUE ...]"  # of 150 options; the sections show them all
        layout = argparse.RawDescriptionHelpFormatter
        kinds: list[Any] = list(dataclass_types)  # TRL has a name of its own for their type
        super().__init__(kinds, usage=usage, formatter_class=layout, **kwargs)
        fields = {kind: [field.name for field in dataclasses.fields(kind)] for kind in kinds}
        # Not by the types of the fields: the parser takes the `None` out of them.
        hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        self._forms = {name: _forms_of(hint) for name, hint in hints.items()}
        optional = {name for name, forms in self._forms.items() if type(None) in forms}
        optional.discard("report_to")  # whose "none" is a value of its own
        for action in self._actions:
            if action.dest in optional and action.type is not None:
                action.type = functools.partial(_value_or_none, action.type)
        own = [(_title_of(kind), fields[kind]) for kind in kinds[:-1]]
        # argparse has no public way to move a flag, and TRL's parser none to place one.
        for title, names in [*own, *(groups or {}).items()]:
            section = self.add_argument_group(title)
            section._group_actions += [action for action in self._actions if action.dest in names]
        placed = {name for _, names in [*own, *(groups or {}).items()] for name in names}
        self._optionals._group_actions = [action for action in self._actions if action.dest not in placed]
        self._optionals.title = "options of Trainer"
        self._action_groups.append(self._action_groups.pop(self._action_groups.index(self._optionals)))

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse's. A list of which only `none` was given is unset."""
        namespace, rest = super().parse_known_args(*args, **kwargs)
        for name, value in vars(namespace).items():
            if value == [None]:
                setattr(namespace, name, None)
        return namespace, rest

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see --help")

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """As TRL's. A recipe may use an option's other name as well, and give one value where several may be.

        Raises:
            InputError: for a key that is no option, or a value that none can have.
        """
        actions = {action.dest: action for action in self._actions}
        values = {}
        for key, value in kwargs.items():
            if (name := self._name_of(key)) not in actions:
                raise InputError(f"the recipe has {key}, which is no option; see --help")
            values[name] = self._checked(actions[name], value)
        return list(super().set_defaults_with_config(**values))

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        """The value of an option in a recipe, in the form that the option has."""
        forms = self._forms.get(action.dest, {type(value)})
        if value is None and type(None) not in forms:
            raise InputError(f"{action.dest} is empty in the recipe: give a value, or leave it out")
        if isinstance(value, list | dict) and type(value) not in forms:
            raise InputError(f"{action.dest} is {value} in the recipe: give one value")
        if action.nargs in ("+", "*") and not isinstance(value, list) and value not in (None, "none"):
            return [action.type(value) if isinstance(value, str) and callable(action.type) else value]
        return value

    def _name_of(self, key: str) -> str:
        """The name of an option, by one of its names."""
        return next((action.dest for action in self._actions if f"--{key}" in action.option_strings), key)

    def given(self) -> set[str]:
        """The names of the options that the command line or its recipe gives. Call it after [`parse_recipe`]."""
        line = _command_line()
        names: set[str] = set()
        if "--config" in line:
            place = line.index("--config")
            names = {self._name_of(key) for key in yaml.safe_load(Path(line[place + 1]).read_text(encoding="utf-8"))}
            del line[place : place + 2]
        before = [(action, action.default, action.required) for action in self._actions]
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
        try:
            return names | vars(self.parse_args(line)).keys()
        finally:
            for action, default, required in before:
                action.default, action.required = default, required

    def parse_recipe(self) -> tuple[Any, ...]:
        """The dataclasses, filled from the recipe and the command line.

        Raises:
            InputError: for an unreadable recipe, an unknown key, or a value that a dataclass refuses.
        """
        try:
            parsed = tuple(self.parse_args_and_config(_command_line()))
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"there is no recipe {error.filename}; give a YAML file after --config") from error
        except yaml.YAMLError as error:
            raise InputError(f"the recipe is no YAML: {' '.join(str(error).split())}") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # YAML of wrong types
            raise InputError(" ".join(str(error).split())) from error
        for part in parsed:
            if isinstance(part, TrainingArguments):
                _check_trainer_options(part)
                # Trainer would write `use_cache: false` into every saved model, and make its users' `generate` slow.
                # While training, the model keeps no state anyway.
                part.use_cache = True
        return parsed


def _forms_of(hint: Any) -> set[type]:
    """The types that a value of this type may have, whatever they hold: `list[int] | None` is a list or nothing."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(part) or part for part in parts}


def _command_line() -> list[str]:
    """The words of the command, `--config=RECIPE` as two of them."""
    words = (word.split("=", 1) if word.startswith("--config=") else [word] for word in sys.argv[1:])
    return [part for word in words for part in word]


def _check_trainer_options(options: TrainingArguments) -> None:
    # Adversarial runs of no step are possible.
    rules = TRAINER_RULES if isinstance(options, AdversarialConfig) else (*TRAINER_RULES, STEPS)
    try:
        check_numbers(options, rules)
    except ValueError as error:
        raise InputError(str(error)) from error
    if options.save_only_model and options.save_strategy != "no":
        raise InputError("save_only_model writes checkpoints that cannot be resumed: leave it out")


def _value_or_none(convert: Any, text: str) -> Any:
    return None if text.lower() in ("none", "null") else convert(text)


def _title_of(kind: type) -> str:
    """The first sentence of its documentation."""
    return " ".join((kind.__doc__ or kind.__name__).split()).split(". ")[0].rstrip(".")


def warn_of_a_lost_process() -> None:
    """Say so if several processes were asked for on a CPU and only this one was started.

    `accelerate launch --num_processes 2 --cpu` leaves the second process to mpirun, and without it starts one process
    in silence (accelerate 1.15). Its traces are an address to meet at and no world to meet.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "PMI_SIZE" not in os.environ:
        announce(
            "warning: accelerate starts a single process on a CPU; for two, use "
            "`accelerate launch --multi_gpu --num_processes 2 SCRIPT … --use_cpu`"
        )


def check_one_stream(data: str, processor: MidiProcessor) -> None:
    """Refuse a corpus of several vocabularies.

    Raises:
        InputError: if its tokenization writes several ids a step.
    """
    if processor.midi_tokenizer.is_multi_voc:
        name = type(processor.midi_tokenizer).__name__
        raise InputError(
            f"{data} was tokenized with {name}, which writes several ids a step, and the models here read one: "
            f"tokenize it again with {', '.join(ONE_STREAM[:-1])} or {ONE_STREAM[-1]}"
        )


def load_blocks(
    data: str, length: int, augmentation: Augmentation, seed: int, infill_share: float | None = 0.0
) -> tuple[PackedBlocks | EpochBlocks, PackedBlocks, MidiProcessor]:
    """Training and validation blocks of `length` tokens from a tokenized corpus, with its processor.

    Only the training blocks are augmented, and a share of their pieces is rearranged for infilling; `None` is the
    share that the corpus was made for, see [`~midimamba.corpus.rearranging.share_of`].

    Raises:
        InputError: if `data` is no corpus or one of several vocabularies, or a split is shorter than one block.
    """
    train, splits, processor = load_training_blocks(data, length, augmentation, seed, infill_share)
    return train, PackedBlocks(splits["validation"], length), processor


def load_openings(
    data: str, length: int, augmentation: Augmentation, seed: int
) -> tuple[EpochOpenings, EpochOpenings, MidiProcessor]:
    """As [`load_blocks`], but each sequence is a piece from its beginning on.

    Both splits are augmented: by its key alone, a discriminator must not know what is real.

    Raises:
        InputError: if `data` is no corpus or one of several vocabularies, or a split has no piece.
    """
    splits, processor = load_corpus(data)
    check_one_stream(data, processor)
    for name in ("train", "validation"):
        if not len(splits[name]):
            raise InputError(f"{data}: the {name} split has no piece; tokenize more music")
    train, validation = (
        EpochOpenings(splits[name], processor, length, augmentation, seed) for name in ("train", "validation")
    )
    return train, validation, processor


def load_training_blocks(
    data: str, length: int, augmentation: Augmentation, seed: int, infill_share: float | None = 0.0
) -> tuple[PackedBlocks | EpochBlocks, DatasetDict, MidiProcessor]:
    """As [`load_blocks`], for a corpus whose validation split may be empty: it comes as it is, with the others."""
    splits, processor = load_corpus(data)
    check_one_stream(data, processor)
    train = PackedBlocks(splits["train"], length)
    if share := share_of(infill_share, processor):
        return InfillBlocks(splits["train"], processor, length, augmentation, seed, share), splits, processor
    if augmentation.changes_music or (processor.controls and augmentation.control_dropout):
        return EpochBlocks(splits["train"], processor, length, augmentation, seed), splits, processor
    return train, splits, processor


def load_generator(name: str, processor: MidiProcessor) -> MidiMambaForCausalLM:
    """A generator that speaks the vocabulary of a corpus, and that plain `generate` samples from.

    Raises:
        InputError: if there is no checkpoint of that name, or its vocabulary is not the corpus's.
    """
    model = loading.load_generator(name)
    if model.config.vocab_size != processor.vocab_size:
        raise InputError(
            f"the generator {name!r} knows {model.config.vocab_size} tokens, the corpus has {processor.vocab_size}; "
            "tokenize the corpus with the generator's tokenizer or train a new generator"
        )
    tokenizer = Path(name) / "miditok.json"
    if (
        tokenizer.exists()
        and MidiProcessor.from_pretrained(name).tokenizer.get_vocab() != processor.tokenizer.get_vocab()
    ):
        raise InputError(f"the generator {name!r} and the corpus number their tokens differently; use one tokenizer")
    give_sampling_defaults(model.generation_config)
    return model


def look_back_fields(lags: Sequence[int], processor: MidiProcessor, option: str = "lookback_bars") -> dict[str, Any]:
    """The fields of a configuration that let a network look back by these bars, which an option of that name gives.

    Raises:
        InputError: if the tokenization has no bars.
    """
    if not lags:
        return {}
    bars, positions = time_ids(processor.midi_tokenizer)
    if not bars:
        raise InputError(
            f"{option} needs a tokenization with bars, such as REMI; "
            f"{type(processor.midi_tokenizer).__name__} has none"
        )
    return {"lookback_bars": list(lags), "bar_token_ids": bars, "position_token_ids": positions}


def load_discriminator(
    arguments: "AdversarialArguments", generator: PreTrainedModel, length: int, processor: MidiProcessor | None = None
) -> MidiDiscriminator:
    """A new discriminator for a generator's sequences of `length` tokens, or a trained one, as the arguments say.

    Raises:
        InputError: if its shape is impossible, or not that of the generator as which it is to begin, or there is no
            checkpoint of that name.
    """
    if arguments.discriminator == "generator":
        if not isinstance(generator, MidiMambaForCausalLM):
            raise InputError(f"a discriminator cannot start as a {type(generator).__name__}: use cnn or mamba")
        try:
            return MidiDiscriminator.from_generator(generator, arguments.d_dropout)
        except ValueError as error:
            raise InputError(str(error)) from error
    if arguments.discriminator not in ("cnn", "mamba"):
        try:
            return loading.load_discriminator(arguments.discriminator)
        except InputError as error:
            raise InputError(f"{arguments.discriminator!r} is neither cnn nor mamba nor generator: {error}") from error
    filters: dict[str, Any] = {"filter_sizes": arguments.d_filter_sizes, "num_filters": arguments.d_num_filters}
    try:
        config = MidiDiscriminatorConfig(
            kind=arguments.discriminator,
            vocab_size=generator.config.vocab_size,
            hidden_size=arguments.d_hidden_size,
            num_hidden_layers=arguments.d_num_hidden_layers,
            dropout=arguments.d_dropout,
            spectral_norm=arguments.d_spectral_norm,
            pad_token_id=getattr(generator.config, "pad_token_id", None) or 0,
            **_look_back_of(arguments, processor),
            **{name: value for name, value in filters.items() if value is not None},
        )
    except (ValueError, StrictDataclassError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if arguments.discriminator == "cnn":
        _drop_wide_filters(config, length)
    return MidiDiscriminator(config)


def _look_back_of(arguments: "AdversarialArguments", processor: MidiProcessor | None) -> dict[str, Any]:
    if not arguments.d_lookback_bars:
        return {}
    if processor is None:
        raise InputError("d_lookback_bars needs a processor, which knows the tokens that open a bar")
    return {
        "bos_token_id": processor.bos_token_id,
        **look_back_fields(arguments.d_lookback_bars, processor, "d_lookback_bars"),
    }


def _drop_wide_filters(config: MidiDiscriminatorConfig, length: int) -> None:
    """A convolution wider than the sequences never sees a whole window: its filters would say nothing."""
    filters = list(zip(config.filter_sizes, config.num_filters, strict=True))
    fitting = [(width, count) for width, count in filters if width <= length]
    if len(fitting) < len(filters):
        wide = [width for width, _ in filters if width > length]
        announce(f"warning: filters of width {', '.join(map(str, wide))} do not fit {length} tokens and are left out")
        config.filter_sizes, config.num_filters = map(list, zip(*fitting, strict=True))


def save_model(
    folder: Path,
    model: PreTrainedModel,
    *others: Any,
    arguments: Sequence[Any] = (),
    state: TrainerState | None = None,
) -> None:
    """Write a model, whatever else has `save_pretrained`, the arguments as text, and the history of the run with how
    it was started, all at once.

    The files are complete and on the disk before the first appears in `folder`, which may hold checkpoints already;
    the configuration comes last, so that its presence marks a finished run.

    Raises:
        InputError: if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged = {key: value for part in arguments for key, value in _as_dict(part).items()}
    with writing(folder), tempfile.TemporaryDirectory(prefix=LITTER, dir=folder) as scratch:
        for item in (model, *others):
            item.save_pretrained(scratch)
        text = json.dumps(merged, indent=2, sort_keys=True, default=str) + "\n"
        (Path(scratch) / "training_args.json").write_text(text)
        if state is not None:
            state.save_to_json(str(Path(scratch) / TRAINER_STATE_FILE))
            record = json.dumps(run_record(sys.argv, state), indent=2) + "\n"
            (Path(scratch) / RECORD_FILE).write_text(record)
        flush_folder(Path(scratch))
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)


def _as_dict(arguments: Any) -> dict[str, Any]:
    """What may be published: no access tokens, and no folders of this machine beyond their names."""
    values = arguments.to_dict() if isinstance(arguments, TrainingArguments) else dataclasses.asdict(arguments)
    return {
        key: without_folders(value) if isinstance(value, str) else value
        for key, value in values.items()
        if not key.endswith("_token")
    }


def announce(message: str) -> None:
    """One line for the person who waits."""
    show(message, file=sys.stderr)
