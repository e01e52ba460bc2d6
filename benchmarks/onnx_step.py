"""Sampling one sequence on one core: ours against the step that `midimamba.export_onnx` writes, in onnxruntime.

The last line is JSON; `ratio` is the time of onnxruntime over that of torch's operations, which is what there is
without the extra `cpu`, and `ratio_ours` the same over ours with the compiled kernels. All draw from the whole
distribution at temperature 1. Before anything is timed, they must give the same logits for the same tokens. Runs
alternate, and medians count.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from measure import add_model_size, finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, RecurrentCache, export_onnx
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import sample
from midimamba.modeling.scan_backends import VARIABLE

_CHECKED = 64  # steps


class OnnxSampler:
    """Samples with onnxruntime and NumPy alone, as a program without torch does."""

    def __init__(self, path: Path, batch: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.shapes = {
            node.name: (batch, *node.shape[1:]) for node in self.session.get_inputs() if node.name != "input_ids"
        }

    def start(self) -> dict[str, np.ndarray]:
        return {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()}

    def step(self, tokens: np.ndarray, states: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits of the next tokens, and the states after these."""
        found = dict(zip(self.outputs, self.session.run(None, {"input_ids": tokens, **states}), strict=True))
        return found["logits"], {name: found[f"new_{name}"] for name in states}

    def sample(self, tokens: np.ndarray, length: int, rng: np.random.Generator) -> None:
        states = self.start()
        for _ in range(length):
            logits, states = self.step(tokens, states)
            # The largest of logits with Gumbel noise is a draw from their softmax.
            tokens = (logits + rng.gumbel(size=logits.shape)).argmax(-1)[:, None]


def check_same_logits(model: MidiMambaForCausalLM, sampler: OnnxSampler, ids: torch.Tensor) -> float:
    """The largest difference of any logit."""
    worst, states = 0.0, sampler.start()
    with inference(model):
        cache = RecurrentCache.for_model(model, len(ids))
        for step in range(ids.shape[1]):
            token = ids[:, step : step + 1]
            expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
            logits, states = sampler.step(token.numpy(), states)
            worst = max(worst, float(np.abs(logits - expected.numpy()).max()))
    if worst > 1e-4:
        raise RuntimeError(f"the logits of onnxruntime differ by {worst}")
    return worst


def sample_with_torch(model: MidiMambaForCausalLM, prompts: torch.Tensor, length: int) -> None:
    """Sample with operations of torch alone."""
    os.environ[VARIABLE] = "chunked"
    try:
        sample(model, prompts, length)
    finally:
        del os.environ[VARIABLE]


def measure(layout: str, args: Any, batch: int, folder: Path) -> dict[str, Any]:
    """Times of all, for models with the same weights."""
    torch.manual_seed(0)
    config = MidiMambaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, num_hidden_layers=args.layers, layout=layout
    )
    model = MidiMambaForCausalLM(config).eval()
    export_onnx(model, folder / f"{layout}.onnx")
    sampler = OnnxSampler(folder / f"{layout}.onnx", batch)
    prompts = torch.randint(3, args.vocab, (batch, 1))
    difference = check_same_logits(model, sampler, torch.randint(3, args.vocab, (batch, _CHECKED)))
    runs = {
        "ours": lambda length: sample(model, prompts, length),
        "torch": lambda length: sample_with_torch(model, prompts, length),
        "onnx": lambda length: sampler.sample(prompts.numpy(), length, np.random.default_rng(0)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(8)
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(args.length)
            times[name].append(1e3 * (time.perf_counter() - start) / args.length)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "layout": layout,
        "batch": batch,
        "ms_per_step": {name: round(value, 3) for name, value in median.items()},
        "ms_per_step_each": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "ratio": round(median["onnx"] / median["torch"], 2),
        "ratio_ours": round(median["onnx"] / median["ours"], 2),
        "largest_difference": difference,
    }


def main() -> None:
    parser = make_parser(__doc__, "onnx_step.py --repeats 3")
    add_model_size(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn (default: %(default)s)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["mamba", "mamba-mlp", "moe-mamba"],
        help="the ratio is of the first (default: %(default)s)",
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for batch in args.batch:
            for layout in args.layouts:
                rows.append(measure(layout, args, batch, Path(folder)))
                print(rows[-1], flush=True)
    finish(
        {
            "benchmark": "onnx",
            "compared": f"the exported step in onnxruntime {onnxruntime.__version__}, on one core",
            "ratio": rows[0]["ratio"],
            "ratio_ours": rows[0]["ratio_ours"],
            "rows": rows,
            "sizes": {"layers": args.layers, "hidden": args.hidden, "vocab": args.vocab, "length": args.length},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
