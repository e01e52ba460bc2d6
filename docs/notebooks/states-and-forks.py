# %% [markdown]
# # States and forks
#
# What a Mamba remembers of a piece is called its state. Its size does not grow with the piece, and copying it is
# exact. So a generator can try many continuations of one beginning without reading the beginning again. This is what
# makes roll-outs cheap. The models here are tiny and new; the same holds for trained ones.

# %%
import torch

from midimamba import MidiMambaConfig, MidiMambaForCausalLM


def make_model(layout: str) -> MidiMambaForCausalLM:
    """A new model of this layout."""
    torch.manual_seed(0)
    return MidiMambaForCausalLM(
        MidiMambaConfig(layout=layout, vocab_size=100, hidden_size=64, num_hidden_layers=2)
    ).eval()


mamba = make_model("mamba")
piece = torch.randint(3, 100, (1, 2048), generator=torch.Generator().manual_seed(1))

# %% [markdown]
# ## The size of a state
#
# `make_state` gives the state before the first token, and `next_logits` reads tokens onto it. We read 64 tokens,
# then 2,048. The Mamba needs the same memory. A transformer keeps keys and values of every token, so it needs more
# and more.

# %%
sizes = {}
for layout in ("mamba", "transformer"):
    model = make_model(layout)
    for length in (64, 2048):
        state = model.make_state(1)
        with torch.no_grad():
            model.next_logits(piece[:, :length], state)
        sizes[layout, length] = state.nbytes
        print(f"{layout:12} {length:5} tokens: {state.nbytes / 1024:8.1f} KiB")
assert sizes["mamba", 64] == sizes["mamba", 2048]
assert sizes["transformer", 64] < sizes["transformer", 2048]

# %% [markdown]
# With look-back, a model also keeps the tokens that it has read, which is a few bytes per token.
#
# ## A fork is exact
#
# We read a beginning once and fork the state into four. Each fork then reads another continuation. The logits are
# those of a model that reads everything from the start, up to rounding.

# %%
beginning = piece[:, :128]
continuations = torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(2))
with torch.no_grad():
    state = mamba.make_state(1)
    mamba.next_logits(beginning, state)
    forks = state.fork(4)
    forked = mamba.next_logits(continuations, forks)
    afresh = mamba(input_ids=torch.cat([beginning.expand(4, -1), continuations], dim=1)).logits[:, -1]
print(f"largest difference: {(forked - afresh).abs().max():.1e}")
assert torch.allclose(forked, afresh, atol=1e-4)
assert state.seen_tokens == 128  # reading into the forks has not touched the state they come from
assert forks.seen_tokens == 160

# %% [markdown]
# ## Roll-outs
#
# How good is a beginning? Complete it several times and take the mean of what the completions are worth. That is the
# value of an action in SeqGAN. Here the worth is the share of even tokens, which stands for a discriminator's
# verdict.


# %%
@torch.no_grad()
def value_of(beginning: torch.Tensor, completions: int, length: int) -> float:
    """The mean worth of several completions; the beginning is read once."""
    state = mamba.make_state(1)
    mamba.next_logits(beginning[:, :-1], state)
    forks = state.fork(completions)
    token = beginning[:, -1:].expand(completions, 1)
    drawn = []
    for _ in range(length):
        probabilities = mamba.next_logits(token, forks).softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=draw)
        drawn.append(token)
    return (torch.cat(drawn, 1) % 2 == 0).float().mean().item()


draw = torch.Generator().manual_seed(3)
value = value_of(beginning, completions=64, length=16)
print(f"mean worth of 64 completions: {value:.2f}")
assert 0.4 < value < 0.6  # a new model draws all tokens alike

# %% [markdown]
# How much this saves on a model of real size is measured: see [Benchmarks](../benchmarks.md#roll-outs).
