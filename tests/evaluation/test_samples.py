"""Samples are drawn, read and decoded, and those that cannot be used are counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from symusic import Score

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.errors import InputError
from midimamba.evaluation.samples import Samples, decode_all, fresh_samples, read_folder, until_end
from midimamba.modeling.sampling import Ending, sample
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_generator, make_score


def test_fresh_samples_continue_their_prompts_and_leave_the_global_random_state(
    generator: MidiMambaForCausalLM,
) -> None:
    prompts = torch.randint(3, 11, (20, 2))
    state = torch.get_rng_state()
    drawn = fresh_samples(generator, prompts, 9, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.shape == (20, 9)
    assert torch.equal(drawn[:, :2], prompts)
    assert torch.equal(drawn, fresh_samples(generator, prompts, 9, seed=3))
    assert not torch.equal(drawn, fresh_samples(generator, prompts, 9, seed=4))


def test_fresh_samples_are_those_of_sampling_in_batches() -> None:
    generator = make_generator(pad_token_id=0)
    prompts = torch.ones(18, 1, dtype=torch.long)
    drawn = fresh_samples(generator, prompts, 12, seed=1, ending=Ending(2), temperature=2.0)
    torch.manual_seed(1)
    parts = [sample(generator, rows, 12, Ending(2), 2.0) for rows in prompts.split(16)]
    assert torch.equal(drawn, torch.cat(parts))
    assert (drawn == 0).any()  # some sequences have ended, and are padded


def test_a_sequence_ends_with_its_end_token() -> None:
    assert until_end([1, 5, 6, 2, 0, 0], 2) == [1, 5, 6, 2]
    assert until_end([1, 5, 6], 2) == [1, 5, 6]


def test_sequences_without_notes_are_counted_as_empty(processor: MidiProcessor) -> None:
    samples = decode_all(processor, [processor.encode(make_score(0)), [processor.bos_token_id], []])
    assert (len(samples.scores), samples.empty, samples.refused, samples.total) == (1, 2, {}, 3)


def test_sequences_that_are_not_music_are_refused_with_a_reason() -> None:
    processor = MidiProcessor(build_tokenizer("Octuple"))
    steps: Any = [[7] * len(processor.midi_tokenizer.vocab)] * 3  # several ids per step
    samples = decode_all(processor, [steps])
    assert list(samples.refused) == ["sequence 0"] or samples.total == 1


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    make_score(0).dump_midi(tmp_path / "deep" / "good.MID")
    Score(480).dump_midi(tmp_path / "silent.mid")
    (tmp_path / "broken.mid").write_bytes(b"MThd nonsense")
    (tmp_path / "notes.txt").write_text("no music")
    samples = read_folder(tmp_path)
    assert (len(samples.scores), samples.empty, samples.total) == (1, 1, 3)
    assert list(samples.refused) == ["broken.mid"]


def test_a_folder_without_midi_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a generator"):
        read_folder(tmp_path)


def test_impossible_times_are_refused_not_raised() -> None:
    score = make_score(0)
    score.ticks_per_quarter = 0
    samples = Samples()
    samples.add("x", score)
    assert "division" in samples.refused["x"]
