# %% [markdown]
# # From a folder of MIDI to music
#
# This notebook goes the whole way once: a folder of MIDI files becomes a corpus, the corpus trains a generator, and
# the generator writes new pieces. Everything is tiny, so that it runs in seconds on one processor core. For your own
# music two commands do the same, only better; see [Your music](../your-music.md).
#
# ## A folder of MIDI files
#
# Use your own folder if you have one. Here we write one: sixty short tunes for piano, made of a scale and a few
# steps.

# %%
import random
import tempfile
from pathlib import Path

from symusic import Note, Score, TimeSignature, Track

here = Path(tempfile.mkdtemp())
(here / "music").mkdir()

SCALE = [60, 62, 64, 65, 67, 69, 71, 72]


def write_tune(seed: int) -> Score:
    """Eight bars of 4/4; the first four come back."""
    dice = random.Random(seed)
    place, pitches = dice.randrange(8), []
    for _ in range(16):
        place = min(max(place + dice.choice((-2, -1, 1, 2)), 0), 7)
        pitches.append(SCALE[place])
    score = Score(480)
    score.time_signatures.append(TimeSignature(0, 4, 4))
    piano = Track(program=0)
    for beat, pitch in enumerate(pitches + pitches):
        piano.notes.append(Note(beat * 480, 480, pitch, 80))
    score.tracks.append(piano)
    return score


for seed in range(60):
    write_tune(seed).dump_midi(here / "music" / f"{seed}.mid")

# %% [markdown]
# ## A corpus
#
# `tokenize_corpus` is what `midimamba tokenize` runs. It reads every file, learns a vocabulary, and puts each piece
# into one of three splits: for training, for validation, and for the final test.

# %%
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions

report = tokenize_corpus(str(here / "music"), here / "data", CorpusOptions(vocab_size=720, num_workers=1))
for split, counts in report["splits"].items():
    print(split, counts)

# %% [markdown]
# A piece is a list of ids, and the processor turns ids back into music.

# %%
from midimamba.corpus.load import load_corpus

splits, processor = load_corpus(str(here / "data"))
piece = splits["train"]["input_ids"][0]
print(len(piece), "ids:", piece[:12])
print(processor.decode(piece))

# %% [markdown]
# ## A generator
#
# A small Mamba that also sees what followed the same place one, two and four bars ago. It learns to predict the next
# id. `midimamba train` does this with a measured recipe, checkpoints and held-out music.

# %%
import torch
from torch.nn.utils.rnn import pad_sequence

from midimamba import MidiMambaConfig, MidiMambaForCausalLM
from midimamba.training.scripts import look_back_fields

torch.manual_seed(0)
config = MidiMambaConfig(
    vocab_size=processor.vocab_size,
    hidden_size=48,
    num_hidden_layers=2,
    **look_back_fields([1, 2, 4], processor),
)
model = MidiMambaForCausalLM(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def to_batch(pieces: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and the same as labels, in which -100 stands for padding."""
    rows = [torch.tensor(piece) for piece in pieces]
    return pad_sequence(rows, batch_first=True), pad_sequence(rows, batch_first=True, padding_value=-100)


@torch.no_grad()
def held_out_loss() -> float:
    """Nats per token on pieces that are not trained on."""
    ids, labels = to_batch(splits["validation"]["input_ids"])
    return model.eval()(input_ids=ids, labels=labels).loss.item()


before = held_out_loss()
dice = random.Random(0)
for _ in range(60):
    ids, labels = to_batch(dice.sample(list(splits["train"]["input_ids"]), 8))
    optimizer.zero_grad()
    model.train()(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
after = held_out_loss()
print(f"held-out loss: {before:.2f} before, {after:.2f} after")
assert after < before

# %% [markdown]
# ## New music
#
# `generate_scores` is what `midimamba generate` runs. The grammar makes every piece valid music, with exactly the
# bars that are asked for, and with no instrument that the training music does not have.

# %%
from midimamba.command_options import SamplingOptions
from midimamba.generation import generate_scores

pieces = generate_scores(model.eval(), processor, SamplingOptions(num=2, bars=8, temperature=0.8))
for index, score in enumerate(pieces):
    score.dump_midi(here / f"new-{index}.mid")
    print(here / f"new-{index}.mid", "has", score.note_num(), "notes")
    assert {track.program for track in score.tracks} == {0}

# %% [markdown]
# ## Keep it
#
# A generator and its processor go into one folder. Every command takes this folder as a model: `midimamba generate
# my-model --num 4 --bars 16 --out samples`.

# %%
import midimamba

model.save_pretrained(here / "my-model")
processor.save_pretrained(here / "my-model")
again = midimamba.load(str(here / "my-model"))
ids = torch.tensor([piece])
assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
