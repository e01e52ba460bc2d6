"""A musical discriminator on the Hub: it is checked like one of tokens, and its card says how to use it."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from midimamba import MidiProcessor
from midimamba.errors import InputError
from midimamba.evaluation.judges import fit_musical
from midimamba.hub_cards import publish
from support import make_score


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("musical")
    real, fake = ([make_score(seed, drums=drums) for seed in range(8)] for drums in (False, True))
    fit_musical(real, fake, bars=6).save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"pickle")
    return folder


def test_its_files_are_collected_and_it_has_to_load(folder: Path, tmp_path: Path) -> None:
    publish._collect_discriminator(folder, tmp_path / "whole")
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {"config.json", "model.safetensors"}
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    del weights["center"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="it lacks center"):
        publish._collect_discriminator(broken, tmp_path / "target")


def test_the_snippet_of_its_card_runs_unchanged(
    folder: Path,
    processor: MidiProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish._discriminator_card(folder, "you/bach-discriminator", None, None).save(tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert "From musical features of a piece" in card
    assert "fitted on pieces of one length, 6 bars" in card
    assert "midimamba generate you/bach --discriminator you/bach-discriminator --best-of 8" in card
    assert "tokenizer of the generator" not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    # The names of the Hub, as folders of this machine.
    (tmp_path / "you").mkdir()
    processor.save_pretrained(tmp_path / "you" / "bach")
    (tmp_path / "you" / "bach-discriminator").symlink_to(folder)
    make_score(1).dump_midi(tmp_path / "piece.mid")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert re.fullmatch(r"tensor\(\[\d.*\], dtype=torch.float64\)", capsys.readouterr().out.strip())
