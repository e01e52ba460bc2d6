"""A whole comparison: a change to the music moves the figures that measure it, and no others."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from symusic import Note, Score, Track
from symusic.core import ScoreTick

from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.packing import BlockCollator
from midimamba.errors import InputError
from midimamba.evaluation import two_sample
from midimamba.evaluation.comparison import (
    Comparison,
    Reference,
    compare,
    first_bars,
    model_figures,
    read_reference,
    to_json,
)
from midimamba.evaluation.comparison_halves import Figure
from midimamba.evaluation.comparison_page import LABELS
from midimamba.evaluation.estimates import Estimate
from midimamba.evaluation.features import opening
from midimamba.evaluation.samples import Samples
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_generator

LENGTH = 48


def song(seed: int) -> ScoreTick:
    """A theme of four bars and its variations, in C, over 24 bars of eight quavers."""
    chance = random.Random(seed)
    scale = (60, 62, 64, 65, 67, 69, 71, 72)
    theme = [chance.choice(scale) for _ in range(32)]
    score, track = Score(480), Track(program=0)
    for bar in range(24):
        for beat in range(8):
            pitch = theme[(8 * bar + beat) % 32] if chance.random() < 0.85 else chance.choice(scale)
            track.notes.append(Note((8 * bar + beat) * 240, 240, pitch, 64))
    score.tracks.append(track)
    return score


def shuffled_bars(score: ScoreTick, seed: int) -> ScoreTick:
    score = score.copy()
    order = random.Random(seed).sample(range(24), 24)
    for note in score.tracks[0].notes:
        note.time = order[note.time // 1920] * 1920 + note.time % 1920
    return score.sort()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    midi = tmp_path_factory.mktemp("songs")
    rows = ["file,split"]
    for seed in range(44):
        song(seed).dump_midi(midi / f"{seed:02d}.mid")
        rows.append(f"{seed:02d}.mid,{'train' if seed < 14 else 'test'}")
    (midi / "manifest.csv").write_text("\n".join(rows))
    tokenize_corpus(str(midi), midi / "data", CorpusOptions(vocab_size=None, num_workers=1))
    return midi / "data"


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return read_reference(str(folder), bars=20)


def run(reference: Reference, scores: list[ScoreTick]) -> Comparison:
    return compare(Samples(scores), reference, LENGTH)


@pytest.fixture(scope="module")
def fresh(reference: Reference) -> Comparison:
    """Songs of the same kind that are not in the corpus."""
    return run(reference, [song(seed) for seed in range(100, 115)])


@pytest.fixture
def quick_token_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not read the accuracy of the token classifier, whose training takes most of a comparison."""
    monkeypatch.setattr(two_sample, "_EPOCHS", 1)


@pytest.mark.slow
def test_music_of_the_same_kind_is_close_to_the_floor(fresh: Comparison) -> None:
    for name, figures in fresh.features.items():
        area = figures.overlapping_area
        assert abs(area.estimate.value - area.floor) < 0.25, name
        if not math.isnan(figures.samples.value):
            assert figures.samples.value == pytest.approx(figures.real.value, abs=0.15)
    assert fresh.figures["frechet_distance"].estimate.value < 3 * fresh.figures["frechet_distance"].floor
    assert fresh.figures["classifier_features_p_value"].estimate.value > 0.05
    assert fresh.figures["classifier_tokens_p_value"].estimate.value > 0.05
    assert fresh.figures["copied_runs_12"].estimate.value < 0.05
    assert fresh.sizes["pieces_per_set"] == 15


def test_every_figure_has_a_label_and_json(fresh: Comparison) -> None:
    assert {*fresh.features, *fresh.figures} <= set(LABELS)
    text = json.dumps(to_json({"features": fresh.features, "figures": fresh.figures}), allow_nan=False)
    assert set(json.loads(text)["figures"]["longest_copy"]) == {"estimate", "floor"}
    assert to_json(Figure(Estimate(1.0, math.nan, 2.0))) == {
        "estimate": {"value": 1.0, "low": None, "high": 2.0},
        "floor": None,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("quick_comparison")
def test_the_same_seed_is_the_same_comparison(reference: Reference) -> None:
    state = torch.get_rng_state()
    first, again = (run(reference, [song(seed) for seed in range(100, 115)]) for _ in range(2))
    assert to_json({"a": again.features, "b": again.figures}) == to_json({"a": first.features, "b": first.figures})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_token_classifier")
def test_shuffled_bars_lose_only_their_structure(reference: Reference, fresh: Comparison) -> None:
    found = run(reference, [shuffled_bars(song(seed), seed) for seed in range(100, 115)])
    for lag in (4, 8, 16):
        name = f"bar_self_similarity_{lag}"
        assert found.features[name].samples.high < fresh.features[name].samples.low
        assert found.features[name].overlapping_area.estimate.value < 0.6
        # A classifier on this feature alone finds them; one on a feature that shuffling keeps does not.
        assert found.features[name].classifier.estimate.low > 0.75 > found.features[name].classifier.floor
    for name in ("scale_consistency", "polyphony", "notes_per_bar", "groove_consistency"):
        assert found.features[name].samples.value == pytest.approx(fresh.features[name].samples.value, abs=0.01)
        assert found.features[name].classifier.estimate.low < 0.6
    assert found.figures["classifier_features_p_value"].estimate.value < 0.001
    assert found.figures["frechet_distance"].estimate.low > fresh.figures["frechet_distance"].estimate.high


@pytest.mark.slow
@pytest.mark.usefixtures("quick_token_classifier")
def test_copies_in_another_key_are_found_as_copies(reference: Reference, fresh: Comparison) -> None:
    found = run(reference, [song(seed).shift_pitch(1) for seed in range(14)])
    for notes in (8, 12, 16):
        assert found.figures[f"copied_runs_{notes}"].estimate.value == 1
        assert found.figures[f"copied_runs_{notes}"].floor < 0.2
    assert found.figures["longest_copy"].estimate.value == 20 * 8
    assert found.features["pitch_class_histogram"].overlapping_area.estimate.value < 0.5
    for name in ("pitch_class_entropy", "scale_consistency", "bar_self_similarity_4", "groove_consistency"):
        assert found.features[name].overlapping_area.estimate.value > 0.6, name


@pytest.mark.slow
@pytest.mark.usefixtures("quick_token_classifier")
def test_a_single_repeated_song_is_found_by_its_diversity(reference: Reference, fresh: Comparison) -> None:
    found = run(reference, [song(100)] * 15)
    assert found.figures["self_bleu_4"].estimate.value == pytest.approx(1)
    assert fresh.figures["self_bleu_4"].estimate.value < 0.97
    assert found.figures["distinct_4"].estimate.value < 0.2 < fresh.figures["distinct_4"].estimate.value
    assert found.features["bar_self_similarity_4"].overlapping_area.estimate.value < 0.75
    for notes in (8, 12):
        assert found.figures[f"copied_runs_{notes}"].estimate.value < 0.1


@pytest.mark.usefixtures("quick_comparison")
def test_unusable_samples_are_counted(reference: Reference) -> None:
    samples = Samples([song(seed) for seed in range(100, 106)], empty=2, refused={"x": "malformed"})
    found = compare(samples, reference, LENGTH)
    assert found.figures["usable_samples"].estimate.value == pytest.approx(6 / 9)
    assert found.figures["empty_samples"].estimate.value == pytest.approx(2 / 9)
    assert found.sizes["pieces_per_set"] == 6


@pytest.mark.usefixtures("quick_comparison")
def test_sequences_too_short_leave_the_figures_of_tokens_undefined(reference: Reference) -> None:
    found = compare(Samples([song(seed) for seed in range(100, 106)]), reference, length=100_000)
    assert math.isnan(found.figures["classifier_tokens"].estimate.value)
    assert not math.isnan(found.figures["classifier_features"].estimate.value)


@pytest.mark.usefixtures("quick_comparison")
def test_a_feature_that_no_sample_has_is_undefined(reference: Reference) -> None:
    found = run(reference, [opening(song(seed), 10) for seed in range(100, 115)])
    missing, there = (found.features[f"bar_self_similarity_{lag}"] for lag in (16, 8))
    assert math.isnan(missing.samples.value)
    assert math.isnan(missing.classifier.estimate.value)
    assert 0 <= there.classifier.estimate.value <= 1


def test_both_sides_are_compared_on_one_grid(reference: Reference) -> None:
    ragged = song(3)
    for note in ragged.tracks[0].notes:
        note.time, note.velocity = note.time + 7, 61
    written, exact = (first_bars(reference.processor, score, 20) for score in (ragged, song(3)))
    assert written is not None
    assert exact is not None
    assert written.ids == exact.ids
    assert written.score.note_num() == 20 * 8
    late = Score(480)
    late.tracks.append(Track())
    late.tracks[0].notes.append(Note(50 * 1920, 240, 60, 64))
    assert first_bars(reference.processor, late, 20) is None


def test_too_few_pieces_are_refused(reference: Reference, corpus: Path) -> None:
    with pytest.raises(InputError, match="4 of 4 samples can be used"):
        run(reference, [song(seed) for seed in range(4)])
    with pytest.raises(InputError, match="the test split holds"):
        read_reference(str(corpus))


@pytest.fixture(scope="module")
def model(reference: Reference) -> MidiMambaForCausalLM:
    return make_generator(vocab_size=reference.processor.vocab_size, pad_token_id=0)


def test_likelihood_by_token_note_and_second_is_of_whole_pieces(
    reference: Reference, model: MidiMambaForCausalLM
) -> None:
    found = model_figures(model, reference.processor, reference, num=4, length=24)
    rows = [torch.tensor([ids]) for ids in reference.rows["input_ids"]]
    collator = BlockCollator.for_processor(reference.processor)
    with torch.no_grad():
        total = sum(model(**collator.separate(ids)).loss.item() * (ids.shape[1] - 1) for ids in rows)
    sizes = {
        "token": sum(ids.shape[1] - 1 for ids in rows),
        "note": 30 * 24 * 8,
        "second": float(np.sum(reference.rows["seconds"])),
    }
    for unit, size in sizes.items():
        estimate = found[f"held_out_nll_per_{unit}"].estimate
        assert estimate.value == pytest.approx(total / size, rel=1e-4)
        assert estimate.low <= estimate.value <= estimate.high


def test_an_untrained_model_breaks_the_grammar_and_real_music_does_not(
    reference: Reference, model: MidiMambaForCausalLM
) -> None:
    found = model_figures(model, reference.processor, reference, num=4, length=24)
    assert found["grammar_errors"].estimate.value > 0.3
    assert found["syntax_errors"].estimate.value > 0.3
    assert found["grammar_errors"].floor == found["syntax_errors"].floor == 0
    assert set(found) <= set(LABELS)


def test_a_model_with_another_tokenizer_is_measured_in_its_own_tokens(reference: Reference) -> None:
    processor = MidiProcessor(build_tokenizer("TSD"))
    found = model_figures(make_generator(vocab_size=processor.vocab_size, pad_token_id=0), processor, reference, 2, 24)
    per_token, per_note = (found[f"held_out_nll_per_{unit}"].estimate.value for unit in ("token", "note"))
    tokens = sum(len(processor.encode(song(seed))) for seed in range(14, 44))
    assert per_note / per_token == pytest.approx(tokens / (30 * 24 * 8), rel=1e-3)
