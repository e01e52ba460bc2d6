"""A musical discriminator on the Hub: it is checked like one of tokens, and its card says how to use it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from midimamba import MidiProcessor
from midimamba.errors import InputError
from midimamba.evaluation.judges import fit_musical
from midimamba.hub_cards import publish
from support import command, make_discriminator, make_generator, make_score

from .fake_hub import FakeHub


@pytest.fixture(scope="module")
def run(folder: Path, processor: MidiProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run saves: a generator, and beside it its discriminators of tokens and of musical features."""
    run = tmp_path_factory.mktemp("run")
    make_generator(vocab_size=processor.vocab_size).save_pretrained(run / "tuned")
    processor.save_pretrained(run / "tuned")
    make_discriminator(vocab_size=processor.vocab_size).save_pretrained(run / "tuned-discriminator")
    shutil.copytree(folder, run / "tuned-musical-discriminator")
    diversity = {f"distinct_{n}": 0.125 for n in (1, 2, 3, 4)} | {"self_bleu_4": 0.25}
    measures: dict[str, Any] = {"held_out_nll": 2.0, "accuracy": 0.75, "accuracy_real": 0.91, "accuracy_fake": 0.59}
    musical = {"accuracy": 0.65, "accuracy_real": 0.82, "accuracy_fake": 0.48}
    measures |= diversity | {"musical-discriminator": musical}
    settings = {"fresh_samples": 9, "tokens_per_sequence": 77}
    report = {"before": measures, "after": measures, "real": diversity, "settings": settings}
    (run / "report.json").write_text(json.dumps(report))
    return run


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
    name = "you/bach-musical-discriminator"
    publish._discriminator_card(folder, name, None, publish.Licences(None, None)).save(tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert "From musical features of a piece" in card
    assert "fitted on pieces of one length, 6 bars" in card
    assert f"midimamba generate you/bach --discriminator {name} --best-of 8" in card
    assert "tokenizer of the generator" not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    # The names of the Hub, as folders of this machine.
    (tmp_path / "you").mkdir()
    processor.save_pretrained(tmp_path / "you" / "bach")
    (tmp_path / name).symlink_to(folder)
    make_score(1).dump_midi(tmp_path / "piece.mid")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert re.fullmatch(r"tensor\(\[\d.*\], dtype=torch.float64\)", capsys.readouterr().out.strip())


KINDS = ("discriminator", "musical-discriminator")


@pytest.mark.parametrize("kinds", [KINDS, KINDS[::-1], KINDS[1:]], ids=["both", "musical first", "musical alone"])
def test_each_kind_goes_to_a_repository_of_its_own(
    kinds: tuple[str, ...],
    online: FakeHub,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [run / f"tuned-{kind}" for kind in kinds]
    options = ("--report", run / "report.json", "--private", "--discriminator", *folders)
    assert command(monkeypatch, "publish", run / "tuned", "--repo", "bach", *options) == 0
    names = [f"you/bach-{kind}" for kind in kinds]
    assert online.commits == ["you/bach", *names]
    assert online.private == set(online.commits)
    said = capsys.readouterr()
    addresses = zip(("generator", *kinds), online.commits, strict=True)
    assert said.out.splitlines() == [f"{kind}: {online.url}/{name}" for kind, name in addresses]
    assert "tuned-musical-discriminator/optimizer.pt" in said.err
    files = online.repositories["you/bach-musical-discriminator"]
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] == (run / "tuned-musical-discriminator" / "model.safetensors").read_bytes()
    cards = {name: content["README.md"].decode() for name, content in online.repositories.items()}
    line = f"midimamba generate you/bach --discriminator {' '.join(names)} --best-of 8 --out pieces"
    assert line in cards["you/bach"].splitlines()
    for name in names:
        assert f"midimamba generate you/bach --discriminator {name} --best-of 8" in cards[name]
    # Each has its own figures of the report.
    figures = {"discriminator": "91% of real sequences and 59%", "musical-discriminator": "82% of real pieces and 48%"}
    for kind, name in zip(kinds, names, strict=True):
        assert {other for other, text in figures.items() if text in cards[name]} == {kind}


def test_the_card_of_a_generator_without_discriminators_names_none(run: Path) -> None:
    assert "--discriminator" not in str(
        publish._generator_card(run / "tuned", "you/bach", None, publish.Licences(None, None))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_discriminators_of_one_kind_are_refused_in_one_line(
    kind: str,
    online: FakeHub,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = "discriminator" if kind != "discriminator" else "musical-discriminator"
    folders = [run / f"tuned-{name}" for name in (kind, other, kind)]
    assert command(monkeypatch, "publish", run / "tuned", "--repo", "bach", "--discriminator", *folders) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {folders[0]} and {folders[2]} are both of the kind {kind}, and a generator is published with one of "
        "each kind: leave one out"
    )
    assert not online.created
    assert not list(run.glob(".*"))


def test_a_damaged_one_or_an_impossible_name_of_its_repository_creates_nothing(
    online: FakeHub, run: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(run / "tuned-musical-discriminator", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    folders = [run / "tuned-discriminator", broken]
    with pytest.raises(InputError, match=f"{broken}/model.safetensors is empty"):
        publish.publish(run / "tuned", "bach", discriminators=folders)
    folders[1] = run / "tuned-musical-discriminator"
    with pytest.raises(InputError, match="x-musical-discriminator' cannot be the name"):
        publish.publish(run / "tuned", "x" * 80, discriminators=folders)
    assert not online.created
