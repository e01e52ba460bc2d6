"""The curves of a run, from the log of transformers' Trainer: four small plots in one picture."""

from pathlib import Path
from typing import Any

from midimamba.errors import InputError
from midimamba.evaluation.rendering import FAINT, INK, new_figure, quiet, save_figure
from midimamba.evaluation.report_page import training_settings
from midimamba.files import read_json

Log = list[dict[str, float]]

DISCRIMINATOR = {
    "d_loss": "loss, training",
    "d_accuracy": "accuracy, training",
    "eval_d_accuracy_real": "accuracy, held-out",
    "eval_d_accuracy_fake": "accuracy, samples",
}
REWARD = {"reward": "mean over a batch"}
REWARDS = {"discriminator": "Reward: probability of being real", "log-odds": "Reward: log-odds of being real"}
DIVERSITY = {f"eval_distinct_{n}": f"distinct-{n}" for n in (1, 2, 3, 4)} | {"eval_self_bleu_4": "self-BLEU-4"}


def draw_curves(pretrained: Path, generator: Path, path: Path) -> None:
    """
    Draw likelihood, discriminator, reward and diversity over training as a PNG of 1400 × 800 pixels.

    Args:
        pretrained (`Path`): folder of the maximum-likelihood phase, with `trainer_state.json`.
        generator (`Path`): folder of the adversarial phase, with `trainer_state.json`.
        path (`Path`): the PNG file, replaced atomically.

    Raises:
        InputError: if matplotlib is not installed.
    """
    first, second = _read_log(pretrained), _read_log(generator)
    figure = new_figure(width=1400, height=800)
    (likelihood, discriminator), (reward, diversity) = figure.subplots(2, 2)
    _draw_likelihood(likelihood, first, second)
    _draw_lines(discriminator, second, DISCRIMINATOR, "Discriminator")
    rewarded = training_settings(generator).get("reward", "discriminator")
    _draw_lines(reward, second, REWARD, REWARDS.get(rewarded, f"Reward: {rewarded}"))
    _draw_lines(diversity, second, DIVERSITY, "Diversity of samples")
    discriminator.set_ylim(0, max(1.03, discriminator.get_ylim()[1]))  # a loss may exceed 1
    diversity.set_ylim(0, 1.03)
    if rewarded == "discriminator":
        reward.set_ylim(0, 1.03)
    for axes in figure.axes:
        axes.grid(axis="y", color=FAINT)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, labelcolor=INK)
        quiet(axes)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    save_figure(figure, path)


def _draw_likelihood(axes: Any, first: Log, second: Log) -> None:
    """Draw both phases side by side at equal width, whatever their numbers of steps."""
    before, after = (max((row["step"] for row in log), default=1) for log in (first, second))
    steps, values = _series(first, "eval_loss")
    more_steps, more_values = _series(second, "eval_loss")
    positions = [step / before for step in steps] + [1 + step / after for step in more_steps]
    values += more_values
    axes.plot(positions, values, label="held-out NLL", **_line(values))
    steps, entropies = _series(second, "entropy")
    axes.plot([1 + step / after for step in steps], entropies, label="policy entropy", **_line(entropies))
    axes.axvspan(1, 2, color="#f4f5f7", zorder=0)
    axes.set_xlim(0, 2.02)
    axes.set_xticks([0, 0.5, 1, 1.5, 2], ["0", "maximum likelihood", f"{before:,}", "adversarial", f"{after:,}"])
    if values:
        # The first values of an untrained model would flatten everything of interest.
        axes.set_ylim(0.9 * min(values + entropies), min(max(values + entropies), 1.6 * min(values)))
        axes.annotate(f"{values[-1]:.3f}", (positions[-1], values[-1]), (0, 6), textcoords="offset points", ha="right")
    _title(axes, "Likelihood and entropy, in nats per token")


def _draw_lines(axes: Any, log: Log, labels: dict[str, str], title: str) -> None:
    for key, label in labels.items():
        steps, values = _series(log, key)
        axes.plot(steps, values, label=label, **_line(values))
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_xlabel("adversarial step", color=INK)
    _title(axes, title)


def _title(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=9)


def _line(values: list[float]) -> dict[str, Any]:
    return {"linewidth": 1.8, "marker": "o" if len(values) < 12 else "", "markersize": 4}


def _series(log: Log, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the log entries that have `key`."""
    found = [(row["step"], row[key]) for row in log if key in row]
    return [step for step, _ in found], [value for _, value in found]


def _read_log(folder: Path) -> Log:
    path = folder / "trainer_state.json"
    log = read_json(path).get("log_history")
    if not isinstance(log, list) or not all(_is_row(row) for row in log):
        raise InputError(f"{path} has no `log_history` of numbers: copy the file of the run again")
    return log


def _is_row(row: Any) -> bool:
    """Whether it holds a step and numbers, as far as they are drawn."""
    shown = {*DISCRIMINATOR, *REWARD, *DIVERSITY, "eval_loss", "entropy", "step"}
    return (
        isinstance(row, dict) and all(isinstance(row.get(name, 0), (int, float)) for name in shown) and "step" in row
    )
