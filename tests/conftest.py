"""Settings of all tests: no network, and tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from midimamba import MidiMambaForCausalLM
from support import make_generator

# Tiny tensors gain nothing from a second thread, and lose much when another process keeps its core busy.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> MidiMambaForCausalLM:
    return make_generator()
