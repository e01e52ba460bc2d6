"""Names from outside, from a folder to the Hub: wherever they are shown, they are text and nothing else."""

import csv
import itertools
import json
import re
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt

from midimamba import MidiProcessor
from midimamba.evaluation.report_page import MUSIC, bullet_list, report_page
from midimamba.hub_cards.dataset_card import dataset_card
from midimamba.hub_cards.evaluation import read_evaluation
from midimamba.hub_cards.gallery import gallery
from midimamba.hub_cards.publish import TAGS
from midimamba.text import for_markdown, printable
from support import command, make_generator, make_score

from .fake_hub import FakeHub

ACTS = "\x1b]0;x\x07\x7f\u2028\u202e"
LABEL = f"<script>alert(1)</script>|[x](javascript:y)`---`{{{{jinja}}}}%s$x^2${ACTS}"
NAMES = [
    "<script>alert(1)<|script>",
    "[x](javascript:alert(1))",
    "a | b | c",
    "`code` $x_1$",
    "---",
    "\x1b[31mred\x1b]0;title\x07",
    "del\x7f sep\u2028para\u2029",
    "\u202egnp.exe",
    "{{ jinja }} {% raw %} %s %(x)d",
    "long " * 40,
]
# Neither may be in anything that is shown; tabs, line feeds and no-break spaces are harmless.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069]")
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")


def check_page(page: str) -> None:
    """A page in Markdown has no control, no HTML, no link to a script; its tables keep their columns."""
    assert not RAW.search(page)
    body = page.split("---\n", 2)[2] if page.startswith("---\n") else page
    shown = MARKDOWN.render(body)
    assert "<script" not in shown
    assert not re.search(r"""(href|src)=["']?\s*javascript:""", shown)
    assert "<!--" not in shown
    for table in re.findall(r"<table>.*?</table>", shown, re.DOTALL):
        rows = [len(re.findall("<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
        assert len(set(rows)) == 1
    sources = re.findall(r"^\|.*", re.sub(r"\\\|", "", body), re.MULTILINE)
    for table_row, following in itertools.pairwise(sources):
        if set(following) <= set("|-:"):
            assert table_row.count("|") == following.count("|")


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, with an archive in it, whose names all mean harm, and labels that do too."""
    folder = tmp_path_factory.mktemp("home") / "<b>music | $x$ \u202e\x1b[2J"
    folder.mkdir()
    rows = []
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for seed, name in enumerate(NAMES):
            data = make_score(seed, bars=3).dumps_midi()
            (folder / f"{name}.mid").write_bytes(data)
            archive.writestr(f"in/{name}.mid", make_score(seed + 50, bars=3).dumps_midi())
            archive.writestr(f"in/{name} broken.mid", b"MThd broken")
            rows.append([f"{name}.mid", ("train", "valid", "test")[min(seed % 5, 2)], LABEL if seed % 2 else "plain"])
    for seed in range(6):
        (folder / f"plain {seed}.mid").write_bytes(make_score(100 + seed, bars=3).dumps_midi())
        rows.append([f"plain {seed}.mid", "test", "plain"])
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "split", "composer"], *rows])
    return folder


@pytest.fixture(scope="module")
def corpus(music: Path) -> Path:
    from midimamba.corpus.build import tokenize_corpus
    from midimamba.corpus.options import CorpusOptions

    out = music.parent / "data"
    tokenize_corpus(str(music), out, CorpusOptions(vocab_size=None, labels=["composer"], num_workers=1))
    return out


def test_what_tokenize_writes_holds_no_raw_sign(corpus: Path) -> None:
    lines = (corpus / "quarantine.jsonl").read_bytes().decode("ascii").splitlines()
    refused = [json.loads(line) for line in lines]
    assert len(refused) == len(NAMES)
    assert not RAW.search("\n".join(lines))
    assert not RAW.search((corpus / "corpus.json").read_text(encoding="utf-8"))
    for file in (corpus / "tokenizer").glob("*.json"):
        assert not RAW.search(file.read_text(encoding="utf-8")), file


def test_a_published_corpus_shows_names_as_text(
    corpus: Path, online: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / f"notes {NAMES[5]}\n.txt").write_text("mine")
    assert command(monkeypatch, "publish", corpus, "--repo", "you/data", "--license", "cc0-1.0") == 0
    shown = capsys.readouterr()
    assert not RAW.search(shown.out + shown.err)
    assert r"\x1b[31mred" in shown.err
    card = online.repositories["datasets/you/data"]["README.md"].decode()
    check_page(card)
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc0-1.0"
    assert r"\<b" not in card
    assert "&lt;b&gt;music" in card


def test_a_corpus_report_that_means_harm_makes_a_card_of_text(corpus: Path, tmp_path: Path) -> None:
    report = json.loads((corpus / "corpus.json").read_text())
    report["arguments"] |= {LABEL: LABEL, "labels": NAMES, "tokenizer_options": dict.fromkeys(NAMES, LABEL)}
    report["versions"] |= {LABEL: LABEL}
    report["fingerprint"] = LABEL
    rows = [{"path": name, "stage": name, "reason": f"{name} {LABEL}"} for name in NAMES]
    (tmp_path / "quarantine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    card = str(dataset_card("you/data", report, tmp_path / "quarantine.jsonl", "cc0-1.0"))
    check_page(card)
    assert set(yaml.safe_load(card.split("---")[1])) == {"license", "tags", "size_categories", "configs"}
    assert "{{jinja}}" not in card


@pytest.mark.parametrize("name", [*NAMES, LABEL, "- a", "1. a", "+ b", "#h", "&lt;", "it's", "    four"])
def test_markdown_shows_every_name_as_it_is(name: str) -> None:
    (paragraph,) = MARKDOWN.parse(for_markdown(name))[1:-1]
    assert paragraph.children is not None
    assert {token.type for token in paragraph.children} <= {"text", "text_special"}
    shown = "".join(token.content for token in paragraph.children)
    assert shown == printable(name).strip()


def test_controls_and_errors_are_printed_as_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model \x1b[31m\u202e"
    MidiProcessor.from_pretrained(corpus / "tokenizer").save_pretrained(model)
    assert command(monkeypatch, "generate", model, "--list-controls") == 0
    shown = capsys.readouterr()
    assert "composer: " in shown.out
    assert "<script>" in shown.out  # in a terminal this is text
    assert command(monkeypatch, "generate", f"{model} nowhere", "--out", tmp_path / "out") == 2
    for text in (shown.out, shown.err, capsys.readouterr().err):
        assert not RAW.search(text)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_comparison")
def test_evaluate_listen_and_publish_show_names_as_text(
    corpus: Path,
    music: Path,
    online: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    processor = MidiProcessor.from_pretrained(corpus / "tokenizer")
    model = tmp_path / "model"
    make_generator(vocab_size=processor.vocab_size).save_pretrained(model)
    processor.save_pretrained(model)
    (model / "training_args.json").write_text(json.dumps({"estimator": LABEL, "reward": NAMES[2]}))
    report = tmp_path / "re [x](y) `<b>` | port.json"
    options = ["--bars", 2, "--length", 8]
    assert command(monkeypatch, "evaluate", music, "--reference", corpus, "--out", report, *options) == 0
    check_page(report.with_suffix(".md").read_text(encoding="utf-8"))
    assert not RAW.search(report.read_text(encoding="utf-8"))

    assert command(monkeypatch, "publish", model, "--repo", "you/bach", "--report", report) == 0
    files = online.repositories["you/bach"]
    card = files["README.md"].decode()
    check_page(card)
    assert yaml.safe_load(card.split("---")[1])["tags"] == TAGS
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card)
    assert pictures
    assert {unquote(picture) for picture in pictures} <= set(files)

    other = tmp_path / "a | <script>\x1b[31m"
    other.mkdir()
    for seed in range(3):
        make_score(seed, bars=3).dump_midi(other / f"{seed}.mid")
    assert command(monkeypatch, "listen", music, other, "--out", tmp_path / "test", "--num", 2, "--bars", 1) == 0
    page = (tmp_path / "test" / "index.html").read_text(encoding="utf-8")
    key = json.loads((tmp_path / "test" / "key.json").read_text())
    assert not RAW.search(page)
    assert page.count("<script>") == 1
    answers = {name: {"rating": 3, "person": True} for name in key["pieces"]}
    (tmp_path / "answers.json").write_text(json.dumps({"test": key["test"], "answers": answers}))
    assert command(monkeypatch, "listen", tmp_path / "answers.json", "--score", tmp_path / "test") == 0
    shown = capsys.readouterr()
    assert not RAW.search(shown.out + re.sub("[\r\x1b]\\[?A?", "", shown.err))
    check_page(shown.out[shown.out.index("| arm |") :])


def test_a_run_with_hostile_samples_makes_a_page_of_text(tmp_path: Path) -> None:
    run = tmp_path / f"run {NAMES[0]} {NAMES[5]}"
    (run / "samples").mkdir(parents=True)
    for name in NAMES:
        for suffix in (".png", ".mid"):
            (run / "samples" / f"{name}{suffix}").write_bytes(b"x")
    diversity: dict[str, Any] = {f"distinct_{n}": 0.125 for n in (1, 2, 3, 4)} | {"self_bleu_4": 0.25}
    measures: dict[str, Any] = diversity | {
        "held_out_nll": 2.0,
        "accuracy": 0.75,
        "accuracy_real": 0.9,
        "accuracy_fake": 0.5,
    }
    measures |= {"held_out_nll_per_note": 3.0, "music": dict.fromkeys(MUSIC, 0.5)}
    diversity |= {"music": dict.fromkeys(MUSIC)}
    settings = {"fresh_samples": 9, "tokens_per_sequence": 77, "sampled_pieces": 5, "real_pieces": 4}
    settings |= {"bars_per_piece": 16}
    report = {"before": measures, "after": measures, "real": diversity, "settings": settings | {LABEL: LABEL}}
    report["chosen"] = diversity
    check_page(report_page(run, report | {"training": {"estimator": LABEL}}))
    check_page(gallery(run, "you/bach") + "\n\n" + bullet_list({name: name for name in NAMES}))
    (run / "report.json").write_text(json.dumps(report))
    evaluation = read_evaluation(run / "report.json")
    assert sum(name.endswith(".png") for name in evaluation.files) == len(NAMES)
