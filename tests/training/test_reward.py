"""A discriminator as TRL's reward: its values, and a step of both trainers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from midimamba import MidiProcessor
from midimamba.training.reward import DiscriminatorReward
from support import make_discriminator, make_generator

PROMPTS = ["BOS_None Bar_None", "BOS_None", "BOS_None Bar_None"]


@pytest.mark.parametrize("kind", ["cnn", "mamba"])
def test_a_reward_is_the_probability_of_prompt_and_completion(kind: str, processor: MidiProcessor) -> None:
    discriminator = make_discriminator(kind, vocab_size=processor.vocab_size).train()
    completions = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    rewards = DiscriminatorReward(discriminator, processor, batch_size=2)(
        prompts=PROMPTS, completions=["", "", ""], completion_ids=completions, trainer_state=None
    )
    assert discriminator.training
    discriminator.eval()
    for prompt, completion, reward in zip(PROMPTS, completions, rewards, strict=True):
        ids = torch.tensor([[*processor.tokenizer(prompt).input_ids, *completion]])
        assert reward == pytest.approx(discriminator(ids).logits.sigmoid().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trainers_of_trl_learn_from_it(name: str, processor: MidiProcessor, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    generator = make_generator(vocab_size=processor.vocab_size)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    reward = DiscriminatorReward(make_discriminator("mamba", vocab_size=processor.vocab_size), processor)
    values: list[float] = []

    def watched(**arguments: Any) -> list[float]:
        values.extend(reward(**arguments))
        return values[-len(arguments["completion_ids"]) :]

    arguments = getattr(trl, f"{name}Config")(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=1,
        beta=0.0,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=generator,
        reward_funcs=watched,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:1] * 4}),
        processing_class=processor.tokenizer,
    )
    trainer.train()
    assert len(values) == 4
    assert len(set(values)) > 1
    assert any(not torch.equal(before[key], value) for key, value in generator.state_dict().items())
