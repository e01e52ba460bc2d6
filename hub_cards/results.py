"""Figures of a report as the Hub reads them: in the metadata of a card, and in `.eval_results`."""

from collections.abc import Sequence
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

RESULTS_FILE = ".eval_results/midimamba.yaml"
_TASK = "text-generation"


class Result(NamedTuple):
    """
    One figure.

    Args:
        metric (`str`): its name in the report, such as `"held_out_nll"`.
        label (`str`): what it is called.
        value (`float`): finite.
        interval (`tuple[float, float]`, *optional*): its 95 % interval.
    """

    metric: str
    label: str
    value: float
    interval: tuple[float, float] | None = None


def model_index(results: Sequence[Result], data: str, split: str) -> list[EvalResult]:
    """
    The figures as the `model-index` of a card.

    Args:
        results (`Sequence[Result]`): at least one.
        data (`str`): the corpus that they were measured on: its repository on the Hub, or its name.
        split (`str`): the part of it.
    """
    return [
        EvalResult(
            task_type=_TASK,
            task_name="music generation",
            dataset_type=data,
            dataset_name=data,
            dataset_split=split,
            metric_type=result.metric,
            metric_name=result.label,
            metric_value=result.value,
            metric_args=None if result.interval is None else {"95 % interval": list(result.interval)},
        )
        for result in results
    ]


def eval_results(results: Sequence[Result], dataset: str, split: str) -> str:
    """
    The figures as YAML for `.eval_results`, from which the Hub makes leaderboards. It shows those whose data set is
    registered as a benchmark; see https://huggingface.co/docs/hub/eval-results.

    Args:
        results (`Sequence[Result]`): at least one.
        dataset (`str`): the data set on the Hub that they were measured on.
        split (`str`): the part of it.
    """
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=result.metric,
            value=result.value,
            notes=f"{result.label}, split {split}"
            + ("" if result.interval is None else ", 95 % interval {:.4g} to {:.4g}".format(*result.interval)),
        )
        for result in results
    ]
    text: str = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return text
