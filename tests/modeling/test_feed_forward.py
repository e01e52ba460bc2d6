"""Top-1 experts: the same as one token at a time, with the losses of the papers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from midimamba import MidiMambaConfig, MidiMambaForCausalLM
from midimamba.modeling.feed_forward import SwitchExperts
from support import make_generator

HIDDEN, EXPERTS = 8, 4


def make_experts(**overrides: Any) -> SwitchExperts:
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "moe_intermediate_size": 12}
    experts = SwitchExperts(MidiMambaConfig(layout="moe-mamba", **{**shape, **overrides}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return experts


def states(batch: int = 3, time: int = 11) -> Tensor:
    return torch.randn(batch, time, HIDDEN, generator=torch.Generator().manual_seed(1))


def one_by_one(experts: SwitchExperts, hidden_states: Tensor, capacity: float = math.inf) -> tuple[Tensor, int]:
    """The definition: every token through its own expert, the expert's first `capacity` tokens only."""
    outputs, taken, dropped = [], [0] * len(experts.down_proj), 0
    for token in hidden_states.flatten(0, 1):
        probabilities = F.softmax(experts.router.weight @ token, dim=0)
        chosen = int(probabilities.argmax())
        if taken[chosen] >= capacity:
            dropped += 1
            outputs.append(torch.zeros_like(token))
            continue
        taken[chosen] += 1
        gate, up = (token @ experts.gate_up_proj[chosen]).chunk(2)
        outputs.append(probabilities[chosen] * ((F.silu(gate) * up) @ experts.down_proj[chosen]))
    return torch.stack(outputs).view_as(hidden_states), dropped


@pytest.mark.parametrize("shape", [(3, 11), (1, 1), (2, 1), (1, 40)])
def test_evaluation_drops_no_token(shape: tuple[int, int]) -> None:
    experts = make_experts(capacity_factor=0.25).eval()
    hidden_states = states(*shape)
    outputs, (_, _, dropped) = experts(hidden_states)
    torch.testing.assert_close(outputs, one_by_one(experts, hidden_states)[0])
    assert dropped == 0


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.8, EXPERTS])
def test_training_drops_exactly_what_overflows(factor: float) -> None:
    experts = make_experts(capacity_factor=factor).train()
    capacity = math.ceil(factor * 33 / EXPERTS)
    outputs, (_, _, share) = experts(states())
    expected, dropped = one_by_one(experts, states(), capacity)
    torch.testing.assert_close(outputs, expected)
    assert share.item() == pytest.approx(dropped / 33)
    assert (dropped > 0) == (factor < 1)


@pytest.mark.parametrize("factor", [0.5, EXPERTS])
def test_gradients_are_those_of_one_token_at_a_time(factor: float) -> None:
    experts = make_experts(capacity_factor=factor).double().train()
    hidden_states = states().double().requires_grad_()
    outputs, (balance, _, _) = experts(hidden_states)
    variables = [hidden_states, *experts.parameters()]
    ours = torch.autograd.grad(outputs.square().sum(), variables, retain_graph=True)
    expected, _ = one_by_one(experts, hidden_states, math.ceil(factor * 33 / EXPERTS))
    theirs = torch.autograd.grad(expected.square().sum(), variables)
    for mine, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, theirs_)
    assert torch.autograd.grad(balance, experts.router.weight)[0].abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_padding_is_no_token(training: bool) -> None:
    experts = make_experts(capacity_factor=1.0).train(training)
    hidden_states = states()
    real = torch.ones(3, 11, 1)
    real[0, :5] = real[2, 7:] = 0
    outputs, statistics = experts(hidden_states, real)
    kept = real[..., 0].bool()
    expected, expected_statistics = experts(hidden_states[kept][None])
    torch.testing.assert_close(outputs[kept], expected[0])
    torch.testing.assert_close(statistics, expected_statistics)
    assert not outputs[~kept].any()


def test_even_routing_has_a_balance_loss_of_one() -> None:
    experts = make_experts(hidden_size=EXPERTS, moe_intermediate_size=2)
    with torch.no_grad():
        experts.router.weight.copy_(3 * torch.eye(EXPERTS))
    _, (balance, _, _) = experts(torch.eye(EXPERTS)[None].repeat(2, 5, 1))
    assert balance.item() == pytest.approx(1)


def test_routing_to_one_expert_has_the_number_of_experts_as_balance_loss() -> None:
    experts = make_experts(hidden_size=EXPERTS, moe_intermediate_size=2)
    with torch.no_grad():
        experts.router.weight.zero_()[2] = 50
    _, (balance, _, _) = experts(torch.ones(2, 5, EXPERTS))
    assert balance.item() == pytest.approx(EXPERTS)


def test_balance_loss_is_shares_times_mean_probabilities() -> None:
    """Three tokens to one of two experts, one to the other, at probabilities 3/4 and 1/4."""
    experts = make_experts(hidden_size=2, num_experts=2, moe_intermediate_size=2)
    with torch.no_grad():
        experts.router.weight.copy_(math.log(3) / 2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    _, (balance, z_loss, _) = experts(torch.tensor([[[1.0, 0.0]] * 3 + [[0.0, 1.0]]]))
    shares, means = (3 / 4, 1 / 4), ((3 * 3 / 4 + 1 / 4) / 4, (3 * 1 / 4 + 3 / 4) / 4)
    assert balance.item() == pytest.approx(2 * (shares[0] * means[0] + shares[1] * means[1]))
    assert z_loss.item() == pytest.approx(math.log(math.sqrt(3) + 1 / math.sqrt(3)) ** 2)


def test_z_loss_of_equal_logits_is_the_squared_logarithm_of_their_number() -> None:
    experts = make_experts()
    with torch.no_grad():
        experts.router.weight.zero_()
    _, (_, z_loss, _) = experts(states())
    assert z_loss.item() == pytest.approx(math.log(EXPERTS) ** 2)


def test_the_router_computes_in_float32() -> None:
    """Logits that bfloat16 cannot tell apart still choose the larger."""
    hidden_states = torch.tensor([[[100.0, 0.25]]], dtype=torch.bfloat16)
    for larger in (0, 1):
        experts = make_experts(hidden_size=2, num_experts=2, moe_intermediate_size=2).to(torch.bfloat16).eval()
        with torch.no_grad():
            experts.router.weight.fill_(1.0)[1 - larger, 1] = 0.9921875
            experts.down_proj[1 - larger].zero_()
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                assert experts(hidden_states)[0].any()


def test_losses_enter_the_loss_in_training_only() -> None:
    model = make_generator(layout="moe-mamba", router_aux_loss_coef=0.3, router_z_loss_coef=0.07, capacity_factor=8)
    ids = torch.randint(0, 11, (3, 20), generator=torch.Generator().manual_seed(1))
    likelihood = model(ids, labels=ids).loss
    output = model.train()(ids, labels=ids)
    torch.testing.assert_close(output.loss, likelihood + 0.3 * output.aux_loss + 0.07 * output.z_loss)
    assert output.aux_loss.requires_grad
    assert not output.dropped_tokens.requires_grad


@pytest.mark.parametrize("layout", ["moe-mamba", "transformer-moe"])
def test_padding_has_no_part_in_the_losses_of_a_model(layout: str) -> None:
    model = make_generator(layout=layout, capacity_factor=0.75).train()
    ids = torch.randint(1, 11, (1, 20), generator=torch.Generator().manual_seed(1))
    alone = model(ids)
    padded = model(F.pad(ids, (30, 0)), attention_mask=F.pad(torch.ones_like(ids), (30, 0)))
    torch.testing.assert_close(padded.logits[:, 30:], alone.logits, atol=1e-5, rtol=0)
    for name in ("aux_loss", "z_loss", "dropped_tokens"):
        torch.testing.assert_close(padded[name], alone[name])
    assert alone.dropped_tokens > 0


def test_losses_are_means_over_layers() -> None:
    model = make_generator(layout="transformer-moe", num_hidden_layers=3)
    seen = []
    for experts in model.modules():
        if isinstance(experts, SwitchExperts):
            experts.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    output = model(torch.randint(0, 11, (3, 20), generator=torch.Generator().manual_seed(1)))
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(torch.stack([output.aux_loss, output.z_loss, output.dropped_tokens]), mean)


def test_micro_batches_add_up_to_a_weighted_mean_of_their_losses() -> None:
    """As `Trainer` accumulates: the sum over micro-batches, each told the targets of the whole step."""
    model = make_generator(layout="moe-mamba", router_aux_loss_coef=1.0, router_z_loss_coef=0.0, capacity_factor=8)
    model.train()
    ids = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[2:, 5:] = -100
    targets = (labels[:, 1:] != -100).sum()
    total, expected = 0.0, 0.0
    for part in (slice(0, 2), slice(2, 4)):
        output = model(ids[part], labels=labels[part], num_items_in_batch=targets)
        total += output.loss
        alone = model(ids[part], labels=labels[part])
        expected += alone.loss * (labels[part, 1:] != -100).sum() / targets
    torch.testing.assert_close(total, expected)


def test_experts_begin_like_the_projections_around_them() -> None:
    torch.manual_seed(0)
    model = MidiMambaForCausalLM(MidiMambaConfig(layout="transformer-moe", num_hidden_layers=1, hidden_size=64))
    (experts,) = (module for module in model.modules() if isinstance(module, SwitchExperts))
    for weights in (experts.gate_up_proj, experts.down_proj, experts.router.weight):
        assert weights.std().item() == pytest.approx(0.02, rel=0.1)
