"""`midimamba generate`: samples always hold notes, whatever the model, and continue their prompts."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from symusic import Score
from symusic.core import ScoreTick
from transformers import LogitsProcessorList

import support
from midimamba import MidiMambaForCausalLM, MidiProcessor, generation
from midimamba.command_options import SamplingOptions
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from midimamba.generation import generate_samples, generate_scores, load_pair
from midimamba.tokenization import composing
from midimamba.tokenization.choices import ONE_STREAM
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.musical_time import count_bars
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer
from midimamba.tokenization.voices import most_voices
from support import make_generator, make_score


@pytest.fixture(scope="module")
def untrained(processor: MidiProcessor) -> MidiMambaForCausalLM:
    return make_generator(vocab_size=processor.vocab_size)


def onsets(score: ScoreTick) -> set[tuple[int, Fraction, int]]:
    """Program, onset in quarter notes, pitch."""
    division = score.ticks_per_quarter
    return {
        (track.program, Fraction(note.time, division), note.pitch) for track in score.tracks for note in track.notes
    }


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_samples_of_an_untrained_model_hold_notes(
    untrained: MidiMambaForCausalLM, processor: MidiProcessor, temperature: float, tmp_path: Path
) -> None:
    scores = generate_scores(
        untrained,
        processor,
        SamplingOptions(num=16, bars=3, max_new_tokens=60, temperature=temperature, top_p=1.0, seed=1),
    )
    assert len(scores) == 16
    for score in scores:
        score.dump_midi(tmp_path / "x.mid")
        assert Score(tmp_path / "x.mid").note_num() > 0


def test_the_shortest_sample_holds_a_note(untrained: MidiMambaForCausalLM, processor: MidiProcessor) -> None:
    for score in generate_scores(untrained, processor, SamplingOptions(num=32, bars=1, max_new_tokens=16, top_p=1.0)):
        assert score.note_num() > 0


def test_a_continuation_opens_with_its_prompt_and_continues_it(
    untrained: MidiMambaForCausalLM, processor: MidiProcessor
) -> None:
    prompt = make_score(3, bars=4)
    for score in generate_scores(
        untrained, processor, SamplingOptions(num=3, bars=2, max_new_tokens=80, top_p=1.0), prompt=prompt
    ):
        assert onsets(prompt) < onsets(score)
        bars = processor.tokenizer.decode(processor.encode(score)).split().count("Bar_None")
        assert bars <= 4 + 2


def test_the_same_seed_is_the_same_music(untrained: MidiMambaForCausalLM, processor: MidiProcessor) -> None:
    pieces = [
        generate_scores(untrained, processor, SamplingOptions(num=2, bars=2, max_new_tokens=40, seed=seed))[
            0
        ].dumps_midi()
        for seed in (1, 1, 2)
    ]
    assert pieces[0] == pieces[1] != pieces[2]


def test_many_pieces_are_sampled_in_parts_that_differ(
    untrained: MidiMambaForCausalLM, processor: MidiProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_SAMPLED_AT_ONCE", 2)
    pieces = [
        [
            score.dumps_midi()
            for score in generate_scores(untrained, processor, SamplingOptions(num=num, bars=2, max_new_tokens=40))
        ]
        for num in (2, 5)
    ]
    assert pieces[1][:2] == pieces[0]
    assert len(set(pieces[1])) == len(pieces[1]) == 5


def test_a_tokenizer_of_another_model_is_refused(processor: MidiProcessor, tmp_path: Path) -> None:
    make_generator(vocab_size=50).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 50 tokens, but its tokenizer 760"):
        load_pair(str(tmp_path))


def test_the_readme_interface_generates(processor: MidiProcessor, untrained: MidiMambaForCausalLM) -> None:
    inputs = processor([make_score(1), make_score(2, bars=2)], return_tensors="pt")
    torch.manual_seed(0)
    ids = untrained.generate(
        **inputs, max_new_tokens=20, do_sample=True, logits_processor=LogitsProcessorList([processor.grammar()])
    )
    assert isinstance(ids, torch.Tensor)
    assert all(score.note_num() > 0 for score in processor.batch_decode(ids))


@pytest.fixture(scope="module")
def controlled() -> MidiProcessor:
    pairs = [("instruments", "violin"), ("instruments", "drums"), ("key", "C-major"), ("composer", "Bach")]
    tokenizer = build_tokenizer(controls=[control_token(*pair) for pair in pairs])
    train_tokenizer(tokenizer, [make_score(seed) for seed in range(6)], 800)
    return MidiProcessor(tokenizer)


@pytest.fixture(scope="module")
def folder(controlled: MidiProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator whose tokenizer has controls."""
    folder = tmp_path_factory.mktemp("controlled")
    controlled.save_pretrained(folder)
    make_generator(vocab_size=controlled.vocab_size).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that `generate` is called with."""
    seen: list[list[int]] = []
    generate = MidiMambaForCausalLM.generate

    def spy(self: MidiMambaForCausalLM, input_ids: torch.Tensor, **options: Any) -> Any:
        seen.extend(input_ids.tolist())
        return generate(self, input_ids, **options)

    monkeypatch.setattr(MidiMambaForCausalLM, "generate", spy)
    return seen


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return support.command(monkeypatch, "generate", *arguments)


def test_controls_are_put_before_new_music_and_before_a_prompt(
    controlled: MidiProcessor, prompts: list[list[int]]
) -> None:
    model = make_generator(vocab_size=controlled.vocab_size)
    asked = {"key": "C-major", "instruments": ["violin", "drums"]}
    for score in generate_scores(
        model, controlled, SamplingOptions(num=4, bars=2, max_new_tokens=40, top_p=1.0), controls=asked
    ):
        assert score.note_num() > 0
        assert 1 <= controlled.tokenizer.decode(controlled.encode(score)).split().count("Bar_None") <= 2
    prompt = make_score(3, bars=2)
    (score,) = generate_scores(
        model, controlled, SamplingOptions(num=1, bars=1, max_new_tokens=20), prompt=prompt, controls=asked
    )
    assert onsets(prompt) <= onsets(score)
    assert prompts == [[1, 3, 4, 5], [1, 3, 4, 5, *controlled.encode(prompt)[1:]]]


def test_the_command_asks_for_controls(
    folder: Path, tmp_path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--control", "key=C-major", "--control", "instruments=drums", "--control", "instruments=violin")
    short = ("--num", 2, "--bars", 1, "--max-new-tokens", 20)
    assert command(monkeypatch, folder, *asked, *short, "--out", tmp_path / "out") == 0
    assert prompts == [[1, 3, 4, 5]]
    assert all(Score(tmp_path / "out" / f"sample-{index:02d}.mid").note_num() > 0 for index in range(2))


def test_the_command_lists_controls(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, folder, "--list-controls") == 0
    assert capsys.readouterr().out.splitlines() == ["instruments: violin drums", "key: C-major", "composer: Bach"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--control", "key"], "--control 'key' is not a request: write --control NAME=VALUE"),
        (["--control", "key="], "write --control NAME=VALUE"),
        (["--control", "key=D-major"], "control 'key' has no value 'D-major': choose one of C-major"),
        (["--control", "tempo=60-90"], "no control 'tempo': choose one of instruments, key, composer"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_line(
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, folder, *arguments, "--out", tmp_path / "out") == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_command_without_a_folder_to_make_and_a_model_without_controls_are_refused(
    folder: Path,
    processor: MidiProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, folder) == 2
    assert "name a folder with --out" in capsys.readouterr().err
    processor.save_pretrained(tmp_path)
    assert command(monkeypatch, tmp_path, "--list-controls") == 2
    assert "midimamba tokenize SOURCE --controls" in capsys.readouterr().err


def test_pieces_are_drawn_and_played(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--num", 2, "--bars", 1, "--max-new-tokens", 20, "--render")
    assert command(monkeypatch, folder, *short, "--format", "mp3", "--out", tmp_path / "out") == 0
    names = {f"sample-0{index}.{suffix}" for index in range(2) for suffix in ("mid", "png", "mp3")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert not capsys.readouterr().err.replace("\r", "").strip()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--render", "--soundfont", "nowhere.sf2"], "the sound font nowhere.sf2 cannot be read: No such file"),
        (["--render", "--soundfont", "damaged.sf2"], "damaged.sf2 cannot be used as a sound font"),
        (["--soundfont", "damaged.sf2"], "--soundfont and --format say how to play the pieces: add --render"),
        (["--format", "mp3"], "add --render"),
    ],
)
def test_sound_that_cannot_be_made_is_refused_before_any_work(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.sf2").write_bytes(b"RIFF")
    assert command(monkeypatch, "no/model", *arguments, "--out", "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["TSD", "Structured", "MIDILike"])
def test_tokenizations_without_bars_also_generate(name: str) -> None:
    processor = MidiProcessor(build_tokenizer(name))
    model = make_generator(vocab_size=processor.vocab_size)
    assert all(
        score.note_num() > 0
        for score in generate_scores(model, processor, SamplingOptions(num=4, bars=1, max_new_tokens=16))
    )


@pytest.mark.parametrize(
    ("name", "options", "guaranteed"),
    [
        *((name, {}, True) for name in ONE_STREAM),
        ("REMI", {"use_rests": True}, True),
        ("Structured", {"use_pitchdrum_tokens": False}, False),
        ("MMM", {"base_tokenizer": "TSD"}, False),
        ("PerTok", {"use_chords": True}, False),
    ],
)
def test_every_tokenization_generates_from_files_to_files(
    name: str,
    options: dict[str, Any],
    guaranteed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    composing._say_once.cache_clear()
    monkeypatch.setattr(composing, "DRAWS", 200)  # an untrained model rarely writes music by chance
    (tmp_path / "midi").mkdir()
    for seed in range(3):
        make_score(seed, bars=2, programs=(0,)).dump_midi(tmp_path / "midi" / f"{seed}.mid")
    corpus = CorpusOptions(tokenization=name, tokenizer_options=options, vocab_size=None, num_workers=1)
    tokenize_corpus(str(tmp_path / "midi"), tmp_path / "data", corpus)
    processor = MidiProcessor.from_pretrained(tmp_path / "data" / "tokenizer")
    processor.save_pretrained(tmp_path / "model")
    make_generator(vocab_size=processor.vocab_size).save_pretrained(tmp_path / "model")
    short = ("--num", 2, "--bars", 1, "--max-new-tokens", 60, "--top-p", 1)
    assert command(monkeypatch, tmp_path / "model", *short, "--out", tmp_path / "out") == 0
    assert all(Score(file).note_num() for file in (tmp_path / "out").iterdir())
    lines = [record.message for record in caplog.records if "the grammar" in record.message]
    assert len(lines) == (not guaranteed)


def test_what_is_never_music_ends_in_one_line_and_is_counted_when_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = MidiProcessor(build_tokenizer("MMM", base_tokenizer="TSD"))  # which has no grammar
    model = make_generator(vocab_size=processor.vocab_size)
    drawn = []

    def broken(self: MidiProcessor, ids: Any) -> ScoreTick:
        drawn.append(ids)
        raise ValueError("MMM cannot decode these ids")

    monkeypatch.setattr(MidiProcessor, "decode", broken)
    options = SamplingOptions(num=3, max_new_tokens=16)
    with pytest.raises(InputError, match="3 of 3 pieces are not music after 8 draws \\(MMM cannot decode"):
        generate_scores(model, processor, options)
    assert len(drawn) == 3 * 8
    samples = generate_samples(model, processor, options)
    assert (samples.total, len(samples.refused)) == (3, 3)


@pytest.mark.slow
def test_pieces_have_exactly_the_bars_asked_for_or_one_line_says_not(
    untrained: MidiMambaForCausalLM, processor: MidiProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    def bars(score: ScoreTick) -> int:
        last = max(int(track.notes.numpy()["time"].max()) for track in score.tracks if track.notes)
        return count_bars(score, last + 1)

    exact = SamplingOptions(num=20, bars=5, top_p=1.0)
    assert {bars(score) for score in generate_scores(untrained, processor, exact)} == {5}
    prompt = make_score(3, bars=3)
    assert {bars(score) for score in generate_scores(untrained, processor, exact, prompt=prompt)} == {3 + 5}
    at_most = {bars(score) for score in generate_scores(untrained, processor, replace(exact, at_most=True))}
    assert max(at_most) <= 5
    assert len(at_most) > 1
    assert not caplog.records
    generate_scores(untrained, processor, SamplingOptions(num=18, bars=9, max_new_tokens=16))
    assert [record.message for record in caplog.records] == [
        "18 of 18 pieces stop before 9 new bars are full: raise max_new_tokens"
    ]
    caplog.clear()
    generate_scores(untrained, processor, SamplingOptions(num=2, bars=99, at_most=True, max_new_tokens=16))
    assert [record.message for record in caplog.records] == [
        "2 of 2 pieces stop before 99 new bars are full: raise max_new_tokens"
    ]


def test_a_continuation_keeps_to_the_instruments_and_leaves_the_end_of_its_prompt_alone(
    untrained: MidiMambaForCausalLM, processor: MidiProcessor
) -> None:
    prompt = make_score(7, bars=2, programs=(0,), drums=False)
    opening = onsets(prompt)
    last = max(time for _, time, _ in opening)
    for score in generate_scores(untrained, processor, SamplingOptions(num=16, bars=2, top_p=1.0), prompt=prompt):
        assert {track.program for track in score.tracks if not track.is_drum} == {0}
        assert not any(track.is_drum for track in score.tracks)
        assert {note for note in onsets(score) if note[1] <= last} == opening


def test_weights_that_hold_nan_are_named(processor: MidiProcessor) -> None:
    model = make_generator(vocab_size=processor.vocab_size)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="weights hold NaN"):
        generate_scores(model, processor, SamplingOptions(num=1, max_new_tokens=16))


@pytest.mark.parametrize(
    "option",
    [
        *(("temperature", value) for value in ("0", "-1", "inf", "nan", "1e-40")),
        *(("top-p", value) for value in ("0", "1.5", "2", "nan", "-0.1")),
        *(("bars", "0"), ("num", "0"), ("num", "-1"), ("max-new-tokens", "0"), ("max-new-tokens", "1")),
        *(("seed", "-1"), ("seed", str(10**20))),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(
    option: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = option
    assert command(monkeypatch, "no/model", f"--{name}={value}", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name.replace('-', '_')} is ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        (".", "is a folder that is there already"),
        ("/", "is a folder that is there already"),
        ("file/out", "is not a folder"),
        ("file/deep/out", "is not a folder"),
        ("x" * 300, "too long a name"),
        ("x" * 240, "too long a name"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    out: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("generate", "no/model", "--out", out),
        ("tokenize", "chorales", "--out", out),
        ("evaluate", "no/model", "--reference", "nowhere", "--out", out),
        ("listen", "a", "b", "--out", out),
    ):
        assert support.command(monkeypatch, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_callers_random_state_is_left_alone(untrained: MidiMambaForCausalLM, processor: MidiProcessor) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate_scores(untrained, processor, SamplingOptions(num=1, bars=1, max_new_tokens=16, seed=7))
    assert torch.equal(torch.rand(3), expected)


def test_generated_pieces_keep_to_constraints(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("--scale", "D-dorian", "--pitch-range", "60-71", "--polyphony", "1", "--grid", "1/4", "--instruments")
    line = ("generate", pretrained, "--out", tmp_path / "out", "--num", "2", "--bars", "2", "--max-new-tokens", "64")
    assert support.command(monkeypatch, *line, *wanted, "violin") == 0
    for file in (tmp_path / "out").glob("*.mid"):
        score = Score(file)
        assert most_voices(score) == 1
        assert {(track.program, track.is_drum) for track in score.tracks} == {(40, False)}
        for note in score.tracks[0].notes:
            assert note.pitch in {60, 62, 64, 65, 67, 69, 71}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("--grid", "1/64"), "grid 1/64 is finer"),
        (("--scale", "C", "--pitch-range", "61-62"), "scale C and pitch_range 61-62"),
        (("--notes-per-bar", "x"), "notes_per_bar is 'x'"),
    ],
)
def test_constraints_that_cannot_be_are_refused_in_one_line(
    wanted: tuple[str, ...],
    message: str,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert support.command(monkeypatch, "generate", pretrained, "--out", tmp_path / "out", *wanted) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()
