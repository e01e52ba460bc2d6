"""The models of SeqGAN's synthetic benchmark, how they are fitted, and how they are measured.

All sequences are of shape `(count, 1 + length)`. They start with the start token, which is given and never scored. A
negative log-likelihood (NLL) is a mean over the scored tokens, in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from midimamba import MidiMambaConfig, MidiMambaForCausalLM
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import sample

START = 0  # also an ordinary token of the vocabulary, as in the original code
ROWS = 50  # tokens whose logits are in memory at once: 1 MB with the vocabulary of the original
DRAWN = 500  # sequences drawn or read at once
# The oracle has no token for padding, and none that starts or ends a sequence.
NO_SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
GATES = ("i", "f", "c", "og")  # of the file, in the order in which torch stacks them


class LSTMConfig(PreTrainedConfig):
    """The sizes of an [`LSTMLanguageModel`]. It has no special tokens."""

    model_type = "seqgan-lstm"

    vocab_size: int = 5000
    embedding_size: int = 32
    hidden_size: int = 32
    tie_word_embeddings: bool = False


@dataclass
class LSTMState:
    """
    The state of an LSTM.

    Args:
        output, cell (`Tensor` of shape `(1, batch, hidden)`): as `torch.nn.LSTM` takes and returns them.
    """

    output: Tensor
    cell: Tensor

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.output.nbytes + self.cell.nbytes

    def select(self, indices: Tensor) -> "LSTMState":
        """Some of the sequences, copied."""
        return LSTMState(self.output[:, indices], self.cell[:, indices])

    def append(self, other: "LSTMState") -> None:
        """Add the sequences of another state after those here."""
        self.output = torch.cat([self.output, other.output], dim=1)
        self.cell = torch.cat([self.cell, other.cell], dim=1)


class LSTMLanguageModel(PreTrainedModel):
    """SeqGAN's generator and its oracle: an LSTM between an embedding and a softmax (arXiv 1609.05473, section 4)."""

    config_class = LSTMConfig
    config: LSTMConfig

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers would look for it in the name of the class
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @classmethod
    def of_sizes(cls, vocab_size: int, embedding_size: int, hidden_size: int) -> Self:
        """A new model, with torch's own initialisation."""
        return cls(LSTMConfig(vocab_size=vocab_size, embedding_size=embedding_size, hidden_size=hidden_size))

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the caller initialises the model, since the 0.02 of transformers is not what the paper uses."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Ids `(batch, time)` to logits `(batch, time, vocab)`, and the loss of labels, which are shifted inside."""
        logits = self.lm_head(self.read(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def read(self, input_ids: Tensor) -> Tensor:
        """Ids to what the softmax reads, `(batch, time, hidden)`."""
        hidden: Tensor = self.lstm(self.embeddings(input_ids))[0]
        return hidden

    def make_state(self, batch_size: int, max_length: int | None = None, room: int | None = None) -> LSTMState:
        """The state before the first token."""
        zeros = self.lm_head.weight.new_zeros(1, batch_size, self.config.hidden_size)
        return LSTMState(zeros, zeros.clone())

    def next_logits(self, tokens: Tensor, state: LSTMState) -> Tensor:
        """Read tokens `(n, time)` onto the state; logits `(n, vocab)` of what follows."""
        hidden, (state.output, state.cell) = self.lstm(self.embeddings(tokens), (state.output, state.cell))
        logits: Tensor = self.lm_head(hidden[:, -1])
        return logits


class Oracle(LSTMLanguageModel):
    """The distribution to learn: an LSTM whose parameters are drawn from N(0, 1), so that it can score samples."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """The original parameters, from a file of arrays `embedding`, `W`, `U` and `b` of every gate, `Wo` and `bo`.

        A gate there is `x W + h U + b`, `W` of shape `(embedding, hidden)`; torch has it transposed, with two biases.
        """
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]).float() for name in file.files}
        vocab_size, embedding_size = arrays["embedding"].shape
        oracle = cls.of_sizes(vocab_size, embedding_size, len(arrays["Ui"]))
        biases = torch.cat([arrays[f"b{gate}"] for gate in GATES])
        oracle.load_state_dict(
            {
                "embeddings.weight": arrays["embedding"],
                "lstm.weight_ih_l0": torch.cat([arrays[f"W{gate}"].T for gate in GATES]),
                "lstm.weight_hh_l0": torch.cat([arrays[f"U{gate}"].T for gate in GATES]),
                "lstm.bias_ih_l0": biases,
                "lstm.bias_hh_l0": torch.zeros_like(biases),
                "lm_head.weight": arrays["Wo"].T,
                "lm_head.bias": arrays["bo"],
            }
        )
        return oracle.eval()

    @classmethod
    def seeded(cls, vocab_size: int, hidden_size: int, seed: int = 0) -> Self:
        """A new oracle, made as the original was."""
        oracle = cls.of_sizes(vocab_size, hidden_size, hidden_size)
        numbers = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter.normal_(generator=numbers)
            oracle.lstm.get_parameter("bias_hh_l0").zero_()
        return oracle.eval()

    def nll(self, sequences: Tensor) -> float:
        """NLL of sequences under the oracle: NLL_oracle if a generator drew them."""
        return tempered_nll(self, sequences, (1.0,))[0]

    def draw(self, count: int, length: int, seed: int) -> Tensor:
        """Samples `(count, 1 + length)`, the same for the same seed. The global random state is left as it was."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return draw_sequences(self, count, length)


Generator = MidiMambaForCausalLM | LSTMLanguageModel


def hidden_of(model: Generator, input_ids: Tensor) -> Tensor:
    """The hidden states `(batch, time, width)` that the softmax reads."""
    if isinstance(model, LSTMLanguageModel):
        return model.read(input_ids)
    hidden: Tensor = model.backbone(input_ids, use_cache=False).last_hidden_state
    return hidden


def draw_sequences(model: Generator, count: int, length: int, inverse_temperature: float = 1.0) -> Tensor:
    """Samples `(count, 1 + length)` of a model whose logits are multiplied by the inverse temperature."""
    prompts = torch.full((count, 1), START).split(DRAWN)
    return torch.cat([sample(model, rows, 1 + length, temperature=1 / inverse_temperature) for rows in prompts])


def tempered_nll(model: Generator, sequences: Tensor, inverse_temperatures: Sequence[float]) -> list[float]:
    """NLL of sequences under a model whose logits are multiplied by each inverse temperature and normalised again."""
    totals = torch.zeros(len(inverse_temperatures), dtype=torch.float64)
    with inference(model):
        for rows in sequences.split(DRAWN):
            hidden, tokens = hidden_of(model, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
            for part, following in zip(hidden.split(ROWS), tokens.split(ROWS), strict=True):
                logits = model.lm_head(part)
                chosen = logits.gather(-1, following[:, None]).squeeze(-1)
                for index, factor in enumerate(inverse_temperatures):
                    totals[index] += (logits.mul(factor).logsumexp(-1) - factor * chosen).double().sum()
    result: list[float] = (totals / sequences[:, 1:].numel()).tolist()
    return result


def sweep(
    model: Generator, oracle: Oracle, test: Tensor, count: int, inverse_temperatures: Sequence[float]
) -> list[dict[str, float]]:
    """Measures of a model at every inverse temperature, in nats per token.

    Returns:
        `list[dict[str, float]]`: `nll_oracle` of `count` samples, `nll_test`, `entropy` of the model on the same
        samples, and `divergence`: KL(model ‖ oracle) + KL(oracle ‖ model), which is
        `nll_oracle - entropy + nll_test` minus the NLL of the test sequences under the oracle. It is 0 only for the
        oracle.
    """
    floor = oracle.nll(test)
    points = []
    for factor, nll_test in zip(inverse_temperatures, tempered_nll(model, test, inverse_temperatures), strict=True):
        samples = draw_sequences(model, count, test.shape[1] - 1, factor)
        point = {"inverse_temperature": factor, "nll_oracle": oracle.nll(samples), "nll_test": nll_test}
        point["entropy"] = tempered_nll(model, samples, (factor,))[0]
        point["divergence"] = point["nll_oracle"] - point["entropy"] + nll_test - floor
        points.append(point)
    return points


@dataclass(frozen=True)
class Recipe:
    """
    A generator and how it is fitted by maximum likelihood, with AdamW.

    Args:
        kind (`str`): `"mamba"` or `"lstm"`.
        embedding_size (`int`): width of the embedding, and of the residual stream of a Mamba.
        dropout (`float`): dropout of the embedding and of the hidden states that the softmax reads.
        learning_rate (`float`), weight_decay (`float`), batch_size (`int`): options of the optimizer.
        units (`int`, *optional*, defaults to 32): units of an LSTM.
        layers (`int`, *optional*, defaults to 2): layers of a Mamba.
        stops_early (`bool`, *optional*, defaults to `True`): stop early and keep the weights that were best on
            held-out sequences; otherwise keep those of the last epoch, as the paper does, even if they overfit.
    """

    kind: str
    embedding_size: int
    dropout: float
    learning_rate: float
    weight_decay: float
    batch_size: int
    units: int = 32
    layers: int = 2
    stops_early: bool = True

    def build(self, vocab_size: int) -> Generator:
        """A new generator."""
        if self.kind == "lstm":
            model = LSTMLanguageModel.of_sizes(vocab_size, self.embedding_size, self.units)
            for parameter in model.parameters():
                nn.init.normal_(
                    parameter, std=0.1
                )  # as in the original code; torch's defaults learn less before they overfit
            return model
        # The input and output embeddings of the oracle are independent.
        config = MidiMambaConfig(
            vocab_size=vocab_size,
            hidden_size=self.embedding_size,
            num_hidden_layers=self.layers,
            tie_word_embeddings=False,
            **NO_SPECIAL_TOKENS,
        )
        return MidiMambaForCausalLM(config)


class _SoftmaxLoss(torch.autograd.Function):
    """Mean NLL of tokens by a linear layer and a softmax, `ROWS` tokens at a time, so that logits and their gradients
    stay in the cache of a CPU. With a vocabulary of 5,000, it is twice as fast as PyTorch's own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        """`hidden` is of shape `(n, width)`, `weight` and `bias` are a linear layer's, `tokens` of shape `(n,)`."""
        gradients = torch.empty_like(hidden), torch.zeros_like(weight), weight.new_zeros(len(weight))
        total = hidden.new_zeros(())
        parts = (tensor.split(ROWS) for tensor in (hidden, tokens, gradients[0]))
        for rows, chosen, gradient in zip(*parts, strict=True):
            errors = F.linear(rows, weight, bias).softmax(-1)
            at = torch.arange(len(rows)), chosen
            total -= errors[at].log().sum()
            errors[at] -= 1
            torch.mm(errors, weight, out=gradient)
            gradients[1].addmm_(errors.T, rows)
            gradients[2].add_(errors.sum(0))
        ctx.save_for_backward(*(gradient.div_(len(tokens)) for gradient in gradients))
        return total / len(tokens)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (gradient * outputs[0] for gradient in ctx.saved_tensors)
        return hidden, weight, bias if ctx.needs_input_grad[2] else None, None


def likelihood_loss(model: Generator, sequences: Tensor, dropout: float = 0.0) -> Tensor:
    """Mean NLL of sequences, with dropout of the embedding and of the hidden states that the softmax reads."""
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, output: F.dropout(output, dropout))
    try:
        hidden = hidden_of(model, sequences[:, :-1])
    finally:
        hook.remove()
    head = model.lm_head
    loss: Tensor = _SoftmaxLoss.apply(
        F.dropout(hidden, dropout).flatten(0, 1), head.weight, head.bias, sequences[:, 1:].flatten()
    )
    return loss


def fit(model: Generator, recipe: Recipe, train: Tensor, valid: Tensor, epochs: int, patience: int) -> int:
    """Fit a model by maximum likelihood. If a recipe stops early and the NLL of held-out sequences has not fallen for
    more than `patience` epochs, training continues from the best weights at a third of the learning rate. The third
    time, it ends.

    Returns the number of epochs after which the kept weights were reached.
    """
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    best, best_epoch, best_weights, fallen_at = float("inf"), 0, {}, 0
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in train[torch.randperm(len(train))].split(recipe.batch_size):
            loss = likelihood_loss(model, rows, recipe.dropout)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # as in the original code
            optimizer.step()
        # Without early stopping every epoch counts as better than the one before it.
        nll = tempered_nll(model, valid, (1.0,))[0] if recipe.stops_early else -epoch
        if nll < best:
            best, best_epoch, fallen_at = nll, epoch, epoch
            best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        elif epoch - fallen_at > patience:
            group = optimizer.param_groups[0]
            if group["lr"] < recipe.learning_rate / 5:
                break
            model.load_state_dict(best_weights)
            group["lr"], fallen_at = group["lr"] / 3, epoch
    model.load_state_dict(best_weights)
    return best_epoch
