# %% [markdown]
# # A discriminator as a reward
#
# A discriminator judges whether a sequence is real music. Its verdict can reward a generator, which is what
# `midimamba tune` does, or it can choose among samples. This notebook trains a discriminator, checks what it knows,
# and uses it in both ways. Everything is tiny, so that it runs in seconds on one processor core.
#
# ## Music, and a generator that has learned nothing
#
# The music is a scale that goes up, from any note. The generator is new, so its samples are noise.

# %%
import torch
from symusic import Note, Score, TimeSignature, Track

from midimamba import MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer


def write_scale(lowest: int) -> Score:
    """Two bars of 4/4."""
    score = Score(480)
    score.time_signatures.append(TimeSignature(0, 4, 4))
    piano = Track(program=0)
    for beat, step in enumerate((0, 2, 4, 5, 7, 9, 11, 12)):
        piano.notes.append(Note(beat * 480, 480, lowest + step, 80))
    score.tracks.append(piano)
    return score


torch.manual_seed(0)
processor = MidiProcessor(build_tokenizer("REMI"), programs=[0])
real = torch.tensor([processor(write_scale(lowest)).input_ids for lowest in range(30, 80)])
generator = MidiMambaForCausalLM(
    MidiMambaConfig(vocab_size=processor.vocab_size, hidden_size=32, num_hidden_layers=2)
).eval()
print(len(real), "pieces of", real.shape[1], "tokens")

# %% [markdown]
# ## Samples
#
# The grammar lets the generator write nothing but valid music. So the discriminator must listen to the music: it
# cannot tell samples by notes that do not exist.

# %%
from midimamba.command_options import SamplingOptions
from midimamba.generation import draw_sequences

options = SamplingOptions(num=50, bars=2, at_most=True, max_new_tokens=real.shape[1] - 1, temperature=1.0, top_p=1.0)
sampled = draw_sequences(generator, processor, options)
fake = torch.full_like(real, processor.pad_token_id)
for row, ids in zip(fake, sampled, strict=True):
    row[: len(ids)] = torch.tensor(ids)[: real.shape[1]]

# %% [markdown]
# ## Train, and check on pieces that it has not seen
#
# A discriminator that does not beat chance on held-out pieces has nothing to teach. AUC is the chance that of two
# pieces the real one gets the higher score: 0.5 is guessing, 1 is always right.

# %%
from midimamba import MidiDiscriminator, MidiDiscriminatorConfig
from midimamba.evaluation.judges import auc
from midimamba.modeling.scoring import score

torch.manual_seed(1)
judge = MidiDiscriminator(
    MidiDiscriminatorConfig(
        kind="cnn", vocab_size=processor.vocab_size, hidden_size=16, filter_sizes=[1, 2, 5], num_filters=[8, 8, 8]
    )
).train()
optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
seen, unseen = slice(0, 50, 2), slice(1, 50, 2)
ids = torch.cat([real[seen], fake[seen]])
labels = torch.cat([torch.ones(25), torch.zeros(25)])
mask = (ids != processor.pad_token_id).long()
for _ in range(40):
    optimizer.zero_grad()
    judge(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    optimizer.step()


def log_odds(ids: torch.Tensor) -> torch.Tensor:
    """Of being real; above 0 means more likely real than not."""
    return score(judge, ids, (ids != processor.pad_token_id).long())


known = auc(log_odds(real[unseen]), log_odds(fake[unseen]))
print(f"AUC on held-out pieces: {known:.2f}")
assert known > 0.9

# %% [markdown]
# The task is easy here, because the generator knows nothing. With a good generator it is hard, and a discriminator
# that merely knows its training music by heart rewards copies. That is why `midimamba tune` watches the
# discriminator on held-out music.
#
# ## As a reward in TRL
#
# `DiscriminatorReward` goes to `reward_funcs` of TRL's `GRPOTrainer` or `RLOOTrainer`. A trainer calls it with
# prompts and completions; here we call it ourselves. It returns a probability for each completion.

# %%
from midimamba.training.reward import DiscriminatorReward

reward = DiscriminatorReward(judge, processor)
prompt = processor.tokenizer.convert_ids_to_tokens(processor.bos_token_id)
completions = [real[1, 1:].tolist(), [token for token in fake[1, 1:].tolist() if token != processor.pad_token_id]]
texts = [processor.tokenizer.decode(ids) for ids in completions]
rewards = reward(prompts=[prompt] * 2, completions=texts, completion_ids=completions)
print(f"real music: {rewards[0]:.2f}, a sample: {rewards[1]:.2f}")
assert rewards[0] > rewards[1]

# %% [markdown]
# ## To choose among samples
#
# Without any training, a discriminator can choose: of several draws, one is taken at random, in proportion to the
# odds that it is real. `midimamba generate --discriminator … --best-of 8` does this.

# %%
from midimamba.generation import choose_scores
from midimamba.modeling.judging import Ensemble, TokenJudge

ensemble = Ensemble([TokenJudge(judge, processor.pad_token_id, processor.eos_token_id)])
options = SamplingOptions(num=2, bars=2, at_most=True, max_new_tokens=64, best_of=8)
chosen = choose_scores(generator, processor, ensemble, options)
print(len(chosen.scores), "pieces; effective sample size", f"{chosen.effective_sample_size:.1f} of 8")
assert len(chosen.scores) == 2
assert 1 <= chosen.effective_sample_size <= 8

# %% [markdown]
# An effective sample size near 8 means that the discriminator finds no difference between the draws. Near 1, a
# single draw has almost all the odds: draw more, or do not trust the choice too much.
#
# ## Before you believe an improvement
#
# Rewards are easily fooled. Train with a reward that knows nothing as well (`--reward constant`, `--reward random`),
# with several seeds, and compare; see [Tuning adversarially](../tuning.md#how-far-to-trust-it).
