"""Malformed and extreme MIDI files in `midimamba tokenize`: is every file accounted for?

The last line is JSON. `ratio` is the share of files that are accounted for: used, dropped as duplicates, or
quarantined with a reason. Any value but 1.0 is a bug.
"""

import json
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import finish, make_parser
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.entries import Entry
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.sources import list_source


def main() -> None:
    parser = make_parser(__doc__, "ingestion.py hostile-core.tar.gz")
    parser.add_argument("source", help="folder or archive of MIDI files")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    files = sum(isinstance(item, Entry) for item in list_source(args.source))
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        report = tokenize_corpus(args.source, Path(scratch, "corpus"), CorpusOptions(num_workers=args.workers))
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in Path(scratch, "corpus", "quarantine.jsonl").read_text().splitlines()]
    used = sum(counts["pieces"] for counts in report["splits"].values())
    with_reason = sum(bool(row["reason"] and row["stage"]) for row in rows)
    reasons = Counter(f"{row['stage']}: {re.sub('[0-9][0-9,]*', 'N', row['reason'])}" for row in rows)
    finish(
        {
            "benchmark": "ingestion",
            "compared": "files accounted for, and all files",
            "ratio": (used + report["duplicates"] + with_reason) / files,
            "files": files,
            "used": used,
            "duplicates": report["duplicates"],
            "sanitized": report["sanitized"],
            "quarantined": len(rows),
            "by_stage": Counter(row["stage"] for row in rows),
            "lost_workers": sum(bool(re.match("it took|the process died", row["reason"])) for row in rows),
            "reasons": dict(reasons.most_common()),
            "seconds": round(seconds, 1),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
