"""Peak memory of a forward and backward pass against the sequence length: ours against transformers with mambapy.

Each pass runs in a separate process, and the peak of the process before the pass is subtracted. The last line is JSON:
`ratio` is the slope of theirs, in bytes per token, over ours; `deviation` is the largest relative distance of our
points from a straight line.
"""

import resource
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from measure import finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make(which: str, layers: int, hidden: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 1000, "hidden_size": hidden, "num_hidden_layers": layers}
    if which == "ours":
        return MidiMambaForCausalLM(MidiMambaConfig(**sizes))
    return MambaForCausalLM(MambaConfig(**sizes, use_mambapy=True, initializer_range=0.02))


def measure_here(which: str, length: int, layers: int, hidden: int) -> int:
    """The memory that a pass adds to the peak of this process, after a short pass that loads the libraries."""
    model = make(which, layers, hidden).train()
    for time in (16, length):
        before = peak_bytes()
        ids = torch.randint(1000, (1, time))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return peak_bytes() - before


def main() -> None:
    parser = make_parser(__doc__, "scan_memory.py --length 1024 2048 4096")
    parser.add_argument(
        "--length", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=6, help="layers (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("WHICH", "LENGTH"), help="measure in this process (used inside)")
    args = parser.parse_args()
    if args.one:
        print(measure_here(args.one[0], int(args.one[1]), args.layers, args.hidden))
        return
    peaks: dict[str, list[int]] = {"ours": [], "mambapy": []}
    for which, found in peaks.items():
        for length in args.length:
            sizes = ["--layers", str(args.layers), "--hidden", str(args.hidden)]
            command = [sys.executable, __file__, "--one", which, str(length), *sizes]
            found.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            print(which, length, f"{found[-1] / 2**20:.0f} MB", flush=True)
    fits = {which: np.polyfit(args.length, found, 1) for which, found in peaks.items()}
    line = np.polyval(fits["ours"], args.length)
    finish(
        {
            "benchmark": "scan_memory",
            "compared": "transformers with mambapy",
            "ratio": round(fits["mambapy"][0] / fits["ours"][0], 2),
            "bytes_per_token": {which: round(fit[0]) for which, fit in fits.items()},
            "deviation": round(float(np.abs(np.array(peaks["ours"]) / line - 1).max()), 4),
            "peak_mb": {which: [round(value / 2**20) for value in found] for which, found in peaks.items()},
            "sizes": {"length": args.length, "layers": args.layers, "hidden": args.hidden, "batch": 1},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
