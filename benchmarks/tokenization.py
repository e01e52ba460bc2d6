"""Reading MIDI files into base tokens: plain MidiTok in one process against ours in one and in two; and memory.

The last line is JSON. `ratio` is our tokens per second with one worker over MidiTok's; `scaling` is ours with two
workers over one. MidiTok only parses and encodes every file; ours also hashes and checks it, isolates it in a worker,
removes duplicates and stores the tokens. With `--memory` it simulates corpora of growing size instead, with links to
real files or with small pieces that all differ, and `ratio` is the peak memory for the largest corpus over that for
the smallest.
"""

import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from miditok import MusicTokenizer
from symusic import Score

from many_files import simulate, unpack, watch
from measure import finish, make_parser
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.reading import read_source
from midimamba.corpus.store import PieceStore
from midimamba.tokenization.tokenizer import build_tokenizer


def encode_plainly(tokenizer: MusicTokenizer, paths: list[Path]) -> int:
    """Encode with MidiTok alone and return the number of tokens."""
    return sum(len(tokenizer.encode(Score(path), encode_ids=False).ids) for path in paths)


def encode_in_a_process(tokenizer: MusicTokenizer, paths: list[Path]) -> tuple[int, float]:
    """Do the same in a fresh process, like that of our workers; return tokens and seconds."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        start = time.perf_counter()
        tokens = pool.apply(encode_plainly, (tokenizer, paths))
        return tokens, time.perf_counter() - start


def read(tokenizer: MusicTokenizer, folder: Path, workers: int) -> tuple[int, float]:
    """Read with midimamba; return tokens and seconds."""
    with tempfile.TemporaryDirectory() as scratch, PieceStore(Path(scratch, "store"), "benchmark") as store:
        start = time.perf_counter()
        read_source(str(folder), store, tokenizer, CorpusOptions(num_workers=workers))
        seconds = time.perf_counter() - start
        store.assign_splits(0.0, 0.0, 0)
        return sum(len(piece.ids) for piece in store.pieces("train")), seconds


def measure_speed(source: str, limit: int | None, repeats: int, tokenization: str) -> dict[str, object]:
    tokenizer = build_tokenizer(tokenization)
    rates: dict[str, list[float]] = {"plain": [], "one": [], "two": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = unpack(source, Path(folder), limit)
        for _ in range(repeats):  # in turn, so that a change in the load of the machine affects all three
            for name, (tokens, seconds) in {
                "plain": encode_in_a_process(tokenizer, paths),
                "one": read(tokenizer, Path(folder), 1),
                "two": read(tokenizer, Path(folder), 2),
            }.items():
                rates[name].append(tokens / seconds)
    plain, one, two = (statistics.median(rates[name]) for name in ("plain", "one", "two"))
    return {
        "benchmark": "tokenization",
        "compared": "plain MidiTok, one process",
        "ratio": round(one / plain, 3),
        "scaling": round(two / one, 3),
        "tokens_per_second": {"miditok": round(plain), "one_worker": round(one), "two_workers": round(two)},
        "ratios": [round(ours / theirs, 3) for ours, theirs in zip(rates["one"], rates["plain"], strict=True)],
        "scalings": [round(more / fewer, 3) for more, fewer in zip(rates["two"], rates["one"], strict=True)],
        "sizes": {"files": len(paths), "tokens": tokens, "tokenization": tokenization},
    }


def measure_memory(source: str | None, counts: list[int], workers: int) -> dict[str, object]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        originals = []
        if source:
            (Path(scratch) / "originals").mkdir()
            originals = unpack(source, Path(scratch) / "originals", None)
        for count in counts:
            folder = Path(scratch) / f"corpus-{count}"
            simulate(folder, count, originals)
            command = [
                sys.executable,
                "-m",
                "midimamba.cli",
                "tokenize",
                str(folder),
                "--out",
                f"{scratch}/out-{count}",
            ]
            use = watch([*command, "--num-workers", str(workers)])
            rows.append({"files": count, "seconds": round(use.seconds, 1), "peak_mb": round(use.peak_mb)})
            print(rows[-1], flush=True)
            shutil.rmtree(folder)
    return {
        "benchmark": "tokenization-memory",
        "compared": "peak memory of the largest corpus over the smallest",
        "ratio": round(rows[-1]["peak_mb"] / rows[0]["peak_mb"], 3),
        "files": "links to real files" if source else "small pieces that all differ",
        "workers": workers,
        "rows": rows,
    }


def main() -> None:
    parser = make_parser(__doc__, "tokenization.py my-midi-folder --repeats 5")
    parser.add_argument("source", nargs="?", help="folder or archive of MIDI files")
    parser.add_argument("--limit", type=int, help="use only this many files")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default: %(default)s)")
    parser.add_argument("--tokenization", default="REMI", help="tokenization of MidiTok (default: %(default)s)")
    parser.add_argument(
        "--memory", type=int, nargs="+", metavar="FILES", help="measure memory for corpora of this many files"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, with --memory (default: %(default)s)")
    args = parser.parse_args()
    if args.memory:
        result = measure_memory(args.source, args.memory, args.workers)
    elif args.source:
        result = measure_speed(args.source, args.limit, args.repeats, args.tokenization)
    else:
        parser.error("there is nothing to measure; give a source or --memory")
    finish(result, args.out)


if __name__ == "__main__":
    main()
