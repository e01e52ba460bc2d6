"""Sampling in llama.cpp: ours against the file that `midimamba.export_gguf` writes, with the same weights in float32.

llama.cpp runs by llama-cpp-python, which no extra brings: `pip install llama-cpp-python` compiles it. Both draw from
the whole distribution at temperature 1, llama.cpp with its own sampler and all sequences in one batch. Before anything
is timed, both must give the same logits for the same tokens. Every run is a process of its own, and the two sides take
turns. The figures are medians over the runs of the medians over their steps, because other programs on the machine
disturb a median least. The last line is JSON; `ratio` is the time of llama.cpp over ours, with one sequence on one
thread, and `ratio_of_processor_time` the same for the time that the processor was at it.
"""

import ctypes
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import midimamba
from measure import add_model_size, finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import draw

Case = tuple[int, int]  # sequences and threads
SIDES = ("ours", "llama.cpp")
_CHECKED = 500  # tokens of the check
_WARM_UP = 16
_FIRST = 1  # the token that all sequences begin with


class LlamaCpp:
    """llama.cpp with some sequences at once, by the functions of its own interface."""

    def __init__(self, path: Path, batch: int, threads: int, length: int):
        import llama_cpp

        self.cpp = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept, because C calls it
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = batch * length, batch
        options.n_batch = options.n_ubatch = batch
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if self.context is None:
            raise RuntimeError(f"llama.cpp cannot read {path}")
        self.sampler = llama_cpp.llama_sampler_init_dist(0)
        self.batch = llama_cpp.llama_batch_init(batch, 0, 1)
        self.batch.n_tokens = batch
        for row in range(batch):
            self.batch.n_seq_id[row], self.batch.seq_id[row][0], self.batch.logits[row] = 1, row, 1

    def read(self, tokens: list[int], position: int) -> None:
        """One token of every sequence."""
        for row, token in enumerate(tokens):
            self.batch.token[row], self.batch.pos[row] = token, position
        if code := self.cpp.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def logits(self, row: int, vocab: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.cpp.llama_get_logits_ith(self.context, row), (vocab,)).copy()

    def sample(self) -> Generator[None]:
        """One token more of every sequence at each turn."""
        tokens = [_FIRST] * self.batch.n_tokens
        for position in itertools.count():
            self.read(tokens, position)
            tokens = [self.cpp.llama_sampler_sample(self.sampler, self.context, row) for row in range(len(tokens))]
            yield


def sample(model: MidiMambaForCausalLM, batch: int) -> Generator[None]:
    """The same as `midimamba.modeling.sampling.sample` does it."""
    tokens, state = torch.full((batch, 1), _FIRST), model.make_state(batch)
    with inference(model):
        while True:
            tokens = draw(model.next_logits(tokens, state))[:, None]
            yield


def check_same_logits(folder: Path, batch: int) -> float:
    """The largest difference of any logit, with different tokens in every sequence."""
    model = MidiMambaForCausalLM.from_pretrained(folder)
    theirs = LlamaCpp(folder / "model.gguf", batch, 1, _CHECKED)
    ids = torch.randint(model.config.vocab_size, (batch, _CHECKED), generator=torch.Generator().manual_seed(0))
    with inference(model):
        expected = model(input_ids=ids).logits.numpy()
    worst = 0.0
    for position, tokens in enumerate(ids.T.tolist()):
        theirs.read(tokens, position)
        for row in range(batch):
            difference = theirs.logits(row, model.config.vocab_size) - expected[row, position]
            worst = max(worst, float(np.abs(difference).max()))
    if worst > 1e-5:
        raise RuntimeError(f"the logits of llama.cpp differ by {worst}")
    return worst


def measure_here(side: str, folder: Path, cases: list[Case], length: int) -> list[tuple[float, float]]:
    """Milliseconds for one token of every sequence, by the clock and of processor time, in each case."""
    model = MidiMambaForCausalLM.from_pretrained(folder) if side == "ours" else None
    found = []
    for batch, threads in cases:
        torch.set_num_threads(threads)
        steps: Generator[None] = (
            sample(model, batch)
            if model is not None
            else LlamaCpp(folder / "model.gguf", batch, threads, _WARM_UP + length).sample()
        )
        for _ in range(_WARM_UP):
            next(steps)
        clocks = [(time.perf_counter(), time.process_time())]
        for _ in range(length):
            next(steps)
            clocks.append((time.perf_counter(), time.process_time()))
        steps.close()
        wall, processor = 1e3 * np.median(np.diff(clocks, axis=0), axis=0)
        found.append((float(wall), float(processor)))
    return found


def measure(side: str, folder: Path, cases: list[Case], length: int) -> list[tuple[float, float]]:
    """The same in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(threads for _, threads in cases))}
    environment.pop("GOMP_SPINCOUNT", None)
    if side == "ours":  # as our commands set it; llama.cpp runs as its own programs do
        environment["GOMP_SPINCOUNT"] = "10000"
    command = [sys.executable, __file__, "--one", json.dumps([side, str(folder), cases, length])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    found: list[tuple[float, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_row(case: Case, runs: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """The medians of both sides in a case, from the figures of each run."""
    row: dict[str, Any] = dict(zip(("batch", "threads"), case, strict=True))
    for kind, name in enumerate(("", "processor_")):
        each = {side: [figures[kind] for figures in found] for side, found in runs.items()}
        median = {side: statistics.median(found) for side, found in each.items()}
        row[f"{name}ms_per_step"] = {side: round(value, 3) for side, value in median.items()}
        row[f"{name}ms_per_step_each"] = {side: [round(ms, 3) for ms in found] for side, found in each.items()}
        row["ratio_of_processor_time" if name else "ratio"] = round(median["llama.cpp"] / median["ours"], 2)
    return row


def save(folder: Path, layers: int, hidden: int, vocab: int) -> None:
    """A generator, as a checkpoint and as GGUF."""
    torch.manual_seed(0)
    config = MidiMambaConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers)
    model = MidiMambaForCausalLM(config).eval()
    model.save_pretrained(folder)
    midimamba.export_gguf(model, folder / "model.gguf")


def main() -> None:
    parser = make_parser(__doc__, "gguf_step.py --repeats 3")
    add_model_size(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sequences (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each side (default: %(default)s)")
    parser.add_argument("--one", metavar="RUN", help="measure in this process (internal)")
    args = parser.parse_args()
    if args.one:
        side, folder, cases, length = json.loads(args.one)
        print(json.dumps(measure_here(side, Path(folder), cases, length)))
        return
    version = importlib.import_module("llama_cpp").__version__
    cases = list(itertools.product(args.batch, args.threads))
    runs: dict[str, list[list[tuple[float, float]]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        save(Path(name), args.layers, args.hidden, args.vocab)
        difference = max(check_same_logits(Path(name), batch) for batch in args.batch)
        for _ in range(args.repeats):
            for side, found in runs.items():
                found.append(measure(side, Path(name), cases, args.length))
                print(side, found[-1], flush=True)
    rows = [
        make_row(case, {side: [run[index] for run in found] for side, found in runs.items()})
        for index, case in enumerate(cases)
    ]
    finish(
        {
            "benchmark": "llama-cpp",
            "compared": f"llama.cpp, by llama-cpp-python {version}, in float32",
            "ratio": rows[0]["ratio"],
            "ratio_of_processor_time": rows[0]["ratio_of_processor_time"],
            "rows": rows,
            "largest_difference": difference,
            "sizes": {"layers": args.layers, "hidden": args.hidden, "vocab": args.vocab, "length": args.length},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
