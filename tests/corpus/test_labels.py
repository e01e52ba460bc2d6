"""Labels are not taken for one another, nor for a computed control; programs of the train split are kept."""

from pathlib import Path

import pytest

from midimamba import MidiProcessor
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.options import CorpusOptions
from midimamba.errors import InputError
from support import make_score


@pytest.fixture
def music(tmp_path: Path) -> Path:
    folder = tmp_path / "music"
    folder.mkdir()
    for seed in range(3):
        make_score(seed, bars=2, programs=(0, 40) if seed else (0, 99), drums=False).dump_midi(folder / f"{seed}.mid")
    rows = ["file,split,key", "0.mid,test,mine", "1.mid,train,mine", "2.mid,validation,"]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize(
    ("labels", "controls", "reason"),
    [
        (("key",), ("key",), "the label 'key' has the name of the computed control 'key'"),
        (("Tempo",), ("key",), "the label 'Tempo' has the name of the computed control 'tempo'"),
        (("composer", "Composer"), (), "the label 'Composer' has the name of the label 'composer'"),
    ],
)
def test_labels_of_one_name_are_refused(
    labels: tuple[str, ...], controls: tuple[str, ...], reason: str, music: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        tokenize_corpus(str(music), tmp_path / "out", CorpusOptions(labels=labels, controls=controls, num_workers=1))
    assert not (tmp_path / "out").exists()


def test_a_label_alone_is_not_computed_and_only_programs_of_the_train_split_are_kept(
    music: Path, tmp_path: Path
) -> None:
    options = CorpusOptions(labels=("key",), vocab_size=None, num_workers=1)
    tokenize_corpus(str(music), tmp_path / "out", options)
    processor = MidiProcessor.from_pretrained(tmp_path / "out" / "tokenizer")
    assert processor.controls == {"key": ["mine"]}
    assert processor.programs == [0, 40]
