"""Somebody else's generator is tuned: a stock GPT-2, a stock Llama, and an LSTM that is written here."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from midimamba.errors import InputError
from midimamba.training.adversarial import AdversarialArguments
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.scripts import load_discriminator
from support import make_discriminator
from trainer_support import ALL_STABILISERS, LENGTH, PLAIN, make_blocks, moved, parameters

VOCAB = 11


class State(NamedTuple):
    parts: list[Tensor]  # output and cell, each (1, batch, hidden)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def select(self, indices: Tensor) -> "State":
        return State([part[:, indices] for part in self.parts])

    def append(self, other: "State") -> None:
        self.parts[:] = [torch.cat(pair, dim=1) for pair in zip(self.parts, other.parts, strict=True)]


class LSTMConfig(PreTrainedConfig):
    vocab_size: int = VOCAB
    hidden_size: int = 16
    bos_token_id: int = 1
    pad_token_id: int = 0
    eos_token_id: int = 2


class LSTM(PreTrainedModel):
    config_class = LSTMConfig

    def __init__(self) -> None:
        super().__init__(LSTMConfig())
        self.embeddings, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> CausalLMOutput:
        logits = self.head(self.lstm(self.embeddings(input_ids))[0])
        loss = None if labels is None else nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
        return CausalLMOutput(loss=loss, logits=logits)

    def make_state(self, batch_size: int, max_length: int | None = None, room: int | None = None) -> State:
        return State([torch.zeros(1, batch_size, 16) for _ in range(2)])

    def next_logits(self, tokens: Tensor, state: State) -> Tensor:
        hidden, state.parts[:] = self.lstm(self.embeddings(tokens), tuple(state.parts))
        return self.head(hidden[:, -1])


def make_gpt2() -> GPT2LMHeadModel:
    shape: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **shape, **dropout))


def make_llama() -> LlamaForCausalLM:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **shape))


def tune(model: PreTrainedModel, folder: Path, **overrides: Any) -> AdversarialTrainer:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "sequence_length": LENGTH,
        "num_rollouts": 2,
        "rollout_positions": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "d_warmup_steps": 2,
        "num_eval_samples": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = AdversarialConfig(**PLAIN | options | overrides)
    return AdversarialTrainer(model, make_discriminator(), args, make_blocks(), make_blocks(8))


@pytest.mark.parametrize("make", [make_gpt2, make_llama, LSTM])
def test_somebody_elses_policy_is_tuned(make: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = tune(make(), tmp_path, **ALL_STABILISERS | saving | {"max_nll_drift": 10.0})
    before = parameters(trainer.generator)
    trainer.train()
    assert moved(before, parameters(trainer.generator)) > 1e-3
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 3
    assert {"reward", "kl", "entropy", "mle_loss", "policy_ratio_max"} <= logged[-1].keys()
    assert any("eval_self_bleu_4" in log for log in trainer.state.log_history)
    assert (tmp_path / "checkpoint-2" / "rollout_policy.safetensors").exists()


@pytest.mark.parametrize("make", [make_gpt2, make_llama, LSTM])
def test_a_known_reward_rises(make: type, tmp_path: Path) -> None:
    """The reward is the share of token 7: whoever the policy is, its samples must hold more of it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "mle_weight": 0.0,
        "max_steps": 25,
        "per_device_train_batch_size": 16,
        "d_warmup_steps": 0,
    }
    trainer = tune(make(), tmp_path, **options)
    trainer.action_values.reward.control = lambda rows: (rows == 7).float().mean(1)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_a_discriminator_does_not_start_as_somebody_elses_policy() -> None:
    arguments = AdversarialArguments("model", "data", discriminator="generator")
    with pytest.raises(InputError, match="a discriminator cannot start as a GPT2LMHeadModel: use cnn or mamba"):
        load_discriminator(arguments, make_gpt2(), LENGTH)
