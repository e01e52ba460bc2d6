"""The page of a run's report, and the parts of it that a model card shows as well."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from midimamba.files import read_json
from midimamba.text import as_code, for_link, for_markdown
from midimamba.tokenization.sampling_limits import BEST_OF

Report = dict[str, Any]

ORDERS = (1, 2, 3, 4)
"""Of the n-grams whose diversity is measured."""

MUSICAL_DISCRIMINATOR = "musical-discriminator"
"""Under this name a report has what it measured of a run's discriminator of musical features."""
BOTH_DISCRIMINATORS = "both-discriminators"
"""And under this one, of the sum of its log-odds and those of the discriminator of tokens."""
_CALLED = {MUSICAL_DISCRIMINATOR: "discriminator of musical features", BOTH_DISCRIMINATORS: "two together"}

MUSIC = {
    "bar_self_similarity_4": "likeness of bars 4 apart",
    "bar_self_similarity_8": "likeness of bars 8 apart",
    "polyphony": "notes at once, on average",
    "most_voices": "notes at once, at most",
    "notes_per_bar": "notes per bar",
    "scale_consistency": "share of notes in one scale",
    "key_stability": "share of time in the main key",
    "groove_consistency": "likeness of neighbouring rhythms",
}
"""The features that a report shows, and what they are called there. Each is a mean over pieces."""

SETTINGS = (
    *("max_steps", "per_device_train_batch_size", "learning_rate", "d_learning_rate", "seed"),
    *("sequence_length", "prompt_length", "estimator", "num_rollouts", "rollout_positions"),
    *("reward", "baseline", "mle_weight", "d_steps", "d_epochs", "d_warmup_steps"),
)

ONE_RUN = (
    "This is one run without reward controls. It is no evidence that adversarial training helps: constant or random "
    "rewards also sharpen a policy, so such a claim needs both as controls, several seeds, and likelihood and "
    "diversity side by side."
)
CONTROLS_OF_DISTILLATION = (
    "The benchmark `music.py` of midimamba compared them for distillation, with eight generators of Nottingham tunes. "
    "A fresh classifier, which is right half of the time if it hears no difference, told their samples from "
    "real music in 69.5 % of the cases before and 63.8 % after it, but in 69.7 % after distillation with a constant "
    "reward and in 69.5 % with shuffled odds."
)
"""The figures are those of `distilled, more draws` in benchmarks/results/music-nottingham.json."""


def check_report(report: Report) -> None:
    """
    Check that the report of a run has every figure that its table and its interpretation show.

    Raises:
        KeyError: if one is missing.
        TypeError: if one is not a number.
    """
    diversity = [*(f"distinct_{n}" for n in ORDERS), "self_bleu_4"]
    tuned = [*diversity, "held_out_nll", "accuracy", "accuracy_real", "accuracy_fake"]
    sizes = ["fresh_samples", "tokens_per_sequence"]
    parts = {name: report[name] for name in ("before", "after", "real", "settings")}
    names = {"before": tuned, "after": tuned, "real": diversity, "settings": sizes}
    for kind in (MUSICAL_DISCRIMINATOR, BOTH_DISCRIMINATORS):
        if kind in report["after"]:
            for phase in ("before", "after"):
                parts[f"{phase}.{kind}"], names[f"{phase}.{kind}"] = report[phase][kind], tuned[-3:]
    for part, figures in parts.items():
        for name in names[part]:
            value = figures[name]
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{part}.{name} is {type(value).__name__} and not a number")
    if not report["before"]["held_out_nll"]:
        raise TypeError("before.held_out_nll is 0, so nothing can be compared with it")


def evaluation_table(report: Report) -> str:
    """The measures of a report as a Markdown table with the columns before, after and real music."""
    before, after, real = (report[column] for column in ("before", "after", "real"))
    rows = ["| on the test split | before tuning | after tuning | real music |", "|---|---:|---:|---:|"]
    rows.append(f"| held-out NLL, nats per token ↓ | {before['held_out_nll']:.3f} | {after['held_out_nll']:.3f} | |")
    for name, label in [*((f"distinct_{n}", f"distinct-{n}") for n in ORDERS), ("self_bleu_4", "self-BLEU-4")]:
        rows.append(f"| {label} | {before[name]:.3f} | {after[name]:.3f} | {real[name]:.3f} |")
    rows += _judged_rows("discriminator", before, after)
    for kind in (MUSICAL_DISCRIMINATOR, BOTH_DISCRIMINATORS):
        if kind in after:
            rows += _judged_rows(_CALLED[kind], before[kind], after[kind])
    rows.append(
        "\nDiversity is measured on {fresh_samples} sequences of {tokens_per_sequence} tokens, drawn at temperature 1 "
        "without the grammar.".format(**report["settings"])
    )
    if "judged_real_in_training" in real:
        rows.append(
            "What is judged are pieces as `midimamba generate` draws them, and beginnings of real ones. Of as many "
            f"pieces of the training split, {real['judged_real_in_training']:.0%} are judged to be real"
            + (f" (AUC {real['auc_in_training']:.2f})." if "auc_in_training" in real else ".")
        )
    return "\n".join(rows)


def _judged_rows(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    judged_real = (1 - before["accuracy_fake"], 1 - after["accuracy_fake"], after["accuracy_real"])
    rows = [
        f"| judged real by the {name} | " + " | ".join(f"{share:.0%}" for share in judged_real) + " |",
        f"| {name}: accuracy | {before['accuracy']:.0%} | {after['accuracy']:.0%} | |",
    ]
    if "auc" in before:  # not in reports of earlier versions
        rows.append(f"| {name}: AUC | {before['auc']:.2f} | {after['auc']:.2f} | |")
    return rows


def music_table(report: Report) -> str:
    """What the music of a report is like, as a Markdown table with a column for each model or choice."""
    columns = [report[column] for column in ("before", "after", "chosen", "real")]
    rows = ["| | before tuning | after tuning | chosen | real music |", "|---|---:|---:|---:|---:|"]
    nats = " | ".join(f"{column['held_out_nll_per_note']:.3f}" for column in columns[:2])
    rows.append(f"| held-out NLL, nats per note ↓ | {nats} | | |")
    for name, label in MUSIC.items():
        values = (column["music"][name] for column in columns)
        rows.append(f"| {label} | " + " | ".join("" if value is None else f"{value:.2f}" for value in values) + " |")
    rows.append(
        "\nSamples are {sampled_pieces} pieces of {bars_per_piece} bars of each model, drawn as `midimamba generate` "
        "draws them. `chosen`: the tuned model, with its discriminators choosing among {draws} draws; they may hear "
        "some of these features themselves. A random choice would give the figures after tuning. Real music is the "
        "first {bars_per_piece} bars of the {real_pieces} pieces of the test split. Each figure is a mean: the "
        "closer to real music, the better.".format(draws=BEST_OF, **report["settings"])
    )
    return "\n".join(rows)


def interpretation(report: Report) -> str:
    """What the figures of a report say, and what they cannot say, in one paragraph."""
    before, after, real = (report[column] for column in ("before", "after", "real"))
    change = after["held_out_nll"] / before["held_out_nll"] - 1
    who, judged = "The discriminator of this run judges", (before, after)
    if BOTH_DISCRIMINATORS in after:
        who = "The discriminators of this run together judge"
        judged = before[BOTH_DISCRIMINATORS], after[BOTH_DISCRIMINATORS]
    taken = [f"{1 - column['accuracy_fake']:.0%}" for column in judged]
    settings = report.get("training", {})
    is_distilled = settings.get("estimator") == "distill" and settings.get("max_steps") != 0
    closer = abs(after["distinct_4"] - real["distinct_4"]) < abs(before["distinct_4"] - real["distinct_4"])
    return " ".join(
        [
            f"Held-out NLL {'rose' if change > 0 else 'fell'} by {abs(change):.1%} during adversarial tuning, from "
            f"{before['held_out_nll']:.3f} to {after['held_out_nll']:.3f} nats per token (lower is better).",
            f"Distinct-4 of the samples went from {before['distinct_4']:.3f} to {after['distinct_4']:.3f}, "
            f"{'closer to' if closer else 'no closer to'} the {real['distinct_4']:.3f} of real music.",
            f"{who} {taken[0]} of the samples to be real before tuning and {taken[1]} after it. That is not an "
            "independent judgement, because the training was against this very generator.",
            ONE_RUN,
            *([CONTROLS_OF_DISTILLATION] if is_distilled else []),
        ]
    )


def side_by_side(run: Path) -> str:
    """Piano rolls of the run's samples beside real music, as a Markdown table."""
    pairs = zip_longest(*(sorted((run / folder).glob("*.png")) for folder in ("samples", "real")))
    rows = [" | ".join("<br>".join(_roll_and_links(picture)) if picture else "" for picture in pair) for pair in pairs]
    return "\n".join(["| samples | real music, from the test split |", "|---|---|", *(f"| {row} |" for row in rows)])


def _roll_and_links(picture: Path) -> tuple[str, str]:
    """A piano roll of the run, and links to what there is to hear of it."""
    folder = picture.parent.name
    kinds = {".mid": "MIDI", ".wav": "sound", ".mp3": "sound"}
    files = [(label, picture.with_suffix(suffix)) for suffix, label in kinds.items()]
    links = [f"[{label}]({for_link(f'{folder}/{file.name}')})" for label, file in files if file.exists()]
    roll = f"![Piano roll of {for_markdown(picture.stem)}]({for_link(f'{folder}/{picture.name}')})"
    return roll, " · ".join(links)


def training_settings(folder: Path) -> dict[str, Any]:
    """The options of `folder`'s `training_args.json` that a reader asks for first; empty if there is no such file."""
    file = folder / "training_args.json"
    options = read_json(file) if file.exists() else {}
    return {name: options[name] for name in SETTINGS if options.get(name) is not None}


def bullet_list(settings: dict[str, Any]) -> str:
    """`{"d_steps": 1}` -> ``- `d_steps`: 1``, one per line."""
    return "\n".join(f"- {as_code(name)}: {for_markdown(str(value))}" for name, value in settings.items())


def report_page(run: Path, report: Report) -> str:
    """The report of a run as Markdown."""
    sections = [f"# {for_markdown(run.resolve().name)}"]
    if any((run / "samples").glob("*.png")):
        sections += ["## Samples beside real music", side_by_side(run)]
    sections += [
        *("## What the music is like", music_table(report)),
        *("## What tuning did", evaluation_table(report)),
        interpretation(report),
        "![Curves of both training phases](curves.png)",
    ]
    lengths = [training_settings(run / phase).get("sequence_length") for phase in ("pretrained", "generator")]
    if lengths[0] and lengths[0] != lengths[1]:
        sections.append(
            f"Held-out NLL is measured on blocks of {lengths[0]} tokens during pre-training and of {lengths[1]} "
            "tokens during tuning, hence the step between the two phases."
        )
    sections += ["## How it was measured", bullet_list(report["settings"])]
    sections += ["## How it was trained", bullet_list(report["training"])]
    return "\n\n".join(sections) + "\n"
