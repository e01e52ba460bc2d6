"""The generator's loss: REINFORCE or PPO on samples, and what holds the policy to the music it has learned."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from midimamba.corpus.packing import IGNORED, BlockCollator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.training import credit
from midimamba.training.adversarial_config import AdversarialConfig


class LossTerms(NamedTuple):
    """
    Args:
        loss (`Tensor`): scalar, with a graph.
        log_probabilities (`Tensor` of shape `(batch, actions)`): of the sampled actions, without a graph.
        divergence (`Tensor`): KL(policy ‖ reference) in nats a token; 0 without a reference.
    """

    loss: Tensor
    log_probabilities: Tensor
    divergence: Tensor


class Batch(NamedTuple):
    """
    What the generator learns from in a step: the arguments of [`GeneratorLoss`], a row for each sequence.

    Args:
        fake (`LongTensor` of shape `(batch, time)`): sampled sequences.
        real (`LongTensor` of shape `(batch, time)`): blocks of music.
        advantages (`Tensor` of shape `(batch, actions)`): of the sampled actions, the last tokens of `fake`.
        old (`Tensor` of shape `(batch, actions)`, *optional*): log-probabilities of the actions when they were
            sampled; by default those of the pass.
        valid (`BoolTensor` of shape `(batch, actions)`, *optional*): which actions are no padding; by default all.
        behaviour (`Tensor` of shape `(batch, actions)`, *optional*): log-probabilities of the actions under the policy
            that drew them, if that is not the generator itself.
    """

    fake: Tensor
    real: Tensor
    advantages: Tensor
    old: Tensor | None = None
    valid: Tensor | None = None
    behaviour: Tensor | None = None

    def split(self, rows: int) -> list["Batch"]:
        """Batches of so many rows; the last may have fewer."""
        starts = range(0, len(self.fake), rows)
        return [Batch(*(None if p is None else p[start : start + rows] for p in self)) for start in starts]  # type: ignore[arg-type]


class GeneratorLoss:
    """
    The loss of a micro-batch, from one teacher-forced pass. Every term is a sum over time, averaged over the batch.

    Args:
        args (`AdversarialConfig`): the weights of the terms.
        collator (`BlockCollator`): knows where pieces begin in blocks.
        reference (`MidiMambaForCausalLM`, *optional*): the frozen pre-trained policy.
        metrics (`dict[str, list[float]]`): a call appends what it measures.

    Attributes:
        kl_coef (`float`): the weight of the divergence from the reference, which `kl_target` adapts.
    """

    def __init__(
        self,
        args: AdversarialConfig,
        collator: BlockCollator,
        reference: MidiMambaForCausalLM | None,
        metrics: dict[str, list[float]],
    ):
        self.args = args
        self.collator = collator
        self.reference = reference
        self.kl_coef = args.kl_coef
        self._metrics = metrics

    def __call__(
        self,
        model: nn.Module,
        mle_weight: float,
        fake: Tensor,
        real: Tensor,
        advantages: Tensor,
        old: Tensor | None = None,
        valid: Tensor | None = None,
        behaviour: Tensor | None = None,
    ) -> LossTerms:
        """
        Args:
            model (`nn.Module`): the generator, as it is wrapped.
            mle_weight (`float`): of the likelihood of the blocks; at 0 they are not read.
            fake, real, advantages, old, valid, behaviour (`Tensor`): a [`Batch`]. Advantages of padding are 0.
        """
        sequences, seq_idx, labels = fake, None, None
        if mle_weight:
            music = self.collator.separate(real)
            sequences, labels = torch.cat([fake, real]), music["labels"]
            if "seq_idx" in music:
                # The sampler's state runs on past a token that begins a piece, in the prompt or drawn. The gradient
                # needs the probabilities it drew from: a sampled sequence is one document.
                seq_idx = torch.cat([torch.zeros_like(fake), music["seq_idx"]])
        logits = model(input_ids=sequences, use_cache=False, seq_idx=seq_idx).logits[:, :-1]
        of_fake, of_real = logits.float().log_softmax(-1).split([len(fake), len(sequences) - len(fake)])
        policy = of_fake[:, self.args.prompt_length - 1 :]
        chosen = _chosen(policy, fake[:, self.args.prompt_length :])
        if behaviour is not None:
            advantages = advantages * self._importance_weights(chosen.detach() if old is None else old, behaviour)
        loss = self._policy_loss(chosen, advantages, old, valid)
        entropy = self._entropy(policy, valid)
        if self.args.entropy_coef:
            loss = loss - self.args.entropy_coef * entropy.sum(1).mean()
        divergence = torch.zeros_like(loss.detach())
        if self.reference is not None:
            divergences = _without_padding(self._divergences(self.reference, policy, fake), valid)
            loss = loss + self.kl_coef * divergences.sum(1).mean()
            divergence = _mean(divergences.detach(), valid)
        if labels is not None:
            loss = loss + mle_weight * self._negative_likelihood(of_real, labels[:, 1:])
        return LossTerms(loss, chosen.detach(), divergence)

    def adapt(self, divergence: float) -> None:
        """Log the divergence of a step, in nats a token, and the weight it was taken with; then adapt the weight."""
        self._metrics["kl"].append(divergence)
        self._metrics["kl_coef"].append(self.kl_coef)
        if self.args.kl_target is not None:
            self.kl_coef = credit.adapted_kl_coef(self.kl_coef, divergence, self.args.kl_target)

    def _importance_weights(self, policy: Tensor, behaviour: Tensor) -> Tensor:
        weights = credit.importance_weights(policy, behaviour, self.args.importance_clip)
        self._metrics["importance_weight_max"].append(weights.max().item())
        self._metrics["importance_clip_fraction"].append((weights >= self.args.importance_clip).float().mean().item())
        return weights

    def _policy_loss(self, chosen: Tensor, advantages: Tensor, old: Tensor | None, valid: Tensor | None) -> Tensor:
        if self.args.ppo_clip is None:
            loss = credit.reinforce_loss(chosen, advantages)
        else:
            loss = credit.clipped_policy_loss(
                chosen, chosen.detach() if old is None else old, advantages, self.args.ppo_clip
            )
        self._metrics["policy_loss"].append(loss.item())
        if old is not None and self.args.ppo_clip is not None:
            # The first pass over a batch has nothing to tell: all its ratios are 1.
            log_ratio = _without_padding(chosen.detach() - old, valid)
            ratio = log_ratio.exp()
            self._metrics["policy_ratio_max"].append(ratio.max().item())
            is_clipped = ((ratio - 1).abs() > self.args.ppo_clip).float()
            self._metrics["clip_fraction"].append(_mean(is_clipped, valid).item())
            # Non-negative and unbiased (J. Schulman, "Approximating KL divergence", 2020: k3).
            self._metrics["approx_kl"].append(_mean(ratio - 1 - log_ratio, valid).item())
        return loss

    def _entropy(self, policy: Tensor, valid: Tensor | None) -> Tensor:
        with torch.set_grad_enabled(self.args.entropy_coef > 0):
            entropy = _without_padding(credit.entropy(policy), valid)
        self._metrics["entropy"].append(_mean(entropy.detach(), valid).item())
        return entropy

    def _divergences(self, reference: MidiMambaForCausalLM, policy: Tensor, fake: Tensor) -> Tensor:
        """KL at every action, `(batch, actions)`: of whole distributions, without the noise of sampled actions."""
        with torch.no_grad():
            logits = reference(input_ids=fake, use_cache=False).logits[:, self.args.prompt_length - 1 : -1]
        return credit.kl_divergence(policy, logits.float().log_softmax(-1))

    def _negative_likelihood(self, of_real: Tensor, targets: Tensor) -> Tensor:
        is_target = targets != IGNORED
        loss = -_chosen(of_real, targets.clamp(min=0)).masked_fill(~is_target, 0).sum()
        self._metrics["mle_loss"].append((loss / is_target.sum()).item())
        return loss / len(of_real)


def _chosen(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    return log_probabilities.gather(-1, tokens[..., None]).squeeze(-1)


def _without_padding(values: Tensor, valid: Tensor | None) -> Tensor:
    return values if valid is None else values.masked_fill(~valid, 0)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of the valid ones among values `(batch, actions)` that are 0 elsewhere."""
    return values.mean() if valid is None else values.sum() / valid.sum()
