"""The discriminator's steps, and what keeps it from winning too early."""

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.sampling import Ending, Sequences
from midimamba.modeling.scoring import score
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.metrics import Measures, RunningMeans
from midimamba.training.progress import progress
from midimamba.training.replay import ReplayBuffer

HELD_OUT_SHARE = 0.125
"""Of the samples of a discriminator's step: how well it does on them says when to stop."""
REPLAY_BATCHES = 32
"""Batches of old negatives that are remembered."""


class DiscriminatorUpdate:
    """
    Owns the discriminator, its optimizer, and the memory of old negatives.

    Args:
        discriminator (`MidiDiscriminator`): is trained.
        args (`AdversarialConfig`): the options whose names begin with `d_`, and those of the stabilisers.
        accelerator (`Accelerator`): the trainer's.
        ending (`Ending`): sequences are judged up to their end.
        held_out (`LongTensor` of shape `(n, time)`): music that nothing is trained on.

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
        ending: Ending,
        held_out: Tensor,
    ):
        if args.r1_weight and discriminator.config.kind != "cnn":
            raise ValueError(
                f"r1_weight is {args.r1_weight}, but needs a discriminator of kind 'cnn': the fast scans of 'mamba' "
                "have no second derivative; set r1_weight to 0"
            )
        self.args = args
        self.accelerator = accelerator
        self.ending = ending
        self.held_out = held_out
        self.replay = ReplayBuffer(REPLAY_BATCHES * args.per_device_train_batch_size if args.replay_fraction else 0)
        optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr=args.d_learning_rate, weight_decay=args.weight_decay
        )
        self.discriminator, self.optimizer = accelerator.prepare(discriminator, optimizer)

    def num_replayed(self, count: int) -> int:
        """How many of `count` negatives the next step takes from memory: the generator need not sample those."""
        return min(len(self.replay), int(self.args.replay_fraction * count))

    def __call__(self, real: Tensor, fake: Tensor) -> Measures:
        """`d_epochs` passes over real music and fresh samples, filled up from memory; none where the discriminator is
        right more often than `d_max_accuracy` on them already. With `mini_batch_size`, a pass has several steps.

        Args:
            real (`LongTensor` of shape `(n, time)`): music.
            fake (`LongTensor` of shape `(m, time)`): samples of the generator, `m = n - num_replayed(n)`.

        Returns:
            The measures of the passes. `d_accuracy` is that on the music and the fresh samples before the update.
        """
        old = self.replay.draw(len(real) - len(fake)) if len(fake) < len(real) else fake[:0]
        self.replay.add(fake)
        self.discriminator.train()
        size = self.args.mini_batch_size
        if size is not None and size < len(real):
            return self._learn_from_parts(real, fake, old, size)
        sequences, labels = self._labelled(real, torch.cat([fake, old]))
        limit = self.args.d_max_accuracy
        before: Measures = {}
        passes = RunningMeans()
        for epoch in range(self.args.d_epochs):
            logits, measures = self._accumulate(sequences, labels, len(real))
            passes.add(measures)
            if epoch == 0:
                before = self._measure(*logits.split([len(real), len(fake), len(old)]))
                if limit is not None:
                    accuracy = float(before["d_accuracy"])  # waits for the device: whether to learn depends on it
                    before["d_skipped"] = float(accuracy > limit)
                    if accuracy > limit:
                        break
            passes.add({"d_grad_norm": self._descend()})
        return {**passes.means(), **before}

    def _learn_from_parts(self, real: Tensor, fake: Tensor, old: Tensor, size: int) -> Measures:
        """A step for every `size` real sequences and as many samples, in another order for every pass.

        Some of the samples are held out, as some music is. The passes end with the first that makes the discriminator
        worse on both, and that one is undone, in the optimizer as well.
        """
        before = self._measure(*(self._score(ids) for ids in (real, fake, old)))
        limit = self.args.d_max_accuracy
        if limit is not None:
            is_skipped = float(before["d_accuracy"]) > limit
            before["d_skipped"] = float(is_skipped)
            if is_skipped:
                return before
        unseen = fake[: max(1, round(HELD_OUT_SHARE * len(fake)))]
        fake = torch.cat([fake[len(unseen) :], old])
        real = real[: len(fake)]
        best = self._held_out_loss(unseen)
        passes = RunningMeans()
        for _ in range(self.args.d_epochs):
            kept = copy.deepcopy((self.discriminator.state_dict(), self.optimizer.state_dict()))
            self.discriminator.train()
            orders = [torch.randperm(len(ids), device=ids.device).split(size) for ids in (real, fake)]
            for some_real, some_fake in progress(list(zip(*orders, strict=True)), "discriminator", self.args):
                sequences, labels = self._labelled(real[some_real], fake[some_fake])
                _, measures = self._accumulate(sequences.trimmed(), labels, len(some_real))
                passes.add({**measures, "d_grad_norm": self._descend()})
            loss = self._held_out_loss(unseen)
            if loss > best:
                self.discriminator.load_state_dict(kept[0])
                self.optimizer.load_state_dict(kept[1])  # its moments have gone the same way
                break
            best = loss
        return {**passes.means(), **before, "d_loss_held_out": best}

    def _held_out_loss(self, unseen: Tensor) -> float:
        """The cross-entropy on held-out music and on samples that are not learned from, in all processes."""
        losses = [F.softplus(-self._score(self.held_out)).mean(), F.softplus(self._score(unseen)).mean()]
        return float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))

    def _labelled(self, real: Tensor, fake: Tensor) -> tuple[Sequences, Tensor]:
        """Music and samples `(n, time)` as one set, with what the discriminator is to say of each."""
        ids = torch.cat([real, fake])
        labels = torch.zeros(len(ids), device=ids.device)
        labels[: len(real)] = 1 - self.args.label_smoothing
        return Sequences(ids, self.ending.mask(ids, self.args.prompt_length)), labels

    def _score(self, ids: Tensor) -> Tensor:
        mask = self.ending.mask(ids, self.args.prompt_length)
        return score(self.accelerator.unwrap_model(self.discriminator), ids, mask, 2 * self.args.micro_batch_size)

    def _accumulate(self, sequences: Sequences, labels: Tensor, num_real: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the mean over the rows of all processes, in micro-batches of twice `micro_batch_size` rows.

        Returns:
            The log-odds that sequences are real, `(n,)`, without a graph, and measures of the pass.
        """
        self.optimizer.zero_grad()
        weights = self._weights(sequences)
        # Processes average their gradients, so each has to divide by what all of them have on average.
        total = self.accelerator.reduce(weights.sum(), "mean")
        size = 2 * self.args.micro_batch_size
        logits, losses, penalties = [], [], []
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            of_real = min(max(num_real - start, 0), size)
            is_last = start + size >= len(labels)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.discriminator):
                part, loss, penalty = self._loss(sequences.rows(rows), labels[rows], of_real)
                loss, penalty = loss * (weights[rows].sum() / total), penalty * (of_real / num_real)
                self.accelerator.backward(loss + self.args.r1_weight / 2 * penalty)
            logits.append(part.detach())
            losses.append(loss.detach())
            penalties.append(penalty.detach())
        measures = {"d_loss": torch.stack(losses).sum()}
        if self.args.r1_weight:
            measures["d_r1"] = torch.stack(penalties).sum()
        return torch.cat(logits), measures

    def _loss(self, sequences: Sequences, labels: Tensor, num_real: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-odds `(n,)` that sequences are real, the cross-entropy, and the penalty on the first `num_real`."""
        embeddings = self.accelerator.unwrap_model(self.discriminator).get_input_embeddings()
        with _outputs_of(embeddings) as embedded:
            output = self.discriminator(sequences.ids, attention_mask=sequences.mask, labels=labels)
        logits: Tensor = output.logits[:, 0]
        penalty = torch.zeros_like(output.loss)
        if self.args.r1_weight and num_real:
            penalty = r1_penalty(logits[:num_real], embedded[0])
        return logits, output.loss, penalty

    def _weights(self, sequences: Sequences) -> Tensor:
        """How much each sequence counts in the discriminator's loss, `(n,)`: once, or once per valued prefix."""
        if self.accelerator.unwrap_model(self.discriminator).config.kind == "cnn":
            return torch.ones(len(sequences.ids), device=sequences.ids.device)
        return sequences.mask.sum(1).float()

    def _measure(self, real: Tensor, fake: Tensor, old: Tensor) -> Measures:
        """Measures of log-odds; the accuracy is that of all processes, which must agree on what follows from it."""
        right = torch.stack([(real > 0).float().mean(), (fake <= 0).float().mean()]).mean()
        measures: Measures = {
            "d_accuracy": self.accelerator.reduce(right, "mean"),
            "d_real_probability": real.sigmoid().mean(),
        }
        if len(old):
            measures["d_replay_accuracy"] = (old <= 0).float().mean()
        return measures

    def _descend(self) -> Tensor:
        limit = self.args.d_max_grad_norm or math.inf  # the norm is measured in any case
        norm = self.accelerator.clip_grad_norm_(self.discriminator.parameters(), limit)
        self.optimizer.step()
        return norm.detach()


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
