"""A model of transformers as a policy: its forked states continue as fresh ones do."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from midimamba.modeling.policy import Policy, StockPolicy, as_policy, inference
from midimamba.modeling.sampling import Ending, sample
from support import make_generator

VOCAB = 11


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.5, **shape, **ends)).eval()


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.5, **shape)).eval()


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_reading_in_parts_is_reading_at_once(make: type) -> None:
    model = make()
    policy = as_policy(model)
    assert isinstance(policy, StockPolicy)
    ids = torch.randint(0, VOCAB, (3, 9))
    with inference(policy):
        state = policy.make_state(3, 9)
        for start, stop in ((0, 1), (1, 6), (6, 9)):
            logits = policy.next_logits(ids[:, start:stop], state)
            torch.testing.assert_close(logits, model(ids[:, :stop]).logits[:, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_selected_and_appended_states_are_those_of_their_sequences(make: type) -> None:
    model = make()
    policy = as_policy(model)
    ids, more = torch.randint(0, VOCAB, (3, 5)), torch.randint(0, VOCAB, (4, 1))

    def after(state: object, rows: list[int]) -> None:
        logits = policy.next_logits(more[: len(rows)], state)
        whole = torch.cat([ids[rows], more[: len(rows)]], 1)
        torch.testing.assert_close(logits, model(whole).logits[:, -1], atol=1e-5, rtol=0)

    with inference(policy):
        state = policy.make_state(3)
        policy.next_logits(ids, state)
        before = state.nbytes
        joined = policy.make_state(0, room=4)
        joined.append(state.select(torch.tensor([2, 0])))
        joined.append(state.select(torch.tensor([1, 1])))
        assert joined.nbytes * 3 == before * 4
        after(joined, [2, 0, 1, 1])
        after(state, [0, 1, 2])  # what was selected from it did not touch it
        assert state.nbytes == before * 6 // 5


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_samples_follow_the_distribution(make: type) -> None:
    model, count = make(), 20_000
    torch.manual_seed(0)
    drawn = sample(model, torch.ones(count, 1, dtype=torch.long), 3, Ending())
    with torch.no_grad():
        first = model(torch.ones(1, 1, dtype=torch.long)).logits[0, -1].softmax(-1)
        pairs = torch.tensor([[1, token] for token in range(VOCAB)])
        second = model(pairs).logits[:, -1].softmax(-1)
    expected = (first[:, None] * second).flatten()
    frequencies = torch.bincount(drawn[:, 1] * VOCAB + drawn[:, 2], minlength=VOCAB**2) / count
    assert ((frequencies - expected).abs() <= 6 * (expected * (1 - expected) / count).sqrt() + 1e-6).all()


def test_a_generator_is_a_policy_itself() -> None:
    model = make_generator()
    assert as_policy(model) is model
    assert isinstance(model, Policy)


def test_what_cannot_be_forked_is_refused() -> None:
    stock = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(
        ValueError, match=r"a MambaForCausalLM cannot be sampled from forked states; load a Mamba with"
    ):
        as_policy(stock)
    with pytest.raises(ValueError, match="a Linear is not a policy: it needs the methods make_state and next_logits"):
        as_policy(torch.nn.Linear(2, 2))


def test_the_ending_is_that_of_the_configuration() -> None:
    assert Ending.of(make_gpt2().config) == Ending(None, 0)
    assert Ending.of(GPT2Config(eos_token_id=5)) == Ending(5, 5)  # as `generate` pads
    assert Ending.of(make_generator().config) == Ending(2, 0)
    with pytest.raises(ValueError, match=r"eos_token_id is \[2, 3\]; set it to a single token"):
        Ending.of(LlamaConfig(eos_token_id=[2, 3]))


def test_an_end_closes_a_sequence() -> None:
    over = torch.tensor([False, True, False])
    closed: Tensor = Ending(5, 0).close(torch.tensor([5, 3, 4]), over)
    assert closed.tolist() == [5, 0, 4]
    assert over.tolist() == [True, True, False]
