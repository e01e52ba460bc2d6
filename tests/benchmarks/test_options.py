"""Options of benchmarks are options of adversarial training: a renamed one would only fail in a run of hours."""

import dataclasses
import importlib
from typing import Any

from midimamba.training.adversarial import AdversarialArguments
from midimamba.training.adversarial_config import AdversarialConfig


def test_every_option_of_a_benchmark_exists() -> None:
    known = {field.name for kind in (AdversarialArguments, AdversarialConfig) for field in dataclasses.fields(kind)}
    ablation, memory, oracle, music_runs = map(importlib.import_module, ("ablation", "memory", "oracle", "music_runs"))
    tables: dict[str, dict[str, Any]] = {**ablation.ARMS, **music_runs.TRAINED, "paper": music_runs.PAPER}
    tables |= {f"oracle {arm}": tuning.options for arm, tuning in oracle.ADVERSARIAL.items()}
    tables |= {"oracle --quick": oracle.QUICK.adversarial, "memory": memory.ALGORITHM_ALONE}
    assert {name: set(options) - known for name, options in tables.items() if set(options) - known} == {}
