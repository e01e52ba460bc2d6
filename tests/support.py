"""Makers of tiny models and of music, and the command, for all tests."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from symusic import Note, Score, Tempo, TimeSignature, Track
from symusic.core import ScoreTick
from torch import Tensor, nn

from midimamba import MidiDiscriminator, MidiDiscriminatorConfig, MidiMambaConfig, MidiMambaForCausalLM
from midimamba.cli import main

# What the fixture `notes` is: sorted (program, drums, pitch, onset, duration), times in twelfths of a quarter note.
Notes = Callable[[ScoreTick], list[tuple[int, bool, int, int, int]]]

TICKS_PER_QUARTER = 480
GRID = TICKS_PER_QUARTER // 12  # the finest position of the tokenizer in quarter-note meters


def make_generator(**overrides: Any) -> MidiMambaForCausalLM:
    """A tiny generator with every parameter moved off its initial value, so that no term is zero by construction."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model = MidiMambaForCausalLM(MidiMambaConfig(**options | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gradients_of(model: nn.Module) -> list[Tensor]:
    """A copy of the gradient of every parameter; each has one."""
    gradients = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        gradients.append(parameter.grad.clone())
    return gradients


def make_discriminator(kind: str = "cnn", **overrides: Any) -> MidiDiscriminator:
    """A tiny discriminator over the vocabulary of `make_generator`."""
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 16,
        "filter_sizes": [1, 2, 5],
        "num_filters": [8, 8, 8],
    }
    return MidiDiscriminator(MidiDiscriminatorConfig(**{"kind": kind} | options | overrides)).eval()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `midimamba` with these arguments and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["midimamba", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def make_score(seed: int, bars: int = 6, programs: tuple[int, ...] = (0, 40, 73), drums: bool = True) -> ScoreTick:
    """A random score on the tokenizer's grid, without overlaps of one pitch and with meters of quarters, so that only
    velocity is rounded."""
    rng = random.Random(seed)
    score = Score(TICKS_PER_QUARTER)
    beats = [rng.choice((2, 3, 4, 5)) for _ in range(bars)]
    starts = [sum(beats[:bar]) * TICKS_PER_QUARTER for bar in range(bars)]
    for bar, start in enumerate(starts):
        if bar == 0 or beats[bar] != beats[bar - 1]:
            score.time_signatures.append(TimeSignature(start, beats[bar], 4))
        if bar % 3 == 0:
            score.tempos.append(Tempo(start, rng.choice((60.0, 90.0, 120.0, 200.0))))
    parts = [Track(program=program) for program in programs]
    if drums:
        parts.append(Track(program=0, is_drum=True))
    for track in parts:
        for bar, start in enumerate(starts):
            if bar and rng.random() < 0.2:
                continue  # a silent bar
            for _ in range(rng.randint(1, 5)):
                time = start + rng.randrange(beats[bar] * 12) * GRID
                for pitch in rng.sample(range(128), rng.choice((1, 1, 3))):
                    note = Note(time, rng.randint(1, 48) * GRID, pitch, rng.randint(1, 127))
                    others = (other for other in track.notes if other.pitch == pitch)
                    if all(other.end <= note.time or note.end <= other.time for other in others):
                        track.notes.append(note)
        score.tracks.append(track)
    return score


def teach(model: Path, data: Path, folder: Path) -> Path:
    """A copy of a generator that has learned to write notes: judges of musical features need some to hear."""
    shutil.copytree(model, folder)
    generator = MidiMambaForCausalLM.from_pretrained(model).train()
    ids = torch.tensor([piece[:64] for piece in load_from_disk(str(data))["train"]["input_ids"]])
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        generator(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    generator.save_pretrained(folder)
    return folder
