"""The most notes at once in the train split are kept, and what is generated keeps to them."""

from pathlib import Path

import pytest
from symusic import Note, Score, Track

from midimamba import MidiProcessor
from midimamba.command_options import SamplingOptions
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.generation import generate_samples, generate_scores
from midimamba.tokenization.voices import most_voices
from support import make_generator

OPTIONS = CorpusOptions(vocab_size=None, num_workers=1)


def write(file: Path, voices: int, first: int = 60, drums: bool = False) -> None:
    """Four bars in which every note is held for two beats, and half of the voices begin on odd beats."""
    score = Score(480)
    parts = [Track(program=40 * (index % 2)) for index in range(voices)]
    for index, track in enumerate(parts):
        track.notes.extend([Note(beat * 480, 960, first + 4 * index, 80) for beat in range(index % 2, 15, 2)])
    if drums:
        parts.append(
            Track(is_drum=True, notes=[Note(beat * 480, 240, 38 + i, 80) for beat in range(16) for i in (0, 1)])
        )
    for track in parts:
        score.tracks.append(track)
    file.parent.mkdir(exist_ok=True)
    score.dump_midi(file)


def voices_of(folder: Path) -> int | None:
    return MidiProcessor.from_pretrained(folder / "tokenizer").voices


def test_a_corpus_keeps_the_most_notes_at_once_of_its_train_split(tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write(music / "train.mid", 2, drums=True)
    write(music / "more.mid", 3)
    write(music / "held-out.mid", 5)
    rows = ["file,split", "train.mid,train", "more.mid,validation", "held-out.mid,test"]
    (music / "manifest.csv").write_text("\n".join(rows) + "\n")
    tokenize_corpus(str(music), out, OPTIONS)
    assert voices_of(out) == 2
    write(music / "new.mid", 4, first=50)
    (music / "manifest.csv").write_text("\n".join([*rows, "new.mid,train"]) + "\n")
    tokenize_corpus(str(music), out, OPTIONS)  # reads only the new file
    assert voices_of(out) == 4
    (music / "new.mid").unlink()
    (music / "manifest.csv").write_text("\n".join(rows) + "\n")
    tokenize_corpus(str(music), out, OPTIONS)
    assert voices_of(out) == 2


@pytest.mark.parametrize(("earlier", "expected"), [(1, 2), (7, 7), (None, None)])
def test_voices_of_the_corpus_whose_tokenizer_is_taken_count_too(
    earlier: int | None, expected: int | None, tmp_path: Path
) -> None:
    write(tmp_path / "music" / "a.mid", 2)
    tokenize_corpus(str(tmp_path / "music"), tmp_path / "first", OPTIONS)
    processor = MidiProcessor.from_pretrained(tmp_path / "first" / "tokenizer")
    MidiProcessor(processor.midi_tokenizer, processor.programs, earlier).save_pretrained(tmp_path / "earlier")
    options = CorpusOptions(tokenizer=str(tmp_path / "earlier"), num_workers=1)
    tokenize_corpus(str(tmp_path / "music"), tmp_path / "second", options)
    assert voices_of(tmp_path / "second") == expected


def test_music_of_drums_alone_has_no_number_of_voices(tmp_path: Path) -> None:
    write(tmp_path / "music" / "a.mid", 0, drums=True)
    tokenize_corpus(str(tmp_path / "music"), tmp_path / "out", OPTIONS)
    assert voices_of(tmp_path / "out") is None


def test_samples_have_at_most_as_many_voices_as_the_music_that_was_learned(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path / "music" / f"{seed}.mid", 2, first=50 + seed, drums=True)
    tokenize_corpus(str(tmp_path / "music"), tmp_path / "out", OPTIONS)
    processor = MidiProcessor.from_pretrained(tmp_path / "out" / "tokenizer")
    model = make_generator(vocab_size=processor.vocab_size)
    options = SamplingOptions(num=4, bars=2, top_p=1.0, max_new_tokens=80)
    scores = generate_scores(model, processor, options)
    assert max(map(most_voices, scores)) == 2
    assert max(map(most_voices, generate_samples(model, processor, options).scores)) == 2
    processor.voices = None  # as a processor of an earlier version
    assert max(map(most_voices, generate_scores(model, processor, options))) > 2
