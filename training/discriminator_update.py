"""The discriminator's steps, and what keeps it from winning too early."""

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.sampling import valid_tokens
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.replay import ReplayBuffer

Metrics = dict[str, list[float]]


class DiscriminatorUpdate:
    """
    Owns the discriminator, its optimizer, and the memory of old negatives.

    Args:
        discriminator (`MidiDiscriminator`): is trained.
        args (`AdversarialConfig`): the options whose names begin with `d_`, and those of the stabilisers.
        accelerator (`Accelerator`): the trainer's.
        metrics (`dict[str, list[float]]`): a step appends what it measures.
        eos_token_id (`int`, *optional*): sequences are judged up to this token; by default as a whole.

    Attributes:
        discriminator (`nn.Module`): as the accelerator wraps it.

    Raises:
        ValueError: if `r1_weight` is asked of a discriminator without a second derivative.
    """

    def __init__(
        self,
        discriminator: MidiDiscriminator,
        args: AdversarialConfig,
        accelerator: Accelerator,
        metrics: Metrics,
        eos_token_id: int | None = None,
    ):
        if args.r1_weight and discriminator.config.kind != "cnn":
            raise ValueError(
                f"r1_weight is {args.r1_weight}, but needs a discriminator of kind 'cnn': the fast scans of 'mamba' "
                "have no second derivative"
            )
        self.args = args
        self.accelerator = accelerator
        self.replay = ReplayBuffer(args.replay_size)
        self._metrics = metrics
        self.eos_token_id = eos_token_id
        optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr=args.d_learning_rate, weight_decay=args.d_weight_decay
        )
        self.discriminator, self.optimizer = accelerator.prepare(discriminator, optimizer)

    def num_replayed(self, count: int) -> int:
        """How many of `count` negatives the next step takes from memory: the generator need not sample those."""
        return min(len(self.replay), int(self.args.replay_fraction * count))

    def step(self, real: Tensor, fake: Tensor, may_skip: bool = False) -> float:
        """`d_epochs` passes over real music `(n, time)` and fresh samples `(m, time)`, filled up to n from memory.

        Args:
            real (`LongTensor` of shape `(n, time)`): music.
            fake (`LongTensor` of shape `(m, time)`): samples of the generator, `m = n - num_replayed(n)`.
            may_skip (`bool`, *optional*, defaults to `False`): change nothing if the accuracy is above
                `d_max_accuracy` already.

        Returns:
            `float`: the accuracy on the music and the fresh samples before the update.
        """
        old = self.replay.draw(len(real) - len(fake)) if len(fake) < len(real) else fake[:0]
        self.replay.add(fake)
        sequences = torch.cat([real, fake, old])
        labels = torch.zeros(len(sequences), device=sequences.device)
        labels[: len(real)] = 1 - self.args.label_smoothing
        self.discriminator.train()
        limit = self.args.d_max_accuracy if may_skip else None
        accuracy = 0.0
        for epoch in range(self.args.d_epochs):
            logits = self._accumulate(sequences, labels, len(real))
            if epoch == 0:
                accuracy = self._measure(*logits.split([len(real), len(fake), len(old)]))
                if limit is not None:
                    self._metrics["d_skipped"].append(float(accuracy > limit))
                    if accuracy > limit:
                        break
            self._descend()
        return accuracy

    def _accumulate(self, sequences: Tensor, labels: Tensor, num_real: int) -> Tensor:
        """The gradient of the mean over the rows of all processes, in micro-batches of twice `micro_batch_size` rows.

        Returns:
            `Tensor` of shape `(n,)`: the log-odds that sequences are real, without a graph.
        """
        self.optimizer.zero_grad()
        weights = self._weights(sequences)
        # Processes average their gradients, so that each has to divide by what all of them have on average.
        total = self.accelerator.reduce(weights.sum(), "mean")
        size = 2 * self.args.micro_batch_size
        logits, losses, penalties = [], [], []
        for start in range(0, len(sequences), size):
            rows = slice(start, start + size)
            of_real = min(max(num_real - start, 0), size)
            is_last = start + size >= len(sequences)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.discriminator):
                part, loss, penalty = self._loss(sequences[rows], labels[rows], of_real)
                loss, penalty = loss * (weights[rows].sum() / total), penalty * (of_real / num_real)
                self.accelerator.backward(loss + self.args.r1_weight / 2 * penalty)
            logits.append(part.detach())
            losses.append(loss.detach())
            penalties.append(penalty.detach())
        self._metrics["d_loss"].append(torch.stack(losses).sum().item())
        if self.args.r1_weight:
            self._metrics["d_r1"].append(torch.stack(penalties).sum().item())
        return torch.cat(logits)

    def _loss(self, sequences: Tensor, labels: Tensor, num_real: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-odds `(n,)` that sequences are real, the cross-entropy, and the penalty on the first `num_real`."""
        embeddings = self.accelerator.unwrap_model(self.discriminator).get_input_embeddings()
        with _outputs_of(embeddings) as embedded:
            output = self.discriminator(sequences, attention_mask=self._mask(sequences), labels=labels)
        logits: Tensor = output.logits[:, 0]
        penalty = torch.zeros_like(output.loss)
        if self.args.r1_weight and num_real:
            penalty = r1_penalty(logits[:num_real], embedded[0])
        return logits, output.loss, penalty

    def _weights(self, sequences: Tensor) -> Tensor:
        """How much each of the sequences counts in the discriminator's loss, `(n,)`: once, or once a valued prefix."""
        mask = self._mask(sequences)
        if mask is None or self.accelerator.unwrap_model(self.discriminator).config.kind == "cnn":
            return torch.ones(len(sequences), device=sequences.device)
        return mask.sum(1).float()

    def _mask(self, sequences: Tensor) -> Tensor | None:
        """1 on what is judged of sequences `(n, time)`: music up to the first end behind the prompt."""
        if self.eos_token_id is None:
            return None
        return valid_tokens(sequences, self.eos_token_id, self.args.prompt_length)

    def _measure(self, real: Tensor, fake: Tensor, old: Tensor) -> float:
        """Metrics of log-odds; the accuracy is that of all processes, who must agree on what follows from it."""
        right = torch.stack([(real > 0).float().mean(), (fake <= 0).float().mean()]).mean()
        accuracy: float = self.accelerator.reduce(right, "mean").item()
        self._metrics["d_accuracy"].append(accuracy)
        self._metrics["d_real_probability"].append(real.sigmoid().mean().item())
        if len(old):
            self._metrics["d_replay_accuracy"].append((old <= 0).float().mean().item())
        return accuracy

    def _descend(self) -> None:
        limit = self.args.d_max_grad_norm or math.inf  # the norm is logged in any case
        norm = self.accelerator.clip_grad_norm_(self.discriminator.parameters(), limit)
        self._metrics["d_grad_norm"].append(float(norm))
        self.optimizer.step()


def r1_penalty(logits: Tensor, embedded: Tensor) -> Tensor:
    """The mean squared norm of a logit's gradient, equation 9 of Mescheder et al. (arXiv 1801.04406) without its γ/2.

    Tokens are discrete: the gradient is taken with respect to their embeddings.

    Args:
        logits (`Tensor` of shape `(n,)`): of real sequences.
        embedded (`Tensor` of shape `(rows, time, hidden)`): what they were computed from, perhaps among other rows.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), embedded, create_graph=True)
    return gradient.square().sum() / len(logits)


@contextlib.contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what a module computes."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
