"""What all tasks of a corpus know, and the names of the files in which they find what was listed for them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from midimamba.corpus.addresses import Folder
from midimamba.corpus.options import CorpusOptions
from midimamba.corpus.reading import Found

REPORT = "corpus.json"
LISTED, OTHERS = "listed", "others.sqlite"
"""In the work folder: the files for each task, and those that are refused already, with all labels."""


@dataclass(frozen=True)
class Job:
    """
    What all tasks of a corpus know.

    Args:
        source (`str`): as for [`~midimamba.corpus.build.tokenize_corpus`]; a path is absolute.
        out (`str`): the folder of the corpus, or its address.
        work (`str`): the folder in which tasks hand their results to each other, or its address.
        options (`CorpusOptions`): how the corpus is made.
        arguments (`dict[str, Any]`): what the result depends on, apart from the files.
        reader (`str`): a digest of everything that reading depends on.
        tasks (`int`): number of tasks.
        num_rows (`int`): rows of a data set.
        num_files (`int`), skipped (`dict[str, int]`): how many files there are, and those that are skipped, by reason.
    """

    source: str
    out: str
    work: str
    options: CorpusOptions
    arguments: dict[str, Any]
    reader: str
    tasks: int
    num_rows: int
    num_files: int
    skipped: dict[str, int]

    @property
    def found(self) -> Found:
        """The files of the source."""
        return Found(self.num_files, Counter(self.skipped))

    @property
    def product(self) -> Folder:
        """Where the corpus grows: where it will be, or in the work folder if it can be moved from there."""
        target = Folder(self.out)
        return target if target.local is None else Folder(f"{self.work}/corpus")
