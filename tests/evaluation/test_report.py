"""A report of a tiny, but real, run folder."""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from symusic import Note, Score, Track

from midimamba import MidiMambaForCausalLM
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import load_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from midimamba.evaluation.features import measure, opening
from midimamba.evaluation.judges import Ensemble, fit_musical, load_judges
from midimamba.evaluation.report import main, write_report
from midimamba.evaluation.report_page import CONTROLS_OF_DISTILLATION, MUSIC, Report, interpretation
from midimamba.hub_cards.evaluation import read_evaluation
from midimamba.training.adversarial_config import AdversarialConfig
from support import make_discriminator, make_generator, make_score

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LENGTH = 24
SMALL = {"num_samples": 8, "num_pieces": 2}


def write_midi(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    score = Score(480)
    track = Track(program=0)
    for start in range(80):
        track.notes.append(Note(start * 240, 240, chance.randrange(55, 80), chance.randrange(40, 110)))
    score.tracks.append(track)
    score.dump_midi(path)


def write_log(folder: Path, *rows: dict[str, float]) -> None:
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    midi = tmp_path_factory.mktemp("midi")
    for seed in range(6):
        write_midi(midi / f"{seed}.mid", seed)
    tokenize_corpus(str(midi), run / "data", CorpusOptions(vocab_size=None, num_workers=1))
    vocab_size = load_corpus(run / "data")[1].vocab_size
    make_generator(vocab_size=vocab_size).save_pretrained(run / "pretrained")
    make_generator(vocab_size=vocab_size, num_hidden_layers=1).save_pretrained(run / "generator")
    make_discriminator(vocab_size=vocab_size).save_pretrained(run / "generator-discriminator")
    options = AdversarialConfig(str(run / "generator"), sequence_length=LENGTH, prompt_length=2, report_to="none")
    (run / "generator" / "training_args.json").write_text(json.dumps(options.to_dict(), default=str))
    write_log(run / "pretrained", {"step": 0, "eval_loss": 6.0}, {"step": 10, "eval_loss": 3.0, "loss": 3.0})
    measured = {f"eval_distinct_{n}": 0.2 * n for n in (1, 2, 3, 4)} | {"eval_d_accuracy_real": 0.9}
    write_log(
        run / "generator",
        {"step": 1, "loss": 1.0, "d_loss": 0.6, "d_accuracy": 0.7, "reward": 0.4, "entropy": 2.0},
        {"step": 2, "eval_loss": 3.1, "eval_self_bleu_4": 0.5, "eval_d_accuracy_fake": 0.6, **measured},
    )
    (run / "samples").mkdir()
    for name in ("sample-00.mid", "sample-00.png", "sample-00.wav", "sample-01.png", "sample-01.mp3"):
        (run / "samples" / name).write_bytes(b"")
    return run


@pytest.fixture(scope="module")
def report(finished_run: Path) -> Report:
    return write_report(finished_run, **SMALL)


def test_likelihood_is_that_of_each_model_on_whole_pieces_of_the_test_split(
    finished_run: Path, report: Report
) -> None:
    splits, _ = load_corpus(finished_run / "data")
    for phase, folder in (("before", "pretrained"), ("after", "generator")):
        model = MidiMambaForCausalLM.from_pretrained(finished_run / folder)
        nats = tokens = 0.0
        for ids in splits["test"]["input_ids"]:
            piece = torch.tensor([ids])
            with torch.no_grad():
                nats += model(input_ids=piece, labels=piece).loss.item() * (len(ids) - 1)
            tokens += len(ids) - 1
        assert report[phase]["held_out_nll"] == pytest.approx(nats / tokens, rel=1e-4)
        per_note = nats / sum(splits["test"]["num_notes"])
        assert report[phase]["held_out_nll_per_note"] == pytest.approx(per_note, rel=1e-4)
    assert report["before"]["held_out_nll"] != report["after"]["held_out_nll"]


def test_music_is_measured_as_the_features_measure_it(finished_run: Path, report: Report) -> None:
    splits, processor = load_corpus(finished_run / "data")
    pieces = [opening(processor.decode(ids), 16) for ids in splits["test"]["input_ids"]]
    features = measure(pieces)
    for name in ("polyphony", "notes_per_bar", "scale_consistency"):
        assert report["real"]["music"][name] == pytest.approx(features[name].mean())
    assert report["real"]["music"]["most_voices"] == 1
    for phase in ("before", "after", "chosen"):
        assert report[phase]["music"].keys() == MUSIC.keys()
        assert report[phase]["music"]["notes_per_bar"] > 0
    assert report["settings"]["sampled_pieces"] == 2


def test_real_music_stands_beside_every_sample(finished_run: Path) -> None:
    for index in range(3):
        (finished_run / "samples" / f"sample-{index:02d}.png").write_bytes(b"")
    write_report(finished_run, **SMALL)
    page = (finished_run / "report.md").read_text()
    rows = [line for line in page.splitlines() if "(samples/" in line]
    splits, processor = load_corpus(finished_run / "data")
    real = sorted((finished_run / "real").glob("*.mid"))
    held_out = [opening(processor.decode(ids), 16) for ids in splits["test"]["input_ids"]]
    assert len(real) == min(3, len(held_out))
    assert len(rows) == 3
    for index, row in enumerate(rows):
        assert f"(samples/sample-{index:02d}.png)" in row
        assert (f"(real/real-{index:02d}.png)" in row) == (index < len(real))
    notes = [[(note.time, note.pitch) for note in score.tracks[0].notes] for score in held_out]
    for path in real:
        assert [(note.time, note.pitch) for note in Score(path).tracks[0].notes] in notes
        assert imread(path.with_suffix(".png")).shape[:2] == (400, 1200)


def test_samples_and_music_are_compared_in_sets_of_equal_size(finished_run: Path, report: Report) -> None:
    assert report["settings"]["fresh_samples"] == 8
    tokens = 8 * LENGTH
    for column in ("before", "after", "real"):
        assert (report[column]["distinct_1"] * tokens) == pytest.approx(round(report[column]["distinct_1"] * tokens))
        assert report[column]["distinct_1"] <= report[column]["distinct_2"] <= report[column]["distinct_4"] <= 1
    many = write_report(finished_run, num_samples=10_000, num_pieces=2)
    assert many["settings"]["fresh_samples"] == many["settings"]["test_blocks"] < 10_000


def test_the_same_seed_gives_the_same_report_and_leaves_the_global_random_state(
    finished_run: Path, report: Report
) -> None:
    state = torch.get_rng_state()
    assert write_report(finished_run, **SMALL) == report
    assert torch.equal(torch.get_rng_state(), state)
    assert write_report(finished_run, **SMALL, seed=1)["after"] != report["after"]


def test_the_page_shows_what_was_measured(finished_run: Path) -> None:
    report = write_report(finished_run, **SMALL)
    assert json.loads((finished_run / "report.json").read_text()) == report
    page = (finished_run / "report.md").read_text()
    before, after = report["before"]["held_out_nll"], report["after"]["held_out_nll"]
    assert f"| {before:.3f} | {after:.3f} |" in page
    assert f"| notes at once, at most | {report['before']['music']['most_voices']:.2f} |" in page
    assert f" | {report['after']['held_out_nll_per_note']:.3f} | |" in page
    assert f"{'rose' if after > before else 'fell'} by {abs(after / before - 1):.1%}" in page
    assert "no evidence that adversarial training helps" in page
    for link in ("(curves.png)", "(samples/sample-00.png)", "(samples/sample-00.mid)", "(samples/sample-00.wav)"):
        assert link in page
    assert "(samples/sample-01.png)<br>[sound](samples/sample-01.mp3) |" in page
    assert "- `estimator`: monte-carlo" in page
    assert imread(finished_run / "curves.png").shape[:2] == (800, 1400)


def test_a_distilled_run_is_read_beside_the_controls_of_the_benchmark(report: Report) -> None:
    assert CONTROLS_OF_DISTILLATION not in interpretation(report)
    assert CONTROLS_OF_DISTILLATION in interpretation(report | {"training": {"estimator": "distill"}})
    only_fitted = {"training": {"estimator": "distill", "max_steps": 0}}
    assert CONTROLS_OF_DISTILLATION not in interpretation(report | only_fitted)
    arms = json.loads((RESULTS / "music-nottingham.json").read_text())["arms"]
    recipe = "distilled, more draws"
    compared = ("mle", recipe, f"{recipe}, constant", f"{recipe}, shuffled")
    figures = [f"{arms[arm]['classifier'][0]:.1%}".replace("%", " %") for arm in compared]
    assert re.findall(r"[\d.]+ %", CONTROLS_OF_DISTILLATION) == figures
    assert (arms["mle"]["seeds"], "eight generators" in CONTROLS_OF_DISTILLATION) == (8, True)


def test_an_unfinished_run_is_refused_and_the_missing_part_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"no pretrained/config\.json"):
        write_report(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2


@pytest.mark.parametrize("arguments", [{"length": 4}, {"num_samples": 1}, {"length": 10_000}])
def test_sizes_that_cannot_be_compared_are_refused(finished_run: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"larger|smaller"):
        write_report(finished_run, **arguments)


def test_discriminators_judge_whole_pieces_and_two_of_them_together(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    fit_musical(
        [make_score(seed, bars=8) for seed in range(8)], [make_score(seed, bars=2) for seed in range(8, 16)]
    ).save_pretrained(run / "generator-musical-discriminator")
    alone, together = write_report(finished_run, **SMALL), write_report(run, **SMALL)
    splits, processor = load_corpus(run / "data")
    test, train = (
        [processor.encode(opening(processor.decode(ids), 16))[:LENGTH] for ids in splits[split]["input_ids"]]
        for split in ("test", "train")
    )
    judges = load_judges([run / "generator-discriminator", run / "generator-musical-discriminator"], processor)
    both = [Ensemble(judges).log_odds(rows) for rows in (test, train)]
    assert together["after"]["both-discriminators"]["accuracy_real"] == float((both[0] > 0).double().mean())
    for report in (alone, together):
        assert report["after"]["accuracy_real"] == float((judges[0].log_odds(test) > 0).double().mean())
    heard = float((judges[1].log_odds(test) > 0).double().mean())
    assert together["after"]["musical-discriminator"]["accuracy_real"] == heard
    known = together["real"]["judged_real_in_training"]
    assert len(test) == 1
    assert known in (both[1] > 0).double().tolist()  # as many pieces as are held out
    for report in (alone, together):
        for phase in ("before", "after"):
            assert 0 <= report[phase]["auc"] <= 1
    page = (run / "report.md").read_text()
    assert "| two together: AUC |" in page
    share = 1 - together["after"]["both-discriminators"]["accuracy_fake"]
    assert f"of this run together judge {1 - together['before']['both-discriminators']['accuracy_fake']:.0%}" in page
    assert f" and {share:.0%} after it" in page
    heard = together["real"]["auc_in_training"]
    assert f"of the training split, {known:.0%} are judged to be real (AUC {heard:.2f})." in page
    # The card of the musical one says what is measured of it, and one whose figures are missing is refused.
    evaluation = read_evaluation(run / "report.json")
    assert evaluation.of_discriminators["musical-discriminator"] == together["after"]["musical-discriminator"]
    del together["before"]["musical-discriminator"]
    (run / "report.json").write_text(json.dumps(together))
    with pytest.raises(InputError, match="without 'musical-discriminator'"):
        read_evaluation(run / "report.json")
