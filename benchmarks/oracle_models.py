"""The models of SeqGAN's synthetic benchmark, how they are fitted, and how they are measured.

Sequences are of shape `(count, 1 + length)` throughout and begin with the start token, which is given, never scored.
A negative log-likelihood (NLL) is a mean over the scored tokens, in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midimamba import MidiMambaConfig, MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.modeling_midimamba import MidiMambaModelOutput
from midimamba.modeling.sampling import draw, inference, sample

START = 0  # also an ordinary token of the vocabulary, as in the original code
ROWS = 50  # tokens whose logits are in memory at once: 1 MB with the vocabulary of the original
DRAWN = 500  # sequences drawn or read at once
# No token of the oracle pads, begins or ends anything.
NO_SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
GATES = ("i", "f", "c", "og")  # of the file, in the order in which torch stacks them


class LSTMLanguageModel(nn.Module):
    """
    SeqGAN's generator and its oracle: an LSTM between an embedding and a softmax (arXiv 1609.05473, section 4).

    Args:
        vocab_size (`int`): number of tokens.
        embedding_size (`int`): width of the embedding.
        hidden_size (`int`): units.
    """

    def __init__(self, vocab_size: int, embedding_size: int, hidden_size: int):
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True)
        self.lm_head = nn.Linear(hidden_size, vocab_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(
        self, input_ids: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Ids `(batch, time)` that follow a state to logits `(batch, time, vocab)` and the next state."""
        hidden, state = self.read(input_ids, state)
        return self.lm_head(hidden), state

    def read(
        self, input_ids: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The same to what the softmax reads, `(batch, time, hidden)`."""
        hidden, state = self.lstm(self.embeddings(input_ids), state)
        return hidden, state

    def sample(self, prompts: Tensor, length: int, temperature: float = 1.0) -> Tensor:
        """Continue prompts `(batch, prompt)` to sequences `(batch, length)`."""
        sequences, unread, state = prompts, prompts, None
        with inference(self):
            while sequences.shape[1] < length:
                logits, state = self(unread, state)
                unread = draw(logits[:, -1] / temperature)[:, None]
                sequences = torch.cat([sequences, unread], dim=1)
        return sequences


class Oracle(LSTMLanguageModel):
    """The distribution to learn: an LSTM whose parameters are drawn from N(0, 1), so that it can score samples."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """The original parameters, from a file of arrays `embedding`, `W`, `U` and `b` of every gate, `Wo` and `bo`.

        A gate there is `x W + h U + b`, `W` of shape `(embedding, hidden)`; torch has it transposed, with two biases.
        """
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]).float() for name in file.files}
        oracle = cls(*arrays["embedding"].shape, len(arrays["Ui"]))
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
        """An oracle of one's own, made as the original was."""
        oracle = cls(vocab_size, hidden_size, hidden_size)
        numbers = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter.normal_(generator=numbers)
            oracle.lstm.bias_hh_l0.zero_()
        return oracle.eval()

    def nll(self, sequences: Tensor) -> float:
        """NLL of sequences under the oracle: NLL_oracle if a generator drew them."""
        return tempered_nll(self, sequences, (1.0,))[0]

    def draw(self, count: int, length: int, seed: int) -> Tensor:
        """Samples `(count, 1 + length)`, always the same for a seed; no random number of the caller's is used."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return draw_sequences(self, count, length)


class _LSTMBackbone(nn.Module):
    """Embedding and LSTM in the place of a Mamba's. The state is kept where a Mamba keeps those of its convolution
    (here what the LSTM has put out) and of its scan (here its cell)."""

    def __init__(self, config: MidiMambaConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, batch_first=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> MidiMambaModelOutput:
        cache, state = past_key_values, None
        if cache is None and use_cache:
            cache = RecurrentCache.empty(self.config, len(input_ids))
        if cache is not None:
            parts = cache.layers[0].tensors
            state = tuple(part.transpose(0, 1).clone() for part in parts)
        hidden, state = self.lstm(self.embeddings(input_ids), state)
        if cache is not None:
            for part, new in zip(parts, state, strict=True):
                part.copy_(new.transpose(0, 1).detach())
            cache.advance(input_ids.shape[1])
        return MidiMambaModelOutput(last_hidden_state=hidden, past_key_values=cache)


class LSTMGenerator(MidiMambaForCausalLM):
    """SeqGAN's generator as the trainer takes one: an [`LSTMLanguageModel`] as wide as its embedding."""

    def __init__(self, config: MidiMambaConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers would look for it in the name of the class
        self.backbone = _LSTMBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    @classmethod
    def of(cls, model: LSTMLanguageModel) -> Self:
        """A generator that computes what the model does."""
        vocab_size, width = model.embeddings.weight.shape
        # A state of one number a channel, and a convolution that remembers one token: the shapes of an LSTM's state.
        shape = {"hidden_size": width, "num_hidden_layers": 1, "expand": 1, "state_size": 1, "conv_kernel": 2}
        config = MidiMambaConfig(vocab_size=vocab_size, tie_word_embeddings=False, **shape, **NO_SPECIAL_TOKENS)
        generator = cls(config)
        generator.backbone.embeddings.load_state_dict(model.embeddings.state_dict())
        generator.backbone.lstm.load_state_dict(model.lstm.state_dict())
        generator.lm_head.load_state_dict(model.lm_head.state_dict())
        return generator


def hidden_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """What the softmax reads, `(batch, time, width)`."""
    if isinstance(model, LSTMLanguageModel):
        return model.read(input_ids)[0]
    hidden: Tensor = model.backbone(input_ids, use_cache=False).last_hidden_state
    return hidden


def draw_sequences(model: nn.Module, count: int, length: int, inverse_temperature: float = 1.0) -> Tensor:
    """Samples `(count, 1 + length)` of a model whose logits are multiplied by the inverse temperature."""
    prompts = torch.full((count, 1), START).split(DRAWN)
    temperature = 1 / inverse_temperature
    if isinstance(model, LSTMLanguageModel):
        return torch.cat([model.sample(rows, 1 + length, temperature) for rows in prompts])
    return torch.cat([sample(model, rows, 1 + length, temperature=temperature) for rows in prompts])


def tempered_nll(model: nn.Module, sequences: Tensor, inverse_temperatures: Sequence[float]) -> list[float]:
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
    model: nn.Module, oracle: Oracle, test: Tensor, count: int, inverse_temperatures: Sequence[float]
) -> list[dict[str, float]]:
    """Measures of a model at every inverse temperature, in nats a token.

    Returns:
        `list[dict[str, float]]`: `nll_oracle` of `count` samples, `nll_test`, `entropy` of the model by the same
        samples, and `divergence`: KL(model ‖ oracle) + KL(oracle ‖ model), which is
        `nll_oracle - entropy + nll_test - ` the oracle's own NLL of the test sequences, and 0 for the oracle alone.
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
        embedding_size (`int`): width of the embedding, and of a Mamba's residual stream.
        dropout (`float`): of the embedding and of what the softmax reads.
        learning_rate (`float`), weight_decay (`float`), batch_size (`int`): of the optimizer.
        units (`int`, *optional*, defaults to 32): of an LSTM.
        layers (`int`, *optional*, defaults to 2): of a Mamba.
        stops_early (`bool`, *optional*, defaults to `True`): and keeps the weights that were best on held-out
            sequences; otherwise all epochs count, as in the paper, overfitting or not.
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

    def build(self, vocab_size: int) -> nn.Module:
        """A new generator."""
        if self.kind == "lstm":
            model = LSTMLanguageModel(vocab_size, self.embedding_size, self.units)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.1)  # the original code's: torch's own learn less before they overfit
            return model
        # The oracle's embeddings in and out are independent.
        config = MidiMambaConfig(
            vocab_size=vocab_size,
            hidden_size=self.embedding_size,
            num_hidden_layers=self.layers,
            tie_word_embeddings=False,
            **NO_SPECIAL_TOKENS,
        )
        return MidiMambaForCausalLM(config)


class _SoftmaxLoss(torch.autograd.Function):
    """Mean NLL of tokens by a linear layer and a softmax, `ROWS` tokens at a time: their logits, and what is computed
    with them, stay in a processor's cache. With 5,000 tokens twice as fast as PyTorch's own."""

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


def likelihood_loss(model: nn.Module, sequences: Tensor, dropout: float = 0.0) -> Tensor:
    """Mean NLL of sequences. What the embedding gives, and what the softmax reads, is dropped at that rate."""
    embeddings: nn.Module = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, output: F.dropout(output, dropout))
    try:
        hidden = hidden_of(model, sequences[:, :-1])
    finally:
        hook.remove()
    head: nn.Linear = model.lm_head
    loss: Tensor = _SoftmaxLoss.apply(
        F.dropout(hidden, dropout).flatten(0, 1), head.weight, head.bias, sequences[:, 1:].flatten()
    )
    return loss


def fit(model: nn.Module, recipe: Recipe, train: Tensor, valid: Tensor, epochs: int, patience: int) -> int:
    """Maximum likelihood. When a recipe that stops early has not lowered NLL on held-out sequences for more than
    `patience` epochs, it goes on from its best weights at a third of the learning rate; at the third time it ends.

    Returns the number of epochs of the weights that are kept.
    """
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    best, best_epoch, best_weights, fallen_at = float("inf"), 0, {}, 0
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in train[torch.randperm(len(train))].split(recipe.batch_size):
            loss = likelihood_loss(model, rows, recipe.dropout)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # the original code's
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
