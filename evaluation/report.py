"""The report of a run: what adversarial tuning did to the generator, in numbers, curves, pictures and sound.

    python -m midimamba.evaluation.report runs/demo

Everything is measured on the test split, which neither training phase has seen.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import BlockCollator, PackedBlocks, stack_blocks
from midimamba.errors import InputError, exit_on_input_error
from midimamba.evaluation.curves import draw_curves
from midimamba.evaluation.metrics import discriminator_accuracy, distinct_n, held_out_nll, self_bleu
from midimamba.files import write_whole
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.sampling import sample

Report = dict[str, Any]

NEEDED = (
    "data",
    "pretrained/config.json",
    "pretrained/trainer_state.json",
    "generator/config.json",
    "generator/trainer_state.json",
    "generator/training_args.json",
    "generator-discriminator/config.json",
)
ORDERS = (1, 2, 3, 4)
SETTINGS = (
    *("max_steps", "per_device_train_batch_size", "learning_rate", "d_learning_rate", "seed"),
    *("sequence_length", "prompt_length", "estimator", "num_rollouts", "rollout_positions"),
    *("reward", "baseline", "mle_weight", "g_steps", "d_steps", "d_epochs", "d_warmup_steps"),
)

ONE_RUN = (
    "This is one run without reward controls. It is no evidence that adversarial training helps: constant or random "
    "rewards also sharpen a policy, so a claim needs both as controls, several seeds, and likelihood and diversity "
    "side by side."
)


def write_report(run: Path, seed: int = 0, num_samples: int = 64, length: int | None = None) -> Report:
    """
    Measure a run before and after adversarial tuning; write `report.json`, `report.md` and `curves.png` into it.

    Args:
        run (`Path`): the run's folder, with `data`, `pretrained`, `generator`, `generator-discriminator`, and
            `samples`, if there are any.
        seed (`int`, *optional*, defaults to 0): of the fresh samples.
        num_samples (`int`, *optional*, defaults to 64): fresh samples a model. At most as many as the test split has
            blocks, so that samples and music are compared in sets of equal size.
        length (`int`, *optional*): tokens a block and a sample; the generator's `sequence_length` by default.

    Returns:
        `dict`: `before`, `after` and `real` with their measures, `settings` of the measuring, and `training` options.

    Raises:
        InputError: if the run lacks a part, or its test split is too short.
    """
    for part in NEEDED:
        if not (run / part).exists():
            raise InputError(f"{run} is no finished run: it has no {part}; train one, for example with `make demo`")
    training = training_settings(run / "generator")
    report = _measure(run, seed, num_samples, length or training["sequence_length"], training["prompt_length"])
    report["training"] = training
    draw_curves(run / "pretrained", run / "generator", run / "curves.png")
    write_whole(run / "report.json", json.dumps(report, indent=2) + "\n")
    write_whole(run / "report.md", _page(run, report))
    return report


def evaluation_table(report: Report) -> str:
    """The measures of a report as a Markdown table with the columns before, after and real music."""
    before, after, real = (report[column] for column in ("before", "after", "real"))
    rows = ["| on the test split | before tuning | after tuning | real music |", "|---|---:|---:|---:|"]
    rows.append(f"| held-out NLL, nats per token ↓ | {before['held_out_nll']:.3f} | {after['held_out_nll']:.3f} | |")
    for name, label in [*((f"distinct_{n}", f"distinct-{n}") for n in ORDERS), ("self_bleu_4", "self-BLEU-4")]:
        rows.append(f"| {label} | {before[name]:.3f} | {after[name]:.3f} | {real[name]:.3f} |")
    called = (1 - before["accuracy_fake"], 1 - after["accuracy_fake"], after["accuracy_real"])
    rows.append("| the discriminator calls it real | " + " | ".join(f"{share:.0%}" for share in called) + " |")
    rows.append(f"| discriminator accuracy | {before['accuracy']:.0%} | {after['accuracy']:.0%} | |")
    rows.append(
        "\n{fresh_samples} sequences of {tokens_a_sequence} tokens a column; samples are drawn at temperature 1 and "
        "without the grammar.".format(**report["settings"])
    )
    return "\n".join(rows)


def reading(report: Report) -> str:
    """What the numbers of a report say, and what they cannot say, in one paragraph."""
    before, after, real = (report[column] for column in ("before", "after", "real"))
    change = after["held_out_nll"] / before["held_out_nll"] - 1
    nearer = abs(after["distinct_4"] - real["distinct_4"]) < abs(before["distinct_4"] - real["distinct_4"])
    return " ".join(
        [
            f"Held-out NLL {'rose' if change > 0 else 'fell'} by {abs(change):.1%} during adversarial tuning, from "
            f"{before['held_out_nll']:.3f} to {after['held_out_nll']:.3f} nats per token (lower is better).",
            f"Distinct-4 of the samples went from {before['distinct_4']:.3f} to {after['distinct_4']:.3f}, "
            f"{'nearer to' if nearer else 'no nearer to'} the {real['distinct_4']:.3f} of real music.",
            f"The discriminator of this run takes {1 - before['accuracy_fake']:.0%} of the samples from before and "
            f"{1 - after['accuracy_fake']:.0%} of those from after for real; it was trained against this very "
            "generator, so that share is no independent judgement.",
            ONE_RUN,
        ]
    )


def sample_gallery(run: Path) -> str:
    """Piano rolls of the run's samples as Markdown, with links to their MIDI and sound, relative to the run."""
    entries = []
    for picture in sorted((run / "samples").glob("*.png")):
        files = [("MIDI", picture.with_suffix(".mid")), ("sound", picture.with_suffix(".wav"))]
        links = [f"[{label}](samples/{file.name})" for label, file in files if file.exists()]
        entries.append(f"![Piano roll of {picture.stem}](samples/{picture.name})\n\n{' · '.join(links)}")
    return "\n\n".join(entries)


def training_settings(folder: Path) -> dict[str, Any]:
    """What a reader asks for first of `folder`'s `training_args.json`; nothing if there is no such file."""
    file = folder / "training_args.json"
    options = json.loads(file.read_text()) if file.exists() else {}
    return {name: options[name] for name in SETTINGS if options.get(name) is not None}


def bullet_list(settings: dict[str, Any]) -> str:
    """`{"g_steps": 1}` -> ``- `g_steps`: 1``, one a line."""
    return "\n".join(f"- `{name}`: {value}" for name, value in settings.items())


def fresh_samples(model: MidiMambaForCausalLM, prompts: Tensor, length: int, seed: int) -> Tensor:
    """Continuations of `prompts` `(count, prompt)`, `(count, length)`; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = tqdm(prompts.to(model.device).split(16), desc="fresh samples", leave=False, disable=None)
        return torch.cat([sample(model, batch, length) for batch in batches])


def _measure(run: Path, seed: int, num_samples: int, length: int, prompt_length: int) -> Report:
    if length <= max(prompt_length, max(ORDERS)) or num_samples < 2:
        raise InputError(f"{num_samples} samples of {length} tokens cannot be compared; give larger numbers")
    splits, processor = load_corpus(run / "data")
    collator = BlockCollator.for_processor(processor)
    test = PackedBlocks(splits["test"], length)
    blocks = stack_blocks([test[index] for index in range(len(test))])
    if len(blocks) < 2:
        raise InputError(
            f"{run / 'data'}: the test split holds {len(blocks)} blocks of {length} tokens; two are needed"
        )
    count = min(num_samples, len(blocks))
    # Neighbouring blocks are of one piece, and repeat each other: choose from the whole split.
    real = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    discriminator = MidiDiscriminator.from_pretrained(run / "generator-discriminator", device_map=device)
    report: Report = {}
    for phase, folder in (("before", "pretrained"), ("after", "generator")):
        model = MidiMambaForCausalLM.from_pretrained(run / folder, device_map=device)
        samples = fresh_samples(model, real[:, :prompt_length], length, seed)
        report[phase] = {
            "held_out_nll": held_out_nll(model, blocks, collator),
            **_diversity(samples),
            **discriminator_accuracy(discriminator, real, samples),
        }
    report["real"] = _diversity(real)
    report["settings"] = {
        "parameters": model.num_parameters(),
        "tokens_a_sequence": length,
        "test_blocks": len(blocks),
        "fresh_samples": count,
        "evaluation_seed": seed,
    }
    return report


def _diversity(sequences: Tensor) -> dict[str, float]:
    return {f"distinct_{n}": distinct_n(sequences, n) for n in ORDERS} | {"self_bleu_4": self_bleu(sequences)}


def _page(run: Path, report: Report) -> str:
    sections = [
        f"# {run.resolve().name}",
        evaluation_table(report),
        reading(report),
        "![Curves of both training phases](curves.png)",
    ]
    lengths = [training_settings(run / phase).get("sequence_length") for phase in ("pretrained", "generator")]
    if lengths[0] and lengths[0] != lengths[1]:
        sections.append(
            f"Held-out NLL is of blocks of {lengths[0]} tokens before and {lengths[1]} tokens during tuning, hence "
            "the step between the phases."
        )
    if gallery := sample_gallery(run):
        sections += ["## Samples", gallery]
    sections += ["## Measured with", bullet_list(report["settings"])]
    sections += ["## Trained with", bullet_list(report["training"])]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m midimamba.evaluation.report",
        description="Measure a run on its test split and write report.md, report.json and curves.png into it.",
        epilog="example: python -m midimamba.evaluation.report runs/demo --num-samples 64",
    )
    parser.add_argument("run", type=Path, help="folder with data, pretrained, generator and generator-discriminator")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh samples (default: 0)")
    parser.add_argument("--num-samples", type=int, default=64, help="fresh samples a model (default: 64)")
    parser.add_argument("--length", type=int, help="tokens a sample (default: the generator's sequence_length)")
    arguments = parser.parse_args()
    with exit_on_input_error():
        write_report(**vars(arguments))


if __name__ == "__main__":
    main()
