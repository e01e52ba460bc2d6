"""A corpus that is made in tasks of a cluster: are two tasks twice as fast as one, and does memory grow?

The tasks run as processes of this machine (`--executor local`), each with one processor. The last line is JSON.
`ratio` is the time of one task over that of two, for the largest corpus. `processor_ratio` compares the time of
processors instead, which the load of the machine hardly changes: 1 means that dividing the work adds none.
`memory_ratio` is the peak memory of two tasks for the largest corpus over that for the smallest. The files are small
pieces that all differ, or with a source, links to its files.
"""

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from many_files import Use, simulate, unpack, watch
from measure import finish, make_parser


def make(folder: Path, tasks: int) -> Use:
    """Make a corpus in so many tasks."""
    out = folder.with_name("out")
    command = [sys.executable, "-m", "midimamba.cli", "tokenize", str(folder), "--out", str(out)]
    use = watch([*command, "--executor", "local", "--tasks", str(tasks), "--num-workers", str(tasks)], tasks)
    shutil.rmtree(out)
    return use


def measure(count: int, originals: list[Path], scratch: Path, repeats: int) -> dict[str, Any]:
    """Medians for a corpus of `count` files, with one task and with two by turns."""
    folder = scratch / "corpus"
    simulate(folder, count, originals)
    uses: dict[int, list[Use]] = {1: [], 2: []}
    for _ in range(repeats):
        for tasks, found in uses.items():
            found.append(make(folder, tasks))
    shutil.rmtree(folder)
    medians = {
        tasks: Use(*(statistics.median(values) for values in zip(*found, strict=True)))
        for tasks, found in uses.items()
    }
    return {
        "files": count,
        "seconds": {tasks: round(use.seconds, 1) for tasks, use in medians.items()},
        "processor_seconds": {tasks: round(use.processor_seconds, 1) for tasks, use in medians.items()},
        "peak_mb": {tasks: round(use.peak_mb) for tasks, use in medians.items()},
        "ratio": round(medians[1].seconds / medians[2].seconds, 3),
        "processor_ratio": round(medians[1].processor_seconds / medians[2].processor_seconds, 3),
    }


def main() -> None:
    parser = make_parser(__doc__, "cluster.py --files 20000 100000")
    parser.add_argument("source", nargs="?", help="folder or archive of MIDI files to link to")
    parser.add_argument("--files", type=int, nargs="+", default=[20_000, 100_000], help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch, originals = Path(folder), []
        if args.source:
            (scratch / "originals").mkdir()
            originals = unpack(args.source, scratch / "originals", None)
        for count in args.files:
            rows.append(measure(count, originals, scratch, args.repeats))
            print(rows[-1], flush=True)
    peaks = [row["peak_mb"][2] for row in rows]
    finish(
        {
            "benchmark": "cluster",
            "compared": "two tasks on two processors, and one on one",
            "ratio": rows[-1]["ratio"],
            "processor_ratio": rows[-1]["processor_ratio"],
            "memory_ratio": round(peaks[-1] / peaks[0], 3),
            "files": "links to real files" if args.source else "small pieces that all differ",
            "rows": rows,
            "processors": os.cpu_count(),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
