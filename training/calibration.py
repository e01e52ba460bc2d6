"""Measures what the rule of [`~midimamba.training.plan`] needs to know: a corpus, and the speed of this machine."""

import math
import os
import time
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import DatasetDict
from torch import nn
from transformers import TrainingArguments

from midimamba.corpus.augmentation import Augmentation
from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import BlockCollator, PackedBlocks
from midimamba.corpus.rearranging import share_of
from midimamba.errors import InputError
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import time_ids
from midimamba.training.deadline import ending, seconds_to_train
from midimamba.training.plan import (
    DECIDED,
    LAGS,
    MICRO_TOKENS,
    SHORT,
    SHORTEST,
    SIZES,
    STEP_TOKENS,
    TEMPERATURES,
    TRAINING_SHARE,
    TRANSPOSE,
    Facts,
    Limits,
    Plan,
    Speed,
    choose_size,
    context_of,
    make_plan,
    options_of,
    pace_of,
)
from midimamba.training.pretrain import PretrainArguments, new_config
from midimamba.training.resume import find_resume_point
from midimamba.training.scripts import announce, check_one_stream, load_generator
from midimamba.training.temperature import LEAST_PIECES
from midimamba.training.whole_checkpoints import choose_checkpoint, fault_of, output_folder, seal_of

_STEPS, _SECONDS = 3, 2.0
"""A size is measured for this many steps, or this long."""
_MORE_SECONDS = 1.0
"""Keys are changed for this long, to see how long it takes."""


def options_by_rule(
    script_args: PretrainArguments, training_args: TrainingArguments, given: Collection[str]
) -> dict[str, Any]:
    """The options that the user did not give, by the rule; or those of the interrupted run that this one goes on with.

    Args:
        script_args (`PretrainArguments`), training_args (`TrainingArguments`): with what the user gave.
        given (`Collection[str]`): the names of the options that the user gave.

    Raises:
        InputError: if `data` is no corpus that can be trained on, or the output folder holds another run.
    """
    output = output_folder(training_args)
    resume: str | Path | None = training_args.resume_from_checkpoint
    if resume is None or (output / "config.json").exists():
        resume = find_resume_point(training_args)  # which refuses what it may not overwrite
    elif str(resume).lower() == "true":
        resume = choose_checkpoint(output).checkpoint
    calibration = Calibration(script_args, training_args, given)
    recipe = seal_of(Path(resume)).get("recipe") if resume is not None and fault_of(Path(resume)) is None else None
    options = calibration.taken_up(recipe) if recipe else calibration.options()
    if training_args.device.type == "cpu":
        options["dataloader_pin_memory"] = False
    return options | calibration.temperatures()


def facts_of(splits: DatasetDict, processor: MidiProcessor) -> Facts:
    """What the rule knows of a corpus."""
    train, held_out = (
        pc.list_value_length(splits[name].with_format("arrow")[:]["input_ids"]).to_numpy()
        for name in ("train", "validation")
    )
    return Facts(
        pieces=len(train),
        tokens=int(train.sum()),
        held_out=int(held_out.sum()),
        typical=int(np.median(train)) if len(train) else 0,
        has_bars=bool(time_ids(processor.midi_tokenizer)[0]),
        tells_drums=any(program >= 0 for program in processor.programs or ()),
    )


class Calibration:
    """
    Chooses the options of a run that the user did not give.

    Args:
        script_args (`PretrainArguments`), training_args (`TrainingArguments`): with what the user gave.
        given (`Collection[str]`): the names of the options that the user gave. They stay as they are.

    Raises:
        InputError: if `data` is no corpus that can be trained on, or too small.
    """

    def __init__(self, script_args: PretrainArguments, training_args: TrainingArguments, given: Collection[str]):
        self.training_args, self.given = training_args, given
        self.splits, self.processor = load_corpus(script_args.data)
        check_one_stream(script_args.data, self.processor)
        share_of(script_args.infill_share, self.processor)  # refuses what cannot be before any work
        self.facts = facts_of(self.splits, self.processor)
        if self.facts.tokens < SHORTEST:
            raise InputError(
                f"{script_args.data} has {self.facts.tokens} tokens to train on, and needs {SHORTEST}: add music"
            )
        looks_back = script_args.model is None and self.facts.has_bars and "lookback_bars" not in given
        self.script_args = replace(script_args, lookback_bars=list(LAGS)) if looks_back else script_args
        self.length = script_args.sequence_length if "sequence_length" in given else context_of(self.facts)
        self.blocks = PackedBlocks(self.splits["train"], self.length)
        self._new_keys = 0.0
        self.collator = BlockCollator.for_processor(self.processor)

    def options(self) -> dict[str, Any]:
        """The options by the rule, announced in a few lines."""
        changes = self.facts.tells_drums and "transpose" not in self.given
        self._new_keys = self._seconds_of_new_keys() if changes else 0.0
        own = {"size", "hidden_size", "num_hidden_layers"} & set(self.given)
        sizes = [""] if own or self.script_args.model is not None else list(SIZES)
        models: dict[str, MidiMambaForCausalLM] = {}

        def measure(size: str) -> Speed:
            models[size] = self._model(size)
            return self._speed(models[size])

        size, speed = choose_size(sizes, self.facts, self._limits(), measure)
        shortest = self.length if "sequence_length" in self.given else SHORT
        plan = make_plan(size or None, self.length, self.facts, self._limits(), speed, shortest)
        model, deadline = models[size], self.script_args.minutes is not None
        options = options_of(plan, self.facts, model.config.hidden_size)
        if not size:
            del options["size"]
        if self.script_args.model is not None:
            del options["lookback_bars"]
            options["learning_rate"] /= 3  # it has learned already
        self._announce(plan, options, model, speed)
        return options | pace_of(options["max_steps"], plan.rows, plan.evaluates, deadline)

    def taken_up(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The options of an interrupted run, which this one goes on with.

        Args:
            recipe (`Mapping[str, Any]`): what its last checkpoint says.
        """
        options = {name: recipe[name] for name in DECIDED if name in recipe}
        minutes, before = self.script_args.minutes, recipe.get("minutes")
        if minutes and before and minutes > before:
            options["max_steps"] = math.ceil(options["max_steps"] * minutes / before)
        rows, steps = options["per_device_train_batch_size"], options["max_steps"]
        return options | pace_of(steps, rows, self.facts.can_evaluate, minutes is not None)

    def temperatures(self) -> dict[str, Any]:
        """Which temperatures are tried at the end, which a line says: none without music to compare with."""
        enough = len(self.splits["validation"]) >= LEAST_PIECES
        chosen = self.script_args.temperatures or (list(TEMPERATURES) if enough else [])
        if chosen:
            listed = ", ".join(f"{each:g}" for each in chosen)
            limit = "" if self.script_args.minutes is None else ", as far as there is time"
            announce(f"temperature: chosen at the end from {listed}{limit}")
        else:
            announce(f"temperature: none is chosen, because fewer than {LEAST_PIECES} pieces are held out")
        return {"temperatures": chosen}

    def _limits(self) -> Limits:
        arguments, minutes = self.training_args, self.script_args.minutes
        seconds = None if minutes is None else seconds_to_train(minutes)
        if seconds == 0:
            raise InputError(
                f"no time is left to train: reading the music took all of the {minutes:g} minutes; what was read is "
                "kept, so start the same again"
            )
        return Limits(
            seconds=seconds,
            steps=arguments.max_steps if "max_steps" in self.given and arguments.max_steps > 0 else None,
            epochs=arguments.num_train_epochs if "num_train_epochs" in self.given else None,
            new_keys=self._new_keys,
        )

    def _model(self, size: str) -> MidiMambaForCausalLM:
        if self.script_args.model is not None:
            return load_generator(self.script_args.model, self.processor)
        return MidiMambaForCausalLM(
            new_config(replace(self.script_args, size=size or self.script_args.size), self.processor)
        )

    def _speed(self, model: MidiMambaForCausalLM) -> Speed:
        """Seconds per token of training steps, with as many rows as fit."""
        device = self.training_args.device
        network: nn.Module = model  # transformers types `to` as if a model were its argument
        network.to(device).train()
        embeddings = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
        rows = max(1, (STEP_TOKENS if device.type == "cpu" else MICRO_TOKENS) // self.length)
        while True:
            try:
                seconds = self._seconds_of_step(model, rows)
                break
            except torch.cuda.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2
        network.to("cpu")
        fit = rows if device.type != "cpu" else MICRO_TOKENS // self.length
        return Speed(model.num_parameters() - embeddings, seconds / (rows * self.length), max(1, fit))

    def _seconds_of_step(self, model: MidiMambaForCausalLM, rows: int) -> float:
        device = self.training_args.device
        bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        batch = self.collator([self.blocks[index % len(self.blocks)] for index in range(rows)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        optimizer = torch.optim.AdamW(model.parameters(), 0.0)
        seconds: list[float] = []
        while len(seconds) < 1 + _STEPS and sum(seconds[1:]) < _SECONDS:  # the first compiles
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    def _seconds_of_new_keys(self) -> float:
        """How long it takes to transpose all pieces of the corpus once."""
        augmentation, random = Augmentation(transpose=TRANSPOSE), np.random.default_rng(0)
        seconds, tokens = 0.0, 0
        for row in self.splits["train"]:
            score = self.processor.decode(row["input_ids"])
            start = time.perf_counter()
            self.processor.encode(augmentation.apply(score, random))
            seconds += time.perf_counter() - start
            tokens += len(row["input_ids"])
            if seconds > _MORE_SECONDS:
                break
        return seconds * self.facts.tokens / tokens

    def _announce(self, plan: Plan, options: Mapping[str, Any], model: MidiMambaForCausalLM, speed: Speed) -> None:
        """Say what the run will do, with what the user gave, and how long it will take."""
        given = {
            name: getattr(part, name)
            for part in (self.script_args, self.training_args)
            for name in self.given
            if hasattr(part, name)
        }
        shown = {**options, **given}
        facts, minutes = self.facts, self.script_args.minutes
        announce(f"corpus: {facts.pieces:,} pieces of {facts.tokens:,} tokens, and {facts.held_out:,} held out")
        name = f"{shown['size']}, " if shown.get("size") else ""
        lags = " ".join(map(str, model.config.lookback_bars))
        announce(f"model: {name}{model.num_parameters():,} parameters" + (f", looks back {lags} bars" if lags else ""))
        keys = f"transposed by up to {shown['transpose']}" if shown["transpose"] else "in their own keys"
        announce(
            f"plan: {plan.steps:,} steps of {plan.batch} blocks of {plan.length} tokens, which read every piece "
            f"{plan.epochs:.1f} times, {keys}; learning rate {shown['learning_rate']:g}, "
            f"weight decay {shown['weight_decay']:g}"
        )
        seconds = plan.steps * plan.batch * plan.length * speed.seconds / TRAINING_SHARE
        end = (
            f"; the run ends at {time.strftime('%H:%M:%S', time.localtime(ending(minutes)))} at the latest"
            if minutes
            else ""
        )
        announce(
            f"time: about {seconds / 60:.1f} minutes of training, at {1 / speed.seconds:,.0f} tokens per second{end}"
        )
        if not plan.evaluates:
            announce("no music is held out, so nothing measures the model: the last weights are kept")
