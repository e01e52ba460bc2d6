"""The runs behind the rule of `midimamba train`: which size, learning rate, weight decay and context suit a corpus and
a time.

Every run is trained for the same processor time on one thread, new keys included and evaluations not, with the
schedule of `midimamba train --minutes`. It is measured on the whole validation split in nats per note, so that
contexts can be compared.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, set_seed
from transformers.utils.logging import disable_progress_bar

from measure import finish, make_parser
from midimamba import MidiMambaForCausalLM
from midimamba.corpus.augmentation import Augmentation
from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import IGNORED, BlockCollator, some_of
from midimamba.training.deadline import Deadline
from midimamba.training.plan import LAGS, TRANSPOSE
from midimamba.training.pretrain import PretrainArguments, new_config
from midimamba.training.scripts import load_blocks
from resumable import Row, complete
from tuning import timed_arguments

# What arms change, one at a time.
BASE: dict[str, Any] = {
    "hidden": 128,
    "layers": 4,
    "rate": 3e-3,
    "decay": 0.1,
    "length": 256,
    "batch": 4,
    "transpose": TRANSPOSE,
}
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "width 64": {"hidden": 64},
    "width 192": {"hidden": 192},
    "width 256, 6 layers": {"hidden": 256, "layers": 6},
    "rate 1e-3": {"rate": 1e-3},
    "rate 6e-3": {"rate": 6e-3},
    "decay 0.01": {"decay": 0.01},
    "decay 0.5": {"decay": 0.5},
    "context 512": {"length": 512, "batch": 2},
    "context 1024": {"length": 1024, "batch": 1},
    "batch 8": {"batch": 8},
    "batch 16": {"batch": 16},
    "keys as they are": {"transpose": 0},
}


class _Trainer(Trainer):
    """A trainer whose evaluations take no time."""

    evaluating = 0.0

    def seconds(self) -> float:
        """Processor time, that of evaluations aside."""
        return time.process_time() - self.evaluating

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.process_time()
        found = super().evaluate(*args, **kwargs)
        self.evaluating += time.process_time() - start
        return found


def run(arm: str, seed: int, data: str, seconds: float) -> Row:
    """Train an arm for `seconds` of processor time; its best held-out NLL, and where on the way it was."""
    options = {**BASE, **ARMS[arm]}
    length = options["length"]
    blocks, validation, processor = load_blocks(data, length, Augmentation(transpose=options["transpose"]), seed)
    set_seed(seed)
    shape = {"hidden_size": options["hidden"], "num_hidden_layers": options["layers"]}
    model = MidiMambaForCausalLM(new_config(PretrainArguments(data, lookback_bars=list(LAGS), **shape), processor))
    collator = BlockCollator.for_processor(processor)
    model(**collator([blocks[0]])).loss.backward()  # kernels are compiled, which no run shall pay for
    model.zero_grad()
    clock = Deadline(seconds, evaluations=6)
    with tempfile.TemporaryDirectory() as folder:
        args = timed_arguments(
            folder,
            per_device_train_batch_size=options["batch"],
            per_device_eval_batch_size=4,
            learning_rate=options["rate"],
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=options["decay"],
            seed=seed,
            logging_steps=1_000_000,
        )
        trainer = _Trainer(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=blocks,
            eval_dataset=some_of(validation, 8192 // length),
            callbacks=[clock],
        )
        clock.clock = trainer.seconds
        trainer.train()
        curve = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        trainer.eval_dataset = validation
        loss = trainer.evaluate()["eval_loss"]
    return {
        "arm": arm,
        "seed": seed,
        "settings": {"data": data, "seconds": seconds},
        "nll_per_note": round(loss * _targets_per_note(data), 4),
        "nll_per_token": round(loss, 4),
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.global_step * options["batch"] / len(blocks), 2),
        "tokens_per_second": round(trainer.state.global_step * options["batch"] * length / seconds),
        "training_tokens": len(blocks) * length,
        "best_at": round((curve.index(min(curve)) + 1) / len(curve), 2),
        "curve": [round(value, 4) for value in curve],
    }


def _targets_per_note(data: str) -> float:
    """Tokens that are predicted, per note of the validation split."""
    splits, processor = load_corpus(data)
    collator = BlockCollator.for_processor(processor)
    ids = torch.tensor([index for row in splits["validation"]["input_ids"] for index in row])
    labels = collator.separate(ids[None])["labels"]
    return int((labels != IGNORED).sum()) / sum(splits["validation"]["num_notes"])


class _Job:
    """A run with its corpus and time, that other processes can import."""

    def __init__(self, data: str, seconds: float):
        self.data, self.seconds = data, seconds

    def __call__(self, arm: str, seed: int) -> Row:
        return run(arm, seed, self.data, self.seconds)


def described(row: Row) -> str:
    data, nats = row["settings"]["data"], row["nll_per_note"]
    return f"{data}: {row['arm']}: {nats} nats per note, {row['epochs']} epochs"


def main() -> None:
    parser = make_parser(__doc__, "recipe.py --data data --seconds 60 --rows recipe.jsonl")
    parser.add_argument("--data", nargs="+", required=True, help="corpora made by `midimamba tokenize`")
    parser.add_argument("--seconds", type=float, default=60, help="processor time of a run (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which arms to run")
    parser.add_argument("--seed", type=int, default=0, help="of all runs (default: %(default)s)")
    parser.add_argument("--rows", type=Path, required=True, help="file of finished runs; a second start continues")
    args = parser.parse_args()

    torch.set_num_threads(1)
    disable_progress_bar()
    corpora: dict[str, dict[str, Row]] = {}
    for data in args.data:
        settings = {"data": data, "seconds": args.seconds}
        jobs = [(arm, args.seed) for arm in args.arms]
        complete(jobs, _Job(data, args.seconds), settings, args.rows, 1, described)
    kept = [json.loads(line) for line in args.rows.read_text().splitlines()]
    for row in kept:
        name = f"{Path(row['settings']['data']).name}, {row['settings']['seconds']:g} s"
        corpora.setdefault(name, {})[row["arm"]] = {key: row[key] for key in row if key not in ("arm", "settings")}
    finish(
        {
            "compared": "held-out NLL per note, arms of one corpus and processor time",
            "ratio": None,
            "corpora": corpora,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
