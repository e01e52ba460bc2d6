"""Maximum-likelihood training of a generator on a tokenized corpus, with `transformers.Trainer`."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midimamba.errors import InputError
from midimamba.runtime import hide_short_bars, limit_spinning
from midimamba.tokenization.sampling_limits import check_sampling, give_sampling_defaults
from midimamba.training.process import training_process

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from midimamba.corpus.augmentation import Augmentation
    from midimamba.modeling.configuration_midimamba import MidiMambaConfig
    from midimamba.tokenization.processor import MidiProcessor
    from midimamba.training.lora import LoraArguments
    from midimamba.training.whole_checkpoints import WholeCheckpointTrainer

EXAMPLE = """example:
  midimamba tokenize my-midi-folder --out data
  accelerate launch training/pretrain.py --config training/recipes/chorales-cpu.yaml --data data --output_dir model
"""


@dataclass
class PretrainArguments:
    """Generator and music. All of Trainer's own options are flags as well."""

    data: str = field(
        metadata={
            "aliases": ["--dataset_name"],
            "help": "Corpus written by `midimamba tokenize`: a folder or a data set on the Hub.",
        }
    )
    model: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model_name_or_path"],
            "help": "Generator to start from: a folder or a repository on the Hub. Unset: a new one.",
        },
    )
    plan: bool = field(
        default=False,
        metadata={
            "help": "Choose what is not given (size, context, steps, batch, rates, new keys, …) by the corpus, the "
            "speed of this machine and --minutes, as `midimamba train` does."
        },
    )
    minutes: float | None = field(
        default=None,
        metadata={
            "help": "End after this time, evaluations and saving included. Learning rates follow the time as well as "
            "the steps. Unset: only steps or epochs end the run."
        },
    )
    max_eval_blocks: int | None = field(
        default=None, metadata={"help": "Evaluate on this many blocks of the validation split. Unset: on all."}
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens in a training block."})
    layout: str = field(
        default="mamba",
        metadata={
            "help": "Layers of a new model: mamba, mamba-mlp, moe-mamba, transformer, transformer-moe or hybrid."
        },
    )
    lookback_bars: list[int] | None = field(
        default=None,
        metadata={
            "help": "Show a new model what followed the same place this many bars ago, such as 1 2 4 8 16, so that it "
            "can repeat. Unset: nothing, and the mamba layout loads in plain transformers."
        },
    )
    size: str | None = field(
        default=None,
        metadata={
            "help": "Size of a new model: tiny, small, medium or large, equal in active parameters between layouts. "
            "Unset: the next three."
        },
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of a new model without a named size."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of a new model without a named size."})
    state_size: int = field(
        default=16, metadata={"help": "State of every channel of a new model without a named size."}
    )
    infill_share: float | None = field(
        default=None,
        metadata={
            "help": "Rearrange this share of the pieces, each epoch in another way, so that the model learns to fill "
            "gaps. Unset: 0.3 for a corpus made with --infill, else 0."
        },
    )
    carry_state: bool = field(
        default=False, metadata={"help": "Let the state run on from one piece into the next within a block."}
    )
    shard: bool = field(
        default=False,
        metadata={
            "help": "Let each process of the run keep a part of the generator, its gradients and the optimizer's "
            "moments (FSDP2), instead of all of them. Checkpoints are the same."
        },
    )
    temperatures: list[float] = field(
        default_factory=list,
        metadata={
            "help": "After training, sample at each of these temperatures, such as 0.7 0.8 0.9 1.0, and save the one "
            "whose music is closest to the validation split, as far as --minutes allows. Unset: none is chosen."
        },
    )

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise InputError(
                f"sequence_length is {self.sequence_length}, but must be at least 2: a token and the next"
            )
        for temperature in self.temperatures:
            check_sampling(temperature=temperature)
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"minutes is {self.minutes}, but must be greater than 0")
        if self.max_eval_blocks is not None and self.max_eval_blocks < 1:
            raise InputError(f"max_eval_blocks is {self.max_eval_blocks}, but must be at least 1")


def new_config(arguments: PretrainArguments, processor: "MidiProcessor") -> "MidiMambaConfig":
    """The configuration of a new generator for a corpus's vocabulary.

    Raises:
        InputError: if there is no such layout or size, or the layout cannot have it.
    """
    from huggingface_hub.errors import StrictDataclassError

    from midimamba.modeling.configuration_midimamba import MidiMambaConfig
    from midimamba.tokenization.tokenizations import FILL, GAP
    from midimamba.training.scripts import look_back_fields

    fields: dict[str, Any] = {
        "vocab_size": processor.vocab_size,
        "pad_token_id": processor.pad_token_id,
        "bos_token_id": processor.bos_token_id,
        "eos_token_id": processor.eos_token_id,
        **look_back_fields(arguments.lookback_bars or (), processor),
    }
    vocab = processor.midi_tokenizer.vocab
    if arguments.lookback_bars and GAP in vocab:
        fields["lookahead_bars"] = arguments.lookback_bars
        fields |= {"gap_token_id": vocab[GAP], "fill_token_id": vocab[FILL]}
    try:
        if arguments.size is not None:
            return MidiMambaConfig.of_size(arguments.size, arguments.layout, **fields)
        shape = ("hidden_size", "num_hidden_layers", "state_size")
        return MidiMambaConfig(layout=arguments.layout, **fields, **{name: getattr(arguments, name) for name in shape})
    except (ValueError, StrictDataclassError) as error:
        raise InputError(" ".join(str(error).split())) from error


def main() -> None:
    """Read the options, then train."""
    limit_spinning()  # before torch is imported
    hide_short_bars()
    from transformers import TrainingArguments

    from midimamba.corpus.augmentation import Augmentation
    from midimamba.training.lora import LoraArguments
    from midimamba.training.scripts import RecipeParser, warn_of_a_lost_process

    kinds = (PretrainArguments, LoraArguments, Augmentation, TrainingArguments)
    parser = RecipeParser(kinds, prog="pretrain.py", epilog=EXAMPLE)
    arguments = parser.parse_recipe()
    warn_of_a_lost_process()
    if arguments[0].plan:
        from midimamba.training.calibration import options_by_rule

        parser.set_defaults_with_config(**options_by_rule(arguments[0], arguments[-1], parser.given()))
        arguments = parser.parse_recipe()
    train(*arguments)


def train(
    script_args: PretrainArguments,
    lora_args: "LoraArguments",
    augmentation: "Augmentation",
    training_args: "TrainingArguments",
) -> None:
    """Train, keep the best, save.

    Raises:
        InputError: if model, data and options do not fit together, there is nothing to resume, or another run writes
            into the same folder.
    """
    from midimamba.training.lora import lora_config
    from midimamba.training.resume import claimed
    from midimamba.training.whole_checkpoints import output_folder

    if lora_config(lora_args) is not None and script_args.model is None:
        raise InputError("use_peft needs --model, a generator to adapt: adapters of a new one would learn little")
    with claimed(output_folder(training_args)):
        _train(script_args, lora_args, augmentation, training_args)


def _train(
    script_args: PretrainArguments,
    lora_args: "LoraArguments",
    augmentation: "Augmentation",
    training_args: "TrainingArguments",
) -> None:
    from transformers import set_seed
    from transformers.trainer_utils import IntervalStrategy
    from transformers.utils import SAFE_WEIGHTS_NAME

    from midimamba.corpus.packing import BlockCollator, PackedBlocks, some_of
    from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
    from midimamba.training.deadline import endings
    from midimamba.training.lora import add_adapters, lora_config, merged
    from midimamba.training.progress import show_lines
    from midimamba.training.publishing import publish_run, take_over_push
    from midimamba.training.resume import check_recipe, check_resumes, find_resume_point, recipe_of
    from midimamba.training.scripts import announce, load_generator, load_training_blocks
    from midimamba.training.whole_checkpoints import WholeCheckpointTrainer, output_folder

    peft_config = lora_config(lora_args)
    resume = find_resume_point(training_args)
    length = script_args.sequence_length
    blocks, splits, processor = load_training_blocks(
        script_args.data, length, augmentation, training_args.seed, script_args.infill_share
    )
    evaluates = training_args.eval_strategy != IntervalStrategy.NO
    validation = PackedBlocks(splits["validation"], length) if evaluates else None
    set_seed(training_args.seed)
    if script_args.model:
        model = load_generator(script_args.model, processor)
    else:
        model = MidiMambaForCausalLM(new_config(script_args, processor))
        give_sampling_defaults(model.generation_config)
    check_resumes(resume, {SAFE_WEIGHTS_NAME: model})
    arguments = (training_args, augmentation, lora_args, script_args)
    parts = (blocks,) if validation is None else (blocks, validation)
    recipe = recipe_of(arguments, parts, model, is_given=script_args.model is not None)
    check_recipe(resume, recipe, training_args.world_size)
    push = take_over_push(training_args)
    trainer = WholeCheckpointTrainer(
        model=model if peft_config is None else add_adapters(model, peft_config),
        args=training_args,
        data_collator=BlockCollator.for_processor(processor, script_args.carry_state),
        train_dataset=blocks,
        eval_dataset=None if validation is None else some_of(validation, script_args.max_eval_blocks),
        processing_class=processor,
        callbacks=endings(script_args.minutes, script_args.plan and evaluates),
        shards=script_args.shard,
    )
    trainer.recipe = recipe
    show_lines(trainer)
    if trainer.is_world_process_zero():
        announce(f"{model.num_parameters():,} parameters, {len(blocks):,} blocks of {length} tokens")
    trainer.train(resume_from_checkpoint=resume)
    trained = trainer.whole_model()
    if trainer.is_world_process_zero():
        _finish(trainer, merged(trained), processor, arguments)
        if push:
            publish_run(training_args, output_folder(training_args))


def _finish(
    trainer: "WholeCheckpointTrainer", generator: Any, processor: "MidiProcessor", arguments: tuple[Any, ...]
) -> None:
    """Choose a temperature if the options ask for one, save, and say what to do with the generator.

    Args:
        trainer (`WholeCheckpointTrainer`): whose training has ended.
        generator (`PreTrainedModel`), processor (`MidiProcessor`): what is saved.
        arguments (`tuple`): all its options. Trainer's come first, those of this script last.
    """
    from midimamba.training.advice import listening, next_steps
    from midimamba.training.deadline import time_to_choose
    from midimamba.training.scripts import announce, save_model
    from midimamba.training.temperature import choose_temperature
    from midimamba.training.whole_checkpoints import output_folder

    training_args, script_args = arguments[0], arguments[-1]
    output = output_folder(training_args)
    if script_args.temperatures:
        until = None if script_args.minutes is None else time_to_choose(script_args.minutes)
        generator.to(training_args.device)  # a copy of one that was sharded is elsewhere
        choose_temperature(generator, processor, script_args.data, script_args.temperatures, until)
    save_model(output, generator, processor, arguments=arguments, state=trainer.state)
    announce(f"the generator is in {output}")
    if script_args.plan:
        announce(f"next: {next_steps(trainer.state)}")
        announce(f"listen: {listening(Path(str(training_args.output_dir)))}")


if __name__ == "__main__":
    with training_process():
        main()
