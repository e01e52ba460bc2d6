"""The temperature that is saved is the one whose music is closest to held-out music, beyond the noise."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.evaluation.features import Vector
from midimamba.tokenization.tokenizer import build_tokenizer
from midimamba.training import temperature
from midimamba.training.temperature import FORM, GROUPS, best_of, choose_temperature, compare_temperatures
from support import make_generator, make_score

SCRIPT = Path(__file__).parents[2] / "training" / "pretrain.py"
REST = tuple(f"feature {index}" for index in range(8))


def features(seed: int, form: float = 0.0, rest: float = 0.0, count: int = 64) -> dict[str, Vector]:
    """Normal numbers, moved by so many standard deviations."""
    random = np.random.default_rng(seed)
    moved = dict.fromkeys(FORM, form) | dict.fromkeys(REST, rest)
    return {name: random.normal(shift, size=(count, 1)) for name, shift in moved.items()}


def music(*given: Any, **options: Any) -> Any:
    found = features(*given, **options)
    count = len(next(iter(found.values())))
    return temperature._Music(found, np.arange(count) * GROUPS // count)


def choose(drawn: dict[float, Any]) -> float:
    return best_of(compare_temperatures(drawn, features(0, count=100)))


@pytest.mark.parametrize("right", [0.7, 0.8, 0.9, 1.0])
def test_the_temperature_of_real_music_is_found(right: float) -> None:
    candidates = (0.7, 0.8, 0.9, 1.0)
    drawn = {each: music(round(10 * each), form=20 * (each - right), rest=5 * (each - right)) for each in candidates}
    assert choose(drawn) == right


def test_form_weighs_as_much_as_all_the_rest() -> None:
    tried = compare_temperatures({0.8: music(1, form=2.0), 1.0: music(2, rest=2.0)}, features(0, count=100))
    assert tried[0].distance == pytest.approx(tried[1].distance, abs=0.05)
    # The mean over all features would say something else.
    assert tried[0].overlapping_area > tried[1].overlapping_area + 0.1
    assert choose({0.8: music(1, rest=1.0), 1.0: music(2, form=2.0)}) == 0.8


@pytest.mark.slow
def test_ties_go_to_the_temperature_nearest_to_1() -> None:
    chosen = [choose({0.8: music(2 * seed + 1), 1.0: music(2 * seed + 2)}) for seed in range(12)]
    assert chosen.count(1.0) >= 9  # six, if the smallest figure decided
    assert choose({0.9: music(1), 1.1: music(1), 1.3: music(1), 0.5: music(1)}) in (0.9, 1.1)


@pytest.mark.slow
def test_the_noise_is_what_repetitions_show() -> None:
    pairs = [
        compare_temperatures({0.8: music(seed, form=0.5), 1.0: music(-seed % 997)}, features(0))
        for seed in range(1, 25)
    ]
    differences = [pair[0].distance - pair[1].distance for pair in pairs]
    errors = [max(row.error for row in pair) for pair in pairs]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(differences), rel=0.5)


def test_a_feature_that_most_pieces_lack_does_not_count() -> None:
    drawn = {0.8: music(1), 1.0: music(2, form=3.0)}
    for each in drawn.values():
        for name in FORM:
            each.features[name][5:] = np.nan
    known = {0.8: music(1), 1.0: music(2, form=3.0)}
    assert compare_temperatures(known, features(0))[1].distance > 0.25
    assert compare_temperatures(drawn, features(0))[1].distance < 0.05


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIECES": 32, "BARS": 3, "MAX_NEW_TOKENS": 40, "LEAST_PIECES": 8}.items():
        monkeypatch.setattr(temperature, name, value)


def corpus_of(pieces: list[list[int]], processor: MidiProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every corpus be one that has nothing but a validation split."""
    rows = Dataset.from_dict({"input_ids": pieces})
    monkeypatch.setattr(temperature, "load_corpus", lambda data: ({"validation": rows}, processor))


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(temperature, "announce", said.append)
    return said


@pytest.fixture
def sharp(processor: MidiProcessor) -> MidiMambaForCausalLM:
    """A generator whose logits are spread wide enough for the temperature to be heard."""
    model = make_generator(vocab_size=processor.vocab_size)
    with torch.no_grad():
        model.backbone.final_norm.get_parameter("weight").mul_(30)
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_generator_that_is_twice_as_sure_is_sampled_at_twice_the_temperature(
    sharp: MidiMambaForCausalLM, processor: MidiProcessor, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = processor(None, return_tensors="pt")
    real = processor.compose(sharp, inputs, bars=3, num=48, seed=9, max_new_tokens=40)
    corpus_of(real.ids.tolist(), processor, monkeypatch)
    with torch.no_grad():
        sharp.backbone.final_norm.get_parameter("weight").mul_(2)
    sharp.train()
    state = torch.get_rng_state()
    assert choose_temperature(sharp, processor, "corpus", [0.7, 2.0, 1.0]) == 2.0
    assert sharp.generation_config.temperature == 2.0
    assert sharp.training
    assert torch.equal(torch.get_rng_state(), state)
    assert [line.split(":")[0] for line in lines[:3]] == ["temperature 0.7", "temperature 1", "temperature 2"]
    assert "temperature is now 2" in lines[3]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["MIDILike", "TSD"])
def test_music_without_grammar_or_without_bars_is_compared_as_well(
    name: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An untrained model seldom writes music by chance, and it may begin late.
    monkeypatch.setattr(temperature, "MAX_NEW_TOKENS", 150)
    monkeypatch.setattr(temperature, "BARS", 64)
    processor = MidiProcessor(build_tokenizer(name))
    model = make_generator(vocab_size=processor.vocab_size)
    corpus_of([processor.encode(make_score(seed, bars=3)) for seed in range(12)], processor, monkeypatch)
    chosen = choose_temperature(model, processor, "corpus", [0.5, 1.0])
    assert chosen in (0.5, 1.0)
    assert model.generation_config.temperature == chosen
    assert len(lines) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("seconds", "tried", "last"),
    [
        (170, ["0.7", "0.9", "1", "1.4"], "the model's own temperature is now"),
        (130, ["0.7", "0.9", "1"], "the model's own temperature is now"),
        (60, [], "no temperature is chosen: there was no time to compare 4 of them"),
        (-1, [], "no temperature is chosen: there was no time to compare 4 of them"),
    ],
)
def test_candidates_for_which_there_is_no_time_are_left_out(
    processor: MidiProcessor,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    tried: list[str],
    last: str,
) -> None:
    """A candidate takes 40 seconds, one for every token, and a trial 2."""
    now = 1000.0
    compose = MidiProcessor.compose

    def composed(self: MidiProcessor, *arguments: Any, **options: Any) -> Any:
        nonlocal now
        now += options["max_new_tokens"]
        return compose(self, *arguments, **options | {"max_new_tokens": 40})

    monkeypatch.setattr(MidiProcessor, "compose", composed)
    monkeypatch.setattr(temperature, "_TRIAL_TOKENS", 2)
    monkeypatch.setattr(temperature, "time", SimpleNamespace(time=lambda: now))
    model = make_generator(vocab_size=processor.vocab_size)
    corpus_of([processor.encode(make_score(seed, bars=3)) for seed in range(12)], processor, monkeypatch)
    choose_temperature(model, processor, "corpus", [0.7, 0.9, 1.0, 1.4], 1000 + seconds)
    assert [line.split()[1][:-1] for line in lines if line.startswith("temperature ")] == tried
    assert lines[-1].startswith(last)
    assert now <= max(1000, 1000 + seconds)
    assert (model.generation_config.temperature is None) == (not tried)
    if len(tried) == 3:
        assert lines[0] == "not compared, because there was no time: temperature 1.4"


@pytest.mark.usefixtures("quick")
def test_too_little_music_changes_nothing_and_says_so(
    processor: MidiProcessor, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_generator(vocab_size=processor.vocab_size)
    corpus_of([processor.encode(make_score(seed, bars=2)) for seed in range(3)], processor, monkeypatch)
    assert choose_temperature(model, processor, "corpus", [0.5, 1.0]) is None
    assert model.generation_config.temperature is None
    corpus_of([], processor, monkeypatch)
    assert choose_temperature(model, processor, "corpus", [0.5, 1.0], until=0) is None
    assert lines == [
        f"no temperature is chosen: the validation split has {count} pieces, and 8 are needed" for count in (3, 0)
    ]


@pytest.mark.slow
def test_the_script_saves_it_and_a_run_killed_meanwhile_chooses_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretrain(*temperatures: float) -> None:
        options = {"data": corpus, "output_dir": tmp_path / "model", "hidden_size": 16, "num_hidden_layers": 1}
        options |= {"sequence_length": 32, "max_steps": 2, "use_cpu": True, "save_steps": 1, "eval_steps": 1}
        options |= {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True}
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        flags += ["--resume_from_checkpoint", "true", "--temperatures", *map(str, temperatures)]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    tried = []

    def choose(model: Any, processor: Any, data: str, candidates: list[float], until: float | None) -> None:
        tried.append((data, candidates, [weight.sum().item() for weight in model.parameters()]))
        if len(tried) == 1:
            raise KeyboardInterrupt
        model.generation_config.temperature = 0.8

    monkeypatch.setattr(temperature, "choose_temperature", choose)
    with pytest.raises(SystemExit):
        pretrain(0.7, 1.0)
    assert not (tmp_path / "model" / "config.json").exists()
    pretrain(0.8, 1.0)
    assert [(data, candidates) for data, candidates, _ in tried] == [
        (str(corpus), [0.7, 1.0]),
        (str(corpus), [0.8, 1.0]),
    ]
    assert tried[0][2] == tried[1][2]  # of the best checkpoint
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.8, 0.95, True)
    with pytest.raises(SystemExit):
        pretrain(0.8, -1)
