"""The names that a user chooses from. This module imports nothing, so that `--help` can list them at once."""

# Tokenizations whose pieces are one sequence of ids, which the language models read.
ONE_STREAM = ("REMI", "TSD", "MIDILike", "Structured", "PerTok", "MMM", "BEAT")
# Tokenizations that write several ids per step, each from a vocabulary of its own.
MULTI_VOCABULARY = ("CPWord", "Octuple", "MuMIDI")
TOKENIZATIONS = ONE_STREAM + MULTI_VOCABULARY

SUBWORD_MODELS = ("BPE", "Unigram")

# Controls that are computed from a score.
CONTROLS = ("instruments", "tempo", "density", "key", "meter", "bars")
