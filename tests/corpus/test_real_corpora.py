"""Real corpora, which are not part of the repository: `MIDIMAMBA_CORPORA=folder pytest tests/tokenization`.

The folder holds archives of MIDI files. A sample of each is checked here; `benchmarks/corpora.py` checks every file,
and its last results are in `benchmarks/results/`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CORPORA = Path(os.environ.get("MIDIMAMBA_CORPORA", "nowhere"))
ARCHIVES = sorted(CORPORA.glob("*.tar.gz"))

pytestmark = pytest.mark.skipif(not ARCHIVES, reason="MIDIMAMBA_CORPORA names no folder with archives of real music")


def run(script: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_text_and_ids_are_miditoks_and_notes_come_back(archive: Path) -> None:
    result = run("corpora.py", archive, "--limit", 10)
    assert result["ratio"] == 1.0
    for row in result["rows"]:
        # What these two lose is theirs: BEAT has one velocity a pitch and beat, MIDILike ends overlapping notes in
        # the order they began in.
        lossy = row["tokenization"] in ("BEAT", "MIDILike")
        assert row["notes_kept"] >= (0.7 if lossy else 0.999), row


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_every_file_is_accounted_for(archive: Path) -> None:
    result = run("ingestion.py", archive)
    assert result["ratio"] == 1.0
    assert result["lost_workers"] == 0
