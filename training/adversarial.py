"""Adversarial fine-tuning (SeqGAN) of a pre-trained generator."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from midimamba.errors import InputError
from midimamba.runtime import hide_short_bars, limit_spinning
from midimamba.training.process import training_process

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from midimamba.corpus.augmentation import Augmentation
    from midimamba.tokenization.processor import MidiProcessor
    from midimamba.training.adversarial_config import AdversarialConfig
    from midimamba.training.adversarial_trainer import AdversarialTrainer
    from midimamba.training.lora import LoraArguments

EXAMPLE = """example:
  accelerate launch training/adversarial.py --config training/recipes/distill-adversarial.yaml
      --model model --data data --output_dir tuned
"""


@dataclass
class AdversarialArguments:
    """Generator, music and discriminator. The options of [`AdversarialConfig`] are flags as well."""

    model: str = field(
        metadata={
            "aliases": ["--model_name_or_path"],
            "help": "Pre-trained generator: a folder or a repository on the Hub.",
        }
    )
    data: str = field(
        metadata={
            "aliases": ["--dataset_name"],
            "help": "Corpus written by `midimamba tokenize`: a folder or a data set on the Hub.",
        }
    )
    discriminator: str = field(
        default="cnn",
        metadata={
            "help": "A new one, cnn or mamba; generator: a mamba that starts as a copy of the generator; or a folder "
            "or repository to go on from."
        },
    )
    d_hidden_size: int = field(default=64, metadata={"help": "Width of a new discriminator."})
    d_dropout: float = field(default=0.25, metadata={"help": "Dropout of a new discriminator."})
    d_num_hidden_layers: int = field(default=2, metadata={"help": "Layers of a new mamba discriminator."})
    d_filter_sizes: list[int] | None = field(
        default=None, metadata={"help": "Widths of a new cnn's convolutions; unset: those of SeqGAN."}
    )
    d_num_filters: list[int] | None = field(default=None, metadata={"help": "Filters of each width; unset: SeqGAN's."})
    d_spectral_norm: bool = field(default=False, metadata={"help": "Spectral norm for a new discriminator's layers."})
    d_lookback_bars: list[int] | None = field(
        default=None,
        metadata={"help": "Show a new cnn or mamba what followed the same place this many bars ago."},
    )
    shard: bool = field(
        default=False,
        metadata={
            "help": "Let each process of the run keep a part of the generator, its gradients and the optimizer's "
            "moments (FSDP2), and a whole copy to sample from. Checkpoints are the same."
        },
    )
    openings: bool = field(
        default=False,
        metadata={"help": "Sequences are pieces from their beginnings, cut to --sequence_length, instead of blocks."},
    )
    musical_discriminator: bool = field(
        default=False,
        metadata={"help": "Reward with a discriminator of musical features as well; needs --openings true."},
    )

    def __post_init__(self) -> None:
        numbers = (
            self.d_hidden_size,
            self.d_num_hidden_layers,
            *(self.d_filter_sizes or ()),
            *(self.d_num_filters or ()),
        )
        if min(numbers) < 1:
            raise InputError("d_hidden_size, d_num_hidden_layers, d_filter_sizes and d_num_filters must be at least 1")
        if not 0 <= self.d_dropout < 1:
            raise InputError(f"d_dropout is {self.d_dropout}, but must be in [0, 1)")
        if self.discriminator not in ("cnn", "mamba"):
            self._refuse_another_shape()

    def _refuse_another_shape(self) -> None:
        """A discriminator that is not built here has its shape already."""
        for name, unset in (("d_lookback_bars", "none"), ("d_spectral_norm", "false")):
            if value := getattr(self, name):
                raise InputError(
                    f"{name} is {value}, but a discriminator from {self.discriminator!r} is not a new one: "
                    f"set {name} to {unset}, or discriminator to cnn or mamba"
                )


def main() -> None:
    """Read the options, then tune."""
    limit_spinning()  # before torch is imported
    hide_short_bars()
    from midimamba.corpus.augmentation import Augmentation
    from midimamba.training.adversarial_config import OPTION_GROUPS, AdversarialConfig
    from midimamba.training.lora import LoraArguments
    from midimamba.training.scripts import RecipeParser, warn_of_a_lost_process

    kinds = (AdversarialArguments, LoraArguments, Augmentation, AdversarialConfig)
    parser = RecipeParser(kinds, OPTION_GROUPS, prog="adversarial.py", epilog=EXAMPLE)
    arguments = parser.parse_recipe()
    warn_of_a_lost_process()
    tune(*arguments)


def tune(
    script_args: AdversarialArguments,
    lora_args: "LoraArguments",
    augmentation: "Augmentation",
    training_args: "AdversarialConfig",
) -> None:
    """Tune, save the networks, publish if asked.

    Raises:
        InputError: if model, data and options do not fit together, there is nothing to resume, or another run writes
            into the same folders.
    """
    from midimamba.training.resume import claimed
    from midimamba.training.whole_checkpoints import output_folder

    _check_musical(script_args, training_args)
    output = output_folder(training_args)
    with claimed(output, discriminator_folder(output), musical_folder(output)):
        _tune(script_args, lora_args, augmentation, training_args)


def discriminator_folder(output: "Path") -> "Path":
    """Where the discriminator of a run is saved: beside the generator."""
    return output.with_name(f"{output.name}-discriminator")


def musical_folder(output: "Path") -> "Path":
    """Where the discriminator of musical features is saved, if there is one."""
    return output.with_name(f"{output.name}-musical-discriminator")


def _check_musical(script_args: AdversarialArguments, training_args: "AdversarialConfig") -> None:
    """Refuse options that a discriminator of musical features cannot serve."""
    serves = training_args.calibrates and script_args.openings
    if script_args.musical_discriminator and not serves:
        raise InputError(
            "musical_discriminator judges whole pieces by their log-odds: set openings to true, reward to log-odds or "
            "shuffled, and estimator to terminal or distill"
        )


def _tune(
    script_args: AdversarialArguments,
    lora_args: "LoraArguments",
    augmentation: "Augmentation",
    training_args: "AdversarialConfig",
) -> None:
    from transformers import set_seed
    from transformers.utils import SAFE_WEIGHTS_NAME

    from midimamba.corpus.packing import BlockCollator
    from midimamba.hub_cards.publish import DISCRIMINATORS
    from midimamba.training.action_values import tokens_that_begin_bars
    from midimamba.training.adversarial_trainer import AdversarialTrainer
    from midimamba.training.checkpoint import DISCRIMINATOR_FILE
    from midimamba.training.lora import lora_config
    from midimamba.training.progress import show_lines
    from midimamba.training.publishing import take_over_push
    from midimamba.training.resume import check_recipe, check_resumes, find_resume_point, recipe_of
    from midimamba.training.scripts import load_blocks, load_discriminator, load_generator, load_openings
    from midimamba.training.whole_checkpoints import output_folder

    resume = find_resume_point(training_args)
    output = output_folder(training_args)
    for folder in (discriminator_folder(output), musical_folder(output)):
        if resume is None and (folder / "config.json").exists():
            raise InputError(
                f"{folder} holds the discriminator of another run; choose another --output_dir or delete it"
            )
    length = training_args.sequence_length
    load = load_openings if script_args.openings else load_blocks
    train, validation, processor = load(script_args.data, length, augmentation, training_args.seed)
    set_seed(training_args.seed)
    model = load_generator(script_args.model, processor)
    discriminator = load_discriminator(script_args, model, length, processor)
    check_resumes(resume, {SAFE_WEIGHTS_NAME: model, DISCRIMINATOR_FILE: discriminator})
    arguments = [training_args, augmentation, lora_args, script_args]
    recipe = recipe_of(arguments, (train, validation), model, is_given=True)
    check_recipe(resume, recipe, training_args.world_size)
    push = take_over_push(training_args, DISCRIMINATORS[: 1 + script_args.musical_discriminator])
    try:
        trainer = AdversarialTrainer(
            model=model,
            discriminator=discriminator,
            args=training_args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=BlockCollator.for_processor(processor),
            processing_class=processor,
            bar_token_ids=tokens_that_begin_bars(processor.midi_tokenizer),
            musical_discriminator=script_args.musical_discriminator,
            peft_config=lora_config(lora_args),
            shards=script_args.shard,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    trainer.recipe = recipe
    show_lines(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.fit_to_result()
    generator = trainer.generator_for_saving
    if trainer.is_world_process_zero():
        save(trainer, generator, processor, arguments, push)


def save(
    trainer: "AdversarialTrainer",
    generator: "PreTrainedModel",
    processor: "MidiProcessor",
    arguments: Sequence[Any],
    push: bool,
) -> None:
    """Write the networks, and publish them if asked."""
    from midimamba.training.publishing import publish_run
    from midimamba.training.scripts import announce, save_model
    from midimamba.training.whole_checkpoints import output_folder

    output = output_folder(trainer.args)
    networks = {discriminator_folder(output): trainer.accelerator.unwrap_model(trainer.discriminator)}
    if trainer.judges.musical is not None:
        networks[musical_folder(output)] = trainer.judges.musical.discriminator
    for folder, network in networks.items():
        save_model(folder, network, arguments=arguments)
    # Last, because it marks a finished run: one that is killed before goes on from its checkpoint.
    save_model(output, generator, processor, arguments=arguments, state=trainer.state)
    discriminators = list(networks)
    announce(f"the generator is in {output}, the discriminator in {discriminators[0]}")
    for folder in discriminators[1:]:
        announce(f"the discriminator of musical features is in {folder}")
    if push:
        publish_run(trainer.args, output, discriminators)


if __name__ == "__main__":
    with training_process():
        main()
