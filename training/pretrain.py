"""Maximum-likelihood training of a generator on a tokenized corpus, with `transformers.Trainer`."""

from dataclasses import dataclass, field

from midimamba.errors import exit_on_input_error

EXAMPLE = """example:
  midimamba tokenize my-midi-folder --out data
  accelerate launch training/pretrain.py --config training/recipes/chorales-cpu.yaml --data data --output_dir model
"""


@dataclass
class PretrainArguments:
    """What is trained on what. All of Trainer's own options are flags, too."""

    data: str = field(metadata={"help": "Folder written by `midimamba tokenize`."})
    model: str | None = field(
        default=None,
        metadata={"help": "Generator to start from: a folder or a repository on the Hub. Unset: a new one."},
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens in a training block."})
    hidden_size: int = field(default=256, metadata={"help": "Width of a new model."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of a new model."})
    state_size: int = field(default=16, metadata={"help": "State of every channel of a new model."})
    carry_state: bool = field(
        default=False, metadata={"help": "Let the state run on from one piece into the next within a block."}
    )


def main() -> None:
    """Train, keep the best, save."""
    from pathlib import Path

    from transformers import Trainer, TrainingArguments, set_seed

    from midimamba.modeling.configuration_midimamba import MidiMambaConfig
    from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
    from midimamba.tokenization.augmentation import Augmentation
    from midimamba.tokenization.packing import BlockCollator
    from midimamba.training.scripts import (
        RecipeParser,
        announce,
        find_resume_point,
        load_blocks,
        load_generator,
        save_model,
        warn_of_a_lost_process,
    )

    parser = RecipeParser((PretrainArguments, Augmentation, TrainingArguments), prog="pretrain.py", epilog=EXAMPLE)
    script_args, augmentation, training_args = parser.parse_recipe()
    warn_of_a_lost_process()
    resume = find_resume_point(training_args)
    train, validation, processor = load_blocks(
        script_args.data, script_args.sequence_length, augmentation, training_args.seed
    )
    set_seed(training_args.seed)
    if script_args.model:
        model = load_generator(script_args.model, processor)
    else:
        model = MidiMambaForCausalLM(
            MidiMambaConfig(
                vocab_size=processor.vocab_size,
                hidden_size=script_args.hidden_size,
                num_hidden_layers=script_args.num_hidden_layers,
                state_size=script_args.state_size,
                pad_token_id=processor.pad_token_id,
                bos_token_id=processor.bos_token_id,
                eos_token_id=processor.eos_token_id,
            )
        )
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=BlockCollator.for_processor(processor, script_args.carry_state),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        announce(
            f"{model.num_parameters():,} parameters, {len(train):,} blocks of {script_args.sequence_length} tokens"
        )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        output = Path(training_args.output_dir)
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        save_model(
            output,
            trainer.accelerator.unwrap_model(trainer.model),
            processor,
            arguments=(training_args, augmentation, script_args),
        )
        announce(f"the generator is in {output}")
    trainer.end()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
