"""The page of a run's report, and the parts of it that a model card shows as well."""

from pathlib import Path
from typing import Any

from midimamba.files import read_json
from midimamba.text import as_code, for_link, for_markdown

Report = dict[str, Any]

ORDERS = (1, 2, 3, 4)
"""Of the n-grams whose diversity is measured."""

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
    for part, names in (("before", tuned), ("after", tuned), ("real", diversity), ("settings", sizes)):
        for name in names:
            value = report[part][name]
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
    judged_real = (1 - before["accuracy_fake"], 1 - after["accuracy_fake"], after["accuracy_real"])
    rows.append("| judged real by the discriminator | " + " | ".join(f"{share:.0%}" for share in judged_real) + " |")
    rows.append(f"| discriminator accuracy | {before['accuracy']:.0%} | {after['accuracy']:.0%} | |")
    rows.append(
        "\nEvery column is measured on {fresh_samples} sequences of {tokens_per_sequence} tokens. Samples are drawn "
        "at temperature 1, without the grammar.".format(**report["settings"])
    )
    return "\n".join(rows)


def interpretation(report: Report) -> str:
    """What the figures of a report say, and what they cannot say, in one paragraph."""
    before, after, real = (report[column] for column in ("before", "after", "real"))
    change = after["held_out_nll"] / before["held_out_nll"] - 1
    closer = abs(after["distinct_4"] - real["distinct_4"]) < abs(before["distinct_4"] - real["distinct_4"])
    return " ".join(
        [
            f"Held-out NLL {'rose' if change > 0 else 'fell'} by {abs(change):.1%} during adversarial tuning, from "
            f"{before['held_out_nll']:.3f} to {after['held_out_nll']:.3f} nats per token (lower is better).",
            f"Distinct-4 of the samples went from {before['distinct_4']:.3f} to {after['distinct_4']:.3f}, "
            f"{'closer to' if closer else 'no closer to'} the {real['distinct_4']:.3f} of real music.",
            f"The discriminator of this run judges {1 - before['accuracy_fake']:.0%} of the samples to be real before "
            f"tuning and {1 - after['accuracy_fake']:.0%} after it. It was trained against this very generator, so "
            "that share is not an independent judgement.",
            ONE_RUN,
        ]
    )


def sample_gallery(run: Path) -> str:
    """Piano rolls of the run's samples as Markdown, with links to their MIDI and sound, relative to the run."""
    entries = []
    for picture in sorted((run / "samples").glob("*.png")):
        kinds = {".mid": "MIDI", ".wav": "sound", ".mp3": "sound"}
        files = [(label, picture.with_suffix(suffix)) for suffix, label in kinds.items()]
        links = [f"[{label}]({for_link(f'samples/{file.name}')})" for label, file in files if file.exists()]
        roll = f"![Piano roll of {for_markdown(picture.stem)}]({for_link(f'samples/{picture.name}')})"
        entries.append(f"{roll}\n\n{' · '.join(links)}")
    return "\n\n".join(entries)


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
    sections = [
        f"# {for_markdown(run.resolve().name)}",
        evaluation_table(report),
        interpretation(report),
        "![Curves of both training phases](curves.png)",
    ]
    lengths = [training_settings(run / phase).get("sequence_length") for phase in ("pretrained", "generator")]
    if lengths[0] and lengths[0] != lengths[1]:
        sections.append(
            f"Held-out NLL is measured on blocks of {lengths[0]} tokens during pre-training and of {lengths[1]} "
            "tokens during tuning, hence the step between the two phases."
        )
    if gallery := sample_gallery(run):
        sections += ["## Samples", gallery]
    sections += ["## How it was measured", bullet_list(report["settings"])]
    sections += ["## How it was trained", bullet_list(report["training"])]
    return "\n\n".join(sections) + "\n"
