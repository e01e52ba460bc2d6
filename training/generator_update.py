"""The generator's step: REINFORCE or PPO on samples, and what keeps the policy near the music it has learned.

Notation of SeqGAN (arXiv 1609.05473): the policy gradient is that of equation 6.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from midimamba.corpus.packing import IGNORED, BlockCollator
from midimamba.modeling.sampling import Sequences
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.credit import systematic_resampling
from midimamba.training.metrics import Measures, RunningMeans, weighted_mean
from midimamba.training.progress import progress
from midimamba.training.sharding import whole


class Batch(NamedTuple):
    """
    What the generator learns from in a step.

    Args:
        fake (`Sequences` of shape `(batch, time)`): what the generator sampled. Before [`~Batch.resampled`] there may
            be more of them than there is music.
        real (`LongTensor` of shape `(batch, time)`): blocks of music, which may be longer or shorter than the samples.
        advantages (`Tensor` of shape `(batch, actions)`): of the sampled actions, the last tokens of `fake`; 0 on
            padding.
        old (`Tensor` of shape `(batch, actions)`, *optional*): log-probabilities of the actions when they were
            sampled; by default those of the pass.
    """

    fake: Sequences
    real: Tensor
    advantages: Tensor
    old: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Which actions are not padding, `(batch, actions)`."""
        return self.fake.mask[:, -self.advantages.shape[1] :].bool()

    def rows(self, indices: Tensor | slice) -> "Batch":
        """Some of the sequences."""
        old = None if self.old is None else self.old[indices]
        return Batch(self.fake.rows(indices), self.real[indices], self.advantages[indices], old)

    def trimmed(self) -> "Batch":
        """The same without the columns at the end that are padding in every sample. Music keeps its own length."""
        prompt = self.fake.ids.shape[1] - self.advantages.shape[1]
        fake = self.fake.trimmed(prompt + 1)  # a prompt may have all the bars that count
        cut = self.fake.ids.shape[1] - fake.ids.shape[1]
        actions = self.advantages.shape[1] - cut
        old = None if self.old is None else self.old[:, :actions]
        return Batch(fake, self.real, self.advantages[:, :actions], old)

    def resampled(self) -> "Batch":
        """As many samples as there is music, drawn in proportion to the weights that are their advantages, each with
        the mean weight."""
        weights = self.advantages.amax(1)
        rows = systematic_resampling(weights, len(self.real))
        return Batch(self.fake.rows(rows), self.real, weights.mean() * self.valid[rows])

    def split(self, rows: int) -> list["Batch"]:
        """Batches of at most `rows` sequences."""
        return [self.rows(slice(start, start + rows)) for start in range(0, len(self.real), rows)]


class LossTerms(NamedTuple):
    """
    Args:
        loss (`Tensor`): a scalar, with a graph.
        log_probabilities (`Tensor` of shape `(batch, actions)`): of the sampled actions, without a graph.
        measures (`dict[str, Tensor]`): figures of the batch, means but for those in `_max`.
        counts (`dict[str, Tensor]`): how many sequences, actions or tokens each is a mean over.
    """

    loss: Tensor
    log_probabilities: Tensor
    measures: dict[str, Tensor]
    counts: dict[str, Tensor]


class GeneratorLoss:
    """
    The loss of a micro-batch, from one teacher-forced pass. Every term is a sum over time, averaged over the batch.

    Args:
        args (`AdversarialConfig`): the weights of the terms.
        collator (`BlockCollator`): knows where pieces begin in blocks.
        reference (`nn.Module`, *optional*): the frozen pre-trained policy.

    Attributes:
        kl_coef (`float`): the weight of the divergence from the reference, which `kl_target` adapts.
    """

    def __init__(self, args: AdversarialConfig, collator: BlockCollator, reference: nn.Module | None):
        self.args = args
        self.collator = collator
        self.reference = reference
        self.kl_coef = args.kl_coef

    def __call__(self, model: nn.Module, batch: Batch) -> LossTerms:
        """
        Args:
            model (`nn.Module`): the generator, as it is wrapped.
            batch (`Batch`): samples with their advantages, and music.
        """
        of_fake, of_real, labels = self._log_probabilities(model, batch)
        policy = of_fake[:, self.args.prompt_length - 1 :]
        chosen = _chosen(policy, batch.fake.ids[:, self.args.prompt_length :])
        loss, measures = self._policy_loss(chosen, batch)
        with torch.set_grad_enabled(self.args.entropy_coef > 0):
            entropy = entropy_of(policy).masked_fill(~batch.valid, 0)
        measures["entropy"] = _mean(entropy.detach(), batch.valid)
        if self.args.entropy_coef:
            loss = loss - self.args.entropy_coef * entropy.sum(1).mean()
        if self.reference is not None:
            divergences = self._divergences(self.reference, policy, batch).masked_fill(~batch.valid, 0)
            loss = loss + self.kl_coef * divergences.sum(1).mean()
            measures["kl"] = _mean(divergences.detach(), batch.valid)
        counts = dict.fromkeys(measures, batch.valid.sum())
        counts["policy_loss"] = torch.full_like(counts["policy_loss"], len(batch.real))
        if labels is not None:
            likelihood, counts["mle_loss"] = _negative_likelihood(of_real, labels[:, 1:])
            measures["mle_loss"] = likelihood.detach() * len(batch.real) / counts["mle_loss"]
            loss = loss + self.args.mle_weight * likelihood
        return LossTerms(loss, chosen.detach(), measures, counts)

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the model says of samples and of music, each `(batch, time - 1, vocab)` with their own `time`, and the
        music's labels."""
        sequences, extra, labels = batch.fake.ids, {}, None
        lengths = [batch.fake.ids.shape[1], batch.real.shape[1]]
        if self.args.mle_weight:
            music = self.collator.separate(batch.real)
            sequences, labels = _stacked(batch.fake.ids, batch.real), music["labels"]
            if "seq_idx" in music and _separates_documents(model):
                # The sampler's state runs on past a token that begins a piece, in the prompt or drawn. The gradient
                # needs the probabilities it drew from: a sampled sequence is one document.
                extra["seq_idx"] = _stacked(torch.zeros_like(batch.fake.ids), music["seq_idx"])
        logits = model(input_ids=sequences, use_cache=False, **extra).logits[:, :-1]
        rows = len(batch.fake.ids)
        parts = logits.float().split([rows, len(sequences) - rows])
        of_fake, of_real = (part[:, : length - 1] for part, length in zip(parts, lengths, strict=True))
        return (of_fake / self.args.temperature).log_softmax(-1), of_real.log_softmax(-1), labels

    def _policy_loss(self, chosen: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        old, valid = batch.old, batch.valid
        clip = None if self.args.estimator == "distill" else self.args.ppo_clip
        if clip is None:
            loss = reinforce_loss(chosen, batch.advantages)
        else:
            loss = clipped_policy_loss(chosen, chosen.detach() if old is None else old, batch.advantages, clip)
        measures = {"policy_loss": loss.detach()}
        if old is not None and clip is not None:  # in the first pass over a batch all ratios are 1
            log_ratio = (chosen.detach() - old).masked_fill(~valid, 0)
            ratio = log_ratio.exp()
            measures["policy_ratio_max"] = ratio.max()
            measures["clip_fraction"] = _mean(((ratio - 1).abs() > clip).float(), valid)
            # Non-negative and unbiased (J. Schulman, "Approximating KL divergence", 2020: k3).
            measures["approx_kl"] = _mean(ratio - 1 - log_ratio, valid)
        return loss, measures

    def _divergences(self, reference: nn.Module, policy: Tensor, batch: Batch) -> Tensor:
        """KL at every action, `(batch, actions)`: of whole distributions, without the noise of sampled actions."""
        with torch.no_grad():
            logits = reference(input_ids=batch.fake.ids, use_cache=False).logits[:, self.args.prompt_length - 1 : -1]
        return kl_divergence(policy, (logits.float() / self.args.temperature).log_softmax(-1))

    def adapt(self, divergence: float) -> None:
        """After a step, bring the weight of the divergence nearer to what keeps it at `kl_target`."""
        if self.args.kl_target is not None:
            self.kl_coef = adapted_kl_coef(self.kl_coef, divergence, self.args.kl_target)


class GeneratorUpdate:
    """
    Makes the passes over a sampled batch.

    Args:
        loss (`GeneratorLoss`): of a micro-batch.
        args (`AdversarialConfig`): `ppo_epochs`, `mini_batch_size`, `micro_batch_size` and `max_grad_norm`.
        accelerator (`Accelerator`): the trainer's.
        watch (`Callable`): is called with a name and a tensor that must be finite.
    """

    def __init__(
        self,
        loss: GeneratorLoss,
        args: AdversarialConfig,
        accelerator: Accelerator,
        watch: Callable[[str, Tensor], None],
    ):
        self.loss = loss
        self.args = args
        self.accelerator = accelerator
        self.watch = watch

    def __call__(self, model: nn.Module, optimizer: Any, batch: Batch) -> tuple[Tensor, Measures]:
        """Learn from a batch in `ppo_epochs` passes. The optimizer's last step is left to the caller.

        Returns:
            The mean loss of the steps, and the measures of the batch.
        """
        size = self.args.mini_batch_size
        if size is None or size >= len(batch.real):
            steps = self._learn_from_whole(model, optimizer, batch)
        else:
            steps = self._learn_from_parts(model, optimizer, batch, size)
        first, found = None, RunningMeans()
        for terms in steps:
            first = first or terms
            found.add({"loss": terms.loss, **terms.measures})
        assert first is not None  # there is a pass, and music
        means = found.means()
        loss = means.pop("loss")
        measures: Measures = dict(means)
        if "kl" in measures:
            # Of the policy that sampled, and of all processes: they must agree on the next coefficient.
            measures["kl"] = self.accelerator.reduce(torch.as_tensor(first.measures["kl"]), "mean")
            measures["kl_coef"] = self.loss.kl_coef
        return loss, measures

    def _learn_from_whole(self, model: nn.Module, optimizer: Any, batch: Batch) -> Iterator[LossTerms]:
        first = self._accumulate(model, batch)
        yield first
        for _ in range(1, self.args.ppo_epochs):
            self._step(model, optimizer)
            yield self._accumulate(model, batch._replace(old=first.log_probabilities))

    def _learn_from_parts(self, model: nn.Module, optimizer: Any, batch: Batch, size: int) -> Iterator[LossTerms]:
        """A step for every `size` sequences, in an order of their own for every pass. The learning rate falls linearly
        during them, so that a round does not end with the noise of its last steps; the schedule sets it again.

        Distillation draws them in proportion to their weights, which then are all alike: most samples count too little
        for what a pass over them costs.
        """
        distills = self.args.estimator == "distill"
        if not distills:
            batch = batch._replace(old=self._log_probabilities(model, batch))
        rates = [group["lr"] for group in optimizer.param_groups]
        done, steps = 0, self.args.ppo_epochs * math.ceil(len(batch.real) / size)
        for _ in range(self.args.ppo_epochs):
            part = batch.resampled() if distills else batch
            order = torch.randperm(len(batch.real), device=batch.real.device).split(size)
            for rows in progress(order, "generator", self.args):
                if done:
                    self._step(model, optimizer)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - done / steps)
                yield self._accumulate(model, part.rows(rows).trimmed())
                done += 1

    @torch.no_grad()
    def _log_probabilities(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the sampled actions, when they were sampled: `(batch, actions)`."""
        parts = batch.split(self.args.micro_batch_size)
        return torch.cat([self.loss(model, part).log_probabilities for part in parts])

    def _step(self, model: nn.Module, optimizer: Any) -> None:
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or math.inf)
        self.watch("the norm of the gradient", whole(norm))
        optimizer.step()
        model.zero_grad()

    def _accumulate(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Add up the gradient of one teacher-forced pass over a batch, in micro-batches."""
        chunks = batch.split(self.args.micro_batch_size)
        parts, losses = [], []
        for index, chunk in enumerate(chunks):
            is_last = index == len(chunks) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                terms = self.loss(model, chunk)
                share = len(chunk.real) / len(batch.real)
                self.accelerator.backward(terms.loss * share)
            parts.append(terms)
            losses.append(terms.loss.detach() * share)
        self.watch("the loss", torch.stack(losses))
        return LossTerms(
            torch.stack(losses).sum(),
            torch.cat([terms.log_probabilities for terms in parts]),
            weighted_mean([(terms.measures, terms.counts) for terms in parts]),
            {name: torch.stack([terms.counts[name] for terms in parts]).sum() for name in parts[0].counts},
        )


def reinforce_loss(log_probabilities: Tensor, advantages: Tensor) -> Tensor:
    """The negative of the objective whose gradient is SeqGAN's equation 6.

    Args:
        log_probabilities (`Tensor` of shape `(batch, time)`): of the sampled actions, with a graph.
        advantages (`Tensor` of shape `(batch, time)`): constants.

    Returns:
        The sum over time, averaged over the batch, as a scalar.
    """
    return -(log_probabilities * advantages.detach()).sum(1).mean()


def clipped_policy_loss(log_probabilities: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), negative.

    Where the policy is still the one that sampled, the ratio is 1 and the gradient is that of [`reinforce_loss`].

    Args:
        log_probabilities (`Tensor` of shape `(batch, time)`): of the sampled actions, with a graph.
        old (`Tensor` of shape `(batch, time)`): the same under the policy that sampled them, a constant.
        advantages (`Tensor` of shape `(batch, time)`): constants.
        clip (`float`): a ratio beyond `1 ± clip` earns nothing more.

    Returns:
        The sum over time, averaged over the batch, as a scalar.
    """
    ratio = (log_probabilities - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -surrogate.sum(1).mean()


def kl_divergence(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """`KL(p || q)` over the whole vocabulary, `(…,)`, from normalised log-probabilities `(…, vocab)` of p and q."""
    return (log_probabilities.exp() * (log_probabilities - reference)).sum(-1)


def entropy_of(log_probabilities: Tensor) -> Tensor:
    """The entropy in nats, `(…,)`, of distributions with normalised log-probabilities `(…, vocab)`."""
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def adapted_kl_coef(coefficient: float, divergence: float, target: float) -> float:
    """The controller of Ziegler et al. (arXiv 1909.08593, section 2.2): 10 % of the relative error, cut at ±20 %."""
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return coefficient * (1 + 0.1 * error)


def _separates_documents(model: nn.Module) -> bool:
    """Whether a model can keep packed pieces apart. One that cannot reads a block as a single piece."""
    inner: Any = getattr(model, "module", model)  # inside the wrapper of distributed training
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "seq_idx" in inspect.signature(inner.forward).parameters


def _stacked(fake: Tensor, real: Tensor) -> Tensor:
    """Sequences `(n, time)` and `(m, other time)` as `(n + m, longest)`. The shorter ones are filled up on the right,
    which the tokens before do not see."""
    longest = max(fake.shape[1], real.shape[1])
    return torch.cat([F.pad(ids, (0, longest - ids.shape[1])) for ids in (fake, real)])


def _chosen(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    return log_probabilities.gather(-1, tokens[..., None]).squeeze(-1)


def _negative_likelihood(of_real: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over time and averaged over blocks; and the number of tokens."""
    is_target = targets != IGNORED
    loss = -_chosen(of_real, targets.clamp(min=0)).masked_fill(~is_target, 0).sum()
    return loss / len(of_real), is_target.sum()


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of the valid ones among values `(batch, actions)` that are 0 elsewhere."""
    return values.sum() / valid.sum().clamp(min=1)
